"""A dense, differentiable forward pass of batches of streams over the library's modules."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from mmi_jax.engine.programs.single_layer import run_layer
from models.interface import Model
from models.small.bank import Bank, patches
from models.small.config import GRID, GRID_TOKENS
from models.small.stream import CAPTION, KINDS, Batch
from models.tasks.script import NUM_BASE

VISION_PAIRS = 1024
"""Pairs of frames that the vision tower encodes at a time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compute:
    """Settings of the forward pass.

    Fields:
        dtype: of computation; parameters are cast to it.
        remats: layers keep their input only and compute everything again on the way back.
        attention: the dense kernel of `jax.nn.dot_product_attention`.
    """

    dtype: str = "bfloat16"
    remats: bool = False
    attention: Literal["cudnn", "xla"] = "cudnn"


def row_logits(model: Model, batch: Batch, bank: Bank, compute: Compute) -> Float[Array, "b r v"]:
    """Logits, float32, of the batch's rows.

    Args:
        model: in the dtype of computation.
        batch: streams padded at their end, so that causal attention alone keeps padding out.
        bank: what the frames are painted from.
        compute: how.
    """
    x = _embed(model, batch, bank, compute)
    rotary = model.rotary(batch.rope_pos)

    def attend(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=compute.attention), None

    graphdef, state = nnx.split(model.layers)

    def step(x, layer):
        return run_layer(graphdef, layer, x, rotary, attend)[0], None

    x, _ = jax.lax.scan(jax.checkpoint(step) if compute.remats else step, x, state)
    return model.unembed(jnp.take_along_axis(x, batch.rows[..., None], axis=1))


def _embed(model: Model, batch: Batch, bank: Bank, compute: Compute) -> Float[Array, "b t e"]:
    """Text and vision tokens in one array."""
    vision = _encode(model, batch, bank)
    rows = _spread(vision, jnp.asarray(batch.is_vision))
    # A product instead of a gather: on the way back a gather would add most of all rows to one, that of video.
    table = model.embedding.embedding[...]
    text = jax.nn.one_hot(batch.tokens, table.shape[0], dtype=table.dtype) @ table
    return jnp.where(batch.is_vision[..., None], rows, text)


@jax.custom_vjp
def _spread(vision: Float[Array, "b s e"], is_vision: Bool[Array, "b t"]) -> Float[Array, "b t e"]:
    """The vision tokens, in order, at the places where `is_vision`; anything elsewhere.

    Its derivative gathers too, where that of a gather would add rows one by one.
    """
    rank = jnp.clip(jnp.cumsum(is_vision, axis=1) - 1, 0, vision.shape[1] - 1)
    return jnp.take_along_axis(vision, rank[..., None], axis=1)


def _spread_forward(vision: Array, is_vision: Array) -> tuple[Array, tuple[Array, int]]:
    return _spread(vision, is_vision), (is_vision, vision.shape[1])


def _spread_backward(residuals: tuple[Array, int], gradient: Array) -> tuple[Array, None]:
    is_vision, num_rows = residuals
    rank = jnp.where(is_vision, jnp.cumsum(is_vision, axis=1) - 1, num_rows)
    stream, token = jnp.indices(rank.shape)
    place = jnp.full((rank.shape[0], num_rows + 1), -1).at[stream, rank].set(token, mode="drop")[:, :num_rows, None]
    return jnp.where(place >= 0, jnp.take_along_axis(gradient, jnp.maximum(place, 0), axis=1), 0), None


_spread.defvjp(_spread_forward, _spread_backward)


def _encode(model: Model, batch: Batch, bank: Bank) -> Float[Array, "b s e"]:
    """The vision tokens of all streams, `VISION_PAIRS` pairs of frames at a time."""
    num_streams, num_frames = batch.frames.shape[:2]
    frames = batch.frames.reshape(-1, NUM_BASE + 2)
    piece = min(2 * VISION_PAIRS, len(frames))
    padded = jnp.pad(frames, ((0, -len(frames) % piece), (0, 0)))

    @jax.checkpoint
    def encode(frames):
        return model.vision.encode(patches(bank, frames, model.dtype), GRID)

    tokens = jax.lax.map(encode, padded.reshape(-1, piece, NUM_BASE + 2))
    tokens = tokens.reshape(-1, GRID_TOKENS, tokens.shape[-1])[: len(frames) // 2]
    return tokens.reshape(num_streams, num_frames // 2 * GRID_TOKENS, -1)


def loss_and_metrics(
    params: Any, graphdef: nnx.GraphDef, batch: Batch, bank: Bank, compute: Compute
) -> tuple[Array, dict[str, Array]]:
    """Weighted cross-entropy of the labels, the questions' mean loss, and the accuracy of each kind."""
    model = nnx.merge(graphdef, jax.tree.map(lambda p: p.astype(compute.dtype), params))
    logits = row_logits(model, batch, bank, compute)
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch.labels[..., None], axis=-1)[..., 0]
    is_right = jnp.argmax(logits, axis=-1) == batch.labels
    is_label = batch.weights > 0

    def mean(values, where):
        return jnp.sum(jnp.where(where, values, 0)) / jnp.maximum(jnp.sum(where), 1)

    metrics = {"question_loss": mean(losses, is_label & (batch.kind != CAPTION))}
    for kind, name in enumerate(KINDS):
        metrics[f"{name}_accuracy"] = mean(is_right, is_label & (batch.kind == kind))
    return jnp.sum(losses * batch.weights) / jnp.maximum(jnp.sum(batch.weights), 1.0), metrics
