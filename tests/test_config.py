import dataclasses

import pytest

from img2vid.config import ConfigError, VideoConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_frames": 0}, "num_frames=0: expected a whole number of at least 1"),
        ({"num_frames": -2}, "at least 1"),
        ({"num_frames": 2.5}, "whole number"),
        ({"num_frames": True}, "whole number"),
        ({"num_classes": 0}, "num_classes=0"),
        ({"attention": "divided"}, "expected one of divided_space_time"),
        ({"prefix_mode": "perframe"}, "Did you mean 'per_frame'"),
        ({"gate": "temporal_fcc"}, "Did you mean 'temporal_fc'"),
        ({"num_frames": 7, "tubelet_size": 2}, "such as 8"),
        ({"image_size": (224, 0)}, "image_size"),
        ({"image_size": (1, 2, 3)}, "image_size"),
        ({"temporal_layers": "evry:2"}, "'all', 'every:K', 'last:N'"),
        ({"temporal_layers": "every:0"}, "temporal_layers"),
        ({"prefix_mode": "global", "attention": "joint_space_time"}, "belongs to attention='divided_space_time'"),
        ({"prefix_mode": "shared", "attention": "space_only"}, "has no meaning"),
        ({"gate": "tanh", "attention": "factorised_encoder"}, "gate='tanh' .* would be ignored"),
        ({"temporal_layers": "last:1", "attention": "space_only"}, "would be ignored"),
    ],
)
def test_bad_settings_are_explained(settings, message):
    with pytest.raises(ConfigError, match=message):
        VideoConfig(**settings)


def test_unknown_settings_are_suggested():
    with pytest.raises(ConfigError, match="Did you mean 'num_frames'"):
        VideoConfig.from_dict({"num_frame": 8})


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("all", [0, 1, 2, 3, 4, 5]),
        ("every:2", [1, 3, 5]),
        ("every:3", [2, 5]),
        ("last:2", [4, 5]),
        ("every:1", [0, 1, 2, 3, 4, 5]),
        ([5, 0, 5], [0, 5]),
    ],
)
def test_layers(layers, expected):
    assert VideoConfig(temporal_layers=layers).layers(6) == expected


@pytest.mark.parametrize("layers", ["last:7", "every:7", [6], [-1], []])
def test_layers_beyond_the_backbone(layers):
    with pytest.raises(ConfigError):
        VideoConfig(temporal_layers=layers).layers(6)


def test_dict_round_trip():
    config = VideoConfig("timm:x", 16, (64, 32), temporal_layers=[1, 2], backbone_args={"drop_path_rate": 0.1})
    assert VideoConfig.from_dict(config.to_dict()) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_frames = 3


def test_every_field_is_documented():
    from docstring_parser import parse

    documented = {p.arg_name for p in parse(VideoConfig.__doc__).params}
    assert documented == {f.name for f in dataclasses.fields(VideoConfig)}
