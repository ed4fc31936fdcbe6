#!/usr/bin/env bash
# Runs on a Cloud TPU slice, one process per host. Creates the slice unless it
# exists, installs and runs on all of its hosts, and fetches the result.
# Usage: bash launch/tpu_pod.sh [--dry_run] NAME --zone=Z --accelerator-type=T
#   --version=V [CREATE OPTION ...]
#   -- --config=FILE --workdir=gs://BUCKET/DIR ...
source "$(dirname "$0")/steps.sh"
read_arguments "$@"
slice=${options[0]-}
[[ $slice == [a-z]* ]] || refuse 'give the name of the slice first'
for name in --zone= --accelerator-type= --version=; do
  value "$name" "${options[@]}" >/dev/null
done
bucket=$(value --workdir=gs:// "${program[@]}") # which all hosts see
require_tool gcloud
tpu_vm=(gcloud compute tpus tpu-vm) where=()
for option in "${options[@]}"; do
  case $option in --zone=* | --project=*) where+=("$option") ;; esac
done

on_all_hosts() {
  step "${tpu_vm[@]}" ssh "$slice" "${where[@]}" --worker=all --command="$1"
}

if [ -n "$dry_run" ] ||
  ! "${tpu_vm[@]}" describe "$slice" "${where[@]}" >/dev/null 2>&1; then
  step "${tpu_vm[@]}" create "${options[@]}"
fi
delete=$(quoted "${tpu_vm[@]}" delete "$slice" "${where[@]}")
trap 'echo "$slice costs until it is deleted: $delete" >&2' EXIT
on_all_hosts 'rm -rf ffp_jax_run && mkdir ffp_jax_run'
step "${tpu_vm[@]}" scp --recurse requirements.txt configs ffp_jax \
  "$slice:ffp_jax_run" "${where[@]}" --worker=all
# The hosts' own Python may be too old for JAX; uv installs another.
on_all_hosts "curl -LsSf https://astral.sh/uv/install.sh | sh && \
cd ffp_jax_run && ~/.local/bin/uv venv --python=3.11 && ~/.local/bin/uv pip \
install --quiet -r requirements.txt 'jax[tpu]' 'etils[epath-gcs]'"
on_all_hosts "cd ffp_jax_run && $(quoted .venv/bin/python -m ffp_jax.main \
  "${program[@]}" --coordinator=auto)"
step mkdir -p "runs/$bucket"
step gcloud storage rsync --recursive "gs://$bucket" "runs/$bucket"
