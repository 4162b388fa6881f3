"""The search: what a trial measures, that synthetic heads get their patterns, and that a kill changes nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_same_up_to_order, attention_terms, model_terms, squared_error_rtol

from mmi_jax import AShape, Boundary2D, Dense, Grid, QBoundary, TriShape, VerticalSlash
from mmi_jax.bench.synthetic import LOCAL, HeadStructure, synthetic_qkv, video_prompt
from mmi_jax.engine.programs.single_layer import run_layer, split_layers
from mmi_jax.layout import concatenate, text_tokens, vision_tokens
from mmi_jax.method.dispatch import attend_sparsely
from mmi_jax.method.plan import batch_geometry, plan_batch
from mmi_jax.method.token_groups import FramePlace
from mmi_jax.search import Candidates, Journal, Search, TargetDensity, choose_patterns
from mmi_jax.search.activations import LayerActivations, layer_activations
from mmi_jax.search.costs import TILES
from mmi_jax.search.scores import Scores, metrics_by_trial
from mmi_jax.search.trials.measurement import Meter, measure_pattern
from mmi_jax.search.trials.trial import Trial, first_trials, of_queries, trial_of
from models import testing as tiny
from pallas_kernels.block_lists.block_sizes import Blocks

SMALL = Blocks(q=16, kv=16, granule=16)


@pytest.fixture(scope="module", autouse=True)
def quick_to_compile():
    """Trials are compiled far more often than run here: nothing but time depends on the compiler's optimisations."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def activations_of(layout, q, k, v, blocks=SMALL, answer_rows=()) -> LayerActivations:
    """Attention of one example with its dense output."""
    is_answer = jnp.isin(jnp.arange(len(q)), jnp.array(answer_rows, jnp.int32))[None]
    q, k, v, layout = jax.tree.map(lambda x: jnp.asarray(x)[None], (q, k, v, layout))
    out = attend_sparsely(q, k, v, Dense(), layout=layout, blocks=blocks).out
    return LayerActivations(q=q, k=k, v=v, out=out, layout=layout, is_answer=is_answer)


ANSWERS = (77, 95)
TERMS = attention_terms(96, 8)
"""Numbers added up for one output of attention in `mixed`."""


@pytest.fixture(scope="module")
def mixed() -> LayerActivations:
    """96 tokens of text and video, 4 query heads on 2 kv heads; answers are read from two tokens of the last text."""
    rng = np.random.default_rng(0)
    layout = concatenate([text_tokens(20), vision_tokens(4, 3, 4), text_tokens(28)])
    q, k, v = (rng.normal(size=(96, heads, 8)).astype(np.float32) * 2 for heads in (4, 2, 2))
    return activations_of(layout, q, k, v, answer_rows=ANSWERS)


def test_a_trial_measures_the_error_on_the_output_and_the_tiles(mixed):
    """Against softmax attention through the plan's 0/1 mask."""
    pattern = Boundary2D({(1, 1): AShape(sink=16, local=4), (0, 1): AShape(sink=16, local=8)})
    metrics = measure_pattern(pattern, mixed, modalities=(0, 1), blocks=SMALL)
    geometry = batch_geometry(mixed.layout, (pattern,) * 4, batch=1, num_queries=96, q_start=0, blocks=SMALL)
    plan = jax.tree.map(lambda x: x[0], plan_batch((pattern,) * 4, mixed.q, mixed.k, geometry, scale=1.0, blocks=SMALL))
    mask = np.asarray(plan.to_mask())
    q, k, v = (np.asarray(x[0], np.float64) for x in (mixed.q, mixed.k, mixed.v))
    sparse, dense = (attention(q, k, v, m) for m in (mask, np.tril(np.ones((96, 96), bool))[None]))
    modality = np.asarray(mixed.layout.modality[0])
    for n in (0, 1):
        rows = modality == n
        expected = np.square(sparse - dense)[rows].sum(axis=(0, 2)) / np.square(dense)[rows].sum(axis=(0, 2))
        np.testing.assert_allclose(metrics.error[n], expected, rtol=squared_error_rtol(expected, TERMS))
        if n == 1:  # no answer is read from the video
            np.testing.assert_array_equal(metrics.answer_error[n], metrics.error[n])
    answers = list(ANSWERS)
    expected_answers = np.square(sparse - dense)[answers].sum(axis=(0, 2)) / np.square(dense)[answers].sum(axis=(0, 2))
    np.testing.assert_allclose(
        metrics.answer_error[0], expected_answers, rtol=squared_error_rtol(expected_answers, TERMS)
    )
    assert not np.allclose(metrics.answer_error[0], metrics.error[0], rtol=0.1)
    np.testing.assert_allclose(np.sum(metrics.tiles, axis=0), plan.index.visited_tiles(), rtol=1e-6)
    assert expected.min() > 0


def attention(q, k, v, mask):
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = np.einsum("thd,shd->hts", q, k) * q.shape[2] ** -0.5
    weights = np.where(mask, np.exp(scores - scores.max()), 0)
    return np.einsum("hts,shd->thd", weights / weights.sum(axis=2, keepdims=True), v)


