"""The roofline lower bound on a prefill's time on a mesh of TPUs: what its busiest device must compute and move."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmi_jax.aot.bundles import KernelSchedule, Region
from mmi_jax.aot.compile_ahead import Target
from mmi_jax.bench.synthetic import video_prompt
from mmi_jax.engine.memory.chips import Chip
from mmi_jax.method.patterns import Dense, Pattern
from mmi_jax.method.plan import plan_heads, prompt_geometry

DENSE = Dense()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """Work of the busiest device in a whole prefill.

    Args:
      matmul_flops: of the projections and the MLP.
      tiles: of block_q queries and block_kv keys that its kernel visits.
      hbm_bytes, link_bytes: to and from its memory, and over its links, by what is moved.
    """

    matmul_flops: float
    tiles: float
    hbm_bytes: dict[str, float]
    link_bytes: dict[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowerBound:
    """Roofline lower bound in seconds, by what the device waits for; its parts overlap at best."""

    matmul: float
    attention: float
    hbm: float
    links: float

    @property
    def seconds(self) -> float:
        """The lower bound of all: units that work at once, each never idle."""
        return max(self.matmul + self.attention, self.hbm, self.links)


def work_of(target: Target, num_tokens: int, *, density: float) -> Work:
    """Work in all layers of the last sequence piece, which attends to the most keys.

    Args:
      density: fraction of the causal tiles that a head visits whose pattern is chosen when the prompt is seen.
    """
    config, shards = target.model.config, target.shards
    item = jnp.dtype(target.dtype).itemsize
    layers, width, head_dim = config.num_layers, config.embed_dim, config.head_dim
    weights = sum(leaf.size for leaf in jax.tree.leaves(nnx.split(target.model.layers)[1]))
    tokens, queries = num_tokens / shards.num_devices, num_tokens / shards.sequence
    heads, kv_heads = config.num_heads / shards.heads, config.num_kv_heads / shards.heads
    tiles = _busiest_tiles(target, num_tokens, density)
    elsewhere = 1 - 1 / shards.num_devices
    key_bytes = 2 * head_dim * item  # of one token of one kv head, its value included
    return Work(
        matmul_flops=2.0 * weights * tokens,
        tiles=tiles,
        hbm_bytes={
            "weights": (1 + elsewhere) * weights * item,  # read, and those of other devices written before
            "visited keys and values": tiles * target.blocks.kv * key_bytes,
            "queries and outputs": 2 * layers * queries * heads * head_dim * item,
            "cache": layers * queries * kv_heads * key_bytes,
            "activations": 4 * layers * tokens * width * item,  # read and written around attention and around the MLP
        },
        link_bytes={
            "weights": elsewhere * weights * item,
            "keys and values": layers * kv_heads * key_bytes * (num_tokens - queries),
            "heads": layers
            * (1 - 1 / shards.heads)
            * tokens
            * (2 * config.num_heads * head_dim * item + config.num_kv_heads * key_bytes),
        },
    )


def lower_bound(work: Work, chip: Chip, *, cycles_per_tile: float, devices_per_chip: int) -> LowerBound:
    """The roofline lower bound of that work on one of the chip's devices."""
    fraction = 1 / devices_per_chip
    cores = chip.cores * fraction
    return LowerBound(
        matmul=work.matmul_flops / (chip.flops_per_second * fraction),
        attention=work.tiles * cycles_per_tile / (chip.clock * cores),
        hbm=sum(work.hbm_bytes.values()) / (chip.hbm_bytes_per_second * fraction),
        links=sum(work.link_bytes.values()) / (chip.link_bytes_per_second * fraction),
    )


def cycles_per_tile(
    schedule: KernelSchedule, chip: Chip, *, tile: dict[str, int], block_kv: int, head_dim: int
) -> float:
    """Bundles that the kernel's fastest compute region issues for one visited block of `block_kv` keys.

    A region computes a whole tile of `block_q` x `tile_kv`, or a step of it: how many steps make a tile follows from
    the products its matrix-unit slots can hold.
    """
    flops = 4 * tile["block_q"] * tile["tile_kv"] * head_dim
    flops_per_bundle = chip.flops_per_cycle * min(1, head_dim / chip.mxu_width)  # with all slots of the unit in use

    def of_tile(region: Region) -> int:
        slots = region.used["MXU"] / region.capacity["MXU"]
        return max(1, round(flops / (flops_per_bundle * slots))) * region.bundles

    return min(map(of_tile, compute_regions(schedule))) * block_kv / tile["tile_kv"]


def compute_regions(schedule: KernelSchedule) -> list[Region]:
    """The regions with most of the matrix products: those with at least half of the slots of the fullest."""
    fullest = max(region.used["MXU"] for region in schedule.regions)
    return [region for region in schedule.regions if region.used["MXU"] >= max(fullest / 2, 1)]


def _busiest_tiles(target: Target, num_tokens: int, density: float) -> float:
    """Tiles that the last sequence piece visits in all layers, in the group of heads with most of them."""
    tiles = functools.cache(lambda pattern: _tiles(target, pattern, num_tokens))

    def of_head(pattern: Pattern) -> float:
        return density * tiles(DENSE) if pattern.reads_scores else tiles(pattern)

    width = target.table.num_heads // target.shards.heads
    totals = np.zeros(target.shards.heads)
    for patterns in target.table.layers:
        totals += [sum(map(of_head, patterns[n * width : (n + 1) * width])) for n in range(target.shards.heads)]
    return float(totals.max())


def _tiles(target: Target, pattern: Pattern, num_tokens: int) -> float:
    """Tiles that one head with a static pattern visits for the last piece's queries of a video prompt."""
    layout = jax.tree.map(jnp.asarray, video_prompt(num_tokens))
    num_queries, blocks = num_tokens // target.shards.sequence, target.blocks

    def visited(layout):
        geometry = prompt_geometry(
            layout, (pattern,), num_queries=num_queries, q_start=num_tokens - num_queries, blocks=blocks
        )
        q, k = (jnp.zeros((n, 1, 1)) for n in (num_queries, num_tokens))
        return plan_heads((pattern,), q, k, geometry, scale=1.0, blocks=blocks).index.visited_tiles()

    return float(jax.jit(visited)(layout)[0])


def assumptions(patterns: Sequence[Pattern], density: float) -> list[str]:
    """Assumptions of the lower bound, as sentences."""
    sentences = [
        "Each unit is never idle: matrix units at their peak in projections, the kernel at the bundles of its fastest "
        "compute region with one bundle a cycle, memory and links at their published rates, all of them at once.",
        "Left out: estimates and lists of dynamic patterns, reordering of queries, waits for copies, the recall "
        "measurement, embedding, vision tower and head.",
        "Fixed patterns visit what they visit on a video of 16 x 16 tokens a frame with text around it.",
    ]
    if any(pattern.reads_scores for pattern in patterns):
        sentences.append(f"A pattern that is chosen when the prompt is seen visits {density:.1%} of the causal tiles.")
    return sentences


def roofline_json(work: Work, bound: LowerBound) -> dict[str, Any]:
    """Both as JSON values."""
    rounded = {name: float(f"{value:.4g}") for name, value in dataclasses.asdict(bound).items()}
    return {"work": dataclasses.asdict(work), "lower_bound_seconds": rounded | {"all": float(f"{bound.seconds:.4g}")}}
