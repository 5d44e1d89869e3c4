#!/usr/bin/env bash
# Variants of training, each compared with the default: bash scripts/gpu/fourth.sh OUT [MINUTES [WORD ...]], with WORD as in
# scripts/gpu_variants.py --only.
set -uo pipefail
out=$1 minutes=${2:-6}
shift $(($# < 2 ? $# : 2))
. scripts/gpu/setup.sh
python scripts/gpu_variants.py --out "$out" --minutes "$(left)" $small ${1:+--only "$@"}
ended
