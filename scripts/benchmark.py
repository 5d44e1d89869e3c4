"""Measure jresnet's speed, and PyTorch's beside it: ``python scripts/benchmark.py``. See :mod:`benchmark.driver`."""

import sys

from benchmark import driver

if __name__ == "__main__":
    driver.handle_signals()
    sys.exit(driver.main())
