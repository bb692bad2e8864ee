#!/usr/bin/env bash
#SBATCH --job-name=distft
#SBATCH --ntasks-per-node=1
#SBATCH --output=distft-%j.log
# Several nodes of a SLURM cluster, from a folder that all of them share. Inside the job distft starts its ranks with srun:
#   sbatch --nodes=4 --gpus-per-node=8 launch/slurm.sh recipe.yaml [options of distft launch]
# With a site profile you need no script: distft launch recipe.yaml --cluster PROFILE --nodes 4
set -euo pipefail
recipe=${1:?usage: sbatch --nodes=N --gpus-per-node=G slurm.sh RECIPE [options of distft launch]}
shift
command -v distft > /dev/null || { echo "distft is not on PATH: activate its environment" >&2; exit 2; }
: "${SLURM_JOB_ID:?is not set: this script is for sbatch; without SLURM use 1node.sh}"
exec distft launch "$recipe" "$@"
