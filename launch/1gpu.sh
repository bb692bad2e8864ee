#!/usr/bin/env bash
# One GPU (or one CPU process): the recipe as it is.
#   launch/1gpu.sh recipe.yaml [distft launch options]
set -euo pipefail
recipe=${1:?usage: 1gpu.sh RECIPE [options of distft launch]}
shift
command -v distft > /dev/null || { echo "distft is not on PATH: activate its environment" >&2; exit 2; }
exec distft launch "$recipe" --gpus-per-node 1 "$@"
