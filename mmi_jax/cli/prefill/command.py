"""`mmi prefill`: a prompt with videos and images through a model, and what it cost."""

from pathlib import Path
from typing import Annotated

import jax
import typer

from mmi_jax.cli import compile_cache
from mmi_jax.cli.errors import one_line_errors
from mmi_jax.cli.gpu_memory import NEARLY_ALL, take_memory
from mmi_jax.cli.options import CacheDirOption, DebugOption, DType
from mmi_jax.cli.prefill.options import Outputs, PrefillTask, Sampling
from mmi_jax.method.patterns import Pattern
from mmi_jax.method.tables.pattern_json import parse
from mmi_jax.method.tables.pattern_table import PatternTable, load_table


def prefill(
    model: Annotated[str | None, typer.Option(help="Checkpoint directory, or a name on the Hugging Face hub.")] = None,
    video: Annotated[list[Path] | None, typer.Option(help="A video file; may be given several times.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="An image file; may be given several times.")] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Text. {video} and {image} mark where the next one goes; else media come first.")
    ] = None,
    fps: Annotated[
        float | None, typer.Option(help="Frames sampled per second of video: 2, or 4 for the demo, unless given.")
    ] = None,
    max_frames: Annotated[int | None, typer.Option(help="Frames sampled per video at most: 768 unless given.")] = None,
    dtype: Annotated[DType | None, typer.Option(help="bfloat16, or float32 for the demo, unless given.")] = None,
    table: Annotated[Path | None, typer.Option(help="A pattern for each layer and head: a JSON pattern table.")] = None,
    pattern: Annotated[str | None, typer.Option(help="One pattern for all heads: NAME[:field=value,...].")] = None,
    chunk_tokens: Annotated[int | None, typer.Option(help="Prompt tokens that go through the layers at once.")] = None,
    mesh: Annotated[bool, typer.Option("--mesh", help="Cut prompt, weights and cache over all devices.")] = False,
    distributed: Annotated[
        bool, typer.Option("--distributed", help="--mesh over all hosts of a slice: the same command on each of them.")
    ] = False,
    max_new_tokens: Annotated[int | None, typer.Option(help="Tokens to generate: 16, or 4 for the demo.")] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token; above, samples.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample among the fewest tokens that hold this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    compare_dense: Annotated[bool, typer.Option("--compare-dense", help="Run dense attention as well.")] = False,
    plots: Annotated[Path | None, typer.Option(help="Directory for pictures.")] = None,
    plot_layer: Annotated[int, typer.Option(help="Layer whose masks are drawn; the layers before it run again.")] = 0,
    profile: Annotated[
        Path | None, typer.Option(help="Directory for a profiler trace of a second prefill; prints its stages.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, everything else on stderr.")] = False,
    is_demo: Annotated[
        bool,
        typer.Option("--demo", help="A small trained model, a video, a question; compares with dense, writes plots."),
    ] = False,
    demo_dir: Annotated[Path, typer.Option(help="Where the demo keeps its plots.")] = Path("out/demo"),
    cache_dir: CacheDirOption = None,
    debug: DebugOption = False,
) -> None:
    """Prefill a prompt with sparse attention and decode an answer. A report says what was skipped, and what it cost."""
    # Here, so that the other commands start without the packages of models, media and pictures.
    from mmi_jax.cli.prefill import demo
    from mmi_jax.cli.prefill.run import run_prefill
    from models.demo import DEMO_FPS, DEMO_MODEL, DEMO_VIDEO
    from models.media.video import MAX_FRAMES

    with one_line_errors(shows_traceback=debug), compile_cache.kept_programs(cache_dir):
        take_memory(NEARLY_ALL)
        if distributed:
            jax.distributed.initialize()
        if is_demo:
            _check_demo(model)
            model, video = str(DEMO_MODEL), video or [DEMO_VIDEO]
        elif model is None:
            raise ValueError("prefill needs --model DIRECTORY_OR_HUB_NAME, or --demo: got neither")
        patterns = chosen_patterns(table, pattern)
        task = PrefillTask(
            model=model,
            videos=tuple(video or ()),
            images=tuple(image or ()),
            text=prompt if prompt is not None else demo.PROMPT if is_demo else "",
            fps=fps if fps is not None else float(DEMO_FPS) if is_demo else 2.0,
            max_frames=MAX_FRAMES if max_frames is None else max_frames,
            dtype=(dtype or (DType.float32 if is_demo else DType.bfloat16)).value,
            table=demo.demo_table() if is_demo and patterns is None else patterns,
            blocks=demo.BLOCKS if is_demo else None,
            chunk_tokens=chunk_tokens,
            compares_dense=compare_dense or is_demo,
            uses_mesh=mesh or distributed,
            sampling=Sampling(
                max_new_tokens=max_new_tokens if max_new_tokens is not None else demo.MAX_NEW_TOKENS if is_demo else 16,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
            ),
        )
        outputs = Outputs(
            plots=plots or (demo_dir if is_demo else None),
            plot_layer=plot_layer,
            profile=profile,
            is_json=json,
            note=demo.NOTE if is_demo else "",
            right_answer=demo.right_answer(task.text) if is_demo and video == [DEMO_VIDEO] else None,
        )
        run_prefill(task, outputs)


def _check_demo(model: str | None) -> None:
    if model is not None:
        raise ValueError(f"--demo brings its own model: expected no --model, got {model!r}")


def chosen_patterns(table: Path | None, pattern: str | None) -> PatternTable | Pattern | None:
    """The table or pattern that the options name; None for dense attention."""
    if table is not None and pattern is not None:
        raise ValueError(f"--table and --pattern exclude each other: got {str(table)!r} and {pattern!r}")
    if table is not None:
        return load_table(table)
    return None if pattern is None else parse(pattern)
