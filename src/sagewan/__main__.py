"""``python -m sagewan``."""

import sys

from sagewan.cli import main

if __name__ == "__main__":
    sys.exit(main())
