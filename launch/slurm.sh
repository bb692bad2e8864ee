#!/usr/bin/env bash
#SBATCH --job-name=distft
#SBATCH --ntasks-per-node=1
#SBATCH --output=distft-%j.log
# Several nodes of a SLURM cluster, from a folder that all of them see:
#   sbatch --nodes=4 --gpus-per-node=8 launch/slurm.sh recipe.yaml [options of distft render]
set -euo pipefail
recipe=${1:?usage: sbatch --nodes=N --gpus-per-node=G slurm.sh RECIPE [options of distft render]}
shift
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export NNODES=$SLURM_NNODES RUN_DIR="$SLURM_SUBMIT_DIR/runs/slurm-$SLURM_JOB_ID"
# A port of this job's own, below those that systems hand out by themselves.
export HEAD="$head:$((20000 + SLURM_JOB_ID % 12000))"
# SLURM_NODEID differs from task to task, so bash expands it there.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 bash -c 'NODE_RANK=$SLURM_NODEID exec "$@"' node \
  "$SLURM_SUBMIT_DIR/launch/multinode.sh" "$recipe" "$@"
