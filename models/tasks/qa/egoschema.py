"""EgoSchema: three minutes of egocentric video, five options.

As published (github.com/egoschema/EgoSchema, README): `questions.json`, a list of `{"q_uid", "question", "option 0",
..., "option 4"}`; `subset_answers.json`, which maps the `q_uid` of 500 of the 5,031 questions to the number of the
right option; the videos are `{q_uid}.mp4`. The other answers are only known to the benchmark's server, so that only the
subset can be scored here.
"""

from pathlib import Path

from models.tasks.qa.files import Videos, existing, field, read_json
from models.tasks.qa.item import Item

NUM_OPTIONS = 5


def read_egoschema(directory: str | Path) -> list[Item]:
    """The questions whose answers are public, in the order of the file.

    Raises:
        ValueError: a file, field or video is missing.
    """
    path = existing(directory, "questions.json")
    answers_path = existing(directory, "subset_answers.json")
    answers, videos = read_json(answers_path), Videos(directory)
    rows = [row for row in read_json(path) if field(row, "q_uid", path) in answers]
    if not rows:
        raise ValueError(f"{path} and {answers_path} must have a question in common, got none")
    return [
        Item(
            name=row["q_uid"],
            video=videos[row["q_uid"]],
            question=field(row, "question", path),
            options=tuple(field(row, f"option {n}", path) for n in range(NUM_OPTIONS)),
            answer=int(answers[row["q_uid"]]),
            kind="subset",
        )
        for row in rows
    ]