def test_a_q_boundary_head_is_the_sum_of_its_modalities_trials(mixed):
    """Errors and tiles, so that no combination of two patterns has to be run."""
    inner = {0: TriShape(sink=16, local=8, last=4), 1: AShape(sink=16, local=4)}
    whole = measure_pattern(QBoundary(inner), mixed, modalities=(0, 1), blocks=SMALL)
    meter = Meter((0, 1), SMALL)
    for n, pattern in inner.items():
        part = meter(of_queries(pattern), mixed)
        np.testing.assert_allclose(part.error[n], whole.error[n], rtol=squared_error_rtol(whole.error[n], TERMS))
        np.testing.assert_array_equal(part.tiles[n], whole.tiles[n])


def test_trials_are_named_and_read_back():
    candidates = Candidates(within=(AShape(), Grid()), across=(VerticalSlash(),))
    trials = first_trials(candidates, (0, 1))
    assert [trial.step for trial in trials] == ["whole"] * 3 + ["per_query"] * 3 + ["own"] * 3 + ["cross"]
    assert [trial_of(trial.key) for trial in trials] == list(trials)
    assert first_trials(candidates, (1,)) == trials[:3]
    with pytest.raises(ValueError, match="a trial must begin with one of whole, per_query"):
        trial_of("hole {}")


STRUCTURES = {
    "slashes": HeadStructure(local=4.0, sink=5.0, slash=11.0),
    "columns": HeadStructure(local=4.0, sink=5.0, column=11.0),
    "local": LOCAL,
}
BEST = {"slashes": Grid, "columns": VerticalSlash, "local": AShape}


@pytest.mark.slow
def test_synthetic_heads_get_their_patterns():
    """A video of 32 frames of 64 tokens: with 22 % of the tiles every head keeps its structure."""
    layout, blocks = video_prompt(2048, rows=8, columns=8, head_text=0, tail_text=0), Blocks(q=64, kv=64)
    q, k, v = synthetic_qkv(
        layout, tuple(STRUCTURES.values()), num_kv_heads=1, head_dim=64, dtype="float32", num_columns=16
    )
    layer = activations_of(layout, q, k, v, blocks)
    grid = Grid((FramePlace(),), use_hline=False, use_vline=False, use_slash=True, local=64, sink=64, tail=0)
    candidates = Candidates(within=(AShape(64, 64), VerticalSlash(96, 16, local=16), grid), across=())
    meter = Meter((1,), blocks)
    figures = {trial: meter(trial, layer) for trial in first_trials(candidates, (1,))}
    by_trial = {t: jax.tree.map(lambda x: x[None, None], figure) for t, figure in figures.items()}
    scores = Scores(modalities=(1,), lengths={"video": 2048}, blocks=blocks, by_trial=by_trial)
    best = choose_patterns(scores, TargetDensity(fraction=0.22), TILES)
    patterns = {name: type(choice.pattern) for name, choice in zip(STRUCTURES, best.choices[0], strict=True)}
    assert patterns == BEST, {t.candidate: np.round(f.error, 3).tolist() for t, f in figures.items()}
    assert np.max(best.scores.error) < 0.01


STATIC = Candidates(within=(AShape(sink=16, local=16),), across=())
PROMPTS = {"one": tiny.prompt(1, 9, (8, 3, 4), 20), "two": tiny.prompt(2, 5, (8, 3, 4), 12)}
ROWS = {"one": (110, 126)}
"""Two has no question."""


def search(path, on_trial=lambda *_: None) -> Search:
    return Search(
        model=tiny.tiny_model(), journal=Journal(path, {}), blocks=tiny.BLOCKS, buckets=tiny.BUCKETS, on_trial=on_trial
    )


@pytest.mark.slow
def test_a_search_that_is_killed_anywhere_gives_the_same_table(tmp_path, rng):
    whole = search(tmp_path / "whole.jsonl")
    scores = whole.calibrate(PROMPTS, STATIC, max_joint_trials=1, answer_rows=ROWS)
    best = choose_patterns(scores, TargetDensity(fraction=0.75), TILES)
    assert {trial.step for trial in scores.by_trial} >= {"whole", "per_query", "own"}
    assert 0 < best.error_on(scores) < 1
    calls = []
    for kill_at in rng.integers(1, 36, 4):
        path = tmp_path / f"killed{kill_at}.jsonl"

        def killed(done, total, what, kill_at=kill_at):
            calls.append(what)
            if done == kill_at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            search(path, killed).calibrate(PROMPTS, STATIC, max_joint_trials=1, answer_rows=ROWS)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) - int(rng.integers(0, 9))])  # a kill in the middle of a write
        resumed = search(path)
        assert len(resumed.journal.entries) < len(whole.journal.entries)
        scores = resumed.calibrate(PROMPTS, STATIC, max_joint_trials=1, answer_rows=ROWS)
        assert choose_patterns(scores, TargetDensity(fraction=0.75), TILES) == best
        assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_what_is_in_the_journal_is_not_run_again(tmp_path):
    search(tmp_path / "work.jsonl").calibrate(PROMPTS, STATIC, max_joint_trials=1, answer_rows=ROWS)
    again = search(tmp_path / "work.jsonl", lambda done, total, what: pytest.fail("a trial ran again"))
    again.calibrate(PROMPTS, STATIC, max_joint_trials=1, answer_rows=ROWS)


