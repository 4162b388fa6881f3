"""NExT-QA, multiple choice: causal, temporal and descriptive questions with five options.

As published (github.com/doc-doc/NExT-QA, README and dataset/nextqa): `val.csv` with the columns `video, frame_count,
width, height, question, answer, qid, type, a0, ..., a4`, `answer` being the number of the right option and the first
letter of `type` one of C, T, D; `map_vid_vidorID.json`, which maps a `video` to its path in VidOR, such as
`1164/4010069381`; the videos are `{path}.mp4` or `{video}.mp4`. `test.csv` has the same columns and is read where there
is no `val.csv`.
"""

from pathlib import Path

from models.tasks.qa.files import Videos, existing, field, read_csv, read_json
from models.tasks.qa.item import Item

NUM_OPTIONS = 5
KINDS: dict[str, str] = {"C": "causal", "T": "temporal", "D": "descriptive"}


def read_next_qa(directory: str | Path) -> list[Item]:
    """All questions, in the order of the file.

    Raises:
        ValueError: a file, column or video is missing.
    """
    path = existing(directory, "val.csv", "test.csv")
    vidor = read_json(existing(directory, "map_vid_vidorID.json"))
    videos = Videos(directory)

    def item(row: dict[str, str]) -> Item:
        video = field(row, "video", path)
        kind = field(row, "type", path)
        return Item(
            name=f"{video} {field(row, 'qid', path)}",
            video=videos[video, Path(vidor.get(video, video)).name],
            question=_prompt_text(field(row, "question", path)),
            options=tuple(field(row, f"a{n}", path) for n in range(NUM_OPTIONS)),
            answer=int(field(row, "answer", path)),
            kind=KINDS[kind[:1]] if kind[:1] in KINDS else str(kind),
        )

    return list(map(item, read_csv(path)))


def _prompt_text(question: str) -> str:
    """The question with a capital and a question mark, which the file leaves out."""
    question = question.strip()
    return question[:1].upper() + question[1:] + ("" if question.endswith("?") else "?")
