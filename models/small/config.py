"""The small model's sizes, tokenizer and processor."""

import dataclasses
import functools

from models.assets.demo import CHAT_TEMPLATE, DEMO_TEXT
from models.huggingface.tokenizer import Tokenizer
from models.huggingface.train_tokenizer import SPECIAL_TOKENS, train_tokenizer
from models.qwen2_5_vl.config import Qwen2_5_VLConfig, VisionConfig
from models.qwen2_5_vl.processing.preprocess import Preprocess
from models.qwen2_5_vl.processing.processor import Processor
from models.tasks.digits import SIDE
from models.tasks.haystack import GeneratedHaystack
from models.tasks.measure import Measure
from models.tasks.pictures import COLOURS
from models.tasks.text import MATCHING_QUESTION, card_question, options

PIXELS = SIDE * SIDE
"""Pixels of a frame, at least and at most: 16 tokens for every two frames."""
GRID = (SIDE // 14, SIDE // 14)
"""Rows and columns of a frame in patches."""
GRID_TOKENS = 16
"""Tokens of two frames, or of an image."""
VOCAB_SIZE = 768


@functools.lru_cache(maxsize=1)
def small_tokenizer() -> Tokenizer:
    """Byte-level BPE of the demo's text and the tasks' questions."""
    questions = [card_question(colour) for colour in range(len(COLOURS))] * 8
    text = "\n".join([DEMO_TEXT.read_text(encoding="utf-8"), *questions, MATCHING_QUESTION, options((1, 2, 3, 4))])
    return Tokenizer(
        backend=train_tokenizer(text, vocab_size=VOCAB_SIZE),
        chat_template=CHAT_TEMPLATE.read_text(encoding="utf-8"),
        special_tokens={"eos_token": "<|im_end|>", "pad_token": SPECIAL_TOKENS[0]},
    )


def small_config(
    *, num_layers: int = 8, embed_dim: int = 384, mlp_dim: int = 768, num_heads: int = 6, vision_dim: int = 128
) -> Qwen2_5_VLConfig:
    """11.6 million parameters: 8 layers of 6 query heads on 2 kv heads, a vision tower of 4 layers.

    Windows split a frame of 4 x 4 tokens in four; every second vision layer sees it whole. The rotary sections keep the
    proportions of the published models, so the rows' and columns' frequencies hardly turn over a whole video, and
    content can be compared over any distance.
    """
    tokenizer = small_tokenizer()
    vision = VisionConfig(
        num_layers=4,
        embed_dim=vision_dim,
        mlp_dim=3 * vision_dim,
        num_heads=2,
        out_dim=embed_dim,
        full_attention_layers=(1, 3),
        window_size=56,
    )
    return Qwen2_5_VLConfig(
        num_layers=num_layers,
        embed_dim=embed_dim,
        mlp_dim=mlp_dim,
        num_heads=num_heads,
        num_kv_heads=2,
        head_dim=64,
        vocab_size=VOCAB_SIZE,
        tie_embeddings=True,
        vision=vision,
        mrope_section=(8, 12, 12),
        image_token=tokenizer.token_id("<|image_pad|>"),
        video_token=tokenizer.token_id("<|video_pad|>"),
        vision_start_token=tokenizer.token_id("<|vision_start|>"),
        vision_end_token=tokenizer.token_id("<|vision_end|>"),
    )


@functools.lru_cache(maxsize=1)
def small_processor() -> Processor:
    """The processor of the small model, whatever its sizes."""
    frame = Preprocess(min_pixels=PIXELS, max_pixels=PIXELS)
    return Processor(config=small_config(), tokenizer=small_tokenizer(), image=frame, video=frame)


@functools.lru_cache(maxsize=1)
def colour_tokens() -> tuple[int, ...]:
    """The token of every colour's name as it stands in a question."""
    encoded = [small_tokenizer().encode(" " + name) for name in COLOURS]
    assert all(len(ids) == 1 for ids in encoded), "every colour is one token"
    return tuple(int(ids[0]) for ids in encoded)


@functools.lru_cache(maxsize=1)
def small_measure() -> Measure:
    """Lengths of the small model's prompts over generated frames."""
    measure = Measure.of(small_processor(), GeneratedHaystack())
    return dataclasses.replace(measure, count=functools.lru_cache(maxsize=4096)(measure.count))
