"""Sampled query rows against attention in float64 on the host: the check before anything is timed."""

import dataclasses
from collections.abc import Callable

import numpy as np

from pallas_kernels.attention.inputs import AttentionInputs

NUM_HEADS = 4
"""Heads of which rows are sampled: the first, the last, and some between them."""

NUM_ROWS = 8
"""Query rows sampled of each of these heads."""

ERROR_LIMIT = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 4e-3}
"""Relative error of the output above which it is wrong: a few units in the last place of the type."""

LSE_LIMIT = 1e-3
"""Error of the log-sum-exp above which it is wrong; every type accumulates scores in float32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampledRows:
    """Some query rows of some heads, and what attention of them is in float64.

    Args:
      heads: the head of each row, ascending.
      rows: the row, in query tokens.
      out: [n, d].
      lse: [n].
    """

    heads: np.ndarray
    rows: np.ndarray
    out: np.ndarray
    lse: np.ndarray

    def check(self, out: np.ndarray, lse: np.ndarray | None, *, dtype: str) -> dict[str, float]:
        """Relative error of the output (2-norm, the worst head) and the error of the log-sum-exp (largest).

        Args:
          out, lse: of these rows, as computed; an implementation may keep the log-sum-exp to itself.
          dtype: of the computed output.

        Raises:
          RuntimeError: an error exceeds what rounding explains: a wrong result is not timed.
        """
        norm = lambda x: np.array([np.linalg.norm(x[self.heads == h]) for h in np.unique(self.heads)])  # noqa: E731
        error = float((norm(np.asarray(out, np.float64) - self.out) / norm(self.out)).max())
        if not error <= ERROR_LIMIT[dtype]:  # a NaN fails here too
            raise RuntimeError(
                f"the relative error against float64 must be at most {ERROR_LIMIT[dtype]}, got {error:.2e}"
            )
        if lse is None:
            return {"relative_error": error}
        lse = np.asarray(lse, np.float64)
        is_same = lse == self.lse  # also -inf, of a row that visits nothing in this pass of the queries
        lse_error = float(np.abs(lse[~is_same] - self.lse[~is_same]).max(initial=0.0))
        if not lse_error <= LSE_LIMIT:
            raise RuntimeError(f"the log-sum-exp must be within {LSE_LIMIT} of float64, got {lse_error:.2e}")
        return {"relative_error": error, "lse_error": lse_error}

    def of_heads(self, heads: np.ndarray) -> "SampledRows":
        """The rows of some of the heads; at least one of them was sampled if it is the first or the last."""
        is_selected = np.isin(self.heads, heads)
        return SampledRows(
            heads=self.heads[is_selected],
            rows=self.rows[is_selected],
            out=self.out[is_selected],
            lse=self.lse[is_selected],
        )

    def of(self, x) -> np.ndarray:
        """These rows of a head-major array on the device, in float64."""
        return np.asarray(x[self.heads, self.rows]).astype(np.float64)


def sample(inputs: AttentionInputs, *, seed: int = 0) -> SampledRows:
    """Random rows of a few heads that are no padding, and the last row of one, over the inputs' own lists."""
    attend = lambda head, rows: rows_in_float64(inputs, head, rows)  # noqa: E731
    return _sample(np.asarray(inputs.q_pos), attend, seed)


def sample_dense(q, k, v, *, scale: float, seed: int = 0) -> SampledRows:
    """The same of dense causal attention, head-major: query row `n` sees the first `n + 1` rows of `k`."""
    attend = lambda head, rows: dense_rows_in_float64(q, k, v, scale, head, rows)  # noqa: E731
    return _sample(np.broadcast_to(np.arange(q.shape[1]), q.shape[:2]), attend, seed)


def _sample(q_pos: np.ndarray, attend: Callable, seed: int) -> SampledRows:
    rng = np.random.default_rng(seed)
    chosen = np.unique(np.linspace(0, len(q_pos) - 1, NUM_HEADS).astype(int))
    heads, rows = [], []
    for head in chosen:
        real = np.flatnonzero(q_pos[head] >= 0)
        picked = rng.choice(real, min(NUM_ROWS, len(real)), replace=False)
        if head == chosen[-1]:  # once: it may see every key, which takes the host seconds
            picked = np.append(picked, q_pos[head].argmax())
        heads.append(np.full(len(picked), head))
        rows.append(picked)
    out, lse = zip(*(attend(int(h), r) for h, r in zip(chosen, rows, strict=True)), strict=True)
    return SampledRows(
        heads=np.concatenate(heads), rows=np.concatenate(rows), out=np.concatenate(out), lse=np.concatenate(lse)
    )


def rows_in_float64(inputs: AttentionInputs, head: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Attention of some query rows of one head straight from the definition: outputs `[n, d]`, log-sum-exp `[n]`."""
    index = inputs.index
    blocks = rows // index.block_q
    first, num_full, count, pos_row = (
        np.asarray(x[head])[blocks].tolist() for x in (index.first, index.num_full, index.count, index.pos_row)
    )
    start, interval, intervals = (np.asarray(x[head]) for x in (index.start, index.interval, index.intervals))
    group = head // inputs.heads_per_kv_head
    k, v = (
        np.concatenate([np.asarray(shared[group]), np.asarray(extra[head])])
        for shared, extra in ((inputs.k, inputs.k_extra), (inputs.v, inputs.v_extra))
    )
    q, q_pos = (np.asarray(x[head][rows]) for x in (inputs.q, inputs.q_pos))
    results = []
    for n in range(len(rows)):
        entries = slice(first[n], first[n] + count[n])
        columns = (start[entries][:, None] + np.arange(index.block_kv)).reshape(-1)
        distance = q_pos[n] - np.asarray(inputs.kv_pos[pos_row[n]])[columns]
        low, high = intervals[interval[entries]].repeat(index.block_kv, axis=0).T
        sees = (distance >= np.maximum(low, 0)) & (distance < high)
        sees |= np.arange(count[n]).repeat(index.block_kv) < num_full[n]
        results.append(_attend(q[n], k[columns[sees]], v[columns[sees]], inputs.scale))
    return np.stack([out for out, _ in results]), np.array([lse for _, lse in results])


def dense_rows_in_float64(q, k, v, scale: float, head: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Dense causal attention of some query rows of one head: outputs `[n, d]`, log-sum-exp `[n]`."""
    group = head // (q.shape[0] // k.shape[0])
    queries, keys, values = (np.asarray(x, np.float64) for x in (q[head][rows], k[group], v[group]))
    results = [_attend(queries[n], keys[: row + 1], values[: row + 1], scale) for n, row in enumerate(rows)]
    return np.stack([out for out, _ in results]), np.array([lse for _, lse in results])


def _attend(q, k, v, scale: float):
    """One query over the keys it sees; zeros and -inf when there are none."""
    q, k, v = (x.astype(np.float64, copy=False) for x in (q, k, v))
    if not len(k):
        return np.zeros(v.shape[1]), -np.inf
    scores = k @ q * scale
    row_max = scores.max()
    weights = np.exp(scores - row_max)
    return weights @ v / weights.sum(), row_max + np.log(weights.sum())
