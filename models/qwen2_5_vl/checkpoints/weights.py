"""Weights from Hugging Face directories, tensor by tensor, and back."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array
from safetensors.numpy import save_file

from mmi_jax.files import new_directory
from mmi_jax.sharding import shards_of, weight_specs
from models.huggingface.hub import locate
from models.huggingface.safetensors_reader import INDEX_FILE, SINGLE_FILE, SafetensorsReader
from models.qwen2_5_vl.checkpoints.dialects import read_config, to_huggingface
from models.qwen2_5_vl.checkpoints.weight_map import Slot, canonical_name, check, parameters, slots
from models.qwen2_5_vl.config import Qwen2_5_VLConfig
from models.qwen2_5_vl.model import Qwen2_5_VL

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def abstract_model(config: Qwen2_5_VLConfig, *, dtype: DTypeLike = jnp.bfloat16) -> Qwen2_5_VL:
    """The model with shapes in place of arrays: nothing is allocated."""
    return nnx.eval_shape(lambda: Qwen2_5_VL(config, dtype=dtype, rngs=nnx.Rngs(0)))


def load(
    name: str | Path,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    on_tensor: Callable[[int, int, str], None] | None = None,
    mesh: Mesh | None = None,
) -> Qwen2_5_VL:
    """The model of a Hugging Face checkpoint, on the default device or sharded over a mesh.

    One tensor at a time is read and written in place into the parameter it belongs to: the host holds one tensor, or
    two while the runtime lets go of the one before.

    Args:
        name: a directory with config.json and safetensors, or a repository name on the hub.
        dtype: of parameters and computation.
        on_tensor: called with (tensors done, tensors in all, name) after each tensor.
        mesh: as in `mmi_jax.prefill`; every device receives only its shards.

    Raises:
        ValueError: no checkpoint, an unknown config, a missing, truncated or contradicting shard, or a tensor that
            is missing, unexpected or of another shape.
    """
    directory = locate(name)
    config = read_config(directory)
    graphdef, state = nnx.split(abstract_model(config, dtype=dtype))
    reader = SafetensorsReader(directory)
    expected = slots(state, config)
    on_disk = _canonical_names(reader)
    if config.tie_embeddings:
        _drop_tied_head(reader, on_disk)
    check(expected, on_disk, lambda name: reader.shape(on_disk[name]))

    variables = parameters(state)
    specs = parameters(weight_specs(state, shards_of(mesh, num_kv_heads=config.num_kv_heads)))
    arrays: dict[tuple[str, ...], Array] = {}
    for i, (tensor_name, disk_name) in enumerate(on_disk.items()):
        slot = expected[tensor_name]
        place = None if mesh is None else NamedSharding(mesh, specs[slot.path].get_value())
        tensor, is_transposed = reader.read(disk_name), slot.is_transposed
        if place is None:
            tensor = jax.device_put(tensor)
        else:
            tensor, is_transposed = _pieces(tensor, dtype, slot, place), False
        if slot.layer is None:
            arrays[slot.path] = _orient(tensor, dtype, is_transposed)
        else:
            stacked = arrays.get(slot.path)
            stacked = jnp.zeros(variables[slot.path].shape, dtype, device=place) if stacked is None else stacked
            arrays[slot.path] = _put_layer(stacked, tensor, slot.layer, is_transposed)
        jax.block_until_ready(arrays[slot.path])  # else the host would hold this tensor while it reads the next
        del tensor
        if on_tensor is not None:
            on_tensor(i + 1, len(on_disk), disk_name)
    filled = [(path, variable.replace(arrays[path])) for path, variable in variables.items()]
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def _pieces(tensor: np.ndarray, dtype: DTypeLike, slot: Slot, place: NamedSharding) -> Array:
    """A tensor from disk as the parameter, or one layer of it, sharded as the parameter is."""
    oriented = tensor.reshape(tensor.shape[0], -1).T if slot.is_transposed else tensor
    spec = place.spec if slot.layer is None else P(*place.spec[1:])
    return jax.make_array_from_callback(
        oriented.shape, NamedSharding(place.mesh, spec), lambda piece: oriented[piece].astype(dtype)
    )


@functools.partial(jax.jit, static_argnames=("dtype", "is_transposed"))
def _orient(tensor: Array, dtype: DTypeLike, is_transposed: bool) -> Array:
    """A tensor from disk as the parameter it is."""
    tensor = jnp.asarray(tensor, dtype)
    return tensor.reshape(tensor.shape[0], -1).T if is_transposed else tensor


@functools.partial(jax.jit, static_argnames="is_transposed", donate_argnums=0)
def _put_layer(stacked: Array, tensor: Array, layer: Array | int, is_transposed: bool) -> Array:
    """The stacked parameter with one layer overwritten, in the parameter's buffer, which is donated."""
    return stacked.at[layer].set(_orient(tensor, stacked.dtype, is_transposed))


