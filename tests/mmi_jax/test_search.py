"""The search: what a trial measures, that planted heads get their patterns, and that a kill changes nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mmi_jax import AShape, Boundary2D, Dense, Grid, QBoundary, TriShape, VerticalSlash
from mmi_jax.attention import attend_sparsely, batch_geometry, plan_batch
from mmi_jax.blocks import Blocks
from mmi_jax.keys import FramePlace
from mmi_jax.layout import concatenate, text_tokens, vision_tokens
from mmi_jax.planted import LOCAL, HeadStructure, planted_qkv, video_prompt
from mmi_jax.search import Candidates, Journal, Search, TargetDensity, best_choice
from mmi_jax.search.capture import Captured, captured_layers
from mmi_jax.search.costs import DENSITY, TILES
from mmi_jax.search.measure import Measured, Meter, measured
from mmi_jax.search.scores import Choice, Scores
from mmi_jax.search.trials import DENSE, Trial, first_trials, of_queries, trial_of

SMALL = Blocks(q=16, kv=16, granule=16)


@pytest.fixture(scope="module", autouse=True)
def quick_to_compile():
    """Trials are compiled far more often than run here: nothing but time depends on the compiler's optimisations."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def captured(layout, q, k, v, blocks=SMALL) -> Captured:
    """Attention of one example with its dense output."""
    q, k, v, layout = jax.tree.map(lambda x: jnp.asarray(x)[None], (q, k, v, layout))
    out = attend_sparsely(q, k, v, Dense(), layout=layout, blocks=blocks).out
    return Captured(q=q, k=k, v=v, out=out, layout=layout)


@pytest.fixture(scope="module")
def mixed() -> Captured:
    """96 tokens of text and video, 4 query heads on 2 kv heads."""
    rng = np.random.default_rng(0)
    layout = concatenate([text_tokens(20), vision_tokens(4, 3, 4), text_tokens(28)])
    q, k, v = (rng.normal(size=(96, heads, 8)).astype(np.float32) * 2 for heads in (4, 2, 2))
    return captured(layout, q, k, v)


def test_a_trial_measures_the_error_on_the_output_and_the_tiles(mixed):
    """Against softmax attention through the plan's own 0/1 mask."""
    pattern = Boundary2D({(1, 1): AShape(sink=16, local=4), (0, 1): AShape(sink=16, local=8)})
    found = measured(pattern, mixed, modalities=(0, 1), blocks=SMALL)
    geometry = batch_geometry(mixed.layout, (pattern,) * 4, batch=1, num_queries=96, q_start=0, blocks=SMALL)
    plan = jax.tree.map(lambda x: x[0], plan_batch((pattern,) * 4, mixed.q, mixed.k, geometry, scale=1.0, blocks=SMALL))
    mask = np.asarray(plan.to_mask())
    q, k, v = (np.asarray(x[0], np.float64) for x in (mixed.q, mixed.k, mixed.v))
    sparse, dense = (attention(q, k, v, m) for m in (mask, np.tril(np.ones((96, 96), bool))[None]))
    modality = np.asarray(mixed.layout.modality[0])
    for n in (0, 1):
        rows = modality == n
        expected = np.square(sparse - dense)[rows].sum(axis=(0, 2)) / np.square(dense)[rows].sum(axis=(0, 2))
        np.testing.assert_allclose(found.error[n], expected, rtol=1e-4)
    np.testing.assert_allclose(np.sum(found.tiles, axis=0), plan.index.visited_tiles(), rtol=1e-6)
    assert expected.min() > 0


def attention(q, k, v, mask):
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = np.einsum("thd,shd->hts", q, k) * q.shape[2] ** -0.5
    weights = np.where(mask, np.exp(scores - scores.max()), 0)
    return np.einsum("hts,shd->thd", weights / weights.sum(axis=2, keepdims=True), v)


def test_a_q_boundary_head_is_the_sum_of_its_modalities_trials(mixed):
    """Errors and tiles, so that no combination of two patterns has to be run."""
    inner = {0: TriShape(sink=16, local=8, last=4), 1: AShape(sink=16, local=4)}
    whole = measured(QBoundary(inner), mixed, modalities=(0, 1), blocks=SMALL)
    meter = Meter((0, 1), SMALL)
    for n, pattern in inner.items():
        one = meter(of_queries(pattern), mixed)
        np.testing.assert_allclose(one.error[n], whole.error[n], rtol=1e-5)
        np.testing.assert_array_equal(one.tiles[n], whole.tiles[n])


