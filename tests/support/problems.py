"""Random block-sparse problems, and the mask they mean, written without the code under test."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from pallas_kernels import BlockIndex
from pallas_kernels.block_index import NO_LIMIT
from pallas_kernels.notation import PAD_KV_POS, PAD_Q_POS

INTERVALS = ((0, NO_LIMIT), (0, 11), (11, NO_LIMIT))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """Arguments of `block_sparse_attention`; `kwargs` holds the keyword-only ones."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    index: BlockIndex
    kwargs: dict

    def arrays(self):
        """q, k, v and the extra rows as float arrays on the device."""
        return tuple(map(jnp.asarray, (self.q, self.k, self.v, self.kwargs["k_extra"], self.kwargs["v_extra"])))

    def mask(self) -> np.ndarray:
        """True where a pair is attended, [h, t, s + x]: the definition, one pair of tokens after another."""
        index, q_pos, kv_pos = self.index, self.kwargs["q_pos"], self.kwargs["kv_pos"]
        mask = np.zeros((*q_pos.shape, kv_pos.shape[1]), bool)
        for h, i in np.ndindex(*index.count.shape):
            rows = slice(i * index.block_q, (i + 1) * index.block_q)
            for n in range(index.count[h, i]):
                entry = index.first[h, i] + n
                keys = slice(index.start[h, entry], index.start[h, entry] + index.block_kv)
                lo, hi = index.intervals[h, index.interval[h, entry]]
                distance = q_pos[h, rows, None].astype(np.int64) - kv_pos[index.pos_row[h, i], None, keys]
                is_seen = (distance >= 0) & (distance >= lo) & (distance < hi)
                assert not mask[h, rows, keys].any(), "the problem visits a pair twice"
                mask[h, rows, keys] = True if n < index.num_full[h, i] else is_seen
        return mask

    def keys_per_head(self):
        """k and v as each query head sees them, extra rows included: a problem of its own with ratio 1."""
        ratio = self.q.shape[0] // self.k.shape[0]
        pairs = ((self.k, self.kwargs["k_extra"]), (self.v, self.kwargs["v_extra"]))
        return tuple(np.concatenate([np.repeat(x, ratio, axis=0), extra], axis=1) for x, extra in pairs)


def random_problem(rng, *, heads=4, kv_heads=2, head_dim=16, t=40, s=56, x=16, block_q=8, block_kv=8, granule=4,
    dtype="float32",
):  # fmt: skip
    """A problem with ragged lists, unaligned starts, intervals, extra rows, key positions per head, and padding."""
    kv_pos = np.stack([np.sort(rng.permutation(3 * (s + x))[: s + x]) for _ in range(2)]).astype(np.int32)
    kv_pos[:, s - 5 : s] = PAD_KV_POS
    kv_pos[:, s:] = np.where(rng.random((2, x)) < 0.3, PAD_KV_POS, rng.integers(0, 2 * s, (2, x)))
    q_pos = np.stack([np.sort(rng.permutation(3 * (s + x))[:t]) for _ in range(heads)]).astype(np.int32)
    q_pos[:, -3:] = PAD_Q_POS
    num_q_blocks = t // block_q
    rows = [[_random_row(rng, s, x, block_kv, granule) for _ in range(num_q_blocks)] for _ in range(heads)]
    rows[0][1] = rows[-1][0] = []
    count = np.array([[len(row) for row in head] for head in rows], np.int32)
    lists = [np.concatenate([np.asarray(row, np.int32) for row in head]) for head in rows]
    start, interval = np.zeros((2, heads, max(map(len, lists)) + 2), np.int32)
    for h, entries in enumerate(lists):
        start[h, : len(entries)], interval[h, : len(entries)] = entries, rng.integers(0, 3, len(entries))
    num_full = np.minimum(count, rng.integers(0, 2, count.shape)).astype(np.int32)
    pos_row = rng.integers(0, 2, count.shape, dtype=np.int32)
    first = np.cumsum(count, axis=1, dtype=np.int32) - count
    for h, i in np.argwhere(num_full):  # a full block holds neither padding queries nor padding keys
        block = kv_pos[pos_row[h, i], start[h, first[h, i]] :][:block_kv]
        has_padding = (block == PAD_KV_POS).any() or (q_pos[h, i * block_q : (i + 1) * block_q] == PAD_Q_POS).any()
        num_full[h, i] = 0 if has_padding else 1
    arrays = [jnp.asarray(rng.normal(size=shape), dtype) for shape in
              ((heads, t, head_dim), *[(kv_heads, s, head_dim)] * 2, *[(heads, x, head_dim)] * 2)]  # fmt: skip
    index = BlockIndex(
        first=first, num_full=num_full, count=count, start=start, interval=interval,
        intervals=np.tile(np.asarray(INTERVALS, np.int32), (heads, 1, 1)), pos_row=pos_row,
        block_q=block_q, block_kv=block_kv,
    )  # fmt: skip
    kwargs = {"q_pos": q_pos, "kv_pos": kv_pos, "k_extra": np.asarray(arrays[3]), "v_extra": np.asarray(arrays[4])}
    return Problem(
        q=np.asarray(arrays[0]), k=np.asarray(arrays[1]), v=np.asarray(arrays[2]), index=index, kwargs=kwargs
    )


def _random_row(rng, s, x, block_kv, granule):
    """Starts of blocks that do not overlap, in steps of the granule, on either side of the seam, in random order."""
    starts = []
    for first, end in ((0, s), (s, s + x)):
        at = first + granule * int(rng.integers(0, 3))
        while at + block_kv <= end:
            starts.append(at)
            at += block_kv + granule * int(rng.integers(0, 4))
    return list(rng.permutation(starts)[: rng.integers(1, len(starts) + 1)]) if starts else []
