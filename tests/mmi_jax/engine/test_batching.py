"""prefill_many: every prompt as if alone, in batches of one bucket."""

from typing import Any

import numpy as np
import pytest
from closeness import assert_same_up_to_order, model_terms

from mmi_jax import Buckets, prefill, prefill_many
from mmi_jax.engine.batching import batches
from mmi_jax.engine.programs.compilation import num_compiled_programs
from models.prompt import Prompt
from models.testing import BLOCKS, TINY_CONFIG, batch, prompt, tiny_model

TERMS = model_terms(TINY_CONFIG, num_keys=64)
"""Numbers added up for one logit of the tiny model in a bucket of 64 tokens."""

BUCKETS = Buckets(smallest=32, largest=256, multiple=32)
SETTINGS: dict[str, Any] = dict(buckets=BUCKETS, blocks=BLOCKS, batch_tokens=128)
PROMPTS = [prompt(0, 60), prompt(1, 5, (2, 2, 3)), prompt(2, 6, (3, 2, 4), 20), prompt(3, 64), prompt(4, 10)]


def test_batches_are_powers_of_two_of_one_bucket():
    assert list(batches([60, 30, 61, 64, 10], 128, BUCKETS)) == [[0, 2], [3], [1, 4]]
    assert [len(members) for members in batches([20] * 13, 256, BUCKETS)] == [8, 4, 1]
    assert list(batches([200, 100], 128, BUCKETS)) == [[0], [1]], "a prompt longer than a batch runs alone"


def test_every_prompt_is_as_if_alone():
    done = []
    results = prefill_many(tiny_model(), PROMPTS, **SETTINGS, on_batch=lambda *n: done.append(n))
    assert done == [(2, 5), (3, 5), (5, 5)]
    for single, result in zip(PROMPTS, results, strict=True):
        alone = prefill(tiny_model(), single, buckets=BUCKETS, blocks=BLOCKS)
        assert_same_up_to_order(result.logits, alone.logits, terms=TERMS)
        length = single.tokens.shape[1]
        assert result.cache.lengths.tolist() == [length] and result.cache.capacity == alone.cache.capacity
        assert_same_up_to_order(result.cache.k[:, :, :length], alone.cache.k[:, :, :length], terms=TERMS)
    before = num_compiled_programs()
    prefill_many(tiny_model(), [PROMPTS[n] for n in (3, 1, 0, 4, 2)], **SETTINGS)
    assert num_compiled_programs() == before, "other prompts of the same buckets need no program"


def test_what_is_not_one_prompt_is_refused():
    with pytest.raises(ValueError, match=r"one prompt or more, each a batch of 1: got \[\]"):
        prefill_many(tiny_model(), [])
    with pytest.raises(ValueError, match=r"each a batch of 1: got \[1, 2\]"):
        prefill_many(tiny_model(), [PROMPTS[0], Prompt.batch(PROMPTS[:2])])
    with pytest.raises(ValueError, match="on one device: expected no cache"):
        one_prompts: dict[str, Any] = dict(cache=prefill(tiny_model(), PROMPTS[0], buckets=BUCKETS, blocks=BLOCKS))
        prefill_many(tiny_model(), PROMPTS, **one_prompts)


def test_prompts_batch_as_the_tests_do_it():
    ours, theirs = Prompt.batch(PROMPTS[:3]), batch(*PROMPTS[:3])
    is_real = theirs.layout.is_real
    np.testing.assert_array_equal(ours.layout.pos, theirs.layout.pos)
    np.testing.assert_array_equal(ours.tokens[is_real], theirs.tokens[is_real])
    np.testing.assert_array_equal(ours.rope_pos[:, is_real], theirs.rope_pos[:, is_real])
    np.testing.assert_array_equal(ours.patches, theirs.patches)
    assert ours.grids == theirs.grids
