"""A model as a program that runs without img2vid: ONNX, torch.export, TorchScript; or its weights in one file.

What is written is read back and run beside the model, on clips of other batch sizes and lengths than those it was
recorded with, before it takes its place: a file that computes something else never gets there.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from img2vid.checkpoints.exporting import umask_of, write_file
from img2vid.checkpoints.native import describe_model, main_dtype, separate
from img2vid.choices import PROGRAM_FORMATS
from img2vid.config import image_size_pair, one_of
from img2vid.model import VideoModel
from img2vid.programs import (
    INSTEAD,
    WRITERS,
    ExportError,
    Program,
    Run,
    describe,
    is_fused,
    last_line,
    least_steps,
    need_onnx,
)
from img2vid.two_towers import VideoTextModel

# largest difference from eager, as a share of the largest output
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
CHECKED = [(1, 1), (2, 1), (1, 5), (3, 2), (2, 8)]  # clips and steps: frames, or tubelets where there are some


@dataclass
class Export:
    """What has been written: ``differences`` from eager for each shape tried, and what ``metadata`` the file holds."""

    path: Path
    differences: dict[tuple[int, ...], float] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def max_difference(self) -> float:
        return max(self.differences.values(), default=0.0)


def export_program(
    model: VideoModel | VideoTextModel,
    path: str | Path,
    format: str,
    *,
    text: bool = False,
    pixels: bool = False,
    fold: bool = False,
    image_size: int | tuple[int, int] | None = None,
) -> Export:
    """Write a model as a program with open batch and frames, or its weights alone, checked before it is there.

    Args:
        path: the file to write. ONNX files beyond 2 GB have a second one, ``path`` + ``.data``, beside them.
        format: ``onnx``, ``torch-export`` (``torch.export.load``), ``torchscript`` (``torch.jit.load``), or
            ``safetensors``: all weights under the model's names.
        text: the text tower of a video-text model (token ids (B, L) in) instead of its video tower.
        pixels: take uint8 pixels (B, T, C, H, W) and normalise them inside; otherwise normalised clips.
        image_size: of the clips, one number or (height, width), where it is not the model's own.
        fold: fold the gates along time into the projections before them, as ``model.fuse()`` does.

    Returns:
        The differences from eager and what the file says of itself.

    Raises:
        ExportError: the model cannot be exported so, an extra is missing, or the program differs from the model by
            more than ``TOLERANCES``. Nothing is left at ``path`` that was not there before.
    """
    one_of("format", format, PROGRAM_FORMATS)
    path = Path(path)
    check_place(path, format, text, pixels, fold, image_size)
    check_request(model, format, text)
    if format == "safetensors":
        return export_weights(model, path)
    program = Program(model, text, pixels, None if image_size is None else image_size_pair(image_size)).eval()
    shapes = [program.recorded_with, *(shape for shape in CHECKED if shape[1] >= least_steps(program, format))]
    folded = fused(model) if fold and not is_fused(model) else nullcontext()
    with torch.no_grad(), writing(path) as temporary:
        expected = {shape: program(program.example(*shape)) for shape in shapes}  # by the model as it is
        with folded:
            run = WRITERS[format](program, temporary, metadata := describe(program, format))
        written = Export(path, metadata=metadata)
        compare(run, program, expected, written, format)
    return written


def check_place(
    path: Path,
    format: str,
    text: bool = False,
    pixels: bool = False,
    fold: bool = False,
    image_size: int | tuple[int, int] | None = None,
) -> None:
    """What can be said before there is a model."""
    if path.is_dir():
        raise ExportError(f"{path} is a folder; --format {format} writes one file. Give its name.")
    if format == "torch-export" and path.suffix != ".pt2":
        raise ExportError(f"torch.export.load reads files that end in .pt2; name it {path.with_suffix('.pt2')}.")
    sized = image_size is not None
    if text and (pixels or fold or sized):
        raise ExportError("--pixels, --fold and --image-size are about the video tower; leave them out with --text.")
    if format == "safetensors" and (text or pixels or fold or sized):
        raise ExportError(
            "--format safetensors holds weights, under the names the model has, and no computation: --text, --pixels, "
            "--fold and --image-size are for onnx, torch-export and torchscript."
        )
    if format == "onnx":
        need_onnx()


def check_request(model: nn.Module, format: str, text: bool) -> None:
    if model.training:
        raise ExportError("The model is in training mode, in which it drops at random; export model.eval().")
    if format != "safetensors" and not text and model.takes_beside:
        raise ExportError(
            f"This model takes {', '.join(model.takes_beside)} beside clips, and a program has one input. Take that "
            "off first (img2vid.grafts.remove), or export its weights: --format safetensors."
        )
    if text and not isinstance(model, VideoTextModel):
        raise ExportError(f"This {type(model).__name__} has no text tower; leave out --text.")
    if format == "onnx" and main_dtype(model) == torch.bfloat16:
        raise ExportError(
            "onnxruntime computes no bfloat16 on the CPU, so such a file could not be checked. Export "
            "model.float() (--dtype float32), or --format torch-export."
        )


@contextmanager
def fused(model: VideoModel | VideoTextModel) -> Iterator[None]:
    model.fuse()
    try:
        yield
    finally:
        model.unfuse()


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A name to write to, moved to ``path`` with what lies beside it once everything inside has succeeded."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".img2vid-export-") as home:
            mode = 0o666 & ~umask_of(home)
            os.remove(os.path.join(home, "usual"))
            yield Path(home, path.name)
            # the program itself comes last: where it is, everything it needs is
            for name in sorted(os.listdir(home), key=lambda name: name == path.name):
                os.chmod(os.path.join(home, name), mode)
                os.replace(os.path.join(home, name), path.parent / name)
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error.strerror or error}.") from error


def export_weights(model: VideoModel | VideoTextModel, path: Path) -> Export:
    """All weights, with what config.json would say in the header; read back, they are the same bits."""
    from safetensors.torch import load_file, save_file

    state, metadata = model.state_dict(), {"img2vid": json.dumps(describe_model(model))}

    def write(file: str) -> None:
        save_file(separate(state), file, metadata=metadata)
        again = load_file(file)
        wrong = [name for name, tensor in state.items() if not torch.equal(again[name], tensor.cpu())]
        if wrong:
            raise ExportError(f"Weights have changed on their way into {path}: {', '.join(sorted(wrong)[:5])}.")

    write_file(path, write)
    return Export(path, metadata=metadata)


# ---- checking


def compare(run: Run, program: Program, expected: dict, written: Export, format: str) -> None:
    largest = max(float(tensor.abs().max()) for tensor in expected.values()) or 1.0
    tolerance = TOLERANCES.get(program.dtype, 1e-4) * largest
    for shape, eager in expected.items():
        example = program.example(*shape)
        what = f"{tuple(example.shape)} as {program.names()[0]}"
        try:
            got = run(example)
        except Exception as error:  # whatever a runtime raises, the file is of no use
            reason = last_line(error)
            raise ExportError(
                f"The {format} program fails on {what}: {reason} Nothing was written. {hint(format)}".rstrip()
            ) from error
        if got.shape != eager.shape:
            raise ExportError(
                f"The {format} program makes {tuple(got.shape)} of {what}, the model {tuple(eager.shape)}; it is fixed "
                f"to the shape it was recorded with. Nothing was written. {hint(format)}".rstrip()
            )
        difference = float((got.to(eager.device).double() - eager.double()).abs().max())
        written.differences[tuple(example.shape)] = difference
        if not difference <= tolerance:  # nan too
            raise ExportError(
                f"The {format} program differs from the model by {difference:.3g} on {what}, where {tolerance:.3g} is "
                f"allowed. Nothing was written. {hint(format)}".rstrip()
            )


def hint(format: str) -> str:
    return INSTEAD if format == "torchscript" else ""
