"""Shape checks on, warnings are errors, rank promotion raises; one seed."""

import os
import sys

# Most of the suite's time is XLA's, in thousands of programs that run once: it takes 0.6 of it without optimizations.
# `make isa-test` runs the tests that compare numbers with them. The environment, so that child processes do likewise.
if "xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()

import jax
import numpy as np
import pytest
from jaxtyping import config as shape_checks
from jaxtyping import install_import_hook

install_import_hook(["pallas_kernels", "mmi_jax", "models"], "beartype.beartype")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="module")
def _programs():
    """Every module forgets its compiled programs: thousands in one process exhaust the memory maps Linux allows it."""
    yield
    jax.clear_caches()
    if owner := sys.modules.get("mmi_jax.engine.programs.program_cache"):
        owner.PROGRAMS.clear()


@pytest.fixture
def rng() -> np.random.Generator:
    """The one seeded generator."""
    return np.random.default_rng(20261122)


@pytest.fixture
def no_shape_checks():
    """As users run it: our own messages, not the test suite's type checker, must catch bad input."""
    shape_checks.update("jaxtyping_disable", True)
    yield
    shape_checks.update("jaxtyping_disable", False)
