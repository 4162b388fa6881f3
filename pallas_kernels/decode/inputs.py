"""DecodeInputs: what every backend of decode_attention is given, checked once."""

import dataclasses

from pallas_kernels.notation import Array, Float, Int32


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeInputs:
    """The arguments of `decode_attention`, defaults filled in."""

    q: Float[Array, "b h d"]
    k: Float[Array, "layers b s g d"]
    v: Float[Array, "layers b s g d"]
    layer: Int32[Array, ""]
    lengths: Int32[Array, " b"]
    k_new: Float[Array, "layers b n g d"]
    v_new: Float[Array, "layers b n g d"]
    num_new: Int32[Array, ""]
    scale: float

    @property
    def heads_per_kv_head(self) -> int:
        """Query heads that read one kv head."""
        return self.q.shape[1] // self.k.shape[3]


def check_inputs(inputs: DecodeInputs) -> None:
    """Raises ValueError, with rule, expected and got, for arguments that do not fit each other."""
    batch, num_heads, head_dim = inputs.q.shape
    num_layers, _, _, num_kv_heads, _ = inputs.k.shape
    expected = (num_layers, batch, num_kv_heads, head_dim)
    for name in ("k", "v", "k_new", "v_new"):
        array = getattr(inputs, name)
        if (*array.shape[:2], *array.shape[3:]) != expected:
            raise ValueError(f"{name} must be [layers, b, tokens, g, d] with {expected} of those, got {array.shape}")
        if array.dtype != inputs.k.dtype:
            raise ValueError(f"keys and values must have one dtype: k has {inputs.k.dtype}, {name} {array.dtype}")
    if inputs.k.shape != inputs.v.shape or inputs.k_new.shape != inputs.v_new.shape:
        raise ValueError(
            f"keys and values must have one shape: got {inputs.k.shape} and {inputs.v.shape}, "
            f"{inputs.k_new.shape} and {inputs.v_new.shape}"
        )
    if inputs.lengths.shape != (batch,):
        raise ValueError(f"lengths must be one per prompt: expected {(batch,)}, got {inputs.lengths.shape}")
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads=} must be a multiple of {num_kv_heads=}")
