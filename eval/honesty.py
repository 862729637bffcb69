"""python eval/honesty.py --model FOLDER --data LIST ...: the same as `img2vid eval honesty`."""

import sys

from img2vid.cli import main

if __name__ == "__main__":
    sys.exit(main(["eval", "honesty", *sys.argv[1:]]))
