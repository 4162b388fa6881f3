"""What share of a GPU's memory the commands let JAX take: before it opens the device, and unless told otherwise."""

import os

FRACTION_VARIABLE, PREALLOCATE_VARIABLE = "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE"

NEARLY_ALL = 0.96
"""For whole models: a million tokens through a 7B take 113 GiB of an H200's 140."""

ALONE, WITH_TORCH = 0.92, 0.70
"""For kernels, and for kernels beside torch's, which has the rest."""

JAX_DEFAULT = 0.75
"""What JAX takes in a program that says nothing (JAX documentation, "GPU memory allocation")."""


def take_memory(fraction: float) -> None:
    """Lets JAX take memory of a GPU as it needs it, at most this share."""
    os.environ.setdefault(PREALLOCATE_VARIABLE, "false")
    os.environ.setdefault(FRACTION_VARIABLE, f"{fraction:.2f}")


def memory_fraction() -> float:
    """The share that a prefill by command may take."""
    return float(os.environ.get(FRACTION_VARIABLE) or NEARLY_ALL)
