"""Pictures against the masks they show."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb

from mmi_jax import AShape, Blocks, Dense, Grid, PatternTable, SwinWindow, TokenLayout, VerticalSlash
from mmi_jax.bench.synthetic import GRID_SLASH, VERTICAL_SLASH, synthetic_qkv
from mmi_jax.engine.reporting.report import PrefillReport
from mmi_jax.layout import concatenate, text_tokens, vision_tokens
from mmi_jax.method.plan import Plan, plan_heads, prompt_geometry
from mmi_jax.method.token_groups import FramePlace
from mmi_jax.plots import mask_figure, table_plots
from mmi_jax.plots.mask_plot import plot_mask
from mmi_jax.plots.mask_raster import GATHERED, KEYS, REGROUPED, mask_image, rasterize

BLOCKS = Blocks(q=32, kv=16)
PATTERNS = (
    Grid(strides=(FramePlace(),), use_slash=True, local=24, sink=16),
    VerticalSlash(vertical=32, slash=32, local=16),
    SwinWindow(frames=4, rows=2, columns=2, sink=16),
    Dense(),
)


@pytest.fixture(scope="module")
def layout() -> TokenLayout:
    """Text, a video, text, and some padding."""
    prompt = concatenate([text_tokens(19), vision_tokens(7, 4, 5), text_tokens(21)])
    return jax.tree.map(jnp.asarray, prompt.pad_to(200))


@pytest.fixture(scope="module")
def plan(layout) -> Plan:
    """One head of each pattern."""
    q, k, _ = synthetic_qkv(
        layout, (GRID_SLASH, VERTICAL_SLASH, GRID_SLASH, GRID_SLASH), num_kv_heads=2, head_dim=64, dtype="float32"
    )

    @jax.jit
    def run(q, k):
        geometry = prompt_geometry(layout, PATTERNS, num_queries=200, q_start=jnp.int32(0), blocks=BLOCKS)
        return plan_heads(PATTERNS, q, k, geometry, scale=0.125, blocks=BLOCKS)

    return run(q, k)


@pytest.mark.parametrize("head", range(len(PATTERNS)))
def test_prompt_order_shows_exactly_the_mask_and_permuted_order_the_same_pairs(plan, head):
    raster = rasterize(plan, head)
    mask = np.asarray(plan.to_mask())[head, :180, :180]
    np.testing.assert_array_equal(raster.images.attended.sum(axis=0), mask)
    assert raster.images.kept.sum() == mask.sum()
    assert (raster.images.kept <= raster.images.computed).all()
    tile = BLOCKS.q * BLOCKS.kv
    assert raster.images.computed.sum() == float(plan.index.visited_tiles()[head]) * tile


def test_segments_are_the_views_that_a_head_visits(plan):
    names = [[segment.name for segment in rasterize(plan, head).kv_segments] for head in range(4)]
    assert names == [[KEYS, REGROUPED], [KEYS, GATHERED], [KEYS, REGROUPED], [KEYS]]
    assert [len(rasterize(plan, head).q_segments) for head in range(4)] == [2, 1, 1, 1]


def test_a_gap_moves_segments_apart_and_changes_nothing_else(plan):
    near, far = rasterize(plan, 0), rasterize(plan, 0, gap=5)
    assert far.images.kept.shape == tuple(n + 5 for n in near.images.kept.shape)
    assert far.images.kept.sum() == near.images.kept.sum()
    assert not far.images.computed[:, far.kv_segments[1].pixel - 5 : far.kv_segments[1].pixel].any()


@pytest.mark.parametrize(("max_pixels", "per_pixel"), [(60, 3), (23, 8)])
def test_tokens_of_a_long_prompt_are_averaged_in_pixels(plan, max_pixels, per_pixel):
    raster = rasterize(plan, 3, max_pixels=max_pixels)  # dense: half of all pairs
    assert raster.tokens_per_pixel == per_pixel
    assert max(raster.images.attended.shape) <= max_pixels
    image = raster.images.attended.sum(axis=0)
    below, above = np.tril(np.ones_like(image), -1) > 0, np.triu(np.ones_like(image), 1) > 0
    inside = np.ones_like(image, bool)
    inside[-1] = False  # the last pixel row may hold fewer queries than the others
    assert (image[below & inside] == 1).all()
    assert not image[above].any()


def test_patterns_are_drawn_in_the_colour_that_the_legend_gives_them():
    table = PatternTable(layers=((Dense(), AShape()), (AShape(), AShape()), (Dense(), Grid())))
    figure = table_plots.plot_patterns(table)
    (mesh,) = figure.axes[0].collections
    cells = np.asarray(mesh.get_array()).reshape(3, 2)
    np.testing.assert_array_equal(cells, [[0, 1], [1, 1], [0, 2]])
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["Dense()", "AShape()", "Grid()"]
    patches = figure.legends[0].get_patches()
    assert [to_hex(patch.get_facecolor()) for patch in patches] == list(table_plots.COLORS[:3])


def test_a_table_of_many_patterns_has_a_colour_for_each_and_a_short_legend():
    table = PatternTable(layers=(tuple(AShape(local=n) for n in range(1, 41)),))
    figure = table_plots.plot_patterns(table)
    (mesh,) = figure.axes[0].collections
    _draw(figure)
    assert len(np.unique(np.asarray(mesh.get_facecolor()), axis=0)) == 40
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(labels) == table_plots.MAX_LEGEND and labels[-1] == "and 17 more"


def test_density_and_recall_are_drawn_by_layer():
    table = PatternTable(layers=((Dense(), AShape()), (AShape(), AShape())))
    report = PrefillReport(
        tokens={"text": 4},
        lengths=(4,),
        padded_tokens=4,
        seconds={},
        table=table,
        density=np.array([[1.0, 0.5], [0.2, 0.4]]),
        recall=np.array([[1.0, 0.8], [0.9, 0.7]]),
    )
    lines = table_plots.plot_density(report).axes[0].get_lines()
    assert {line.get_label(): line.get_ydata().tolist() for line in lines} == {  # pyright: ignore
        "density": pytest.approx([0.75, 0.3]),
        "estimated recall": pytest.approx([0.9, 0.8]),
    }
    unmeasured = dataclasses.replace(report, recall=np.full((2, 2), np.nan))
    assert len(table_plots.plot_density(unmeasured).axes[0].get_lines()) == 1


@pytest.mark.parametrize("head", [0, 1])
def test_mask_pictures_have_both_sides_and_name_the_prompt_spans(plan, layout, head):
    figure = plot_mask(plan, head, layout, title="a head")
    before, after = (axes.get_images()[0].get_array() for axes in figure.axes)
    assert before is not None and before.shape[:2] == (180, 180)
    attended = np.asarray(plan.to_mask())[head, :180, :180]
    is_causal = np.tril(np.ones((180, 180), bool))
    assert (before[~is_causal] == to_rgb(mask_figure.OUTSIDE_COLOR)).all()
    skipped = np.isclose(before, to_rgb(mask_figure.SKIPPED_COLOR)).all(axis=-1)
    np.testing.assert_array_equal(skipped, is_causal & ~attended)
    assert after is not None and after.shape[:2] == rasterize(plan, head, gap=10).images.kept.shape
    names = {text.get_text() for text in figure.axes[0].texts}
    assert {"text", "video"} <= names
    pixels = _draw(figure)
    assert pixels.shape[1] > 1000 and len(np.unique(pixels.reshape(-1, 4), axis=0)) > 10


@pytest.mark.parametrize("with_heads", [True, False])
def test_a_mask_is_drawn_as_its_plan_in_prompt_order(plan, layout, with_heads):
    mask = np.asarray(plan.to_mask())
    figure = plot_mask(mask, 1, layout) if with_heads else plot_mask(mask[1], layout=layout)
    (axes,) = figure.axes
    image = axes.get_images()[0].get_array()
    assert image is not None and image.shape[:2] == (200, 200)
    attended = np.isclose(image, to_rgb(mask_figure.KEYS_COLOR)).all(axis=-1)
    np.testing.assert_array_equal(attended, mask[1])
    assert {"text", "video"} <= {text.get_text() for text in axes.texts}
    _draw(figure)


def test_long_masks_are_averaged_in_pixels_and_missing_heads_refused(plan, rng):
    mask = rng.random((100, 150)) < 0.5
    image = mask_image(mask, max_pixels=50)
    assert image.shape == (34, 50)
    np.testing.assert_allclose(image[:33], mask[:99].reshape(33, 3, 50, 3).mean(axis=(1, 3)))
    with pytest.raises(ValueError, match="head must be one of the 4 that are given, got head=4"):
        plot_mask(plan, 4)
    with pytest.raises(ValueError, match="one of the 1 that are given"):
        plot_mask(mask, 1)


def _draw(figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())
