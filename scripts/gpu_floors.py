"""Compute lower bounds of a step's time: ``python scripts/gpu_floors.py --arch resnet50``. See :mod:`gpu.floors`."""

import sys

from gpu import floors

if __name__ == "__main__":
    sys.exit(floors.main())
