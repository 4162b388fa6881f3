"""The search for the Hopper kernel's configs: every candidate is checked, then timed."""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mmi_jax.bench.checks.sampled_rows import sample
from mmi_jax.bench.timing.measurements import reason, tile_flops
from mmi_jax.bench.timing.wall_time import Program, compile_lowered
from pallas_kernels.attention.cases import AllVisited, AttentionCase, RandomLists
from pallas_kernels.attention.hopper import mosaic_gpu
from pallas_kernels.attention.hopper.gpu_config import CONFIGS, HEAD_DIMS, HopperConfig
from pallas_kernels.attention.inputs import AttentionInputs
from pallas_kernels.hopper import SHARED_MEMORY_BYTES

STAGES = ((2, 2), (3, 2), (3, 3), (4, 4), (6, 6))
"""K and V tiles in flight that are tried: K is needed a step before V."""

OTHER_FIELDS: dict[str, tuple[int | bool, ...]] = {
    "stagger": (0, 7),
    "lengths_per_octave": (1,),
    "fixed_max": (False,),
    "ping_pong": (True,),
}
"""Other fields of a config and their other values, one at a time, in the `NUM_VARIED` best of the sizes."""

NUM_VARIED = 2
NUM_FINALISTS = 3
"""Configs in addition to the built-in ones that are timed on every kind of list."""

NUM_SCREENED = 2
"""Measurements of every candidate on random lists: a card slows down while it warms up, so they are round-robin."""

SHORT_ROW = 24
"""Blocks in each row of the short lists: what a row of a sparse plan visits."""

