"""What runs without img2vid: a model with one tensor in and one out, recorded and written in each format.

Two dimensions are open, the batch and the number of frames: T goes through every layer as a number of its own (see
``img2vid.temporal.clip``), so a program that was recorded at one T is right at others, T = 1 included. Height and width
are fixed: at its own size a model takes its positions as they are and elsewhere it resamples them, which are two
programs, and recording takes one of them, at the model's own size or at another.
"""

from __future__ import annotations

import importlib
import json
import platform
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from img2vid._version import __version__
from img2vid.checkpoints.native import main_dtype
from img2vid.errors import Img2VidError
from img2vid.model import VideoModel
from img2vid.temporal.fusing import branches
from img2vid.temporal.pooling import first
from img2vid.temporal.unchanged import as_last_seen
from img2vid.two_towers import VideoTextModel

ONNX = ("onnx", "onnxscript", "onnxruntime")  # the extra "export"
METADATA = "img2vid.json"  # where torch.export and TorchScript keep what ONNX keeps in its metadata
INSTEAD = "Use --format onnx or torch-export, whose batch and frames are open."

Run = Callable[[Tensor], Tensor]


class ExportError(Img2VidError):
    """A model that cannot be exported as asked, or a program that does not compute what the model computes."""


class Program(nn.Module):
    """What is exported: one tensor in, one out, in the words of clips."""

    def __init__(
        self,
        model: VideoModel | VideoTextModel,
        text: bool,
        pixels: bool,
        image_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.text, self.pixels = model, text, pixels
        video = model.visual if isinstance(model, VideoTextModel) else model
        self.image_size = video.tower.image_size if image_size is None else image_size
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
        has_classes = isinstance(video, VideoModel) and video.num_logits is not None
        return given, "logits" if has_classes else "features"

    def example(self, batch: int, steps: int) -> Tensor:
        """Random input: clips (B, T, C, H, W), pixels of them as bytes, or token ids (B, L)."""
        generator = torch.Generator().manual_seed(100 * batch + steps)
        device = next(self.model.parameters()).device
        if self.text:
            shape = (batch, self.model.context_length)
            return torch.randint(1, self.model.vocab_size, shape, generator=generator).to(device)
        video = self.model.visual if isinstance(self.model, VideoTextModel) else self.model
        shape = (batch, steps * video.config.tubelet_size, video.tower.in_channels, *self.image_size)
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


class Checked(nn.Module):
    """A trace that looks at what it is given: by itself it runs at sizes it was not recorded at, and is wrong there."""

    def __init__(self, traced: nn.Module, program: Program, shape: list[int]) -> None:
        super().__init__()
        self.traced = traced
        self.num_open = len(program.dynamic())
        self.fixed = shape[self.num_open :]
        self.divisor = 1 if program.text else program.tubelet_size
        what = "token ids (B, L)" if program.text else "clips (B, T, C, H, W)"
        self.expected = f"This program takes {what} of {self.fixed} after the open dimensions"
        self.expected += f", T a multiple of {self.divisor}" if self.divisor > 1 else ""
        self.expected += "" if program.text else ". For other sizes: img2vid export FOLDER --image-size HEIGHTxWIDTH"

    def forward(self, x: Tensor) -> Tensor:
        given = list(x.shape)
        if given[self.num_open :] != self.fixed or given[self.num_open - 1] % self.divisor != 0:
            raise ValueError(f"{self.expected}; {given} given.")
        return self.traced(x)


def is_fused(model: nn.Module) -> bool:
    return any(getattr(owner, "fused", None) is not None for owner, _, _ in branches(model))


def need_onnx() -> None:
    try:
        for name in ONNX:
            importlib.import_module(name)
    except ImportError as error:
        raise ExportError(f"--format onnx needs {error.name}. Run: pip install 'img2vid[export]'") from error


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
        if isinstance(dim, int) or dim.value is None:  # unknown, and two unknowns need not be the same
            return dim
        return onnx_ir.SymbolicDim(re.sub(r"\w+", lambda word: known.get(word[0], word[0]), str(dim.value)))

    for value in [*graph.inputs, *(out for node in graph for out in node.outputs)]:
        if value.shape is not None:
            value.shape = onnx_ir.Shape([named(dim) for dim in value.shape])


def write_torch_export(program: Program, path: Path, metadata: dict[str, str]) -> Run:
    torch.export.save(recorded(program), path, extra_files={METADATA: json.dumps(metadata)})
    return torch.export.load(path).module()


def write_torchscript(program: Program, path: Path, metadata: dict[str, str]) -> Run:
    with warnings.catch_warnings():
        # of values that may have become constants: whether they have is what ``compare`` finds out
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        # that all of it is deprecated: who asks for this format is told in docs/export.md
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.", category=FutureWarning)
        try:
            example = program.example(*program.recorded_with)
            traced = torch.jit.trace(program, example, check_trace=False)
            checked = torch.jit.script(Checked(traced, program, list(example.shape)))
            torch.jit.save(checked, path, _extra_files={METADATA: json.dumps(metadata)})
        except RuntimeError as error:
            raise ExportError(f"TorchScript cannot record this model ({last_line(error)}). {INSTEAD}") from error
        return torch.jit.load(path, map_location=next(program.parameters()).device)


def least_steps(program: Program, format: str) -> int:
    """Fewest frames, in tubelets where there are some: torch.export insists that a part of a dimension is not 1."""
    return 2 if format == "torch-export" and program.tubelet_size > 1 and not program.text else 1


def recorded(program: Program) -> torch.export.ExportedProgram:
    """``program`` as it is now: it must have run since its weights last changed."""
    example = program.example(*program.recorded_with)
    try:
        with as_last_seen():
            return torch.export.export(program, (example,), dynamic_shapes=(program.dynamic(),), strict=False)
    except (RuntimeError, ValueError) as error:
        backbone = program.model.config.backbone or "this image model"
        raise ExportError(
            f"torch.export cannot record {backbone} with open batch and frames: {last_line(error)}"
        ) from error


WRITERS = {"onnx": write_onnx, "torch-export": write_torch_export, "torchscript": write_torchscript}


def last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [
        line for line in lines if not line.startswith("The error above occurred")
    ] or lines  # torch.export's advice
    return lines[-1][:300] if lines else type(error).__name__


def describe(program: Program, format: str) -> dict[str, str]:
    """What a reader of the file needs to know, as texts."""
    import timm

    model = program.model
    video = model.visual if isinstance(model, VideoTextModel) else model
    pixels, (given, answer) = video.tower.preprocess, program.names()
    tubelet_size = video.config.tubelet_size
    versions = {"img2vid": __version__, "torch": torch.__version__, "timm": timm.__version__}
    if format == "onnx":
        versions |= {name: importlib.import_module(name).__version__ for name in ONNX}
    versions["python"] = platform.python_version()
    facts = {
        "input": given,
        "output": answer,
        "dynamic": "batch" if program.text else f"batch, frames (T >= {least_steps(program, format) * tubelet_size})",
        "config": json.dumps(video.config.to_dict()),
        "mean": json.dumps(pixels.mean),
        "std": json.dumps(pixels.std),
        "interpolation": pixels.interpolation,
        "image_size": json.dumps(program.image_size),
        "num_frames": str(video.config.num_frames),
        "tubelet_size": str(tubelet_size),
        "folded": str(is_fused(model)).lower(),
        "dtype": str(program.dtype).removeprefix("torch."),
    }
    if isinstance(model, VideoTextModel):
        facts["logit_scale"] = repr(model.logit_scale.exp().item())
    if video.class_names is not None:
        facts["class_names"] = json.dumps(video.class_names)
    return facts | {f"version.{name}": version for name, version in versions.items()}
