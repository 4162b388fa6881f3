"""The page of evidence: its text from made-up results, and what it says against us."""

import sys
from pathlib import Path

import pytest

from mmi_jax import AShape, Dense, Grid, PatternTable
from mmi_jax.method.tables.pattern_table import HeadScores

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import accuracy_page as page  # noqa: E402  # pyright: ignore[reportMissingImports]

RUN: dict[str, object] = {
    "model": "m",
    "weights": "w",
    "dtype": "bfloat16",
    "device": "d",
    "commit": "c",
    "date": "today",
    "samples": 2,
    "haystack": "generated",
    "seed": 1,
    "costs": "tiles",
}
RUN["matched to"] = "ours"


def cell(method, correct, cost, tokens=4096, questions=10):
    place = dict(task="mm_niah", method=method, tokens=tokens, depth=0.5)
    return place | dict(correct=correct, questions=questions, cost=cost, dense_cost=1.0, density=cost, pattern="x")


def table(held_out="0.1", digest="d"):
    layers = ((AShape(), Grid()), (Dense(), Dense()))
    ones = ((0.1, 0.2), (0.3, 0.4))
    scores = HeadScores(error=ones, density=ones, cost=ones, dense_cost=2.0)
    provenance = {"error": "0.1 (mean over heads)", "held-out error": f"{held_out} (x)", "target": "t"}
    provenance |= {"calibration": "; ".join(f"{name} seed 0 (9 tokens, {digest})" for name in ("a", "b"))}
    return PatternTable(layers=layers, scores=scores, provenance=provenance)


TABLES = {"ours": table(), "no inter-modality": table(digest="e"), "no Grid": table(digest="e")}
RECALL = {"tokens": 2048, "density": [[0.5, 0.5], [1, 1]], "recall": [[0.9, 0.8], [1, 1]]}
SHOWN = [dict(kind="Grid", layer=0, head=1, pattern="Grid()", given="Grid()", error=0.2, files=["a.png", "m.png"])]


def test_the_page_holds_every_figure(tmp_path):
    cells = [cell("dense", 10, 1.0), cell("ours", 10, 0.2), cell("a-shape", 5, 0.2), cell("dense", 9, 1.0, 8192),
             cell("ours", 9, 0.2, 8192), cell("a-shape", 4, 0.2, 8192)]  # fmt: skip
    output = tmp_path / "accuracy.md"
    (tmp_path / "accuracy").mkdir()
    results = {"run": RUN, "cells": cells}
    page.write_page(
        output, results, TABLES, RECALL, SHOWN, picture_tokens=1024, notes="By hand.", command="make it"
    )  # fmt: skip
    text = output.read_text()
    assert "| ours | 100.0% | 90.0% | 95.0% | 20 | 20.0% / 20.0% | 20.0% / 20.0% |" in text
    assert "| A-shape | 50.0% | 40.0% | 45.0% | 20 | 20.0% / 20.0% | 20.0% / 20.0% |" in text
    assert "![mm_niah by length and depth](accuracy/mm_niah.png)" in text
    assert "| AShape | 1 | 1 | 1 |" in text and "| Dense | 2 | 2 | 2 |" in text
    assert "0.5000 | 0.9000 | 0.1000 | 0.0500 |" in text
    assert "which the table gives it" in text and "No head was tried with a QBoundary." in text
    assert text.rstrip().endswith("- Nothing that these figures show.\n\nBy hand.")
    assert "of a prompt of 2,048 tokens. Error" in text and "suits best, on a prompt of 1,024 tokens" in text
    assert "| error | 0.1 | 0.1 | 0.1 |" in text and "| held-out error | 0.1 (x) | 0.1 (x) | 0.1 (x) |" in text
    assert "| calibration | 2 prompts | 2 prompts | 2 prompts |" in text and "seed 0" not in text
    assert len((tmp_path / "accuracy" / "heads.csv").read_text().splitlines()) == 5


@pytest.mark.parametrize(
    ("cells", "tables", "message"),
    [
        ([cell("dense", 10, 1.0), cell("ours", 9, 0.2)], TABLES, "mm_niah: ours answers 90.0%, dense 100.0%."),
        (
            [cell("dense", 10, 1.0), cell("ours", 9, 0.2), cell("swin", 10, 0.2)],
            TABLES,
            "better than ours (90.0%) at the cost in the table: Swin windows (100.0%).",
        ),
        (
            [cell("dense", 10, 1.0), cell("ours", 10, 0.2), cell("swin", 10, 0.3)],
            TABLES,
            "Swin windows costs +50% of ours",
        ),
        (
            [cell("dense", 10, 1.0), cell("ours", 10, 0.2)],
            TABLES | {"ours": table("0.2")},
            "ours: the error on held-out prompts is 0.2, on calibration 0.1.",
        ),
    ],
)
def test_what_speaks_against_us_is_listed(cells, tables, message):
    assert message in page.failures(cells, tables, "")


def test_a_large_models_heads_are_summed_by_pattern(monkeypatch):
    monkeypatch.setattr(page, "MAX_LISTED_HEADS", 3)
    text = page.heads(table(), RECALL, "accuracy")
    assert "| Dense | 2 | 1.0000 | 1.0000 | 0.3500 | 0.1750 |" in text


def test_every_calibration_prompt_is_listed_once_with_its_tables():
    lines = page.prompts_csv(TABLES).splitlines()
    assert lines[0] == "prompt,tables" and len(lines) == 5
    assert lines[1] == '"a seed 0 (9 tokens, d)",ours'
    assert lines[3] == '"a seed 0 (9 tokens, e)",no inter-modality; no Grid'
