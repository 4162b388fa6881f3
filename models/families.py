"""Registry of model families, and checkpoints of any of them."""

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from models.huggingface.hub import locate
from models.huggingface.json_files import read_json
from models.interface import Family, Model, ModelConfig, OnTensor, Processor

FAMILIES = {"qwen2_5_vl": "models.qwen2_5_vl.family"}
"""The module of each family by the `model_type` of config.json; its `FAMILY` is imported when it is needed."""


def family(model_type: str) -> Family[Any, Any]:
    """The family of a `model_type`.

    Raises:
        ValueError: there is none.
    """
    if model_type not in FAMILIES:
        raise ValueError(f"model_type must be one of {', '.join(map(repr, FAMILIES))}, got {model_type!r}")
    return importlib.import_module(FAMILIES[model_type]).FAMILY


def family_of(config: ModelConfig) -> Family[Any, Any]:
    """The family that a config belongs to."""
    return family(config.model_type)


def presets() -> dict[str, Any]:
    """The published sizes of all families by name."""
    return {name: config for model_type in FAMILIES for name, config in family(model_type).presets.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A directory of a known family; weights and tokenizer are read on demand.

    Fields:
        directory: with config.json.
        family: that reads it.
        config: the model's sizes.
    """

    directory: Path
    family: Family[Any, Any]
    config: Any

    def read_processor(self, **options: Any) -> Processor:
        """The processor; see `Family.read_processor`."""
        return self.family.read_processor(self.directory, **options)

    def load_model(
        self,
        *,
        dtype: DTypeLike = jnp.bfloat16,
        on_tensor: OnTensor | None = None,
        mesh: Mesh | None = None,
    ) -> Any:
        """The model; see `load`."""
        return self.family.load_model(self.directory, dtype=dtype, on_tensor=on_tensor, mesh=mesh)


def open_checkpoint(name: str | Path) -> Checkpoint:
    """The checkpoint of a directory, or of a repository on the Hugging Face hub; its config.json alone is read.

    Raises:
        ValueError: no such directory or repository, or a config.json that no family reads.
    """
    directory = locate(name)
    fields = read_json(directory / "config.json")
    chosen = family(str(fields.get("model_type")))
    return Checkpoint(directory=directory, family=chosen, config=chosen.read_config(directory))


def load(
    name: str | Path,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    on_tensor: OnTensor | None = None,
    mesh: Mesh | None = None,
    **options: Any,
) -> tuple[Model, Processor]:
    """The model and the processor of a checkpoint of any family, chosen by the `model_type` of its config.json.

    One tensor at a time is read into the parameter that it belongs to, so that the host holds one, or two.

    Args:
        name: a directory with config.json, safetensors, tokenizer.json and a chat template, or a repository name on
            the Hugging Face hub.
        dtype: of parameters and computation.
        on_tensor: called with (tensors done, tensors in all, name) after each tensor.
        mesh: as in `mmi_jax.prefill`; every device receives only its shards.
        **options: of the family's processor.

    Raises:
        ValueError: no checkpoint, a model_type that no family has, a missing, truncated or contradicting shard, or a
            tensor that is missing, unexpected or of another shape.
    """
    checkpoint = open_checkpoint(name)
    processor = checkpoint.read_processor(**options)
    return checkpoint.load_model(dtype=dtype, on_tensor=on_tensor, mesh=mesh), processor
