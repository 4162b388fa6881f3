"""Digests of weights and prompts, for provenance and for telling one run from another."""

import hashlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

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


def prompt_digest(prompt: Any) -> str:
    """The digest of everything a model reads of a prompt."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(prompt):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:LENGTH]
