"""What a training step costs, measured without computing a number: FLOPs, and memory alive at the same time.

The step runs on fake tensors (torch's FakeTensorMode): every operator works out shapes, types and what autograd keeps,
on no data at all, so a model of billions of parameters is measured on a laptop in seconds. Attention takes the fused
kernel for CPUs, which keeps queries, keys, values and output but no attention matrix, as the fused kernels of GPUs do.
``tests/test_estimate.py`` holds both counts against real steps and the real allocator.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, register_flop_formula

from img2vid.beside import examples_beside
from img2vid.model import VideoModel
from img2vid.temporal.pooling import first
from img2vid.two_towers import VideoTextModel

aten = torch.ops.aten
# torch counts the fused attention of GPUs; the same formulas hold for that of CPUs
for on_cpu, on_gpu in {
    aten._scaled_dot_product_flash_attention_for_cpu: aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: aten._scaled_dot_product_flash_attention_backward,
}.items():
    if on_cpu not in flop_registry:
        register_flop_formula(on_cpu, get_raw=True)(flop_registry[on_gpu])


@dataclass(frozen=True)
class Footprint:
    """Of one training step on one process.

    Args:
        forward_flops, step_flops: matrix products, attention and convolutions; a multiply-add counts two. The step is
            forward, backward, and what checkpointing runs again.
        stored_bytes: kept between forward and backward.
        activation_bytes: the most that is alive at one time besides weights, inputs and gradients.
        gradient_bytes: all gradients.
        peak_bytes: the most that activations and those gradients that already exist take together.
    """

    forward_flops: int
    step_flops: int
    stored_bytes: int
    activation_bytes: int
    gradient_bytes: int
    peak_bytes: int


def measure_on_nothing(model: VideoModel | VideoTextModel, batch_size: int, autocast: bool = False) -> Footprint:
    """Measure a training step of a model on the meta device, which becomes fake; with text, one caption a clip.

    Args:
        batch_size: clips B.
        autocast: bfloat16 for what autocast does in it.
    """
    video = model.visual if isinstance(model, VideoTextModel) else model
    dtype, channels = next(model.parameters()).dtype, video.tower.in_channels
    with FakeTensorMode(), ExitStack() as stack:
        make_fake(model)
        stack.enter_context(examples_beside(video, batch_size))
        clips = torch.zeros(batch_size, video.config.num_frames, channels, *video.tower.image_size, dtype=dtype)
        if not isinstance(model, VideoTextModel):
            return measure(model, lambda: first(model(clips)).float().sum(), [clips], autocast)
        text = torch.zeros(batch_size, model.context_length, dtype=torch.long)

        # whatever a forward of both towers returns, in which form ever its library does
        return measure(model, lambda: total(model(clips, text)), [clips, text], autocast)


def total(outputs: object) -> Tensor:
    """A scalar that every tensor in ``outputs`` has a part in."""
    return sum(x.float().sum() for x in tree_leaves(outputs) if isinstance(x, Tensor))


def make_fake(model: nn.Module) -> None:
    """Give a model on the meta device fake CPU tensors instead; inside a FakeTensorMode."""
    twins: dict[int, Tensor] = {}  # shared parameters stay shared
    for module in model.modules():
        for registry in (module._parameters, module._buffers):
            for name, tensor in registry.items():
                if tensor is None:
                    continue
                if id(tensor) not in twins:
                    twin = torch.empty(tensor.shape, dtype=tensor.dtype)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    twins[id(tensor)] = nn.Parameter(twin, tensor.requires_grad) if is_parameter else twin
                registry[name] = twins[id(tensor)]


def measure(model: nn.Module, loss: Callable[[], Tensor], inputs: list[Tensor], autocast: bool = False) -> Footprint:
    """Measure ``loss()`` and its backward, on fake or on real tensors; gradients of ``model`` are lost.

    Args:
        loss: runs the model's forward in training mode on ``inputs``; a scalar.
    """
    model.train()
    model.zero_grad(set_to_none=True)
    meter = Meter([*model.parameters(), *model.buffers(), *inputs])
    hooks = [p.register_post_accumulate_grad_hook(meter.gradient) for p in model.parameters() if p.requires_grad]
    try:
        with meter, norms_in_float32():
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                value = loss()
            forward_flops, stored = meter.flops, meter.activations
            value.backward()
    finally:
        for hook in hooks:
            hook.remove()
    gradients = meter.gradients
    model.zero_grad(set_to_none=True)
    return Footprint(forward_flops, meter.flops, stored, meter.most_activations, gradients, meter.most)


@contextmanager
def norms_in_float32() -> Iterator[None]:
    """Inside CPU autocast, layer norms in float32, where autocast for GPUs has them and keeps their inputs.

    In place of torch's function while it lasts: function modes and hooks do not reach what checkpointing runs again.
    """
    layer_norm = F.layer_norm

    def as_on_gpus(x: Tensor, *args, **kwargs) -> Tensor:
        return layer_norm(x.float() if torch.is_autocast_enabled("cpu") else x, *args, **kwargs)

    F.layer_norm = as_on_gpus
    try:
        yield
    finally:
        F.layer_norm = layer_norm


class Meter(TorchDispatchMode):
    """Counts FLOPs, and the bytes of storages that operators make, for as long as anything holds them.

    torch's FlopCounterMode has the same formulas, but keeps what a checkpointed block recomputes alive for longer.

    Args:
        known: tensors that were there before, whose views are nothing new.
    """

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known = [tensor.untyped_storage() for tensor in known]
        self.kinds: dict[int, str] = {storage._cdata: "known" for storage in self.known}
        self.flops = self.activations = self.gradients = self.most_activations = self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.note(tensor.untyped_storage())
        return out

    def note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.kinds:
            return
        self.kinds[key] = "activation"
        self.activations += storage.nbytes()
        self.most_activations = max(self.most_activations, self.activations)
        self.most = max(self.most, self.activations + self.gradients)
        weakref.finalize(storage, self.forget, key, storage.nbytes())

    def gradient(self, parameter: nn.Parameter) -> None:
        """To be called once a gradient is complete: from then on it counts as one."""
        storage = parameter.grad.untyped_storage()
        if self.kinds.get(storage._cdata) == "activation":
            self.kinds[storage._cdata] = "gradient"
            self.activations -= storage.nbytes()
            self.gradients += storage.nbytes()

    def forget(self, key: int, size: int) -> None:
        if self.kinds.pop(key) == "gradient":
            self.gradients -= size
        else:
            self.activations -= size
