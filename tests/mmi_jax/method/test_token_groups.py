"""Token groups: which tokens are alike, across timestamps, several videos and shifted windows."""

import numpy as np
from cases import words

from mmi_jax.layout import concatenate, text_tokens, vision_tokens
from mmi_jax.method.token_groups import NO_GROUP, FramePlace, PositionPhase, RankPhase, RowPlace, Window3D


def groups(grouping, layout):
    return [None if x == NO_GROUP else x for x in np.asarray(grouping.of(layout)).tolist()]


TWO_FRAMES = concatenate([vision_tokens(1, 2, 2), text_tokens(1), vision_tokens(1, 2, 2, frame=1)])


def test_the_same_place_in_every_frame():
    assert groups(FramePlace(), TWO_FRAMES) == [0, 1, 2, 3, None, 0, 1, 2, 3]


def test_the_same_column_in_every_row():
    assert groups(RowPlace(), TWO_FRAMES) == [0, 1, 0, 1, None, 0, 1, 0, 1]


def test_places_agree_between_videos_of_different_width():
    layout = concatenate([vision_tokens(1, 2, 3), vision_tokens(1, 2, 2, video=1)])
    assert groups(FramePlace(), layout) == [0, 1, 2, 3, 4, 5, 0, 1, 3, 4]


def test_rank_among_vision_tokens():
    assert groups(RankPhase(3), words("t v v t v v - v")) == [None, 0, 1, None, 2, 0, None, 1]


def test_position_of_every_token_but_padding():
    assert groups(PositionPhase(2), words("t v - [ v v ] t")) == [0, 1, None, 0, 0, 1]


def test_windows_of_frames_rows_and_columns():
    layout = vision_tokens(2, 2, 3)
    plain, shifted = Window3D(1, 2, 2), Window3D(1, 2, 2, is_shifted=True)
    as_groups = lambda grouping: np.unique(np.asarray(grouping.of(layout)), return_inverse=True)[1].tolist()  # noqa: E731
    assert as_groups(plain) == [0, 0, 1, 0, 0, 1, 2, 2, 3, 2, 2, 3]
    assert as_groups(shifted) == [0, 1, 1, 2, 3, 3, 4, 5, 5, 6, 7, 7]


def test_windows_never_span_videos():
    layout = concatenate([text_tokens(1), vision_tokens(1, 1, 2), vision_tokens(1, 1, 2, video=1)])
    got = groups(Window3D(8, 8, 8), layout)
    assert got[0] is None and got[1] == got[2] != got[3] == got[4]
