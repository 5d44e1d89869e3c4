"""Train a ResNet on CIFAR-10: ``python scripts/train_cifar10.py --depth 34``; the same as ``jresnet train``."""

import sys

from jresnet.commands import script

if __name__ == "__main__":
    sys.exit(script("train", "train_cifar10.py"))
