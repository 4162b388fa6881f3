"""The tasks: what is hidden where, what is asked, and which row answers."""

import dataclasses

import av
import numpy as np
import pytest

from mmi_jax.layout import VISION
from models.media.image import Image
from models.media.video import Video
from models.small.config import small_measure, small_processor
from models.tasks import (
    TASKS,
    FolderHaystack,
    GeneratedHaystack,
    Measure,
    Question,
    Sample,
    choice_ids,
    matching_frames,
    middle_questions,
    mm_middle_questions,
    mm_niah,
    part_ends,
    question_rows,
    silent_matching,
    v_niah,
)
from models.tasks.digits import digit_labels
from models.tasks.pictures import COLOURS
from models.tasks.script import COLOUR, DIGIT, Clip, Still
from models.tasks.text import DIGITS, LETTERS

HAYSTACK = GeneratedHaystack()


def make(task, **arguments):
    defaults = dict(num_tokens=2048, depth=0.5, seed=3, haystack=HAYSTACK, measure=small_measure())
    return task(**defaults | arguments)


def frames(script):
    return np.concatenate([part.frames for part in script.parts if not isinstance(part, str)])


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_a_prompt_fills_its_length_and_is_the_same_for_the_same_seed(name, depth):
    script, again, other = (make(TASKS[name], depth=depth, seed=seed) for seed in (3, 3, 4))
    length = small_processor()(script.render(HAYSTACK).parts).tokens.shape[1]
    assert 0.95 * 2048 < length <= 2048
    np.testing.assert_array_equal(frames(script), frames(again))
    assert script.questions == again.questions
    assert frames(script).shape != frames(other).shape or (frames(script) != frames(other)).any()


@pytest.mark.parametrize("depth", [0.0, 0.25, 1.0])
def test_the_needle_of_v_niah_stands_at_its_depth(depth):
    script = make(v_niah, depth=depth, num_distractors=2)
    clip, text = script.parts
    assert isinstance(clip, Clip) and isinstance(text, str)
    colour = next(n for n, name in enumerate(COLOURS) if f"the {name} card" in text)
    (first, second) = np.flatnonzero(clip.frames[:, COLOUR] == colour)
    assert second == first + 1 and first == 2 * round(depth * (len(clip.frames) / 2 - 1))
    (question,) = script.questions
    assert question.choices == DIGITS and question.after_part is None
    assert question.answer == digit_labels()[clip.frames[first, DIGIT]]
    assert len(set(clip.frames[:, COLOUR]) - {-1}) == 3


def test_a_quarter_of_mm_niah_is_text_and_the_needle_is_one_of_four_choices():
    sample = make(mm_niah, num_tokens=4096, depth=0.7).render(HAYSTACK)
    prompt = small_processor()(sample.parts)
    assert (prompt.layout.modality != VISION).mean() == pytest.approx(0.25, abs=0.05)
    (question,) = sample.questions
    assert question.choices == LETTERS
    assert f" {LETTERS[question.answer]}: " in str(sample.parts[-1])
    images = [part for part in sample.parts if isinstance(part, Image)]
    assert len(images) == 4 and all(image.pixels.shape == (112, 112, 3) for image in images)


@pytest.mark.parametrize("task", [middle_questions, matching_frames])
def test_middle_questions_look_far_back_from_the_middle(task):
    script = make(task, depth=0.1)
    rows = question_rows(script.render(HAYSTACK), small_processor())
    assert len(rows) == 4 and (rows < 0.96 * 2048).all() and (np.diff(rows) > 200).all()
    num_frames = 0
    answers = {question.after_part: question.answer for question in script.questions}
    for number, part in enumerate(script.parts):
        if isinstance(part, Clip):
            num_frames += len(part.frames)
        else:
            early = frames(script)[: int(0.25 * num_frames), DIGIT]
            assert answers.pop(number) in digit_labels()[early[early >= 0]]
    assert not answers


def test_a_quarter_of_mm_middle_is_text_and_its_needles_come_long_before_their_questions():
    script = make(mm_middle_questions, num_tokens=4096, depth=0.1)
    sample, processor = script.render(HAYSTACK), small_processor()
    prompt = processor(sample.parts)
    assert (prompt.layout.modality != VISION).mean() == pytest.approx(0.25, abs=0.05)
    rows = question_rows(sample, processor)
    assert len(rows) == 4 and (rows < 0.96 * 4096).all() and (np.diff(rows) > 400).all()
    ends, _ = part_ends(sample.parts, processor)
    needles = {part.frames[0, COLOUR]: i for i, part in enumerate(script.parts) if isinstance(part, Still)}
    assert len(needles) == 8
    for row, question in zip(rows, script.questions, strict=True):
        place = question.after_part
        assert place is not None
        text = script.parts[place]
        assert isinstance(text, str) and isinstance(script.parts[place + 1], Clip)
        colour = next(n for n, name in enumerate(COLOURS) if f"the {name} card" in text)
        needle = script.parts[needles[colour]]
        assert isinstance(needle, Still)
        assert ends[needles[colour]] < 0.25 * row
        offered = text[text.index(f" {LETTERS[question.answer]}: ") + 4]
        assert int(offered) == digit_labels()[needle.frames[0, DIGIT]]


