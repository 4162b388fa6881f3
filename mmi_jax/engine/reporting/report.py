"""The report of a prefill: what it skipped, what it cost, and how close it came to dense attention."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mmi_jax.layout import TokenLayout
from mmi_jax.method.tables.pattern_table import PatternTable

_MODALITY_NAMES = {-1: "padding", 0: "text", 1: "vision", 2: "audio"}


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PrefillReport:
    """Figures of one prefill, host values.

    Args:
      tokens: tokens of each modality, summed over the batch.
      lengths: tokens of each prompt.
      padded_tokens: length of the bucket; tokens.
      seconds: wall time by stage, see `CLOCK_STAGES`; the caller may add stages.
      table: the patterns that ran.
      density: visited tiles over those of dense causal attention, mean over the batch; float [layers, heads].
      recall: fraction of dense attention that the visited keys hold, mean over 64 queries; NaN where not measured.
    """

    tokens: dict[str, int]
    lengths: tuple[int, ...]
    padded_tokens: int
    seconds: dict[str, float]
    table: PatternTable
    density: np.ndarray
    recall: np.ndarray

    @classmethod
    def build(
        cls,
        *,
        layout: TokenLayout,
        table: PatternTable,
        padded_tokens: int,
        seconds: dict[str, float],
        statistics: Sequence[Mapping[str, np.ndarray]],
    ) -> "PrefillReport":
        """The report of a prefill whose chunks left these statistics, `[layers, b, h]` each."""
        modality = np.asarray(layout.modality)
        names, counts = np.unique(modality[modality >= 0], return_counts=True)
        return cls(
            tokens={_MODALITY_NAMES.get(int(m), f"modality {m}"): int(n) for m, n in zip(names, counts, strict=True)},
            lengths=tuple((modality >= 0).sum(axis=1).tolist()),
            padded_tokens=padded_tokens,
            seconds=seconds,
            table=table,
            density=_weighted(statistics, "density"),
            recall=_weighted(statistics, "recall"),
        )

    def to_json(self) -> dict[str, Any]:
        """The figures as JSON values; arrays as nested lists by layer and head."""
        patterns = [[type(pattern).__name__ for pattern in heads] for heads in self.table.layers]
        return {
            "tokens": self.tokens,
            "lengths": list(self.lengths),
            "padded_tokens": self.padded_tokens,
            "seconds": {stage: round(value, 4) for stage, value in self.seconds.items()},
            "patterns": patterns,
            "density": np.round(self.density, 5).tolist(),
            "recall": [[None if np.isnan(x) else round(float(x), 5) for x in heads] for heads in self.recall],
            "provenance": dict(self.table.provenance),
        }


def _weighted(statistics: Sequence[Mapping[str, np.ndarray]], name: str) -> np.ndarray:
    """Mean over chunks and examples, weighted by the queries of each; [layers, heads]."""
    values = np.stack([chunk[name] for chunk in statistics]).astype(np.float64)
    weights = np.stack([chunk["num_queries"] for chunk in statistics]).astype(np.float64)[..., None]
    filled = np.where(weights > 0, values, 0.0)
    return (filled * weights).sum(axis=(0, 2)) / np.maximum(weights.sum(axis=(0, 2)), 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreement:
    """Closeness of a sparse prefill's next-token distribution to the dense one's; means over the batch.

    Args:
      same_next_token: fraction of prompts whose most likely token is the same.
      top5_overlap: fraction of the dense top five that is in the sparse top five.
      kl: KL divergence of the sparse distribution from the dense one, in nats.
      hidden_error: relative error of the last hidden state, 2-norm.
    """

    same_next_token: float
    top5_overlap: float
    kl: float
    hidden_error: float


def agreement(dense_logits, sparse_logits, dense_hidden, sparse_hidden) -> Agreement:
    """Compares `[b, v]` logits and `[b, e]` hidden states of the same prompts."""
    dense, sparse = (np.asarray(x, np.float64) for x in (dense_logits, sparse_logits))
    top_dense, top_sparse = (np.argsort(-x, axis=1)[:, :5] for x in (dense, sparse))
    log_p, log_q = (x - np.logaddexp.reduce(x, axis=1, keepdims=True) for x in (dense, sparse))
    hidden, other = (np.asarray(x, np.float64) for x in (dense_hidden, sparse_hidden))
    overlap = [len(set(a) & set(b)) / len(a) for a, b in zip(top_dense, top_sparse, strict=True)]
    return Agreement(
        same_next_token=float((top_dense[:, 0] == top_sparse[:, 0]).mean()),
        top5_overlap=float(np.mean(overlap)),
        kl=float((np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean()),
        hidden_error=float((np.linalg.norm(hidden - other, axis=1) / np.linalg.norm(hidden, axis=1)).mean()),
    )
