"""``python -m jresnet`` runs the command ``jresnet``."""

import sys

from jresnet.commands import main

sys.exit(main())
