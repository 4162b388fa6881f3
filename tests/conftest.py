"""Shape checks on, warnings are errors, rank promotion raises; one seed."""

import jax
import numpy as np
import pytest
from jaxtyping import install_import_hook

install_import_hook(["pallas_kernels", "mmi_jax", "models"], "beartype.beartype")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def rng() -> np.random.Generator:
    """The one seeded generator."""
    return np.random.default_rng(20261122)
