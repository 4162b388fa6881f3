"""Prompts for benchmarks: random words, and images and videos of any size among them, without a tokenizer."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

HEAD_TEXT, TAIL_TEXT, FRAME_SIDE = 64, 448, 16
"""Text tokens before the video, at least as many behind it, and tokens along the side of a frame."""


class Medium(NamedTuple):
    """An image or a video: its size in patches, and the seconds of a temporal patch."""

    grid: tuple[int, int, int]
    is_image: bool = False
    seconds: float = 1.0


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


def made_prompt(config: Any, pieces: Sequence[int | Medium], patches: Any, rng: np.random.Generator) -> Any:
    """Runs of so many random words, and media between their marks, in order; `patches` are those of all media."""
    from mmi_jax.layout import stack
    from models.prompt import Prompt
    from models.qwen2_5_vl.placeholders import num_tokens, token_layout
    from models.qwen2_5_vl.rope import mrope_positions

    ids = []
    for piece in pieces:
        if isinstance(piece, Medium):
            token = config.image_token if piece.is_image else config.video_token
            marked = np.full(2 + num_tokens(piece.grid, config), token, np.int32)
            marked[0], marked[-1] = config.vision_start_token, config.vision_end_token
            ids.append(marked)
        else:
            ids.append(_words(config, piece, rng))
    tokens = np.concatenate(ids)
    media = [piece for piece in pieces if isinstance(piece, Medium)]
    grids = tuple(medium.grid for medium in media)
    return Prompt(
        tokens=tokens[None],
        rope_pos=mrope_positions(tokens, grids, [medium.seconds for medium in media], config)[:, None],
        layout=stack([token_layout(tokens, grids, config)]),
        patches=patches,
        grids=grids,
    )


def video_pieces(config: Any, num_tokens: int) -> tuple[int, Medium, int]:
    """Text, a video of as many whole frames as fit, text: exactly `num_tokens`.

    Raises:
      ValueError: not even one frame fits.
    """
    num_frames = (num_tokens - HEAD_TEXT - TAIL_TEXT - 2) // FRAME_SIDE**2
    if num_frames < 1:
        raise ValueError(f"--tokens must leave room for a frame of {FRAME_SIDE**2}, got {num_tokens}")
    side = FRAME_SIDE * config.vision.merge_size
    rest = num_tokens - HEAD_TEXT - 2 - num_frames * FRAME_SIDE**2
    return HEAD_TEXT, Medium(grid=(num_frames, side, side)), rest


def video_prompt(config: Any, num_tokens: int) -> Any:
    """The prompt of `video_pieces` without patches: a decoder looks up random words in place of the video.

    Raises:
      ValueError: not even one frame fits.
    """
    rng = np.random.default_rng(0)
    none = np.zeros((0, config.vision.patch_dim), np.float32)
    prompt = made_prompt(config, video_pieces(config, num_tokens), none, rng)
    return dataclasses.replace(prompt, tokens=_words(config, num_tokens, rng)[None], grids=())


def _words(config: Any, number: int, rng: np.random.Generator) -> np.ndarray:
    """Random ids that are no marks."""
    return rng.integers(0, int(0.9 * min(config.image_token, config.video_token)), number).astype(np.int32)
