"""A video that is being decoded: its first frames are used while a thread decodes the others."""

import dataclasses
import os
import threading
import time
import weakref

import numpy as np
from jaxtyping import UInt8

from models.media.decoding import FrameResize, OnFrame, sampled_frames
from models.media.sampling import MAX_FRAMES, Sampling, sample_file
from models.media.video import Video


class VideoStream:
    """The sampled frames of a video file, decoded by a thread; a reader of frames waits until they are decoded.

    Attributes:
        num_frames: sampled frames.
        fps: sampled frames per second of video.
        frame_shape: rows and columns of every frame, and 3.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        fps: float,
        max_frames: int = MAX_FRAMES,
        resize: FrameResize | None = None,
        on_frame: OnFrame | None = None,
    ):
        """Returns when the first frame is decoded; arguments and errors as of `read_video`.

        Errors of later frames are raised where these are read. `on_frame` is called from the thread. Decoding stops
        when the stream is no longer referred to.
        """
        sampling = sample_file(path, fps=fps, max_frames=max_frames)
        self.num_frames, self.fps = len(sampling.indices), sampling.fps
        self._arrival = arrival = _Arrival()
        weakref.finalize(self, arrival.stop)
        arguments = arrival, sampling, resize, on_frame
        threading.Thread(target=_decode, args=arguments, name=f"decoding {path}", daemon=True).start()
        self.frame_shape = arrival.wait_for(1).shape[1:]

    def frames(self, start: int, stop: int) -> UInt8[np.ndarray, "n rows columns 3"]:
        """The frames `[start, stop)`, a view.

        Raises:
            ValueError: the file is corrupt or ends before them.
        """
        return self._arrival.wait_for(stop)[start:stop]

    def read(self) -> Video:
        """The whole video."""
        return Video(frames=self.frames(0, self.num_frames), fps=self.fps)

    @property
    def waited_seconds(self) -> float:
        """Total time that callers have waited for frames."""
        return self._arrival.waited_seconds


@dataclasses.dataclass
class _Arrival:
    """Frames decoded so far; everything but `changed` is guarded by its lock."""

    buffer: np.ndarray = dataclasses.field(default_factory=lambda: np.empty((0, 1, 1, 3), np.uint8))
    num_there: int = 0
    error: Exception | None = None
    is_read: bool = True
    waited_seconds: float = 0.0
    changed: threading.Condition = dataclasses.field(default_factory=threading.Condition)

    def wait_for(self, count: int) -> np.ndarray:
        """All frames, of which `count` or more are decoded."""
        start = time.perf_counter()
        with self.changed:
            self.changed.wait_for(lambda: self.num_there >= count or self.error is not None)
            self.waited_seconds += time.perf_counter() - start
            if self.num_there < count:
                assert self.error is not None
                raise self.error
            return self.buffer

    def put(self, frame: np.ndarray, num_frames: int) -> None:
        """Keeps the next frame."""
        if self.num_there == 0:
            self.buffer = np.empty((num_frames, *frame.shape), np.uint8)
        self.buffer[self.num_there] = frame
        with self.changed:
            self.num_there += 1
            self.changed.notify_all()

    def fail(self, error: Exception) -> None:
        """No frame will come any more."""
        with self.changed:
            self.error = error
            self.changed.notify_all()

    def stop(self) -> None:
        """No further frames are read."""
        self.is_read = False


def _decode(arrival: _Arrival, sampling: Sampling, resize: FrameResize | None, on_frame: OnFrame | None) -> None:
    """The thread: it knows the arrival alone, so that a stream without references is noticed."""
    try:
        for frame in sampled_frames(sampling, resize, on_frame):
            if not arrival.is_read:
                return
            arrival.put(frame, len(sampling.indices))
    except Exception as error:  # raised again where frames are read
        arrival.fail(error)
