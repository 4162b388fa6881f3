"""Sharding: a prefill split over a mesh with an axis for the sequence and one for the heads.

Device `(r, c)` of a mesh of R x C holds, of a prompt of `t` tokens:

    between layers      tokens of piece `r * C + c` of R * C, all features
    in attention        queries of piece `r` of R, heads of group `c` of C; keys of all tokens, kv heads of group `c`
    of the cache        tokens of piece `r`, kv heads of group `c`
    of every weight     one of R * C pieces; a layer's weights are gathered when the layer runs

At long prompts it is cheaper to move a layer's weights to the tokens than the tokens to the weights: 466 MB a layer for
7B in bfloat16, against 3.8 GB of activations at a million tokens and four pieces.

The pieces are contiguous, so causal attention gives the last of R sequence pieces (2 R - 1) / R times the mean work:
1.5 at R = 2, 1.75 at 4, 1.94 at 16. The heads divide evenly, so as many devices as there are kv heads go to them first.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

SEQUENCE, HEADS = "sequence", "heads"
BOTH = (SEQUENCE, HEADS)
"""All devices, as tokens between layers and weights are split."""

TOKENS_SPEC = P(None, BOTH, None)
"""Embeddings `[b, t, e]`."""

ROPE_SPEC = P(None, None, BOTH)
"""Positions `[3, b, t]`."""

CACHE_SPEC = P(None, None, SEQUENCE, HEADS, None)
"""Keys and values `[layers, b, s, g, d]`."""

PER_DEVICE_SPEC = P(BOTH)
"""Anything with a leading axis that each device made for itself: the devices' arrays one after another."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shards:
    """Pieces along each axis; with one of both, every method is the identity and needs no mesh.

    Args:
      sequence: devices along the sequence axis.
      heads: devices along the heads axis; divides the kv heads.
    """

    sequence: int = 1
    heads: int = 1

    @property
    def num_devices(self) -> int:
        """Devices of the mesh."""
        return self.sequence * self.heads

    def first_token(self, q_start, tokens_here: int):
        """The first token that this device holds between layers, of those from `q_start` on."""
        if self.num_devices == 1:
            return q_start
        return q_start + jax.lax.axis_index(BOTH) * jnp.int32(tokens_here)

    def first_query(self, q_start, queries_here: int):
        """The first query of this device's piece in attention."""
        if self.sequence == 1:
            return q_start
        return q_start + jax.lax.axis_index(SEQUENCE) * jnp.int32(queries_here)

    def by_heads(self, x):
        """`[b, t, h, d]` of the tokens here and all heads as the tokens of the sequence piece and the heads here."""
        return x if self.heads == 1 else jax.lax.all_to_all(x, HEADS, split_axis=2, concat_axis=1, tiled=True)

    def by_tokens(self, x):
        """The way back from `by_heads`."""
        return x if self.heads == 1 else jax.lax.all_to_all(x, HEADS, split_axis=1, concat_axis=2, tiled=True)

    def all_tokens(self, x):
        """`[b, s, g, d]` of this piece as all tokens of the heads here."""
        return x if self.sequence == 1 else jax.lax.all_gather(x, SEQUENCE, axis=1, tiled=True)

    def per_group[T](self, patterns: Sequence[T]) -> list[tuple[T, ...]]:
        """The patterns of each group of heads; one entry when all groups have the same."""
        width = len(patterns) // self.heads
        groups = [tuple(patterns[n * width : (n + 1) * width]) for n in range(self.heads)]
        return groups if len(set(groups)) > 1 else groups[:1]

    def in_group(self, branches: Sequence[Callable[..., PyTree]], *operands):
        """The branch of this device's group of heads: `jax.lax.switch` where they differ."""
        if len(branches) == 1:
            return branches[0](*operands)
        return jax.lax.switch(jax.lax.axis_index(HEADS), branches, *operands)

    def whole(self, weights, axes: Sequence[int | None]):
        """One layer's weights, gathered; `axes` as `split_axes` gives them."""
        if self.num_devices == 1:
            return weights
        leaves, tree = jax.tree.flatten(weights)
        gathered = [
            leaf if axis is None else jax.lax.all_gather(leaf, BOTH, axis=axis - 1, tiled=True)
            for leaf, axis in zip(leaves, axes, strict=True)
        ]
        return jax.tree.unflatten(tree, gathered)

    def sum(self, x):
        """Sum over all devices."""
        return x if self.num_devices == 1 else jax.lax.psum(x, BOTH)

    def everywhere(self, x):
        """True where it is true on every device that attends with this one's tokens."""
        return x if self.heads == 1 else jax.lax.pmin(x.astype(jnp.int32), HEADS).astype(bool)

    def by_piece(self, x, *, has_heads: bool):
        """A small `[layers, b]` or `[layers, b, h]` of each sequence piece, heads joined; leading axis the pieces."""
        if has_heads and self.heads > 1:
            x = jax.lax.all_gather(x, HEADS, axis=2, tiled=True)
        return x[None] if self.sequence == 1 else jax.lax.all_gather(x, SEQUENCE, axis=0)


