"""The text of docs/accuracy.md, made of results alone."""

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmi_jax import PatternTable
from mmi_jax.cli.niah.journal_entries import with_present_names
from mmi_jax.cli.niah.results import accuracy_of, mean_cost
from mmi_jax.engine.programs.layer_program import NUM_RECALL_QUERIES
from mmi_jax.files import write_whole

POINT = 0.01
"""A point of accuracy: a loss against dense of more is listed."""

MARGIN = 0.1
"""Relative difference in cost, or of held-out from calibration error: one of more is listed."""

MAX_LISTED_HEADS = 128
"""Heads that are listed one by one on the page; all are in heads.csv."""

NAMES = {
    "no inter-modality": "ours without inter-modality",
    "no Grid": "ours without Grid",
    "minference": "MInference (VerticalSlash only)",
    "a-shape": "A-shape",
    "tri-shape": "Tri-shape",
    "sf-fixed": "Sparse Transformer, fixed",
    "sf-strided": "Sparse Transformer, strided",
    "swin": "Swin windows",
    "block-topk": "BlockTopK",
}
"""Methods as the page names them."""


def write_page(
    output: Path,
    results: Mapping[str, Any],
    tables: Mapping[str, PatternTable],
    recall: Mapping[str, Any],
    shown: Sequence[Mapping[str, Any]],
    *,
    picture_tokens: int,
    notes: str,
    command: str,
) -> None:
    """Writes the page, and heads.csv and prompts.csv next to its pictures."""
    pictures = output.with_suffix("")
    cells = list(map(with_present_names, results["cells"]))
    write_whole(pictures / "heads.csv", heads_csv(tables["ours"], recall))
    write_whole(pictures / "prompts.csv", prompts_csv(tables))
    sections = [
        head(results["run"], command),
        answers(cells, pictures.name),
        searched(tables, pictures.name),
        heads(tables["ours"], recall, pictures.name),
        maps(shown, picture_tokens, pictures.name),
        failures(cells, tables, notes),
    ]
    write_whole(output, "\n\n".join(section.strip() for section in sections) + "\n")


def head(run: Mapping[str, Any], command: str) -> str:
    """The run: model, device, commit, and how cost is counted."""
    return f"""# Accuracy

Written by `{command}`; every figure is from its results.
Model {run["model"]}, weights {run["weights"]}, {run["dtype"]}, {run["device"]}, commit {run["commit"]}, {run["date"]};
{run["samples"]} samples for each task, length and depth, haystack {run["haystack"]}, seeds from {run["seed"]}.

Cost is that of attention, estimates included, as a fraction of dense attention's: from the tiles visited on these very
prompts, by the cost model `{run["costs"]}`. Baselines have the size with which they cost what "{run["matched to"]}"
costs; where there are several lengths, cost and density are of each. Heat maps are those of `mmi niah`."""


def answers(cells: Sequence[Mapping[str, Any]], pictures: str) -> str:
    """Per task a table of methods by length, and the heat map."""
    parts = ["## Answers by method"]
    for task in dict.fromkeys(cell["task"] for cell in cells):
        own = [cell for cell in cells if cell["task"] == task]
        lengths = sorted({cell["tokens"] for cell in own})
        rows = []
        for method in dict.fromkeys(cell["method"] for cell in own):
            mine = [cell for cell in own if cell["method"] == method]
            by_length = [[cell for cell in mine if cell["tokens"] == n] for n in lengths]
            right = [f"{accuracy_of(own):.1%}" for own in (*by_length, mine)]
            cost = " / ".join(f"{mean_cost(own, method):.1%}" for own in by_length)
            density = " / ".join(f"{np.mean([cell['density'] for cell in own]):.1%}" for own in by_length)
            rows.append(
                [NAMES.get(method, method), *right, str(sum(cell["questions"] for cell in mine)), cost, density]
            )
        columns = ["method", *(f"{n:,} tokens" for n in lengths), "all", "questions", "cost", "density"]
        parts += [f"### {task}", markdown(columns, rows), f"![{task} by length and depth]({pictures}/{task}.png)"]
    return "\n\n".join(parts)


def searched(tables: Mapping[str, PatternTable], pictures: str) -> str:
    """Provenance of the tables, and their heads by pattern."""
    ours = tables["ours"]
    costs, errors = ("costs", "attention cost", "held-out cost"), ("error", "held-out error")
    provenance = {
        name: dict(t.provenance)
        | {name: t.provenance.get(name, "").partition(" (mean")[0] for name in errors}
        | {"calibration": f"{len(calibration_of(t))} prompts"}
        for name, t in tables.items()
    }
    names = ("target", *costs, *errors, "calibration", "candidates")
    rows = [[name, *(of_table.get(name, "") for of_table in provenance.values())] for name in names]
    is_weighted = ours.scores is not None and ours.scores.weight is not None
    kinds = {name: Counter(type(p).__name__ for row in t.layers for p in row) for name, t in tables.items()}
    counts = [
        [kind, *(str(kinds[name][kind]) for name in tables)] for kind in sorted(set().union(*map(set, kinds.values())))
    ]
    return "\n\n".join(
        [
            "## The searched tables",
            "The target holds on every calibration prompt; the cost is that of the most expensive one. An error is the "
            f"mean over heads{', by their weight,' if is_weighted else ''} of the relative squared error of the "
            "attention output; half of it is that of the rows from which answers are read. The prompts are in "
            f"[{pictures}/prompts.csv]({pictures}/prompts.csv).",
            markdown(["", *(NAMES.get(name, name) for name in tables)], rows),
            f"Heads by pattern, of {ours.num_layers} layers of {ours.num_heads}:",
            markdown(["pattern", *(NAMES.get(name, name) for name in tables)], counts),
            f"![pattern of each head]({pictures}/patterns.png)",
            f"![error and cost of each head]({pictures}/scores.png)",
        ]
    )


