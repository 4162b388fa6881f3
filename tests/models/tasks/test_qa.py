"""Public video question answering sets: small files of the published form, read, run and scored."""

import csv
import json
import sys

import av
import numpy as np
import pytest

from models.tasks.qa import DATASETS, matches, parts, sample, scores
from models.tasks.qa.item import Item, text


def write_video(path, num_frames=4):
    """A few frames of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=2)
        stream.width = stream.height = 32
        for n in range(num_frames):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 40 * n, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def egoschema(root):
    question = {"google_drive_id": "x", "question": "What is C doing?"}
    options = {f"option {n}": f"C does {n}." for n in range(5)}
    write_json(root / "questions.json", [{"q_uid": uid, **question, **options} for uid in ("u-0", "u-1", "u-2")])
    write_json(root / "subset_answers.json", {"u-2": 4, "u-0": 1})
    for uid in ("u-0", "u-2"):
        write_video(root / "videos" / f"{uid}.mp4")
    return [("u-0", "u-0.mp4", 1, "subset"), ("u-2", "u-2.mp4", 4, "subset")], "C does 4."


def video_mme(root):
    options = ["A. Apples.", "B. Candles.", "C. Berries.", "D. The three kinds are of the same number."]
    row = {"video_id": "001", "duration": "short", "videoID": "fFjv93ACGo8", "question": "Which?", "options": options}
    rows = [row | {"question_id": "001-1", "answer": "C"}, row | {"question_id": "001-2", "answer": "A"}]
    write_json(root / "videomme" / "test-00000-of-00001.json", rows)
    write_video(root / "data" / "fFjv93ACGo8.mp4")
    expected = [("001-1", "fFjv93ACGo8.mp4", 2, "short"), ("001-2", "fFjv93ACGo8.mp4", 0, "short")]
    return expected, "The three kinds are of the same number."


def next_qa(root):
    columns = "video,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4".split(",")
    rows = [
        ["4010069381", 369, 640, 480, "how do the two man play", 0, 6, "CH", "roll", "tap", "strum", "hit", "pat"],
        ["4010069381", 369, 640, 480, "what is he doing", 3, 7, "TC", "a", "b", "c", "d", "pat"],
    ]
    (root / "annotations").mkdir(parents=True)
    with open(root / "annotations" / "val.csv", "w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    write_json(root / "map_vid_vidorID.json", {"4010069381": "1164/4010069381"})
    write_video(root / "NExTVideo" / "1164" / "4010069381.mp4")
    name = "4010069381"
    return [(f"{name} 6", f"{name}.mp4", 0, "causal"), (f"{name} 7", f"{name}.mp4", 3, "temporal")], "pat"


def activitynet_qa(root):
    questions = [
        {"video_name": "1QIUV7WYKXg", "question": "is the athlete wearing trousers", "question_id": "v_1QIUV7WYKXg_3"},
        {"video_name": "1QIUV7WYKXg", "question": "what is he doing", "question_id": "v_1QIUV7WYKXg_4"},
    ]
    answers = [
        {"answer": "long jump", "type": 0, "question_id": "v_1QIUV7WYKXg_4"},
        {"answer": "yes", "type": 3, "question_id": "v_1QIUV7WYKXg_3"},
    ]
    write_json(root / "dataset" / "test_q.json", questions)
    write_json(root / "dataset" / "test_a.json", answers)
    write_video(root / "v_1QIUV7WYKXg.mkv")
    file = "v_1QIUV7WYKXg.mkv"
    return [(questions[0]["question_id"], file, "yes", "yes or no"),
            (questions[1]["question_id"], file, "long jump", "motion")], None  # fmt: skip


def perception_test(root):
    def question(n, answer, area):
        options = ["a cup", "a box", "no object"]
        fields = {"id": n, "question": "What was hidden?", "options": options, "answer_id": answer, "area": area}
        return fields | {"reasoning": "descriptive", "tag": ["motion"]}

    annotations = {"metadata": {"video_id": "video_10909", "split": "valid"}, "object_tracking": []}
    rows = [question(0, 2, "memory"), question(1, 0, "physics")]
    write_json(root / "mc_question_valid.json", {"video_10909": annotations | {"mc_question": rows}})
    write_video(root / "videos" / "video_10909.mp4")
    return [("video_10909 0", "video_10909.mp4", 2, "memory"), ("video_10909 1", "video_10909.mp4", 0, "physics")], (
        "no object"
    )


PUBLISHED = {
    "egoschema": egoschema,
    "video-mme": video_mme,
    "next-qa": next_qa,
    "activitynet-qa": activitynet_qa,
    "perception-test": perception_test,
}


@pytest.mark.parametrize("name", DATASETS)
def test_a_directory_as_published_gives_questions_with_their_videos_and_answers(tmp_path, name):
    expected, last_option = PUBLISHED[name](tmp_path)
    items = DATASETS[name](tmp_path)
    assert [(item.name, item.video.name, item.answer, item.kind) for item in items] == expected
    assert all(item.video.is_file() for item in items)
    assert all((item.options[-1] if item.options else None) == last_option for item in items)
    assert all(item.question[0].isupper() and item.question.endswith("?") for item in items)


@pytest.mark.parametrize("name", DATASETS)
def test_a_missing_video_is_named(tmp_path, name):
    PUBLISHED[name](tmp_path)
    for path in tmp_path.rglob("*.m[pk][4v]"):
        path.unlink()
    with pytest.raises(ValueError, match="no video .* below"):
        DATASETS[name](tmp_path)


@pytest.mark.parametrize("name", DATASETS)
def test_a_directory_of_something_else_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="must hold"):
        DATASETS[name](tmp_path)
    with pytest.raises(ValueError, match="a data set is a directory as published"):
        DATASETS[name](tmp_path / "absent")


def test_a_missing_field_is_named(tmp_path):
    egoschema(tmp_path)
    write_json(tmp_path / "questions.json", [{"q_uid": "u-0", "question": "What?"}])
    with pytest.raises(ValueError, match=r"questions.json: a record must have the field 'option 0', got q_uid"):
        DATASETS["egoschema"](tmp_path)


def test_the_test_split_of_perception_test_has_no_answers(tmp_path):
    write_json(
        tmp_path / "mc_question_test.json",
        {"video_1": {"mc_question": [{"id": 0, "question": "What?", "options": ["a", "b", "c"]}]}},
    )
    write_video(tmp_path / "video_1.mp4")
    with pytest.raises(ValueError, match="must have the field 'answer_id'"):
        DATASETS["perception-test"](tmp_path)


def test_parquet_needs_pyarrow_and_says_so(tmp_path, monkeypatch):
    (tmp_path / "test-00000-of-00001.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"needs pyarrow: pip install 'mmi-jax\[parquet\]'"):
        DATASETS["video-mme"](tmp_path)


def test_what_is_asked(tmp_path):
    from models.media.video import read_video

    video_mme(tmp_path)
    item = DATASETS["video-mme"](tmp_path)[0]
    video = read_video(item.video, fps=2.0)
    assert parts(item, video)[0] is video
    assert text(item).splitlines()[:3] == ["Which?", "A. Apples.", "B. Candles."]
    prompt = sample(item, video)
    assert prompt.questions[0].choices == ("A", "B", "C", "D") and prompt.questions[0].answer == 2
    assert prompt.num_frames == 4 and prompt.questions[0].after_part is None


@pytest.mark.parametrize(
    ("answer", "expected", "is_right"),
    [
        ("The red car.", "red car", True),
        ("Two", "2", True),
        ("Yes!", "yes", True),
        ("no", "yes", False),
        ("red", "red car", False),
        ("an ice-cream", "ice cream", True),
        ("", "no", False),
    ],
)
def test_an_open_answer_counts_where_it_is_the_right_one_normalised(answer, expected, is_right):
    assert matches(answer, expected) == is_right


def test_scores_by_kind():
    score = scores(["a", "b", "a", "a"], [True, False, False, True])
    assert (score.correct, score.num_questions, score.accuracy) == (2, 4, 0.5)
    assert score.by_kind == {"a": (2, 3), "b": (0, 1)}
    with pytest.raises(ValueError, match="answers to one question or more"):
        scores([], [])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(options=("a", "b"), answer=2), "one of 2 options, got 2"),
        (dict(options=("a", "b"), answer="a"), "answered by a number"),
        (dict(options=(), answer=0), "others by text"),
        (dict(options=("a",), answer=0), "2 to 10 options, got 1"),
    ],
)
def test_an_item_must_fit_itself(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        Item(name="n", video=tmp_path, question="What?", kind="k", **fields)
