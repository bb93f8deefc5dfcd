"""`python -m mixgrain`: the same as the command `mixgrain`."""

import sys

from mixgrain.tools.cli import main

if __name__ == "__main__":
    sys.exit(main())
