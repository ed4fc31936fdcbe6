# Sourced by the other scripts. make_venv [PIP ARGUMENT ...] makes .venv with
# the run-time requirements and what the arguments add.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

make_venv() {
  if ! [ -x .venv/bin/python ]; then
    "$(command -v python3.11 || command -v python3)" -m venv .venv
  fi
  .venv/bin/python -m pip install --quiet --disable-pip-version-check \
    -r requirements.txt "$@"
}
