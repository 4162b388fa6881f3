"""Needle-in-a-haystack tasks over videos and text: samples for any model, scored by one logit row per question."""

from models.tasks.haystack import FolderHaystack as FolderHaystack
from models.tasks.haystack import GeneratedHaystack as GeneratedHaystack
from models.tasks.haystack import Haystack as Haystack
from models.tasks.measure import Measure as Measure
from models.tasks.middle import matching_frames as matching_frames
from models.tasks.middle import middle_questions as middle_questions
from models.tasks.middle import mm_middle_questions as mm_middle_questions
from models.tasks.middle import silent_matching as silent_matching
from models.tasks.niah import mm_niah as mm_niah
from models.tasks.niah import v_niah as v_niah
from models.tasks.rows import choice_ids as choice_ids
from models.tasks.rows import part_ends as part_ends
from models.tasks.rows import question_rows as question_rows
from models.tasks.sample import Question as Question
from models.tasks.sample import Sample as Sample
from models.tasks.script import Script as Script

TASKS = {
    "v_niah": v_niah,
    "mm_niah": mm_niah,
    "middle_questions": middle_questions,
    "mm_middle_questions": mm_middle_questions,
    "matching_frames": matching_frames,
    "silent_matching": silent_matching,
}
"""The tasks by name; each is called as `task(num_tokens=, depth=, seed=, haystack=, measure=)` and gives a `Script`."""