def test_an_error_that_is_no_number_ends_the_search_and_only_what_came_before_it_is_kept(tmp_path, monkeypatch):
    measure, ran = Meter.__call__, []

    def with_nan(self, trial, activations):
        ran.append(trial.key)
        figure = measure(self, trial, activations)
        is_bad = len(ran) == len(trials) + 2  # the second layer's second
        return dataclasses.replace(figure, answer_error=np.full((2, 4), np.nan)) if is_bad else figure

    trials = first_trials(STATIC, (0, 1))
    monkeypatch.setattr(Meter, "__call__", with_nan)
    with pytest.raises(ValueError, match=r"errors of trials must be finite.*heads \[0, 1, 2, 3\] of .*layer 1 of one"):
        search(tmp_path / "work.jsonl").measure(PROMPTS, trials, "")
    kept = Journal(tmp_path / "work.jsonl", {}).entries
    assert [(row["layer"], list(row["trials"])) for row in kept] == [(0, ran[:-2]), (1, ran[-2:-1])]
    monkeypatch.setattr(Meter, "__call__", measure)
    whole = search(tmp_path / "whole.jsonl")
    whole.measure(PROMPTS, trials, "")
    resumed = search(tmp_path / "work.jsonl")
    resumed.measure(PROMPTS, trials, "")
    assert metrics_by_trial(resumed.journal.entries) == metrics_by_trial(whole.journal.entries)


def test_held_out_prompts_are_measured_with_the_trials_of_the_table(tmp_path):
    run = search(tmp_path / "work.jsonl")
    scores = run.calibrate(PROMPTS, STATIC, max_joint_trials=1, answer_rows=ROWS)
    best = choose_patterns(scores, TargetDensity(fraction=0.75), TILES)
    other = {"other": tiny.prompt(3, 9, (8, 3, 4), 20)}
    run.measure(other, best.trials, "held-out prompts")
    error = best.error_on(run.scores(other, best.trials))
    assert error > 0 and error != best.error_on(scores)


def test_captured_layers_continue_with_the_dense_output():
    """The last layer's q, k, v are those of the model's dense forward pass."""
    prompt, seen = PROMPTS["one"], []
    *_, last = layer_activations(tiny.tiny_model(), prompt, blocks=tiny.BLOCKS, buckets=tiny.BUCKETS)
    model = tiny.tiny_model()

    def attend(q, k, v):
        t = q.shape[1]
        out = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        seen.append((q, k, v, out, t))
        return out, None

    x, rotary = model.embed(prompt), model.rotary(prompt.rope_pos)
    graphdef, weights = split_layers(model)
    for n in range(model.config.num_layers):
        x, _ = run_layer(graphdef, weights(n), x, rotary, attend)
    *expected, t = seen[-1]
    for name, value in zip(("q", "k", "v", "out"), expected, strict=True):
        assert_same_up_to_order(getattr(last, name)[:, :t], value, terms=model_terms(tiny.TINY_CONFIG, num_keys=t))


def test_prompts_of_different_modalities_are_refused(tmp_path):
    with pytest.raises(ValueError, match="all of the same modalities: got"):
        search(tmp_path / "work.jsonl").calibrate(PROMPTS | {"text": tiny.prompt(4, 30)}, STATIC)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"one": (128,)}, r"answers are read from rows of the prompt: expected 0 to 126, got \[128\]"),
        ({"two": (-1, 3)}, r"expected 0 to 114, got \[-1\]"),
        ({"three": (1,)}, "answer rows must be those of one, two, got some of three"),
    ],
)
def test_answer_rows_that_no_prompt_has_are_refused_before_anything_runs(rows, message, tmp_path):
    run = search(tmp_path / "work.jsonl", lambda *_: pytest.fail("a trial ran"))
    with pytest.raises(ValueError, match=message):
        run.calibrate(PROMPTS, STATIC, answer_rows=rows)


def test_answer_rows_reach_the_measure_and_a_prompt_without_has_the_error_of_all_rows(tmp_path):
    run = search(tmp_path / "work.jsonl")
    run.measure(PROMPTS, first_trials(STATIC, (0, 1))[:2], "some", answer_rows=ROWS)
    key = Trial(step="whole", candidate=AShape(sink=16, local=16)).key
    figures = {(row["prompt"], row["layer"]): row["trials"][key] for row in run.journal.entries}
    assert len(figures) == 6
    for (name, _), metrics in figures.items():
        text, video = (np.array(metrics["answer_error"][n]) != metrics["error"][n] for n in (0, 1))
        assert not video.any() and text.all() == (name == "one") and text.any() == (name == "one")
