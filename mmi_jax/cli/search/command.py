"""`mmi search`: which pattern each head of a model gets, by error on the attention output and cost on a device."""

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
    FpsOption,
    HaystackOption,
    OptionalModelOption,
)
from mmi_jax.cli.search.options import Calibration, SearchOptions, SearchTarget


def search(
    output: Annotated[Path, typer.Option(help="Pattern table to write, JSON.")],
    model: OptionalModelOption = None,
    target_speedup: Annotated[
        float | None, typer.Option(help="Speed-up of attention over dense on every calibration prompt.")
    ] = None,
    target_density: Annotated[
        float | None, typer.Option(help="Fraction of the causal tiles that is visited, on every prompt.")
    ] = None,
    video: Annotated[list[Path] | None, typer.Option(help="Calibration video; repeatable.")] = None,
    prompt: Annotated[str, typer.Option(help="Question after each video.")] = "Describe this video.",
    fps: FpsOption = 2.0,
    max_frames: Annotated[int | None, typer.Option(help="Frames per video at most. Default: 768.")] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="Generated samples: v-niah, mm-niah, middle, mm-middle, match, silent-match; repeatable."),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Length of generated samples.")] = 25_000,
    samples: Annotated[int, typer.Option(help="Generated samples per task.")] = 1,
    haystack: HaystackOption = "generated",
    seed: Annotated[int, typer.Option(help="Seed of the generated samples.")] = 0,
    held_out: Annotated[
        list[Path] | None, typer.Option(help="Video that the table is validated on; repeatable.")
    ] = None,
    held_out_samples: Annotated[int, typer.Option(help="Generated samples per task that it is validated on.")] = 0,
    weight_by_importance: Annotated[
        bool,
        typer.Option(
            "--weight-by-importance", help="Weight a head's error by how much ablating the head changes the answers."
        ),
    ] = False,
    candidates: Annotated[
        str, typer.Option(help="Candidate patterns: table4, ours, all, or a JSON file with a list of patterns.")
    ] = "all",
    scale: Annotated[
        float, typer.Option(help="Factor on the candidates' sizes in tokens: Table 4 is for 25K tokens.")
    ] = 1.0,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="Pattern, by name, that no head may have; repeatable. The same journal serves."),
    ] = None,
    cost_model: CostModelOption = None,
    dtype: DTypeOption = DType.bfloat16,
    journal: Annotated[
        Path | None, typer.Option(help="File of finished trials, from which a stopped search resumes.")
    ] = None,
    from_minference: Annotated[Path | None, typer.Option(help="Only convert a table published by MInference.")] = None,
    cache_dir: CacheDirOption = None,
    debug: DebugOption = False,
) -> None:
    """Search a pattern for every head and write the table. A stopped search resumes where it stopped."""
    with one_line_errors(shows_traceback=debug), compile_cache.compilation_cache_in(cache_dir):
        take_memory(NEARLY_ALL)
        if from_minference is not None:
            convert(from_minference, output)
            return
        options = SearchOptions(
            model=_required(model),
            output=output,
            journal=journal or output.with_suffix(".work.jsonl"),
            target=SearchTarget(target_speedup=target_speedup, target_density=target_density),
            calibration=Calibration(
                videos=tuple(video or ()),
                held_out=tuple(held_out or ()),
                text=prompt,
                fps=fps,
                max_frames=max_frames,
                tasks=tuple(task or ()),
                tokens=tokens,
                samples=samples,
                held_out_samples=held_out_samples,
                haystack=haystack,
                seed=seed,
            ),
            weights_by_importance=weight_by_importance,
            candidates=candidates,
            scale=scale,
            excluded=frozenset(exclude or ()),
            cost_model=cost_model,
            dtype=dtype.value,
        )
        from mmi_jax.cli.search.run import run_search  # imported late: other commands start without models

        run_search(options)


def convert(source: Path, output: Path) -> None:
    """Writes a table of MInference's as one of ours."""
    from mmi_jax.search.baselines.minference import load_minference

    table = load_minference(source)
    table.save(output)
    print(f"wrote {output}: {table.num_layers} layers of {table.num_heads} heads")


def _required(model: str | None) -> str:
    if model is None:
        raise ValueError("search needs --model DIRECTORY_OR_HUB_NAME, or --from-minference FILE: got neither")
    return model
