"""`python on_eight_devices.py DIRECTORY`: prefills on meshes of eight devices, one .npz file of results for each.

JAX must be told of the devices before it starts (`XLA_FLAGS` of `ENVIRONMENT`), hence a separate process.
"""

import sys
from pathlib import Path

import jax
import numpy as np

from mmi_jax import Buckets, Dense, PatternTable, TriShape, VerticalSlash, decode, prefill
from mmi_jax.sharding import make_mesh, shard_model
from models.testing import BLOCKS, STATIC, TINY_CONFIG, batch, prompt, tiny_model

NUM_DEVICES = 8
ENVIRONMENT = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={NUM_DEVICES}", "JAX_PLATFORMS": "cpu"}
BUCKETS = Buckets(smallest=128, largest=512, multiple=128)
ONE = prompt(0, 9, (3, 2, 5), 60)
SEVERAL = batch(prompt(1, 4, (2, 3, 3), 90), prompt(2, 30, (1, 2, 2), 5, (3, 2, 4), 12), prompt(3, 45))
EVERYTHING = VerticalSlash(vertical=512, slash=512, local=4, last_q=8)
"""Reads the scores of each piece's own last queries, and keeps every column."""

MIXED = PatternTable(
    layers=((STATIC, Dense(), EVERYTHING, STATIC), (STATIC,) * 4, (Dense(), Dense(), STATIC, STATIC)), model="tiny"
)
"""The two groups of two heads differ in the first and last layer and agree in the second."""

CASES = {
    "dense": dict(prompt=ONE, table=None),
    "several": dict(prompt=SEVERAL, table=STATIC, max_new_tokens=40, logits_at=np.array([[0, 101], [31, 30], [44, 3]])),
    "mixed": dict(prompt=ONE, table=MIXED),
    "everything": dict(prompt=ONE, table=EVERYTHING),
    "sequence only": dict(prompt=ONE, table=MIXED, heads=1),
    "heads only": dict(prompt=ONE, table=MIXED, heads=2, devices=2),
    "last queries of each piece": dict(prompt=ONE, table=TriShape(sink=16, local=4, last=3)),
}


def run(name: str, mesh=None):
    """The case's prefill, on one device without a mesh; and four tokens decoded where there is room."""
    case = {key: value for key, value in CASES[name].items() if key not in ("heads", "devices")}
    model = tiny_model() if mesh is None else shard_model(tiny_model(), mesh)
    result = prefill(model, case.pop("prompt"), buckets=BUCKETS, blocks=BLOCKS, mesh=mesh, **case)
    tokens = decode(model, result, max_new_tokens=4) if "max_new_tokens" in case else np.zeros(0)
    return result, tokens


def mesh_of(name: str):
    """The case's mesh: as `make_mesh` chooses it for the model, or with the heads axis that the case names."""
    devices = jax.devices()[: CASES[name].get("devices", NUM_DEVICES)]
    return make_mesh(devices, num_kv_heads=CASES[name].get("heads", TINY_CONFIG.num_kv_heads))


def arrays(result, tokens) -> dict[str, np.ndarray]:
    """What is compared."""
    cache, report = result.cache, result.report
    fields = dict(logits=result.logits, hidden=result.hidden, k=cache.k, v=cache.v, lengths=cache.lengths)
    fields |= dict(next_rope_pos=cache.next_rope_pos, density=report.density, recall=report.recall, tokens=tokens)
    if result.logits_at is not None:
        fields |= dict(logits_at=result.logits_at)
    return {name: np.asarray(value) for name, value in fields.items()}


def main(directory: Path) -> None:
    """Writes every case's arrays, and where its cache and weights lie."""
    for name in CASES:
        result, tokens = run(name, mesh_of(name))
        weight = shard_model(tiny_model(), mesh_of(name)).layers.mlp.up.kernel[...]
        places = dict(
            cache_shard=np.array(result.cache.k.sharding.shard_shape(result.cache.k.shape)),
            weight_shard=np.array(weight.sharding.shard_shape(weight.shape)),
        )
        np.savez(directory / f"{name}.npz", allow_pickle=False, **arrays(result, tokens), **places)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
