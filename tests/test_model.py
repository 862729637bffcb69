import copy
import os
import pickle
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from torch import nn

import img2vid
from img2vid.backbones.tower import structural_copy
from img2vid.clips import ClipError
from img2vid.config import VideoConfig
from img2vid.errors import BackboneError
from img2vid.model import VideoModel
from img2vid.temporal.block import SpaceTimeBlock
from img2vid.temporal.checkpointing import CheckpointedBlock
from img2vid.temporal.infront import fronts_of
from img2vid.two_towers import VideoTextModel
from tests.conftest import randomize, small_clip, small_vit

PRESERVING = [
    {},
    {"gate": "tanh"},
    {"temporal_init": "random"},
    {"temporal_layers": "every:2"},
    {"temporal_layers": "last:1"},
    {"time_embed": "none"},
    {"attention": "factorised_encoder", "encoder_layers": 2},
    {"attention": "space_only"},
]


def make(image_model: nn.Module, **settings):
    """A video model, and the image model it came from."""
    reference = copy.deepcopy(image_model)
    model = (VideoTextModel if hasattr(image_model, "visual") else VideoModel)(image_model, VideoConfig(**settings))
    return model, reference


@pytest.mark.parametrize("num_frames", [1, 2, 3, 8])
@pytest.mark.parametrize("settings", PRESERVING, ids=str)
def test_bitwise_the_image_model(settings, num_frames):
    video, image = make(small_vit(), **settings)
    clips = torch.randn(2, num_frames, 3, 32, 32)
    with torch.no_grad():
        expected = image(clips.flatten(0, 1)).unflatten(0, (2, num_frames))
        assert torch.equal(video.frame_features(clips), expected)
        assert torch.equal(video(clips), expected.mean(1))


@pytest.mark.parametrize("settings", [s for s in PRESERVING if s.get("attention") != "space_only"], ids=str)
def test_three_acts(settings, clips):
    video, image = make(small_vit(), **settings)
    with torch.no_grad():
        base = image(clips.flatten(0, 1)).unflatten(0, (2, 3)).mean(1)
        randomize(video, seed=9)
        assert not torch.allclose(video(clips), base)
        video.load_state_dict({**video.state_dict(), **image.state_dict()})  # the image weights were moved too
        with video.gates_closed():
            assert torch.equal(video(clips), base)
        assert not torch.allclose(video(clips), base)


def test_time_is_seen_once_gates_open(clips):
    video, _ = make(small_vit())
    randomize(video, seed=9)
    with torch.no_grad():
        assert not torch.allclose(video(clips), video(clips.flip(1)), atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"prefix_mode": "shared"}, {"prefix_mode": "global"}], ids=str)
def test_clips_of_a_batch_do_not_see_each_other(settings, clips):
    video, _ = make(small_vit(), **settings)
    randomize(video, seed=9)
    with torch.no_grad():
        together, alone = video(clips), torch.cat([video(clips[:1]), video(clips[1:])])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_global_prefix_attends_to_all_frames(clips):
    """Frozen in Time's rule, written out for one block with plain matrix products."""
    image_model = small_vit(depth=1)
    block, head_dim = structural_copy(image_model).blocks[0], 12
    video, _ = make(image_model, prefix_mode="global")
    with torch.no_grad():
        tokens = torch.randn(2, 1, 17, 48).expand(2, 3, 17, 48).clone()
        tokens[:, :, 1:] = torch.randn(2, 3, 16, 48)  # patches move, the class token is the clip's
        with video.clip.of(3):
            got = video.blocks[0](tokens.flatten(0, 1)).unflatten(0, (2, 3))
        normed = block.norm1(tokens)
        for b in range(2):
            keys = torch.cat([normed[b, 0, :1], normed[b, :, 1:].flatten(0, 1)])  # (1 + T*N, D)
            q, k, v = (block.attn.qkv(keys)).view(len(keys), 3, 4, head_dim).permute(1, 2, 0, 3)
            weights = (q[:, :1] @ k.transpose(1, 2) / head_dim**0.5).softmax(-1)
            cls = tokens[b, 0, :1] + block.attn.proj((weights @ v).transpose(0, 1).flatten(1))
            cls = cls + block.mlp(block.norm2(cls))
            torch.testing.assert_close(got[b, :, :1], cls.expand(3, 1, 48), atol=1e-5, rtol=1e-5)
        patches = block(tokens.flatten(0, 1)).unflatten(0, (2, 3))[:, :, 1:]
        torch.testing.assert_close(got[:, :, 1:], patches)


