#!/usr/bin/env bash
# Runs the whole test suite, or what the arguments name.
# Usage: bash launch/test.sh [PYTEST ARGUMENT ...]
source "$(dirname "$0")/venv.sh"
make_venv -r tests/requirements.txt
# The TPU's compiler (690 MB) lies apart: beside jax it would look for a TPU
# whenever .venv is used.
libtpu=$PWD/.venv/libtpu
if ! [ -d "$libtpu" ]; then
  .venv/bin/python -m pip install --quiet --disable-pip-version-check \
    --no-deps --target "$libtpu" 'libtpu==0.0.42.*'
fi
export PYTHONPATH=$libtpu${PYTHONPATH:+:$PYTHONPATH}

run() {
  .venv/bin/python -m pytest -n logical --maxprocesses 4 --dist loadfile "$@"
}

if [ $# -gt 0 ]; then
  run "$@"
  exit
fi
# In three parts, as a process that has compiled for all of the tests dies of
# the memory maps that its programs hold. A file stays with one process, so that
# those that take minutes begin first.
longest=(sharding processes resume recovery plan tpu baselines published)
files=()
while read -r file; do
  files+=("$file")
done < <({ printf 'tests/%s_test.py\n' "${longest[@]}"; ls tests/*_test.py; } |
  awk '!seen[$0]++')
for part in 0 1 2; do
  these=()
  for ((i = part; i < ${#files[@]}; i += 3)); do
    these+=("${files[i]}")
  done
  run --no-loadscope-reorder "${these[@]}"
done
