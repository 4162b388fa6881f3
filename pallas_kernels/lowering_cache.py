"""Kernels whose lowering is Python's work, done once in a process for all programs that launch them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

MOSAIC_GPU = jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")
"""Calls of Mosaic kernels are not stable between versions of JAX; nothing exported here outlives the process."""


def lowered_once(launch: Callable[..., Any], *args: Any, **static: Any) -> Any:
    """`launch(*args, **static)`, lowered for CUDA once for all arguments of these shapes and keywords.

    JAX lowers a Mosaic kernel anew in every program that holds it: about half a second of Python, sixteen times in a
    layer whose heads have eight patterns. It also numbers the kernels it lowers, so that XLA takes equal kernels of
    two programs for different ones, and compiles both.

    Args:
      launch: a function of arrays and keywords at module level.
      args: pytrees of arrays.
      static: hashable.
    """
    leaves, tree = jax.tree.flatten(args)
    shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves)
    call, out_tree = _exported(launch, tuple(static.items()), tree, shapes)
    return jax.tree.unflatten(out_tree, call(*leaves))


# Many times what one process launches: a search of 114 trials has 28 different kernels (docs/log.md of 2026-11-26).
@functools.lru_cache(maxsize=1024)
def _exported(
    launch: Callable[..., Any], static: tuple[tuple[str, Any], ...], tree: Any, shapes: tuple[jax.ShapeDtypeStruct, ...]
) -> tuple[Callable[..., list[Any]], Any]:
    """The launch as a function of its leaves, and the tree of its output; under `jax.vmap` it is lowered as ever."""

    def run(*leaves: Any) -> Any:
        return launch(*jax.tree.unflatten(tree, leaves), **dict(static))

    # The exported module keeps the number that JAX gave the kernel: its text is the same in all programs.
    exported = jax.export.export(jax.jit(run), platforms=["cuda"], disabled_checks=[MOSAIC_GPU])(*shapes)

    @jax.custom_batching.custom_vmap
    def call(*leaves: Any):
        return jax.tree.leaves(exported.call(*leaves))

    # An exported call has no batching rule in JAX 0.11: a mapped launch is traced and lowered like any other.
    @call.def_vmap
    def mapped(axis_size: int, in_batched: Sequence[bool], *leaves: Any):
        del axis_size
        axes = [0 if is_batched else None for is_batched in in_batched]
        out = jax.vmap(lambda *leaves: jax.tree.leaves(run(*leaves)), axes)(*leaves)
        return out, [True] * len(out)

    return call, exported.out_tree
