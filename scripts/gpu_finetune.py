"""Measure fine-tuning on a folder: ``python scripts/gpu_finetune.py --out DIR``. See :mod:`gpu.finetune`."""

import sys

from gpu import finetune

if __name__ == "__main__":
    sys.exit(finetune.main())
