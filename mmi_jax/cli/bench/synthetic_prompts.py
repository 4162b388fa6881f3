"""Prompts for benchmarks: random words, and images and videos of any size among them, without a tokenizer."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from mmi_jax.cli.protocols import ModelConfig, Prompt

HEAD_TEXT, TAIL_TEXT, FRAME_SIDE = 64, 448, 16
"""Text tokens before the video, at least as many behind it, and tokens along the side of a frame."""


@dataclasses.dataclass(frozen=True, eq=False)
class RepeatedPatches:
    """`LazyPatches` of any number: a few that lie on the host, over and over."""

    few: Float[np.ndarray, "n c"]
    number: int

    @property
    def shape(self) -> tuple[int, int]:
        """Patches, and numbers in each."""
        return self.number, self.few.shape[1]

    def rows(self, first: np.ndarray, width: int) -> Float[Array, "p c"]:
        """On the device, `width` patches from each of `first` on."""
        return jax.device_put(self.few[(first[:, None] + np.arange(width)).reshape(-1) % len(self.few)])

    def __array__(self, dtype=None, copy=None) -> Float[np.ndarray, "p c"]:
        """All of them on the host."""
        return self.few[np.arange(self.number) % len(self.few)].astype(dtype or np.float32)

    def digest_arrays(self) -> Iterator[np.ndarray]:
        """The few, and how many are made of them."""
        yield from (self.few, np.array(self.number))


def synthetic_prompt(config: ModelConfig, pieces: Sequence[Any], patches: Any, rng: np.random.Generator) -> Prompt:
    """A prompt of random words, and of media between their marks.

    Args:
      config: the model's sizes.
      pieces: a number of words, or a `models.interface.MediumSize`, in order.
      patches: of all media.
    """
    from models import family_of
    from models.prompt import collate

    family = family_of(config)
    words = [_words(config, piece, rng) if isinstance(piece, int) else None for piece in pieces]
    media = [piece for piece in pieces if not isinstance(piece, int)]
    ids = [family.medium_tokens(config, p) if w is None else w for p, w in zip(pieces, words, strict=True)]
    return collate([family.tokenized(config, np.concatenate(ids), media)], patches)


def video_pieces(config: ModelConfig, num_tokens: int) -> tuple[int, Any, int]:
    """Text, a video of as many whole frames as fit, text: exactly `num_tokens`.

    Raises:
      ValueError: not even one frame fits.
    """
    from models.interface import MediumSize

    num_frames = (num_tokens - HEAD_TEXT - TAIL_TEXT - 2) // FRAME_SIDE**2
    if num_frames < 1:
        raise ValueError(f"--tokens must hold a frame of {FRAME_SIDE**2}, got {num_tokens}")
    side = FRAME_SIDE * config.vision.merge_size
    rest = num_tokens - HEAD_TEXT - 2 - num_frames * FRAME_SIDE**2
    return HEAD_TEXT, MediumSize(grid=(num_frames, side, side)), rest


def video_prompt(config: ModelConfig, num_tokens: int) -> Prompt:
    """The prompt of `video_pieces` without patches: a decoder looks up random words in place of the video.

    Raises:
      ValueError: not even one frame fits.
    """
    rng = np.random.default_rng(0)
    none = np.zeros((0, config.vision.patch_dim), np.float32)
    prompt = synthetic_prompt(config, video_pieces(config, num_tokens), none, rng)
    return dataclasses.replace(prompt, tokens=_words(config, num_tokens, rng)[None], grids=())


def _words(config: ModelConfig, number: int, rng: np.random.Generator) -> np.ndarray:
    """Random ids that are no marks."""
    from models import family_of

    return rng.integers(0, family_of(config).num_words(config), number).astype(np.int32)
