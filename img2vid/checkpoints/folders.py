"""Replace the files of a folder so that, whenever the writer dies, the folder still is one whole model.

All files are written to a hidden folder first. A folder that is not there yet then appears by one rename. One that is
there may hold other files of the user's, be a link, a mount point or in use, so it is not exchanged as a whole: files
are renamed into place one by one. The first is the weights, which carry their own description
(``native.read_description``), so that this one rename turns the old model into the new one, and whatever happens
before or after it leaves no mixture. Of several writers at once the last one wins.
"""

from __future__ import annotations

import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

LEFTOVER = ".img2vid-saving-"
STALE_SECONDS = 24 * 3600


@contextmanager
def replacing(folder: Path, names: Sequence[str], outdated: Sequence[str] = ()) -> Iterator[Path]:
    """A folder to write the files ``names`` in, of which those that were written end up in ``folder``, in that order.

    Args:
        outdated: files that would say something untrue beside the new ones; they go before anything else happens.

    Raises:
        OSError: no room, no permission, ...; nothing has been left behind then.
    """
    folder = folder.resolve()  # a link stays one
    home = folder if folder.is_dir() else folder.parent  # the file system in which renaming works
    home.mkdir(parents=True, exist_ok=True)
    remove_leftovers(home)
    temporary = home / f"{LEFTOVER}{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    temporary.mkdir()  # tempfile would make it private
    try:
        yield temporary
        finish(temporary)
        if home is folder or not renamed(temporary, folder):
            for name in outdated:
                (folder / name).unlink(missing_ok=True)
            for name in names:
                if (temporary / name).exists():
                    os.replace(temporary / name, folder / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def renamed(temporary: Path, folder: Path) -> bool:
    """Whether the whole folder could be put in place; not where another writer has made it meanwhile."""
    try:
        os.rename(temporary, folder)
    except OSError:
        if not folder.is_dir():
            raise
        return False
    return True


def finish(temporary: Path) -> None:
    """Files on the disk, not only on their way there, with the permissions that newly made ones would have."""
    usual = temporary / "usual"
    usual.touch()  # asking for the umask means setting it, for all threads
    mode = usual.stat().st_mode
    usual.unlink()
    for path in temporary.iterdir():
        path.chmod(mode)  # safetensors makes its file private
        with path.open("rb+") as file:
            os.fsync(file.fileno())


def remove_leftovers(home: Path) -> None:
    """Remove what killed writers have left behind, and nothing of writers that may be at work."""
    for path in home.glob(f"{LEFTOVER}*"):
        host, _, rest = path.name.removeprefix(LEFTOVER).rpartition("-")[0].rpartition("-")
        is_ours = host == socket.gethostname() and rest.isdigit()
        try:
            is_stale = (is_ours and not alive(int(rest))) or time.time() - path.stat().st_mtime > STALE_SECONDS
        except FileNotFoundError:  # its writer has just finished
            continue
        if is_stale:
            shutil.rmtree(path, ignore_errors=True)


def alive(pid: int) -> bool:
    if os.name == "nt":  # where signal 0 is not a question but Ctrl+C
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True