@pytest.mark.parametrize("prefix_mode", ["shared", "global"])
def test_prefix_tokens_of_a_clip_stay_equal(prefix_mode, clips):
    video, _ = make(small_vit(reg_tokens=2), prefix_mode=prefix_mode, temporal_layers="last:1")
    randomize(video, seed=9)
    with torch.no_grad(), video.clip.of(3):
        tokens = video.base.forward_features(clips.flatten(0, 1)).unflatten(0, (2, 3))
    torch.testing.assert_close(tokens[:, :1, :3].expand(-1, 3, -1, -1), tokens[:, :, :3], atol=1e-5, rtol=1e-5)
    assert (tokens[:, 0, 3:] - tokens[:, 1, 3:]).abs().max() > 0.1


def test_static_clips_under_shared_prefix_are_exact_for_any_length():
    video, image = make(small_vit(), prefix_mode="shared")
    frame = torch.randn(1, 1, 3, 32, 32)
    with torch.no_grad():
        for num_frames in (1, 3, 5, 7):
            tokens = video.frame_features(frame.expand(1, num_frames, 3, 32, 32))
            expected = image(frame.expand(1, num_frames, 3, 32, 32).flatten(0, 1))
            assert torch.equal(tokens[0], expected)


def test_stochastic_depth_drops_whole_clips():
    video, _ = make(small_vit(drop_path_rate=0.5))
    video.train()
    static = torch.randn(4, 1, 3, 32, 32).expand(4, 3, 3, 32, 32)
    torch.manual_seed(0)
    frames = video.frame_features(static)
    torch.testing.assert_close(frames, frames[:, :1].expand_as(frames))  # one coin for the frames of a clip
    again = video.frame_features(static)
    assert not torch.allclose(frames, again)  # and coins are tossed
    randomize(video, seed=9)
    assert video.blocks[-1].temporal_drop_path.drop_prob == 0.5


@pytest.mark.parametrize("library", ["timm", "eva", "open_clip"])
def test_patch_dropout_keeps_the_same_patches_in_every_frame(library):
    if library == "timm":
        image_model = small_vit(patch_drop_rate=0.5)
    elif library == "eva":
        image_model = randomize(
            timm.create_model("eva02_tiny_patch14_224", img_size=56, depth=2, num_classes=0, patch_drop_rate=0.5)
        )
    else:
        image_model = small_clip().visual
        image_model.patch_dropout = open_clip.transformer.PatchDropout(0.5)
    video, _ = make(image_model)
    video.train()
    seen = []
    video.tower.blocks[0][1].register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    size = video.tower.image_size
    static = torch.randn(2, 1, 3, *size).expand(2, 4, 3, *size)
    video(static)
    tokens = seen[0].unflatten(0, (2, 4))
    torch.testing.assert_close(tokens, tokens[:, :1].expand_as(tokens))
    assert tokens.shape[2] == 1 + 16 // 2
    assert not torch.allclose(tokens[0, 0], tokens[1, 0])
    assert video.eval()(static).shape[0] == 2


