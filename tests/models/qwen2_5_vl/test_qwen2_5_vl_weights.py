import json
import shutil
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwen2_5_vl_golden as oracle
from flax import nnx
from safetensors.numpy import load_file, save_file

from models.huggingface import hub
from models.qwen2_5_vl import Qwen2_5_VLConfig, VisionConfig
from models.qwen2_5_vl.checkpoints import orbax_checkpoint as checkpoint
from models.qwen2_5_vl.checkpoints import weights
from models.qwen2_5_vl.checkpoints.dialects import to_huggingface
from models.qwen2_5_vl.checkpoints.weight_map import slots
from models.qwen2_5_vl.checkpoints.weights import load, save_huggingface

FIRST_SHARD = "model-00001-of-00006.safetensors"
SINGLE = "model.safetensors"


@pytest.fixture
def copied(tmp_path) -> Path:
    """The untied golden checkpoint, in one file, to be damaged."""
    return Path(shutil.copytree(oracle.GOLDEN / "gqa7", tmp_path / "gqa7"))


@pytest.fixture
def sharded(tmp_path) -> Path:
    """The tied golden checkpoint, in shards with an index, to be damaged."""
    return Path(shutil.copytree(oracle.GOLDEN / "wide_heads", tmp_path / "wide_heads"))


def rewrite(directory: Path, change) -> None:
    tensors = load_file(directory / SINGLE)
    save_file(change(tensors), directory / SINGLE)


def assert_same_weights(ours, theirs):
    ours, theirs = nnx.to_flat_state(nnx.state(ours)), nnx.to_flat_state(nnx.state(theirs))
    assert [path for path, _ in ours] == [path for path, _ in theirs]
    for (path, parameter), (_, other) in zip(ours, theirs, strict=True):
        assert parameter.dtype == other.dtype
        np.testing.assert_array_equal(parameter[...], other[...], err_msg=str(path))


def test_every_tensor_is_reported(sharded):
    calls = []
    load(sharded, dtype=jnp.float32, on_tensor=lambda done, total, name: calls.append((done, total, name)))
    names = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    assert [done for done, _, _ in calls] == list(range(1, len(names) + 1))
    assert {total for _, total, _ in calls} == {len(names)}
    assert {name for _, _, name in calls} == set(names)


def test_names_of_models_in_memory(copied):
    def change(tensors):
        prefix = {"visual.": "model.visual.", "model.": "model.language_model."}
        renamed = {}
        for name, tensor in tensors.items():
            start = next((start for start in prefix if name.startswith(start)), "")
            renamed[prefix.get(start, "") + name.removeprefix(start)] = tensor
        assert "model.language_model.layers.0.mlp.up_proj.weight" in renamed
        return renamed

    rewrite(copied, change)
    assert_same_weights(load(copied, dtype=jnp.float32), oracle.model("gqa7"))


def test_dtype_is_converted():
    model = load(oracle.GOLDEN / "gqa7", dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype(jnp.bfloat16)}
    x = jnp.ones((1, 4, 56), jnp.bfloat16)
    x, (q,) = model.run_layers(x, model.rotary(jnp.zeros((3, 1, 4), jnp.int32)), lambda q, k, v: (q, (q,)))
    assert (x.dtype, q.dtype, model.unembed(x).dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    assert model.vision(oracle.golden("gqa7")["patches"][:60], oracle.grids("gqa7")[:1]).dtype == jnp.bfloat16


def remove(name):
    return lambda tensors: {other: tensor for other, tensor in tensors.items() if other != name}


def add(name, shape):
    return lambda tensors: tensors | {name: np.zeros(shape, np.float32)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("lm_head.weight"), r"missing tensors in the checkpoint: 1 \(lm_head.weight\)"),
        (remove("visual.blocks.2.attn.qkv.bias"), r"missing tensors .* 1 \(visual.blocks.2.attn.qkv.bias\)"),
        (add("model.layers.3.mlp.up_proj.weight", (40, 56)), r"unexpected tensors .* 1 \(model.layers.3.mlp.up_proj"),
        (add("model.norm.weight", (55,)), r"wrong shape of tensor model.norm.weight: expected \(56,\), got \(55,\)"),
        (
            add("visual.patch_embed.proj.weight", (48, 24)),
            r"visual.patch_embed.proj.weight: expected \(48, 3, 2, 2, 2\)",
        ),
        (add("model.language_model.norm.weight", (56,)), "one tensor under two names"),
    ],
)
def test_wrong_tensors_are_named(copied, change, message):
    rewrite(copied, change)
    with pytest.raises(ValueError, match=message):
        load(copied)


