#!/usr/bin/env bash
# The next six minutes on a GPU: accuracy and the time to it. Run in the repository's root, which need not be installed:
# bash scripts/gpu/second.sh OUT DATA_DIR [MINUTES [NAMES of scripts/gpu_accuracy.py's runs ...]].
set -uo pipefail
out=$1 data=$2 minutes=${3:-5.5}
shift $(($# < 3 ? $# : 3))
export PYTHONPATH=$PWD XLA_PYTHON_CLIENT_PREALLOCATE=false OMP_WAIT_POLICY=passive
mkdir -p "$out"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader >"$out/card.txt" 2>&1
[ -d "$data" ] || { echo "error: there is no folder $data with CIFAR-10"; exit 1; }
python scripts/gpu_accuracy.py --out "$out" --data-dir "$data" --minutes "$minutes" ${SMALL:+--small --precision float32} \
  ${1:+--runs "$@"}
echo "$SECONDS s; in $out:"
find "$out" -type f | sort
