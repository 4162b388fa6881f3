import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwen2_5_vl_golden as oracle
from closeness import assert_same_up_to_order, attention_terms, model_terms
from flax import nnx

from models.prompt import Prompt
from models.qwen2_5_vl.presets import PRESETS
from models.qwen2_5_vl.processing.placeholders import token_layout
from models.qwen2_5_vl.processing.positions import mrope_positions
from models.qwen2_5_vl.vision import attention as vision_attention
from models.qwen2_5_vl.vision import tower as vision
from models.qwen2_5_vl.vision.memory import activation_bytes, batch_patches
from models.qwen2_5_vl.vision.tower import VisionTower, encode_batch
from models.qwen2_5_vl.vision.windows import windows

ULP = 2.0**-23


def assert_equal_up_to_rounding(ours, theirs):
    """Another order of the same sums: error within 16 units in the last place of the largest value, per layer."""
    allowed = 16 * 3 * ULP * np.abs(theirs).max()
    assert np.abs(np.asarray(ours) - np.asarray(theirs)).max() <= allowed


def test_windows_of_a_ragged_frame():
    """A frame of 2 x 3 merged blocks in windows of 2 x 2 blocks; a block is four patches."""
    tables = windows(4, 6, oracle.model("gqa7").config.vision)
    assert tables.order.tolist() == [4 * block + n for block in (0, 1, 3, 4, 2, 5) for n in range(4)]
    assert tables.rows.tolist() == [list(range(16)), [*range(16, 24), *[16] * 8]]
    assert tables.lengths.tolist() == [16, 8] and tables.is_ragged
    np.testing.assert_array_equal(tables.rows.reshape(-1)[tables.filled], np.arange(24))


def test_windows_of_a_frame_that_divides():
    tables = windows(8, 4, oracle.model("gqa7").config.vision)
    np.testing.assert_array_equal(tables.order, np.arange(32))
    np.testing.assert_array_equal(tables.rows, np.arange(32).reshape(2, 16))
    assert not tables.is_ragged


@pytest.mark.parametrize("batch_patches", [1, 150])
def test_batching_of_frames_changes_nothing(batch_patches, monkeypatch):
    data, tower = oracle.golden("gqa7"), oracle.model("gqa7").vision
    whole = tower(data["patches"], oracle.grids("gqa7"))
    monkeypatch.setattr(vision, "FRAME_BATCH_PATCHES", batch_patches)
    assert_equal_up_to_rounding(tower(data["patches"], oracle.grids("gqa7")), whole)


def test_chunks_of_queries_change_nothing(monkeypatch):
    data, tower = oracle.golden("gqa7"), oracle.model("gqa7").vision
    whole = tower(data["patches"], oracle.grids("gqa7"))
    cache: Any = vision.encode_batch
    cache.clear_cache()  # the limit is read when a program is traced
    monkeypatch.setattr(
        vision_attention, "SCORE_BYTES", 4 * 3 * 60 * 7
    )  # seven queries of a frame of 60 patches, 3 heads
    assert_equal_up_to_rounding(tower(data["patches"], oracle.grids("gqa7")), whole)
    cache.clear_cache()


def test_a_long_video_compiles_once(rng, monkeypatch):
    tower = oracle.model("gqa7").vision
    monkeypatch.setattr(vision, "FRAME_BATCH_PATCHES", 4 * 48)
    cache: Any = vision.encode_batch
    cache.clear_cache()
    for num_frames in (3, 4, 9, 18):
        patches = rng.standard_normal((num_frames * 48, 24)).astype(np.float32)
        assert tower(patches, ((num_frames, 8, 6),)).shape == (num_frames * 12, 56)
    assert cache._cache_size() == 1


@pytest.mark.parametrize("lengths", [None, [5, 2, 9, 1]])
def test_fused_attention_is_the_same_attention(rng, lengths):
    """The call that cuDNN gets on a GPU, run by XLA; rows past the lengths may be anything finite."""
    q, k, v = (rng.standard_normal((4, 9, 3, 16)).astype(np.float32) for _ in range(3))
    lengths = None if lengths is None else np.array(lengths, np.int32)
    ours = vision_attention.attend_in_chunks(q, k, v, 0.3, lengths)
    fused = np.asarray(vision_attention.attend_fused(q, k, v, 0.3, lengths, implementation="xla"))
    is_row = np.ones((4, 9), bool) if lengths is None else np.arange(9) < lengths[:, None]
    assert_same_up_to_order(fused[is_row], np.asarray(ours)[is_row], terms=attention_terms(9, 16))
    assert np.isfinite(fused).all()


def test_zeros_that_align_the_mlp_change_nothing(rng):
    """In 16 bits, where they are used; in float32 weights stay as they are."""
    tower = oracle.model("gqa7").vision
    graphdef, state = nnx.split(tower.layers)
    weights = jax.tree.map(lambda a: a[0].astype(jnp.bfloat16), state)
    aligned = vision._aligned(weights, tower.config)
    plain_mlp, aligned_mlp = (nnx.merge(graphdef, w).mlp for w in (weights, aligned))
    assert tower.config.mlp_dim % 128 and aligned_mlp.up.kernel.shape[1] == aligned_mlp.down.kernel.shape[0] == 128
    x = jnp.asarray(rng.standard_normal((1, 8, tower.config.embed_dim)), jnp.bfloat16)
    assert_equal_up_to_rounding(aligned_mlp(x), np.asarray(plain_mlp(x)))
    assert vision._aligned(state, tower.config) is state


