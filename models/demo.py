"""The demo's inputs, a video and a small trained model, both in the package; and a tiny random model for tests."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx
from tokenizers import decoders, models, pre_tokenizers, trainers

from mmi_jax.files import new_directory
from models.qwen2_5_vl.config import Qwen2_5_VLConfig, VisionConfig
from models.qwen2_5_vl.model import Qwen2_5_VL
from models.qwen2_5_vl.preprocess import CLIP_MEAN, CLIP_STD
from models.qwen2_5_vl.rope import inverse_frequencies
from models.qwen2_5_vl.weights import save_huggingface

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
MAX_VOCAB_SIZE = 640
PIXELS = 224 * 224
"""Pixels of the random model's frames, at least and at most: 64 tokens for every two frames of a square video."""

_ASSETS = Path(__file__).parent / "assets"
DEMO_TEXT = _ASSETS / "demo_text.txt"
CHAT_TEMPLATE = _ASSETS / "chat_template.jinja"
DEMO_MODEL = _ASSETS / "small"
"""The checkpoint that `models.small` trains."""
DEMO_VIDEO = _ASSETS / "demo.mp4"
"""72 seconds: at `DEMO_FPS` frames per second 288 frames, and 2,304 tokens of the demo's model."""
DEMO_FPS = 4
DEMO_ANSWERS = {"red": "7", "blue": "3", "yellow": "9", "green": "4"}
"""The cards in the video, in order: colour and digit."""


def demo_question(colour: str) -> str:
    """What the demo's model is asked about a card."""
    return f"Which digit is on the {colour} card?"


def build_demo_model(directory: Path | str, *, seed: int = 0) -> None:
    """Writes a tiny random Qwen2.5-VL as a Hugging Face directory, the same one for the same `seed`.

    For tests and trials. Nothing is trained: its answers mean nothing. All weights are random, except that the biases
    of queries and keys are drawn so that attention falls off with distance in time, in row and column, or not at all,
    depending on the head. Without that, random attention is nearly uniform and no sparse pattern could be seen in it.

    Raises:
        ValueError: `directory` exists and is not empty. A failed run leaves nothing.
    """
    tokenizer = train_tokenizer(DEMO_TEXT.read_text(encoding="utf-8"))
    model = Qwen2_5_VL(demo_config(tokenizer), dtype=jnp.float32, rngs=nnx.Rngs(seed))
    shape_attention(model, np.random.default_rng(seed))
    with new_directory(Path(directory)) as temporary:
        save_huggingface(model, temporary)
        tokenizer.save(str(temporary / "tokenizer.json"))
        shutil.copyfile(CHAT_TEMPLATE, temporary / "chat_template.jinja")
        for name, fields in checkpoint_settings(tokenizer, PIXELS).items():
            (temporary / name).write_text(json.dumps(fields, indent=2) + "\n")


def demo_config(tokenizer: tokenizers.Tokenizer) -> Qwen2_5_VLConfig:
    """4 layers of 8 query heads on 2 kv heads; a vision tower whose windows split a frame of 8 x 8 tokens in four."""
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
        image_token=_token_id(tokenizer, "<|image_pad|>"),
        video_token=_token_id(tokenizer, "<|video_pad|>"),
        vision_start_token=_token_id(tokenizer, "<|vision_start|>"),
        vision_end_token=_token_id(tokenizer, "<|vision_end|>"),
    )


def train_tokenizer(text: str, *, vocab_size: int = MAX_VOCAB_SIZE) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer with Qwen's special tokens; digits stand alone."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(), trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


# What the query heads that share a kv head look at: nats by which one step along time, row and column lowers attention,
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


def checkpoint_settings(tokenizer: tokenizers.Tokenizer, num_pixels: int) -> dict[str, dict]:
    """The small JSON files of a checkpoint whose frames have `num_pixels` pixels, by name."""
    pixels = dict(
        image_processor_type="Qwen2VLImageProcessor",
        patch_size=14,
        merge_size=2,
        temporal_patch_size=2,
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
        size=dict(shortest_edge=num_pixels, longest_edge=num_pixels),
    )
    video = {k: v for k, v in pixels.items() if k != "image_processor_type"}
    return {
        "preprocessor_config.json": pixels,
        "video_preprocessor_config.json": video | dict(video_processor_type="Qwen2VLVideoProcessor"),
        "tokenizer_config.json": dict(
            tokenizer_class="PreTrainedTokenizerFast", eos_token="<|im_end|>", pad_token="<|endoftext|>"
        ),
        "generation_config.json": dict(
            eos_token_id=[_token_id(tokenizer, "<|im_end|>"), _token_id(tokenizer, "<|endoftext|>")]
        ),
    }


def _token_id(tokenizer: tokenizers.Tokenizer, token: str) -> int:
    found = tokenizer.token_to_id(token)
    assert found is not None, token
    return found
