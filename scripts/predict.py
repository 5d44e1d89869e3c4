"""Classify images: ``python scripts/predict.py --weights W photo.jpg``; the same as ``jresnet predict``."""

import sys

from jresnet.commands import script

if __name__ == "__main__":
    sys.exit(script("predict", "predict.py"))
