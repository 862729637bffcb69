"""python eval/zero_shot.py --model FOLDER --data LIST ...: the same as `img2vid eval zero-shot`."""

import sys

from img2vid.cli import main

if __name__ == "__main__":
    sys.exit(main(["eval", "zero-shot", *sys.argv[1:]]))
