#!/usr/bin/env bash
# Accuracy on a GPU and the time to reach it, in six minutes. Run it in the repository's root; jresnet need not be installed:
# bash scripts/gpu/second.sh OUT DATA_DIR [MINUTES [RUN ...]], with RUN as in scripts/gpu_accuracy.py --runs.
set -uo pipefail
out=$1 data=$2 minutes=${3:-5.5}
shift $(($# < 3 ? $# : 3))
[ -d "$data" ] || { echo "error: $data is not a folder: expected the folder of CIFAR-10"; exit 1; }
. scripts/gpu/setup.sh
python scripts/gpu_accuracy.py --out "$out" --data-dir "$data" --minutes "$(left)" ${SMALL:+--small --precision float32} \
  ${1:+--runs "$@"}
ended
