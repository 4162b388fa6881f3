"""Fifty random prompts in one process: memory does not grow, and nothing is compiled beyond the buckets."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent / "mmi_jax"))
from tiny import BLOCKS, prompt, tiny_model  # noqa: E402

from mmi_jax import Buckets, Grid, prefill  # noqa: E402
from mmi_jax.bench.soak import growth, held, soak  # noqa: E402

BUCKETS = Buckets(smallest=64, largest=256, multiple=64)
MOST_GROWTH = 48 * 2**20
"""Bytes of the host that fifty prompts may add after the first third: the allocator's noise."""


def random_prompt(rng: np.random.Generator, number: int):
    """Text alone, an image, a video, or several of both; frames of two sizes."""
    pieces: list = [int(rng.integers(1, 60))]
    for _ in range(rng.integers(0, 4)):
        size = [(2, 4), (3, 2)][rng.integers(2)]
        pieces += [(int(rng.integers(1, 6)), *size), int(rng.integers(1, 20))]
    return prompt(number, *pieces)


def few(number: int):
    rng = np.random.default_rng(number)
    return [p for p in (random_prompt(rng, n) for n in range(60)) if p.tokens.shape[1] <= BUCKETS.largest][:50]


@pytest.mark.slow
def test_fifty_random_prompts_leave_nothing_behind():
    prompts = few(0)
    table = Grid(local=8, sink=0, tail=4, last_q=8)

    def run(prompt):
        return prefill(tiny_model(), prompt, table=table, buckets=BUCKETS, blocks=BLOCKS)

    before = held()
    rows = soak(run, prompts)
    assert {p.tokens.shape[1] for p in prompts} and len(prompts) == 50
    used = {BUCKETS.length_for(p.tokens.shape[1]) for p in prompts}
    assert rows[-1]["programs"] - before["programs"] == len(used), "one program for each bucket that came up"
    seen = [n for n in range(1, 50) if rows[n]["compilations"] > rows[n - 1]["compilations"]]
    assert len(seen) < 20 and max(seen) < 40, f"compiled again at {seen}"
    assert growth(rows, "array_bytes") == 0
    assert growth(rows, "host_bytes") < MOST_GROWTH
    again = soak(run, prompts)
    assert again[-1]["compilations"] == 0, "every shape was seen"
