"""Frozen dataclasses that are pytrees, and whose checks run when a user makes one, not when JAX rebuilds one."""

import dataclasses
from collections.abc import Iterable
from typing import Any, dataclass_transform

import jax


def static_field(**kwargs: Any) -> Any:
    """A dataclass field that is part of the tree's structure: hashable, compared when jit looks up its cache."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field, static_field))
def pytree[T](cls: type[T]) -> type[T]:
    """Makes `cls` a frozen, keyword-only dataclass and a pytree.

    `jax.tree_util.register_dataclass` rebuilds through `__init__`, so shape checks there would reject the None,
    object and ShapeDtypeStruct leaves that JAX puts into trees while it works; this rebuilds around it.
    """
    cls = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    fields = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
    names = [f.name for f in fields if not f.metadata.get("static")]
    static_names = [f.name for f in fields if f.metadata.get("static")]

    def flatten(value: T):
        return [getattr(value, n) for n in names], tuple(getattr(value, n) for n in static_names)

    def flatten_with_keys(value: T):
        leaves, static = flatten(value)
        return [(jax.tree_util.GetAttrKey(n), leaf) for n, leaf in zip(names, leaves, strict=True)], static

    def unflatten(static: Iterable[Any], leaves: Iterable[Any]) -> T:
        value = object.__new__(cls)
        for name, field in zip(names + static_names, (*leaves, *static), strict=True):
            object.__setattr__(value, name, field)
        return value

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls
