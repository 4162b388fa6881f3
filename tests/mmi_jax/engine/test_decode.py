"""decode against repeated forward passes, sampling against probabilities by hand, and what is refused."""

from typing import Any

import jax
import numpy as np
import pytest
from closeness import assert_same_up_to_order, model_terms

from mmi_jax import decode, decode_with_cache, prefill
from mmi_jax.engine.decoding import decode_step
from models.testing import BLOCKS, BUCKETS, STATIC, TINY_CONFIG, batch, extend, last_logits, prompt, tiny_model

run_block: Any = decode_step.run_block
PROMPTS = (prompt(1, 4, (2, 3, 3), 6), prompt(2, 3, (1, 2, 2), 5, (3, 2, 4), 12), prompt(3, 25))


def prefilled(*prompts, table=None) -> Any:
    return prefill(tiny_model(), batch(*prompts), table=table, buckets=BUCKETS, blocks=BLOCKS)


def greedy_by_forward(prompts, num_tokens: int) -> np.ndarray:
    """The most likely token after each prompt, again and again, by the whole forward pass."""
    for _ in range(num_tokens):
        chosen = last_logits(tiny_model(), batch(*prompts)).argmax(axis=1)
        prompts = [extend(p, [token]) for p, token in zip(prompts, chosen, strict=True)]
    return np.concatenate([p.tokens[:, -num_tokens:] for p in prompts])


def test_greedy_decoding_equals_repeated_forward_passes():
    tokens = decode(tiny_model(), prefilled(*PROMPTS), max_new_tokens=8)
    np.testing.assert_array_equal(tokens, greedy_by_forward(PROMPTS, 8))
    assert tokens.dtype == np.int32 and tokens.shape == (3, 8)
    assert len({tuple(row) for row in tokens.tolist()}) == 3, "prompts that all answer alike show nothing"


def test_a_single_prompt_decodes_as_in_a_batch():
    together = decode(tiny_model(), prefilled(*PROMPTS), max_new_tokens=5)
    alone = decode(tiny_model(), prefilled(PROMPTS[1]), max_new_tokens=5)
    np.testing.assert_array_equal(alone[0], together[1])


def test_decoding_leaves_the_prefill_as_it_was():
    result = prefilled(*PROMPTS)
    before = np.asarray(result.cache.k)
    first = decode(tiny_model(), result, max_new_tokens=4)
    np.testing.assert_array_equal(result.cache.k, before)
    np.testing.assert_array_equal(decode(tiny_model(), result, max_new_tokens=4), first)


def test_decoding_after_a_sparse_prefill_starts_from_its_logits():
    result = prefilled(*PROMPTS, table=STATIC)
    tokens = decode(tiny_model(), result, max_new_tokens=2)
    np.testing.assert_array_equal(tokens[:, 0], np.asarray(result.logits).argmax(axis=1))


def test_a_full_cache_may_be_decoded_from():
    result = prefilled(prompt(5, 64))
    assert result.cache.capacity == 64
    roomy = prefill(tiny_model(), prompt(5, 64), buckets=BUCKETS, blocks=BLOCKS, max_new_tokens=3)
    expected = decode(tiny_model(), roomy, max_new_tokens=3)
    np.testing.assert_array_equal(decode(tiny_model(), result, max_new_tokens=3), expected)


def test_tokens_come_in_blocks_of_one_program(monkeypatch):
    """The first token, then blocks; a block's end changes nothing, and every block runs the same program."""
    result, blocks = prefilled(*PROMPTS), []
    tokens = decode(tiny_model(), result, max_new_tokens=40, on_tokens=blocks.append)
    assert [block.shape for block in blocks] == [(3, 1), (3, 16), (3, 16), (3, 7)]
    np.testing.assert_array_equal(np.concatenate(blocks, axis=1), tokens)
    run_block.clear_cache()
    monkeypatch.setattr(decode_step, "BLOCK_TOKENS", 3)
    np.testing.assert_array_equal(decode(tiny_model(), result, max_new_tokens=40), tokens)
    assert run_block._cache_size() == 1
    run_block.clear_cache()


def test_every_product_of_a_layer_reads_its_matrix_where_it_lies(monkeypatch):
    result, shapes = prefilled(*PROMPTS), []
    expected = decode(tiny_model(), result, max_new_tokens=3)
    multiply = decode_step.layer_matmul

    def recorded(x, w, layer, **kwargs):
        shapes.append((x.shape, w.shape))
        return multiply(x, w, layer, **kwargs)

    monkeypatch.setattr(decode_step, "layer_matmul", recorded)
    run_block.clear_cache()
    np.testing.assert_array_equal(decode(tiny_model(), result, max_new_tokens=3), expected)
    run_block.clear_cache()
    q, kv, out, up, down = (16, 32), (16, 16), (32, 16), (16, 24), (24, 16)
    assert shapes == [((3, w[0]), (3, *w)) for w in (q, kv, kv, out, up, up, down)]


def test_the_cache_grown_by_the_answer_is_that_of_a_prefill_of_both():
    result = prefill(tiny_model(), batch(*PROMPTS), buckets=BUCKETS, blocks=BLOCKS, max_new_tokens=8)
    ends = (int(decode(tiny_model(), result, max_new_tokens=8)[0, 2]),)
    k = result.cache.k
    tokens, grown = decode_with_cache(tiny_model(), result, max_new_tokens=8, end_tokens=ends)
    assert k.is_deleted(), "the old cache's memory was taken"
    answers = [row[: list(row).index(ends[0]) + 1] if ends[0] in row else row for row in tokens]
    in_cache = [answer[: tokens.shape[1] - 1] for answer in answers]
    assert len({len(answer) for answer in in_cache}) > 1
    expected = prefilled(*[extend(p, answer) for p, answer in zip(PROMPTS, in_cache, strict=True)]).cache
    assert grown.capacity == expected.capacity == 64
    for name in ("lengths", "next_rope_pos"):
        np.testing.assert_array_equal(getattr(grown, name), getattr(expected, name))
    jax.tree.map(np.testing.assert_array_equal, grown.layout, expected.layout)
    is_token = (np.arange(64) < np.asarray(expected.lengths)[:, None])[None, :, :, None, None]
    for name in ("k", "v"):
        ours, theirs = (np.where(is_token, getattr(cache, name), 0) for cache in (grown, expected))
        assert_same_up_to_order(ours, theirs, terms=model_terms(TINY_CONFIG, num_keys=64))


