"""Rotary angles on three axes (mRoPE), and the rotation of queries and keys by them."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from models.qwen2_5_vl.config import Qwen2_5_VLConfig


def inverse_frequencies(theta: float, num_frequencies: int) -> Float[np.ndarray, " d"]:
    """`theta ** (-k / num_frequencies)` for k = 0, 1, ...; radians per position, float32."""
    return (theta ** (-np.arange(num_frequencies) / num_frequencies)).astype(np.float32)


def text_rotary(
    rope_pos: Int32[Array, "3 b t"], config: Qwen2_5_VLConfig
) -> tuple[Float[Array, "b t d"], Float[Array, "b t d"]]:
    """Cosine and sine, float32, of every token's angles; each frequency reads one axis, in `mrope_section` chunks."""
    axis = np.repeat(np.arange(3), config.mrope_section)
    inverse = inverse_frequencies(config.rope_theta, config.head_dim // 2)
    angles = jnp.moveaxis(rope_pos, 0, -1)[..., axis].astype(jnp.float32) * inverse[None, None]
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "b t h d"], cos: Float[Array, "*b t d"], sin: Float[Array, "*b t d"]
) -> Float[Array, "b t h d"]:
    """`x` with dimensions i and i + d/2 rotated together, computed in float32, in the dtype of `x`."""
    x32 = x.astype(jnp.float32)
    first, second = jnp.split(x32, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return (x32 * cos[..., None, :] + turned * sin[..., None, :]).astype(x.dtype)
