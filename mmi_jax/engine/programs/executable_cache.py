"""The executable cache: compiled programs on disk, keyed by what they are made of, so that none is traced twice.

JAX's persistent cache is keyed by the lowered program, and tracing and lowering 28 different layers takes a minute
or more of Python. Its keys hold the numbers that JAX 0.11.2 gives the Mosaic kernels of a process, too, so that they
depend on what was lowered before. The keys here are made of patterns, shapes, sources, versions, device and settings.

The entries lie in the directory of JAX's cache, `jax_compilation_cache_dir`; without one nothing is stored. As JAX says
of serialized programs: whoever can write the directory can run code in the process that reads it.
"""

import os
import pickle
import warnings
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable

from mmi_jax.engine.programs.fingerprint import NoFingerprintError, digest
from mmi_jax.files import write_whole

ENVIRONMENT = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "MOSAIC_GPU_")
"""Prefixes of the environment variables that compilers read."""

UNREAD = ("cache", "log", "dump", "traceback")
"""Settings of JAX whose names contain one of these do not change a program."""


def entry_of(kind: str, identity: Hashable, args: tuple, options: Mapping[str, Any] | None) -> Path | None:
    """The file of a program; None without a cache, or where the program cannot be distinguished from others.

    Args:
      kind: of the program, as in `ProgramKey`.
      identity: everything it depends on except the arguments' shapes, with `mesh` None.
      options: of the compiler.
    """
    directory, device = jax.config.values["jax_compilation_cache_dir"], _device_of(args)
    if not directory or device is None:
        return None
    leaves, tree = jax.tree.flatten(args)
    settings = {k: repr(v) for k, v in jax.config.values.items() if not any(word in k for word in UNREAD)}
    about = (
        [(leaf.shape, jax.numpy.dtype(leaf.dtype)) for leaf in leaves],
        tree,
        options,
        (device.platform, device.device_kind, device.id, device.client.platform_version),
        sorted(settings.items()),
        sorted(item for item in os.environ.items() if item[0].startswith(ENVIRONMENT)),
    )
    try:
        key = digest((kind, identity, about), "mmi_jax", "pallas_kernels", "jax", "jaxlib", "flax")
    except NoFingerprintError:
        return None
    return Path(directory) / f"prefill_{kind}-{key}-cache"


def read(entry: Path, args: tuple) -> jax.stages.Compiled | None:
    """The program stored there for such arguments; None, with a warning, where it cannot be read."""
    in_tree = jax.tree.structure((args, {}))
    try:
        serialized, out_tree = pickle.loads(entry.read_bytes())
        return serialize_executable.deserialize_and_load(
            serialized, in_tree, out_tree, execution_devices=[_device_of(args)]
        )
    except Exception as error:  # whatever a killed process, a full disk or another driver leaves
        warnings.warn(f"the cached program {entry.name[:32]} is unreadable and compiled again: {error}", stacklevel=2)
        entry.unlink(missing_ok=True)
        return None


def write(entry: Path | None, compiled: jax.stages.Compiled) -> None:
    """Stores the program; a warning where the disk does not take it."""
    if entry is None:
        return
    serialized, _, out_tree = serialize_executable.serialize(compiled)
    try:
        write_whole(entry, pickle.dumps((serialized, out_tree)))
    except OSError as error:
        warnings.warn(f"the program {entry.name[:32]} is not cached: {error}", stacklevel=2)


def _device_of(args: tuple) -> Any:
    """The one device that the arguments lie on, the default one for shapes; None for several."""
    devices = set()
    for leaf in jax.tree.leaves(args):
        devices |= getattr(getattr(leaf, "sharding", None), "device_set", set())
    devices = devices or set(jax.devices()[:1])
    return devices.pop() if len(devices) == 1 else None
