"""Agreement and reports by hand, and the JSON of a real prefill."""

import dataclasses
import json

import numpy as np
import pytest
from closeness import assert_same_up_to_order

from mmi_jax import Dense, PatternTable, prefill
from mmi_jax.engine.reporting.report import PrefillReport, agreement
from mmi_jax.layout import concatenate, stack, text_tokens, vision_tokens
from mmi_jax.method.tables.pattern_table import uniform_table
from models.testing import BLOCKS, BUCKETS, STATIC, batch, prompt, tiny_model

SEVERAL = batch(prompt(1, 4, (2, 3, 3), 6), prompt(2, 3, (1, 2, 2), 5, (3, 2, 4), 12), prompt(3, 25))


def test_agreement_by_hand():
    dense = np.log([[0.5, 0.25, 0.125, 0.125], [0.1, 0.2, 0.3, 0.4]])
    sparse = np.log([[0.25, 0.5, 0.125, 0.125], [0.1, 0.2, 0.3, 0.4]])
    hidden, other = np.array([[3.0, 4.0], [1.0, 0.0]]), np.array([[3.0, 3.0], [1.0, 0.0]])
    result = agreement(dense + 5, sparse - 2, hidden, other)  # logits count up to a constant
    assert result.same_next_token == 0.5
    assert result.top5_overlap == 1
    assert result.kl == pytest.approx((0.5 * np.log(2) - 0.25 * np.log(2)) / 2)
    assert result.hidden_error == pytest.approx((1 / 5 + 0) / 2)


def test_overlap_of_the_top_five():
    dense = np.arange(8.0)[None]
    sparse = np.array([[9.0, 8.0, 7.0, 0.0, 0.1, 6.0, 5.0, 0.2]])  # top five 0 1 2 5 6 against 3 4 5 6 7
    assert agreement(dense, sparse, np.ones((1, 2)), np.ones((1, 2))).top5_overlap == pytest.approx(2 / 5)


def test_identical_runs_agree():
    x = np.random.default_rng(0).normal(size=(3, 10))
    result = agreement(x, x, x, x)
    assert (result.same_next_token, result.top5_overlap, result.kl, result.hidden_error) == (1, 1, 0, 0)


def test_statistics_are_weighted_by_queries():
    layout = stack([concatenate([text_tokens(2), vision_tokens(1, 2, 2)]), text_tokens(2)])
    chunks = [
        dict(density=np.array([[[0.5], [1.0]]]), recall=np.array([[[0.9], [0.8]]]), num_queries=np.array([[4, 2]])),
        dict(density=np.array([[[0.2], [9.0]]]), recall=np.array([[[0.6], [np.nan]]]), num_queries=np.array([[2, 0]])),
    ]
    table = PatternTable(layers=((Dense(),),), provenance={"source": "hand"})
    report = PrefillReport.build(layout=layout, table=table, padded_tokens=64, seconds={}, statistics=chunks)
    np.testing.assert_allclose(report.density, [[(0.5 * 4 + 1.0 * 2 + 0.2 * 2) / 8]])
    np.testing.assert_allclose(report.recall, [[(0.9 * 4 + 0.8 * 2 + 0.6 * 2) / 8]])
    assert report.tokens == {"text": 4, "vision": 4} and report.lengths == (6, 2)


def test_the_report_of_a_prefill_as_json():
    table = dataclasses.replace(uniform_table(STATIC, num_layers=3, num_heads=4), provenance={"source": "test"})
    dense, sparse = (
        prefill(tiny_model(), SEVERAL, table=choice, buckets=BUCKETS, blocks=BLOCKS).report for choice in (None, table)
    )
    value = json.loads(json.dumps(sparse.to_json()))
    assert value["lengths"] == [30, 52, 25] and value["padded_tokens"] == 64
    assert value["tokens"] == {"text": 30 - 18 + 52 - 28 + 25, "vision": 18 + 28}
    assert set(value["seconds"]) == {"vision", "compile", "prefill"} and min(value["seconds"].values()) >= 0
    assert value["patterns"] == [["AShape"] * 4] * 3
    assert value["provenance"] == {"source": "test"}
    recall, density = np.array(value["recall"]), np.array(value["density"])
    assert recall.shape == density.shape == (3, 4)
    assert (recall > 0.2).all() and (recall < 1).all() and (density < dense.density).all()
    assert_same_up_to_order(dense.recall, np.ones_like(dense.recall), terms=2 * 64)
