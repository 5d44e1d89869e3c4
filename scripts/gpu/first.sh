#!/usr/bin/env bash
# Correctness on a GPU, and speed relative to PyTorch, in seven minutes. Run it in the repository's root; jresnet need not be
# installed: bash scripts/gpu/first.sh OUT [MINUTES [WHEELS [REFERENCES]]]. REFERENCES is written beforehand, on a machine with
# the same versions, by: python scripts/gpu_check.py --write-references REFERENCES. Results are written to OUT one by one.
set -uo pipefail
out=$1 minutes=${2:-6.5} wheels=${3:-} references=${4:-}
. scripts/gpu/setup.sh
python scripts/gpu_check.py --out "$out" --minutes "$(left 3)" $small ${references:+--references "$references"}
networks=("resnet18 32 512" "resnet50 224 64")
[ -z "$small" ] || networks=("resnet8_cifar 32 4")
for network in "${networks[@]}"; do
  read -r arch size batch <<<"$network"
  timeout "$(left 1.7)m" python scripts/gpu_trace.py --arch "$arch" --size "$size" --batch "$batch" --out "$out/$arch"
  rm -rf "$out/$arch/trace"
done
if [ -z "$small" ]; then
  python scripts/benchmark.py --device gpu --peer torch,torch-compile --minutes "$(left)" --force --json "$out/speed.json"
else
  python scripts/benchmark.py --suite infer --arch resnet8_cifar --batch 2 --rounds 1 --peer torch --minutes "$(left)" \
    --force --json "$out/speed.json"
fi
ended
