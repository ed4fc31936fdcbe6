#!/usr/bin/env bash
# GPU nodes under Slurm, one process a GPU; the clone lies on a shared disk.
# Usage: bash launch/slurm.sh [--dry_run] --gpus-per-node=N [SBATCH OPTION ...]
#   -- --config=FILE --workdir=DIR ...
source "$(dirname "$0")/steps.sh"
read_arguments "$@"
gpus=$(value --gpus-per-node= "${options[@]}") # 4, or a100:4
require_tool sbatch
step make_venv 'jax[cuda12]' # here: compute nodes often reach no index
# JAX gives process i of a node the node's GPU i, so every process must see all
# of them. srun takes over what the job was given, but not the CPUs.
command=$(quoted .venv/bin/python -m ffp_jax.main "${program[@]}" \
  --coordinator=auto)
cpus="\${SLURM_CPUS_PER_TASK:+--cpus-per-task=\$SLURM_CPUS_PER_TASK}"
step sbatch --job-name=ffp_jax "${options[@]}" \
  --ntasks-per-node="${gpus##*:}" \
  --wrap="srun --kill-on-bad-exit=1 $cpus $command"
