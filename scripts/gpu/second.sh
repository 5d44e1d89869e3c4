#!/usr/bin/env bash
# Six minutes on a GPU: accuracy and the time to it. Run in the repository's root, which need not be installed:
# bash scripts/gpu/second.sh OUT DATA_DIR [MINUTES [NAMES of scripts/gpu_accuracy.py's runs ...]].
set -uo pipefail
out=$1 data=$2 minutes=${3:-5.5}
shift $(($# < 3 ? $# : 3))
[ -d "$data" ] || { echo "error: there is no folder $data with CIFAR-10"; exit 1; }
. scripts/gpu/setup.sh
python scripts/gpu_accuracy.py --out "$out" --data-dir "$data" --minutes "$(left)" ${SMALL:+--small --precision float32} \
  ${1:+--runs "$@"}
ended
