"""Prompt: the output of a processor and the input of a model."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Float, Int32

from mmi_jax.layout import TokenLayout, stack
from pallas_kernels.notation import AnyArray
from pallas_kernels.pytree import pytree, static_field


@runtime_checkable
class LazyPatches(Protocol):
    """Patches computed on demand; `numpy.asarray` gives all of them."""

    @property
    def shape(self) -> tuple[int, int]:
        """Patches, and numbers in each."""
        ...

    def rows(self, first: np.ndarray, width: int) -> Float[jax.Array, "p c"]:
        """On the device, `width` patches from each of `first` on."""
        ...

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Float[np.ndarray, "p c"]:
        """On the host."""
        ...

    def digest_arrays(self) -> Iterator[np.ndarray]:
        """The arrays that determine all patches, in fewer bytes than these."""
        ...


@pytree
class Prompt:
    """A batch of prompts, right-padded, with the patches of all their images and videos.

    Fields:
        tokens: token ids; any id in padding.
        rope_pos: rotary position on the axes time, height, width; any value in padding.
        layout: what each token is, fields `[b, t]`; modality -1 marks padding.
        patches: one row per patch, the flattened (channel, temporal, height, width) pixels of it, in order of
            appearance over the batch: image or video, frame, merged block row and column, row and column in the block.
        grids: (frames, rows, columns) in patches of every image and video, in order of appearance; an image is a
            grid of one frame, and "frame" means a temporal patch (two video frames).
    """

    tokens: Int32[AnyArray, "b t"]
    rope_pos: Int32[AnyArray, "3 b t"]
    layout: TokenLayout
    patches: Float[AnyArray, "p c"] | LazyPatches
    grids: tuple[tuple[int, int, int], ...] = static_field()

    @staticmethod
    def batch(prompts: "Sequence[Prompt]") -> "Prompt":
        """Several prompts, or batches, as one batch, host arrays, each padded at its end to the longest."""
        longest = max(prompt.tokens.shape[1] for prompt in prompts)
        padded = [prompt.padded_to(longest) for prompt in prompts]
        return Prompt(
            tokens=np.concatenate([p.tokens for p in padded]),
            rope_pos=np.concatenate([p.rope_pos for p in padded], axis=1),
            layout=jax.tree.map(lambda *rows: np.concatenate(rows), *[p.layout for p in padded]),
            patches=np.concatenate([np.asarray(p.patches) for p in padded]),
            grids=sum((p.grids for p in padded), ()),
        )

    def padded_to(self, num_tokens: int) -> "Prompt":
        """The prompt with padding appended up to `num_tokens`, host arrays."""
        width = num_tokens - self.tokens.shape[1]
        return dataclasses.replace(
            self,
            tokens=np.pad(np.asarray(self.tokens), [(0, 0), (0, width)]),
            rope_pos=np.pad(np.asarray(self.rope_pos), [(0, 0), (0, 0), (0, width)]),
            layout=jax.tree.map(np.asarray, self.layout.pad_to(num_tokens)),
        )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TokenizedPrompt:
    """One prompt without padding and patches; fields as of `Prompt`."""

    tokens: Int32[np.ndarray, " t"]
    rope_pos: Int32[np.ndarray, "3 t"]
    layout: TokenLayout
    grids: tuple[tuple[int, int, int], ...]


def collate(prompts: Sequence[TokenizedPrompt], patches: Float[AnyArray, "p c"] | LazyPatches) -> Prompt:
    """The prompts as one batch, padded at their end to the longest; token and position 0 in padding, modality -1.

    Args:
        prompts: one per row of the batch.
        patches: of all their images and videos, in order.
    """
    longest = max(len(prompt.tokens) for prompt in prompts)
    pads = [longest - len(prompt.tokens) for prompt in prompts]
    return Prompt(
        tokens=np.stack([np.pad(prompt.tokens, (0, pad)) for prompt, pad in zip(prompts, pads, strict=True)]),
        rope_pos=np.stack(
            [np.pad(prompt.rope_pos, ((0, 0), (0, pad))) for prompt, pad in zip(prompts, pads, strict=True)], axis=1
        ),
        layout=stack([prompt.layout for prompt in prompts]),
        patches=patches,
        grids=tuple(grid for prompt in prompts for grid in prompt.grids),
    )
