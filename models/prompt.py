"""Prompt: what a processor makes and a model embeds."""

from jaxtyping import Float, Int32

from mmi_jax.layout import TokenLayout
from pallas_kernels.notation import AnyArray
from pallas_kernels.pytree import pytree, static_field


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
    patches: Float[AnyArray, "p c"]
    grids: tuple[tuple[int, int, int], ...] = static_field()
