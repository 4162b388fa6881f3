"""`mmi niah`: needles in haystacks of video and text, by length and depth, for methods at equal attention cost."""

from pathlib import Path
from typing import Annotated

import typer

from mmi_jax.cli import compile_cache
from mmi_jax.cli.errors import one_line_errors
from mmi_jax.cli.gpu_memory import NEARLY_ALL, take_memory
from mmi_jax.cli.options import CacheDirOption, CostsOption, DebugOption, DType


def niah(
    model: Annotated[str, typer.Option(help="Checkpoint directory, or a name on the Hugging Face hub.")],
    output: Annotated[Path, typer.Option(help="Directory for cells, tables and heat maps.")],
    task: Annotated[
        list[str] | None,
        typer.Option(help="v-niah, mm-niah, middle, match (these four unless given), mm-middle, silent-match."),
    ] = None,
    haystack: Annotated[str, typer.Option(help="'generated', or a folder of videos.")] = "generated",
    tokens: Annotated[list[int] | None, typer.Option(help="Length of the prompts; may be given several times.")] = None,
    depths: Annotated[int, typer.Option(help="Depths of the needle, from the first to the last place.")] = 5,
    samples: Annotated[int, typer.Option(help="Samples of each task, length and depth.")] = 4,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="dense, minference, a-shape, tri-shape, sf-fixed, sf-strided, swin, block-topk, or NAME=TABLE.json."
        ),
    ] = None,
    table: Annotated[Path | None, typer.Option(help="The table of the method 'ours'.")] = None,
    match_cost: Annotated[
        str | None, typer.Option(help="The method whose cost the baselines are brought to: 'ours' if there is one.")
    ] = None,
    margin: Annotated[
        float, typer.Option(help="Share by which a baseline's cost may differ before it is marked.")
    ] = 0.1,
    costs: CostsOption = None,
    dtype: Annotated[DType, typer.Option(help="Type the model computes in.")] = DType.bfloat16,
    batch: Annotated[int, typer.Option(help="Prompts of one prefill.")] = 1,
    side_by_side: Annotated[int, typer.Option(help="Methods compiled at once; memory for as many prefills.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 100,
    cache_dir: CacheDirOption = None,
    debug: DebugOption = False,
) -> None:
    """Measure how often a model finds what it is asked for. A killed run goes on where it stopped."""
    with one_line_errors(shows_traceback=debug), compile_cache.kept_programs(cache_dir):
        take_memory(NEARLY_ALL)
        from mmi_jax.cli.niah.options import NiahTask, read_methods, read_tasks
        from mmi_jax.cli.niah.run import run_niah  # here, so that the other commands start without models

        methods, tables = read_methods(method or [], table)
        run_niah(
            NiahTask(
                model=model,
                tasks=read_tasks(task or []),
                haystack=haystack,
                tokens=tuple(sorted(set(tokens or [4096]))),
                num_depths=depths,
                samples=samples,
                methods=methods,
                tables=tables,
                match_to=match_cost or next(iter(tables), None),
                margin=margin,
                output=output,
                dtype=dtype.value,
                costs=costs,
                batch=batch,
                side_by_side=side_by_side,
                seed=seed,
            )
        )
