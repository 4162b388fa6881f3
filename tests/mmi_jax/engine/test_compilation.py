"""One program per bucket: nothing recompiles when the video, the boundaries, the stride or the phase change."""

import jax
import numpy as np
from cases import PATTERNS, SMALL, padded_left, video_with_timestamps
from closeness import assert_same_up_to_order, attention_terms

from mmi_jax import sparse_attention
from mmi_jax.layout import TokenLayout, concatenate, text_tokens, vision_tokens

BUCKET = 112
NAMES = ("grid_slashes", "q_boundary", "boundary_2d", "swin")


def prompts() -> list[TokenLayout]:
    """Prompts of one bucket that differ in every way a user's may."""
    small, wide = vision_tokens(4, 2, 3), vision_tokens(3, 2, 7)
    layouts = [
        text_tokens(50),
        concatenate([text_tokens(3), small, text_tokens(9)]),
        concatenate([wide, text_tokens(30), small]),
        concatenate([text_tokens(20), video_with_timestamps(5, 3, 3, timestamp=2), text_tokens(1)]),
        padded_left(concatenate([small, text_tokens(2)]), 7),
    ]
    return [jax.tree.map(np.asarray, layout.pad_to(BUCKET)) for layout in layouts]


def synthetic(layout, line, rng):
    q, k = rng.normal(size=(2, 1, BUCKET, len(NAMES), 8)).astype(np.float32)
    q[..., 0], k[..., 0] = 9, line(layout)[None, :, None]
    return q, k[:, :, :2], k[:, :, 1:3]


def test_a_bucket_is_compiled_once(rng):
    num_traces = 0

    @jax.jit
    def attend(q, k, v, layout, q_start):
        nonlocal num_traces
        num_traces += 1
        patterns = [PATTERNS[name] for name in NAMES]
        return sparse_attention(q, k, v, patterns, layout=layout, q_start=q_start, blocks=SMALL)

    lines = (lambda x: x.column == 1, lambda x: (x.row == 1) & (x.column == 0), lambda x: x.column == 2)
    outs = [attend(*synthetic(layout, line, rng), layout, np.int32(0)) for layout in prompts() for line in lines]
    assert len(outs) == 15 and all(np.isfinite(np.asarray(out)).all() for out in outs)
    assert num_traces == 1 and attend._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]


def test_chunks_of_one_length_share_a_program(rng):
    num_traces = 0

    @jax.jit
    def attend(q, k, v, layout, q_start):
        nonlocal num_traces
        num_traces += 1
        return sparse_attention(q, k, v, PATTERNS["grid"], layout=layout, q_start=q_start, blocks=SMALL)

    layout = prompts()[3]
    q, k, v = synthetic(layout, lambda x: x.column == 1, rng)
    whole = np.asarray(jax.nn.dot_product_attention(q, k, v, is_causal=True))
    for start in (0, 10, 40):
        chunk = np.asarray(attend(q[:, start : start + 32], k, v, layout, np.int32(start)))
        assert chunk.shape == whole[:, :32].shape and np.isfinite(chunk).all()
        # The first query of the prompt sees itself alone, whatever the pattern.
        if start == 0:
            assert_same_up_to_order(chunk[:, 0], whole[:, 0], terms=attention_terms(1, q.shape[-1]))
    assert num_traces == 1
