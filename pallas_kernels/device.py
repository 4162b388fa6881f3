"""Look-ups of the default device, made when called: nothing here runs at import."""

import jax

NUM_MULTIPROCESSORS = 132
"""Of an H100 or H200 SXM ("NVIDIA H100 Tensor Core GPU Architecture", section "H100 SM architecture")."""


def has_hopper_gpu() -> bool:
    """Whether the default device is a GPU of compute capability 9.x."""
    return jax.default_backend() == "gpu" and str(jax.devices()[0].compute_capability).startswith("9.")


def check_hopper_gpu() -> None:
    """Raises NotImplementedError where no Hopper GPU is the default device."""
    if not has_hopper_gpu():
        raise NotImplementedError(f"mosaic_gpu needs a GPU of compute capability 9.x, got {jax.default_backend()=}")


def tpu_kind() -> str:
    """The kind of the default device, as "TPU v5 lite".

    Raises:
      NotImplementedError: the default backend is no TPU.
    """
    if jax.default_backend() != "tpu":
        raise NotImplementedError(f"mosaic_tpu needs a TPU, got {jax.default_backend()=}")
    return jax.devices()[0].device_kind
