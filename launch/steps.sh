# Sourced by the launchers: reads their arguments, refuses bad ones and
# implements --dry_run.
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

# refuse WORD ...: prints one line and exits with code 2.
refuse() {
  echo "${0##*/}: $*" >&2
  exit 2
}

# read_arguments ARGUMENT ...: sets dry_run, options (the arguments before --)
# and program (those after it, for ffp_jax.main).
read_arguments() {
  dry_run='' options=() program=()
  while [ $# -gt 0 ] && [ "$1" != -- ]; do
    if [ "$1" = --dry_run ]; then dry_run=yes; else options+=("$1"); fi
    shift
  done
  [ $# -gt 1 ] || refuse 'give --config=... and --workdir=... after --'
  program=("${@:2}")
  value --config= "${program[@]}" >/dev/null
  value --workdir= "${program[@]}" >/dev/null
}

# value PREFIX ARGUMENT ...: prints what follows PREFIX in the last argument
# that starts with it; refuses if none does.
value() {
  local prefix=$1 argument found=''
  for argument in "${@:2}"; do
    case $argument in "$prefix"*) found=${argument#"$prefix"} ;; esac
  done
  [ -n "$found" ] || refuse "$prefix... is missing"
  printf '%s\n' "$found"
}

# require_tool TOOL: refuses if TOOL is missing; a dry run needs no tool.
require_tool() {
  [ -n "$dry_run" ] || command -v "$1" >/dev/null || refuse "no $1 on the PATH"
}

# quoted WORD ...: prints the words quoted for any POSIX shell.
quoted() {
  local word line='' escaped="'\\''"
  for word; do
    case $word in
      '' | *[!A-Za-z0-9_@%+=:,./-]*) word="'${word//"'"/$escaped}'" ;;
    esac
    line+="${line:+ }$word"
  done
  printf '%s\n' "$line"
}

# step COMMAND ...: runs the command; a dry run prints it.
step() {
  if [ -n "$dry_run" ]; then quoted "$@"; else "$@"; fi
}
