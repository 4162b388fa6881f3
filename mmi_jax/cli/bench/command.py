"""`mmi bench`: attention cases and whole plans, timed beside dense attention and peers.

JAX and torch share one GPU when peers are timed. Unless the environment says otherwise, JAX then takes memory as it
needs it (`XLA_PYTHON_CLIENT_PREALLOCATE=false`) and at most 70 % of the device (`XLA_PYTHON_CLIENT_MEM_FRACTION`), 92 %
without peers; torch has the rest. Arrays are freed between cases.
"""

import fnmatch
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, get_args

import jax
import typer

from mmi_jax.bench.attention import bench_attention
from mmi_jax.bench.baselines.dense_attention import best_dense
from mmi_jax.bench.checks.kernel_rules import RULE_CASES, check_rules
from mmi_jax.bench.checks.sampled_rows import ERROR_LIMIT
from mmi_jax.bench.plans import PLAN_CASES, PlanSizes, bench_plan
from mmi_jax.bench.tune import TuneProblem
from mmi_jax.bench.tuned_table import check_table, tune_and_keep
from mmi_jax.cli.bench import tables
from mmi_jax.cli.bench.run import Run, in_own_process, run_all
from mmi_jax.cli.errors import one_line_errors
from mmi_jax.cli.gpu_memory import ALONE, BESIDE_TORCH, take_memory
from pallas_kernels.attention.api import Implementation
from pallas_kernels.attention.cases import CASES
from pallas_kernels.attention.hopper import gpu_tuned
from pallas_kernels.device import has_hopper_gpu

app = typer.Typer(name="bench", help="Time kernels and whole prefills beside a baseline. Outputs are checked first.")

CaseOption = Annotated[
    list[str] | None, typer.Option("--case", help="A case by name, or a pattern such as 'all *'; may be repeated.")
]
ImplementationOption = Annotated[
    str | None, typer.Option(help="Backend: reference, xla, ...; mosaic_gpu on a GPU, else the first able one.")
]
RepeatsOption = Annotated[int, typer.Option(min=1, help="Measurements of each function.")]
BaselineOption = Annotated[bool, typer.Option(help="Also time dense attention, where it fits.")]
PeersOption = Annotated[bool, typer.Option("--peers", help="Also time torch's attention, where torch is installed.")]
JsonFileOption = Annotated[Path | None, typer.Option(help="Also write the JSON line here, after every case.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Stop at the first error and show its traceback.")]
DenseLimitOption = Annotated[int, typer.Option(min=1024, help="Tokens up to which dense attention is measured.")]


@app.command()
def attention(
    case: CaseOption = None,
    implementation: ImplementationOption = None,
    repeats: RepeatsOption = 5,
    baseline: BaselineOption = True,
    peers: PeersOption = False,
    dense_limit: DenseLimitOption = 2**18,
    own_process: Annotated[
        bool | None, typer.Option(help="A process for each case, for its peak memory; by default on a CPU.")
    ] = None,
    json_file: JsonFileOption = None,
    debug: DebugOption = False,
) -> None:
    """Block-sparse attention over given lists. By default the cases that suit the device."""

    def measure(name: str) -> dict[str, Any]:
        one = CASES[name]
        is_short = one.num_tokens <= dense_limit
        fits = baseline and is_short and _dense_fits(one.num_q_heads, one.num_tokens)
        return bench_attention(
            one, implementation=implementation, with_dense=fits, with_peers=peers and is_short, repeats=repeats  # pyright: ignore
        )  # fmt: skip

    with one_line_errors(shows_traceback=debug):
        check_known("--implementation", implementation, get_args(Implementation))
        take_memory(BESIDE_TORCH if peers else ALONE)
        on_cpu = jax.default_backend() == "cpu"
        names = _chosen(case, list(CASES), [n for n in CASES if n.startswith("cpu") == on_cpu])
        own = (on_cpu if own_process is None else own_process) and len(names) > 1
        flags = ["--baseline" if baseline else "--no-baseline", *(["--peers"] if peers else [])]
        flags += ["--implementation", implementation] if implementation else []
        flags += ["--dense-limit", str(dense_limit)]
        each = in_own_process(["attention", "--repeats", str(repeats), *flags]) if own else measure
        run_all([Run(name, name) for name in names], each, tables.attention_table, json_file, stops_at_error=debug)