def test_a_stored_copy_of_a_tied_embedding_is_accepted(sharded):
    model = oracle.model("wide_heads")
    untied = {}
    for shard in sorted(sharded.glob("*.safetensors")):
        if shard.name.startswith("model-"):
            untied |= load_file(shard)
    (sharded / "model.safetensors.index.json").unlink()
    untied["lm_head.weight"] = untied["model.embed_tokens.weight"]
    save_file(untied, sharded / SINGLE)
    assert_same_weights(load(sharded, dtype=jnp.float32), model)
    untied["lm_head.weight"] = untied["lm_head.weight"] + 1
    save_file(untied, sharded / SINGLE)
    with pytest.raises(ValueError, match="ties the head to the embedding, but lm_head.weight differs"):
        load(sharded)


def test_a_missing_shard_is_named(sharded):
    (sharded / FIRST_SHARD).unlink()
    with pytest.raises(ValueError, match=f"missing safetensors shard: .*{FIRST_SHARD}"):
        load(sharded)


@pytest.mark.parametrize("size", [4, 100, 0.5])
def test_a_truncated_shard_is_named(sharded, size):
    whole = (sharded / FIRST_SHARD).read_bytes()
    (sharded / FIRST_SHARD).write_bytes(whole[: size if isinstance(size, int) else int(size * len(whole))])
    with pytest.raises(ValueError, match=f"truncated or damaged safetensors shard: .*{FIRST_SHARD}"):
        load(sharded)


def test_a_shard_that_contradicts_the_index_is_named(sharded):
    tensors = load_file(sharded / FIRST_SHARD)
    name = sorted(tensors)[0]
    del tensors[name]
    save_file(tensors, sharded / FIRST_SHARD)
    with pytest.raises(ValueError, match=f"{FIRST_SHARD} lacks 1 tensors that .* places there, first '{name}'"):
        load(sharded)


def test_a_damaged_index_is_named(sharded):
    (sharded / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ValueError, match="index.json must be JSON with a weight_map"):
        load(sharded)


def test_a_directory_without_weights_is_refused(copied):
    (copied / SINGLE).unlink()
    with pytest.raises(ValueError, match="a checkpoint needs model.safetensors or .* holds .*'config.json'"):
        load(copied)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "word"])
def test_a_name_that_is_neither_directory_nor_repository_is_refused(name):
    with pytest.raises(ValueError, match="a model is a directory or a Hugging Face repository 'owner/name'"):
        load(name)


def test_a_hub_that_cannot_be_reached_is_one_clear_error(monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(hub, "snapshot_download", unreachable)
    with pytest.raises(ValueError, match="'owner/name' is no directory here and could not be downloaded: no route"):
        load("owner/name")


def test_a_repository_name_is_downloaded(monkeypatch):
    downloads = []
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **kw: downloads.append(name) or oracle.GOLDEN / "gqa7")
    assert_same_weights(load("owner/name", dtype=jnp.float32), oracle.model("gqa7"))
    assert downloads == ["owner/name"]


@pytest.mark.parametrize("case", oracle.CASES)
def test_saved_checkpoints_load_bit_for_bit(case, tmp_path):
    save_huggingface(oracle.model(case), tmp_path / "saved")
    assert_same_weights(load(tmp_path / "saved", dtype=jnp.float32), oracle.model(case))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"]


