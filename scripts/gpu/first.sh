#!/usr/bin/env bash
# The first seven minutes on a GPU: is it right there, and how fast beside PyTorch. Run in the repository's root, which need
# not be installed: bash scripts/gpu/first.sh OUT [MINUTES [WHEELS]]. Results are in OUT as soon as they are known.
set -uo pipefail
out=$1 minutes=${2:-6.5} wheels=${3:-}
export PYTHONPATH=$PWD XLA_PYTHON_CLIENT_PREALLOCATE=false OMP_WAIT_POLICY=passive
mkdir -p "$out"
[ -z "$wheels" ] || python -m pip install -q --no-index --no-deps "$wheels"/*.whl || echo "without tensorboardX"
left() { python -c "print(max(0.1, $minutes - $SECONDS / 60))"; }
small=${SMALL:+--small}
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader >"$out/card.txt" 2>&1
python scripts/gpu_check.py --out "$out" --minutes "$(python -c "print(min(3.0, $(left)))")" $small
for network in "resnet18 32 512" "resnet50 224 64"; do
  read -r arch size batch <<<"$network"
  [ -z "$small" ] || batch=4 size=32
  timeout 60 python scripts/gpu_trace.py --arch "$arch" --size "$size" --batch "$batch" --out "$out/$arch"
  rm -rf "$out/$arch/trace"
done
if [ -z "$small" ]; then
  python scripts/benchmark.py --device gpu --peer torch,torch-compile --minutes "$(left)" --json "$out/speed.json"
else
  python scripts/benchmark.py --arch resnet20_cifar --batch 2 --rounds 1 --peer torch --minutes "$(left)" --json "$out/speed.json"
fi
echo "$SECONDS s; in $out:"
find "$out" -type f | sort
