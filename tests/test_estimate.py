import json
import math

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import img2vid
from img2vid.backbones.tower import on_meta
from img2vid.cli import main as cli
from img2vid.errors import Img2VidError
from img2vid.estimate import estimate
from img2vid.footprint import make_fake, measure, measure_on_nothing, norms_in_float32, total
from img2vid.inspection import inspect
from img2vid.tuning import freeze
from tests.conftest import small_clip, small_vit

SETTINGS = [
    {},
    {"checkpointing": True},
    {"autocast": True, "policy": "text"},
    {"autocast": True, "checkpointing": True},
    {"policy": "temporal_only"},
    {"policy": "first:2", "checkpointing": True, "num_classes": 5},
    {"attention": "joint_space_time", "num_classes": 5},
]


def small_model(num_classes=None, checkpointing=False, policy="none", **settings):
    """With both towers, unless there are classes."""
    image_model = small_clip() if num_classes is None else small_vit()
    model = img2vid.convert(image_model, num_frames=4, num_classes=num_classes, **settings)
    model.set_grad_checkpointing(checkpointing)
    freeze(model, policy)
    return model


def real_step(model, batch_size=2):
    """The step that is measured, on real numbers: its inputs, and what runs it."""
    clips = torch.randn(batch_size, 4, 3, *(getattr(model, "visual", model).tower.image_size))
    if not hasattr(model, "encode_video"):
        return [clips], lambda: model(clips).float().sum()
    text = torch.ones(batch_size, model.context_length, dtype=torch.long)
    return [clips, text], lambda: total(model(clips, text))


