"""Public video question answering sets: a directory as published -> questions, prompts and the metric."""

from models.tasks.qa.activitynet_qa import read_activitynet_qa
from models.tasks.qa.egoschema import read_egoschema
from models.tasks.qa.item import Item as Item
from models.tasks.qa.item import parts as parts
from models.tasks.qa.item import sample as sample
from models.tasks.qa.metric import Score as Score
from models.tasks.qa.metric import matches as matches
from models.tasks.qa.metric import scores as scores
from models.tasks.qa.next_qa import read_next_qa
from models.tasks.qa.perception_test import read_perception_test
from models.tasks.qa.video_mme import read_video_mme

DATASETS = {
    "egoschema": read_egoschema,
    "video-mme": read_video_mme,
    "next-qa": read_next_qa,
    "activitynet-qa": read_activitynet_qa,
    "perception-test": read_perception_test,
}
"""Readers by name, each called with the directory; part of what Table 1 of MMInference averages over."""
