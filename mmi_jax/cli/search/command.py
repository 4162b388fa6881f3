"""`mmi search`: which pattern each head of a model gets, by error on the attention output and cost on a device."""

from pathlib import Path
from typing import Annotated

import typer

from mmi_jax.cli import compile_cache
from mmi_jax.cli.errors import one_line_errors
from mmi_jax.cli.gpu_memory import NEARLY_ALL, take_memory
from mmi_jax.cli.options import CacheDirOption, CostsOption, DebugOption, DType
from mmi_jax.cli.search.options import Calibration, Dial, SearchTask


def search(
    output: Annotated[Path, typer.Option(help="The pattern table to write, JSON.")],
    model: Annotated[str | None, typer.Option(help="Checkpoint directory, or a name on the Hugging Face hub.")] = None,
    target_speedup: Annotated[
        float | None, typer.Option(help="Attention so many times as fast as dense, on every calibration prompt.")
    ] = None,
    target_density: Annotated[
        float | None, typer.Option(help="Visited tiles, as a share of all causal ones, on every prompt.")
    ] = None,
    video: Annotated[list[Path] | None, typer.Option(help="A calibration video; several give several samples.")] = None,
    prompt: Annotated[str, typer.Option(help="The question that follows each video.")] = "Describe this video.",
    fps: Annotated[float, typer.Option(help="Frames sampled per second of video.")] = 2.0,
    max_frames: Annotated[int | None, typer.Option(help="Frames sampled per video at most: 768 unless given.")] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="Generated samples: v-niah, mm-niah, middle, mm-middle, match, silent-match."),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Length of generated samples.")] = 25_000,
    samples: Annotated[int, typer.Option(help="Generated samples of each task.")] = 1,
    haystack: Annotated[str, typer.Option(help="'generated', or a folder of videos.")] = "generated",
    seed: Annotated[int, typer.Option(help="Of the generated samples.")] = 0,
    held_out: Annotated[list[Path] | None, typer.Option(help="A video to check the table on afterwards.")] = None,
    held_out_samples: Annotated[int, typer.Option(help="Generated samples of each task to check it on.")] = 0,
    weigh: Annotated[
        bool, typer.Option("--weigh", help="Errors of heads count by what cutting down the head does to the answers.")
    ] = False,
    candidates: Annotated[str, typer.Option(help="table4, ours, all, or a JSON file with a list of patterns.")] = "all",
    scale: Annotated[float, typer.Option(help="Factor on all sizes in tokens: Table 4 is made for 25K tokens.")] = 1.0,
    exclude: Annotated[
        list[str] | None, typer.Option(help="A pattern that no head may have, by name; uses the same work file.")
    ] = None,
    costs: CostsOption = None,
    dtype: Annotated[DType, typer.Option(help="Type the model computes in.")] = DType.bfloat16,
    work: Annotated[Path | None, typer.Option(help="Finished pieces, for going on after a kill.")] = None,
    from_minference: Annotated[
        Path | None, typer.Option(help="Only convert a per-head table that MInference published.")
    ] = None,
    cache_dir: CacheDirOption = None,
    debug: DebugOption = False,
) -> None:
    """Find a pattern for every head and write the table. A killed search goes on where it stopped."""
    with one_line_errors(shows_traceback=debug), compile_cache.kept_programs(cache_dir):
        take_memory(NEARLY_ALL)
        if from_minference is not None:
            convert(from_minference, output)
            return
        found = SearchTask(
            model=_needed(model),
            output=output,
            work=work or output.with_suffix(".work.jsonl"),
            dial=Dial(target_speedup=target_speedup, target_density=target_density),
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
            weigh=weigh,
            candidates=candidates,
            scale=scale,
            excluded=frozenset(exclude or ()),
            costs=costs,
            dtype=dtype.value,
        )
        from mmi_jax.cli.search.run import run_search  # here, so that the other commands start without models

        run_search(found)


def convert(source: Path, output: Path) -> None:
    """Writes a table of MInference's as one of ours."""
    from mmi_jax.search.baselines.minference import load_minference

    table = load_minference(source)
    table.save(output)
    print(f"wrote {output}: {table.num_layers} layers of {table.num_heads} heads")


def _needed(model: str | None) -> str:
    if model is None:
        raise ValueError("search needs --model DIRECTORY_OR_HUB_NAME, or --from-minference FILE: got neither")
    return model
