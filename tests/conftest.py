"""One thread per process: tests share the machine, and decoding is tested for exactness, not for speed."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
