import jax.numpy as jnp
import numpy as np
import pytest
import qwen2_5_vl_golden as oracle

from models.qwen2_5_vl import PRESETS
from models.qwen2_5_vl.processing.placeholders import token_layout
from models.qwen2_5_vl.processing.positions import EXACT, TRANSFORMERS_4_57, TRANSFORMERS_5_23, mrope_positions
from models.qwen2_5_vl.rope import text_rotary

CONFIG = PRESETS["7b"]
IMAGE, VIDEO = CONFIG.image_token, CONFIG.video_token


def prompt(*pieces: int | tuple[int, int]) -> np.ndarray:
    """Token ids: a number is so many text tokens, a pair is (id, how many)."""
    runs = [(7, piece) if isinstance(piece, int) else piece for piece in pieces]
    return np.concatenate([np.full(count, token, np.int32) for token, count in runs])


@pytest.mark.parametrize("case", oracle.CASES)
def test_positions_of_transformers_5_23(case):
    theirs = oracle.golden(case)["positions"]
    config = oracle.model(case).config
    for i, (tokens, grids, seconds, places) in enumerate(oracle.rows(case)):
        ours = mrope_positions(tokens, grids, seconds, config, rule=TRANSFORMERS_5_23)
        np.testing.assert_array_equal(ours, theirs[:, i, places])


# Two text tokens, a video of three frames of 1 x 2 tokens, one text token. 2 time steps per second.
@pytest.mark.parametrize(
    ("rule", "seconds", "time", "after"),
    [
        (EXACT, 1.0, [2, 4, 6], 7),
        (EXACT, 0.5, [2, 3, 4], 5),
        (EXACT, 0.75, [2, 3, 5], 6),
        (EXACT, 2.5, [2, 7, 12], 13),
        (TRANSFORMERS_4_57, 1.0, [2, 4, 6], 7),
        (TRANSFORMERS_4_57, 0.5, [2, 2, 2], 4),
        (TRANSFORMERS_4_57, 2.5, [2, 6, 10], 11),
        (TRANSFORMERS_5_23, 1.0, [2, 4, 6], 4),
        (TRANSFORMERS_5_23, 0.5, [2, 3, 4], 4),
        (TRANSFORMERS_5_23, 2.5, [2, 7, 12], 4),
    ],
)
def test_positions_of_a_video_by_rule(rule, seconds, time, after):
    tokens = prompt(2, (VIDEO, 6), 1)
    expected = [
        [0, 1, *np.repeat(time, 2), after],
        [0, 1, 2, 2, 2, 2, 2, 2, after],
        [0, 1, 2, 3, 2, 3, 2, 3, after],
    ]
    np.testing.assert_array_equal(mrope_positions(tokens, [(3, 2, 4)], [seconds], CONFIG, rule=rule), expected)


@pytest.mark.parametrize("rule", [EXACT, TRANSFORMERS_4_57, TRANSFORMERS_5_23])
def test_positions_of_an_image(rule):
    """An image of 3 x 2 tokens takes up max(3, 2) positions, at one time, whatever its seconds."""
    expected = [
        [0, 1, 1, 1, 1, 1, 1, 4, 5],
        [0, 1, 1, 2, 2, 3, 3, 4, 5],
        [0, 1, 2, 1, 2, 1, 2, 4, 5],
    ]
    tokens = prompt(1, (IMAGE, 6), 2)
    np.testing.assert_array_equal(mrope_positions(tokens, [(1, 6, 4)], [0.0], CONFIG, rule=rule), expected)


def test_text_counts_up():
    np.testing.assert_array_equal(mrope_positions(prompt(4), [], [], CONFIG), [[0, 1, 2, 3]] * 3)


def test_layout_of_mixed_media():
    layout = token_layout(prompt(1, (IMAGE, 2), 1, (VIDEO, 4), 1), [(1, 4, 2), (2, 2, 4)], CONFIG)
    assert layout.modality.tolist() == [0, 1, 1, 0, 1, 1, 1, 1, 0]
    assert layout.video.tolist() == [-1, 0, 0, -1, 1, 1, 1, 1, -1]
    assert layout.frame.tolist() == [-1, 0, 0, -1, 0, 0, 1, 1, -1]
    assert layout.row.tolist() == [-1, 0, 1, -1, 0, 0, 0, 0, -1]
    assert layout.column.tolist() == [-1, 0, 0, -1, 0, 1, 0, 1, -1]
    assert layout.pos.tolist() == list(range(9))


def test_touching_images_are_told_apart():
    layout = token_layout(prompt((IMAGE, 3)), [(1, 2, 2), (1, 2, 4)], CONFIG)
    assert layout.video.tolist() == [0, 1, 1]


@pytest.mark.parametrize("function", [token_layout, lambda t, g, c: mrope_positions(t, g, [1.0] * len(g), c)])
@pytest.mark.parametrize(
    ("pieces", "grids", "message"),
    [
        ([(VIDEO, 5)], [(2, 2, 6)], "expected 6 for 1 grids .*got 5"),
        ([(IMAGE, 1)], [], "expected 0 for 0 grids .*got 1"),
        ([3], [(1, 2, 2)], "expected 1 for 1 grids .*got 0"),
        ([(VIDEO, 2), 1, (VIDEO, 4)], [(3, 2, 4)], "one unbroken run .* grid 0 grid=.3, 2, 4. needs 6 from token 0"),
        ([(VIDEO, 1), (IMAGE, 1)], [(1, 2, 4)], "one unbroken run of one id"),
        ([(IMAGE, 2)], [(2, 2, 2)], "an image has one frame: grid 0"),
        ([(IMAGE, 2)], [(1, 3, 4)], "positive multiples of merge_size=2, got grid=.1, 3, 4."),
    ],
)
def test_placeholders_must_match_the_grids(function, pieces, grids, message):
    with pytest.raises(ValueError, match=message):
        function(prompt(*pieces), grids, CONFIG)


def test_seconds_must_match_the_grids():
    with pytest.raises(ValueError, match="one number of seconds per grid"):
        mrope_positions(prompt((IMAGE, 1)), [(1, 2, 2)], [], CONFIG)
    with pytest.raises(ValueError, match="must be positive and finite, got seconds=0.0"):
        mrope_positions(prompt((VIDEO, 1)), [(1, 2, 2)], [0.0], CONFIG)


def test_each_frequency_reads_its_axis():
    """16 frequencies turn with time, 24 with the row, 24 with the column, the same 64 again in the second half."""
    for axis, (first, last) in enumerate([(0, 16), (16, 40), (40, 64)]):
        rope_pos = jnp.zeros((3, 1, 1), jnp.int32).at[axis].set(5)
        _, sin = text_rotary(rope_pos, CONFIG)
        expected = np.zeros(64, bool)
        expected[first:last] = True
        np.testing.assert_array_equal(np.asarray(sin[0, 0]) != 0.0, np.tile(expected, 2))
