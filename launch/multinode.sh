#!/usr/bin/env bash
# Several machines, no scheduler: run this on each of them, with the same recipe and a folder that all of them share.
#   NNODES=2 NODE_RANK=0 HEAD=node0:29400 RUN_DIR=/shared/runs/my-run launch/multinode.sh recipe.yaml [render options]
# The machine with NODE_RANK=0 renders the run, the others wait for it. GPUS=4 uses fewer GPUs of each machine.
set -euo pipefail
recipe=${1:?usage: NNODES= NODE_RANK= HEAD= RUN_DIR= multinode.sh RECIPE [options of distft render]}
shift
command -v distft > /dev/null || { echo "distft is not on PATH: activate its environment" >&2; exit 2; }
: "${NNODES:?}" "${NODE_RANK:?}" "${HEAD:?HOST:PORT of node 0}" "${RUN_DIR:?a new folder that all machines see}"
export NODE_RANK HEAD
[ "$NODE_RANK" -lt "$NNODES" ] || { echo "NODE_RANK: got $NODE_RANK, need 0 to $((NNODES - 1))" >&2; exit 2; }
if [ "$NODE_RANK" -eq 0 ]; then
  distft render "$recipe" --nodes "$NNODES" ${GPUS:+--gpus-per-node "$GPUS"} -o "$RUN_DIR" "$@"
fi
until [ -e "$RUN_DIR/status.json" ]; do # written last
  sleep 0.2
done
exec bash "$RUN_DIR/job.sh"
