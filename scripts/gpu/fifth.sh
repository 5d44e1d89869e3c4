#!/usr/bin/env bash
# Fine-tuning on generated photos, and how long the device waits: bash scripts/gpu/fifth.sh OUT [MINUTES [WHEELS]].
# Decoding needs grain, array_record, portpicker and opencv-python-headless; they are installed from the folder WHEELS if given.
set -uo pipefail
out=$1 minutes=${2:-6} wheels=${3:-}
. scripts/gpu/setup.sh
python scripts/gpu_finetune.py --out "$out" --minutes "$(left)" $small
ended
