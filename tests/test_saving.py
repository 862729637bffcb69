"""Saving over what is there: killed writers, several at once, full disks, links; and folders that were damaged."""

import json
import os
import resource
import threading
import time
from pathlib import Path

import pytest
import torch

import img2vid
from img2vid.backbones.from_open_clip import set_image_size
from img2vid.checkpoints import folders, native
from img2vid.checkpoints.card import model_card
from img2vid.errors import WeightsError
from img2vid.inspection import inspect
from tests.conftest import randomize, small_clip, small_vit


def tiny(seed: int = 5, **settings):
    torch.manual_seed(seed)
    settings = {"num_frames": 2, "image_size": 32, "backbone_args": {"depth": 1}, **settings}
    return randomize(img2vid.convert("vit_tiny", random_weights=True, **settings), seed=seed)


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def in_a_child(action) -> int:
    """Run ``action`` in a forked process, which may die; its exit code."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("survived", range(5))
def test_a_killed_writer_leaves_one_whole_model(tmp_path, survived):
    """The two models have the same keys and shapes, and compute different functions by their configuration alone."""
    old, new, folder = tiny(1), tiny(2, prefix_mode="shared"), tmp_path / "m"
    old.save_pretrained(folder)
    (folder / "log.txt").write_text("mine")
    replace, count = os.replace, 0

    def replace_or_die(*args):
        nonlocal count
        if count == survived:
            os._exit(77)
        count += 1
        replace(*args)

    def save():
        os.replace = replace_or_die
        new.save_pretrained(folder)
        os._exit(0)

    died = in_a_child(save) == 77
    assert died == (survived < 3)
    again = img2vid.load(folder)
    expected = old if survived == 0 else new
    assert equal(again, expected)
    assert again.config == expected.config
    assert inspect(folder).num_frames == 2
    assert len(list(folder.glob(".img2vid-saving-*"))) == died
    new.save_pretrained(folder)
    assert img2vid.load(folder).config == new.config
    assert sorted(os.listdir(folder)) == ["README.md", "config.json", "log.txt", "model.safetensors"]


def test_a_first_save_into_an_empty_folder_can_be_repeated_after_a_kill(tmp_path):
    def save(survived):
        os.replace = lambda a, b: replace(a, b) if str(b).endswith(survived) else os._exit(77)
        tiny().save_pretrained(tmp_path)

    replace = os.replace
    for survived in ("nothing", "safetensors"):
        assert in_a_child(lambda name=survived: save(name)) == 77
    assert "model.safetensors" in os.listdir(tmp_path)
    assert "config.json" not in os.listdir(tmp_path)
    tiny().save_pretrained(tmp_path)
    assert equal(img2vid.load(tmp_path), tiny())


def test_only_leftovers_of_the_dead_are_removed(tmp_path):
    host = folders.socket.gethostname()
    dead = in_a_child(lambda: os._exit(0)) or os.fork()
    if dead == 0:
        os._exit(0)
    os.waitpid(dead, 0)
    ours, gone, elsewhere, old, other = (
        tmp_path / f".img2vid-saving-{name}"
        for name in (f"{host}-{os.getpid()}-a", f"{host}-{dead}-b", "else-where-1-c", "else-where-1-d", "x")
    )
    for path in (ours, gone, elsewhere, old, other):
        path.mkdir()
    os.utime(old, (time.time() - 2 * folders.STALE_SECONDS,) * 2)
    tiny().save_pretrained(tmp_path / "m")
    assert [path.exists() for path in (ours, gone, elsewhere, old, other)] == [True, False, True, False, True]


def test_several_writers_at_once(tmp_path):
    models, errors = [tiny(seed, prefix_mode=mode) for seed, mode in enumerate(("per_frame", "shared") * 3)], []

    def save(model):
        try:
            for _ in range(3):
                model.save_pretrained(tmp_path / "m")
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=save, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    again = img2vid.load(tmp_path / "m")
    assert sum(equal(again, m) and again.config == m.config for m in models) == 1
    assert sorted(os.listdir(tmp_path / "m")) == ["README.md", "config.json", "model.safetensors"]


def test_another_writer_makes_the_new_folder_meanwhile(tmp_path, monkeypatch):
    rename = os.rename

    def late(source, target):
        monkeypatch.setattr(os, "rename", rename)
        tiny(1).save_pretrained(target)
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    tiny(2, prefix_mode="shared").save_pretrained(tmp_path / "m")
    again = img2vid.load(tmp_path / "m")
    assert equal(again, tiny(2))
    assert again.config.prefix_mode == "shared"
    assert os.listdir(tmp_path) == ["m"]


def test_a_full_disk(tmp_path):
    """A limit on the size of files stands for the disk: the real writer meets a real error."""
    model, folder = tiny(1), tmp_path / "m"
    model.save_pretrained(folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        for target in (folder, tmp_path / "new"):
            with pytest.raises(WeightsError, match=rf"cannot be written to {target}: .*File too large"):
                tiny(2).save_pretrained(target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ["m"]
    assert equal(img2vid.load(folder), model)


def test_links_and_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "dangling").symlink_to(tmp_path / "made")
    for name in ("link", "dangling"):
        tiny().save_pretrained(tmp_path / name)
        assert (tmp_path / name).is_symlink()
        assert equal(img2vid.load(tmp_path / name), tiny())
    monkeypatch.chdir(tmp_path / "real")
    tiny(2).save_pretrained(".")
    assert equal(img2vid.load("."), tiny(2))


def test_every_tensor_keeps_its_precision(tmp_path):
    model = tiny().bfloat16()
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.float()
    model.save_pretrained(tmp_path / "m")
    again = img2vid.load(tmp_path / "m")
    assert equal(again, model)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16, torch.float32}
    reference = native.load_reference(again)
    assert reference.state_dict()["norm.weight"].dtype == torch.float32
    assert reference.state_dict()["cls_token"].dtype == torch.bfloat16


def test_tables_that_are_not_saved_have_the_precision_too(tmp_path):
    """A text tower's causal mask, a rotary table: they must fit the weights that were saved in half precision."""
    img2vid.convert("nano_clip", num_frames=2, dtype="bfloat16").save_pretrained(tmp_path / "m")
    model = img2vid.load(tmp_path / "m")
    for one in (model, native.load_reference(model)):
        assert {b.dtype for b in one.buffers() if b.is_floating_point()} == {torch.bfloat16}
    assert img2vid.certify(model, native.load_reference(model), num_frames=(1, 2)).held


