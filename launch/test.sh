#!/usr/bin/env bash
# Runs the whole test suite.
# Usage: bash launch/test.sh [PYTEST ARGUMENT ...]
source "$(dirname "$0")/venv.sh"
make_venv -r tests/requirements.txt
.venv/bin/python -m pytest -n logical --maxprocesses 4 --dist loadfile "$@"
