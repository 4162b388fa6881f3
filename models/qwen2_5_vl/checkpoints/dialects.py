"""A `Qwen2_5_VLConfig` from and to the config.json of a Hugging Face checkpoint, which comes in three dialects.

| dialect | decoder fields | rotary fields |
|---|---|---|
| flat, as the published checkpoints | top level | `rope_theta`, `rope_scaling {mrope_section}` |
| nested, transformers 4 | `text_config` | `rope_theta`, `rope_scaling {mrope_section}` |
| nested, transformers 5 | `text_config` | `rope_parameters {rope_theta, mrope_section}` |
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.qwen2_5_vl.config import MODEL_TYPE, Qwen2_5_VLConfig, VisionConfig

MAX_POSITIONS = 128_000
"""`max_position_embeddings` of the published config.json."""


def read_config(directory: Path) -> Qwen2_5_VLConfig:
    """The configuration in `directory/config.json`.

    Raises:
        ValueError: no such file, not JSON, or none of the dialects above.
    """
    path = directory / "config.json"
    try:
        fields = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"a checkpoint needs a config.json: {path}: {error}") from error
    return from_huggingface(fields)


def from_huggingface(fields: Mapping[str, Any]) -> Qwen2_5_VLConfig:
    """The configuration in the fields of a config.json; no field falls back to a default of the class that wrote it.

    Raises:
        ValueError: another model, a missing field, or a feature that this model does not have.
    """
    if fields.get("model_type") != MODEL_TYPE:
        raise ValueError(f"model_type must be {MODEL_TYPE!r}, got {fields.get('model_type')!r}; {sorted(fields)=}")
    text = fields["text_config"] if "text_config" in fields else fields
    vision = _get(fields, "vision_config")
    for name, part in (("text", text), ("vision", vision)):
        _refuse(part.get("hidden_act", "silu") != "silu", f"{name} activation {part.get('hidden_act')!r}, only silu")
    _refuse(bool(text.get("use_sliding_window")), "use_sliding_window")
    _refuse("quantization_config" in fields, "quantization_config")
    num_heads, embed_dim = _get(text, "num_attention_heads"), _get(text, "hidden_size")
    return Qwen2_5_VLConfig(
        num_layers=_get(text, "num_hidden_layers"),
        embed_dim=embed_dim,
        mlp_dim=_get(text, "intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=_get(text, "num_key_value_heads"),
        head_dim=text.get("head_dim") or embed_dim // num_heads,
        vocab_size=_get(text, "vocab_size"),
        rms_norm_eps=_get(text, "rms_norm_eps"),
        tie_embeddings=_is_tied(fields, text),
        tokens_per_second=_get(vision, "tokens_per_second"),
        image_token=_get(fields, "image_token_id"),
        video_token=_get(fields, "video_token_id"),
        vision_start_token=_get(fields, "vision_start_token_id"),
        vision_end_token=_get(fields, "vision_end_token_id"),
        vision=_vision_config(vision),
        **_rope_fields(text),
    )


def _vision_config(fields: Mapping[str, Any]) -> VisionConfig:
    rope = fields.get("rope_parameters") or {}
    _refuse(rope.get("rope_type", "axial") != "axial", f"vision {rope=}")
    return VisionConfig(
        num_layers=_get(fields, "depth"),
        embed_dim=_get(fields, "hidden_size"),
        mlp_dim=_get(fields, "intermediate_size"),
        num_heads=_get(fields, "num_heads"),
        out_dim=_get(fields, "out_hidden_size"),
        full_attention_layers=tuple(_get(fields, "fullatt_block_indexes")),
        window_size=_get(fields, "window_size"),
        patch_size=_get(fields, "patch_size", "spatial_patch_size"),
        temporal_patch_size=_get(fields, "temporal_patch_size"),
        merge_size=_get(fields, "spatial_merge_size"),
        num_channels=_get(fields, "in_channels", "in_chans"),
        rope_theta=float(rope.get("rope_theta", 10_000.0)),
    )


def _rope_fields(text: Mapping[str, Any]) -> dict[str, Any]:
    """theta and sections, from whichever of the two forms is there."""
    if text.get("rope_parameters"):
        rope = text["rope_parameters"]
        theta = _get(rope, "rope_theta")
    elif text.get("rope_scaling"):
        rope = text["rope_scaling"]
        theta = _get(text, "rope_theta")
    else:
        raise ValueError(
            "unknown config dialect: expected rope_parameters, or rope_theta with rope_scaling, "
            f"in text_config or at the top level, got {sorted(text)}"
        )
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    _refuse(rope_type not in ("default", "mrope"), f"rotary positions of type {rope_type!r}")
    return dict(rope_theta=float(theta), mrope_section=tuple(_get(rope, "mrope_section")))


def _is_tied(fields: Mapping[str, Any], text: Mapping[str, Any]) -> bool:
    """Whether the head is the embedding: written outside, inside or in both, and by nested dialects only when true."""
    return any(part.get("tie_word_embeddings", False) for part in (fields, text))


def _get(fields: Mapping[str, Any], *names: str) -> Any:
    """The first of `names` that is there."""
    for name in names:
        if name in fields:
            return fields[name]
    raise ValueError(f"unknown config dialect: config.json lacks {' or '.join(map(repr, names))}, got {sorted(fields)}")


def _refuse(is_present: bool, feature: str) -> None:
    if is_present:
        raise ValueError(f"this model does not have what config.json asks for: {feature}")


def to_huggingface(config: Qwen2_5_VLConfig) -> dict[str, Any]:
    """The fields of a config.json in the flat dialect; `from_huggingface` reads them back."""
    vision = config.vision
    fields = dict(
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        model_type=MODEL_TYPE,
        hidden_act="silu",
        num_hidden_layers=config.num_layers,
        hidden_size=config.embed_dim,
        intermediate_size=config.mlp_dim,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        vocab_size=config.vocab_size,
        tie_word_embeddings=config.tie_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        rope_theta=config.rope_theta,
        rope_scaling=dict(type="mrope", mrope_section=list(config.mrope_section)),
        max_position_embeddings=MAX_POSITIONS,
        use_sliding_window=False,
        image_token_id=config.image_token,
        video_token_id=config.video_token,
        vision_start_token_id=config.vision_start_token,
        vision_end_token_id=config.vision_end_token,
        vision_config=dict(
            model_type=MODEL_TYPE,
            hidden_act="silu",
            depth=vision.num_layers,
            hidden_size=vision.embed_dim,
            intermediate_size=vision.mlp_dim,
            num_heads=vision.num_heads,
            out_hidden_size=vision.out_dim,
            fullatt_block_indexes=list(vision.full_attention_layers),
            window_size=vision.window_size,
            patch_size=vision.patch_size,
            spatial_patch_size=vision.patch_size,
            temporal_patch_size=vision.temporal_patch_size,
            spatial_merge_size=vision.merge_size,
            in_channels=vision.num_channels,
            tokens_per_second=config.tokens_per_second,
            rope_parameters=dict(rope_type="axial", rope_theta=vision.rope_theta),
        ),
    )
    if config.head_dim * config.num_heads != config.embed_dim:
        fields["head_dim"] = config.head_dim
    return fields
