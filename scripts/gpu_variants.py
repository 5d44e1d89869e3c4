"""Compare ways to train on an accelerator: ``python scripts/gpu_variants.py --out DIR``. See :mod:`gpu.variants`."""

import sys

from gpu import variants

if __name__ == "__main__":
    sys.exit(variants.main())
