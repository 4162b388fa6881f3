"""Buckets: padded lengths by hand, their spacing, and what is refused."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mmi_jax import Buckets


@pytest.mark.parametrize(
    ("num_tokens", "expected"),
    [(1, 256), (256, 256), (257, 384), (1024, 1024), (1025, 1152), (2048, 2048), (2049, 2304), (100_000, 106_496)],
)
def test_lengths_by_hand(num_tokens, expected):
    assert Buckets().length_for(num_tokens) == expected


@given(
    num_tokens=st.integers(1, 2**20),
    multiple=st.integers(1, 300),
    smallest=st.integers(1, 8),
    largest=st.integers(0, 5000),
)
@example(num_tokens=3934, multiple=69, smallest=1, largest=60)
def test_a_length_is_whole_near_and_its_own_bucket(num_tokens, multiple, smallest, largest):
    buckets = Buckets(smallest=smallest * multiple, largest=(smallest + largest) * multiple, multiple=multiple)
    num_tokens = min(num_tokens, buckets.largest)
    padded = buckets.length_for(num_tokens)
    assert num_tokens <= padded <= buckets.largest and padded % multiple == 0
    assert padded < max(num_tokens * 9 / 8, num_tokens + multiple, buckets.smallest + 1)
    assert buckets.length_for(padded) == padded


@given(st.integers(1, 2**20 - 1))
def test_a_longer_prompt_never_gets_a_shorter_bucket(num_tokens):
    assert Buckets().length_for(num_tokens) <= Buckets().length_for(num_tokens + 1)


@pytest.mark.parametrize("num_tokens", [0, -1, 2**20 + 1])
def test_prompts_outside_the_table_are_refused(num_tokens):
    with pytest.raises(ValueError, match=f"1 to 1048576 tokens .the largest bucket., got {num_tokens}"):
        Buckets().length_for(num_tokens)


@pytest.mark.parametrize(
    "fields",
    [
        dict(smallest=0),
        dict(smallest=100),
        dict(largest=1000),
        dict(smallest=512, largest=256),
        dict(multiple=0),
        dict(multiple=-128),
    ],
)
def test_tables_that_do_not_fit_are_refused(fields):
    with pytest.raises(ValueError, match="buckets need 0 < smallest <= largest"):
        Buckets(**fields)
