"""Videos: sampled frames, read from a file at once."""

import dataclasses
import os

import numpy as np
from jaxtyping import UInt8

from models.media.checks import check_fps, check_pixels
from models.media.decoding import FrameResize, OnFrame, sampled_frames
from models.media.sampling import MAX_FRAMES, sample_file


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
        check_pixels(self.frames, "a video")
        check_fps(self.fps)

    @property
    def num_frames(self) -> int:
        """Sampled frames."""
        return self.frames.shape[0]

    @property
    def seconds(self) -> float:
        """Seconds of video that the sampled frames cover."""
        return self.num_frames / self.fps


def read_video(
    path: str | os.PathLike,
    *,
    fps: float,
    max_frames: int = MAX_FRAMES,
    resize: FrameResize | None = None,
    on_frame: OnFrame | None = None,
) -> Video:
    """The frames of a video file sampled at about `fps` per second; only sampled frames are ever kept in memory.

    Frames are chosen by their number (`sample_indices`), so a source of variable rate is sampled evenly in frames,
    not in time.

    Args:
        path: any file with a video stream that FFmpeg reads.
        fps: sampled frames per second; positive.
        max_frames: maximum number of sampled frames.
        resize: called with each sampled frame and the number of sampled frames, gives the frame to keep; from several
            threads. With it an hour of 1080p needs memory for the small frames only.
        on_frame: called after each decoded frame with the frames decoded so far and the frames to decode.

    Raises:
        ValueError: the file is missing, empty, corrupt or without video frames, or a rate is not positive.
    """
    sampling = sample_file(path, fps=fps, max_frames=max_frames)
    frames = np.empty((0, 1, 1, 3), np.uint8)
    for index, frame in enumerate(sampled_frames(sampling, resize, on_frame)):
        if index == 0:
            frames = np.empty((len(sampling.indices), *frame.shape), np.uint8)
        frames[index] = frame
    return Video(frames=frames, fps=sampling.fps)
