"""Named attention problems for tests and benchmarks: sizes, and how each builds its block lists.

Lists are built on the host with NumPy from one seed. Positions are the rows themselves, so every block left of the
diagonal is full and the block on the diagonal is partial.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.inputs import AttentionInputs
from pallas_kernels.block_index import NO_LIMIT, BlockIndex, index_from_block_mask
from pallas_kernels.notation import PAD_KV_POS, PAD_Q_POS


@dataclasses.dataclass(frozen=True, kw_only=True)
class AllVisited:
    """Every block at or left of the diagonal: dense causal attention. Rows share one ascending list."""

    def index(self, num_heads: int, num_tokens: int, block: int) -> BlockIndex:
        """The index of `num_heads` equal heads."""
        num_blocks = num_tokens // block
        rows = np.arange(num_blocks, dtype=np.int32)
        return _index(num_heads, block, np.zeros(num_blocks), rows, rows + 1, rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomLists:
    """The block on the diagonal and up to `blocks_per_row - 1` uniformly drawn blocks left of it, for each head.

    Args:
      blocks_per_row: length of a row's list, or the number of causal blocks where that is smaller.
      seed: of the generator.
    """

    blocks_per_row: int
    seed: int = 0

    def index(self, num_heads: int, num_tokens: int, block: int) -> BlockIndex:
        """The index, its own lists for each head."""
        rng = np.random.default_rng(self.seed)
        num_blocks = num_tokens // block
        count = np.minimum(np.arange(num_blocks) + 1, self.blocks_per_row)
        lists = np.stack([_random_rows(rng, count) for _ in range(num_heads)])
        return _index(num_heads, block, np.cumsum(count) - count, count - 1, count, lists)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomFraction:
    """The block on the diagonal and a uniformly drawn fraction of the blocks left of it, for each head.

    Args:
      fraction: of a row's causal blocks that it visits, the diagonal one included, rounded down but at least one block.
      seed: of the generator.
    """

    fraction: float
    seed: int = 0

    def index(self, num_heads: int, num_tokens: int, block: int) -> BlockIndex:
        """The index, its own lists for each head."""
        rng = np.random.default_rng(self.seed)
        causal = np.arange(num_tokens // block) + 1
        count = np.maximum((causal * self.fraction).astype(np.int64), 1)
        lists = np.stack([_random_rows(rng, count) for _ in range(num_heads)])
        return _index(num_heads, block, np.cumsum(count) - count, count - 1, count, lists)


def _random_rows(rng: np.random.Generator, count: np.ndarray) -> np.ndarray:
    """One after another, `count[i]` blocks of each row `i`: some left of the diagonal, ascending, and the diagonal."""
    draw = lambda i, n: np.sort(rng.choice(i, n, replace=False, shuffle=False))  # noqa: E731
    rows = (np.append(draw(i, c - 1), i) for i, c in enumerate(count))
    return np.concatenate(list(rows))


def _index(
    num_heads: int, block: int, first: np.ndarray, num_full: np.ndarray, count: np.ndarray, lists: np.ndarray
) -> BlockIndex:
    lists = np.broadcast_to(lists, (num_heads, lists.shape[-1])).astype(np.int32)
    per_head = lambda x: np.broadcast_to(np.asarray(x, np.int32), (num_heads, len(count)))  # noqa: E731
    return BlockIndex(
        first=per_head(first),
        num_full=per_head(num_full),
        count=per_head(count),
        start=lists * block,
        interval=np.zeros_like(lists),
        intervals=np.full((num_heads, 1, 2), (0, NO_LIMIT), np.int32),
        pos_row=per_head(np.zeros(len(count))),
        block_q=block,
        block_kv=block,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionCase:
    """One problem: sizes in heads and tokens, the element type, and the lists."""

    name: str
    num_tokens: int
    lists: AllVisited | RandomLists | RandomFraction
    num_q_heads: int = 28
    num_kv_heads: int = 4
    head_dim: int = 128
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    block: int = 128

    def inputs(self, seed: int = 0) -> AttentionInputs:
        """Normal q, k, v on the default device, positions in order, and the index."""
        q_key, k_key, v_key = jax.random.split(jax.random.key(seed), 3)
        draw = jax.jit(
            lambda key, h: jax.random.normal(key, (h, self.num_tokens, self.head_dim), self.dtype), static_argnums=1
        )
        pos = jnp.arange(self.num_tokens, dtype=jnp.int32)
        none = jnp.zeros((self.num_q_heads, 0, self.head_dim), self.dtype)
        return AttentionInputs(
            q=draw(q_key, self.num_q_heads),
            k=draw(k_key, self.num_kv_heads),
            v=draw(v_key, self.num_kv_heads),
            k_extra=none,
            v_extra=none,
            q_pos=jnp.broadcast_to(pos, (self.num_q_heads, self.num_tokens)),
            kv_pos=pos[None],
            index=jax.tree.map(jnp.asarray, self.lists.index(self.num_q_heads, self.num_tokens, self.block)),
            scale=self.head_dim**-0.5,
            has_zeroed_padding=True,
        )

    def flops(self, index: BlockIndex) -> float:
        """Floating-point operations of the visited tiles: QK and PV, both halves of a multiply-add counted."""
        return 4.0 * float(index.visited_tiles().sum()) * index.block_q * index.block_kv * self.head_dim


def _cases():
    random128 = RandomLists(blocks_per_row=128)
    # 28 query heads on 4 kv heads of 128 are Qwen2.5-VL 7B's; 32 on 8 another common ratio.
    for num_q_heads, num_kv_heads in ((28, 4), (32, 8)):
        for kilo_tokens in (32, 128):
            label = f"{num_q_heads}/{num_kv_heads} {kilo_tokens}K"
            for name, lists in (
                ("all", AllVisited()),
                ("random32", RandomLists(blocks_per_row=32)),
                ("random128", random128),
            ):
                yield AttentionCase(
                    name=f"{name} {label}",
                    num_tokens=kilo_tokens * 1024,
                    lists=lists,
                    num_q_heads=num_q_heads,
                    num_kv_heads=num_kv_heads,
                )
    yield AttentionCase(name="random128 28/4 1024K", lists=random128, num_tokens=2**20)
    for head_dim in (64, 256):
        yield AttentionCase(
            name=f"random128 28/4 32K d{head_dim}", lists=random128, num_tokens=2**15, head_dim=head_dim
        )
    for kilo_tokens in (4, 8, 16):  # short prompts, where dense attention is hard to beat
        for heads in ((28, 4), (32, 8)):
            yield AttentionCase(
                name=f"all {heads[0]}/{heads[1]} {kilo_tokens}K",
                num_tokens=kilo_tokens * 1024,
                lists=AllVisited(),
                num_q_heads=heads[0],
                num_kv_heads=heads[1],
            )
    # Short enough for dense attention under the mask of the lists: whose error is larger?
    yield AttentionCase(name="random8 28/4 4K", lists=RandomLists(blocks_per_row=8), num_tokens=4096)

    for kilo_tokens in (8, 64):  # sizes for a CPU; at 64K tokens dense attention would hold 137 GB of scores
        yield AttentionCase(
            name=f"cpu {kilo_tokens}K",
            num_tokens=kilo_tokens * 1024,
            lists=RandomFraction(fraction=0.1),
            num_q_heads=8,
            num_kv_heads=8,
            head_dim=64,
            dtype="float32",
        )


CASES = {case.name: case for case in _cases()}
"""Problems by name: `all`, or `random` with blocks per row, then heads and tokens; and two for a CPU."""


def mixed_inputs(
    *,
    num_q_heads: int = 2,
    num_kv_heads: int = 1,
    num_q_blocks: int = 3,
    num_shared: int = 512,
    num_extra: int = 128,
    head_dim: int = 64,
    dtype: str = "bfloat16",
    block_q: int = 128,
    block_kv: int = 128,
    steepness: float = 0.0,
    seed: int = 0,
) -> AttentionInputs:
    """A small problem that meets every rule of the contract at once.

    Random full and partial blocks, shared and extra, under three distance intervals; unsorted key positions, two rows
    of them; a q block that visits nothing and names no entry, one that visits a single block, a padded query, and
    padded keys whose k and v are NaN.

    With a `steepness` the scores of the first head grow along the keys, by many times it: far beyond those of any tile
    that is visited early.
    """
    rng, t = np.random.default_rng(seed), num_q_blocks * block_q
    index = _mixed_index(rng, (num_q_heads, num_q_blocks), (num_shared, num_extra), block_q=block_q, block_kv=block_kv)
    q_pos = np.sort(rng.integers(0, num_shared, (num_q_heads, t))).astype(np.int32)
    q_pos[-1, 5] = PAD_Q_POS
    kv_pos = np.stack([np.concatenate([np.arange(num_shared), rng.integers(0, num_shared, num_extra)])] * 2)
    kv_pos[:, num_shared - 10 : num_shared] = PAD_KV_POS
    kv_pos[1, :20] = PAD_KV_POS

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), dtype)

    k, v = (draw(num_kv_heads, num_shared, head_dim).at[:, num_shared - 10 :].set(jnp.nan) for _ in range(2))
    q = draw(num_q_heads, t, head_dim)
    if steepness:
        q, k = (
            q.at[0].set(jnp.abs(q[0])),
            jnp.abs(k) * jnp.linspace(0.0, steepness, num_shared)[None, :, None].astype(dtype),
        )
    return AttentionInputs(
        q=q,
        k=k,
        v=v,
        k_extra=draw(num_q_heads, num_extra, head_dim),
        v_extra=draw(num_q_heads, num_extra, head_dim),
        q_pos=jnp.asarray(q_pos),
        kv_pos=jnp.asarray(kv_pos.astype(np.int32)),
        index=jax.tree.map(jnp.asarray, index),
        scale=head_dim**-0.5,
    )


def _mixed_index(
    rng: np.random.Generator, rows: tuple[int, int], keys: tuple[int, int], *, block_q: int, block_kv: int
) -> BlockIndex:
    """The lists of `mixed_inputs`, on the host.

    Args:
      rows: query heads and q blocks.
      keys: shared and extra keys.
    """
    num_shared, num_extra = keys
    shape = (*rows, (num_shared + num_extra) // block_kv)
    is_visited = rng.random(shape) < 0.6
    is_visited[0, 0] = False
    # A list of one block is its own first and last tile: a kernel that overlaps q tiles takes another path there.
    is_visited[-1, -1] = np.arange(shape[-1]) == 1
    is_full = rng.random(shape) < 0.5
    is_full[..., [0, num_shared // block_kv - 1]] = False  # the blocks that hold padded keys
    index = index_from_block_mask(is_visited, is_full, block_q=block_q, block_kv=block_kv)
    unread = np.full((rows[0], 1), -1, np.int32)  # what an empty row names, or a list is padded with, is not read
    start = np.concatenate([index.start, unread], axis=1)
    intervals = np.array([[0, NO_LIMIT], [0, 200], [100, NO_LIMIT]], np.int32)
    return dataclasses.replace(
        index,
        first=np.where(index.count > 0, index.first, -1).astype(np.int32),
        start=start,
        intervals=np.broadcast_to(intervals, (rows[0], 3, 2)),
        interval=rng.integers(0, 3, start.shape).astype(np.int32),
        pos_row=rng.integers(0, 2, index.first.shape).astype(np.int32),
    )


def late_peak_inputs() -> AttentionInputs:
    """Three visited blocks: relative to the first, weights overflow in the second; the third outweighs them by 2**75.

    A kernel that measures weights against an early maximum overflows in full blocks, and must not take the partial one
    for the end of it.
    """
    case = AttentionCase(
        name="late peak", num_tokens=384, lists=AllVisited(), num_q_heads=2, num_kv_heads=1, head_dim=64
    )
    inputs = case.inputs()
    return dataclasses.replace(
        inputs,
        q=jnp.zeros_like(inputs.q).at[..., 0].set(16),
        k=jnp.zeros_like(inputs.k).at[:, 130, 0].set(44).at[:, 256, 0].set(70),  # weights of 2**127 and 2**202
        v=8 * inputs.v,
    )