def calibration_of(table: PatternTable) -> list[str]:
    """The prompts that a table was searched on."""
    return [prompt for prompt in table.provenance.get("calibration", "").split("; ") if prompt]


def prompts_csv(tables: Mapping[str, PatternTable]) -> str:
    """Every calibration prompt, and the tables that were searched on it."""
    searched_on: dict[str, list[str]] = {}
    for name, table in tables.items():
        for prompt in calibration_of(table):
            searched_on.setdefault(prompt, []).append(name)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["prompt", "tables"])
    writer.writerows([prompt, "; ".join(names)] for prompt, names in searched_on.items())
    return text.getvalue()


def heads(table: PatternTable, recall: Mapping[str, Any], pictures: str) -> str:
    """Every head of a small model, the means by pattern of a large one."""
    rows = list(csv.reader(io.StringIO(heads_csv(table, recall))))
    listed = rows[1:]
    intro = (
        "Recall is the fraction of dense attention on the visited keys, the mean over "
        f"{NUM_RECALL_QUERIES} queries spaced evenly over the prompt; it and the density are of a prompt of "
        f"{recall['tokens']:,} tokens. Error and cost are those of the search, the cost on its most expensive "
        f"calibration prompt. All heads: [{pictures}/heads.csv]({pictures}/heads.csv)."
    )
    if len(listed) <= MAX_LISTED_HEADS:
        return "\n\n".join(["## Heads", intro, markdown(rows[0], listed)])
    by_kind: dict[str, list[list[float]]] = {}
    for row in listed:
        by_kind.setdefault(row[2].partition("(")[0], []).append([float(x) for x in row[3:]])
    means = [[kind, str(len(x)), *(f"{v:.4f}" for v in np.mean(x, axis=0))] for kind, x in by_kind.items()]
    return "\n\n".join(["## Heads", intro, markdown(["pattern", "heads", *rows[0][3:]], means)])


def heads_csv(table: PatternTable, recall: Mapping[str, Any]) -> str:
    """Pattern, density, recall, error and cost of every head."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["layer", "head", "pattern", "density", "recall", "error", "cost / dense"])
    scores = table.scores
    assert scores is not None, "the table is from a search"
    for n, row in enumerate(table.layers):
        for h, pattern in enumerate(row):
            figures = recall["density"][n][h], recall["recall"][n][h], scores.error[n][h]
            cost = scores.cost[n][h] / scores.dense_cost
            writer.writerow([n, h, repr(pattern), *(f"{x:.4f}" for x in (*figures, cost))])
    return text.getvalue()


def maps(shown: Sequence[Mapping[str, Any]], num_tokens: int, pictures: str) -> str:
    """The attention of chosen heads before and after permutation."""
    parts = [
        "## Attention before and after permutation",
        "Dense attention weights of the heads that each kind of pattern suits best, on a prompt of "
        f"{num_tokens:,} tokens, and what the plan computes of them.",
    ]
    for one in shown:
        given = "which the table gives it" if one["given"] == one["pattern"] else f"the table gives it `{one['given']}`"
        parts.append(
            f"### {one['kind']}: layer {one['layer']}, head {one['head']}\n\n"
            f"`{one['pattern']}`, {given}; error {one['error']:.4f}."
        )
        parts += [f"![{one['kind']}]({pictures}/{file})" for file in one["files"]]
    for kind in ("Grid", "QBoundary", "Boundary2D"):
        if kind not in {one["kind"] for one in shown}:
            parts.append(f"No head was tried with a {kind}.")
    return "\n\n".join(parts)


def failures(cells: Sequence[Mapping[str, Any]], tables: Mapping[str, PatternTable], notes: str) -> str:
    """Where the figures speak against the method, and the notes written by hand."""
    limits = []
    for task in dict.fromkeys(cell["task"] for cell in cells):
        by_method = {
            m: [c for c in cells if c["task"] == task and c["method"] == m]
            for m in dict.fromkeys(c["method"] for c in cells)
        }
        accuracy = {method: accuracy_of(own) for method, own in by_method.items() if own}
        ours, dense = accuracy.get("ours"), accuracy.get("dense")
        if ours is None or dense is None:
            continue
        if ours < dense - POINT:
            limits.append(f"{task}: ours answers {ours:.1%}, dense {dense:.1%}.")
        better = [f"{NAMES.get(m, m)} ({x:.1%})" for m, x in accuracy.items() if x > ours and m != "dense"]
        if better:
            limits.append(f"{task}: better than ours ({ours:.1%}) at the cost in the table: {', '.join(better)}.")
        share = mean_cost(by_method["ours"], "ours")
        for method, own in by_method.items():
            off = mean_cost(own, method) / share - 1
            if method not in ("dense", *tables) and abs(off) > MARGIN:
                name = NAMES.get(method, method)
                where = "at the size that comes nearest to it on the first prompt of that task and length"
                limits.append(f"{task}: {name} costs {off:+.0%} of ours, {where}.")
    for name, table in tables.items():
        error, held_out = (float(table.provenance.get(key, "nan").split()[0]) for key in ("error", "held-out error"))
        if abs(held_out / max(error, 1e-12) - 1) > MARGIN:
            limits.append(
                f"{NAMES.get(name, name)}: the error on held-out prompts is {held_out:.4g}, on calibration {error:.4g}."
            )
    listed = "\n".join(f"- {line}" for line in limits) or "- Nothing that these figures show."
    return "\n\n".join(["## Limits", listed, notes.strip()]).strip()


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