def test_any_number_of_frames_and_any_size():
    video, _ = make(small_vit(dynamic_img_size=True), num_frames=4)
    randomize(video, seed=9)
    with torch.no_grad():
        for num_frames in (1, 3, 4, 9):
            assert video(torch.randn(1, num_frames, 3, 32, 32)).shape == (1, 48)
        assert video(torch.randn(1, 2, 3, 48, 64)).shape == (1, 48)


@pytest.mark.parametrize("size", [(32, 32), (64, 32), (24, 40)])
def test_open_clip_towers_take_any_size(size):
    """Against open_clip's own forward on a tower whose embedding was resampled beforehand."""
    from img2vid.backbones.from_open_clip import describe_open_clip, set_image_size

    video, image = make(small_clip())
    resized = copy.deepcopy(image.visual)
    set_image_size(resized, describe_open_clip(resized), size)
    resized.__class__ = open_clip.transformer.VisionTransformer
    clips = torch.randn(2, 2, 3, *size)
    with torch.no_grad():
        expected = resized(clips.flatten(0, 1)).unflatten(0, (2, 2)).mean(1)
        torch.testing.assert_close(video.encode_video(clips), expected, atol=1e-6, rtol=1e-6)


def test_open_clip_model_still_does_what_open_clip_users_do(clips):
    model, image = make(small_clip())
    text = torch.randint(1, 200, (5, 16))
    with torch.no_grad():
        assert torch.equal(model.encode_text(text), image.encode_text(text))
        assert torch.equal(model.logit_scale, image.logit_scale)
        frames = image.encode_image(clips.flatten(0, 1)).unflatten(0, (2, 3))
        video_features = model.encode_video(clips, normalize=True)
        assert torch.equal(video_features, nn.functional.normalize(frames.mean(1), dim=-1))
        scores = model.logit_scale.exp() * video_features @ model.encode_text(text, normalize=True).T
        expected = image.logit_scale.exp() * nn.functional.normalize(frames.mean(1), dim=-1)
        assert torch.equal(scores, expected @ image.encode_text(text, normalize=True).T)
        assert torch.equal(model.encode_image(clips[:, 0]), model.encode_video(clips[:, :1]))
        assert torch.equal(model.encode_image(clips[:, 0]), image.encode_image(clips[:, 0]))


def test_coca_gives_pooled_features_and_tokens(clips):
    torch.manual_seed(0)
    vision = {"layers": 2, "width": 64, "head_width": 16, "patch_size": 8, "image_size": 32, "output_tokens": True}
    vision |= {"attentional_pool": True, "attn_pooler_heads": 4}
    text = {"context_length": 16, "vocab_size": 200, "width": 32, "heads": 2, "layers": 2, "embed_cls": True}
    text |= {"output_tokens": True}
    multimodal = {"context_length": 16, "vocab_size": 200, "width": 32, "heads": 2, "layers": 2}
    coca = randomize(open_clip.coca_model.CoCa(24, {**multimodal}, text, vision)).eval()
    model, image = make(coca)
    with torch.no_grad():
        pooled, tokens = model.visual(clips)
        expected_pooled, expected_tokens = image.visual(clips.flatten(0, 1))
        assert torch.equal(pooled, expected_pooled.unflatten(0, (2, 3)).mean(1))
        frames = expected_tokens.unflatten(0, (2, 3))  # averaged around the first one, see img2vid.temporal.pooling
        assert torch.equal(tokens, frames[:, 0] + (frames - frames[:, :1]).mean(1))
        assert torch.equal(model.encode_video(clips, normalize=False), pooled)
        assert torch.equal(model.encode_video(clips), nn.functional.normalize(pooled, dim=-1))  # CoCa's own default
        words = torch.randint(1, 200, (2, 16))
        assert torch.equal(model.encode_text(words), image.encode_text(words))
        assert torch.equal(model.encode_text(words, normalize=False), image.encode_text(words, normalize=False))


