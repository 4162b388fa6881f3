import fractions
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image as PillowImage

from models.media.image import Image, read_image
from models.media.sampling import sample_indices
from models.media.video import Video, read_video

ROWS, COLUMNS = 24, 32


def encode(path, frames, *, codec: Any = "ffv1", pix_fmt="bgr0", rate: Any = 10, rotation=0, **options):
    """Writes `frames` (uint8 [n, rows, columns, 3]); ffv1 in bgr0 is lossless."""
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        if rotation:
            stream.set_display_rotation(rotation)
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def encode_h264(path, frames, **options):
    return encode(path, frames, codec="libx264", pix_fmt="yuv420p", **options)


@pytest.fixture
def frames(rng):
    return rng.integers(0, 256, (40, ROWS, COLUMNS, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("num_frames", "source_fps", "fps", "expected"),
    [
        (10, 4.0, 2.0, [0, 2, 5, 7]),
        (12, 2.0, 2.0, list(range(12))),
        (13, 13.0, 1.0, [0, 3, 6, 9]),
        (5, 30.0, 1.0, [0, 1, 2, 3]),
        (3, 30.0, 1.0, [0, 1]),
        (2, 30.0, 1.0, [0, 1]),
        (1, 30.0, 1.0, [0]),
        (8, 2.0, 100.0, list(range(8))),
    ],
)
def test_sampling_rule_by_hand(num_frames, source_fps, fps, expected):
    assert sample_indices(num_frames, source_fps=source_fps, fps=fps).tolist() == expected


def test_sampling_stops_at_768_frames_or_the_limit_asked():
    hour = 3600 * 30
    assert len(sample_indices(hour, source_fps=30.0, fps=2.0)) == 768
    assert len(sample_indices(hour, source_fps=30.0, fps=2.0, max_frames=7200)) == 7200
    assert sample_indices(hour, source_fps=30.0, fps=2.0, max_frames=7)[-1] == hour * 5 // 6


def test_lossless_video_comes_back_bit_exact(tmp_path, frames):
    video = read_video(encode(tmp_path / "v.mkv", frames), fps=10.0)
    np.testing.assert_array_equal(video.frames, frames)
    assert (video.num_frames, video.fps, video.seconds) == (40, 10.0, 4.0)


def test_sampled_frames_are_those_of_the_rule(tmp_path, frames):
    video = read_video(encode(tmp_path / "v.mkv", frames), fps=3.0)
    np.testing.assert_array_equal(video.frames, frames[sample_indices(40, source_fps=10.0, fps=3.0)])
    assert video.num_frames == 12
    assert video.fps == pytest.approx(3.0)


@pytest.mark.parametrize("suffix", ["mkv", "nut", "mp4"])
def test_containers_without_a_frame_count_are_counted(tmp_path, frames, suffix):
    path = tmp_path / f"v.{suffix}"
    if suffix == "mp4":
        encode_h264(path, frames, movflags="frag_keyframe+empty_moov")
    else:
        encode(path, frames)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 0
    assert read_video(path, fps=10.0).num_frames == 40


def test_frames_hidden_by_an_edit_list_are_not_counted(tmp_path, frames):
    path = tmp_path / "trimmed.mp4"
    whole = encode_h264(tmp_path / "whole.mp4", frames, bf="0", g="5")
    with (
        av.open(str(whole)) as source,
        av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as container,
    ):
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size and packet.pts is not None and packet.dts is not None and packet.duration is not None:
                packet.pts -= 16 * packet.duration  # frames before time 0 are stored, and hidden
                packet.dts -= 16 * packet.duration
                packet.stream = stream
                container.mux(packet)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 40
    video = read_video(path, fps=10.0)
    np.testing.assert_array_equal(video.frames, read_video(whole, fps=10.0).frames[16:])
    assert video.seconds == pytest.approx(2.4)


def test_frames_are_resized_one_by_one_as_they_come(tmp_path, frames):
    frame_counts = []

    def halve(frame, num_frames):
        frame_counts.append(num_frames)
        return frame[::2, ::2]

    video = read_video(encode(tmp_path / "v.mkv", frames), fps=5.0, resize=halve)
    np.testing.assert_array_equal(video.frames, frames[::2, ::2, ::2])
    assert frame_counts == [20] * 20


def test_progress_counts_decoded_frames_up_to_the_last_sampled_one(tmp_path, frames):
    steps = []
    read_video(encode(tmp_path / "v.mkv", frames), fps=5.0, on_frame=lambda done, total: steps.append((done, total)))
    assert steps == [(n, 39) for n in range(1, 40)]


def test_a_rotated_video_is_turned_upright(tmp_path, frames):
    path = encode_h264(tmp_path / "v.mp4", frames[:4], rotation=90)
    plain = read_video(encode_h264(tmp_path / "plain.mp4", frames[:4]), fps=10.0)
    with av.open(str(path)) as container:
        degrees = next(container.decode(video=0)).rotation
    assert abs(degrees) == 90
    np.testing.assert_array_equal(
        read_video(path, fps=10.0).frames, np.rot90(plain.frames, k=degrees // 90, axes=(1, 2))
    )


@pytest.mark.parametrize("fps", [0.0, -1.0, float("nan"), float("inf")])
def test_the_rate_asked_must_be_positive(tmp_path, frames, fps):
    path = encode(tmp_path / "v.mkv", frames[:4])
    with pytest.raises(ValueError, match="fps must be a positive finite number"):
        read_video(path, fps=fps)


def test_a_missing_file():
    with pytest.raises(ValueError, match="no such file: path='nowhere.mp4'"):
        read_video("nowhere.mp4", fps=1.0)


def test_an_empty_file(tmp_path):
    (tmp_path / "v.mp4").write_bytes(b"")
    with pytest.raises(ValueError, match="must not be empty, got 0 bytes"):
        read_video(tmp_path / "v.mp4", fps=1.0)


def test_a_file_that_is_no_video(tmp_path):
    (tmp_path / "v.mp4").write_bytes(b"no video at all " * 100)
    with pytest.raises(ValueError, match="a video file must decode without errors.*Invalid data"):
        read_video(tmp_path / "v.mp4", fps=1.0)


def test_a_file_without_a_video_stream(tmp_path):
    with av.open(str(tmp_path / "a.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(ValueError, match=r"must have a video stream, got streams=\['audio'\]"):
        read_video(tmp_path / "a.wav", fps=1.0)


def test_a_video_without_frames(tmp_path):
    path = tmp_path / "v.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width, stream.pix_fmt = ROWS, COLUMNS, "yuv420p"
        container.start_encoding()
    with pytest.raises(ValueError, match="must have one frame or more, got num_frames=0"):
        read_video(path, fps=1.0)


@pytest.mark.parametrize("fraction", [0.3, 0.6, 0.9])
def test_a_truncated_video_whose_container_counts_no_frames(tmp_path, frames, fraction):
    path = encode(tmp_path / "v.mkv", frames)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * fraction)])
    with pytest.raises(ValueError, match="must last as long as its container announces: expected 4.00 seconds, got"):
        read_video(path, fps=2.0)


def test_a_truncated_video(tmp_path, frames):
    path = encode_h264(tmp_path / "v.mp4", frames, movflags="faststart")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="must decode to the frames that its container announces: num_frames=40"):
        read_video(path, fps=2.0)


