#!/usr/bin/env bash
# Prunes the demo model from a clean clone: installs, fetches, prunes, reports.
# Usage: bash launch/demo.sh [WORKDIR] [--config.budget.sparsity=0.3 ...]
source "$(dirname "$0")/venv.sh"
make_venv
workdir=runs/demo
if [ $# -gt 0 ] && [[ $1 != --* ]]; then
  workdir=$1
  shift
fi
.venv/bin/python -m ffp_jax.checkpoints.demo_model
# Large pages of memory make a step of recovery on CPU a fifth quicker.
export GLIBC_TUNABLES=glibc.malloc.hugetlb=1
.venv/bin/python -m ffp_jax.main \
  --config=configs/llama.py --workdir="$workdir" "$@"
