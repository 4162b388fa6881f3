"""Integer arithmetic of planning, in the form that compiles to the fewest operations."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels.notation import Array, Int32


def floor_divide(x: Int32[Array, "*n"], divisor: int) -> Int32[Array, "*n"]:
    """`x // divisor`, by a shift where the divisor is a power of 2: XLA expands a floor division into six others."""
    shift = divisor.bit_length() - 1
    return x >> shift if divisor == 1 << shift else x // divisor


def search(
    ascending: Int32[Array, " n"], values: Int32[Array, "*m"], *, side: Literal["left", "right"]
) -> Int32[Array, "*m"]:
    """`jnp.searchsorted` as int32.

    On an accelerator a loop costs kernel launches at every step of the binary search, so it is unrolled there; on a CPU
    that only doubles the time to compile a plan.
    """

    def by(method: Literal["scan", "scan_unrolled"]) -> Callable[[Array, Array], Array]:
        return lambda a, v: jnp.searchsorted(a, v, side=side, method=method).astype(jnp.int32)

    return jax.lax.platform_dependent(ascending, jnp.asarray(values), cpu=by("scan"), default=by("scan_unrolled"))
