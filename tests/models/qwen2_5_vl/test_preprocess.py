from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from models.qwen2_5_vl.processing.preprocess import (
    CLIP_MEAN,
    CLIP_STD,
    VIDEO,
    Preprocess,
    capped,
    patchify,
    resize,
    smart_resize,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "preprocess.safetensors"
TINY = Preprocess(patch_size=1, merge_size=2, min_pixels=4, max_pixels=4096, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


@pytest.mark.parametrize("number", range(6))
def test_patches_equal_those_of_transformers(number):
    with safe_open(GOLDEN, "numpy") as golden:
        limits = golden.metadata()
        pixels, expected, grid = (golden.get_tensor(f"{name}.{number}") for name in ("pixels", "patches", "grid"))
    config = Preprocess(min_pixels=int(limits["min_pixels"]), max_pixels=int(limits["max_pixels"]))
    patches, ours = patchify(resize(pixels, config)[None], config)
    assert ours == tuple(grid.tolist())
    # Both round to float32 at most twice, at numbers up to the largest one.
    np.testing.assert_allclose(patches, expected, rtol=0, atol=2 * np.finfo(np.float32).eps * np.abs(expected).max())


@pytest.mark.parametrize(
    ("source", "resized", "tokens_per_grid"),
    [
        ((224, 224), (336, 336), 144),
        ((336, 336), (336, 336), 144),
        ((448, 448), (448, 448), 256),
        ((360, 640), (364, 644), 299),
        ((480, 640), (476, 644), 391),
        ((720, 1280), (560, 1008), 720),
        ((1080, 1920), (560, 1008), 720),
    ],
)
def test_published_sizes_of_video_frames(source, resized, tokens_per_grid):
    assert smart_resize(source[0], source[1], VIDEO) == resized
    assert resized[0] * resized[1] // VIDEO.token_size**2 == tokens_per_grid
    assert smart_resize(resized[0], resized[1], VIDEO) == resized


def test_halves_round_to_even():
    assert smart_resize(42, 70, Preprocess(min_pixels=784)) == (56, 56)


def test_patches_of_a_token_are_neighbours_and_channels_come_first():
    frames = np.arange(2 * 2 * 4 * 3, dtype=np.uint8).reshape(2, 2, 4, 3)
    patches, grid = patchify(frames, TINY)
    assert grid == (1, 2, 4)
    order = [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3), (1, 2), (1, 3)]
    expected = [[frames[t, row, column, c] for c in range(3) for t in range(2)] for row, column in order]
    np.testing.assert_allclose(patches * 255, np.array(expected, np.float32), rtol=1e-6)


def test_pixels_of_a_patch_run_by_rows():
    frames = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    config = Preprocess(
        patch_size=2, merge_size=2, min_pixels=16, max_pixels=16, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
    )
    patches, _ = patchify(frames, config)
    np.testing.assert_allclose(patches[1, :4] * 255, frames[0, :2, 2:, 0].reshape(-1), rtol=1e-6)
    np.testing.assert_allclose(patches[1, 4:8] * 255, frames[1, :2, 2:, 0].reshape(-1), rtol=1e-6)
    np.testing.assert_allclose(patches[1, 8:12] * 255, frames[0, :2, 2:, 1].reshape(-1), rtol=1e-6)


def test_a_frame_without_a_partner_is_repeated(rng):
    frames = rng.integers(0, 256, (3, 4, 6, 3), dtype=np.uint8)
    patches, grid = patchify(frames, TINY)
    assert grid == (2, 4, 6)
    np.testing.assert_array_equal(patches, patchify(frames[[0, 1, 2, 2]], TINY)[0])


def test_normalisation():
    frames = np.full((1, 28, 28, 3), 128, np.uint8)
    patches, _ = patchify(frames, Preprocess())
    expected = np.repeat((128 / 255 - np.array(CLIP_MEAN)) / np.array(CLIP_STD), 2 * 14 * 14)
    np.testing.assert_allclose(patches, np.broadcast_to(expected, patches.shape), rtol=1e-6)


def test_pixels_are_capped_by_the_tokens_of_a_long_video():
    assert capped(VIDEO, 64) is VIDEO
    with pytest.warns(UserWarning, match="768 frames have 115200 tokens in all: pixels per frame capped at 235200"):
        config = capped(VIDEO, 768)
    assert config.max_pixels == 115200 * 784 * 2 // 768
    with pytest.warns(UserWarning):
        assert capped(VIDEO, 10_000).max_pixels == int(VIDEO.min_pixels * 1.05)


@pytest.mark.parametrize(("rows", "columns"), [(10, 2001), (2001, 10)])
def test_extreme_aspect_ratios(rows, columns):
    with pytest.raises(ValueError, match="aspect ratio of a frame must be at most 200, got rows=.*columns="):
        smart_resize(rows, columns, VIDEO)


def test_frames_that_are_not_whole_tokens():
    with pytest.raises(ValueError, match=r"whole tokens of 28 pixels, got uint8 \(1, 28, 30, 3\)"):
        patchify(np.zeros((1, 28, 30, 3), np.uint8), Preprocess())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_pixels": 100}, "token_size\\*\\*2 <= min_pixels"),
        ({"min_pixels": 2000, "max_pixels": 1000}, "min_pixels <= max_pixels"),
        ({"temporal_patch_size": 3}, "temporal_patch_size must be 2, got 3"),
        ({"std": (1.0, 0.0, 1.0)}, "std must be positive"),
        ({"merge_size": 0}, "must be positive"),
    ],
)
def test_impossible_settings(fields, message):
    with pytest.raises(ValueError, match=message):
        Preprocess(**fields)
