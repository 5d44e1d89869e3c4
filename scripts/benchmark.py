"""Compare jresnet's speed with PyTorch's: ``python scripts/benchmark.py``. See :mod:`benchmark.driver`."""

import sys

from benchmark import driver

from jresnet.commands import guarded

if __name__ == "__main__":
    driver.handle_signals()
    sys.exit(guarded(driver.main, "benchmark.py"))
