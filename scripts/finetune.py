"""Fine-tune on a folder of photos: ``python scripts/finetune.py --help``; the same as ``jresnet finetune``."""

import sys

from jresnet.commands import script

if __name__ == "__main__":
    sys.exit(script("finetune", "finetune.py"))
