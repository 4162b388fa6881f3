"""`mmi qa`: accuracy of a model and a table on a public video question answering set."""

from pathlib import Path
from typing import Annotated

import typer

from mmi_jax.cli import compile_cache
from mmi_jax.cli.errors import one_line_errors
from mmi_jax.cli.gpu_memory import NEARLY_ALL, take_memory
from mmi_jax.cli.options import (
    CacheDirOption,
    DebugOption,
    DType,
    DTypeOption,
    FpsOption,
    ModelOption,
    PatternOption,
    PatternTableOption,
    chosen_patterns,
)


def qa(
    model: ModelOption,
    dataset: Annotated[str, typer.Option(help="egoschema, video-mme, next-qa, activitynet-qa or perception-test.")],
    data: Annotated[
        Path, typer.Option(help="Directory of the data set, as published, with the videos anywhere below.")
    ],
    output: Annotated[
        Path, typer.Option(help="File of answers, one JSON line each, from which a stopped run resumes.")
    ],
    table: PatternTableOption = None,
    pattern: PatternOption = None,
    fps: FpsOption = 2.0,
    max_frames: Annotated[int, typer.Option(help="Frames per video at most.")] = 256,
    limit: Annotated[int | None, typer.Option(help="Number of questions, the first ones. Default: all.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of the answer to an open question.")] = 16,
    dtype: DTypeOption = DType.bfloat16,
    cache_dir: CacheDirOption = None,
    debug: DebugOption = False,
) -> None:
    """Evaluate a model on a public video question answering set. Choices by their logits, words by decoding."""
    with one_line_errors(shows_traceback=debug), compile_cache.compilation_cache_in(cache_dir):
        take_memory(NEARLY_ALL)
        from mmi_jax.cli.qa.run import QaOptions, run_qa  # imported late: other commands start without models

        run_qa(
            QaOptions(
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
