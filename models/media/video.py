"""Images and videos read from files: Pillow for images, PyAV (FFmpeg) for videos."""

import contextlib
import dataclasses
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.error import FFmpegError
from jaxtyping import Int64, UInt8
from PIL import Image as PillowImage
from PIL import ImageOps, UnidentifiedImageError

MAX_FRAMES = 768
"""Frames that Qwen2-VL and Qwen2.5-VL sample from one video at most."""

MIN_FRAMES = 4
"""Frames sampled at least, if the video has as many."""

TEMPORAL_PATCH_LEN = 2
"""Frames that share one vision token; the number of sampled frames is a multiple of it."""

CONVERTING_THREADS = 4
"""Threads that turn decoded frames into RGB and resize them."""

Frame = UInt8[np.ndarray, "rows columns 3"]
type FrameResize = Callable[[np.ndarray, int], np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Image:
    """One RGB image."""

    pixels: Frame

    def __post_init__(self):
        """Checks that there are pixels."""
        _check_pixels(self.pixels, "an image")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Video:
    """The sampled RGB frames of one video.

    Args:
        frames: pixels of every sampled frame, all of one size.
        fps: sampled frames per second of video, not the rate of the source.
    """

    frames: UInt8[np.ndarray, "frames rows columns 3"]
    fps: float

    def __post_init__(self):
        """Checks that there are pixels and a rate."""
        _check_pixels(self.frames, "a video")
        _check_fps(self.fps)

    @property
    def num_frames(self) -> int:
        """Sampled frames."""
        return self.frames.shape[0]

    @property
    def seconds(self) -> float:
        """Seconds of video that the sampled frames stand for."""
        return self.num_frames / self.fps


def read_image(path: str | os.PathLike) -> Image:
    """The image in a file as RGB, turned upright as its EXIF orientation says; transparency is dropped."""
    _check_file(path)
    try:
        with PillowImage.open(path) as image:
            return Image(pixels=np.array(ImageOps.exif_transpose(image).convert("RGB")))
    except UnidentifiedImageError as error:
        raise ValueError(f"an image must be in a format that Pillow reads, got path={str(path)!r}") from error
    except (OSError, SyntaxError, PillowImage.DecompressionBombError) as error:
        raise ValueError(f"an image file must decode whole, got path={str(path)!r}: {error}") from error


def sample_indices(
    num_frames: int, *, source_fps: float, fps: float, max_frames: int = MAX_FRAMES
) -> Int64[np.ndarray, " n"]:
    """The source frames that Qwen2-VL looks at: evenly spaced, an even number of them.

    10 frames at 4 per second, sampled at 2 per second: 10 / 4 * 2 = 5, made even: 4 frames, 2.5 apart:

        frame    0 1 2 3 4 5 6 7 8 9
        sampled  x   x     x   x

    A video of a single frame is sampled once; the patches repeat it.

    References: class Qwen2VLVideoProcessor of transformers, method sample_frames. Whole-number division here, float32
    there: of 20,000 random cases up to 20,000 frames, 10 differ by rounding.
    """
    _check_fps(fps)
    if num_frames < 1 or max_frames < TEMPORAL_PATCH_LEN:
        raise ValueError(
            f"sampling needs a frame and a limit of {TEMPORAL_PATCH_LEN} or more: {num_frames=}, {max_frames=}"
        )
    at_most = max(min(max_frames, num_frames) // TEMPORAL_PATCH_LEN * TEMPORAL_PATCH_LEN, 1)
    wanted = min(max(num_frames / source_fps * fps, MIN_FRAMES), at_most)
    num_sampled = max(math.floor(wanted / TEMPORAL_PATCH_LEN) * TEMPORAL_PATCH_LEN, 1)
    return np.arange(num_sampled, dtype=np.int64) * num_frames // num_sampled


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Sampling:
    """Which frames of a video file are looked at.

    Args:
        path: of the file.
        indices: their numbers, ascending.
        num_frames: in the file.
        source_fps: frames of the file per second.
    """

    path: str | os.PathLike
    indices: Int64[np.ndarray, " n"]
    num_frames: int
    source_fps: float

    @property
    def fps(self) -> float:
        """Sampled frames per second."""
        return len(self.indices) / self.num_frames * self.source_fps


def read_video(
    path: str | os.PathLike,
    *,
    fps: float,
    max_frames: int = MAX_FRAMES,
    resize: FrameResize | None = None,
    on_frame: Callable[[int, int], None] | None = None,
) -> Video:
    """The frames of a video file sampled at about `fps` per second; only sampled frames are ever kept in memory.

    Frames are chosen by their number (`sample_indices`), so a source of variable rate is sampled evenly in frames,
    not in time.

    Args:
        path: any file with a video stream that FFmpeg reads.
        fps: sampled frames per second; positive.
        max_frames: sampled frames at most.
        resize: called with each sampled frame and the number of sampled frames, gives the frame to keep; from several
            threads. With it an hour of 1080p needs memory for the small frames only.
        on_frame: called after each decoded frame with the frames decoded so far and the frames to decode.

    Raises:
        ValueError: the file is missing, empty, corrupt or without video frames, or a rate is not positive.
    """
    sampling = sample_file(path, fps=fps, max_frames=max_frames)
    kept = np.empty((0, 1, 1, 3), np.uint8)
    for index, frame in enumerate(sampled_frames(sampling, resize, on_frame)):
        if index == 0:
            kept = np.empty((len(sampling.indices), *frame.shape), np.uint8)
        kept[index] = frame
    return Video(frames=kept, fps=sampling.fps)


def sample_file(path: str | os.PathLike, *, fps: float, max_frames: int = MAX_FRAMES) -> Sampling:
    """What `read_video` would read of a file, of which nothing is decoded.

    Raises:
        ValueError: as `read_video`, as far as a header tells.
    """
    _check_fps(fps)
    _check_file(path)
    with _readable(path):
        num_frames, source_fps = _probe(path)
    indices = sample_indices(num_frames, source_fps=source_fps, fps=fps, max_frames=max_frames)
    return Sampling(path=path, indices=indices, num_frames=num_frames, source_fps=source_fps)


def sampled_frames(
    sampling: Sampling, resize: FrameResize | None = None, on_frame: Callable[[int, int], None] | None = None
) -> Iterator[Frame]:
    """The sampled frames in order, all of one size; each is converted and resized while the next ones are decoded.

    Args:
        sampling: of `sample_file`.
        resize, on_frame: as for `read_video`.

    Raises:
        ValueError: the file is corrupt or ends early, or its frames have several sizes.
    """
    path, num_sampled, size, count = sampling.path, len(sampling.indices), None, 0

    def finished(source) -> np.ndarray:
        # The display matrix of a phone's video: rotation counts degrees counterclockwise, as rot90 does.
        frame = np.ascontiguousarray(np.rot90(source.to_ndarray(format="rgb24"), k=round(source.rotation / 90)))
        return frame if resize is None else resize(frame, num_sampled)

    with _readable(path), av.open(os.fspath(path)) as container:
        stream = _video_stream(container, path)
        stream.thread_type = "AUTO"
        for frame in _in_threads(finished, _wanted(container.decode(stream), sampling.indices, on_frame)):
            size, count = size or frame.shape, count + 1
            if frame.shape != size:
                raise ValueError(
                    f"every frame of a video must have one size: expected {size[:2]}, got {frame.shape[:2]} rows x "
                    f"columns at sampled frame {count - 1} of path={str(path)!r}"
                )
            yield frame
    if count < num_sampled:
        raise ValueError(
            f"a video must decode to the frames that its container announces: num_frames={sampling.num_frames}, frame "
            f"{sampling.indices[-1]} was to be sampled, and path={str(path)!r} ends before it"
        )


@contextlib.contextmanager
def _readable(path: str | os.PathLike) -> Iterator[None]:
    """Says of an error of FFmpeg's which file it was."""
    try:
        yield
    except FFmpegError as error:
        raise ValueError(f"a video file must decode without errors, got path={str(path)!r}: {error}") from error


def _probe(path: str | os.PathLike) -> tuple[int, float]:
    """Frames in the file and frames per second, without decoding: as its header says, or packets counted.

    A header counts all that is stored; where an edit list hides frames (a video trimmed on a phone), its duration is
    shorter than that count, and only the packets tell.
    """
    with av.open(os.fspath(path)) as container:
        stream = _video_stream(container, path)
        if not stream.average_rate:
            raise ValueError(f"a video must tell its frame rate, got {stream.average_rate} in path={str(path)!r}")
        fps, num_frames = float(stream.average_rate), stream.frames
        seconds = float((stream.duration or 0) * (stream.time_base or 0)) or num_frames / fps
        if num_frames == 0 or round(seconds * fps) != num_frames:
            num_frames = _count_packets(container, stream, path)
    if num_frames == 0:
        raise ValueError(f"a video must have one frame or more, got {num_frames=} in path={str(path)!r}")
    return num_frames, fps


def _count_packets(container, stream, path: str | os.PathLike) -> int:
    """Packets of the stream; each holds one frame."""
    num_packets, seconds = 0, 0.0
    for packet in container.demux():
        if packet.size > 0:
            num_packets += packet.stream_index == stream.index
            seconds = max(seconds, float(((packet.pts or 0) + (packet.duration or 0)) * packet.time_base))
    # Matroska and WebM count no frames, so that a file cut off would pass for a short one; their header has a duration.
    announced = (container.duration or 0) / av.time_base if "matroska" in container.format.name else 0.0
    # The last packet may lack a duration, and writers round.
    if num_packets and seconds + 1 / float(stream.average_rate) < 0.95 * announced:
        raise ValueError(
            f"a video must last as long as its container announces: expected {announced:.2f} seconds, got "
            f"{seconds:.2f} in path={str(path)!r}"
        )
    return num_packets


def _video_stream(container, path: str | os.PathLike):
    if not container.streams.video:
        kinds = sorted({stream.type for stream in container.streams})
        raise ValueError(f"a video file must have a video stream, got streams={kinds} in path={str(path)!r}")
    return container.streams.video[0]


def _wanted(decoded: Iterable[Any], indices: np.ndarray, on_frame: Callable[[int, int], None] | None) -> Iterator[Any]:
    """The frames numbered `indices`, in order; decoding stops after the last of them."""
    wanted, last = set(indices.tolist()), int(indices[-1])
    for index, frame in enumerate(decoded):
        if on_frame is not None:
            on_frame(index + 1, last + 1)
        if index in wanted:
            yield frame
        if index == last:
            return


def _in_threads(work: Callable[[Any], np.ndarray], items: Iterable[Any]) -> Iterator[np.ndarray]:
    """What `work` makes of every item, in order, a few items ahead: FFmpeg and Pillow let other threads run."""
    with ThreadPoolExecutor(CONVERTING_THREADS) as pool:
        waiting: deque[Future] = deque()
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > 2 * CONVERTING_THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _check_fps(fps: float) -> None:
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"fps must be a positive finite number of frames per second, got {fps=}")


def _check_file(path: str | os.PathLike) -> None:
    if not Path(path).is_file():
        raise ValueError(f"no such file: path={str(path)!r}")
    if Path(path).stat().st_size == 0:
        raise ValueError(f"a media file must not be empty, got 0 bytes in path={str(path)!r}")


def _check_pixels(pixels: np.ndarray, kind: str) -> None:
    if 0 in pixels.shape:
        raise ValueError(f"{kind} needs at least one frame, row and column, got shape {pixels.shape}")
