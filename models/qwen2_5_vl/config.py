"""The sizes of a Qwen2.5-VL model."""

import dataclasses
from typing import ClassVar

MODEL_TYPE = "qwen2_5_vl"
"""The family, as config.json names it."""

SPECIAL_TOKENS = ("image_token", "video_token", "vision_start_token", "vision_end_token")
"""Fields of `Qwen2_5_VLConfig` that are token ids."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Sizes of the vision tower (Qwen2.5-VL technical report, table 1); the defaults are those of all checkpoints.

    Fields:
        window_size: side of an attention window in pixels.
        merge_size: patches per side of the block that becomes one token.
        full_attention_layers: layers whose patches attend to the whole frame; in all others, to their window.
    """

    num_layers: int
    embed_dim: int
    mlp_dim: int
    num_heads: int
    out_dim: int
    full_attention_layers: tuple[int, ...]
    window_size: int = 112
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    num_channels: int = 3
    rope_theta: float = 10_000.0

    def __post_init__(self):
        """Checks that heads, rotary axes and windows come out whole."""
        _check_positive(self, ignored=("full_attention_layers",))
        if self.embed_dim % (4 * self.num_heads):
            raise ValueError(
                "the vision head dim must be a multiple of 4, half of it for rows and half for columns: "
                f"{self.embed_dim=}, {self.num_heads=}"
            )
        if self.window_size % (self.patch_size * self.merge_size):
            raise ValueError(
                f"a window must hold whole merged blocks: {self.window_size=} is no multiple of "
                f"{self.patch_size=} times {self.merge_size=}"
            )
        outside = [layer for layer in self.full_attention_layers if not 0 <= layer < self.num_layers]
        if outside:
            raise ValueError(f"full-attention layers must lie in [0, {self.num_layers}), got {outside}")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.embed_dim // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Numbers in one flattened patch."""
        return self.num_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def block_len(self) -> int:
        """Patches in one merged block, that is, per token."""
        return self.merge_size**2

    @property
    def window_len(self) -> int:
        """Side of an attention window in merged blocks."""
        return self.window_size // (self.patch_size * self.merge_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen2_5_VLConfig:
    """Sizes and special token ids of a Qwen2.5-VL model; the defaults are those of every published config.json.

    Fields:
        mrope_section: rotary frequencies that read the time, row and column position; they sum to head_dim / 2.
        tokens_per_second: steps of the time position in one second of video.
    """

    model_type: ClassVar[str] = MODEL_TYPE

    num_layers: int
    embed_dim: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tie_embeddings: bool
    vision: VisionConfig
    mrope_section: tuple[int, int, int] = (16, 24, 24)
    rope_theta: float = 1_000_000.0
    rms_norm_eps: float = 1e-6
    tokens_per_second: int = 2
    image_token: int = 151655
    video_token: int = 151656
    vision_start_token: int = 151652
    vision_end_token: int = 151653

    def __post_init__(self):
        """Checks that heads, rotary sections and the two halves of the model fit together."""
        _check_positive(self, ignored=("vision", "mrope_section", "tie_embeddings", *SPECIAL_TOKENS))
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads=} must be a multiple of {self.num_kv_heads=}")
        if 2 * sum(self.mrope_section) != self.head_dim:
            raise ValueError(
                f"the rotary sections must sum to half the head dim: {self.mrope_section=}, {self.head_dim=}"
            )
        if self.vision.out_dim != self.embed_dim:
            raise ValueError(f"vision tokens must be as wide as text: {self.vision.out_dim=}, {self.embed_dim=}")
        ids = [getattr(self, name) for name in SPECIAL_TOKENS]
        if len(set(ids)) != len(ids) or min(ids) < 0 or max(ids) >= self.vocab_size:
            raise ValueError(f"special ids must differ and lie in [0, {self.vocab_size=}), got {ids}")


def _check_positive(config, *, ignored: tuple[str, ...]) -> None:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in ignored and not value > 0:
            raise ValueError(f"{type(config).__name__}.{field.name} must be positive, got {value!r}")
