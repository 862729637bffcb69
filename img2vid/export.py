"""A model as a program that runs without img2vid: ONNX, torch.export, TorchScript; or its weights in one file.

Two dimensions are dynamic, the batch and the number of frames: T goes through every layer as a number of its own (see
``img2vid.temporal.clip``), so a program that was recorded at one T is right at others, T = 1 included. Height and width
are fixed: at its own size a model takes its positions as they are and elsewhere it resamples them, which are two
programs (and the antialiased resampling is not the same in every runtime).

What is written is read back and run beside the model, on clips of other batch sizes and lengths than the one it was
recorded with, before it takes its place: a file that computes something else never gets there.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from img2vid._version import __version__
from img2vid.backbones.tower import classes_of
from img2vid.checkpoints.exporting import umask_of, write_file
from img2vid.checkpoints.native import describe_model, main_dtype, separate
from img2vid.choices import PROGRAM_FORMATS
from img2vid.config import one_of
from img2vid.errors import Img2VidError
from img2vid.model import VideoModel, VideoTextModel, first
from img2vid.temporal.fusing import branches

# largest difference from eager, as a share of the largest output
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
CHECKED = [(1, 1), (2, 1), (1, 5), (3, 2), (2, 8)]  # clips and steps: frames, or tubelets where there are some
ONNX = ("onnx", "onnxscript", "onnxruntime")  # the extra "export"
METADATA = "img2vid.json"  # where torch.export and TorchScript keep what ONNX keeps in its metadata

Run = Callable[[Tensor], Tensor]


class ExportError(Img2VidError):
    """A model that cannot be exported as asked, or a program that does not compute what the model computes."""


@dataclass
class Export:
    """What has been written: ``differences`` from eager for each shape tried, and what ``metadata`` the file holds."""

    path: Path
    differences: dict[tuple[int, ...], float] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def max_difference(self) -> float:
        return max(self.differences.values(), default=0.0)


class Program(nn.Module):
    """What is exported: one tensor in, one out, in the words of clips."""

    def __init__(self, model: VideoModel | VideoTextModel, text: bool, pixels: bool) -> None:
        super().__init__()
        self.model, self.text, self.pixels = model, text, pixels
        self.dtype = main_dtype(model)

    def forward(self, x: Tensor) -> Tensor:
        if self.text:
            return first(self.model.encode_text(x))
        if self.pixels:
            x = self.model.normalize(x).to(self.dtype)
        return self.model.encode_video(x) if isinstance(self.model, VideoTextModel) else first(self.model(x))

    def names(self) -> tuple[str, str]:
        given = "tokens" if self.text else "pixels" if self.pixels else "clips"
        video = self.model
        has_classes = isinstance(video, VideoModel) and (video.config.num_classes is not None or classes_of(video.base))
        return given, "logits" if has_classes else "features"

    def example(self, batch: int, steps: int) -> Tensor:
        """Random input: clips (B, T, C, H, W), pixels of them as bytes, or token ids (B, L)."""
        generator = torch.Generator().manual_seed(100 * batch + steps)
        device = next(self.model.parameters()).device
        if self.text:
            shape = (batch, self.model.context_length)
            return torch.randint(1, self.model.vocab_size, shape, generator=generator).to(device)
        video = self.model.visual if isinstance(self.model, VideoTextModel) else self.model
        shape = (batch, steps * video.config.tubelet_size, video.tower.in_channels, *video.tower.image_size)
        if self.pixels:
            return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(device)
        return torch.randn(shape, generator=generator).to(device, self.dtype)

    @property
    def recorded_with(self) -> tuple[int, int]:
        """Clips and steps: not 1, which is taken for a constant, nor the model's own T, where it need not resample."""
        return (2, 3) if self.model.config.num_steps != 3 else (2, 4)

    def dynamic(self) -> dict[int, Any]:
        """The dimensions that are open."""
        dim = torch.export.Dim
        if self.text:
            return {0: dim("batch", min=1)}
        return {0: dim("batch", min=1), 1: self.tubelet_size * dim("steps", min=1)}

    @property
    def tubelet_size(self) -> int:
        return self.model.config.tubelet_size


def export_program(
    model: VideoModel | VideoTextModel,
    path: str | Path,
    format: str,
    *,
    text: bool = False,
    pixels: bool = False,
    fold: bool = False,
) -> Export:
    """Write a model as a program with open batch and frames, or its weights alone, checked before it is there.

    Args:
        path: the file to write. ONNX files beyond 2 GB have a second one, ``path`` + ``.data``, beside them.
        format: ``onnx``, ``torch-export`` (``torch.export.load``), ``torchscript`` (``torch.jit.load``), or
            ``safetensors``: all weights under the model's names.
        text: the text tower of a video-text model (token ids (B, L) in) instead of its video tower.
        pixels: take uint8 pixels (B, T, C, H, W) and normalise them inside; otherwise normalised clips.
        fold: fold the gates along time into the projections before them, as ``model.fuse()`` does.

    Returns:
        The differences from eager and what the file says of itself.

    Raises:
        ExportError: the model cannot be exported so, an extra is missing, or the program differs from the model by
            more than ``TOLERANCES``. Nothing is left at ``path`` that was not there before.
    """
    one_of("format", format, PROGRAM_FORMATS)
    path = Path(path)
    check_request(model, path, format, text, pixels, fold)
    if format == "safetensors":
        return export_weights(model, path)
    program = Program(model, text, pixels).eval()
    reset = nullcontext() if not fold or is_fused(model) else fused(model)
    with torch.no_grad(), reset, writing(path) as temporary:
        expected = {shape: program(program.example(*shape)) for shape in [program.recorded_with, *CHECKED]}
        written = Export(path, metadata=describe(program, format))
        run = WRITERS[format](program, temporary, written.metadata)
        compare(run, program, expected, written, format)
    return written


