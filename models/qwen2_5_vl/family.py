"""The family Qwen2.5-VL: its registration."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Int32

from mmi_jax.files import new_directory
from models.interface import Family, HeadShape, MediumSize, OnTensor
from models.media.video import Video
from models.media.video_stream import VideoStream
from models.prompt import TokenizedPrompt
from models.qwen2_5_vl.checkpoints.dialects import read_config
from models.qwen2_5_vl.checkpoints.weights import load, save_huggingface
from models.qwen2_5_vl.config import MODEL_TYPE, Qwen2_5_VLConfig
from models.qwen2_5_vl.decoder import Decoder, shape_heads
from models.qwen2_5_vl.model import Qwen2_5_VL
from models.qwen2_5_vl.presets import PRESETS
from models.qwen2_5_vl.processing.pixels import PixelPatches, pixel_source
from models.qwen2_5_vl.processing.placeholders import num_tokens, token_layout
from models.qwen2_5_vl.processing.positions import mrope_positions
from models.qwen2_5_vl.processing.preprocess import VIDEO
from models.qwen2_5_vl.processing.processor import Processor
from models.qwen2_5_vl.processing.processor_files import save_processor
from models.qwen2_5_vl.vision.memory import full_batch_bytes

WORDS = 0.9
"""Fraction of the ids below the placeholders that are words: the published tokenizers put special tokens last."""


class Qwen2_5_VLFamily(Family[Qwen2_5_VLConfig, Qwen2_5_VL]):
    """Qwen2.5-VL, 3B to 72B."""

    model_type = MODEL_TYPE
    presets = PRESETS

    def read_config(self, directory: Path) -> Qwen2_5_VLConfig:
        """As of `Family`."""
        return read_config(directory)

    def load_model(
        self, directory: Path, *, dtype: DTypeLike, on_tensor: OnTensor | None = None, mesh: Mesh | None = None
    ) -> Qwen2_5_VL:
        """As of `Family`."""
        return load(directory, dtype=dtype, on_tensor=on_tensor, mesh=mesh)

    def read_processor(self, directory: Path, **options: Any) -> Processor:
        """As of `Family`; the options are `rule` and `cap_pixels_per_frame`."""
        return Processor.from_directory(directory, **options)

    def save_checkpoint(
        self, model: Qwen2_5_VL, processor: Processor, directory: Path, *, max_shard_bytes: int | None = None
    ) -> None:
        """As of `Family`."""
        with new_directory(directory) as temporary:
            save_huggingface(model, temporary, max_shard_bytes=max_shard_bytes)
            save_processor(processor, temporary)

    def new_model(self, config: Qwen2_5_VLConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> Qwen2_5_VL:
        """As of `Family`."""
        return Qwen2_5_VL(config, dtype=dtype, rngs=rngs)

    def without_vision(self, model: Qwen2_5_VL) -> Decoder:
        """As of `Family`."""
        return Decoder(model)

    def shape_heads(self, model: Decoder | Qwen2_5_VL, shapes: Sequence[HeadShape]) -> None:
        """As of `Family`."""
        shape_heads(model, shapes)

    def num_words(self, config: Qwen2_5_VLConfig) -> int:
        """As of `Family`."""
        return int(WORDS * min(config.image_token, config.video_token))

    def medium_tokens(self, config: Qwen2_5_VLConfig, medium: MediumSize) -> Int32[np.ndarray, " t"]:
        """As of `Family`."""
        placeholder = config.image_token if medium.is_image else config.video_token
        ids = np.full(2 + num_tokens(medium.grid, config), placeholder, np.int32)
        ids[0], ids[-1] = config.vision_start_token, config.vision_end_token
        return ids

    def tokenized(
        self, config: Qwen2_5_VLConfig, tokens: Int32[np.ndarray, " t"], media: Sequence[MediumSize]
    ) -> TokenizedPrompt:
        """As of `Family`."""
        grids = tuple(medium.grid for medium in media)
        return TokenizedPrompt(
            tokens=tokens,
            rope_pos=mrope_positions(tokens, grids, [medium.seconds for medium in media], config),
            layout=token_layout(tokens, grids, config),
            grids=grids,
        )

    def pixel_patches(self, config: Qwen2_5_VLConfig, video: Video | VideoStream) -> PixelPatches:
        """As of `Family`."""
        vision = config.vision
        smallest = (vision.patch_size * vision.merge_size) ** 2
        preprocess = dataclasses.replace(
            VIDEO, patch_size=vision.patch_size, merge_size=vision.merge_size, min_pixels=smallest
        )
        return PixelPatches(sources=(pixel_source(video, preprocess),))

    def vision_bytes(self, config: Qwen2_5_VLConfig, num_tokens: int, dtype: DTypeLike) -> int:
        """As of `Family`."""
        return full_batch_bytes(config.vision, num_tokens, dtype)


FAMILY = Qwen2_5_VLFamily()
