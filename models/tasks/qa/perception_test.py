"""Perception Test, multiple-choice questions: memory, abstraction, physics and semantics, three options.

As published (github.com/google-deepmind/perception_test, README and its multiple-choice notebook): one JSON object,
which maps a video's name to `{"metadata": ..., "mc_question": [{"id", "question", "options", "answer_id", "area"}]}`
and is called `mc_question_valid.json` or `all_valid.json`; the videos are `{name}.mp4`. The test split has no
`answer_id` and cannot be scored here.
"""

from pathlib import Path

from models.tasks.qa.files import Videos, existing, field, read_json
from models.tasks.qa.item import Item


def read_perception_test(directory: str | Path) -> list[Item]:
    """All multiple-choice questions, in the order of the file.

    Raises:
        ValueError: a file, field or video is missing, or the answers, as in the test split.
    """
    path = existing(directory, "mc_question_valid*.json", "all_valid*.json", "mc_question*.json", "all_*.json")
    videos = Videos(directory)
    return [
        Item(
            name=f"{video} {field(row, 'id', path)}",
            video=videos[video],
            question=field(row, "question", path),
            options=tuple(field(row, "options", path)),
            answer=int(field(row, "answer_id", path)),
            kind=field(row, "area", path),
        )
        for video, annotations in read_json(path).items()
        for row in annotations.get("mc_question", [])
    ]
