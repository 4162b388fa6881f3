"""A prefill cut over a mesh against the same prefill on one device; eight virtual devices in a separate process."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from closeness import assert_same_up_to_order, model_terms
from jax.sharding import Mesh
from on_eight_devices import CASES, ENVIRONMENT, ONE, arrays, run

from mmi_jax import prefill
from mmi_jax.engine.settings.buckets import default_buckets
from mmi_jax.sharding import ONE_DEVICE, Shards, make_mesh, shards_of
from models.testing import BLOCKS, BUCKETS, TINY_CONFIG, tiny_model
from pallas_kernels.block_lists.block_sizes import Blocks

TERMS = model_terms(TINY_CONFIG, num_keys=128)
"""Numbers added up for one logit of the tiny model in a bucket of 128 tokens."""

EQUAL = [name for name in CASES if name != "last queries of each piece"]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    """The directory of results from the mesh."""
    directory = tmp_path_factory.mktemp("sharded")
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root), str(root / "tests/support")])
    command = [sys.executable, str(root / "tests/support/on_eight_devices.py"), str(directory)]
    child = subprocess.run(
        command, env=os.environ | ENVIRONMENT | {"PYTHONPATH": paths}, text=True, capture_output=True
    )
    assert child.returncode == 0, child.stderr[-3000:]
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("name", EQUAL)
def test_a_mesh_gives_what_one_device_gives(sharded, name):
    got, want = np.load(sharded / f"{name}.npz"), arrays(*run(name))
    for field in [name for name in ("logits", "logits_at", "hidden") if name in want]:
        assert_same_up_to_order(got[field], want[field], terms=TERMS)
    for field in ("lengths", "next_rope_pos", "tokens"):
        np.testing.assert_array_equal(got[field], want[field])
    for b, length in enumerate(want["lengths"]):
        for field in ("k", "v"):
            assert_same_up_to_order(got[field][:, b, :length], want[field][:, b, :length], terms=TERMS)
    assert got["density"].shape == want["density"].shape
    np.testing.assert_allclose(got["recall"], want["recall"], atol=0.15)  # of other queries


@pytest.mark.slow
def test_some_attention_is_skipped_on_a_mesh(sharded):
    dense, mixed = (np.load(sharded / f"{name}.npz") for name in ("dense", "mixed"))
    assert np.abs(dense["logits"] - mixed["logits"]).max() > 1e-2
    assert_same_up_to_order(dense["recall"], np.ones_like(dense["recall"]), terms=2 * 128)
    assert (mixed["recall"][1] < 0.999).all()


@pytest.mark.slow
def test_the_last_queries_of_a_pattern_are_each_pieces(sharded):
    """Four pieces have four times the queries that see everything: closer to dense, and not what one device gives."""
    got, want = np.load(sharded / "last queries of each piece.npz"), arrays(*run("last queries of each piece"))
    assert np.abs(got["k"][1:] - want["k"][1:]).max() > 1e-3
    assert_same_up_to_order(got["k"][0], want["k"][0], terms=TERMS)  # before any attention
    assert (got["density"] >= want["density"]).all()


@pytest.mark.slow
def test_cache_and_weights_are_cut_over_all_devices(sharded):
    of = {name: np.load(sharded / f"{name}.npz") for name in ("dense", "sequence only", "heads only")}
    assert of["dense"]["cache_shard"].tolist() == [3, 1, 128 // 4, 2 // 2, 8]
    assert of["sequence only"]["cache_shard"].tolist() == [3, 1, 128 // 8, 2, 8]
    assert of["heads only"]["cache_shard"].tolist() == [3, 1, 128, 2 // 2, 8]
    assert of["dense"]["weight_shard"].tolist() == [3, 16 // 8, 24]
    assert of["heads only"]["weight_shard"].tolist() == [3, 16 // 2, 24]


def test_groups_of_heads_that_agree_are_one_branch():
    shards = Shards(sequence=1, heads=2)
    assert shards.per_group("abab") == [("a", "b")]
    assert shards.per_group("abba") == [("a", "b"), ("b", "a")]
    assert ONE_DEVICE.per_group("abba") == [("a", "b", "b", "a")]


def test_devices_go_to_the_kv_heads_first():
    devices = list(range(16))
    shape = lambda n, g: dict(make_mesh(devices[:n], num_kv_heads=g).shape)  # noqa: E731
    assert shape(16, 4) == {"sequence": 4, "heads": 4}
    assert shape(4, 4) == {"sequence": 1, "heads": 4}
    assert shape(4, 2) == {"sequence": 2, "heads": 2}
    assert shape(3, 4) == {"sequence": 3, "heads": 1}


def test_buckets_fill_every_piece_with_whole_blocks():
    buckets = default_buckets(Blocks(q=512, kv=128), Shards(sequence=4, heads=4))
    assert buckets.length_for(1) == 8192
    assert buckets.length_for(100_000) == 106_496  # 13 * 8192
    assert default_buckets(Blocks(), ONE_DEVICE).length_for(1) == 256


def one_device_mesh(*axes: str) -> Mesh:
    return Mesh(np.asarray(jax.devices()[:1]).reshape((1,) * len(axes)), axes)


def test_a_mesh_of_other_axes_is_refused():
    with pytest.raises(ValueError, match=r"must have the axes \('sequence', 'heads'\), got \('data', 'model'\)"):
        prefill(tiny_model(), ONE, mesh=one_device_mesh("data", "model"), blocks=BLOCKS, buckets=BUCKETS)


def test_more_devices_than_kv_heads_are_refused():
    mesh = make_mesh(list(range(4)), num_kv_heads=4)
    with pytest.raises(ValueError, match="heads axis must divide the kv heads: num_kv_heads=2, got 4 devices"):
        shards_of(mesh, num_kv_heads=2)


def test_a_mesh_of_one_device_is_no_mesh():
    mesh = one_device_mesh("sequence", "heads")
    got, want = (prefill(tiny_model(), ONE, mesh=m, blocks=BLOCKS, buckets=BUCKETS) for m in (mesh, None))
    assert_same_up_to_order(got.logits, want.logits, terms=TERMS)


def mesh_of_eight() -> Mesh:
    """Numbers in place of devices: refusals come before any device is used."""
    return make_mesh(list(range(8)), num_kv_heads=2)


def test_chunks_on_a_mesh_are_refused():
    with pytest.raises(ValueError, match="a mesh runs the whole prompt at once: expected no chunk_tokens, got 128"):
        prefill(tiny_model(), ONE, mesh=mesh_of_eight(), blocks=BLOCKS, chunk_tokens=128)


def test_buckets_that_do_not_fill_the_pieces_are_refused():
    with pytest.raises(ValueError, match=r"buckets.multiple=16 must be a multiple of 8 times Blocks\(q=16"):
        prefill(tiny_model(), ONE, mesh=mesh_of_eight(), blocks=BLOCKS, buckets=BUCKETS)
