"""The published Qwen2.5-VL sizes.

Sizes: Qwen2.5-VL technical report, table 1, and the configurations published with the checkpoints. Parameters,
counted from the published checkpoints (bytes of the bfloat16 tensors, halved): 3,754,622,976, 8,292,166,656,
33,452,718,336 and 73,410,777,344.
"""

from models.qwen2_5_vl.config import Qwen2_5_VLConfig, VisionConfig


def _vision(*, mlp_dim: int, out_dim: int) -> VisionConfig:
    return VisionConfig(
        num_layers=32,
        embed_dim=1280,
        mlp_dim=mlp_dim,
        num_heads=16,
        out_dim=out_dim,
        full_attention_layers=(7, 15, 23, 31),
    )


PRESETS = {
    "3b": Qwen2_5_VLConfig(
        num_layers=36,
        embed_dim=2048,
        mlp_dim=11008,
        num_heads=16,
        num_kv_heads=2,
        head_dim=128,
        vocab_size=151936,
        tie_embeddings=True,
        vision=_vision(mlp_dim=3420, out_dim=2048),
    ),
    "7b": Qwen2_5_VLConfig(
        num_layers=28,
        embed_dim=3584,
        mlp_dim=18944,
        num_heads=28,
        num_kv_heads=4,
        head_dim=128,
        vocab_size=152064,
        tie_embeddings=False,
        vision=_vision(mlp_dim=3420, out_dim=3584),
    ),
    "32b": Qwen2_5_VLConfig(
        num_layers=64,
        embed_dim=5120,
        mlp_dim=27648,
        num_heads=40,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=152064,
        tie_embeddings=False,
        vision=_vision(mlp_dim=3456, out_dim=5120),
    ),
    "72b": Qwen2_5_VLConfig(
        num_layers=80,
        embed_dim=8192,
        mlp_dim=29568,
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=152064,
        tie_embeddings=False,
        vision=_vision(mlp_dim=3456, out_dim=8192),
    ),
}
"""Configurations by published size."""
