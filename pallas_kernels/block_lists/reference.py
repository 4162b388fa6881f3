"""Reference block lists: the meaning, in plain loops over NumPy arrays."""

import jax
import jax.core
import numpy as np

from pallas_kernels.block_lists.inputs import BlockLists, ListInputs


def block_lists(inputs: ListInputs) -> BlockLists:
    """See `api.block_lists`."""
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(inputs)):
        raise NotImplementedError("the reference reads numbers: expected concrete arrays, got traced ones")
    x, size = jax.tree.map(np.asarray, inputs), inputs.blocks.kv
    overflows = np.maximum(x.runs.num_blocks, 0).sum() > x.capacity
    entries = [(n * size, 0) for n in range(x.num_shared)]
    rows: list[tuple[int, int, int, int]] = []  # first, num_full, count, pos_row
    for i, (q_min, q_max) in enumerate(zip(x.q_min.tolist(), x.q_max.tolist(), strict=True)):
        if x.takes_over[i] if overflows else x.visits_all[i]:
            rows.append((0, *_shared_blocks(x, q_min, q_max), 0))
            continue
        full, partial = [], []
        for start, num_blocks, interval in zip(x.runs.start[i], x.runs.num_blocks[i], x.runs.interval[i], strict=True):
            low, high = max(x.intervals[interval][0], 0), x.intervals[interval][1]
            for row in range(start, start + num_blocks * size, size) if not overflows else ():
                kv_pos = x.kv_pos[x.pos_row[i]][row : row + size]
                min_distance, max_distance = q_min - kv_pos.max(), q_max - kv_pos.min()
                if max_distance >= low and min_distance < high:
                    (full if min_distance >= low and max_distance < high else partial).append((row, interval))
        rows.append((0 if overflows else len(entries), len(full), len(full + partial), x.pos_row[i]))
        entries += full + partial
    entries += [(0, 0)] * (x.num_shared + x.capacity - len(entries))
    first, num_full, count, pos_row = np.array(rows, np.int32).T
    start, interval = np.array(entries, np.int32).T
    return BlockLists(first=first, num_full=num_full, count=count, start=start, interval=interval, pos_row=pos_row)


def _shared_blocks(x: ListInputs, q_min: int, q_max: int) -> tuple[int, int]:
    """How many of the shared blocks are full from the first one on, and how many reach up to the diagonal."""
    blocks = [x.kv_pos[0][n * x.blocks.kv : (n + 1) * x.blocks.kv] for n in range(x.num_shared)]
    count = max((n + 1 for n, pos in enumerate(blocks) if pos.min() <= q_max), default=0)
    num_full = next((n for n, pos in enumerate(blocks) if pos.max() > q_min), len(blocks))
    return min(num_full, count), count
