"""``python -m img2vid`` is ``img2vid``."""

import sys

from img2vid.cli import main

if __name__ == "__main__":
    sys.exit(main())