def check_request(model: nn.Module, path: Path, format: str, text: bool, pixels: bool, fold: bool) -> None:
    if model.training:
        raise ExportError("The model is in training mode, in which it drops at random; export model.eval().")
    if path.is_dir():
        raise ExportError(f"{path} is a folder; --format {format} writes one file. Give its name.")
    if text and not isinstance(model, VideoTextModel):
        raise ExportError(f"This {type(model).__name__} has no text tower; leave out --text.")
    if text and (pixels or fold):
        raise ExportError("--pixels and --fold are about the video tower; leave them out with --text.")
    if format == "safetensors" and (text or pixels or fold):
        raise ExportError(
            "--format safetensors holds weights, under the names the model has, and no computation: --text, --pixels "
            "and --fold are for onnx, torch-export and torchscript."
        )
    if format == "onnx":
        need_onnx()
        if main_dtype(model) == torch.bfloat16:
            raise ExportError(
                "onnxruntime computes no bfloat16 on the CPU, so such a file could not be checked. Export "
                "model.float() (--dtype float32), or --format torch-export."
            )


def need_onnx() -> None:
    try:
        for name in ONNX:
            importlib.import_module(name)
    except ImportError as error:
        raise ExportError(f"--format onnx needs {error.name}. Run: pip install 'img2vid[export]'") from error


def is_fused(model: nn.Module) -> bool:
    return any(getattr(owner, "fused", None) is not None for owner, _, _ in branches(model))


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


# ---- writers: each returns how to run what it has written


def write_onnx(program: Program, path: Path, metadata: dict[str, str]) -> Run:
    import onnxruntime

    exported, (given, answer) = recorded(program), program.names()
    made = torch.onnx.export(exported, input_names=[given], output_names=[answer], verbose=False)
    metadata["opset"] = str(made.model.opset_imports[""])
    name_dimensions(made.model.graph, {0: "batch"} if program.text else {0: "batch", 1: "frames"})
    made.model.metadata_props.update(metadata)
    made.save(path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run([answer], {given: x.cpu().numpy()})[0])


def name_dimensions(graph: Any, names: dict[int, str]) -> None:
    """Call the open dimensions by what they are wherever they occur: the exporter has numbered them."""
    import onnx_ir

    shape = graph.inputs[0].shape
    known = {
        str(shape[axis].value): name for axis, name in names.items() if re.fullmatch(r"\w+", str(shape[axis].value))
    }

    def named(dim: Any) -> Any:
        if isinstance(dim, int):
            return dim
        return onnx_ir.SymbolicDim(re.sub(r"\w+", lambda word: known.get(word[0], word[0]), str(dim.value)))

    for value in [*graph.inputs, *(out for node in graph for out in node.outputs)]:
        if value.shape is not None:
            value.shape = onnx_ir.Shape([named(dim) for dim in value.shape])


def write_torch_export(program: Program, path: Path, metadata: dict[str, str]) -> Run:
    torch.export.save(recorded(program), path, extra_files={METADATA: json.dumps(metadata)})
    return torch.export.load(path).module()


def write_torchscript(program: Program, path: Path, metadata: dict[str, str]) -> Run:
    try:
        with warnings.catch_warnings():
            # of values that may have become constants: whether they have is what ``compare`` finds out
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            traced = torch.jit.trace(program, program.example(*program.recorded_with), check_trace=False)
        torch.jit.save(traced, path, _extra_files={METADATA: json.dumps(metadata)})
    except RuntimeError as error:
        raise ExportError(f"TorchScript cannot record this model ({last_line(error)}). {INSTEAD}") from error
    return torch.jit.load(path, map_location=next(program.parameters()).device)


INSTEAD = "Use --format onnx or torch-export, whose batch and frames are open."


def recorded(program: Program) -> torch.export.ExportedProgram:
    example = program.example(*program.recorded_with)
    try:
        return torch.export.export(program, (example,), dynamic_shapes=(program.dynamic(),), strict=False)
    except (RuntimeError, ValueError) as error:
        backbone = program.model.config.backbone or "this image model"
        raise ExportError(
            f"torch.export cannot record {backbone} with open batch and frames: {last_line(error)}"
        ) from error


WRITERS = {"onnx": write_onnx, "torch-export": write_torch_export, "torchscript": write_torchscript}


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


def last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


def describe(program: Program, format: str) -> dict[str, str]:
    """What a reader of the file needs to know, as texts."""
    import timm

    model = program.model
    video = model.visual if isinstance(model, VideoTextModel) else model
    pixels, (given, answer) = video.tower.preprocess, program.names()
    versions = {"img2vid": __version__, "torch": torch.__version__, "timm": timm.__version__}
    if format == "onnx":
        versions |= {name: importlib.import_module(name).__version__ for name in ONNX}
    versions["python"] = platform.python_version()
    facts = {
        "input": given,
        "output": answer,
        "dynamic": "batch" if program.text else "batch, frames",
        "config": json.dumps(video.config.to_dict()),
        "mean": json.dumps(pixels.mean),
        "std": json.dumps(pixels.std),
        "interpolation": pixels.interpolation,
        "num_frames": str(video.config.num_frames),
        "tubelet_size": str(video.config.tubelet_size),
        "folded": str(is_fused(model)).lower(),
        "dtype": str(program.dtype).removeprefix("torch."),
    }
    if isinstance(model, VideoTextModel):
        facts["logit_scale"] = repr(float(model.logit_scale.exp()))
    return facts | {f"version.{name}": version for name, version in versions.items()}
