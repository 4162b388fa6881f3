"""The executable cache: compiled programs on disk, and what identifies them."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from closeness import assert_same_up_to_order, model_terms
from test_prefill import ONE, OTHER, TABLE, masked_forward, prefill

from mmi_jax import AShape, Dense, PatternTable
from mmi_jax.cli.compile_cache import cache_contents, compilation_cache_in
from mmi_jax.engine.programs import layer_program
from mmi_jax.engine.programs.compilation import num_compiled_programs
from mmi_jax.engine.programs.fingerprint import NoFingerprintError, digest
from mmi_jax.engine.programs.program_cache import PROGRAMS
from models.testing import STATIC, TINY_CONFIG, pad, tiny_model

TERMS = model_terms(TINY_CONFIG, num_keys=64)
"""Numbers added up for one logit of the tiny model in a bucket of 64 tokens."""

DIFFERENT = PatternTable(layers=(OTHER, (STATIC,) * 4, (AShape(sink=16, local=5), Dense(), Dense(), STATIC)), model="t")
ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_layers_that_all_differ_are_a_program_each_and_equal_masked_dense_attention():
    PROGRAMS.clear()
    result = prefill(ONE, table=DIFFERENT)
    expected = masked_forward(tiny_model(), pad(ONE, 64), DIFFERENT.layers)[:, ONE.tokens.shape[1] - 1]
    assert_same_up_to_order(result.logits, expected, terms=TERMS)
    assert num_compiled_programs() == 3
    assert np.isfinite(result.report.density).all() and result.report.density.shape == (3, 4)
    reordered = PatternTable(layers=(DIFFERENT.layers[2], *DIFFERENT.layers[:2]), model="t")
    shared = prefill(ONE, table=reordered)
    assert num_compiled_programs() == 3, "the same layers in another order are the same programs"
    assert np.abs(shared.logits - result.logits).max() > 1e-3


def test_a_cached_program_is_neither_traced_nor_compiled_and_gives_the_same_bits(tmp_path, monkeypatch):
    with compilation_cache_in(tmp_path):
        PROGRAMS.clear()
        first = prefill(ONE, table=STATIC)
        PROGRAMS.clear()
        monkeypatch.setattr(layer_program, "_layer", lambda *_: pytest.fail("a cached layer was traced"))
        second = prefill(ONE, table=STATIC)
        assert num_compiled_programs() == 1
    for a, b in zip(jax.tree.leaves(first.cache), jax.tree.leaves(second.cache), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(first.logits, second.logits)


def test_an_unreadable_cached_program_is_replaced(tmp_path):
    with compilation_cache_in(tmp_path):
        PROGRAMS.clear()
        first = prefill(ONE, table=STATIC)
        (entry,) = tmp_path.glob("prefill_layer-*-cache")
        whole = entry.read_bytes()
        entry.write_bytes(whole[:100])
        PROGRAMS.clear()
        with pytest.warns(UserWarning, match="cached program prefill_layer.* is unreadable and compiled again"):
            second = prefill(ONE, table=STATIC)
        assert len(entry.read_bytes()) > 1000 and cache_contents(tmp_path).num_programs >= 3
    np.testing.assert_array_equal(first.logits, second.logits)


def test_without_a_directory_nothing_is_cached():
    from mmi_jax.engine.programs import executable_cache

    assert jax.config.values["jax_compilation_cache_dir"] is None
    assert executable_cache.entry_of("layer", TABLE, (np.zeros(3),), None) is None


def closing_over(x):
    return lambda y: x + y


@pytest.mark.parametrize(
    ("value", "other"),
    [
        (STATIC, AShape(sink=16, local=8)),
        (DIFFERENT.layers, DIFFERENT.layers[::-1]),
        (closing_over(1), closing_over(2)),
        (functools.partial(max, 1), functools.partial(max, 2)),
        ({"a": 1, "b": 2}, {"a": 2, "b": 1}),
        ((1, (2, 3)), ((1, 2), 3)),
        (1, 1.0),
        (np.dtype("float32"), np.dtype("float64")),
    ],
)
def test_different_values_have_different_digests(value, other):
    assert digest(value) != digest(other) and digest(value) == digest(value)


def test_what_has_no_contents_to_tell_it_by_is_refused():
    with pytest.raises(NoFingerprintError, match="identified by their contents, got <class 'object'>"):
        digest((STATIC, object()))


def test_digests_are_the_same_in_another_process():
    code = (
        "import json; from flax import nnx; from models.testing import tiny_model;"
        "from test_executable_cache import DIFFERENT, digest;"
        "print(json.dumps(digest((DIFFERENT.layers, nnx.split(tiny_model())[0]), 'mmi_jax')))"
    )
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests/support"), str(Path(__file__).parent)])
    environment = os.environ | {"PYTHONPATH": paths, "PYTHONHASHSEED": "7", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    from flax import nnx

    assert json.loads(done.stdout) == digest((DIFFERENT.layers, nnx.split(tiny_model())[0]), "mmi_jax")