def test_shared_and_missing_numbers(tmp_path):
    model = tiny()
    model.blocks[0].norm1.weight = model.blocks[0].norm2.weight
    model.save_pretrained(tmp_path / "tied")
    assert equal(img2vid.load(tmp_path / "tied"), model)
    with pytest.raises(WeightsError, match="meta device"):
        tiny().to("meta").save_pretrained(tmp_path / "meta")
    assert os.listdir(tmp_path) == ["tied"]
    model = tiny()
    model.config.backbone_args["norm_layer"] = torch.nn.LayerNorm
    with pytest.raises(WeightsError, match="backbone_args are .*norm_layer"):
        model.save_pretrained(tmp_path / "m")


def edit(folder: Path, **values):
    described = json.loads((folder / "config.json").read_text())
    for path, value in values.items():
        *parents, name = path.split("__")
        part = described
        for parent in parents:
            part = part[parent]
        part[name] = value
    (folder / "config.json").write_text(json.dumps(described))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "m"
    tiny().save_pretrained(folder)
    return folder, (folder / "config.json").read_text()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dtype": "foo"}, "dtype is 'foo', expected a floating point type"),
        ({"dtype": "int8"}, "dtype is 'int8', expected a floating point type"),
        ({"video": None}, "video is None, expected the settings"),
        ({"format": "2"}, "format is '2', expected a whole number"),
        ({"kind": "ImageModel"}, "kind is 'ImageModel', expected one of VideoModel, VideoTextModel"),
        ({"kind": "VideoTextModel"}, "holds a VideoTextModel, but what a VisionTransformer makes is a VideoModel"),
        ({"preprocess": 3}, "preprocess is 3, expected mean"),
        ({"preprocess__mean": [0.5, "x", 0.5]}, "preprocess.mean is .* expected a list of numbers"),
        ({"video__backbone": 5}, "video.backbone is 5, expected a backbone's name"),
        ({"video__backbone": "timm:vit_foo"}, "config.json describes cannot be built here: timm .* no model 'vit_foo'"),
        ({"video__num_frames": "8"}, "config.json: video: num_frames='8'"),
        ({"video__made_later": 1, "versions__img2vid": "9.9"}, "'made_later'.*Written by img2vid 9.9"),
        ({"video__temporal_layers": [99]}, "cannot be built here: .*block numbers from 0 to 0"),
    ],
)
def test_damaged_fields_are_named(saved, values, message):
    folder, text = saved
    (folder / "config.json").write_text(text)
    edit(folder, **values)
    with pytest.raises(WeightsError, match=message):
        img2vid.load(folder)


def test_pixel_statistics_are_those_that_were_saved(saved):
    folder, text = saved
    (folder / "config.json").write_text(text)
    edit(folder, preprocess__mean=[0.1, 0.2, 0.3])  # an edited file counts
    assert img2vid.load(folder).tower.preprocess.mean == (0.1, 0.2, 0.3)
    (folder / "config.json").write_text(text.replace('"preprocess"', '"process"'))
    with pytest.raises(WeightsError, match="lacks preprocess"):
        img2vid.load(folder)


