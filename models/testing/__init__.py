"""Tiny models, prompts and checkpoints for tests, of this package and of those who add a model."""

from models.testing.configs import TINY_CONFIG as TINY_CONFIG
from models.testing.configs import TINY_PRESET as TINY_PRESET
from models.testing.prompts import BLOCKS as BLOCKS
from models.testing.prompts import BUCKETS as BUCKETS
from models.testing.prompts import STATIC as STATIC
from models.testing.prompts import batch as batch
from models.testing.prompts import extend as extend
from models.testing.prompts import join as join
from models.testing.prompts import pad as pad
from models.testing.prompts import prompt as prompt
from models.testing.random_checkpoint import write_random_checkpoint as write_random_checkpoint
from models.testing.tiny_model import forward as forward
from models.testing.tiny_model import last_logits as last_logits
from models.testing.tiny_model import tiny_model as tiny_model
