#!/usr/bin/env bash
# Your own script under launch/accelerate/STRATEGY.yaml, without distft. It looks first whether what that needs is there:
# without GPUs `accelerate launch` would start lone copies that train apart, and nothing would say so.
#   launch/accelerate.sh zero2 script.py ARGS          every GPU of this machine; GPUS=4 uses fewer
#   NNODES=2 NODE_RANK=0 HEAD=node0:29400 launch/accelerate.sh hsdp script.py ARGS       on each of two machines
set -euo pipefail
usage="usage: [GPUS=] [NNODES= NODE_RANK= HEAD=] accelerate.sh ddp|zero1|zero2|zero3|fsdp|hsdp SCRIPT.py [ARGS]"
strategy=${1:?$usage} script=${2:?$usage}
shift 2
fail() { echo "error: $1" >&2; exit 2; }
root=$(cd "$(dirname "$0")/.." && pwd)
config=$root/launch/accelerate/$strategy.yaml
[ -f "$config" ] || fail "$strategy: there is no $config; $usage"
engine=torch
[[ $strategy != zero* ]] || engine=deepspeed
have=$(python -c 'import importlib.util as u, sys
missing = [name for name in sys.argv[1:] if not u.find_spec(name)]
print(*missing) if missing else print(__import__("torch").cuda.device_count())' torch accelerate $engine) || fail "no python"
[[ $have =~ ^[0-9]+$ ]] || fail "$(command -v python) lacks $have"
gpus=${GPUS:-$have} nodes=${NNODES:-1}
[ "$gpus" -gt 0 ] && [ "$gpus" -le "$have" ] ||
  fail "$strategy on ${GPUS:-the} GPUs of this machine: torch finds $have. For CPUs: distft launch -- $script"
more=(--num_processes $((nodes * gpus)) --num_machines "$nodes" --deepspeed_multinode_launcher standard)
[ "$nodes" -eq 1 ] || : "${NODE_RANK:?from 0}" "${HEAD:?HOST:PORT of node 0}"
[ "$nodes" -eq 1 ] || more+=(--machine_rank "$NODE_RANK" --main_process_ip "${HEAD%:*}" --main_process_port "${HEAD##*:}")
[[ $strategy != zero* ]] || more+=(--deepspeed_config_file "$root/ds_configs/$strategy.json")
[[ $strategy != hsdp ]] || more+=(--parallelism_config_dp_replicate_size "$nodes" --parallelism_config_dp_shard_size "$gpus")
exec python -m accelerate.commands.launch --config_file "$config" "${more[@]}" "$script" "$@"
