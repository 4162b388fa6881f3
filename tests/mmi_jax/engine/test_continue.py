"""A prefill that goes on from a cache, against the whole prompt in one piece."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest
from closeness import assert_same_up_to_order, model_terms

from mmi_jax import Buckets, Grid, PrefillResult, VerticalSlash, decode
from mmi_jax import prefill as run_prefill
from mmi_jax.engine.settings.options import PrefillOptions
from mmi_jax.engine.settings.padded_lengths import PaddedLengths, PriorCache, padded_lengths
from mmi_jax.method.tables.pattern_table import uniform_table
from mmi_jax.sharding import ONE_DEVICE, Shards
from models.testing import BLOCKS, BUCKETS, STATIC, TINY_CONFIG, batch, forward, join, pad, prompt, tiny_model

TERMS = model_terms(TINY_CONFIG, num_keys=64)
"""Numbers added up for one logit of the tiny model in a bucket of 64 tokens."""

VIDEO = prompt(0, 5, (3, 2, 4))
MORE = prompt(1, (2, 2, 4), 4)
QUESTION, OTHER = prompt(2, 11), prompt(3, 7)


TWO = Buckets(smallest=64, largest=256, multiple=32)
FINE = Buckets(smallest=64, largest=256, multiple=16)
SPARSE = (Grid(local=8, sink=0, tail=4, last_q=8), VerticalSlash(4, 4, local=4, last_q=8))


def prefill(prompt, **kwargs) -> PrefillResult:
    """One bucket of 64 tokens in a cache of 128, by default: few programs serve all tests."""
    prior = kwargs.get("cache")
    prior_tokens = 0 if prior is None else int(np.max(getattr(prior, "cache", prior).lengths))
    max_new_tokens = 128 - prior_tokens - prompt.tokens.shape[1]
    settings: dict[str, Any] = dict(buckets=BUCKETS, blocks=BLOCKS, max_new_tokens=max_new_tokens) | kwargs
    return run_prefill(tiny_model(), prompt, **settings)


def assert_same(result, whole):
    """Logits and every real token's keys and values, positions and lengths."""
    assert_same_up_to_order(result.logits, whole.logits, terms=TERMS)
    assert_same_up_to_order(result.hidden, whole.hidden, terms=TERMS)
    np.testing.assert_array_equal(result.cache.lengths, whole.cache.lengths)
    np.testing.assert_array_equal(result.cache.next_rope_pos, whole.cache.next_rope_pos)
    for row, length in enumerate(np.asarray(whole.cache.lengths)):
        for mine, theirs in zip(jax.tree.leaves(result.cache.layout), jax.tree.leaves(whole.cache.layout), strict=True):
            np.testing.assert_array_equal(mine[row, :length], theirs[row, :length])
            assert (np.asarray(mine)[row, length:] == -1).all()
        for name in ("k", "v"):
            mine, theirs = (np.asarray(getattr(x.cache, name))[:, row, :length] for x in (result, whole))
            assert_same_up_to_order(mine, theirs, terms=TERMS)


@pytest.mark.parametrize("table", [None, STATIC])
def test_a_video_in_two_chunks_and_a_question_equal_one_shot(table):
    """None of the pieces fills a block."""
    first = prefill(VIDEO, table=table)
    second = prefill(MORE, table=table, cache=first)
    third = prefill(QUESTION, table=table, cache=second.cache)
    assert_same(second, prefill(join(VIDEO, MORE), table=table))
    assert_same(third, prefill(join(VIDEO, MORE, QUESTION), table=table))
    assert first.cache.k.shape == third.cache.k.shape, "the capacity sufficed"


def test_later_chunks_attend_sparsely_to_all_before():
    table = uniform_table(SPARSE[0], num_layers=3, num_heads=4)
    table = dataclasses.replace(table, layers=((SPARSE[0], SPARSE[1]) * 2,) * 3)
    first = prefill(VIDEO, table=table)
    second, everything = (prefill(prompt(4, (5, 2, 3), 20), table=t, cache=first) for t in (table, None))
    assert (second.report.recall[:, :2] < 0.99).any(axis=0).all(), "both patterns must skip something"
    assert np.abs(everything.logits - second.logits).max() > 1e-3
    np.testing.assert_array_equal(everything.cache.lengths, second.cache.lengths)


def test_one_video_serves_several_questions():
    video = prefill(VIDEO)
    before = np.asarray(video.cache.k)
    answers = [prefill(question, cache=video) for question in (QUESTION, OTHER)]
    for question, answer in zip((QUESTION, OTHER), answers, strict=True):
        assert_same(answer, prefill(join(VIDEO, question)))
    np.testing.assert_array_equal(video.cache.k, before)