@app.command()
def plans(
    case: CaseOption = None,
    tokens: Annotated[
        list[int] | None, typer.Option(min=1024, help="Tokens of the prompt; may be repeated. 128K on a GPU, else 8K.")
    ] = None,
    heads: Annotated[
        list[str] | None, typer.Option(help="Query and kv heads, as in 28/4; may be repeated. 28/4 on a GPU, else 4/2.")
    ] = None,
    head_dim: Annotated[int | None, typer.Option(min=64, help="Head dimension: 128 on a GPU, else 64.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16 or float16 on a GPU, else float32.")] = None,
    implementation: ImplementationOption = None,
    repeats: RepeatsOption = 5,
    baseline: BaselineOption = True,
    peers: PeersOption = False,
    dense_limit: DenseLimitOption = 2**17,
    json_file: JsonFileOption = None,
    debug: DebugOption = False,
) -> None:
    """Real plans on a video with planted structure. The parts apart, the whole as one program, dense beside it.

    Above --dense-limit the dense time is extrapolated by the square of the tokens, and labelled so.
    """

    def measure(run: tuple[str, PlanSizes]) -> dict[str, Any]:
        name, sizes = run
        dense = {}
        if baseline and _dense_fits(sizes.num_q_heads, sizes.num_tokens):
            dense = best_dense(*sizes.astuple(), limit=dense_limit, repeats=min(repeats, 3), with_peers=peers)
        figures = bench_plan(name, sizes, implementation=implementation, repeats=repeats) | dense  # pyright: ignore
        speedup = {"speedup": round(dense["dense_ms"] / figures["median_ms"], 3)} if "dense_ms" in dense else {}
        return figures | speedup

    with one_line_errors(shows_traceback=debug):
        check_known("--dtype", dtype, ERROR_LIMIT)
        check_known("--implementation", implementation, get_args(Implementation))
        take_memory(BESIDE_TORCH if peers else ALONE)
        on_gpu = jax.default_backend() == "gpu"
        names = _chosen(case, list(PLAN_CASES), list(PLAN_CASES))
        found = [
            PlanSizes(
                num_tokens=num_tokens,
                num_q_heads=num_q_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim or (128 if on_gpu else 64),
                dtype=dtype or ("bfloat16" if on_gpu else "float32"),
            )
            for num_tokens in tokens or [2**17 if on_gpu else 8192]
            for num_q_heads, num_kv_heads in map(_heads, heads or ["28/4" if on_gpu else "4/2"])
        ]
        runs = [Run(f"{name} {sizes.label}", (name, sizes)) for sizes in found for name in names]
        run_all(runs, measure, tables.plans_table, json_file, stops_at_error=debug)


@app.command()
def check(
    case: CaseOption = None,
    implementation: ImplementationOption = None,
    json_file: JsonFileOption = None,
    debug: DebugOption = False,
) -> None:
    """Every rule of the kernel's contract against the reference. Problems are small, and nothing is timed."""

    def measure(name: str) -> dict[str, Any]:
        return check_rules(name, implementation=implementation)  # pyright: ignore

    with one_line_errors(shows_traceback=debug):
        check_known("--implementation", implementation, get_args(Implementation))
        take_memory(ALONE)
        names = _chosen(case, list(RULE_CASES), list(RULE_CASES))
        runs = [Run(name, name) for name in names]
        run_all(runs, measure, tables.check_table, json_file, stops_at_error=debug, times_matmul=False)


@app.command("tune")
def tune_configs(
    head_dim: Annotated[
        list[int] | None, typer.Option(help="As the kernel runs it: 64, 128, 256, which is all of them unless given.")
    ] = None,
    heads: Annotated[list[str] | None, typer.Option(help="Query and kv heads; 28/4 and 32/8 unless given.")] = None,
    tokens: Annotated[int, typer.Option(min=1024, help="Tokens of the prompt.")] = 2**15,
    block_kv: Annotated[int, typer.Option(min=64, help="Rows of a kv block.")] = 128,
    repeats: RepeatsOption = 5,
    table: Annotated[Path, typer.Option(help="Where the best go, after every problem.")] = gpu_tuned.PATH,
    json_file: JsonFileOption = None,
    debug: DebugOption = False,
) -> None:
    """Search the Hopper kernel's configs. Outputs are checked, the ranking printed, the best kept in a table."""

    def measure(problem: TuneProblem) -> dict[str, Any]:
        return tune_and_keep(problem, table, repeats=repeats)

    with one_line_errors(shows_traceback=debug):
        take_memory(ALONE)
        if not has_hopper_gpu():
            raise NotImplementedError(f"tune needs a GPU of compute capability 9.x, got {jax.default_backend()=}")
        check_table(table)
        runs = [
            Run(problem.label, problem)
            for d in head_dim or (64, 128, 256)
            for num_q_heads, num_kv_heads in map(_heads, heads or ["28/4", "32/8"])
            for problem in [
                TuneProblem(
                    head_dim=d, num_q_heads=num_q_heads, num_kv_heads=num_kv_heads, num_tokens=tokens, block_kv=block_kv
                )
            ]
        ]
        run_all(runs, measure, tables.tune_table, json_file, stops_at_error=debug)


def _chosen(asked: list[str] | None, known: list[str], default: list[str]) -> list[str]:
    """The known names that the asked ones name or match, in the order asked."""
    if unknown := [name for name in asked or () if not fnmatch.filter(known, name)]:
        raise ValueError(f"unknown case {', '.join(unknown)}: known cases are {', '.join(known)}")
    return list(dict.fromkeys(n for name in asked for n in fnmatch.filter(known, name))) if asked else default


def check_known(option: str, value: str | None, known: Iterable[str]) -> None:
    """Raises ValueError for a value that is given and not known: once, before the cases run."""
    if value is not None and value not in (names := list(known)):
        raise ValueError(f"{option} must be one of {', '.join(names)}, got {value!r}")


def _heads(text: str) -> tuple[int, int]:
    """Query and kv heads from "28/4"."""
    numbers = text.split("/")
    if len(numbers) != 2 or not all(n.isdecimal() and int(n) for n in numbers):
        raise ValueError(f"--heads must be query heads / kv heads, as in 28/4: got {text!r}")
    return int(numbers[0]), int(numbers[1])


def _dense_fits(num_heads: int, num_tokens: int) -> bool:
    """Whether dense attention is worth trying: cuDNN needs no room, XLA holds all scores in float32."""
    if jax.default_backend() == "gpu":
        return True
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 3 * 4 * num_heads * num_tokens**2 < memory