def test_keys_are_the_image_keys_and_nothing_else_about_the_image():
    video, image = make(small_vit())
    new = set(video.state_dict()) - set(image.state_dict())
    assert set(image.state_dict()) <= set(video.state_dict())
    assert all("temporal_" in key or key == "time_embed" for key in new)
    assert {n for n, _ in video.named_parameters()} == set(video.state_dict())
    origins = {video.origin(name) for name in new}
    assert origins == {"copied", "new"}
    assert all(video.origin(name) == "pretrained" for name in image.state_dict())


def test_image_checkpoint_loads_with_only_temporal_keys_missing():
    video, _ = make(small_vit())
    other = randomize(small_vit(), seed=4)
    report = video.load_image_weights(other.state_dict())
    assert set(report.loaded) == set(other.state_dict())
    assert all("temporal_" in key or key == "time_embed" for key in report.new)
    assert torch.equal(video.state_dict()["cls_token"], other.cls_token)
    with pytest.raises(img2vid.Img2VidError, match="blocks.0.attn.qkv.weight"):
        video.load_image_weights({k: v for k, v in other.state_dict().items() if k != "blocks.0.attn.qkv.weight"})


def test_copies_moves_and_pickles(clips):
    video, _ = make(small_vit())
    randomize(video, seed=9)
    with torch.no_grad():
        expected = video(clips)
        twin = copy.deepcopy(video)
        randomize(video, seed=10)  # must not reach the twin
        assert torch.equal(twin(clips), expected)
        assert not torch.allclose(video(clips), expected)
        assert torch.equal(pickle.loads(pickle.dumps(twin))(clips), expected)
        assert twin.double()(clips.double()).dtype == torch.float64
        assert next(twin.base.parameters()).dtype == torch.float64
    assert twin.train().base.training
    assert not twin.eval().base.training


def test_shared_prefix_survives_deepcopy(clips):
    for prefix_mode in ("shared", "global"):
        video, _ = make(small_vit(), prefix_mode=prefix_mode)
        twin = copy.deepcopy(video)
        randomize(twin, seed=9)
        fresh = VideoModel(small_vit(), VideoConfig(prefix_mode=prefix_mode))
        fresh.load_state_dict(twin.state_dict())
        with torch.no_grad():
            assert torch.equal(twin(clips), fresh(clips))


def test_checkpointing_gives_the_same_gradients(clips):
    gradients = []
    for enable in (False, True):
        video, _ = make(small_vit(drop_path_rate=0.2))
        randomize(video, seed=9).train()
        video.set_grad_checkpointing(enable)
        torch.manual_seed(0)
        video(clips).square().sum().backward()
        gradients.append({name: p.grad for name, p in video.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    video.set_grad_checkpointing(False)
    assert SpaceTimeBlock in fronts_of(video.blocks[0]) and CheckpointedBlock not in fronts_of(video.blocks[0])


def test_classifier_starts_at_zero_and_learns(clips):
    video, _ = make(small_vit(), num_classes=7)
    logits = video(clips)
    assert torch.equal(logits, torch.zeros(2, 7))
    nn.functional.cross_entropy(logits, torch.tensor([1, 2])).backward()
    assert video.classifier.weight.grad.norm() > 0


def test_autocast_keeps_the_function(clips):
    for image_model in (small_vit(), small_clip().visual):
        video, image = make(image_model)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            expected = image(clips.flatten(0, 1)).unflatten(0, (2, 3))
            assert torch.equal(video.frame_features(clips), expected)


def test_bf16_weights_keep_the_function(clips):
    video, image = make(small_vit().bfloat16())
    with torch.no_grad():
        expected = image(clips.flatten(0, 1).bfloat16()).unflatten(0, (2, 3))
        assert torch.equal(video.frame_features(clips.bfloat16()), expected)


def test_normalize_is_the_backbones():
    video, _ = make(timm.create_model("vit_tiny_patch16_224", depth=1))
    pixels = torch.randint(0, 256, (1, 2, 3, 4, 4), dtype=torch.uint8)
    torch.testing.assert_close(video.normalize(pixels), (pixels / 255 - 0.5) / 0.5)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 3, 32, 32), r"Add the batch"),
        ((1, 0, 3, 32, 32), r"at least one \(T >= 1\)"),
        ((0, 2, 3, 32, 32), r"no frames"),
        ((1, 3, 8, 32, 32), r"look like \(B, C, T, H, W\)"),
        ((1, 2, 4, 32, 32), r"4 channels"),
        ((1, 2, 3, 0, 0), r"no pixels"),
    ],
)
def test_bad_clips_are_explained(shape, message):
    video, _ = make(small_vit())
    with pytest.raises(ClipError, match=message):
        video(torch.zeros(shape))


