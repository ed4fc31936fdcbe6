#!/usr/bin/env bash
# TPU slices of a GKE cluster that xpk made, one process a host. The image is
# this clone on top of Python; the requirements are installed at the start.
# Usage: bash launch/gke.sh [--dry_run] --cluster=C --workload=W --tpu-type=T
#   [XPK OPTION ...] -- --config=FILE --workdir=gs://BUCKET/DIR ...
source "$(dirname "$0")/steps.sh"
read_arguments "$@"
for name in --cluster= --workload= --tpu-type=; do
  value "$name" "${options[@]}" >/dev/null
done
value --workdir=gs:// "${program[@]}" >/dev/null # all hosts see it
require_tool xpk
install="pip install --quiet -r requirements.txt 'jax[tpu]' 'etils[epath-gcs]'"
command=$(quoted python -m ffp_jax.main "${program[@]}" \
  --coordinator=auto)
step xpk workload create --base-docker-image=python:3.11-slim \
  "${options[@]}" --command="$install && $command"
