#!/usr/bin/env bash
# Runs on all NVIDIA GPUs of this host, in one process.
# Usage: bash launch/gpu.sh [--dry_run] -- --config=FILE --workdir=DIR ...
source "$(dirname "$0")/steps.sh"
read_arguments "$@"
[ ${#options[@]} -eq 0 ] || refuse "unknown option ${options[0]}"
require_tool nvidia-smi
step make_venv 'jax[cuda12]'
step .venv/bin/python -m ffp_jax.main "${program[@]}"
