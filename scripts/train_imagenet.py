"""Train on ImageNet from scratch: ``python scripts/train_imagenet.py --help``; the same as ``jresnet train-imagenet``."""

import sys

from jresnet.commands import script

if __name__ == "__main__":
    sys.exit(script("train-imagenet", "train_imagenet.py"))
