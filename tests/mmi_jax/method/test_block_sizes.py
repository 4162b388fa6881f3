"""Whole blocks: divisions that round down, by a shift or not."""

import jax.numpy as jnp
import numpy as np
import pytest

from mmi_jax.method.block_sizes import floor_divide


@pytest.mark.parametrize("divisor", [1, 8, 12])
def test_divisions_round_down_on_both_sides_of_zero(divisor):
    numbers = np.array([-(2**31), -25, -24, -1, 0, 1, 24, 25, 2**31 - 1], np.int32)
    np.testing.assert_array_equal(floor_divide(jnp.asarray(numbers), divisor), np.floor_divide(numbers, divisor))
