"""python eval/retrieval.py --model FOLDER --data LIST ...: the same as `img2vid eval retrieval`."""

import sys

from img2vid.cli import main

if __name__ == "__main__":
    sys.exit(main(["eval", "retrieval", *sys.argv[1:]]))
