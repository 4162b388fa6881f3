"""Decoding of a video's sampled frames, by PyAV (FFmpeg): conversion and resizing run in threads."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import av
import numpy as np

from models.media.image import Frame
from models.media.probing import readable, video_stream
from models.media.sampling import Sampling

CONVERTING_THREADS = 4
"""Threads that turn decoded frames into RGB and resize them."""

type FrameResize = Callable[[np.ndarray, int], np.ndarray]
"""From a frame and the number of sampled frames to the frame to keep."""

type OnFrame = Callable[[int, int], None]
"""Called after each decoded frame with the frames decoded so far and the frames to decode."""


def sampled_frames(
    sampling: Sampling, resize: FrameResize | None = None, on_frame: OnFrame | None = None
) -> Iterator[Frame]:
    """The sampled frames in order, all of one size; each is converted and resized while the next ones are decoded.

    Args:
        sampling: of `sample_file`.
        resize, on_frame: as for `read_video`.

    Raises:
        ValueError: the file is corrupt or ends early, or its frames have several sizes.
    """
    path, num_sampled, size, count = sampling.path, len(sampling.indices), None, 0

    def finished(source: av.VideoFrame) -> np.ndarray:
        # The display matrix of a phone's video: rotation counts degrees counterclockwise, as rot90 does.
        frame = np.ascontiguousarray(np.rot90(source.to_ndarray(format="rgb24"), k=round(source.rotation / 90)))
        return frame if resize is None else resize(frame, num_sampled)

    with readable(path), av.open(os.fspath(path)) as container:
        stream = video_stream(container, path)
        stream.thread_type = "AUTO"
        for frame in _in_threads(finished, _at(container.decode(stream), sampling.indices, on_frame)):
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


def _at[T](decoded: Iterable[T], indices: np.ndarray, on_frame: OnFrame | None) -> Iterator[T]:
    """The frames numbered `indices`, in order; decoding stops after the last of them."""
    sampled, last = set(indices.tolist()), int(indices[-1])
    for index, frame in enumerate(decoded):
        if on_frame is not None:
            on_frame(index + 1, last + 1)
        if index in sampled:
            yield frame
        if index == last:
            return


def _in_threads[T](work: Callable[[T], np.ndarray], items: Iterable[T]) -> Iterator[np.ndarray]:
    """Results of `work` for every item, in order, a few items ahead: FFmpeg and Pillow let other threads run."""
    with ThreadPoolExecutor(CONVERTING_THREADS) as pool:
        waiting: deque[Future] = deque()
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > 2 * CONVERTING_THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
