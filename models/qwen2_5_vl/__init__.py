"""Qwen2.5-VL in Flax NNX: sizes, positions, vision tower, decoder, weights."""

from models.qwen2_5_vl.config import Qwen2_5_VLConfig as Qwen2_5_VLConfig
from models.qwen2_5_vl.config import VisionConfig as VisionConfig
from models.qwen2_5_vl.model import Qwen2_5_VL as Qwen2_5_VL
from models.qwen2_5_vl.presets import PRESETS as PRESETS