@pytest.mark.parametrize(
    ("images", "message"),
    [(torch.zeros(1, 2, 3, 32, 32), "go to encode_video"), (torch.zeros(3, 32, 32), "was given"), ([], "a list was")],
    ids=["clips", "one image", "list"],
)
def test_what_is_no_image_is_explained(clip_model, images, message):
    with pytest.raises(ClipError, match=message):
        make(clip_model)[0].encode_image(images)


@pytest.mark.parametrize("settings", [{"num_classes": 3}, {"attention": "factorised_encoder"}], ids=str)
def test_a_head_needs_one_vector_per_image(settings):
    with pytest.raises(BackboneError, match=r"tokens \(17, 48\), not into one vector"):
        make(small_vit(global_pool=""), **settings)


@pytest.mark.parametrize("init", ["copy", "random"])
def test_what_is_inserted_in_a_frozen_model_can_be_trained(init):
    """Feature extractors often come frozen; the branch copied from them, its norms included, is there to learn."""
    frozen = small_vit(qk_norm=True).requires_grad_(False)
    video, _ = make(frozen, temporal_init=init)
    for name, parameter in video.named_parameters():
        assert parameter.requires_grad == (video.origin(name) != "pretrained"), name


def test_sizes_that_are_no_multiple_of_the_patch():
    video, _ = make(small_vit(dynamic_img_size=True))
    with pytest.raises(ClipError, match="cannot be cut into patches of 8 x 8"):
        video(torch.zeros(1, 2, 3, 36, 32))


