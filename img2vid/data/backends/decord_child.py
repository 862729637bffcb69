"""decord in a process of its own, so that it can be stopped when it hangs. Run by decord.py, never imported.

Answers pickled requests on stdin with pickled answers on stdout: (source, indices or None) -> ("ok", count, frames) or
("error", message). `source` is a path or the file's bytes.
"""

import io
import os
import pickle
import sys


def answer(decord, source, indices):
    reader = decord.VideoReader(io.BytesIO(source) if isinstance(source, bytes) else source, num_threads=1)
    frames = None if indices is None else reader.get_batch(indices).asnumpy()  # (T, H, W, 3)
    return "ok", len(reader), frames


def main():
    sys.path.pop(0)  # this folder: its decord.py would hide the library
    import decord

    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever the libraries print must not end up among the answers
    while True:
        try:
            request = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            reply = answer(decord, *request)
        except Exception as error:
            reply = ("error", str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__)
        pickle.dump(reply, answers, protocol=5)
        answers.flush()


if __name__ == "__main__":
    main()
