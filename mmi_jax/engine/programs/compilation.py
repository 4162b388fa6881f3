"""The compiled programs of one chunk: each made at most once in a process, different layers side by side."""

import dataclasses
from collections.abc import Hashable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from mmi_jax.engine.programs import executable_cache
from mmi_jax.engine.programs.chunk_inputs import ChunkInputs
from mmi_jax.engine.programs.layer_program import Program
from mmi_jax.engine.programs.program_cache import PROGRAMS, ProgramKey
from mmi_jax.method.patterns import Pattern
from mmi_jax.sharding import PER_DEVICE_SPEC, shards_of
from pallas_kernels.notation import Array

type CompilerOptions = dict[str, str | bool | int | float]

GPU_OPTIONS: CompilerOptions = {
    # XLA must not try to fit the program into 80 % of the memory: it computes things again and arranges the rest worse.
    # A prefill of a million tokens, 7B: 113.4 GiB as it is, 120.9 GiB after rematerialization (compiled for an H200).
    "xla_gpu_memory_limit_slop_factor": 1000,
    # Choosing how to emit the hundreds of small fusions of a plan is a third of the compiler's work and gains nothing:
    # 0.794 s for 32K tokens without, 0.797 s with it (7B, H200, 2026-11-26).
    "xla_gpu_experimental_enable_fusion_autotuner": False,
}


def compile_options() -> CompilerOptions | None:
    """Options of the compiler of the default device."""
    return GPU_OPTIONS if jax.default_backend() == "gpu" else None


type Statistics = dict[str, np.ndarray]
"""Figures of layers: density and recall `[..., b, h]`; the queries behind them, and whether q, k are finite `[..., b]`.
"""

PREFILL_KINDS = ("start", "layer", "end")
"""Kinds of the programs of a chunk, see `Chunk`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunk:
    """The compiled programs of a chunk, see `Program`.

    Args:
      start, end: what is done before the layers and after them.
      layers: a program for each different layer.
    """

    program: Program
    num_kv_heads: int
    start: jax.stages.Compiled
    layers: Mapping[tuple[Pattern, ...], jax.stages.Compiled]
    end: jax.stages.Compiled

    def run(self, numbers: Sequence[Array], inputs: ChunkInputs):
        """Hidden states at `logit_places`, caches, and the statistics of every layer; does not wait for the device.

        Args:
          numbers: of the layers, as arrays.
          inputs: `x`, `k` and `v` of them are donated.
        """
        layout, q_start = inputs.layout, inputs.q_start
        rotary, geometries = self.start(inputs.state, inputs.rope_pos, layout, q_start)
        shards = shards_of(self.program.mesh, num_kv_heads=self.num_kv_heads)
        shared = {row: (rotary, self.program.geometry_of(row, shards, geometries)) for row in self.layers}
        x, k, v, statistics = inputs.x, inputs.k, inputs.v, []
        for n, row in zip(numbers, self.program.layers, strict=True):
            x, k, v, of_layer = self.layers[row](inputs.layer_state, n, shared[row], layout, q_start, x, k, v)
            statistics.append(of_layer)
        return self.end(x, inputs.logit_places, q_start, inputs.hidden), k, v, statistics


def compiled_chunk(program: Program, inputs: ChunkInputs) -> Chunk:
    """The programs of one chunk, see `compiled_chunks`."""
    return compiled_chunks([(program, inputs)])[0]


def compiled_chunks(chunks: Iterable[tuple[Program, ChunkInputs]]) -> list[Chunk]:
    """The programs of several chunks, all of them compiled side by side.

    Tracing and lowering hold Python's lock and are done one after another; meanwhile the compiler works on what came
    before.

    Args:
      chunks: programs and their inputs, arrays or shapes in their place.
    """
    with ThreadPoolExecutor() as pool:
        compilations = _Compilations(pool=pool)
        try:
            keys = [_begin(compilations, program, inputs) for program, inputs in chunks]
        finally:  # what was begun before a program that cannot be traced is kept, too
            compilations.finish()
    return [of_chunk.compiled() for of_chunk in keys]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ChunkKeys:
    """A chunk with keys in place of its programs, while they are being compiled."""

    program: Program
    num_kv_heads: int
    start: ProgramKey
    layers: Mapping[tuple[Pattern, ...], ProgramKey]
    end: ProgramKey

    def compiled(self) -> Chunk:
        """The chunk, once they are."""
        return Chunk(
            program=self.program,
            num_kv_heads=self.num_kv_heads,
            start=PROGRAMS[self.start],
            layers={row: PROGRAMS[key] for row, key in self.layers.items()},
            end=PROGRAMS[self.end],
        )


def _begin(compilations: "_Compilations", program: Program, inputs: ChunkInputs) -> _ChunkKeys:
    """Starts the compilation of a chunk's programs."""
    num_kv_heads, mesh = inputs.num_kv_heads, program.mesh
    shards = shards_of(mesh, num_kv_heads=num_kv_heads)
    starting = program.of(*program.geometry_rows(shards).values())
    start_args = inputs.state, inputs.rope_pos, inputs.layout, inputs.q_start
    start = compilations.add("start", starting, starting.start(inputs.state, num_kv_heads), start_args, mesh)
    layers = {}
    for row, args in layer_arguments(program, inputs).items():
        of_row = program.of(row)
        jitted = of_row.layer(inputs.layer_state, num_kv_heads)
        layers[row] = compilations.add("layer", of_row, jitted, args, mesh)
    end_args = inputs.x, inputs.logit_places, inputs.q_start, inputs.hidden
    end = compilations.add("end", mesh, program.end(num_kv_heads), end_args, mesh)
    return _ChunkKeys(program=program, num_kv_heads=num_kv_heads, start=start, layers=layers, end=end)


