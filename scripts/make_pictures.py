"""Draws docs/mask.png: a Grid head on a small video prompt, before and after permutation.

Run `python scripts/make_pictures.py` from the root of the repository.
"""

from pathlib import Path

import jax
import jax.numpy as jnp

from mmi_jax import Blocks, Grid
from mmi_jax.bench.synthetic import GRID_SLASH, planted_qkv
from mmi_jax.layout import concatenate, text_tokens, vision_tokens
from mmi_jax.method.plan import plan_heads, prompt_geometry
from mmi_jax.method.token_groups import FramePlace
from mmi_jax.plots.table_plots import plot_mask

HEAD_DIM = 64


def main() -> None:
    """Writes the picture."""
    # 16 frames, so that one place in all frames fills one kv block of 16 tokens, as 128 frames fill one of 128.
    layout = jax.tree.map(jnp.asarray, concatenate([text_tokens(16), vision_tokens(16, 4, 6), text_tokens(32)]))
    pattern = Grid(strides=(FramePlace(),), use_slash=True, local=24, sink=16)
    blocks = Blocks(q=16, kv=16)
    q, k, _ = planted_qkv(layout, (GRID_SLASH,), num_kv_heads=1, head_dim=HEAD_DIM, dtype="float32")
    geometry = prompt_geometry(layout, [pattern], num_queries=layout.num_tokens, q_start=jnp.int32(0), blocks=blocks)
    plan = plan_heads([pattern], q, k, geometry, scale=HEAD_DIM**-0.5, blocks=blocks)
    title = "A Grid head over text, a video of 16 frames of 4 x 6 tokens, and text"
    plot_mask(plan, 0, layout, title=title).savefig(Path(__file__).parent.parent / "docs" / "mask.png")


if __name__ == "__main__":
    main()
