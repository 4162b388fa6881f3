"""The compiled programs of one chunk: each made at most once in a process, different layers side by side."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from mmi_jax.engine.programs import executable_cache
from mmi_jax.engine.programs.layer_program import Program
from mmi_jax.method.patterns import Pattern
from mmi_jax.sharding import OWN_SPEC, shards_of

GPU_OPTIONS = {
    # XLA must not try to fit the program into 80 % of the memory: it computes things again and arranges the rest worse.
    # A prefill of a million tokens, 7B: 113.4 GiB as it is, 120.9 GiB after rematerialization (compiled for an H200).
    "xla_gpu_memory_limit_slop_factor": 1000,
    # Choosing how to emit the hundreds of small fusions of a plan is a third of the compiler's work and gains nothing:
    # 0.794 s for 32K tokens without, 0.797 s with it (7B, H200, 2026-11-26).
    "xla_gpu_experimental_enable_fusion_autotuner": False,
}


def compile_options() -> dict[str, Any] | None:
    """What the compiler of the default device is told."""
    return GPU_OPTIONS if jax.default_backend() == "gpu" else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunk:
    """The compiled programs of a chunk, see `Program`.

    Args:
      start, end: what is done before the layers and after them.
      layers: a program for each different layer.
    """

    program: Program
    num_kv_heads: int
    start: Any
    layers: Mapping[tuple[Pattern, ...], Any]
    end: Any

    def run_layers(self, numbers: Sequence[Any], states, rope_pos, layout, q_start, x, k, v):
        """Hidden states, caches and the statistics of every layer; nothing waits for the device.

        Args:
          numbers: of the layers, as arrays.
          states: of the model and of its layers.
          x, k, v: given up.
        """
        state, weights = states
        rotary, geometries = self.start(state, rope_pos, layout, q_start)
        shards = shards_of(self.program.mesh, num_kv_heads=self.num_kv_heads)
        shared = {row: (rotary, self.program.geometry_of(row, shards, geometries)) for row in self.layers}
        statistics = []
        for n, row in zip(numbers, self.program.layers, strict=True):
            x, k, v, found = self.layers[row](weights, n, shared[row], layout, q_start, x, k, v)
            statistics.append(found)
        return x, k, v, statistics


def compiled_chunk(program: Program, *args: Any) -> Chunk:
    """The programs of one chunk, see `compiled_chunks`."""
    return compiled_chunks([(program, args)])[0]


def compiled_chunks(tasks: Iterable[tuple[Program, tuple[Any, ...]]]) -> list[Chunk]:
    """The programs of several chunks, all of them compiled side by side.

    Tracing and lowering are Python's work and done in turn; the compiler works on what came before meanwhile.

    Args:
      tasks: a program, and its arguments `states, rope_pos, layout, q_start, x, k, v, wanted, hidden`: arrays, or
        shapes in their place.
    """
    with ThreadPoolExecutor() as pool:
        parts = _Parts(pool=pool)
        try:
            begun = [_begun(parts, program, *args) for program, args in tasks]
        finally:  # what was begun before a program that cannot be traced is kept, too
            parts.finish()
    return [
        dataclasses.replace(
            chunk,
            start=_COMPILED[chunk.start],
            layers={row: _COMPILED[key] for row, key in chunk.layers.items()},
            end=_COMPILED[chunk.end],
        )
        for chunk in begun
    ]


def _begun(parts: "_Parts", program: Program, states, rope_pos, layout, q_start, x, k, v, wanted, hidden) -> Chunk:
    """A chunk with keys in place of its programs, which are being compiled."""
    num_kv_heads, (state, weights) = k.shape[3], states
    shards = shards_of(program.mesh, num_kv_heads=num_kv_heads)
    starting = program.of(*program.geometry_rows(shards).values())
    start_args = state, rope_pos, layout, q_start
    start = parts.add(("start", starting), starting.start(state, num_kv_heads), start_args, program.mesh)
    layers = {}
    for row, args in layer_arguments(program, states, rope_pos, layout, q_start, x, k, v).items():
        of_row = program.of(row)
        layers[row] = parts.add(("layer", of_row), of_row.layer(weights, num_kv_heads), args, program.mesh)
    end_args = x, wanted, q_start, hidden
    end = parts.add(("end", program.mesh), program.end(num_kv_heads), end_args, program.mesh)
    return Chunk(program=program, num_kv_heads=num_kv_heads, start=start, layers=layers, end=end)


def layer_arguments(program: Program, states, rope_pos, layout, q_start, x, k, v) -> dict[tuple[Pattern, ...], tuple]:
    """The arguments of `Program.layer` for each different layer; what `start` makes of the others, as shapes."""
    num_kv_heads, (state, weights) = k.shape[3], states
    shards = shards_of(program.mesh, num_kv_heads=num_kv_heads)
    made = program.start(state, num_kv_heads).eval_shape(state, rope_pos, layout, q_start)
    number = jax.ShapeDtypeStruct((), np.int32)  # a sharding would bind what the program makes to its device
    if program.mesh is not None:
        number = jax.ShapeDtypeStruct((), np.int32, sharding=getattr(q_start, "sharding", None))
        own = NamedSharding(program.mesh, OWN_SPEC)
        made = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=own), made)
    rotary, geometries = made
    return {
        row: (weights, number, (rotary, program.geometry_of(row, shards, geometries)), layout, q_start, x, k, v)
        for row in program.rows
    }


def _read_or_compile(entry: Path, jitted: Any, args: tuple) -> Any:
    return executable_cache.read(entry, args) or _compile(jitted.lower(*args), entry)


def _compile(lowered: jax.stages.Lowered, entry: Path | None) -> Any:
    compiled = lowered.compile(compile_options())
    executable_cache.write(entry, compiled)
    return compiled


@dataclasses.dataclass
class _Parts:
    """Programs that are being compiled, by their keys in `_COMPILED`; those of one device are kept on disk."""

    pool: ThreadPoolExecutor
    futures: dict[Any, Any] = dataclasses.field(default_factory=dict)

    def add(self, what: tuple[str, Any], jitted: Any, args: tuple, mesh: Mesh | None) -> Any:
        """The key of a program for arguments of these shapes, which is compiled unless it was."""
        leaves, tree = jax.tree.flatten(args)
        key = (what, tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
        if key not in _COMPILED and key not in self.futures:
            entry = None if mesh is not None else executable_cache.entry_of(*what, args, compile_options())
            if entry is not None and entry.is_file():
                self.futures[key] = self.pool.submit(_read_or_compile, entry, jitted, args)
            else:
                self.futures[key] = self.pool.submit(_compile, jitted.lower(*args), entry)
        return key

    def finish(self) -> None:
        """Adds them to the programs of this process, those too beside one whose compiler raises; then raises that."""
        wait(self.futures.values())
        _COMPILED.update({key: future.result() for key, future in self.futures.items() if future.exception() is None})
        for future in self.futures.values():
            future.result()


def num_compiled_programs() -> int:
    """Programs of layers that prefill has compiled in this process: one for each shape and different layer."""
    return sum(key[0][0] == "layer" for key in _COMPILED)


def program_texts() -> list[str | None]:
    """The programs that prefill has compiled in this process, as their compiler writes them."""
    return [compiled.as_text() for compiled in _COMPILED.values()]


_COMPILED: dict[Any, Any] = {}


def pieces_of(statistics: Sequence[Any]) -> list[Any]:
    """The statistics of every piece of a chunk, `[layers, ...]`, from those of every layer, `[pieces, 1, ...]`."""
    joined = jax.tree.map(lambda *layers: np.concatenate(layers, axis=1), *statistics)
    return [jax.tree.map(lambda a, n=n: a[n], joined) for n in range(len(joined["num_queries"]))]
