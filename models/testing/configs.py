"""Sizes of tiny models."""

from models.qwen2_5_vl.config import Qwen2_5_VLConfig, VisionConfig

TINY_CONFIG = Qwen2_5_VLConfig(
    num_layers=3,
    embed_dim=16,
    mlp_dim=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=40,
    tie_embeddings=True,
    mrope_section=(2, 1, 1),
    rope_theta=100.0,
    image_token=36,
    video_token=37,
    vision_start_token=38,
    vision_end_token=39,
    vision=VisionConfig(
        num_layers=1,
        embed_dim=8,
        mlp_dim=8,
        num_heads=1,
        out_dim=16,
        full_attention_layers=(0,),
        patch_size=2,
        window_size=8,
    ),
)
"""Of `tiny_model`: grouped queries, a vocabulary of 36 words, tied embeddings; for tiles of 16 tokens."""

TINY_PRESET = Qwen2_5_VLConfig(
    num_layers=2,
    embed_dim=64,
    mlp_dim=96,
    num_heads=6,
    num_kv_heads=2,
    head_dim=32,
    vocab_size=256,
    tie_embeddings=False,
    mrope_section=(4, 6, 6),
    image_token=250,
    video_token=251,
    vision_start_token=252,
    vision_end_token=253,
    vision=VisionConfig(
        num_layers=1,
        embed_dim=8,
        mlp_dim=8,
        num_heads=1,
        out_dim=64,
        full_attention_layers=(0,),
        patch_size=2,
        window_size=8,
    ),
)
"""For whole commands with tiles of 128 tokens: head dimensions that the kernels take, an untied head."""
