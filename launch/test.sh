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
# the memory maps that its programs hold.
files=(tests/*_test.py)
third=$(((${#files[@]} + 2) / 3))
for ((i = 0; i < ${#files[@]}; i += third)); do
  run "${files[@]:i:third}"
done