def test_frames_in_a_row_are_not_copied(rng):
    patches = rng.standard_normal((40, 3)).astype(np.float32)
    frames = vision._frames(patches, np.array([8, 16, 24]), 8)
    assert np.shares_memory(frames, patches)
    np.testing.assert_array_equal(frames, patches[8:32].reshape(3, 8, 3))
    apart = vision._frames(patches, np.array([24, 0, 0]), 8)
    np.testing.assert_array_equal(apart, np.stack([patches[24:32], patches[:8], patches[:8]]))


def test_no_attention_across_frames_or_windows(rng):
    """A NaN in one frame reaches that frame alone."""
    tower = oracle.model("gqa7").vision
    patches = rng.standard_normal((3 * 24, 24)).astype(np.float32)
    clean = np.asarray(tower(patches, ((3, 4, 6),)))
    patches[24] = np.nan
    poisoned = np.asarray(tower(patches, ((3, 4, 6),)))
    assert np.isnan(poisoned[6:12]).all()
    np.testing.assert_array_equal(poisoned[:6], clean[:6])
    np.testing.assert_array_equal(poisoned[12:], clean[12:])


def test_no_attention_across_windows_without_full_layers(rng):
    """With every layer windowed, a NaN in the first patch reaches its own 2 x 2 window of a 2 x 3 frame alone."""
    tower = nnx.clone(oracle.model("gqa7").vision)
    tower.config = dataclasses.replace(tower.config, full_attention_layers=())
    patches = rng.standard_normal((24, 24)).astype(np.float32)
    patches[0] = np.nan
    tokens = np.asarray(tower(patches, ((1, 4, 6),)))
    assert np.isnan(tokens).all(axis=1).tolist() == [True, True, False, True, True, False]
    assert np.isfinite(tokens[[2, 5]]).all()


def test_wrong_patches_are_refused():
    tower = oracle.model("gqa7").vision
    with pytest.raises(ValueError, match=r"expected shape \(24, 24\), got \(23, 24\)"):
        tower(np.zeros((23, 24), np.float32), ((1, 4, 6),))
    with pytest.raises(ValueError, match="positive multiples of config.merge_size=2"):
        tower(np.zeros((20, 24), np.float32), ((1, 4, 5),))


def test_vision_tokens_must_match_the_grids():
    prompt = oracle.prompt("gqa7")
    modality = np.where(prompt.layout.modality == 1, 0, prompt.layout.modality)
    modality[0, 0] = 1
    wrong = dataclasses.replace(prompt, layout=dataclasses.replace(prompt.layout, modality=modality))
    with pytest.raises(ValueError, match="one vision token per merged block .* expected 67, got 1"):
        oracle.model("gqa7").embed(wrong)


def test_a_prompt_of_text_alone():
    model = oracle.model("wide_heads")
    tokens, *_ = oracle.rows("wide_heads")[1]
    prompt = Prompt(
        tokens=tokens[None],
        rope_pos=mrope_positions(tokens, [], [], model.config)[:, None],
        layout=jax.tree.map(lambda field: field[None], token_layout(tokens, [], model.config)),
        patches=np.zeros((0, 24), np.float32),
        grids=(),
    )
    logits = oracle.unpad("wide_heads", oracle.golden("wide_heads")["logits"])
    first = len(oracle.rows("wide_heads")[0][0])
    terms = model_terms(model.config, num_keys=len(tokens))
    assert_same_up_to_order(model(prompt)[0], logits[first : first + len(tokens)], terms=terms)


def test_padding_changes_nothing():
    """NaN-free and equal, whatever stands in the padding: ids out of range included."""
    model, prompt = oracle.model("gqa7"), oracle.prompt("gqa7")
    is_padding = np.asarray(prompt.layout.modality) < 0
    filled = dataclasses.replace(prompt, tokens=np.where(is_padding, np.int32(-1), prompt.tokens))
    np.testing.assert_array_equal(oracle.unpad_right("gqa7", model(filled)), oracle.unpad_right("gqa7", model(prompt)))


def test_a_prompt_may_be_traced():
    model, prompt = oracle.model("gqa7"), oracle.prompt("gqa7")
    traced = jax.jit(lambda prompt: model(prompt))(prompt)
    assert_equal_up_to_rounding(oracle.unpad_right("gqa7", traced), oracle.unpad_right("gqa7", model(prompt)))


@pytest.mark.parametrize(("num_frames", "dtype"), [(64, jnp.float32), (256, jnp.float32), (256, jnp.bfloat16)])
def test_the_planned_activations_are_what_the_compiler_allocates(num_frames, dtype):
    """Temporary bytes of the published tower's program, frames of one window, within 10 %."""
    config = PRESETS["7b"].vision
    graphdef, state = nnx.split(nnx.eval_shape(lambda: VisionTower(config, dtype=dtype, rngs=nnx.Rngs(0))))
    frames = jax.ShapeDtypeStruct((num_frames, 64, config.patch_dim), jnp.float32)
    memory = encode_batch.lower(graphdef, state, frames, (8, 8), None).compile().memory_analysis()
    planned = activation_bytes(config, num_frames * 64, dtype)
    assert memory is not None and memory.temp_size_in_bytes == pytest.approx(planned, rel=0.1)


def test_batches_are_those_of_each_frame_size():
    assert list(batch_patches([(3, 8, 8), (1, 8, 8), (1000, 32, 32), (1, 4, 8)])) == [4 * 64, 16384, 32]
