"""`mmi bench decode` and `mmi bench vision` on a tiny model: figures, what is checked before it is timed, refusals."""

import dataclasses
import json
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from mmi_jax.bench.timing import wall_time
from mmi_jax.cli import main
from mmi_jax.cli.bench.commands import vision
from models.qwen2_5_vl.presets import PRESETS
from models.qwen2_5_vl.vision.tower import frame_flops
from models.testing.configs import TINY_CONFIG

VISION = dataclasses.replace(TINY_CONFIG.vision, num_layers=2, mlp_dim=12, full_attention_layers=(1,))
CONFIG = dataclasses.replace(TINY_CONFIG, num_layers=2, tie_embeddings=False, vision=VISION)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", CONFIG)
    monkeypatch.setattr("mmi_jax.cli.bench.runner.matmul_tflops_per_s", lambda: 1.0)
    monkeypatch.setattr("mmi_jax.bench.decode.copy_bytes_per_s", lambda: 1e9)


def last_line(capsys):
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


@pytest.mark.slow
def test_decode_counts_the_bytes_that_a_token_reads(capsys):
    assert main(["bench", "decode", "--preset", "tiny", "--tokens", "70", "--batch", "2", "--repeats", "1"]) == 0
    (case,) = last_line(capsys)["cases"]
    layer = 16 * 32 + 32 + 2 * (16 * 16 + 16) + 32 * 16 + 3 * 16 * 24 + 2 * 16
    cache = 2 * 2 * 2 * 70 * 2 * 8
    assert case["gb_per_token"] * 1e9 == pytest.approx(4 * (2 * layer + 16 + 16 * 40 + cache), abs=5e5)
    assert case["tokens_per_block"] == 16 and case["ms_per_token"] == pytest.approx(case["median_ms"] / 16, rel=1e-2)
    assert case["tokens_per_s"] == pytest.approx(2e3 / case["ms_per_token"], rel=1e-2)
    assert case["relative_error"] < 1e-6 and case["logits_difference"] < 1e-6
    attention, cudnn, whole = case["others"]
    assert attention["median_ms"] > 0 and whole["ms_per_token"] > 0
    assert "error" in cudnn, "there is no cuDNN on a CPU: a row with the reason"


def test_a_wrong_step_is_not_timed(capsys, monkeypatch):
    from mmi_jax.bench import decode

    monkeypatch.setattr(decode, "_time_block", lambda *_: pytest.fail("timed a wrong step"))
    attend = decode.decode_attention

    def wrong(*args, implementation=None, **kwargs):
        return attend(*args, implementation=implementation, **kwargs) * (1 if implementation else 1.1)

    monkeypatch.setattr(decode, "decode_attention", wrong)
    assert main(["bench", "decode", "--preset", "tiny", "--tokens", "70", "--repeats", "1"]) == 1
    assert "relative error must be at most" in last_line(capsys)["cases"][0]["error"]


@pytest.mark.slow
def test_vision_counts_frames_tokens_and_operations(capsys):
    arguments = ["bench", "vision", "--preset", "tiny", "--grid", "4x6", "--frames", "3", "--repeats", "1"]
    assert main(arguments) == 0
    (case,) = last_line(capsys)["cases"]
    assert case["patches_per_frame"] == 96 and case["frames"] == 3
    assert case["tokens_per_s"] == pytest.approx(24 * case["frames_per_s"], rel=1e-2)
    flops = 3 * frame_flops(CONFIG.vision, (8, 12))
    assert case["tflops_per_s"] == pytest.approx(flops / case["median_ms"] / 1e9, abs=6e-4)
    assert case["relative_error"] < 1e-5
    assert [other["frames"] for other in case["others"]] == [4, 4]


def test_operations_of_a_frame_by_hand():
    """A frame of 16 x 16 patches of 7b: 4 windows of 64; per patch, 20.1 million multiply-adds a layer for products."""
    vision = PRESETS["7b"].vision
    products = 32 * (4 * 1280**2 + 3 * 1280 * 3420) + 1176 * 1280 + (5120 * 5120 + 5120 * 3584) / 4
    attention = 2 * 1280 * (28 * 64 + 4 * 256)
    assert frame_flops(vision, (16, 16)) == pytest.approx(2 * 256 * (products + attention), rel=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["decode", "--preset", "8b"], "--preset must be one of 3b, 7b, 32b, 72b, tiny, got '8b'"),
        (["vision", "--dtype", "int8"], "--dtype must be one of float32, bfloat16, float16, got 'int8'"),
        (["vision", "--grid", "16"], "--grid must be rows x columns in tokens, as in 16x16: got '16'"),
    ],
)
def test_bad_options_are_refused_first(capsys, arguments, message):
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_type_that_the_message_names_is_taken(dtype):
    tower = vision.random_tower("tiny", dtype)
    assert {str(a.dtype) for a in jax.tree.leaves(nnx.state(tower))} == {dtype}


def test_the_copy_rate_counts_bytes_read_and_written():
    rate = wall_time.copy_bytes_per_s(repeats=1)
    assert np.isfinite(rate) and rate > 1e8 and jax.default_backend() == "cpu"


def test_random_weights_keep_the_scale_of_what_they_multiply():
    from models.qwen2_5_vl.checkpoints.weights import abstract_model
    from models.random_weights import with_random_weights

    config = dataclasses.replace(CONFIG, mlp_dim=512)
    model: Any = with_random_weights(abstract_model(config, dtype="bfloat16").layers)
    up, down = (np.asarray(part.kernel[...], np.float32) for part in (model.mlp.up, model.mlp.down))
    assert up.shape == (2, 16, 512) and down.shape == (2, 512, 16) and model.mlp.up.kernel.dtype == "bfloat16"
    assert up.std() == pytest.approx(16**-0.5, rel=0.05) and down.std() == pytest.approx(512**-0.5, rel=0.05)
    assert np.asarray(model.mlp_norm.scale[...], np.float32).mean() == pytest.approx(1.0, abs=0.05)
    assert not np.array_equal(up[0], up[1])
