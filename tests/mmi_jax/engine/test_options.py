"""PrefillOptions: keywords or one value, the same settings either way."""

import dataclasses

import numpy as np
import pytest

from mmi_jax import PrefillOptions, prefill, prefill_many
from mmi_jax.engine.settings.options import PrefillSettings, options_of
from models.testing import BLOCKS, BUCKETS, STATIC, prompt, tiny_model


def test_keywords_are_the_fields():
    fields = {field.name: field.type for field in dataclasses.fields(PrefillOptions)}
    assert fields == PrefillSettings.__annotations__


def test_keywords_take_the_place_of_the_options_own():
    options = PrefillOptions(table=STATIC, max_new_tokens=3)
    assert options_of(options, {}) == options
    assert options_of(options, {"max_new_tokens": 5}) == PrefillOptions(table=STATIC, max_new_tokens=5)
    assert options_of(None, {"table": STATIC}) == PrefillOptions(table=STATIC)


def test_options_and_keywords_give_the_same_result():
    options = PrefillOptions(table=STATIC, buckets=BUCKETS, blocks=BLOCKS)
    example = prompt(0, 9, (3, 2, 5), 17)
    by_options = prefill(tiny_model(), example, options=options)
    by_keywords = prefill(tiny_model(), example, table=STATIC, buckets=BUCKETS, blocks=BLOCKS)
    (of_many,) = prefill_many(tiny_model(), [example], options=options)
    np.testing.assert_array_equal(by_options.logits, by_keywords.logits)
    np.testing.assert_array_equal(by_options.logits, of_many.logits)


@pytest.mark.usefixtures("no_shape_checks")
def test_what_is_no_setting_is_refused():
    with pytest.raises(TypeError, match="unexpected keyword argument 'chunks'"):
        prefill(tiny_model(), prompt(0, 9), chunks=3)  # pyright: ignore[reportCallIssue]
    with pytest.raises(ValueError, match="max_new_tokens must be a whole number, got 2.5"):
        prefill(tiny_model(), prompt(0, 9), max_new_tokens=2.5)  # pyright: ignore[reportArgumentType]
