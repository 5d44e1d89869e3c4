#!/usr/bin/env bash
# Fine-tuning on a folder of photos that it makes, and who waits: bash scripts/gpu/fifth.sh OUT [MINUTES [WHEELS]].
# It needs grain, array_record and portpicker, which decode ahead of the device: from WHEELS where they are not installed.
set -uo pipefail
out=$1 minutes=${2:-6} wheels=${3:-}
. scripts/gpu/setup.sh
python scripts/gpu_finetune.py --out "$out" --minutes "$(left)" $small
ended
