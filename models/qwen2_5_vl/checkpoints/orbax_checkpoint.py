"""Converted weights saved and restored with orbax, with the configuration next to them."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx
from jax.typing import DTypeLike

from mmi_jax.files import new_directory
from models.qwen2_5_vl.checkpoints.dialects import from_huggingface, to_huggingface
from models.qwen2_5_vl.checkpoints.weights import abstract_model
from models.qwen2_5_vl.model import Qwen2_5_VL

VERSION = 1
"""Format of model.json; raised when an older reader would misread it."""

FIELDS = {"version", "dtype", "config"}
"""Fields of model.json."""


def save(model: Qwen2_5_VL, path: str | Path) -> None:
    """Writes a new directory of `model.json` and orbax `weights`; a failed save leaves nothing.

    Raises:
        ValueError: `path` exists and is not empty.
    """
    fields = dict(version=VERSION, dtype=jnp.dtype(model.dtype).name, config=to_huggingface(model.config))
    with new_directory(Path(path)) as temporary:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(temporary / "weights", nnx.to_pure_dict(nnx.state(model, nnx.Param)))
        (temporary / "model.json").write_text(json.dumps(fields, indent=2) + "\n")


def restore(path: str | Path, *, dtype: DTypeLike | None = None) -> Qwen2_5_VL:
    """The model that `save` wrote, in the dtype it was saved in unless `dtype` says otherwise.

    Raises:
        ValueError: no such checkpoint, or one with fields this version does not know.
    """
    path = Path(path).absolute()
    fields = _read_fields(path / "model.json")
    graphdef, state = nnx.split(abstract_model(from_huggingface(fields["config"]), dtype=dtype or fields["dtype"]))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), nnx.to_pure_dict(state)
    )
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            weights = checkpointer.restore(path / "weights", target)
    except (OSError, KeyError) as error:
        raise ValueError(f"the checkpoint {path} has no whole set of weights: {error}") from error
    nnx.replace_by_pure_dict(state, weights)
    return nnx.merge(graphdef, state)


def _read_fields(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"a saved model needs a model.json: {path}: {error}") from error
    if fields.keys() != FIELDS or fields["version"] != VERSION:
        raise ValueError(f"{path} must have the fields {sorted(FIELDS)} with version {VERSION}, got {sorted(fields)}")
    return fields
