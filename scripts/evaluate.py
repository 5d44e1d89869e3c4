"""Evaluate weights: ``python scripts/evaluate.py --weights FILE --data cifar10``; also ``jresnet evaluate``."""

import sys

from jresnet.commands import script

if __name__ == "__main__":
    sys.exit(script("evaluate", "evaluate.py"))
