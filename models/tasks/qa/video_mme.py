"""Video-MME: 900 videos from 11 seconds to an hour, three questions with four options each.

As published (huggingface.co/datasets/lmms-lab/Video-MME, its dataset card): `videomme/test-00000-of-00001.parquet`
with the fields `videoID`, `question_id`, `duration` (short, medium, long), `question`, `options` (each begins with
"A. ") and `answer`, a letter, among others; the videos are `{videoID}.mp4`. The same records as a JSON list are read
too, without pyarrow. Subtitles are not used.
"""

from pathlib import Path

from models.tasks.qa.files import Videos, existing, field, read_json, read_parquet
from models.tasks.qa.item import LETTERS, Item


def read_video_mme(directory: str | Path) -> list[Item]:
    """All questions, in the order of the file.

    Raises:
        ValueError: a file, field or video is missing, or pyarrow for a Parquet file.
    """
    path = existing(directory, "test-*.json", "*.parquet")
    rows = read_json(path) if path.suffix == ".json" else read_parquet(path)
    videos = Videos(directory)
    return [
        Item(
            name=field(row, "question_id", path),
            video=videos[field(row, "videoID", path)],
            question=field(row, "question", path),
            options=tuple(map(_without_letter, field(row, "options", path))),
            answer=LETTERS.index(field(row, "answer", path)),
            kind=field(row, "duration", path),
        )
        for row in rows
    ]


def _without_letter(option: str) -> str:
    """`A. Red.` is `Red.`"""
    letter, dot, rest = option.partition(". ")
    return rest if dot and len(letter) == 1 and letter in LETTERS else option
