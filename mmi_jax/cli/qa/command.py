"""`mmi qa`: accuracy of a model and a table on a public video question answering set."""

from pathlib import Path
from typing import Annotated

import typer

from mmi_jax.cli import compile_cache
from mmi_jax.cli.errors import one_line_errors
from mmi_jax.cli.gpu_memory import NEARLY_ALL, take_memory
from mmi_jax.cli.options import CacheDirOption, DebugOption, DType
from mmi_jax.cli.prefill.command import chosen_patterns


def qa(
    model: Annotated[str, typer.Option(help="Checkpoint directory, or a name on the Hugging Face hub.")],
    dataset: Annotated[str, typer.Option(help="egoschema, video-mme, next-qa, activitynet-qa or perception-test.")],
    data: Annotated[Path, typer.Option(help="Its directory, as published, with the videos anywhere below.")],
    output: Annotated[Path, typer.Option(help="Answers, one JSON line each; a killed run goes on where it stopped.")],
    table: Annotated[Path | None, typer.Option(help="A pattern for each layer and head: a JSON pattern table.")] = None,
    pattern: Annotated[str | None, typer.Option(help="One pattern for all heads: NAME[:field=value,...].")] = None,
    fps: Annotated[float, typer.Option(help="Frames sampled per second of video.")] = 2.0,
    max_frames: Annotated[int, typer.Option(help="Frames sampled per video at most.")] = 256,
    limit: Annotated[int | None, typer.Option(help="Only the first so many questions.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Of the answer to an open question.")] = 16,
    dtype: Annotated[DType, typer.Option(help="Type the model computes in.")] = DType.bfloat16,
    cache_dir: CacheDirOption = None,
    debug: DebugOption = False,
) -> None:
    """Ask a model every question of a public set. It answers by the logits of the options' letters, or by decoding."""
    with one_line_errors(shows_traceback=debug), compile_cache.kept_programs(cache_dir):
        take_memory(NEARLY_ALL)
        from mmi_jax.cli.qa.run import QaTask, run_qa  # here, so that the other commands start without models

        run_qa(
            QaTask(
                model=model,
                dataset=dataset,
                directory=data,
                output=output,
                table=chosen_patterns(table, pattern),
                fps=fps,
                max_frames=max_frames,
                limit=limit,
                max_new_tokens=max_new_tokens,
                dtype=dtype.value,
            )
        )
