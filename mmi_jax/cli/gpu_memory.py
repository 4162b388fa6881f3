"""The fraction of a GPU's memory that commands let JAX take, set before JAX opens the device unless already set."""

import os

FRACTION_VARIABLE, PREALLOCATE_VARIABLE = "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE"

NEARLY_ALL = 0.96
"""For whole models: a million tokens through a 7B take 113 GiB of an H200's 140."""

ALONE, WITH_TORCH = 0.92, 0.70
"""For kernels alone, and for kernels compared with torch's, which has the rest."""

JAX_DEFAULT = 0.75
"""What JAX takes unless it is configured (JAX documentation, "GPU memory allocation")."""


def take_memory(fraction: float) -> None:
    """Lets JAX take memory of a GPU as it needs it, at most this fraction."""
    os.environ.setdefault(PREALLOCATE_VARIABLE, "false")
    os.environ.setdefault(FRACTION_VARIABLE, f"{fraction:.2f}")


def memory_fraction() -> float:
    """The fraction that a prefill by command may take."""
    return float(os.environ.get(FRACTION_VARIABLE) or NEARLY_ALL)