def test_a_cache_grows_as_far_as_its_capacity():
    tokens, grown = decode_with_cache(tiny_model(), prefilled(prompt(5, 60)), max_new_tokens=5)
    assert tokens.shape == (1, 5) and int(grown.lengths[0]) == grown.capacity == 64
    with pytest.raises(ValueError, match="must hold max_new_tokens=6 more: it has capacity for 5"):
        decode_with_cache(tiny_model(), prefilled(prompt(5, 60)), max_new_tokens=6)
    result = prefilled(prompt(5, 60))
    tokens, grown = decode_with_cache(tiny_model(), result, max_new_tokens=0)
    assert tokens.shape == (1, 0) and grown is result.cache


def test_rows_repeat_their_end_token_until_all_have_ended():
    result = prefilled(*PROMPTS)
    free = decode(tiny_model(), result, max_new_tokens=8)
    ends = (int(free[0, 1]),)
    stopped = decode(tiny_model(), result, max_new_tokens=8, end_tokens=ends)
    for row, expected in zip(stopped, free, strict=True):
        place = np.flatnonzero(expected == ends[0])
        length = place[0] + 1 if len(place) else len(expected)
        np.testing.assert_array_equal(row[:length], expected[: len(row)][:length])
        assert (row[length:] == ends[0]).all()
    every = tuple(set(free[:, 0].tolist()))
    assert decode(tiny_model(), result, max_new_tokens=8, end_tokens=every).shape == (3, 1)


def test_no_tokens():
    assert decode(tiny_model(), prefilled(*PROMPTS), max_new_tokens=0).shape == (3, 0)


# Sampling.


def draws(result, number: int, **kwargs) -> np.ndarray:
    keys = jax.random.split(jax.random.key(3), number)
    return np.concatenate([decode(tiny_model(), result, max_new_tokens=1, rng=key, **kwargs) for key in keys], axis=1)


def test_one_key_gives_one_answer():
    result = prefilled(*PROMPTS)
    sample = [
        decode(tiny_model(), result, max_new_tokens=6, temperature=1.5, rng=jax.random.key(seed)) for seed in (7, 7, 8)
    ]
    np.testing.assert_array_equal(sample[0], sample[1])
    assert (sample[0] != sample[2]).any()
    assert len(set(sample[0][0].tolist())) > 1, "each step must have a different random key"


def test_samples_follow_the_probabilities():
    result = prefilled(*PROMPTS)
    expected = np.asarray(jax.nn.softmax(result.logits / 1.5, axis=1))
    tokens = draws(result, 400, temperature=1.5)
    for row, p in zip(tokens, expected, strict=True):
        fraction = np.bincount(row, minlength=40) / len(row)
        assert (np.abs(fraction - p) < 4.5 * np.sqrt(p * (1 - p) / len(row)) + 1e-3).all()


def test_top_p_samples_only_the_fewest_tokens_that_hold_it():
    result = prefilled(*PROMPTS)
    tokens = draws(result, 300, temperature=6.0, top_p=0.5)
    for row, logits in zip(tokens, np.asarray(result.logits, np.float64), strict=True):
        p = np.exp(logits / 6.0) / np.exp(logits / 6.0).sum()
        order = np.argsort(-p)
        nucleus = order[: np.searchsorted(np.cumsum(p[order]), 0.5) + 1].tolist()
        assert 1 < len(nucleus) < 20
        assert {token for token in nucleus if p[token] > 0.03} <= set(row.tolist()) <= set(nucleus)


def test_another_temperature_or_top_p_compiles_nothing():
    result = prefilled(*PROMPTS)
    run_block.clear_cache()
    for temperature, top_p in ((0.5, 0.9), (0.7, 0.8)):
        decode(tiny_model(), result, max_new_tokens=2, temperature=temperature, top_p=top_p, rng=jax.random.key(0))
    assert run_block._cache_size() == 1


def test_a_tiny_top_p_or_temperature_is_greedy():
    result = prefilled(*PROMPTS)
    greedy = decode(tiny_model(), result, max_new_tokens=4)
    for temperature, top_p in ((2.0, 1e-6), (1e-4, 1.0)):
        sampled = decode(
            tiny_model(), result, max_new_tokens=4, temperature=temperature, top_p=top_p, rng=jax.random.key(0)
        )
        np.testing.assert_array_equal(sampled, greedy)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(temperature=-1.0, rng=jax.random.key(0)), "temperature=-1.0"),
        (dict(temperature=1.0), "an rng: got temperature=1.0, top_p=1.0, rng=None"),
        (dict(top_p=0.0), "top_p=0.0"),
        (dict(top_p=1.5), "top_p=1.5"),
    ],
)
def test_sampling_that_cannot_be_done_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=f"sampling needs.*{message}"):
        decode(tiny_model(), prefilled(*PROMPTS), max_new_tokens=1, **kwargs)


def test_a_negative_number_of_tokens_is_refused():
    with pytest.raises(ValueError, match="at least 0, got max_new_tokens=-1"):
        decode(tiny_model(), prefilled(*PROMPTS), max_new_tokens=-1)
