"""``python -m img2vid.demo``."""

import sys

from img2vid.cli import main

if __name__ == "__main__":
    sys.exit(main(["demo", *sys.argv[1:]]))
