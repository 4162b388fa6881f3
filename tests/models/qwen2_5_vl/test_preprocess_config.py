import json

import pytest

from models.qwen2_5_vl.config import VisionConfig
from models.qwen2_5_vl.processing.preprocess import VIDEO, Preprocess
from models.qwen2_5_vl.processing.preprocess_config import read_preprocess

TOWER = VisionConfig(num_layers=1, embed_dim=16, mlp_dim=16, num_heads=2, out_dim=16, full_attention_layers=(0,))


def write(directory, name, **fields):
    (directory / name).write_text(json.dumps(fields))


def test_a_checkpoint_without_settings_gets_those_of_qwen2_5_vl(tmp_path):
    assert read_preprocess(tmp_path, TOWER) == (Preprocess(), VIDEO)


def test_published_checkpoints_limit_images_only(tmp_path):
    write(tmp_path, "preprocessor_config.json", min_pixels=3136, max_pixels=12845056, image_mean=[0.5, 0.5, 0.5])
    image, video = read_preprocess(tmp_path, TOWER)
    assert (image.min_pixels, image.max_pixels, image.mean) == (3136, 12845056, (0.5, 0.5, 0.5))
    assert (video.min_pixels, video.max_pixels, video.mean) == (VIDEO.min_pixels, VIDEO.max_pixels, (0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    "limits",
    [
        {"min_pixels": 784, "max_pixels": 1568},
        {"size": {"shortest_edge": 784, "longest_edge": 1568}},
        {"size": {"min_pixels": 784, "max_pixels": 1568}},
    ],
)
def test_every_spelling_of_the_pixel_limits(tmp_path, limits):
    expected = Preprocess(min_pixels=784, max_pixels=1568)
    write(tmp_path, "preprocessor_config.json", **limits)
    write(tmp_path, "video_preprocessor_config.json", **limits)
    assert read_preprocess(tmp_path, TOWER) == (expected, expected)


def test_settings_in_one_joint_file(tmp_path):
    fields = {"image_processor": {"min_pixels": 1568}, "video_processor": {"max_pixels": 200_000}}
    write(tmp_path, "processor_config.json", **fields)
    image, video = read_preprocess(tmp_path, TOWER)
    assert (image.min_pixels, video.max_pixels) == (1568, 200_000)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"do_resize": False}, r"got \['do_resize'\] off"),
        ({"rescale_factor": 1.0}, "rescales by 1/255"),
        ({"resample": 2}, r"resamples bicubically \(3\), got .*resample=2"),
        ({"patch_size": 16}, "patch_size is 14 there, got 16"),
        ({"temporal_patch_size": 1}, "temporal_patch_size must be 2, got 1"),
    ],
)
def test_settings_that_cannot_be_honoured(tmp_path, fields, message):
    write(tmp_path, "preprocessor_config.json", **fields)
    with pytest.raises(ValueError, match=message):
        read_preprocess(tmp_path, TOWER)
