#!/usr/bin/env bash
# Runs on GPU nodes under Slurm, one process per GPU. The clone must be on a
# disk that all nodes share.
# Usage: bash launch/slurm.sh [--dry_run] --gpus-per-node=N [SBATCH OPTION ...]
#   -- --config=FILE --workdir=DIR ...
source "$(dirname "$0")/steps.sh"
read_arguments "$@"
gpus=$(value --gpus-per-node= "${options[@]}") # 4, or a100:4
require_tool sbatch
step make_venv 'jax[cuda12]' # compute nodes often reach no package index
# JAX assigns GPU i of a node to its process i, so every process must see all of
# them. srun inherits the options of the job, except for the CPUs per task.
command=$(quoted .venv/bin/python -m ffp_jax.main "${program[@]}" \
  --coordinator=auto)
cpus="\${SLURM_CPUS_PER_TASK:+--cpus-per-task=\$SLURM_CPUS_PER_TASK}"
step sbatch --job-name=ffp_jax "${options[@]}" \
  --ntasks-per-node="${gpus##*:}" \
  --wrap="srun --kill-on-bad-exit=1 $cpus $command"
