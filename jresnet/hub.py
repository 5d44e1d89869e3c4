"""Shares weights: ``python -m jresnet.hub push WEIGHTS hf:ORG/REPO`` and ``pull``; also :func:`push` and :func:`pull`."""

import sys

from jresnet.commands.share import main
from jresnet.sharing import pull, push

__all__ = ["pull", "push"]

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
