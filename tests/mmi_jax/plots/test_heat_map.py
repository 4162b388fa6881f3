"""Heat maps: the number in every cell, and that it can be read."""

import numpy as np
import pytest

from mmi_jax.plots.heat_map import plot_heat_maps, readable_on


def test_numbers_are_white_on_dark_cells_black_on_light_ones_and_missing_where_nothing_ran():
    accuracy = np.array([[0.0, 0.5], [1.0, np.nan]])
    figure = plot_heat_maps({"ours": accuracy}, lengths=[4096, 5000], depths=[0.0, 1.0], title="a task")
    texts = {text.get_text(): text.get_color() for text in figure.axes[0].texts}
    assert texts == {"0": "white", "50": "black", "100": "white"}


@pytest.mark.parametrize(
    ("color", "expected"),
    [((0, 0, 0), "white"), ((1, 1, 1), "black"), ((0, 0, 1), "white"), ((0, 1, 0), "black"), ((1, 0, 0), "black")],
)
def test_text_has_the_colour_of_higher_contrast(color, expected):
    # contrast with white and with black, by hand: (1.05 / (L + 0.05), (L + 0.05) / 0.05); red: 4.0 and 5.3
    assert readable_on(tuple(map(float, color))) == expected