ONE_DEVICE = Shards()


def make_mesh(devices: Sequence[Any] | None = None, *, num_kv_heads: int) -> Mesh:
    """A mesh over all devices: as many along `heads` as divide both them and the kv heads, the others along `sequence`.

    Args:
      devices: all of this process group's when None.
      num_kv_heads: of the model.
    """
    devices = jax.devices() if devices is None else devices
    heads = math.gcd(len(devices), num_kv_heads)
    return Mesh(np.asarray(devices).reshape(-1, heads), BOTH)


def shards_of(mesh: Mesh | None, *, num_kv_heads: int) -> Shards:
    """The split over a mesh; one device without a mesh.

    Raises:
      ValueError: the mesh has other axes, or more devices along `heads` than divide the kv heads.
    """
    if mesh is None:
        return ONE_DEVICE
    if mesh.axis_names != BOTH:
        raise ValueError(f"the mesh must have the axes {BOTH}, got {mesh.axis_names}")
    shards = Shards(sequence=mesh.shape[SEQUENCE], heads=mesh.shape[HEADS])
    if num_kv_heads % shards.heads:
        raise ValueError(f"the mesh's heads axis must divide the kv heads: {num_kv_heads=}, got {shards.heads} devices")
    return shards


def weight_specs(state: PyTree, shards: Shards) -> PyTree:
    """The partition of every weight: matrices are split along their first axis that all devices divide, never along the
    layers; every device holds norms and biases whole.
    """

    def spec(path, leaf):
        return _spec(_split_axis(leaf.shape, _is_layer(path), shards))

    return jax.tree_util.tree_map_with_path(spec, state)


def split_axes(layers: PyTree, shards: Shards) -> tuple[int | None, ...]:
    """For each weight of `model.layers`, the axis along which it is split, None where it is not."""
    return tuple(_split_axis(leaf.shape, True, shards) for leaf in jax.tree.leaves(layers))


def layer_specs(layers: PyTree, axes: Sequence[int | None]) -> PyTree:
    """The partition of every weight of `model.layers`; `axes` as `split_axes` gives them."""
    leaves, tree = jax.tree.flatten(layers)
    return jax.tree.unflatten(tree, [_spec(axis) for _, axis in zip(leaves, axes, strict=True)])


def shard_model(model: Any, mesh: Mesh) -> Any:
    """The model with its weights split over the mesh, as `prefill(..., mesh=mesh)` and `decode` read them."""
    from flax import nnx  # here, as in `prefill`

    graphdef, state = nnx.split(model)
    shards = shards_of(mesh, num_kv_heads=model.config.num_kv_heads)
    return nnx.merge(graphdef, place(state, mesh, weight_specs(state, shards)))


def place(tree: PyTree, mesh: Mesh | None, specs: PyTree) -> PyTree:
    """The arrays on the devices of the mesh as `specs` say, one for all or one for each; as they are without a mesh."""
    if mesh is None:
        return tree
    if isinstance(specs, P):
        specs = jax.tree.map(lambda _: specs, tree)
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs)


def _is_layer(path) -> bool:
    return any(getattr(entry, "key", None) == "layers" for entry in path)


def _spec(axis: int | None) -> P:
    return P() if axis is None else P(*[None] * axis, BOTH)


def _split_axis(shape: tuple[int, ...], is_layer: bool, shards: Shards) -> int | None:
    axes = range(1 if is_layer else 0, len(shape))
    if len(axes) < 2:
        return None
    return next((axis for axis in axes if shape[axis] % shards.num_devices == 0), None)
