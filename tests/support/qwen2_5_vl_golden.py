"""The golden checkpoints, read back as prompts; scripts/make_golden.py says what is in them."""

import functools
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from mmi_jax.layout import stack
from models.prompt import Prompt
from models.qwen2_5_vl import Qwen2_5_VL
from models.qwen2_5_vl.checkpoints.weights import load
from models.qwen2_5_vl.processing.placeholders import num_tokens, token_layout
from models.qwen2_5_vl.processing.positions import TRANSFORMERS_5_23, mrope_positions

GOLDEN = Path(__file__).parents[1] / "models/golden"
CASES = ("gqa7", "wide_heads")


@functools.cache
def golden(case: str) -> dict[str, np.ndarray]:
    return load_file(GOLDEN / case / "golden.safetensors")


@functools.cache
def model(case: str) -> Qwen2_5_VL:
    return load(GOLDEN / case, dtype=jnp.float32)


def grids(case: str) -> tuple[tuple[int, int, int], ...]:
    return tuple((int(frames), int(rows), int(columns)) for frames, rows, columns in golden(case)["grids"])


def rows(case: str) -> list[tuple[np.ndarray, tuple, list[float], np.ndarray]]:
    """Of each prompt of the batch: unpadded tokens, its grids, its seconds, and its places in the padded row."""
    data, config = golden(case), model(case).config
    found, first = [], 0
    for tokens, mask in zip(data["tokens"], data["mask"], strict=True):
        places = np.flatnonzero(mask)
        tokens = tokens[places].astype(np.int32)
        needed = np.isin(tokens, [config.image_token, config.video_token]).sum()
        last = first
        while needed > 0:
            needed -= num_tokens(grids(case)[last], config)
            last += 1
        found.append((tokens, grids(case)[first:last], data["seconds"][first:last].tolist(), places))
        first = last
    return found


def prompt(case: str) -> Prompt:
    """The batch, right-padded as the model wants it, with the positions of the transformers that made it."""
    config = model(case).config
    parts = rows(case)
    longest = max(len(tokens) for tokens, *_ in parts)
    positions = [mrope_positions(*part[:3], config, rule=TRANSFORMERS_5_23) for part in parts]
    return Prompt(
        tokens=np.stack([np.pad(tokens, (0, longest - len(tokens))) for tokens, *_ in parts]),
        rope_pos=np.stack([np.pad(pos, ((0, 0), (0, longest - pos.shape[1]))) for pos in positions], axis=1),
        layout=stack([token_layout(tokens, of_row, config) for tokens, of_row, *_ in parts]),
        patches=golden(case)["patches"],
        grids=grids(case),
    )


def unpad(case: str, value: np.ndarray) -> np.ndarray:
    """The real rows of a recorded `[b, t, ...]` array, prompt by prompt, on one axis."""
    return np.concatenate([value[i, places] for i, (*_, places) in enumerate(rows(case))])


def unpad_right(case: str, value) -> np.ndarray:
    """The real rows of an array `[b, t, ...]` that our right-padded model made."""
    return np.concatenate([np.asarray(value)[i, : len(tokens)] for i, (tokens, *_) in enumerate(rows(case))])
