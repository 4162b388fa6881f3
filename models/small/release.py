"""The small model as a Hugging Face directory: what ships with the package."""

import json
import shutil
from pathlib import Path
from typing import Any

from mmi_jax.files import new_directory
from models.demo import CHAT_TEMPLATE, checkpoint_settings
from models.families import family_of
from models.small.config import PIXELS, small_tokenizer

MAX_SHARD_BYTES = 15 * 2**20


def release(model: Any, directory: Path) -> None:
    """Writes weights in shards, configuration, tokenizer, chat template and settings to a new or empty directory."""
    with new_directory(directory) as temporary:
        family_of(model.config).save_model(model, temporary, max_shard_bytes=MAX_SHARD_BYTES)
        small_tokenizer().backend.save(str(temporary / "tokenizer.json"))
        shutil.copyfile(CHAT_TEMPLATE, temporary / "chat_template.jinja")
        for name, fields in checkpoint_settings(small_tokenizer().backend, PIXELS).items():
            (temporary / name).write_text(json.dumps(fields, indent=2) + "\n")