type Compile = Callable[[Sequence[HopperConfig], AttentionInputs], Mapping[HopperConfig, Program | Exception]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuneProblem:
    """The problem that a config is searched for: head dim, heads, and the sizes it is tried on; lengths in tokens."""

    head_dim: int
    num_q_heads: int
    num_kv_heads: int
    num_tokens: int = 2**15
    block_kv: int = 128
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"

    def __post_init__(self):
        """Raises ValueError for a head dim the kernel pads, heads that do not divide, and blocks it cannot cut."""
        if self.head_dim not in HEAD_DIMS:
            raise ValueError(f"head_dim must be one the kernel runs at: 64, 128 or 256, got {self.head_dim}")
        if self.num_q_heads % self.num_kv_heads:
            raise ValueError(f"query heads must be a multiple of kv heads, got {self.num_q_heads}/{self.num_kv_heads}")
        if self.block_kv < 64 or self.block_kv % 64:
            raise ValueError(f"block_kv must be a multiple of 64, got {self.block_kv}")
        if self.block_kv > self.num_tokens:
            raise ValueError(f"block_kv must be at most num_tokens={self.num_tokens}, got {self.block_kv}")

    @property
    def label(self) -> str:
        """As in "d128 28/4"."""
        return f"d{self.head_dim} {self.num_q_heads}/{self.num_kv_heads}"

    def inputs(self) -> dict[str, AttentionInputs]:
        """The same q, k, v over random lists, half of the causal blocks at most, short random lists, and all blocks.

        Lists are padded to one length, so that one program serves all.
        """
        half = max(1, self.num_tokens // self.block_kv // 2)
        random, short = RandomLists(blocks_per_row=half), RandomLists(blocks_per_row=min(half, SHORT_ROW))
        case = AttentionCase(
            name=self.label,
            num_tokens=self.num_tokens,
            lists=random,
            num_q_heads=self.num_q_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
            block=self.block_kv,
        )
        inputs = case.inputs()
        most = inputs.index.start.shape[1]

        def over(lists):
            index = lists.index(self.num_q_heads, self.num_tokens, self.block_kv)
            missing = most - index.start.shape[1]
            start, interval = (jnp.asarray(np.pad(x, ((0, 0), (0, missing)))) for x in (index.start, index.interval))
            index = dataclasses.replace(jax.tree.map(jnp.asarray, index), start=start, interval=interval)
            return dataclasses.replace(inputs, index=index)

        return {"random": inputs, "short": over(short), "all": over(AllVisited())}


def sizes(problem: TuneProblem) -> list[HopperConfig]:
    """The built-in configs of this head dim, and others in tiles and stages whose declaration fits the shared memory.

    One q buffer is tried only where it buys stages for which two leave no memory.
    """
    fits = lambda config: config.shared_memory_bytes(problem.head_dim, problem.dtype) <= SHARED_MEMORY_BYTES  # noqa: E731
    tiles = [tile for tile in (128, 64) if problem.block_kv % tile == 0]
    built_in = {tile: config for (d, tile), config in CONFIGS.items() if d == problem.head_dim and tile in tiles}
    configs = list(built_in.values())
    for tile, (k, v) in itertools.product(tiles, STAGES):
        base = built_in.get(tile, configs[0])  # what a size does not say stays as it is built in
        two = dataclasses.replace(base, tile_kv=tile, num_k_stages=k, num_v_stages=v, num_q_buffers=2)
        configs.append(two if fits(two) else dataclasses.replace(two, num_q_buffers=1))
    return list(dict.fromkeys(filter(fits, configs)))


def variants(configs: Sequence[HopperConfig]) -> list[HopperConfig]:
    """Each of these configs with one of `OTHER_FIELDS` changed."""
    changes = ({name: value} for name, values in OTHER_FIELDS.items() for value in values)
    changed = [dataclasses.replace(config, **change) for change in changes for config in configs]
    return [config for config in dict.fromkeys(changed) if config not in configs]


def compile_configs(
    configs: Sequence[HopperConfig], inputs: AttentionInputs
) -> Mapping[HopperConfig, Program | Exception]:
    """The kernel with each config, compiled in parallel; the error in place of one that cannot be."""

    def attempt(fun, *args):
        try:
            return fun(*args)
        except Exception as error:  # a config the compiler refuses must not end the search
            return error

    def lower(config):
        return jax.jit(lambda inputs: mosaic_gpu.launch(inputs, config)).lower(inputs)

    lowered = [attempt(lower, config) for config in configs]
    with ThreadPoolExecutor() as pool:
        compiled = pool.map(lambda x: x if isinstance(x, Exception) else attempt(compile_lowered, x), lowered)
        return dict(zip(configs, compiled, strict=True))


def tune(problem: TuneProblem, *, repeats: int, compile_all: Compile = compile_configs) -> dict[str, Any]:
    """The ranking of the candidates, best first, and the figures of the best.

    Every candidate is checked against float64 on each kind of list before it is timed there; one that is wrong or
    cannot run is at the end of the ranking with the reason, and is never chosen.

    Raises:
      RuntimeError: no candidate gives a right output.
    """
    inputs = problem.inputs()
    expected = {name: sample(x) for name, x in inputs.items()}
    programs: dict[HopperConfig, Program | Exception] = {}

    def program_of(config: HopperConfig):
        program = programs[config]
        if isinstance(program, Exception):
            raise program
        return program

    def check(config: HopperConfig, name: str) -> None:
        rows = expected[name]
        out, lse = program_of(config)(inputs[name])
        rows.check(rows.of(out), rows.of(lse), dtype=problem.dtype)

    def rate(config: HopperConfig, name: str) -> float:
        """TFLOP/s on one kind of list, measured once."""
        return tile_flops(inputs[name]) / program_of(config).time(inputs[name], repeats=1).median_ms / 1e9

    def screen(configs: Sequence[HopperConfig]):
        programs.update(compile_all(configs, inputs["random"]))
        return _rates(configs, ("random",), NUM_SCREENED, check, rate)

    screened, failed = screen(sizes(problem))
    fastest = sorted(screened, key=lambda config: -screened[config]["random"])
    more, more_failed = screen(variants(fastest[:NUM_VARIED]))
    screened, failed = screened | more, failed | more_failed
    finalists = [c for (d, _), c in CONFIGS.items() if d == problem.head_dim and c in screened]
    finalists += sorted(screened.keys() - {*finalists}, key=lambda c: -screened[c]["random"])[:NUM_FINALISTS]
    finals, failed_late = _rates(finalists, tuple(inputs), repeats, check, rate)
    if not finals:
        raise RuntimeError(f"no config gives a right output: {'; '.join(sorted(set((failed | failed_late).values())))}")
    best = sorted(finals, key=lambda config: -_mean(finals[config]))
    others = sorted(screened.keys() - finals.keys() - failed_late.keys(), key=lambda c: -screened[c]["random"])
    ranking = [_ranked(config, finals[config]) for config in best] + [
        _ranked(config, screened[config]) for config in others
    ]
    ranking += [_ranked(config, {}) | {"error": why} for config, why in (failed | failed_late).items()]
    return {"case": problem.label, "tflops_per_s": round(_mean(finals[best[0]]), 2), "ranking": ranking}


def _rates(
    configs: Sequence[HopperConfig],
    names: Sequence[str],
    rounds: int,
    check: Callable[[HopperConfig, str], None],
    rate: Callable[[HopperConfig, str], float],
) -> tuple[dict[HopperConfig, dict[str, float]], dict[HopperConfig, str]]:
    """The median rate of each config on each kind of list, configs round-robin, and why the others have none."""
    rates: dict[HopperConfig, dict[str, list[float]]] = {config: {name: [] for name in names} for config in configs}
    failed = {}
    for n, name in itertools.product(range(rounds), names):
        for config in [config for config in configs if config not in failed]:
            try:
                if n == 0:
                    check(config, name)
                rates[config][name].append(rate(config, name))
            except Exception as error:  # a wrong or broken config must not end the search
                failed[config] = reason(error)
    right = [config for config in configs if config not in failed]
    return {config: {k: statistics.median(v) for k, v in rates[config].items()} for config in right}, failed


def _ranked(config: HopperConfig, rates: dict[str, float]) -> dict[str, Any]:
    rounded = {name: round(rate, 2) for name, rate in rates.items()}
    return {"config": dataclasses.asdict(config), "tflops_per_s": rounded}


def _mean(rates: dict[str, float]) -> float:
    """The geometric mean."""
    return math.exp(sum(map(math.log, rates.values())) / len(rates))