def layer_arguments(program: Program, inputs: ChunkInputs) -> dict[tuple[Pattern, ...], tuple]:
    """The arguments of `Program.layer` for each different layer; what `start` makes of the others, as shapes."""
    layout, q_start = inputs.layout, inputs.q_start
    shards = shards_of(program.mesh, num_kv_heads=inputs.num_kv_heads)
    start = program.start(inputs.state, inputs.num_kv_heads)
    outputs = start.eval_shape(inputs.state, inputs.rope_pos, layout, q_start)
    number = jax.ShapeDtypeStruct((), np.int32)  # a sharding would bind what the program makes to its device
    if program.mesh is not None:
        number = jax.ShapeDtypeStruct((), np.int32, sharding=getattr(q_start, "sharding", None))
        sharding = NamedSharding(program.mesh, PER_DEVICE_SPEC)
        outputs = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), outputs)
    rotary, geometries = outputs
    carried = layout, q_start, inputs.x, inputs.k, inputs.v
    return {
        row: (inputs.layer_state, number, (rotary, program.geometry_of(row, shards, geometries)), *carried)
        for row in program.rows
    }


def _read_or_compile(entry: Path, jitted: jax.stages.Wrapped, args: tuple) -> jax.stages.Compiled:
    return executable_cache.read(entry, args) or _compile(jitted.lower(*args), entry)


def _compile(lowered: jax.stages.Lowered, entry: Path | None) -> jax.stages.Compiled:
    compiled = lowered.compile(compile_options())
    executable_cache.write(entry, compiled)
    return compiled


@dataclasses.dataclass
class _Compilations:
    """Programs that are being compiled, on their way to `PROGRAMS`; those of one device are kept on disk, too."""

    pool: ThreadPoolExecutor
    futures: dict[ProgramKey, Future] = dataclasses.field(default_factory=dict)

    def add(
        self, kind: str, identity: Hashable, jitted: jax.stages.Wrapped, args: tuple, mesh: Mesh | None
    ) -> ProgramKey:
        """The key of a program for arguments of these shapes, which is compiled unless it was."""
        key = ProgramKey.of(kind, identity, args)
        if key not in PROGRAMS and key not in self.futures:
            entry = None if mesh is not None else executable_cache.entry_of(kind, identity, args, compile_options())
            if entry is not None and entry.is_file():
                self.futures[key] = self.pool.submit(_read_or_compile, entry, jitted, args)
            else:
                self.futures[key] = self.pool.submit(_compile, jitted.lower(*args), entry)
        return key

    def finish(self) -> None:
        """Adds them to the programs of this process, also where the compiler raises for another; then raises that."""
        wait(self.futures.values())
        PROGRAMS.add({key: future.result() for key, future in self.futures.items() if future.exception() is None})
        for future in self.futures.values():
            future.result()


def num_compiled_programs() -> int:
    """Programs of layers that prefill has compiled in this process: one for each shape and different layer."""
    return sum(1 for _ in PROGRAMS.of_kinds("layer"))


def program_texts() -> list[str | None]:
    """The programs that prefill has compiled in this process, as their compiler writes them."""
    return [compiled.as_text() for compiled in PROGRAMS.of_kinds(*PREFILL_KINDS)]


def pieces_of(statistics: Sequence[Statistics]) -> list[Statistics]:
    """The statistics of every piece of a chunk, `[layers, ...]`, from those of every layer, `[pieces, 1, ...]`."""
    joined = jax.tree.map(lambda *layers: np.concatenate(layers, axis=1), *statistics)
    return [jax.tree.map(lambda a, n=n: a[n], joined) for n in range(len(joined["num_queries"]))]
