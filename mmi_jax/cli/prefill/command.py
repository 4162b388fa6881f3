"""`mmi prefill`: a prompt with videos and images through a model, and what it cost."""

from pathlib import Path
from typing import Annotated

import jax
import typer

from mmi_jax.cli import compile_cache
from mmi_jax.cli.errors import one_line_errors
from mmi_jax.cli.gpu_memory import NEARLY_ALL, take_memory
from mmi_jax.cli.options import (
    CacheDirOption,
    DebugOption,
    DType,
    OptionalModelOption,
    PatternOption,
    PatternTableOption,
    chosen_patterns,
)
from mmi_jax.cli.prefill.options import OutputOptions, RunOptions, SamplingOptions


def prefill(
    model: OptionalModelOption = None,
    video: Annotated[list[Path] | None, typer.Option(help="Video file; repeatable.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="Image file; repeatable.")] = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="Text; {video} and {image} mark where the next one goes. Without marks, media come first."),
    ] = None,
    fps: Annotated[
        float | None, typer.Option(help="Frames sampled per second of video. Default: 2, or 4 for the demo.")
    ] = None,
    max_frames: Annotated[int | None, typer.Option(help="Frames per video at most. Default: 768.")] = None,
    dtype: Annotated[
        DType | None, typer.Option(help="Type the model computes in. Default: bfloat16, or float32 for the demo.")
    ] = None,
    table: PatternTableOption = None,
    pattern: PatternOption = None,
    chunk_tokens: Annotated[int | None, typer.Option(help="Tokens per chunk; without it, all at once.")] = None,
    mesh: Annotated[bool, typer.Option("--mesh", help="Shard prompt, weights and cache over all devices.")] = False,
    distributed: Annotated[
        bool, typer.Option("--distributed", help="--mesh over all hosts of a slice; run the same command on each.")
    ] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Tokens to generate. Default: 16, or 4 for the demo.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="Temperature of the sampling; 0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the smallest set of tokens with this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    compare_dense: Annotated[
        bool, typer.Option("--compare-dense", help="Also run dense attention and compare.")
    ] = False,
    plots: Annotated[Path | None, typer.Option(help="Directory for pictures.")] = None,
    plot_layer: Annotated[int, typer.Option(help="Layer whose masks are drawn.")] = 0,
    profile: Annotated[
        Path | None, typer.Option(help="Directory for a profiler trace of a second prefill; prints the time by stage.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, everything else on stderr.")] = False,
    is_demo: Annotated[
        bool,
        typer.Option("--demo", help="Run a small trained model on a shipped video; compares with dense, writes plots."),
    ] = False,
    demo_dir: Annotated[Path, typer.Option(help="Directory for the demo's plots.")] = Path("out/demo"),
    cache_dir: CacheDirOption = None,
    debug: DebugOption = False,
) -> None:
    """Prefill a prompt with sparse attention and decode an answer. Reports time, density and recall by layer."""
    # Imported late: the other commands start without the packages of models, media and pictures.
    from mmi_jax.cli.prefill import demo
    from mmi_jax.cli.prefill.run import run_prefill
    from models.assets.demo import DEMO_FPS, DEMO_MODEL, DEMO_VIDEO
    from models.media.sampling import MAX_FRAMES

    with one_line_errors(shows_traceback=debug), compile_cache.compilation_cache_in(cache_dir):
        take_memory(NEARLY_ALL)
        if distributed:
            jax.distributed.initialize()
        if is_demo:
            _check_demo(model)
            model, video = str(DEMO_MODEL), video or [DEMO_VIDEO]
        elif model is None:
            raise ValueError("prefill needs --model DIRECTORY_OR_HUB_NAME, or --demo: got neither")
        patterns = chosen_patterns(table, pattern)
        options = RunOptions(
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
            sampling=SamplingOptions(
                max_new_tokens=max_new_tokens if max_new_tokens is not None else demo.MAX_NEW_TOKENS if is_demo else 16,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
            ),
        )
        outputs = OutputOptions(
            plots=plots or (demo_dir if is_demo else None),
            plot_layer=plot_layer,
            profile=profile,
            is_json=json,
            note=demo.NOTE if is_demo else "",
            right_answer=demo.right_answer(options.text) if is_demo and video == [DEMO_VIDEO] else None,
        )
        run_prefill(options, outputs)


def _check_demo(model: str | None) -> None:
    if model is not None:
        raise ValueError(f"--demo brings its own model: expected no --model, got {model!r}")
