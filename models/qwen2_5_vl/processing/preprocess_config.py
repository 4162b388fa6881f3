"""The preprocessing a checkpoint asks for, in any of the files transformers has written it to."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.huggingface.json_files import read_json
from models.qwen2_5_vl.config import VisionConfig
from models.qwen2_5_vl.processing.preprocess import VIDEO, Preprocess

_FIELDS = {
    "patch_size": "patch_size",
    "merge_size": "merge_size",
    "temporal_patch_size": "temporal_patch_size",
    "image_mean": "mean",
    "image_std": "std",
}
_STEPS = ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")


def read_preprocess(directory: str | os.PathLike, vision: VisionConfig) -> tuple[Preprocess, Preprocess]:
    """Settings of a checkpoint for images, and for the frames of videos.

    Images: preprocessor_config.json, or `image_processor` in processor_config.json. Videos:
    video_preprocessor_config.json, or `video_processor` in processor_config.json; a checkpoint with neither (the
    published ones) gets the limits of Qwen2.5-VL's videos, 128 to 768 tokens a frame, as its authors' tools do.

    Raises:
        ValueError: a file asks for what this processor does not do, or contradicts the vision tower.
    """
    directory = Path(directory)
    joint = _optional(directory / "processor_config.json")
    image_keys = joint.get("image_processor") or _optional(directory / "preprocessor_config.json")
    video_keys = joint.get("video_processor") or _optional(directory / "video_preprocessor_config.json")
    image = _parse(image_keys, Preprocess())
    video = _parse(video_keys, dataclasses.replace(image, min_pixels=VIDEO.min_pixels, max_pixels=VIDEO.max_pixels))
    for config in (image, video):
        for name in ("patch_size", "merge_size", "temporal_patch_size"):
            if getattr(config, name) != getattr(vision, name):
                raise ValueError(
                    f"preprocessing must fit the vision tower: {name} is {getattr(vision, name)} there, got "
                    f"{getattr(config, name)} in {directory}"
                )
    return image, video


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _parse(keys: Mapping[str, Any], default: Preprocess) -> Preprocess:
    """`default` with what `keys` change; the pixel limits are called `size` or `min_pixels` and `max_pixels`."""
    skipped = [step for step in _STEPS if keys.get(step) is False]
    if skipped:
        raise ValueError(f"preprocessing always resizes, rescales, normalises and converts to RGB, got {skipped} off")
    if abs(keys.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6 or keys.get("resample", 3) != 3:
        raise ValueError(
            "preprocessing rescales by 1/255 and resamples bicubically (3), got "
            f"rescale_factor={keys.get('rescale_factor')}, resample={keys.get('resample')}"
        )
    changes = {ours: _immutable(keys[theirs]) for theirs, ours in _FIELDS.items() if keys.get(theirs) is not None}
    size = keys.get("size") or {}
    for ours, theirs in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        limit = keys.get(ours) or size.get(ours) or size.get(theirs)
        if limit is not None:
            changes[ours] = int(limit)
    return dataclasses.replace(default, **changes)


def _immutable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
