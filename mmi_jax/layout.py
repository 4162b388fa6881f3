"""TokenLayout: modality, place in the video and mask position of every token of a prompt."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.notation import AnyArray, Array, Bool, Int32
from pallas_kernels.pytree import pytree

TEXT, VISION, AUDIO = 0, 1, 2
PADDING = -1
"""Modality of a padding token, and the value of every other field there."""

type TokenIndex = Int32[Array, ""] | int
"""A place in the prompt: known when the caller is traced, or traced itself."""


@pytree
class TokenLayout:
    """Modality, place in the video and mask position of every token; -1 where a token has none.

    A prompt of two text tokens, a video of two frames of 1 x 2 tokens, one text token and one padding token:

        modality  0  0  1  1  1  1  0 -1
        video    -1 -1  0  0  0  0 -1 -1
        frame    -1 -1  0  0  1  1 -1 -1
        row      -1 -1  0  0  0  0 -1 -1
        column   -1 -1  0  1  0  1 -1 -1
        pos       0  1  2  3  4  5  6 -1

    All fields are int32 and have one shape, `[t]` for one example or `[b, t]` for a batch. `modality` is 0 text,
    1 vision, 2 audio, any larger number a further modality. `video` counts videos and images in order of appearance.
    `pos` is what the mask reads (a key is attended iff its `pos` is at most the query's): it never decreases among
    the tokens that are not padding, and tokens of equal `pos` attend to each other. It is not the rope position.
    """

    modality: Int32[AnyArray, "*b t"]
    video: Int32[AnyArray, "*b t"]
    frame: Int32[AnyArray, "*b t"]
    row: Int32[AnyArray, "*b t"]
    column: Int32[AnyArray, "*b t"]
    pos: Int32[AnyArray, "*b t"]

    @property
    def num_tokens(self) -> int:
        """Tokens in the layout, padding included."""
        return self.modality.shape[-1]

    @property
    def is_real(self) -> Bool[AnyArray, "*b t"]:
        """True where a token is not padding; bool, shape of the fields."""
        return self.modality != PADDING

    def pad_to(self, num_tokens: int) -> "TokenLayout":
        """The layout with padding appended up to `num_tokens`."""
        if num_tokens < self.num_tokens:
            raise ValueError(f"a layout cannot be padded to fewer tokens: {num_tokens=}, it has {self.num_tokens}")
        widths = [(0, 0)] * (self.modality.ndim - 1) + [(0, num_tokens - self.num_tokens)]
        return jax.tree.map(lambda x: jnp.pad(x, widths, constant_values=PADDING), self)

    def window(self, start: TokenIndex, num_tokens: int) -> "TokenLayout":
        """The `num_tokens` tokens from `start` on."""
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, num_tokens, axis=-1), self)


def text_tokens(num_tokens: int) -> TokenLayout:
    """The layout of `num_tokens` text tokens."""
    absent = np.full(num_tokens, -1, np.int32)
    return TokenLayout(
        modality=np.zeros(num_tokens, np.int32),
        video=absent,
        frame=absent,
        row=absent,
        column=absent,
        pos=np.arange(num_tokens, dtype=np.int32),
    )


def vision_tokens(num_frames: int, num_rows: int, num_columns: int, *, frame: int = 0, video: int = 0) -> TokenLayout:
    """The layout of `num_frames` frames of `num_rows` x `num_columns` tokens, the first frame being number `frame`."""
    shape = (num_frames, num_rows, num_columns)
    place = np.indices(shape, dtype=np.int32).reshape(3, -1)
    num_tokens = place.shape[1]
    return TokenLayout(
        modality=np.full(num_tokens, VISION, np.int32),
        video=np.full(num_tokens, video, np.int32),
        frame=place[0] + np.int32(frame),
        row=place[1],
        column=place[2],
        pos=np.arange(num_tokens, dtype=np.int32),
    )


def concatenate(layouts: Sequence[TokenLayout]) -> TokenLayout:
    """One prompt made of the pieces in order; `pos` counts on from piece to piece, the other fields are kept."""
    if not layouts:
        raise ValueError("concatenate needs at least one layout, got none")
    joined = jax.tree.map(lambda *pieces: np.concatenate(pieces, axis=-1), *layouts)
    is_real = joined.modality != PADDING
    pos = np.where(is_real, np.cumsum(is_real, axis=-1, dtype=np.int32) - 1, PADDING).astype(np.int32)
    return dataclasses.replace(joined, pos=pos)


def stack(layouts: Sequence[TokenLayout]) -> TokenLayout:
    """A batch of layouts, each padded at its end to the longest; fields are `[b, t]`."""
    longest = max(layout.num_tokens for layout in layouts)
    return jax.tree.map(lambda *rows: np.stack(rows), *[layout.pad_to(longest) for layout in layouts])