@pytest.mark.parametrize("task", [mm_niah, mm_middle_questions])
def test_documents_never_make_a_prompt_too_long(task):
    lengths = [part_ends(make(task, seed=n, depth=0.25 * (n % 5)).render(HAYSTACK).parts, small_processor())[1]
               for n in range(40)]  # fmt: skip
    assert 0.95 * 2048 < min(lengths) and max(lengths) <= 2048


def test_silent_matching_is_read_off_the_video_at_pictures_that_came_before():
    script = make(silent_matching, depth=0.1)
    (clip,) = script.parts
    assert isinstance(clip, Clip)
    prompt = small_processor()(script.render(HAYSTACK).parts)
    rows = question_rows(script.render(HAYSTACK), small_processor())
    layout = prompt.layout
    assert len(rows) == 4 and (layout.modality[0, rows] == VISION).all()
    assert (layout.frame[0, rows + 1] == layout.frame[0, rows] + 1).all()  # the last token of its pair of frames
    for row, question in zip(rows, script.questions, strict=True):
        place = 2 * int(layout.frame[0, row])
        assert question.after_frames == place + 2
        before = clip.frames[:place]
        (first, *_) = np.flatnonzero((before[:, :DIGIT] == clip.frames[place, :DIGIT]).all(axis=1))
        assert first < 0.2 * place and clip.frames[place, DIGIT] == -1
        assert question.answer == digit_labels()[before[first, DIGIT]]


def test_rows_are_those_of_the_last_tokens():
    video = Video(frames=np.zeros((4, 112, 112, 3), np.uint8), fps=2.0)
    parts = (video, "Which digit?", Image(pixels=video.frames[0]), "Why?")
    processor = small_processor()
    ends, num_tokens = part_ends(parts, processor)
    tokens = processor(parts).tokens[0]
    assert num_tokens == len(tokens)
    end, question = processor.tokenizer.token_id("<|vision_end|>"), processor.tokenizer.token_id("?")
    assert tokens[ends].tolist() == [end, question, end, question]
    with pytest.raises(ValueError, match="must end where a token ends: 'Which dig' goes on as 'it"):
        part_ends(("Which dig", "it"), processor)


def test_bad_samples_and_choices_are_refused():
    good = Question(choices=("1", "2"), answer=0, depth=0.0)
    with pytest.raises(ValueError, match="two or more different choices"):
        dataclasses.replace(good, choices=("1", "1"))
    with pytest.raises(ValueError, match="0 <= 2 < 2"):
        dataclasses.replace(good, answer=2)
    with pytest.raises(ValueError, match="fraction from 0 to 1"):
        dataclasses.replace(good, depth=1.5)
    with pytest.raises(ValueError, match="must ask a question"):
        Sample(parts=("x",), questions=(), depth=0.0, num_frames=0)
    with pytest.raises(ValueError, match="follow one of the 1 parts, got question.after_part=1"):
        Sample(parts=("x",), questions=(dataclasses.replace(good, after_part=1),), depth=0.0, num_frames=0)
    within = dataclasses.replace(good, after_part=0, after_frames=1)
    with pytest.raises(ValueError, match="after_frames needs after_part to name a video, got question.after_part=0"):
        Sample(parts=("x",), questions=(within,), depth=0.0, num_frames=0)
    video = Video(frames=np.zeros((4, 112, 112, 3), np.uint8), fps=2.0)
    with pytest.raises(ValueError, match="follow 1 to 4 of its frames, got question.after_frames=5"):
        Sample(parts=(video,), questions=(dataclasses.replace(within, after_frames=5),), depth=0.0, num_frames=4)
    with pytest.raises(ValueError, match="single token .* got \\['12'\\]"):
        choice_ids(dataclasses.replace(good, choices=("1", "12")), small_processor().tokenizer)
    with pytest.raises(ValueError, match="needs 4 pairs of frames of 16 tokens"):
        make(v_niah, num_tokens=100)


def test_a_folder_of_videos_is_a_haystack(tmp_path, rng):
    pixels = rng.integers(0, 256, (12, 64, 96, 3), np.uint8)
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=1)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "bgr0"
        for frame in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    (tmp_path / "notes.txt").write_text("no video")
    folder = FolderHaystack(directory=tmp_path, frame_shape=(64, 96))
    shots = folder.shots(30, rng)
    np.testing.assert_array_equal(folder.pixels(shots), pixels[(shots[0, 0] + np.arange(30)) % 12])
    assert len({int(n) for n in folder.stills(6, rng)[:, 0]}) == 6
    measure = Measure.of(small_processor(), folder)
    script = make(v_niah, haystack=folder, measure=measure, num_tokens=512)
    sample = script.render(folder)
    assert isinstance(sample.parts[0], Video) and sample.parts[0].frames.shape[1:] == (64, 96, 3)
    assert small_processor()(sample.parts).tokens.shape[1] <= 512
    with pytest.raises(ValueError, match="must hold videos"):
        FolderHaystack(directory=_empty(tmp_path)).shots(1, rng)


def _empty(path):
    (path / "empty").mkdir()
    return path / "empty"
