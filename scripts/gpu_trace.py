"""Profile a training step: ``python scripts/gpu_trace.py --arch resnet50 --out DIR``. See :mod:`gpu.trace`."""

import sys

from gpu import trace

if __name__ == "__main__":
    sys.exit(trace.main())