def test_bytes_and_tubelets_are_explained():
    video, _ = make(small_vit(), tubelet_size=2)
    with pytest.raises(ClipError, match=r"model.normalize"):
        video(torch.zeros(1, 2, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(ClipError, match="3 frames cannot be cut into tubelets of 2"):
        video(torch.zeros(1, 3, 3, 32, 32))


def test_the_same_module_is_not_converted_twice():
    image_model = small_vit()
    VideoModel(image_model, VideoConfig())
    with pytest.raises(img2vid.Img2VidError, match="already is part of a video model"):
        VideoModel(image_model, VideoConfig())


JOINT = {"attention": "joint_space_time", "prefix_mode": "shared"}
EXPORTED = [{}, {"prefix_mode": "shared"}, {"prefix_mode": "global"}, JOINT]


@pytest.mark.parametrize("settings", EXPORTED, ids=str)
def test_export_with_any_batch_and_number_of_frames(settings, clips):
    video, _ = make(small_vit(), **settings)
    randomize(video, seed=9)
    dims = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("frames", min=2, max=64)}
    program = torch.export.export(video, (clips,), dynamic_shapes=(dims,), strict=False)
    with torch.no_grad():
        other = torch.randn(1, 5, 3, 32, 32)
        torch.testing.assert_close(program.module()(other), video(other), atol=1e-5, rtol=1e-5)


def test_clips_of_different_lengths_in_one_backward():
    """Blocks that run again during backward must remember the T they first ran with."""
    gradients = []
    for enable in (False, True):
        video, _ = make(small_vit())
        randomize(video, seed=9).train()
        video.set_grad_checkpointing(enable)
        torch.manual_seed(0)
        long, short = torch.randn(2, 4, 3, 32, 32), torch.randn(4, 2, 3, 32, 32)
        (video(long).square().sum() + video(short).square().sum()).backward()
        gradients.append({name: p.grad for name, p in video.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_a_whole_module_can_be_saved(clips, tmp_path):
    video, _ = make(small_vit(), prefix_mode="shared")
    torch.save(randomize(video, seed=9), tmp_path / "module.pt")
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "module.pt", weights_only=False)(clips), video(clips))


@pytest.mark.slow
def test_compiles_forward_and_backward(clips):
    video, _ = make(small_vit())
    randomize(video, seed=9)
    compiled = torch.compile(video)
    torch.testing.assert_close(compiled(clips), video(clips), atol=1e-4, rtol=1e-4)
    compiled(clips).sum().backward()
    assert all(p.grad is not None for p in video.parameters())


@pytest.mark.multiprocess
def test_ddp_and_fsdp2_see_every_parameter_by_its_own_name(tmp_path):
    """Two processes: no unused parameter for DDP, and a full state dict with the image keys from FSDP2."""
    import subprocess
    import sys

    script = tmp_path / "run.py"
    script.write_text(
        """
import copy, torch, torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from img2vid.config import VideoConfig
from img2vid.model import VideoModel
from img2vid.leaving import leave_processes
from tests.conftest import randomize, small_vit

dist.init_process_group("gloo")
model = randomize(VideoModel(small_vit(), VideoConfig()), seed=9)
reference = copy.deepcopy(model)
parallel = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(model))
for num_frames in (1, 3, 2):
    torch.manual_seed(dist.get_rank())
    parallel(torch.randn(2, num_frames, 3, 32, 32)).sum().backward()
mesh = init_device_mesh("cpu", (dist.get_world_size(),))
for block in model.blocks:
    fully_shard(block, mesh=mesh)
fully_shard(model, mesh=mesh)
clips = torch.randn(2, 3, 3, 32, 32)
torch.testing.assert_close(model(clips), reference(clips))
model(clips).sum().backward()
state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
if dist.get_rank() == 0:
    assert state.keys() == reference.state_dict().keys()
    assert all(torch.equal(state[k], v) for k, v in reference.state_dict().items())
leave_processes()
"""
    )
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_threads_that_share_a_model_take_turns(clips):
    from concurrent.futures import ThreadPoolExecutor

    video, _ = make(small_vit())
    randomize(video, seed=9)
    with torch.no_grad():
        long, short = torch.randn(2, 4, 3, 32, 32), torch.randn(4, 2, 3, 32, 32)
        expected = {4: video(long), 2: video(short)}

        def run(clips):
            with torch.no_grad():
                return torch.equal(video(clips), expected[clips.shape[1]])

        with ThreadPoolExecutor(2) as pool:
            assert all(pool.map(run, [long, short] * 30))


@pytest.mark.parametrize("library", ["timm", "open_clip"])
def test_checkpointing_that_was_on_is_taken_over(library, clips):
    image_model = small_vit() if library == "timm" else small_clip().visual
    image_model.set_grad_checkpointing(True)
    video, _ = make(image_model)
    video.train()(clips).sum().backward()
    assert all(p.grad is not None for name, p in video.named_parameters() if "temporal_fc" in name)


def test_a_refused_conversion_leaves_the_module_as_it_was(clips):
    image_model = small_vit(drop_path_rate=0.1).train()
    with pytest.raises(img2vid.Img2VidError):
        img2vid.convert(image_model, temporal_layers="last:99")
    assert image_model(clips[:, 0]).shape == (2, 48)


def test_classifiers_in_half_precision():
    model = img2vid.convert("vit_tiny", random_weights=True, image_size=32, dtype="bfloat16", num_classes=3)
    assert model(torch.randn(1, 2, 3, 32, 32).bfloat16()).shape == (1, 3)
