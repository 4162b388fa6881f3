"""Haystacks, the frames among which a needle hides: photographs panned over, or a folder of videos."""

import dataclasses
import functools
import os
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32, UInt8
from PIL import Image

from models.media.image import Frame
from models.media.video import read_video
from models.tasks.digits import SIDE
from models.tasks.pictures import PERMUTATIONS, atlas, photo_shapes

Base = Int32[np.ndarray, "n 5"]
"""The picture that a frame shows, in numbers that only its haystack reads."""


@runtime_checkable
class Haystack(Protocol):
    """A source of frames, all of one size."""

    @property
    def frame_shape(self) -> tuple[int, int]:
        """Rows and columns of a frame in pixels."""
        ...

    def shots(self, num_frames: int, rng: np.random.Generator) -> Base:
        """Frames as of a video: what follows on each other looks alike, now and then there is a cut."""
        ...

    def stills(self, count: int, rng: np.random.Generator) -> Base:
        """Single pictures that look different from each other."""
        ...

    def pixels(self, base: Base) -> UInt8[np.ndarray, "n rows columns 3"]:
        """The frames that were described."""
        ...


@dataclasses.dataclass(frozen=True)
class GeneratedHaystack:
    """Two photographs, panned over at three scales, mirrored, with their colour channels exchanged.

    A frame is described by page of the atlas, upper row, left column, order of channels, and whether it is mirrored.
    """

    @property
    def frame_shape(self) -> tuple[int, int]:
        """Rows and columns of a frame in pixels."""
        return SIDE, SIDE

    def shots(self, num_frames: int, rng: np.random.Generator) -> Base:
        """Shots of 8 to 48 frames, each from a place of a page to another, at one speed."""
        lengths = rng.integers(8, 49, num_frames // 8 + 1)
        shot = np.repeat(np.arange(len(lengths)), lengths)[:num_frames]
        elapsed = (np.arange(num_frames) - (np.cumsum(lengths) - lengths)[shot]) / lengths[shot]
        pages = rng.integers(0, len(photo_shapes()), len(lengths))
        last_corner = photo_shapes()[pages] - SIDE
        first, last = (rng.random((len(lengths), 2)) * last_corner for _ in range(2))
        corner = first[shot] + (last - first)[shot] * elapsed[:, None]
        look = np.stack([rng.integers(0, n, len(lengths)) for n in (len(PERMUTATIONS), 2)], axis=1)
        return np.concatenate([pages[shot, None], corner.astype(np.int64), look[shot]], axis=1).astype(np.int32)

    def stills(self, count: int, rng: np.random.Generator) -> Base:
        """Cut-outs of the largest scale that do not overlap, except mirrored or with other colours."""
        pictures = _distinct_pictures()
        if count > len(pictures):
            raise ValueError(f"at most {len(pictures)} different pictures are to be had, got {count=}")
        return pictures[rng.permutation(len(pictures))[:count]]

    def pixels(self, base: Base) -> UInt8[np.ndarray, "n rows columns 3"]:
        """The frames that were described, each one copy of a view of its page."""
        pages = atlas()
        frames = np.empty((len(base), SIDE, SIDE, 3), np.uint8)
        for frame, (page, row, column, order, is_mirrored) in zip(frames, base, strict=True):
            view = pages[page, row : row + SIDE, column : column + SIDE]
            view = view[:, ::-1] if is_mirrored else view
            for channel, source in enumerate(PERMUTATIONS[order]):
                frame[..., channel] = view[..., source]
        return frames


@functools.lru_cache(maxsize=1)
def _distinct_pictures() -> Base:
    """Every cut-out of the largest scale that shows something, in every order of channels, mirrored or not."""
    corners = [
        (page, row, column)
        for page in np.flatnonzero(photo_shapes()[:, 0] == photo_shapes()[:, 0].max())
        for row in range(0, photo_shapes()[page, 0] - SIDE + 1, SIDE)
        for column in range(0, photo_shapes()[page, 1] - SIDE + 1, SIDE)
        if atlas()[page, row : row + SIDE, column : column + SIDE].std(axis=(0, 1)).mean() > 25
    ]
    looks = [(permutation, mirrored) for permutation in range(len(PERMUTATIONS)) for mirrored in range(2)]
    return np.array([(*corner, *look) for corner in corners for look in looks], np.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderHaystack:
    """The videos of a folder one after another, from the start again when they end.

    A frame is described by its number; the other four numbers are 0.

    Args:
        directory: holds the videos; read in order of their names, other files are left alone.
        frame_shape: rows and columns that every frame is resized to.
        fps: frames taken per second of video.
        max_frames: frames kept in memory, of all videos together.
    """

    directory: str | os.PathLike
    frame_shape: tuple[int, int] = (224, 224)
    fps: float = 1.0
    max_frames: int = 8192

    def shots(self, num_frames: int, rng: np.random.Generator) -> Base:
        """Frames that follow on each other, from a random one on."""
        total = len(self._frames)
        return self._numbered((rng.integers(total) + np.arange(num_frames)) % total)

    def stills(self, count: int, rng: np.random.Generator) -> Base:
        """Frames as far apart as the videos allow, from a random one on."""
        total = len(self._frames)
        if count > total:
            raise ValueError(f"the videos of {str(self.directory)!r} have {total} frames in all, got {count=}")
        places = (rng.integers(total) + np.arange(count) * total // count) % total
        return self._numbered(rng.permutation(places))

    def pixels(self, base: Base) -> UInt8[np.ndarray, "n rows columns 3"]:
        """The frames of those numbers."""
        return self._frames[base[:, 0]]

    @staticmethod
    def _numbered(numbers: np.ndarray) -> Base:
        return np.pad(numbers[:, None], ((0, 0), (0, 4))).astype(np.int32)

    @functools.cached_property
    def _frames(self) -> UInt8[np.ndarray, "n rows columns 3"]:
        videos = sorted(path for path in Path(self.directory).iterdir() if path.suffix.lower() in VIDEO_SUFFIXES)
        if not videos:
            raise ValueError(
                f"a haystack folder must hold videos {VIDEO_SUFFIXES}, got none in {str(self.directory)!r}"
            )
        pieces, frames_left = [], self.max_frames
        for path in videos:
            if frames_left >= 2:
                pieces.append(read_video(path, fps=self.fps, max_frames=frames_left, resize=self._resize).frames)
                frames_left -= len(pieces[-1])
        return np.concatenate(pieces)

    def _resize(self, frame: Frame, num_frames: int) -> np.ndarray:
        rows, columns = self.frame_shape
        return np.asarray(Image.fromarray(frame).resize((columns, rows), Image.Resampling.BICUBIC))


VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm")
"""Files of a folder that are taken for videos."""
