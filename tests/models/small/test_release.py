"""The small model as a Hugging Face directory: a release loads back, and the shipped one is whole and small."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.assets.demo import DEMO_MODEL
from models.qwen2_5_vl.checkpoints.dialects import read_config
from models.qwen2_5_vl.checkpoints.weights import load, save_huggingface
from models.qwen2_5_vl.model import Qwen2_5_VL
from models.qwen2_5_vl.processing.processor import Processor
from models.small.config import small_config, small_measure, small_processor
from models.small.release import release
from models.small.stream import stream
from models.tasks import GeneratedHaystack, v_niah


@pytest.fixture(scope="module")
def model():
    config = small_config(num_layers=2, embed_dim=128, mlp_dim=64, num_heads=2, vision_dim=32)
    return Qwen2_5_VL(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))


@pytest.mark.slow
def test_a_release_loads_back_and_its_processor_is_the_one_trained_with(model, tmp_path):
    release(model, tmp_path / "model")
    loaded = load(tmp_path / "model")
    jax.tree.map(np.testing.assert_array_equal, nnx.state(loaded), nnx.state(model))
    processor = Processor.from_directory(tmp_path / "model")
    script = v_niah(num_tokens=512, depth=0.5, seed=1, haystack=GeneratedHaystack(), measure=small_measure())
    tokens = processor(script.render(GeneratedHaystack()).parts).tokens[0]
    np.testing.assert_array_equal(tokens, stream(script, small_processor()).row.tokens)
    end = processor.tokenizer.token_id("<|im_end|>")
    assert end in processor.end_tokens


def test_shards_hold_all_tensors_and_none_is_too_large(model, tmp_path):
    save_huggingface(model, tmp_path / "whole")
    save_huggingface(model, tmp_path / "cut", max_shard_bytes=200_000)
    index = json.loads((tmp_path / "cut" / "model.safetensors.index.json").read_text())
    shards = sorted((tmp_path / "cut").glob("*.safetensors"))
    assert len(shards) > 2 and set(index["weight_map"].values()) == {path.name for path in shards}
    assert all(path.stat().st_size < 220_000 for path in shards)
    whole, cut = load(tmp_path / "whole"), load(tmp_path / "cut")
    jax.tree.map(np.testing.assert_array_equal, nnx.state(whole), nnx.state(cut))
    with pytest.raises(ValueError, match="a shard must hold a whole tensor: .* max_bytes=1000"):
        save_huggingface(model, tmp_path / "tiny", max_shard_bytes=1000)


def test_the_shipped_model_is_whole_and_small():
    files = list(DEMO_MODEL.iterdir())
    assert sum(path.stat().st_size for path in files) < 32 * 10**6
    assert max(path.stat().st_size for path in files) < 16 * 2**20
    assert read_config(DEMO_MODEL) == small_config()
    num_parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(load(DEMO_MODEL))))
    assert num_parameters == 11_999_104
