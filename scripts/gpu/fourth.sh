#!/usr/bin/env bash
# What pays: each way to train beside the usual one, in one run: bash scripts/gpu/fourth.sh OUT [MINUTES [WORDS of ways ...]].
set -uo pipefail
out=$1 minutes=${2:-6}
shift $(($# < 2 ? $# : 2))
. scripts/gpu/setup.sh
python scripts/gpu_variants.py --out "$out" --minutes "$(left)" $small ${1:+--only "$@"}
ended
