#!/usr/bin/env bash
# Deeper networks, and runs that choose the best epoch on validation images: bash scripts/gpu/third.sh OUT DATA_DIR [MINUTES].
set -uo pipefail
exec bash scripts/gpu/second.sh "$1" "$2" "${3:-13}" resnet20-step-val resnet56-step resnet18-step-val resnet34-step \
  resnet18-long resnet50-step