def _canonical_names(reader: SafetensorsReader) -> dict[str, str]:
    """Canonical name to name on disk."""
    names: dict[str, str] = {}
    for name in reader.names():
        other = names.setdefault(canonical_name(name), name)
        if other != name:
            raise ValueError(f"the checkpoint holds one tensor under two names: {other!r} and {name!r}")
    return names


def _drop_tied_head(reader: SafetensorsReader, on_disk: dict[str, str]) -> None:
    """Removes a copy of the embedding that some writers store as the head."""
    if HEAD not in on_disk or EMBEDDING not in on_disk:
        return
    if not np.array_equal(reader.read(on_disk[HEAD]), reader.read(on_disk[EMBEDDING])):
        raise ValueError(f"unexpected tensor: config.json ties the head to the embedding, but {HEAD} differs from it")
    del on_disk[HEAD]


def save_huggingface(model: Qwen2_5_VL, directory: str | Path, *, max_shard_bytes: int | None = None) -> None:
    """Writes config.json and model.safetensors, which `load` reads back; a failed save leaves nothing.

    Args:
        model: what to write, in the dtype it has.
        directory: new or empty.
        max_shard_bytes: the weights are split into files of at most so many bytes of tensors, with an index.

    Raises:
        ValueError: `directory` exists and is not empty, or a tensor is larger than a shard may be.
    """
    tensors = _tensors(model)
    fields = to_huggingface(model.config) | {"torch_dtype": jnp.dtype(model.dtype).name}
    shards = [list(tensors)] if max_shard_bytes is None else _shards(tensors, max_shard_bytes)
    with new_directory(Path(directory)) as temporary:
        (temporary / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
        if max_shard_bytes is None:
            save_file(tensors, temporary / SINGLE_FILE, metadata={"format": "pt"})
            return
        places = {}
        for number, names in enumerate(shards, start=1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            save_file({name: tensors[name] for name in names}, temporary / file, metadata={"format": "pt"})
            places |= dict.fromkeys(names, file)
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (temporary / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _tensors(model: Qwen2_5_VL) -> dict[str, np.ndarray]:
    """The model's tensors as they are on disk."""
    state = nnx.state(model, nnx.Param)
    arrays = {path: variable[...] for path, variable in parameters(state).items()}
    tensors = {}
    for name, slot in slots(state, model.config).items():
        tensor = np.asarray(arrays[slot.path] if slot.layer is None else arrays[slot.path][slot.layer])
        tensor = tensor.T.reshape(slot.shape) if slot.is_transposed else tensor
        tensors[name] = np.ascontiguousarray(tensor)
    return tensors


def _shards(tensors: dict[str, np.ndarray], max_bytes: int) -> list[list[str]]:
    """Names in order, cut where a shard would outgrow `max_bytes`."""
    shards: list[list[str]] = []
    bytes_left = 0
    for name, tensor in tensors.items():
        if tensor.nbytes > max_bytes:
            raise ValueError(f"a shard must hold a whole tensor: {name} has {tensor.nbytes} bytes, {max_bytes=}")
        if not shards or tensor.nbytes > bytes_left:
            shards.append([])
            bytes_left = max_bytes
        shards[-1].append(name)
        bytes_left -= tensor.nbytes
    return shards
