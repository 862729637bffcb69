"""decord, contained: refused where it is known to be wrong (guard.py), and stopped where it does not answer.

decord 0.6 can block for ever inside C++ without releasing anything to Python, so no timeout inside the process helps.
It runs in a child process, kept between reads and killed after `TIMEOUT_SECONDS`.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

from img2vid.data.backends import Reader, check_indices
from img2vid.data.backends.guard import ordinary_video, same_count
from img2vid.data.errors import VideoError, missing_extra

TIMEOUT_SECONDS = 30.0


class Child:
    """One decord process. A new one is started after a kill, and after a fork: pipes must not be shared."""

    def __init__(self):
        self.process, self.owner, self.lock = None, None, threading.Lock()

    def ask(self, label: str, source, indices):
        with self.lock:
            if self.process is None or self.owner != os.getpid() or self.process.poll() is not None:
                self._start()
            killer = threading.Timer(TIMEOUT_SECONDS, self.process.kill)
            killer.start()
            try:
                pickle.dump((source, indices), self.process.stdin, protocol=5)
                self.process.stdin.flush()
                reply = pickle.load(self.process.stdout)
            except (EOFError, OSError, pickle.UnpicklingError):
                reply = None
            finally:
                killer.cancel()
            if reply is None:
                self.stop()
                problem = f"decord crashed, or gave no answer within {TIMEOUT_SECONDS:g} seconds and was stopped"
                raise VideoError.about(label, problem + '. Use backend="pyav"')
        if reply[0] == "error":
            raise VideoError.about(label, f"decord could not read it ({reply[1]})")
        return reply[1:]

    def _start(self):
        script = Path(__file__).with_name("decord_child.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)},
        )
        self.owner = os.getpid()

    def stop(self):
        if self.process is not None and self.owner == os.getpid():
            self.process.kill()
            self.process.wait()
            self.process.stdin.close()
            self.process.stdout.close()
        self.process = None


CHILD = Child()
atexit.register(lambda: CHILD.stop())


class DecordReader(Reader):
    """Reads one video through decord. `on_error` does not apply: decord neither reports nor counts concealed damage."""

    def __init__(self, source, label: str, on_error: str = "raise"):
        if importlib.util.find_spec("decord") is None:
            raise missing_extra("decord", "decord", 'backend="decord"')
        self.label = label
        self.frames, self.fps, self.codec, self.container = ordinary_video(source, label, "decord")
        self.source = source if isinstance(source, str) else source.getvalue()

    def read(self, indices, count: bool = False) -> list:
        indices = check_indices(indices, self.frames, self.label)
        if not indices:
            return []
        counted, frames = CHILD.ask(self.label, self.source, indices)
        same_count(self.label, "decord", counted, self.frames)
        return list(frames)
