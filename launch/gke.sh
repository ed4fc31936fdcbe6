#!/usr/bin/env bash
# Runs on TPU slices of a GKE cluster made by xpk, one process per host. The
# image is this clone on a Python image; the requirements are installed first.
# Usage: bash launch/gke.sh [--dry_run] --cluster=C --workload=W --tpu-type=T
#   [XPK OPTION ...] -- --config=FILE --workdir=gs://BUCKET/DIR ...
source "$(dirname "$0")/steps.sh"
read_arguments "$@"
for name in --cluster= --workload= --tpu-type=; do
  value "$name" "${options[@]}" >/dev/null
done
value --workdir=gs:// "${program[@]}" >/dev/null # which all hosts see
require_tool xpk
install="pip install --quiet -r requirements.txt 'jax[tpu]' 'etils[epath-gcs]'"
command=$(quoted python -m ffp_jax.main "${program[@]}" \
  --coordinator=auto)
step xpk workload create --base-docker-image=python:3.11-slim \
  "${options[@]}" --command="$install && $command"
