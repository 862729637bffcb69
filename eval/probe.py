"""python eval/probe.py --model FOLDER --train LIST --data LIST ...: the same as `img2vid eval probe`."""

import sys

from img2vid.cli import main

if __name__ == "__main__":
    sys.exit(main(["eval", "probe", *sys.argv[1:]]))
