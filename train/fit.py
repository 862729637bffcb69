"""python train/fit.py {fit,validate,test} --config configs/train/smoke.yaml [--trainer.max_epochs 3 ...]"""

import sys

from img2vid.training.fit import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