def text_of(model) -> str:
    return model_card(model, None).split("as a video model")[1].split("| setting")[0]


def test_the_card_says_what_is_true():
    assert "nothing pretrained is in it" in text_of(tiny())
    model = img2vid.convert(small_vit())
    assert "came from the given module" in text_of(model)
    assert "behind a linear gate that starts at zero, and started as a copy" in text_of(model)
    assert "still is at zero" in text_of(model)
    assert "function now is another one" in text_of(randomize(model))
    ungated = text_of(img2vid.convert(small_vit(), gate="none"))
    assert "It is not the image model's function" in ungated
    assert "has no gate" in ungated
    assert "still is at zero" not in ungated
    assert "cannot learn" in text_of(img2vid.convert(small_vit(), temporal_init="zeros"))
    averaged = text_of(img2vid.convert(small_vit(), tubelet_size=2, tubelet_init="average"))
    assert "image model's on static clips, up to rounding" in averaged
    assert "divided by 2" in averaged
    joint = text_of(img2vid.convert(small_vit(), attention="joint_space_time"))
    assert "gate" not in joint
    assert "single and static clips, up to rounding" in joint
    assert "classifier on top of it started at zero" in text_of(img2vid.convert(small_vit(), num_classes=3))
    assert "any clip, bit for bit" in text_of(img2vid.convert(small_clip()))


def test_where_image_weights_came_from_is_kept(tmp_path):
    img2vid.convert("nano_clip", num_frames=2).save_pretrained(tmp_path / "m")
    again = img2vid.load(tmp_path / "m")
    assert again.visual.image_weights == "the file nano_clip.safetensors"
    assert str(tmp_path) not in (tmp_path / "m" / "README.md").read_text()


@pytest.mark.parametrize("make", [tiny, lambda: img2vid.convert("nano_clip", num_frames=2)], ids=["vit", "nano_clip"])
def test_a_model_that_could_not_be_loaded_again_is_not_saved(tmp_path, make):
    """What a library's own methods change after the conversion, the configuration does not know."""
    model = make()
    tower = getattr(model, "visual", model)
    change = getattr(tower, "set_input_size", None) or (lambda size: set_image_size(tower.base, tower.tower, size))
    change((64, 64))
    with pytest.raises(WeightsError, match=r"Nothing was saved.*convert with image_size=\(64, 64\) instead"):
        model.save_pretrained(tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_another_head_or_block_is_not_saved(tmp_path):
    model = tiny(backbone_args={"depth": 2})
    model.reset_classifier(10)
    with pytest.raises(
        WeightsError, match=r"num_classes=N instead.*\n    head\.bias: \(10,\) in the model, nothing in wh"
    ):
        model.save_pretrained(tmp_path / "m")
    model.reset_classifier(0)
    model.save_pretrained(tmp_path / "m")
    assert equal(img2vid.load(tmp_path / "m"), model)
    del model.blocks[1]
    with pytest.raises(WeightsError, match=r"blocks\.1\.norm1\.bias: nothing in the model, \(192,\) in what would"):
        model.save_pretrained(tmp_path / "m")
    # one without a name is built again by the user, who may do the same to it
    video = img2vid.convert(small_vit(), num_frames=2)
    video.reset_classifier(10)
    video.save_pretrained(tmp_path / "given")
    image_model = small_vit()
    image_model.reset_classifier(10)
    assert equal(img2vid.load(tmp_path / "given", image_model=image_model), video)


def test_a_rotary_model_that_was_resized_is_not_saved(tmp_path):
    """Its weights have the same shapes at any size."""
    arguments = {"depth": 1, "embed_dim": 48, "num_heads": 4}
    settings = {"num_frames": 2, "image_size": 32, "backbone_args": arguments}
    model = img2vid.convert("timm:vit_small_patch16_dinov3", random_weights=True, **settings)
    model.set_input_size((64, 64))
    with pytest.raises(WeightsError, match=r"resized after the conversion, from 32 x 32 to 64 x 64"):
        model.save_pretrained(tmp_path / "m")


def test_data_parallel():
    model = tiny()
    clips = torch.randn(2, 2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(torch.nn.DataParallel(model)(clips), model(clips))  # one device, or none: the model itself
    for module in (model, img2vid.convert(small_clip(), num_frames=2)):
        with pytest.raises(RuntimeError, match=r"nn\.DataParallel.*Use DistributedDataParallel"):
            module._replicate_for_data_parallel()
