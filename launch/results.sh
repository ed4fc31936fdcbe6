#!/usr/bin/env bash
# The table of docs/results.md: two sparsities and three seeds on one text,
# and the same budgets spread over the FFN alone (no search steps).
# Usage: bash launch/results.sh TEXT WORKDIR [--config.KEY=VALUE ...]
source "$(dirname "$0")/venv.sh"
make_venv
text=$1 workdir=$2
shift 2
run() {
  local name=$1
  shift
  .venv/bin/python -m ffp_jax.main --config=configs/llama.py \
    --config.text.heldout_windows=32 \
    --workdir="$workdir/$name" --config.data="$text" "$@"
}
for sparsity in 0.2 0.3; do
  for seed in 0 1 2; do
    run "$sparsity-$seed" --config.budget.sparsity="$sparsity" \
      --config.seed="$seed" "$@"
  done
  run "$sparsity-ffn" --config.budget.sparsity="$sparsity" \
    --config.search.steps='(0, 0)' "$@"
done
.venv/bin/python -m ffp_jax.benchmarks.table "$workdir"/*