def allocated(run):
    """What torch's allocator had handed out at most while ``run`` ran, and at its end: bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = run()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most, now, kept


@pytest.mark.parametrize("kwargs", SETTINGS, ids=str)
def test_fake_steps_cost_what_real_steps_cost(kwargs):
    kwargs = dict(kwargs)
    autocast = kwargs.pop("autocast", False)
    model = small_model(**kwargs)
    fake = measure_on_nothing(on_meta(model), 2, autocast)
    inputs, loss = real_step(model)
    real = measure(model, loss, inputs, autocast)
    assert (real.forward_flops, real.step_flops) == (fake.forward_flops, fake.step_flops)

    def forward():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return loss()

    with FlopCounterMode(display=False) as counter:
        forward().backward()
    assert counter.get_total_flops() == fake.step_flops
    model.zero_grad(set_to_none=True)
    with norms_in_float32():
        _, stored, _ = allocated(forward)
        most, gradients, _ = allocated(lambda: forward().backward())
    # checkpointing notes the state of the random generator for each block, which no operator makes
    num_blocks = (3 if "num_classes" in kwargs else 3 + 2) if kwargs.get("checkpointing") else 0
    noted = torch.get_rng_state().nbytes * num_blocks
    assert fake.stored_bytes + noted == pytest.approx(stored, rel=0.01)
    # in bfloat16 CPUs need room inside an operator, which is large beside a model as small as this
    assert fake.peak_bytes + noted == pytest.approx(most, rel=0.25 if autocast else 0.02)
    assert fake.gradient_bytes == pytest.approx(gradients, rel=0.01)
    assert fake.gradient_bytes == sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    assert max(fake.stored_bytes, fake.gradient_bytes) <= fake.peak_bytes
    assert fake.activation_bytes <= fake.peak_bytes <= fake.activation_bytes + fake.gradient_bytes


def test_checkpointing_trades_flops_for_memory():
    plain, twice = (measure_on_nothing(on_meta(small_model(5, on)), 4) for on in (False, True))
    assert twice.forward_flops == plain.forward_flops
    assert 2.9 < plain.step_flops / plain.forward_flops < 3.2
    assert 3.6 < twice.step_flops / twice.forward_flops < 4.2
    assert twice.stored_bytes < plain.stored_bytes / 4
    assert twice.activation_bytes < plain.activation_bytes / 2


def test_attention_keeps_no_matrix():
    """Four times the tokens take four times the memory; matrices would take sixteen times theirs."""
    small, large = (
        measure_on_nothing(on_meta(img2vid.convert(small_vit(class_token=False, global_pool="avg", img_size=size))), 2)
        for size in (32, 64)
    )
    assert large.stored_bytes == pytest.approx(4 * small.stored_bytes, rel=0.01)


def test_flops_are_those_of_inspect_and_grow_with_the_batch():
    one, three = (estimate("nano_clip", batch_size=n, num_frames=2, num_classes=3).footprint for n in (1, 3))
    inspected = inspect("nano_clip", num_frames=2)
    tokens, width = 2 * 65, 96  # in training, each of 4 blocks multiplies two weights instead of tokens by one more
    products, folded = 4 * 2 * width**3, 4 * 2 * tokens * width**2
    assert one.forward_flops == inspected.flops_per_clip + 2 * inspected.feature_dim * 3 - folded + products
    assert three.forward_flops - products == 3 * (one.forward_flops - products), "once, whatever the batch"
    assert three.step_flops - 3 * products == 3 * (one.step_flops - 3 * products)


def test_freezing_saves_gradients_states_and_flops():
    full, frozen = (estimate("nano_clip", num_frames=2, freeze_policy=policy) for policy in ("none", ["text", "image"]))
    model = img2vid.convert("nano_clip", num_frames=2)
    own = [p.numel() for n, p in model.named_parameters() if model.origin(n) != "pretrained" or n == "logit_scale"]
    assert frozen.parameters == full.parameters
    assert frozen.trainable == sum(own) < full.trainable
    assert frozen.footprint.gradient_bytes == 4 * frozen.trainable
    assert frozen.footprint.step_flops < full.footprint.step_flops
    assert frozen.optimizer_bytes == 2 * frozen.footprint.gradient_bytes


def test_the_arithmetic_by_hand():
    e = estimate(
        "nano_clip", num_frames=4, batch_size=2, gpus=4, clips=10**9, device_tflops=100.0, mfu=0.5, optimizer="sgd"
    )
    cost = e.footprint
    per_clip = cost.step_flops / 2
    assert e.gpu_hours == pytest.approx(10**9 * per_clip / (100e12 * 0.5) / 3600)
    assert e.weight_bytes == 4 * e.parameters
    assert e.ddp_bytes == e.weight_bytes + 2 * cost.gradient_bytes + cost.peak_bytes  # momentum, and the buckets
    states = e.weight_bytes + 2 * cost.gradient_bytes
    assert e.fsdp_bytes == states // 4 + 2 * e.largest_layer_bytes + cost.activation_bytes
    alone = estimate("nano_clip", num_frames=4, batch_size=2, precision="bf16-true")
    assert alone.weight_bytes == 2 * alone.parameters
    assert alone.ddp_bytes == alone.weight_bytes + 2 * alone.footprint.gradient_bytes + alone.footprint.peak_bytes
    text = str(e)
    assert f"{math.ceil(10**9 / 8):,} steps" in text
    assert f"= {e.gpu_hours:,.3g} GPU-hours" in text
    assert "4 GPUs" in text


@pytest.mark.parametrize("name", ["eva02_t", "timm:vit_relpos_small_patch16_224", "timm:naflexvit_base_patch16_gap"])
def test_other_backbones_run_on_fake_tensors(name):
    e = estimate(name, batch_size=1, num_frames=2, temporal_layers="last:1")
    assert 2.9 < e.footprint.step_flops / e.footprint.forward_flops < 3.3


def test_making_a_model_fake_keeps_shared_parameters_shared():
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = on_meta(small_model())
    model.visual.ln_post = model.visual.ln_pre
    names = {name for name, _ in model.named_parameters()}
    with FakeTensorMode():
        make_fake(model)
        assert {name for name, _ in model.named_parameters()} == names
        assert all(p.device.type == "cpu" for p in model.parameters())
    assert model.visual.ln_post.weight is model.visual.ln_pre.weight


def test_the_command(capsys):
    arguments = ["--backbone", "nano_clip", "--num-frames", "4", "--gpus", "2", "--freeze-policy", "text", "first:1"]
    assert cli(["estimate", *arguments, "--checkpointing"]) == 0
    printed = capsys.readouterr().out
    for part in ("4 frames of 32 x 32", "2 GPUs", "freeze_policy: text, first:1", "blocks run twice", "GPU-hours"):
        assert part in printed
    assert cli(["estimate", *arguments, "--json"]) == 0
    read = json.loads(capsys.readouterr().out)
    assert read["gpus"] == 2
    assert read["ddp_bytes"] > read["fsdp_bytes"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backbone", "vit_bass"], "Did you mean 'vit_base'"),
        (["--backbone", "nano_clip", "--gpus", "0"], "gpus=0"),
        (["--backbone", "nano_clip", "--batch-size", "-1"], "batch_size=-1"),
        (["--backbone", "nano_clip", "--clips", "0"], "clips=0"),
        (["--backbone", "nano_clip", "--mfu", "35"], "mfu=35.0"),
        (["--backbone", "nano_clip", "--mfu", "nan"], "mfu=nan"),
        (["--backbone", "nano_clip", "--device-tflops", "0"], "device_tflops=0.0"),
        (["--backbone", "nano_clip", "--num-frames", "0"], "num_frames=0"),
        (["--backbone", "nano_clip", "--freeze-policy", "first:99"], "from 0 (embeddings) to"),
        (["--backbone", "nano_clip", "--image-size", "30"], "cannot be cut into patches"),
    ],
    ids=lambda value: " ".join(value[1:]) if isinstance(value, list) else "",
)
def test_the_command_explains_what_is_wrong(arguments, message, capsys):
    assert cli(["estimate", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.out == ""


def test_unknown_precisions_and_optimisers_are_refused():
    with pytest.raises(Img2VidError, match="Did you mean .* 'bf16-mixed'"):
        estimate("nano_clip", precision="bf16")
    with pytest.raises(img2vid.Img2VidError, match="optimizer='adam'"):
        estimate("nano_clip", optimizer="adam")
