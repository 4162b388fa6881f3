"""Digests of weights and prompts, for provenance and for telling one run from another."""

import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.typing import ArrayLike

from models.prompt import LazyPatches, Prompt

LENGTH = 16
"""Hexadecimal digits of a digest."""


def run_on(model: str, directory: Path, dtype: str) -> dict[str, str]:
    """What every figure of a run depends on: the model by name and weights, its dtype, the device."""
    device = jax.devices()[0]
    return {
        "model": Path(model).name,
        "weights": weights_digest(directory),
        "dtype": dtype,
        "device": f"{device.platform} {device.device_kind}",
    }


def weights_digest(directory: Path) -> str:
    """The digest of a checkpoint's config and weights."""
    digest = hashlib.sha256()
    for path in sorted([directory / "config.json", *directory.glob("*.safetensors")]):
        digest.update(path.name.encode())
        with open(path, "rb") as file:
            while piece := file.read(2**24):
                digest.update(piece)
    return digest.hexdigest()[:LENGTH]


def prompt_digest(prompt: Prompt) -> str:
    """The digest of everything a model reads of a prompt."""
    digest = hashlib.sha256()
    for array in itertools.chain.from_iterable(map(_arrays, jax.tree.leaves(prompt))):
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:LENGTH]


def _arrays(leaf: ArrayLike | LazyPatches) -> Iterator[np.ndarray]:
    """A leaf's numbers; of patches cut on the device what they are cut from."""
    yield from leaf.digest_arrays() if isinstance(leaf, LazyPatches) else (np.asarray(leaf),)
