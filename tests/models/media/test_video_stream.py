"""A video that a thread decodes: the frames, the patches and the errors are those of the whole video."""

import threading

import numpy as np
import pytest
from PIL import Image as PillowImage

from models.media.image import Image
from models.media.moving_video import write_moving_video
from models.media.video import read_video
from models.media.video_stream import VideoStream
from models.qwen2_5_vl.embedding import frame_batches
from models.qwen2_5_vl.presets import PRESETS
from models.qwen2_5_vl.processing.pixels import PixelPatches, pixel_source
from models.qwen2_5_vl.processing.placeholders import num_tokens
from models.qwen2_5_vl.processing.preprocess import Preprocess, patchify, resize

CONFIG = Preprocess(min_pixels=56 * 56, max_pixels=84 * 84)


@pytest.fixture
def path(tmp_path):
    write_moving_video(tmp_path / "v.mp4", num_frames=17, side=84, fps=4)
    return tmp_path / "v.mp4"


def stream(path, **options) -> VideoStream:
    return VideoStream(path, fps=4.0, **options)


def test_its_frames_are_those_of_the_whole_video(path):
    whole, arriving = read_video(path, fps=4.0), stream(path)
    assert (arriving.num_frames, arriving.fps, arriving.frame_shape) == (16, whole.fps, (84, 84, 3))
    np.testing.assert_array_equal(arriving.frames(10, 14), whole.frames[10:14])
    np.testing.assert_array_equal(arriving.read().frames, whole.frames)
    assert (np.diff(whole.frames.astype(int), axis=0) != 0).any(axis=(1, 2, 3)).all(), "the picture moves"


def test_frames_are_there_before_the_last_one_is_decoded(path):
    gate, too_late = threading.Event(), []

    def held_up(decoded: int, _: int) -> None:
        if decoded == 15 and not gate.wait(60):
            too_late.append(decoded)

    arriving = stream(path, on_frame=held_up)
    assert arriving.frames(0, 2).shape == (2, 84, 84, 3) and not too_late
    gate.set()
    assert len(arriving.frames(14, 16)) == 2 and arriving.waited_seconds > 0


def test_a_file_that_is_cut_off_fails_where_its_end_is_asked_for(path, tmp_path):
    content = path.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(content[: len(content) * 3 // 4])
    arriving = stream(tmp_path / "cut.mp4")
    assert len(arriving.frames(0, 4)) == 4
    with pytest.raises(ValueError, match="a video must decode"):
        arriving.read()
    with pytest.raises(ValueError, match="no such file"):
        stream(tmp_path / "nowhere.mp4")


def test_decoding_stops_when_nobody_refers_to_the_stream(path):
    gate, decoded = threading.Event(), []

    def held_up(number: int, _: int) -> None:
        decoded.append(number)
        if number == 11:
            gate.wait(60)

    arriving = stream(path, on_frame=held_up)
    (thread,) = (thread for thread in threading.enumerate() if thread.name == f"decoding {path}")
    del arriving
    gate.set()
    thread.join(60)
    assert not thread.is_alive() and decoded[-1] < 15


@pytest.mark.parametrize("num_frames", [2, 6, 16])
def test_patches_cut_on_the_device_are_the_host_s_to_the_last_bit(path, num_frames, rng):
    """Two videos and an image among them, in batches that hold frames of both videos."""
    config = PRESETS["3b"]
    whole = read_video(path, fps=4.0, max_frames=num_frames)
    image = Image(pixels=rng.integers(0, 256, (60, 90, 3), dtype=np.uint8))
    media = (stream(path, max_frames=num_frames), image, whole)
    patches = PixelPatches(sources=tuple(pixel_source(part, CONFIG) for part in media))
    small = resize(image.pixels, CONFIG)[None]
    want = np.concatenate([patchify(f, CONFIG)[0] for f in (whole.frames, small, whole.frames)])
    np.testing.assert_array_equal(np.asarray(patches), want)
    grids = tuple(source.grid for source in patches.sources)
    assert patches.shape == want.shape
    batches, theirs = frame_batches(patches, grids, config), frame_batches(want, grids, config)
    ranks = set()
    for ours, host in zip(batches, theirs, strict=True):
        np.testing.assert_array_equal(ours.patches, host.patches)
        ranks |= set(ours.ranks.tolist())
    assert len(ranks - {sum(num_tokens(g, config) for g in grids)}) == sum(num_tokens(g, config) for g in grids)


def test_large_frames_are_resized_by_the_thread_or_when_they_are_used(tmp_path):
    path = tmp_path / "large.mp4"
    write_moving_video(path, num_frames=4, side=200, fps=4)
    shrunk = stream(path, resize=lambda frame, _: resize(frame, CONFIG))
    assert shrunk.frame_shape == (84, 84, 3)
    late = pixel_source(stream(path), CONFIG)
    np.testing.assert_array_equal(late.frames(0, 4), shrunk.read().frames)
    first = PillowImage.fromarray(read_video(path, fps=4.0).frames[0]).resize((84, 84), PillowImage.Resampling.BICUBIC)
    np.testing.assert_array_equal(shrunk.frames(0, 1)[0], np.asarray(first))