def test_trials_are_named_and_read_back():
    candidates = Candidates(within=(AShape(), Grid()), across=(VerticalSlash(),))
    trials = first_trials(candidates, (0, 1))
    assert [trial.step for trial in trials] == ["whole"] * 3 + ["per_query"] * 3 + ["own"] * 3 + ["cross"]
    assert [trial_of(trial.key) for trial in trials] == list(trials)
    assert first_trials(candidates, (1,)) == trials[:3]
    with pytest.raises(ValueError, match="a trial must begin with one of whole, per_query"):
        trial_of("hole {}")


PLANTED = {
    "slashes": HeadStructure(local=4.0, sink=5.0, slash=11.0),
    "columns": HeadStructure(local=4.0, sink=5.0, column=11.0),
    "local": LOCAL,
}
BEST = {"slashes": Grid, "columns": VerticalSlash, "local": AShape}


def test_planted_heads_get_their_patterns():
    """A video of 32 frames of 64 tokens: with 22 % of the tiles every head keeps what was planted in it."""
    layout, blocks = video_prompt(2048, rows=8, columns=8, head_text=0, tail_text=0), Blocks(q=64, kv=64)
    q, k, v = planted_qkv(layout, tuple(PLANTED.values()), num_kv_heads=1, head_dim=64, dtype="float32", num_columns=16)
    layer = captured(layout, q, k, v, blocks)
    grid = Grid((FramePlace(),), use_hline=False, use_vline=False, use_slash=True, local=64, sink=64, tail=0)
    candidates = Candidates(within=(AShape(64, 64), VerticalSlash(96, 16, local=16), grid), across=())
    meter = Meter((1,), blocks)
    figures = {trial: meter(trial, layer) for trial in first_trials(candidates, (1,))}
    by_trial = {t: dataclasses.replace(f, error=f.error[None], tiles=f.tiles[None]) for t, f in figures.items()}
    scores = Scores(modalities=(1,), num_tokens=2048, blocks=blocks, by_trial=by_trial)
    best = best_choice(scores, TargetDensity(share=0.22), TILES)
    found = {name: type(choice.pattern) for name, choice in zip(PLANTED, best.choices[0], strict=True)}
    assert found == BEST, {t.candidate: np.round(f.error, 3).tolist() for t, f in figures.items()}
    assert np.max(best.scores.error) < 0.01


def random_scores(rng, num_layers, num_heads) -> Scores:
    """Scores of made-up trials over two modalities; dense is dearest and without error."""
    patterns = (Dense(), AShape(16, 64), TriShape(16, 64, 16), VerticalSlash(64, 64))
    trials = {t for p in patterns for t in (Trial(step="whole", candidate=p), of_queries(p))}
    joint = Trial(step="joint", candidate=Boundary2D({(1, 1): AShape(16, 32)}))
    by_trial = {}
    for trial in sorted({*trials, joint}, key=lambda t: t.key):
        error, tiles = rng.random((2, num_layers, 2, num_heads))
        is_dense = trial == DENSE
        by_trial[trial] = tiny_measured(0 * error if is_dense else error, 1 + 0 * tiles if is_dense else tiles)
    return Scores(modalities=(0, 1), num_tokens=4096, blocks=Blocks(), by_trial=by_trial)


def tiny_measured(error, tiles):
    from mmi_jax.search.measure import Measured

    return Measured(error=error, tiles=tiles)


def test_options_hold_every_kind_and_q_boundaries_of_different_patterns(rng):
    scores = random_scores(rng, 1, 1)
    options = scores.options(0, 0, DENSITY)
    assert options[0].what == Choice(pattern=Dense(), trials=(DENSE, DENSE)) and options[0].error == 0
    kinds = [type(option.what.pattern) for option in options]
    assert {QBoundary, Boundary2D, AShape, VerticalSlash} <= set(kinds)
    for option in options:
        parts = [scores.by_trial[t] for t in option.what.trials]
        assert option.error == pytest.approx(np.mean([p.error[0, n, 0] for n, p in enumerate(parts)]))
        tiles = sum(p.tiles[0, n, 0] for n, p in enumerate(parts))
        assert scores.tiles(option.what, 0, 0) == pytest.approx(tiles)


def test_excluded_patterns_are_nowhere(rng):
    scores = random_scores(rng, 1, 1)
    options = scores.options(0, 0, DENSITY, excluded=frozenset({"AShape", "Boundary2D"}))
    assert not [o for o in options if "AShape" in repr(o.what.pattern) or "Boundary2D" in repr(o.what.pattern)]
    assert "QBoundary" in repr(options)


