"""The prompts of a search, and the rows in which their questions are answered."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmi_jax.cli.digest import prompt_digest
from mmi_jax.cli.samples import SampleSource, haystack_of, task_name
from mmi_jax.cli.search.options import Calibration
from models import Processor, Prompt
from models.media.sampling import MAX_FRAMES
from models.media.video import read_video
from models.tasks import question_rows

FIRST_HELD_OUT = 1_000_000
"""Seed of the first held-out sample, far from those of calibration."""


IMPORTANCE_TOKENS = 4096
"""Tokens of the prompts for importance, at most; twice or four times as many where a task needs them."""

NUM_IMPORTANCE = 2
"""Samples of each task, and videos, that importance is measured on, at most."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompts:
    """Prompts by name.

    Args:
      answer_rows: the rows whose logits answer a question, of those prompts that were generated with questions; a
        user's video has none that are known.
    """

    by_name: Mapping[str, Prompt]
    answer_rows: Mapping[str, tuple[int, ...]]

    @property
    def description(self) -> str:
        """What figures on these prompts depend on, as text."""
        return "; ".join(
            f"{name} ({prompt.tokens.shape[1]} tokens, {prompt_digest(prompt)}{self._rows(name)})"
            for name, prompt in self.by_name.items()
        )

    def _rows(self, name: str) -> str:
        rows = self.answer_rows.get(name, ())
        return f", answered at {' '.join(map(str, rows))}" if rows else ""


def calibration_prompts(processor: Processor, calibration: Calibration) -> Prompts:
    """The prompts whose errors are averaged, and on each of which the target holds."""
    videos = {f"{path}": path for path in calibration.videos}
    return _prompts(processor, calibration, videos, calibration.samples, calibration.seed)


def importance_prompts(processor: Processor, calibration: Calibration) -> Prompts:
    """Short prompts of the same kind, for the importance of heads: the first frames of videos, shorter samples."""
    videos = {f"first frames of {path}": path for path in calibration.videos[:NUM_IMPORTANCE]}
    count, prompts = min(calibration.samples, NUM_IMPORTANCE), Prompts(by_name={}, answer_rows={})
    if videos:
        prompts = _prompts(processor, calibration, videos, 0, calibration.seed, max_tokens=IMPORTANCE_TOKENS)
    for task in calibration.tasks if count else ():
        more = _short_samples(processor, dataclasses.replace(calibration, tasks=(task,)), count)
        prompts = Prompts(
            by_name={**prompts.by_name, **more.by_name}, answer_rows={**prompts.answer_rows, **more.answer_rows}
        )
    return prompts


def _short_samples(processor: Processor, calibration: Calibration, count: int) -> Prompts:
    """Samples of the calibration's tasks, as short as they can be."""
    tokens = IMPORTANCE_TOKENS
    while tokens < calibration.tokens:
        try:
            short = _prompts(processor, dataclasses.replace(calibration, tokens=tokens), {}, count, calibration.seed)
            return Prompts(
                by_name={f"{tokens} tokens of {name}": prompt for name, prompt in short.by_name.items()},
                answer_rows={f"{tokens} tokens of {name}": rows for name, rows in short.answer_rows.items()},
            )
        except ValueError:  # the task needs more
            tokens *= 2
    return _prompts(processor, calibration, {}, count, calibration.seed)


def held_out_prompts(processor: Processor, calibration: Calibration) -> Prompts:
    """The prompts that the table is checked on."""
    videos = {f"held out {path}": path for path in calibration.held_out}
    first = calibration.seed + FIRST_HELD_OUT
    return _prompts(processor, calibration, videos, calibration.held_out_samples, first)


def _prompts(
    processor: Processor,
    calibration: Calibration,
    videos: Mapping[str, Path],
    number: int,
    first_seed: int,
    *,
    max_tokens: int | None = None,
) -> Prompts:
    """Each video with the text after it, and so many samples of every task, their needles spread over the depths."""
    prompts = {name: _video_prompt(processor, calibration, path, max_tokens) for name, path in videos.items()}
    answer_rows = {}
    for name, prompt, rows in _samples(processor, calibration, number, first_seed):
        prompts[name], answer_rows[name] = prompt, rows
    return Prompts(by_name=prompts, answer_rows=answer_rows)


def _video_prompt(processor: Processor, calibration: Calibration, path: Path, max_tokens: int | None) -> Prompt:
    """A video and the text after it; of the video only so many frames as leave about so many tokens."""
    max_frames = MAX_FRAMES if calibration.max_frames is None else calibration.max_frames
    video = read_video(path, fps=calibration.fps, max_frames=max_frames, resize=processor.fit_frame)
    if max_tokens is not None and (tokens := processor.num_tokens(video)) > max_tokens:
        patch = processor.temporal_patch_len
        kept = max(1, video.num_frames * max_tokens // tokens // patch) * patch
        video = dataclasses.replace(video, frames=video.frames[:kept])
    return processor([video, calibration.text], cuts_on_device=True)


def _samples(
    processor: Processor, calibration: Calibration, number: int, first_seed: int
) -> Sequence[tuple[str, Prompt, tuple[int, ...]]]:
    """Name, prompt and answer rows of each sample."""
    if not calibration.tasks or not number:
        return ()
    source = SampleSource(processor=processor, haystack=haystack_of(calibration.haystack))
    samples = []
    for task in map(task_name, calibration.tasks):
        for n in range(number):
            depth = (n + 0.5) / number
            sample = source.sample(task, num_tokens=calibration.tokens, depth=depth, seed=first_seed + n)
            name = f"{task} seed {first_seed + n} depth {depth:.2f}"
            rows = tuple(question_rows(sample, processor).tolist())
            samples.append((name, processor(list(sample.parts), cuts_on_device=True), rows))
    return samples
