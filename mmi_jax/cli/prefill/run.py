"""The stages of `mmi prefill`, from media to the printed result."""

import contextlib
import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import mmi_jax
from mmi_jax import Blocks, PatternTable, PrefillResult
from mmi_jax.cli import console
from mmi_jax.cli.pictures import write_pictures
from mmi_jax.cli.prefill.options import OutputOptions, RunOptions, RunResult, SamplingOptions
from mmi_jax.cli.prefill.printing import print_result
from mmi_jax.cli.prefill.prompt import arrange
from mmi_jax.engine.programs.compilation import program_texts
from mmi_jax.engine.reporting.profiling import profiled
from mmi_jax.engine.reporting.report import PrefillReport, agreement
from mmi_jax.method.patterns import Pattern
from mmi_jax.sharding import make_mesh
from models import Processor, Prompt, open_checkpoint
from models.media.image import read_image
from models.media.video_stream import VideoStream


def run_prefill(options: RunOptions, outputs: OutputOptions) -> RunResult:
    """Runs the prefill and prints its result.

    Raises:
      ValueError: a file, the prompt or the table cannot be used; nothing was written.
    """
    seconds: dict[str, float] = {}
    checkpoint = open_checkpoint(options.model)
    processor = checkpoint.read_processor()
    with _timed(seconds, "media decoding"):
        media = _Media(options, processor)
        prompt = processor(arrange(options.text, videos=media.videos, images=media.images))
    opened = media.waited_seconds
    mesh = make_mesh(num_kv_heads=checkpoint.config.num_kv_heads) if options.uses_mesh else None
    with _timed(seconds, "weights"), console.progress_bar("loading weights", "tensors") as on_tensor:
        model = checkpoint.load_model(dtype=jnp.dtype(options.dtype), on_tensor=on_tensor, mesh=mesh)
    outputs.check_layer(model.config.num_layers)
    result = _prefill(model, prompt, options, options.table, mesh, media)
    waited = media.waited_seconds - opened
    dense = _prefill(model, prompt, options, None, mesh, media) if options.compares_dense else None
    with _timed(seconds, "new tokens"), console.spinner("decoding the answer"):
        new_tokens = _decode(model, result, options.sampling, processor.end_tokens)
    stages = None
    if outputs.profile is not None:
        run = functools.partial(_prefill, model, prompt, options, options.table, mesh, media)
        _, stages = profiled(lambda: run().logits, outputs.profile, program_texts)
    report = _with_stages(result.report, seconds, waited)
    pictures: tuple[Path, ...] = ()
    if outputs.plots is not None:
        with console.spinner("drawing"):
            blocks = options.blocks or Blocks()
            pictures = write_pictures(outputs.plots, model, prompt, report, layer=outputs.plot_layer, blocks=blocks)
    run_result = RunResult(
        options=options,
        report=report,
        dense_report=None if dense is None else dense.report,
        agreement=None if dense is None else agreement(dense.logits, result.logits, dense.hidden, result.hidden),
        new_tokens=new_tokens,
        text=processor.tokenizer.decode(new_tokens),
        pictures=pictures,
        stages=stages,
        note=outputs.note,
        right_answer=outputs.right_answer,
    )
    if jax.process_index():  # one host speaks for all
        return run_result
    print_result(run_result, console.stderr_console() if outputs.is_json else console.stdout_console())
    if outputs.is_json:
        print(json.dumps(run_result.to_json()))
    return run_result


class _Media:
    """The images and videos of a prompt; videos are decoded while weights are loaded and first frames are encoded.

    Attributes:
      videos, images: parts for a processor.
      show: while set, called with the progress of decoding.
    """

    def __init__(self, options: RunOptions, processor: Processor):
        """Returns when each video's first frame is decoded; on a mesh, when all are."""
        self.show: Callable[[str], None] | None = None
        self.streams = [
            VideoStream(
                path,
                fps=options.fps,
                max_frames=options.max_frames,
                resize=processor.fit_frame,
                on_frame=functools.partial(self._tell, path.name),
            )
            for path in options.videos
        ]
        self.videos = [stream.read() for stream in self.streams] if options.uses_mesh else self.streams
        self.images = [read_image(path) for path in options.images]

    @property
    def waited_seconds(self) -> float:
        """How long frames have been waited for."""
        return sum((stream.waited_seconds for stream in self.streams), 0.0)

    def _tell(self, name: str, done: int, total: int) -> None:
        """Called by the threads that decode."""
        if show := self.show:
            show(f"vision tower, {done:,} of {total:,} frames of {name} decoded")


def _prefill(
    model, prompt: Prompt, options: RunOptions, table: PatternTable | Pattern | None, mesh: Mesh | None, media: "_Media"
) -> PrefillResult:
    """One prefill behind a spinner that names the stage; all layers are one program, which reports only its end."""
    stages = {"vision": "vision tower", "compile": "compiling", "prefill": f"{model.config.num_layers} layers"}
    num_chunks = itertools.count(1)
    with console.spinner("dense prefill" if table is None else "sparse prefill") as show:

        def on_stage(stage: str) -> None:
            chunk = f" of chunk {next(num_chunks)}" if options.chunk_tokens and stage == "prefill" else ""
            show(stages[stage] + chunk)
            media.show = show if stage == "vision" else None

        return mmi_jax.prefill(
            model,
            prompt,
            table=table,
            chunk_tokens=options.chunk_tokens,
            max_new_tokens=options.sampling.max_new_tokens,
            blocks=options.blocks,
            mesh=mesh,
            on_stage=on_stage,
        )


def _decode(model, prefilled: PrefillResult, sampling: SamplingOptions, end_tokens: tuple[int, ...]) -> list[int]:
    """The answer's tokens, up to and with the first end token."""
    tokens = mmi_jax.decode(
        model,
        prefilled,
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        rng=jax.random.key(sampling.seed),
        end_tokens=end_tokens,
    )
    return np.asarray(tokens)[0].tolist()


def _with_stages(report: PrefillReport, seconds: dict[str, float], waited: float) -> PrefillReport:
    """The report with the time of the stages around the prefill, in the order they ran.

    Args:
      waited: seconds that the vision tower waited for frames, which count as decoding.
    """
    around, stages, new_tokens = dict(seconds), dict(report.seconds), seconds["new tokens"]
    del around["new tokens"]
    around["media decoding"] += waited
    stages["vision"] -= waited
    return dataclasses.replace(report, seconds={**around, **stages, "new tokens": new_tokens})


@contextlib.contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start
