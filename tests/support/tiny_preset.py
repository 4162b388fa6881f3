"""A preset small enough for tests of whole commands, with blocks of 128 tokens."""

from models.qwen2_5_vl.config import Qwen2_5_VLConfig, VisionConfig

TINY = Qwen2_5_VLConfig(
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
