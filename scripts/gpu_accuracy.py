"""Measure accuracy and time: ``python scripts/gpu_accuracy.py --data-dir DIR --out OUT``. See :mod:`gpu.accuracy`."""

import sys

from gpu import accuracy

if __name__ == "__main__":
    sys.exit(accuracy.main())