def test_more_budget_never_means_more_error_and_all_of_it_means_dense(rng):
    scores = random_scores(rng, 3, 4)
    errors = [best_choice(scores, TargetDensity(share=share), TILES).error_on(scores) for share in (0.4, 0.6, 0.8, 1.0)]
    assert errors == sorted(errors, reverse=True) and errors[-1] == 0 and errors[0] > 0


def test_a_target_out_of_reach_names_what_can_be_reached(rng):
    with pytest.raises(ValueError, match="is out of reach on prompts of 4096 tokens: the cheapest table costs"):
        best_choice(random_scores(rng, 2, 2), TargetDensity(share=0.001), TILES)


STATIC = Candidates(within=(AShape(sink=16, local=16),), across=())
PROMPTS = {"one": tiny.prompt(1, 9, (8, 3, 4), 20), "two": tiny.prompt(2, 5, (8, 3, 4), 12)}


def search(path, on_trial=lambda *_: None) -> Search:
    return Search(
        model=tiny.tiny_model(), journal=Journal(path, {}), blocks=tiny.BLOCKS, buckets=tiny.BUCKETS, on_trial=on_trial
    )


def test_a_search_that_is_killed_anywhere_gives_the_same_table(tmp_path, rng):
    whole = search(tmp_path / "whole.jsonl")
    scores = whole.calibrate(PROMPTS, STATIC, most_joint=1)
    best = best_choice(scores, TargetDensity(share=0.75), TILES)
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
            search(path, killed).calibrate(PROMPTS, STATIC, most_joint=1)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) - int(rng.integers(0, 9))])  # a kill in the middle of a write
        resumed = search(path)
        assert len(resumed.journal.rows) < len(whole.journal.rows)
        again = best_choice(resumed.calibrate(PROMPTS, STATIC, most_joint=1), TargetDensity(share=0.75), TILES)
        assert again == best
        assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_what_is_in_the_journal_is_not_run_again(tmp_path):
    search(tmp_path / "work.jsonl").calibrate(PROMPTS, STATIC, most_joint=1)
    again = search(tmp_path / "work.jsonl", lambda done, total, what: pytest.fail("a trial ran again"))
    again.calibrate(PROMPTS, STATIC, most_joint=1)


def test_an_error_that_is_no_number_ends_the_search_and_is_not_kept(tmp_path, monkeypatch):
    nan = Measured(error=np.full((2, 4), np.nan), tiles=np.ones((2, 4)))
    monkeypatch.setattr(Meter, "__call__", lambda self, trial, captured: nan)
    with pytest.raises(
        ValueError, match=r"errors of trials must be finite.*heads \[0, 1, 2, 3\] of whole .*layer 0 of"
    ):
        search(tmp_path / "work.jsonl").calibrate(PROMPTS, STATIC)
    assert not Journal(tmp_path / "work.jsonl", {}).rows


def test_held_out_prompts_are_measured_with_the_tables_own_trials(tmp_path):
    run = search(tmp_path / "work.jsonl")
    scores = run.calibrate(PROMPTS, STATIC, most_joint=1)
    best = best_choice(scores, TargetDensity(share=0.75), TILES)
    other = {"other": tiny.prompt(3, 9, (8, 3, 4), 20)}
    run.measure(other, best.trials, "held-out prompts")
    error = best.error_on(run.scores(other, best.trials))
    assert error > 0 and error != best.error_on(scores)


def test_captured_layers_continue_with_the_dense_output():
    """The last layer's q, k, v are those of the model's own dense forward pass."""
    prompt, seen = PROMPTS["one"], []
    *_, last = captured_layers(tiny.tiny_model(), prompt, blocks=tiny.BLOCKS, buckets=tiny.BUCKETS)
    model = tiny.tiny_model()

    def attend(q, k, v):
        t = q.shape[1]
        out = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        seen.append((q, k, v, out, t))
        return out, None

    x, rotary = model.embed(prompt), model.rotary(prompt.rope_pos)
    from flax import nnx

    graphdef, state = nnx.split(model.layers)
    for n in range(model.config.num_layers):
        x, _ = nnx.merge(graphdef, jax.tree.map(lambda a, n=n: a[n], state))(x, rotary, attend)
    *expected, t = seen[-1]
    for name, value in zip(("q", "k", "v", "out"), expected, strict=True):
        np.testing.assert_allclose(getattr(last, name)[:, :t], value, atol=2e-5)


def test_prompts_of_different_modalities_are_refused(tmp_path):
    with pytest.raises(ValueError, match="all of the same modalities: got"):
        search(tmp_path / "work.jsonl").calibrate(PROMPTS | {"text": tiny.prompt(4, 30)}, STATIC)
