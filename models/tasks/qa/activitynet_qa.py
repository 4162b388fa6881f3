"""ActivityNet-QA: open questions about activities, answered in a word or two.

As published (github.com/MILVLG/activitynet-qa, README and dataset/): `test_q.json`, a list of `{"video_name",
"question", "question_id"}`, and `test_a.json`, a list of `{"answer", "type", "question_id"}`; the videos are those of
ActivityNet, `v_{video_name}` with any suffix. `val_q.json` and `val_a.json` have the same form and are read where
there is no test split.

The set's own script (evaluation/eval.py) counts answers that are equal to the right one, letter by letter; recent
papers let a language model compare them. Here an answer counts where both are equal after normalising (see `metric`),
which is stricter than a language model, so that figures can be compared between methods but not with those of such
papers.
"""

from pathlib import Path

from models.tasks.qa.files import Videos, existing, field, read_json
from models.tasks.qa.item import Item

KINDS = (
    "motion",
    "spatial relation",
    "temporal relation",
    "yes or no",
    "colour",
    "object",
    "location",
    "number",
    "other",
)
"""By the number that `type` holds."""


def read_activitynet_qa(directory: str | Path) -> list[Item]:
    """All questions, in the order of the file.

    Raises:
        ValueError: a file, field, answer or video is missing.
    """
    path = existing(directory, "test_q.json", "val_q.json")
    answers_path = path.with_name(path.name.replace("_q", "_a"))
    answers = {field(row, "question_id", answers_path): row for row in read_json(answers_path)}
    videos = Videos(directory)

    def item(row: dict) -> Item:
        name = field(row, "question_id", path)
        if name not in answers:
            raise ValueError(f"{answers_path} must answer every question of {path.name}, got none for {name}")
        video = field(row, "video_name", path)
        kind = int(answers[name].get("type", len(KINDS) - 1))
        return Item(
            name=name,
            video=videos[f"v_{video}", video],
            question=_prompt_text(field(row, "question", path)),
            options=(),
            answer=str(field(answers[name], "answer", answers_path)),
            kind=KINDS[kind] if 0 <= kind < len(KINDS) else str(kind),
        )

    return list(map(item, read_json(path)))


def _prompt_text(question: str) -> str:
    """The question with a capital and a question mark, which the file leaves out."""
    question = question.strip()
    return question[:1].upper() + question[1:] + ("" if question.endswith("?") else "?")
