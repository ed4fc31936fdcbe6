# Sourced by the other scripts. make_venv [PIP ARGUMENT ...] makes .venv with
# the run-time requirements and what the arguments add.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# new_venv DIR: makes an empty one.
new_venv() {
  "$(command -v python3.11 || command -v python3)" -m venv "$1"
}

make_venv() {
  [ -x .venv/bin/python ] || new_venv .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check \
    -r requirements.txt "$@"
}
