"""Files of a checkpoint that a processor is read from."""

import json
from pathlib import Path
from typing import Any

from models.qwen2_5_vl.processing.preprocess import Preprocess
from models.qwen2_5_vl.processing.processor import Processor


def save_processor(processor: Processor, directory: Path) -> None:
    """Writes tokenizer, chat template and preprocessing settings into a directory, which a processor is read from."""
    processor.tokenizer.backend.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(processor.tokenizer.chat_template, encoding="utf-8")
    for name, fields in _settings(processor).items():
        (directory / name).write_text(json.dumps(fields, indent=2) + "\n")


def _settings(processor: Processor) -> dict[str, dict[str, Any]]:
    """The small JSON files by name."""
    tokenizer = processor.tokenizer
    return {
        "preprocessor_config.json": {"image_processor_type": "Qwen2VLImageProcessor"} | _pixels(processor.image),
        "video_preprocessor_config.json": _pixels(processor.video) | {"video_processor_type": "Qwen2VLVideoProcessor"},
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"} | dict(tokenizer.special_tokens),
        "generation_config.json": {"eos_token_id": [tokenizer.token_id(t) for t in tokenizer.special_tokens.values()]},
    }


def _pixels(config: Preprocess) -> dict[str, Any]:
    return dict(
        patch_size=config.patch_size,
        merge_size=config.merge_size,
        temporal_patch_size=config.temporal_patch_size,
        image_mean=config.mean,
        image_std=config.std,
        size=dict(shortest_edge=config.min_pixels, longest_edge=config.max_pixels),
    )
