"""A tiny random model as a Hugging Face directory: for tests and trials of whole commands."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx

from models.assets.demo import CHAT_TEMPLATE, DEMO_TEXT
from models.families import family_of
from models.huggingface.tokenizer import Tokenizer
from models.huggingface.train_tokenizer import MAX_VOCAB_SIZE, train_tokenizer
from models.qwen2_5_vl.config import Qwen2_5_VLConfig, VisionConfig
from models.qwen2_5_vl.model import Qwen2_5_VL
from models.qwen2_5_vl.processing.preprocess import Preprocess
from models.qwen2_5_vl.processing.processor import Processor
from models.qwen2_5_vl.rope import inverse_frequencies

PIXELS = 224 * 224
"""Pixels of the random model's frames, at least and at most: 64 tokens for every two frames of a square video."""


def write_random_checkpoint(directory: Path | str, *, seed: int = 0) -> None:
    """Writes a tiny random Qwen2.5-VL as a Hugging Face directory, the same one for the same `seed`.

    For tests and trials. Nothing is trained: its answers mean nothing. All weights are random, except that the biases
    of queries and keys are drawn so that attention falls off with distance in time, in row and column, or not at all,
    depending on the head. Without that, random attention is nearly uniform and no sparse pattern could be seen in it.

    Raises:
        ValueError: `directory` exists and is not empty. A failed run leaves nothing.
    """
    tokenizer = random_checkpoint_tokenizer()
    config, frame = random_checkpoint_config(tokenizer.backend), Preprocess(min_pixels=PIXELS, max_pixels=PIXELS)
    model = Qwen2_5_VL(config, dtype=jnp.float32, rngs=nnx.Rngs(seed))
    shape_attention(model, np.random.default_rng(seed))
    processor = Processor(config=config, tokenizer=tokenizer, image=frame, video=frame)
    family_of(config).save_checkpoint(model, processor, Path(directory))


def random_checkpoint_tokenizer() -> Tokenizer:
    """Byte-level BPE of the demo's text, with the demo's chat template."""
    return Tokenizer(
        backend=train_tokenizer(DEMO_TEXT.read_text(encoding="utf-8")),
        chat_template=CHAT_TEMPLATE.read_text(encoding="utf-8"),
        special_tokens={"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    )


def random_checkpoint_config(tokenizer: tokenizers.Tokenizer) -> Qwen2_5_VLConfig:
    """4 layers of 8 query heads on 2 kv heads; a vision tower whose windows split a frame of 8 x 8 tokens in four."""
    token_id = Tokenizer(backend=tokenizer, chat_template="").token_id
    vision = VisionConfig(
        num_layers=4, embed_dim=64, mlp_dim=128, num_heads=4, out_dim=256, full_attention_layers=(3,), window_size=112
    )
    return Qwen2_5_VLConfig(
        num_layers=4,
        embed_dim=256,
        mlp_dim=512,
        num_heads=8,
        num_kv_heads=2,
        head_dim=32,
        vocab_size=MAX_VOCAB_SIZE,
        tie_embeddings=True,
        vision=vision,
        mrope_section=(4, 6, 6),
        # Neighbouring rows and columns differ by too small an angle at the published 1,000,000 with so few frequencies.
        rope_theta=10.0,
        image_token=token_id("<|image_pad|>"),
        video_token=token_id("<|video_pad|>"),
        vision_start_token=token_id("<|vision_start|>"),
        vision_end_token=token_id("<|vision_end|>"),
    )


# Attention of the query heads of a kv head: nats by which one step along time, row and column lowers attention,
# and a factor on the queries' random kernel.
_DECAYS = (
    (2.0, 0.0, 0.0),  # near in time, and again where the few frequencies of time beat
    (0.0, 2.0, 2.0),  # the same place in every frame
    (0.0, 2.0, 0.0),  # the same row in every frame
    (0.0, 0.0, 0.0),  # by content alone
)
_QUERY_SCALE = (0.25, 0.25, 0.25, 2.0)
_KEY_SCALE = 0.25


def shape_attention(model: Qwen2_5_VL, rng: np.random.Generator) -> None:
    """Draws query and key biases so that q . k falls off along chosen axes of mRoPE, by head; see `_DECAYS`.

    The rotary angles turn a bias like the rest of q and k. Two biases of sizes a and b at frequency f multiply to
    a b cos(f x) at distance x: largest at 0, and one step lowers it by about a b f^2 / 2. The kernels are scaled down
    where their product with the other's bias would drown that.
    """
    config, attention = model.config, model.layers.attention
    section = np.repeat(np.arange(3), config.mrope_section)
    one_step = np.square(inverse_frequencies(config.rope_theta, len(section))) / 2 / np.sqrt(config.head_dim)
    strength = (1 / np.bincount(section, one_step))[section]
    angles = rng.uniform(0, 2 * np.pi, (config.num_layers, config.num_kv_heads, 1, len(section)))
    # Dimensions i and i + d/2 turn together.
    k_bias = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1) * np.tile(np.sqrt(strength), 2)
    q_bias = k_bias * np.tile(np.array(_DECAYS)[:, section], 2)
    query_scale = np.tile(np.repeat(_QUERY_SCALE, config.head_dim), config.num_kv_heads)
    for projection, bias, scale in ((attention.q, q_bias, query_scale), (attention.k, k_bias, _KEY_SCALE)):
        assert projection.bias is not None
        projection.bias[...] = jnp.asarray(bias.reshape(config.num_layers, -1), model.dtype)
        projection.kernel[...] = projection.kernel[...] * jnp.asarray(scale, model.dtype).reshape(1, 1, -1)
