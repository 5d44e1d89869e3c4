"""Check jresnet on an accelerator: ``python scripts/gpu_check.py --out DIR``. See :mod:`gpu.check`."""

import sys

from gpu import check

if __name__ == "__main__":
    sys.exit(check.main())