@pytest.mark.parametrize("max_new_tokens", [0, 36])
def test_a_donated_cache_can_be_reclaimed(max_new_tokens):
    """Its memory is taken over, or given back where it was too small."""
    video = prefill(VIDEO, max_new_tokens=max_new_tokens)
    first = prefill(QUESTION, cache=video, donates_cache=True)
    assert video.cache.k.is_deleted() and video.cache.v.is_deleted()
    assert_same(first, prefill(join(VIDEO, QUESTION)))
    second = prefill(OTHER, cache=video.cache.reclaim(first.cache), donates_cache=True)
    assert_same(second, prefill(join(VIDEO, OTHER)))
    if max_new_tokens == 0:
        with pytest.raises(ValueError, match=r"these prompts and more: this is \(1, 128\), got one of \(1, 64\)"):
            second.cache.reclaim(video.cache)


def test_chunks_batches_and_logits_anywhere():
    """Two prompts of equal length go on with different ones, in chunks."""
    starts = prompt(5, (2, 2, 3), 9), prompt(6, 23)  # two of the first one's tokens begin and end its video
    rests = prompt(7, 3, (3, 2, 4), 8), prompt(8, 20)
    first = prefill(batch(*starts))
    at = np.array([[0, 36], [19, 2]])
    second = prefill(batch(*rests), cache=first, chunk_tokens=16, logits_at=at)
    wholes = [join(a, b) for a, b in zip(starts, rests, strict=True)]
    assert_same(second, prefill(batch(*wholes)))
    everywhere = np.asarray(forward(tiny_model(), pad(batch(*wholes), 64)))
    assert second.logits_at is not None
    assert_same_up_to_order(second.logits_at, everywhere[np.arange(2)[:, None], 23 + at], terms=TERMS)


def test_decoding_goes_on_after_a_continued_prompt():
    continued = prefill(QUESTION, cache=prefill(VIDEO))
    whole = prefill(join(VIDEO, QUESTION))
    np.testing.assert_array_equal(
        decode(tiny_model(), continued, max_new_tokens=6), decode(tiny_model(), whole, max_new_tokens=6)
    )


def test_what_cannot_be_continued_is_refused():
    uneven = prefill(batch(prompt(3, 45), prompt(2, 30)))
    with pytest.raises(ValueError, match=r"must hold equally many tokens.*got \[45, 30\]; continue each separately"):
        prefill(batch(QUESTION, QUESTION), cache=uneven)
    with pytest.raises(ValueError, match=r"as many prompts: expected float32 \(3, 2, 128, 2, 8\), got float32 \(3, 1,"):
        prefill(batch(QUESTION, QUESTION), cache=prefill(VIDEO))
    with pytest.raises(ValueError, match=r"fit the largest bucket.*prior_tokens=31, num_tokens=11, max_new_tokens=220"):
        prefill(QUESTION, cache=prefill(VIDEO), max_new_tokens=220)


def lengths_of(
    num_tokens: int, *, chunk_tokens: int | None = None, prior: tuple[int, int] = (0, 0), buckets: Buckets = FINE
) -> PaddedLengths:
    """Padded lengths on one device; `prior` are tokens and capacity of a cache that is continued."""
    options = PrefillOptions(chunk_tokens=chunk_tokens, buckets=buckets, blocks=BLOCKS)
    return padded_lengths(num_tokens, options, ONE_DEVICE, PriorCache(tokens=prior[0], capacity=prior[1]))


def test_lengths_leave_room_for_every_chunk():
    lengths = functools.partial(PaddedLengths, prior_tokens=0)
    assert lengths_of(40) == lengths(padded_tokens=64, chunk_tokens=64, capacity=64)
    assert lengths_of(40, chunk_tokens=48) == lengths(padded_tokens=96, chunk_tokens=48, capacity=96)
    lengths = lengths_of(40, prior=(30, 96))
    assert lengths == PaddedLengths(prior_tokens=30, padded_tokens=64, chunk_tokens=64, capacity=96)
    assert list(lengths.starts) == [30]
    assert lengths_of(40, prior=(33, 96)).capacity == 112
    last = lengths_of(40, chunk_tokens=48, prior=(216, 240))
    assert last.starts == range(216, 312, 48) and last.capacity == 312 + 8  # past the largest bucket, with padding only
    options, prior = PrefillOptions(buckets=TWO, blocks=BLOCKS), PriorCache(tokens=30, capacity=96)
    with pytest.raises(ValueError, match="expected no chunk_tokens, got None, and no cache, got one of 30 tokens"):
        padded_lengths(40, options, Shards(sequence=2), prior)
