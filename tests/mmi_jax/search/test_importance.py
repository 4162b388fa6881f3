"""What cutting a head down does to the answers: against whole prefills with one sparse head."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from closeness import model_terms, squared_error_rtol

from mmi_jax import AShape, Dense, PatternTable, prefill
from mmi_jax.cli.search.options import Calibration
from mmi_jax.cli.search.prompts import importance_prompts
from mmi_jax.search.importance import AblationEffect, ablate_heads, head_weights
from mmi_jax.search.run import Search
from mmi_jax.search.trials.journal import Journal
from models import testing as tiny
from models.small.config import small_processor

ABLATION = AShape(sink=16, local=16)
ROWS = (60, 126)


@pytest.fixture(scope="module", autouse=True)
def quick_to_compile():
    """Programs run once here: nothing but time depends on the compiler's optimisations."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def logits(pattern, layer: int, head: int) -> np.ndarray:
    """Of the answers, with one head of that pattern."""
    table = [[Dense()] * 4 for _ in range(3)]
    table[layer][head] = pattern
    result = prefill(
        tiny.tiny_model(),
        tiny.prompt(1, 9, (8, 3, 4), 20),
        table=PatternTable(layers=tuple(map(tuple, table))),
        logits_at=np.array([ROWS]),
        blocks=tiny.BLOCKS,
        buckets=tiny.BUCKETS,
        may_run_dense=False,
    )
    assert result.logits_at is not None
    logits = np.asarray(result.logits_at[0], np.float64)
    return logits - logits.mean(axis=-1, keepdims=True)


@pytest.mark.slow
def test_the_change_is_that_of_a_prefill_with_the_head_cut():
    prompt = tiny.prompt(1, 9, (8, 3, 4), 20)
    effect = ablate_heads(tiny.tiny_model(), prompt, ROWS, blocks=tiny.BLOCKS, buckets=tiny.BUCKETS, ablated=ABLATION)
    assert effect.logits.shape == effect.error.shape == (3, 4)
    assert ((effect.error > 0) & (effect.error < 2)).all()
    dense = logits(Dense(), 0, 0)
    lost = np.square(logits(ABLATION, 1, 2) - dense).sum(axis=-1)
    expected = (lost / np.square(dense).sum(axis=-1)).mean()
    assert expected > 1e-5
    terms = model_terms(tiny.TINY_CONFIG, num_keys=prompt.tokens.shape[1])
    np.testing.assert_allclose(effect.logits[1, 2], expected, rtol=squared_error_rtol(expected, terms))


def test_half_of_a_weight_is_from_the_heads_error_alone():
    """Three heads lose as much; the logits of the second change three times as much as those of the first, or none."""
    first = AblationEffect(logits=np.array([[0.1, 0.3, 0.0]]), error=np.array([[0.2, 0.2, 0.2]]))
    second = AblationEffect(logits=np.array([[0.0, 0.0, 0.2]]), error=np.array([[0.0, 0.0, 0.2]]))
    np.testing.assert_allclose(head_weights([first]), [[0.5 + 0.5 * 0.75, 0.5 + 0.5 * 2.25, 0.5]])
    gains = [0.1, 0.3, 0.2] / (np.array([0.2, 0.2, 0.4]) + 0.01 * 0.8 / 3)  # both are summed over the prompts first
    np.testing.assert_allclose(head_weights([first, second])[0], 0.5 + 0.5 * gains / gains.mean())
    rounding = AblationEffect(logits=np.array([[0.1, 0.1, 1e-7]]), error=np.array([[0.2, 0.2, 1e-9]]))
    np.testing.assert_allclose(head_weights([rounding]), [[1.25, 1.25, 0.5]], atol=0.01)
    nothing = AblationEffect(logits=np.zeros((1, 2)), error=np.zeros((1, 2)))
    np.testing.assert_array_equal(head_weights([nothing]), [[1, 1]])


def test_heads_are_weighed_once_and_a_killed_search_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("mmi_jax.search.run.ablate_heads", functools.partial(ablate_heads, ablated=ABLATION))
    prompts = {"one": tiny.prompt(1, 9, (8, 3, 4), 20), "two": tiny.prompt(2, 5, (8, 3, 4), 12)}

    def search(on_trial=lambda *_: None) -> Search:
        journal = Journal(tmp_path / "work.jsonl", {})
        return Search(
            model=tiny.tiny_model(), journal=journal, blocks=tiny.BLOCKS, buckets=tiny.BUCKETS, on_trial=on_trial
        )

    def killed(done, total, what):
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(killed).importance_weights(prompts, answer_rows={"one": ROWS})
    assert [row["prompt"] for row in search().journal.entries] == ["one"]
    weights = search().importance_weights(prompts, answer_rows={"one": ROWS})
    assert weights.mean() == pytest.approx(1) and 0.5 <= weights.min() < 0.8
    seen = []
    np.testing.assert_array_equal(
        search(lambda done, total, what: seen.append(done)).importance_weights(prompts, answer_rows={"one": ROWS}),
        weights,
    )
    assert seen == [2]
    with pytest.raises(ValueError, match="heads are ablated on prompts, got none"):
        search().importance_weights({})
    with pytest.raises(ValueError, match="one prompt at a time, got a batch of 2"):
        batch = jax.tree.map(lambda x: np.concatenate([x, x]), prompts["one"])
        ablate_heads(tiny.tiny_model(), batch, (), blocks=tiny.BLOCKS, buckets=tiny.BUCKETS)
    with pytest.raises(ValueError, match="expected 0 to 126, got \\[127\\]"):
        search().importance_weights(prompts, answer_rows={"one": (127,)})


def test_heads_are_weighed_on_short_samples_or_on_longer_ones_where_a_task_needs_them(monkeypatch):
    monkeypatch.setattr("mmi_jax.cli.search.prompts.IMPORTANCE_TOKENS", 256)
    calibration = Calibration(
        videos=(),
        held_out=(),
        text="",
        fps=2.0,
        max_frames=None,
        tasks=("v-niah", "middle"),
        tokens=1500,
        samples=3,
        held_out_samples=0,
        haystack="generated",
        seed=5,
    )
    prompts = importance_prompts(small_processor(), calibration)
    sizes = {name: prompt.tokens.shape[1] for name, prompt in prompts.by_name.items()}
    assert [name.partition(" seed")[0] for name in sizes] == ["256 tokens of v_niah"] * 2 + [
        "1024 tokens of middle_questions"
    ] * 2
    assert all(0.8 * int(name.split()[0]) < size <= int(name.split()[0]) for name, size in sizes.items())
    assert [len(rows) for rows in prompts.answer_rows.values()] == [1, 1, 4, 4]
    whole = importance_prompts(small_processor(), dataclasses.replace(calibration, tokens=256, tasks=("v-niah",)))
    assert list(whole.by_name) == ["v_niah seed 5 depth 0.25", "v_niah seed 6 depth 0.75"]
