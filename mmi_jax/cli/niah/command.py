"""`mmi niah`: needles in haystacks of video and text, by length and depth, for methods at equal attention cost."""

from pathlib import Path
from typing import Annotated

import typer

from mmi_jax.cli import compile_cache
from mmi_jax.cli.errors import one_line_errors
from mmi_jax.cli.gpu_memory import NEARLY_ALL, take_memory
from mmi_jax.cli.options import (
    CacheDirOption,
    CostModelOption,
    DebugOption,
    DType,
    DTypeOption,
    HaystackOption,
    ModelOption,
)


def niah(
    model: ModelOption,
    output: Annotated[Path, typer.Option(help="Directory for results, tables and heat maps.")],
    task: Annotated[
        list[str] | None,
        typer.Option(help="Repeatable. Default: v-niah, mm-niah, middle, match; also: mm-middle, silent-match."),
    ] = None,
    haystack: HaystackOption = "generated",
    tokens: Annotated[list[int] | None, typer.Option(help="Length of the prompts; repeatable.")] = None,
    depths: Annotated[int, typer.Option(help="Number of needle depths, from first to last.")] = 5,
    samples: Annotated[int, typer.Option(help="Samples per task, length and depth.")] = 4,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="dense, minference, a-shape, tri-shape, sf-fixed, sf-strided, swin, block-topk, or NAME=TABLE.json."
        ),
    ] = None,
    table: Annotated[Path | None, typer.Option(help="Pattern table of the method 'ours'.")] = None,
    match_cost: Annotated[
        str | None,
        typer.Option(help="Method whose attention cost the baselines are sized to. Default: ours, if any."),
    ] = None,
    cost_tolerance: Annotated[
        float, typer.Option(help="Relative difference from that cost above which a baseline is marked.")
    ] = 0.1,
    cost_model: CostModelOption = None,
    dtype: DTypeOption = DType.bfloat16,
    batch: Annotated[int, typer.Option(help="Prompts per prefill.")] = 1,
    parallel_compilations: Annotated[
        int, typer.Option(help="Methods compiled in parallel; each takes the memory of a prefill.")
    ] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 100,
    cache_dir: CacheDirOption = None,
    debug: DebugOption = False,
) -> None:
    """Evaluate a model on needle-in-a-haystack tasks, sparse and dense. A stopped run resumes where it stopped."""
    with one_line_errors(shows_traceback=debug), compile_cache.compilation_cache_in(cache_dir):
        take_memory(NEARLY_ALL)
        from mmi_jax.cli.niah.options import NiahOptions, read_methods, read_tasks
        from mmi_jax.cli.niah.run import run_niah  # imported late: other commands start without models

        methods, tables = read_methods(method or [], table)
        run_niah(
            NiahOptions(
                model=model,
                tasks=read_tasks(task or []),
                haystack=haystack,
                tokens=tuple(sorted(set(tokens or [4096]))),
                num_depths=depths,
                samples=samples,
                methods=methods,
                tables=tables,
                matched_method=match_cost or next(iter(tables), None),
                cost_tolerance=cost_tolerance,
                output=output,
                dtype=dtype.value,
                cost_model=cost_model,
                batch=batch,
                parallel_compilations=parallel_compilations,
                seed=seed,
            )
        )
