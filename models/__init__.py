"""Vision-language models in Flax NNX: families, checkpoints, processors, media and tasks."""

from models.families import Checkpoint as Checkpoint
from models.families import family_of as family_of
from models.families import load as load
from models.families import open_checkpoint as open_checkpoint
from models.families import presets as presets
from models.interface import Family as Family
from models.interface import Model as Model
from models.interface import Processor as Processor
from models.prompt import Prompt as Prompt
