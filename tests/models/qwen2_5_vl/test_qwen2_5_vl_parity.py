"""Against transformers, through recorded intermediates: float32, relative error at most 1e-5."""

import jax
import numpy as np
import pytest
import qwen2_5_vl_golden as oracle
from flax import nnx

from models.qwen2_5_vl.model import dense_attend

RELATIVE_ERROR = 1e-5


def assert_close(ours, theirs, what: str):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    assert error <= RELATIVE_ERROR, f"{what}: relative error {error:.2e}, allowed {RELATIVE_ERROR:.0e}"


@pytest.mark.parametrize("case", oracle.CASES)
def test_vision_tower(case):
    data = oracle.golden(case)
    assert_close(oracle.model(case).vision(data["patches"], oracle.grids(case)), data["vision"], "vision tower")


@pytest.mark.parametrize("case", oracle.CASES)
def test_queries_and_keys_of_every_layer(case):
    model, prompt, data = oracle.model(case), oracle.prompt(case), oracle.golden(case)
    dense = dense_attend(prompt.layout)
    x = model.embed(prompt)
    _, (q, k) = model.run_layers(x, model.rotary(prompt.rope_pos), lambda q, k, v: (dense(q, k, v)[0], (q, k)))
    assert q.shape[0] == model.config.num_layers
    for layer in range(model.config.num_layers):
        for name, ours in (("q", q[layer]), ("k", k[layer])):
            theirs = oracle.unpad(case, data[f"{name}.{layer}"].swapaxes(1, 2))
            assert_close(oracle.unpad_right(case, ours), theirs, f"{name} of layer {layer}")


@pytest.mark.parametrize("case", oracle.CASES)
def test_logits(case):
    model, prompt = oracle.model(case), oracle.prompt(case)
    logits = model(prompt)
    assert logits.dtype == np.float32
    assert_close(oracle.unpad_right(case, logits), oracle.unpad(case, oracle.golden(case)["logits"]), "logits")


def test_a_dropped_tensor_would_be_seen():
    """Every parameter of the golden models matters: zeroing any one of them moves the logits past the tolerance."""
    model, prompt = oracle.model("gqa7"), oracle.prompt("gqa7")
    graphdef, state = nnx.split(model)
    run = jax.jit(lambda state: nnx.merge(graphdef, state)(prompt))
    logits = run(state)
    flat = nnx.to_flat_state(state)
    for i, (path, variable) in enumerate(flat):
        changed = [*flat[:i], (path, variable.replace(variable[...] * 0)), *flat[i + 1 :]]
        moved = np.abs(run(nnx.from_flat_state(changed)) - logits).max() / np.abs(logits).max()
        assert moved > 10 * RELATIVE_ERROR, f"{path} does not matter: {moved=}"
