"""What a file is that holds no weights, said by name: told from its first bytes, and none of it is run."""

from __future__ import annotations

import io
import pickletools
import zipfile
from pathlib import Path
from typing import IO

from img2vid.weights.torchscript import DAMAGED, names_in_zip

HTML = "an HTML page, probably a login or error page of a download; fetch the file itself"
NUMPY = (
    "a NumPy archive. Let timm read it, image_model = timm.create_model(NAME); "
    "timm.models.load_checkpoint(image_model, FILE), then img2vid.convert(image_model) or save its state_dict()"
)
SIGNATURES = {
    b"version https://git-lfs": "a git-lfs pointer, not the file it points to; run git lfs pull in its repository",
    b"<!doctype html": HTML,
    b"<html": HTML,
    b"<?xml": "an XML page, probably an error answer of a download",
    b"{": "JSON text, perhaps an error answer of a download",
    b"\x93numpy": NUMPY,
    b"\x89hdf": "an HDF5 file, as Keras writes them, for which there is no reader here",
    b"\x1f\x8b": "compressed (gzip); unpack it first",
}


def something_else(path: Path, head: bytes) -> str | None:
    """What a file is that cannot hold weights, by its first bytes; None where it may."""
    if head.startswith(b"PK"):
        return zip_of_something_else(path)
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return next((what for start, what in SIGNATURES.items() if text.startswith(start)), None)


def zip_of_something_else(path: Path) -> str | None:
    names = names_in_zip(path)
    if names is None:
        return "damaged or truncated: a torch.save archive whose end is missing; download or copy it again"
    if any(name.endswith(".npy") for name in names):
        return NUMPY
    if any(name.endswith("/constants.pkl") for name in names):
        return "a TorchScript archive, which is code. Save torch.jit.load(FILE).state_dict() with torch.save instead"
    if not any(name.endswith("data.pkl") for name in names):
        return f"a zip archive of other files ({', '.join(names[:3]) or 'none'}); unpack it first"
    return None


# what torch.save wrote before it wrote archives: four pickles, the first of which is this number
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
TRUST = (
    "Pickles can run code, so only tensors in plain containers are accepted. If you trust its author, load it with "
    "their own code and save torch.save(model.state_dict(), ...) or safetensors."
)


def refused_pickle(path: Path, reason: str, needed: str | None) -> str:
    """Why a file was not unpickled: it is no pickle, one of another writer, or one that holds more than tensors.

    Args:
        reason: what the unpickler said.
        needed: the function or class that it would have had to call, where it says which.
    """
    if needed is not None:
        return f"it is no plain weights file but needs {needed} to be rebuilt, as whole pickled models do. {TRUST}"
    if not is_pickle(path):
        with path.open("rb") as file:
            begin = file.read(8)
        return (
            f"it is neither a file of torch.save nor of safetensors, or was damaged: it begins with {begin!r}. "
            "Download or copy it again."
        )
    if "Unsupported operand" in reason:
        return f"another pickler than torch.save's wrote it, such as pickle.dump. {TRUST}"
    return f"it is no plain weights file but holds more than tensors. {TRUST}"


def is_pickle(path: Path) -> bool:
    """Whether it reads as the instructions of a pickle, up to the last; none of them is carried out."""
    try:
        if names := names_in_zip(path):
            with zipfile.ZipFile(path) as archive:
                content = next(name for name in names if name.endswith("data.pkl"))
                return num_instructions(io.BytesIO(archive.read(content))) > 1
        with path.open("rb") as file:
            pickles = 4 if file.read(len(LEGACY)) == LEGACY else 1
            file.seek(0)
            return all(num_instructions(file) > 1 for _ in range(pickles))  # one that ends at once holds nothing
    except (*DAMAGED, StopIteration, MemoryError):  # the last where damage asks for a text of terabytes
        return False


def num_instructions(pickled: IO[bytes]) -> int:
    return sum(1 for _ in pickletools.genops(pickled))
