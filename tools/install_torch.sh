#!/usr/bin/env bash
# Install torch for this machine: the plain build with an NVIDIA GPU, otherwise the CPU build (a tenth of the
# download).  tools/install_torch.sh PYTHON REQUIREMENT [options of pip that say where from]
set -euo pipefail
python=$1 requirement=$2
shift 2

if "$python" -c 'import torch' 2>/dev/null; then
  exit 0
fi
if [ $# -gt 0 ]; then
  exec "$python" -m pip install --quiet "$requirement" "$@"
fi
if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
  echo "installing $requirement"
  exec "$python" -m pip install --quiet "$requirement"
fi
echo "no NVIDIA GPU: installing the CPU build of $requirement"
# An index that pip is configured with may have the CPU build; its version ends in +cpu, which the main index never has.
if [[ $requirement == *==* ]] && "$python" -m pip install --quiet "$requirement+cpu" 2>/dev/null; then
  exit 0
fi
# uv knows where PyTorch publishes its CPU builds.
"$python" -m pip install --quiet uv
exec "$python" -m uv pip install --python "$python" --torch-backend cpu "$requirement"
