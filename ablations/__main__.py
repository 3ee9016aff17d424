"""``python -m ablations``: the same as ``sievit``."""

import sys

from ablations.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
