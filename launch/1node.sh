#!/usr/bin/env bash
# Every GPU of this machine: the same recipe, the same global batch, the same losses.
#   launch/1node.sh recipe.yaml [distft launch options]
# GPUS=4 uses fewer of them. On a machine without GPUs one process runs on the CPU.
set -euo pipefail
recipe=${1:?usage: 1node.sh RECIPE [options of distft launch]}
shift
command -v distft > /dev/null || { echo "distft is not on PATH: activate its environment" >&2; exit 2; }
exec distft launch "$recipe" ${GPUS:+--gpus-per-node "$GPUS"} "$@"
