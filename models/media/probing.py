"""Probing of a video file: frames and rate from its header or its packets, by PyAV (FFmpeg), nothing decoded."""

import contextlib
import os
from collections.abc import Iterator

import av
from av.container import InputContainer
from av.error import FFmpegError
from av.video.stream import VideoStream


@contextlib.contextmanager
def readable(path: str | os.PathLike) -> Iterator[None]:
    """Says of an error of FFmpeg's which file it was."""
    try:
        yield
    except FFmpegError as error:
        raise ValueError(f"a video file must decode without errors, got path={str(path)!r}: {error}") from error


def probe(path: str | os.PathLike) -> tuple[int, float]:
    """Frames in the file and frames per second, without decoding: as its header says, or packets counted.

    A header counts all that is stored; where an edit list hides frames (a video trimmed on a phone), its duration is
    shorter than that count, and only the packets give the number.
    """
    with av.open(os.fspath(path)) as container:
        stream = video_stream(container, path)
        if not stream.average_rate:
            raise ValueError(f"a video must have a frame rate, got {stream.average_rate} in path={str(path)!r}")
        fps, num_frames = float(stream.average_rate), stream.frames
        seconds = float((stream.duration or 0) * (stream.time_base or 0)) or num_frames / fps
        if num_frames == 0 or round(seconds * fps) != num_frames:
            num_frames = _count_packets(container, stream, path)
    if num_frames == 0:
        raise ValueError(f"a video must have one frame or more, got {num_frames=} in path={str(path)!r}")
    return num_frames, fps


def _count_packets(container: InputContainer, stream: VideoStream, path: str | os.PathLike) -> int:
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


def video_stream(container: InputContainer, path: str | os.PathLike) -> VideoStream:
    """The first video stream of a file."""
    if not container.streams.video:
        kinds = sorted({stream.type for stream in container.streams})
        raise ValueError(f"a video file must have a video stream, got streams={kinds} in path={str(path)!r}")
    return container.streams.video[0]
