"""Curves of a training run."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from models.small.stream import KINDS


def plot_training(lines: Sequence[dict], path: Path) -> None:
    """Loss of the questions and accuracy of each kind of label over the steps, smoothed; stages are shaded.

    Args:
        lines: those of metrics.jsonl.
        path: of the PNG.
    """
    from matplotlib.figure import Figure

    steps = np.array([line["step"] for line in lines])
    figure = Figure(figsize=(9, 6), layout="constrained")
    loss, accuracy = figure.subplots(2, 1, sharex=True)
    loss.semilogy(steps, _smooth([line["question_loss"] for line in lines]), color="black")
    loss.set_ylabel("loss of questions, nats")
    for kind in KINDS:
        accuracy.plot(steps, _smooth([line[f"{kind}_accuracy"] for line in lines]), label=kind)
    accuracy.set(ylabel="accuracy", xlabel="step", ylim=(0, 1.02))
    accuracy.legend(loc="lower right")
    lengths = np.array([line["num_tokens"] for line in lines])
    for start in np.flatnonzero(np.diff(lengths, prepend=-1)):
        for axes in (loss, accuracy):
            axes.axvline(steps[start], color="gray", linewidth=0.8)
        loss.text(steps[start], loss.get_ylim()[1], f" {lengths[start]:,} tokens", va="top", fontsize=8)
    figure.savefig(path, dpi=120)


def _smooth(values: Sequence[float], window: int = 10) -> np.ndarray:
    """The mean of the last `window` values."""
    total = np.cumsum(np.concatenate([np.zeros(window), values]))
    count = np.minimum(np.arange(1, len(values) + 1), window)
    return (total[window:] - total[:-window]) / count