def test_saved_tensors_are_those_of_transformers(tmp_path):
    save_huggingface(oracle.model("gqa7"), tmp_path / "saved")
    ours, theirs = load_file(tmp_path / "saved" / SINGLE), load_file(oracle.GOLDEN / "gqa7" / SINGLE)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name])


@pytest.mark.parametrize("case", oracle.CASES)
def test_orbax_restores_bit_for_bit(case, tmp_path):
    checkpoint.save(oracle.model(case), tmp_path / "saved")
    restored = checkpoint.restore(tmp_path / "saved")
    assert restored.config == oracle.model(case).config
    assert_same_weights(restored, oracle.model(case))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"]


def test_orbax_restores_in_another_dtype(tmp_path):
    checkpoint.save(oracle.model("gqa7"), tmp_path / "saved")
    restored = checkpoint.restore(tmp_path / "saved", dtype=jnp.bfloat16)
    assert_same_weights(restored, load(oracle.GOLDEN / "gqa7", dtype=jnp.bfloat16))


def test_orbax_refuses_what_is_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="needs a model.json"):
        checkpoint.restore(tmp_path)
    checkpoint.save(oracle.model("gqa7"), tmp_path / "saved")
    shutil.rmtree(tmp_path / "saved" / "weights")
    with pytest.raises(ValueError, match="has no whole set of weights"):
        checkpoint.restore(tmp_path / "saved")
    (tmp_path / "saved" / "model.json").write_text('{"version": 2}')
    with pytest.raises(ValueError, match="must have the fields .* with version 1, got .'version'."):
        checkpoint.restore(tmp_path / "saved")


@pytest.mark.parametrize("save", [save_huggingface, checkpoint.save])
def test_nothing_is_overwritten(save, tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ValueError, match="new or empty directory"):
        save(oracle.model("gqa7"), tmp_path)
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize(
    ("save", "owner", "step"),
    [(save_huggingface, weights, "save_file"), (checkpoint.save, checkpoint.ocp.StandardCheckpointer, "save")],
)
def test_a_failed_save_leaves_nothing(save, owner, step, tmp_path, monkeypatch):
    def full_disk(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(owner, step, full_disk)
    with pytest.raises(OSError, match="No space left"):
        save(oracle.model("gqa7"), tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_host_memory_stays_near_one_tensor(tmp_path):
    """24 tensors of 1 MB and two of 4 MB: at the peak the host holds the two large ones, not the sum of 32 MB.

    Two, because the runtime frees a host buffer a moment after it reports its copy as done.
    """
    config = Qwen2_5_VLConfig(
        num_layers=8,
        embed_dim=128,
        mlp_dim=2048,
        num_heads=2,
        num_kv_heads=1,
        head_dim=64,
        vocab_size=8192,
        tie_embeddings=False,
        mrope_section=(8, 12, 12),
        image_token=0,
        video_token=1,
        vision_start_token=2,
        vision_end_token=3,
        vision=VisionConfig(num_layers=1, embed_dim=8, mlp_dim=8, num_heads=1, out_dim=128, full_attention_layers=()),
    )
    state = nnx.state(weights.abstract_model(config))
    save_file({name: np.ones(slot.shape, np.float32) for name, slot in slots(state, config).items()}, tmp_path / SINGLE)
    (tmp_path / "config.json").write_text(json.dumps(to_huggingface(config)))
    load(tmp_path, dtype=jnp.bfloat16)  # compiles, so that tracing is not counted below
    tracemalloc.start()
    load(tmp_path, dtype=jnp.bfloat16)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    largest_bytes = 4 * config.vocab_size * config.embed_dim
    assert peak_bytes < 2.25 * largest_bytes, f"{peak_bytes=}, {largest_bytes=}"
