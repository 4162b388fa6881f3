"""Protocols: what commands and benchmarks read of configs, models and prompts; those of every family fit them.

`models.interface` has the same for families; importing it takes the seconds of Flax, which `mmi --help` must not.
"""

import dataclasses
from typing import Any, ClassVar, Protocol, runtime_checkable

from mmi_jax.engine import protocols


@runtime_checkable
class VisionConfig(Protocol):
    """Sizes of a vision tower."""

    @property
    def patch_size(self) -> int:
        """Side of a patch; pixels."""
        ...

    @property
    def merge_size(self) -> int:
        """Side of a token; patches."""
        ...

    @property
    def block_len(self) -> int:
        """Patches of a token."""
        ...

    @property
    def patch_dim(self) -> int:
        """Numbers in a flattened patch."""
        ...


@runtime_checkable
class ModelConfig(protocols.ModelConfig, Protocol):
    """Sizes of a model, a frozen dataclass: `dataclasses.replace` gives one with fewer layers."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]
    model_type: ClassVar[str]

    @property
    def vision(self) -> VisionConfig:
        """Sizes of the vision tower."""
        ...


@runtime_checkable
class Model(protocols.VisionLanguageModel, Protocol):
    """A model with its vision tower."""

    vision: Any

    @property
    def config(self) -> ModelConfig:
        """Its sizes."""
        ...


@runtime_checkable
class Prompt(protocols.Prompt, Protocol):
    """A batch of prompts with their images and videos, a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    @property
    def patches(self) -> Any:
        """Of all images and videos: an array, or patches computed on demand."""
        ...

    @property
    def grids(self) -> tuple[tuple[int, int, int], ...]:
        """Frames, rows and columns of each image and video; patches."""
        ...
