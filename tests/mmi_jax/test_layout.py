"""TokenLayout and the functions that make one."""

import dataclasses

import numpy as np
import pytest

from mmi_jax.layout import concatenate, stack, text_tokens, vision_tokens

EXAMPLE = concatenate([text_tokens(2), vision_tokens(2, 1, 2), text_tokens(1)]).pad_to(8)


def test_the_docstrings_example():
    fields = {field.name: np.asarray(getattr(EXAMPLE, field.name)).tolist() for field in dataclasses.fields(EXAMPLE)}
    assert fields == {
        "modality": [0, 0, 1, 1, 1, 1, 0, -1],
        "video": [-1, -1, 0, 0, 0, 0, -1, -1],
        "frame": [-1, -1, 0, 0, 1, 1, -1, -1],
        "row": [-1, -1, 0, 0, 0, 0, -1, -1],
        "column": [-1, -1, 0, 1, 0, 1, -1, -1],
        "pos": [0, 1, 2, 3, 4, 5, 6, -1],
    }
    assert EXAMPLE.num_tokens == 8 and np.asarray(EXAMPLE.is_real).sum() == 7


def test_frames_and_videos_count_on():
    layout = concatenate([vision_tokens(1, 1, 1), text_tokens(1), vision_tokens(2, 1, 1, frame=1, video=3)])
    assert layout.frame.tolist() == [0, -1, 1, 2] and layout.video.tolist() == [0, -1, 3, 3]


def test_positions_skip_padding_inside_a_prompt():
    assert concatenate([text_tokens(1), text_tokens(0).pad_to(2), text_tokens(2)]).pos.tolist() == [0, -1, -1, 1, 2]


def test_a_window_is_a_slice():
    assert np.asarray(EXAMPLE.window(2, 3).pos).tolist() == [2, 3, 4]


def test_a_stack_pads_to_the_longest():
    batch = stack([text_tokens(3), text_tokens(1)])
    assert batch.pos.tolist() == [[0, 1, 2], [0, -1, -1]] and batch.modality.tolist() == [[0, 0, 0], [0, -1, -1]]


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="cannot be padded to fewer tokens: num_tokens=7, it has 8"):
        EXAMPLE.pad_to(7)
    with pytest.raises(ValueError, match="needs at least one layout, got none"):
        concatenate([])
