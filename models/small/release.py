"""The small model as a Hugging Face directory: the checkpoint that ships with the package."""

from pathlib import Path
from typing import Any

from models.families import family_of
from models.small.config import small_processor

MAX_SHARD_BYTES = 15 * 2**20
"""Bytes of a file of weights, so that the repository holds none larger."""


def release(model: Any, directory: Path) -> None:
    """Writes weights in shards, configuration, tokenizer, chat template and settings to a new or empty directory."""
    family_of(model.config).save_checkpoint(model, small_processor(), directory, max_shard_bytes=MAX_SHARD_BYTES)