def test_a_video_with_overwritten_bytes(tmp_path, frames):
    path = encode_h264(tmp_path / "v.mp4", frames, movflags="faststart")
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 2000] = bytes(2000)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="a video file must decode without errors"):
        read_video(path, fps=2.0)


def test_a_source_without_a_frame_rate(tmp_path, frames):
    path = tmp_path / "v.mkv"
    with av.open(str(encode(tmp_path / "one.mkv", frames[:1]))) as source, av.open(str(path), "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                container.mux(packet)
    with pytest.raises(ValueError, match="a video must have a frame rate"):
        read_video(path, fps=1.0)


def test_frames_that_change_their_size(tmp_path, frames):
    path = encode(tmp_path / "v.mkv", frames[:4])
    first = read_video(path, fps=10.0).frames[0]

    def shrink_first(frame, num_frames):
        return frame[:10] if np.array_equal(frame, first) else frame

    with pytest.raises(ValueError, match=r"must have one size: expected \(10, 32\), got \(24, 32\)"):
        read_video(path, fps=10.0, resize=shrink_first)


def test_a_video_needs_a_rate_and_pixels():
    with pytest.raises(ValueError, match="fps must be a positive"):
        Video(frames=np.zeros((2, 4, 4, 3), np.uint8), fps=0.0)
    with pytest.raises(ValueError, match="a video needs at least one frame"):
        Video(frames=np.zeros((0, 4, 4, 3), np.uint8), fps=1.0)
    with pytest.raises(ValueError, match="an image needs at least one"):
        Image(pixels=np.zeros((0, 4, 3), np.uint8))


def test_fractional_source_rates(tmp_path, frames):
    path = encode(tmp_path / "v.mkv", frames, rate=fractions.Fraction(30000, 1001))
    assert read_video(path, fps=100.0).fps == pytest.approx(30000 / 1001, rel=1e-3)


def test_an_image_comes_back_upright_and_without_transparency(tmp_path, frames):
    exif = PillowImage.Exif()
    exif[0x0112] = 6  # the viewer turns the stored pixels by 90 degrees clockwise
    PillowImage.fromarray(frames[0]).save(tmp_path / "i.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "i.png").pixels, np.rot90(frames[0], k=-1))
    PillowImage.fromarray(frames[0]).convert("RGBA").save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png").pixels, frames[0])


def test_bad_images(tmp_path, frames):
    with pytest.raises(ValueError, match="no such file"):
        read_image(tmp_path / "nowhere.png")
    (tmp_path / "text.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="must be in a format that Pillow reads"):
        read_image(tmp_path / "text.png")
    PillowImage.fromarray(frames[0]).save(tmp_path / "i.png")
    content = (tmp_path / "i.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="an image file must decode whole"):
        read_image(tmp_path / "cut.png")
