"""Map from tensors of a Hugging Face checkpoint to parameters: one table, read in both directions."""

import dataclasses
import re
from collections.abc import Callable, Iterable

from flax import nnx

from models.qwen2_5_vl.config import Qwen2_5_VLConfig
from models.qwen2_5_vl.layers import State

Path = tuple[str, ...]

MODULES = {
    "vision.patch_embed": "visual.patch_embed.proj",
    "vision.layers.attention_norm": "visual.blocks.*.norm1",
    "vision.layers.mlp_norm": "visual.blocks.*.norm2",
    "vision.layers.attention.qkv": "visual.blocks.*.attn.qkv",
    "vision.layers.attention.out": "visual.blocks.*.attn.proj",
    "vision.layers.mlp.gate": "visual.blocks.*.mlp.gate_proj",
    "vision.layers.mlp.up": "visual.blocks.*.mlp.up_proj",
    "vision.layers.mlp.down": "visual.blocks.*.mlp.down_proj",
    "vision.merger.norm": "visual.merger.ln_q",
    "vision.merger.hidden": "visual.merger.mlp.0",
    "vision.merger.out": "visual.merger.mlp.2",
    "embedding": "model.embed_tokens",
    "layers.attention_norm": "model.layers.*.input_layernorm",
    "layers.mlp_norm": "model.layers.*.post_attention_layernorm",
    "layers.attention.q": "model.layers.*.self_attn.q_proj",
    "layers.attention.k": "model.layers.*.self_attn.k_proj",
    "layers.attention.v": "model.layers.*.self_attn.v_proj",
    "layers.attention.out": "model.layers.*.self_attn.o_proj",
    "layers.mlp.gate": "model.layers.*.mlp.gate_proj",
    "layers.mlp.up": "model.layers.*.mlp.up_proj",
    "layers.mlp.down": "model.layers.*.mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}
"""Our module to the module on disk; `*` is the layer, which our parameters carry as a leading axis."""

LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
TOWERS = ((re.compile(r"^model\.visual\."), "visual."), (re.compile(r"^model\.language_model\."), "model."))
"""The second naming scheme, of models in memory, to the one on disk."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slot:
    """Place of one tensor of a checkpoint.

    Fields:
        path: of the parameter in the model's state.
        layer: index on the parameter's leading axis; None where it has no such axis.
        shape: of the tensor on disk.
        is_transposed: the tensor, flattened to two axes, is the parameter's transpose.
    """

    path: Path
    layer: int | None
    shape: tuple[int, ...]
    is_transposed: bool


def canonical_name(name: str) -> str:
    """A tensor's name in the scheme of `MODULES`."""
    for pattern, replacement in TOWERS:
        name = pattern.sub(replacement, name)
    return name


def parameters(state: State) -> dict[Path, nnx.Variable]:
    """Every parameter by its path."""
    return {tuple(str(key) for key in path): variable for path, variable in nnx.to_flat_state(state)}


def slots(state: State, config: Qwen2_5_VLConfig) -> dict[str, Slot]:
    """Every tensor that a checkpoint of this model must hold, by name; `state` may be abstract."""
    by_name = {}
    for path, variable in parameters(state).items():
        name = f"{MODULES['.'.join(path[:-1])]}.{LEAVES[path[-1]]}"
        num_layers = variable.shape[0] if "*" in name else None
        shape = variable.shape[1:] if "*" in name else variable.shape
        if path[-1] == "kernel":
            shape = shape[::-1]
        if path == ("vision", "patch_embed", "kernel"):
            vision = config.vision
            shape = (shape[0], vision.num_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
        for layer in [None] if num_layers is None else range(num_layers):
            slot = Slot(path=path, layer=layer, shape=tuple(shape), is_transposed=path[-1] == "kernel")
            by_name[name.replace("*", str(layer))] = slot
    return by_name


def check(expected: dict[str, Slot], names_on_disk: Iterable[str], shape_of: Callable[[str], tuple[int, ...]]) -> None:
    """Raises `ValueError` unless the tensors on disk are those expected, in name and shape; names are canonical."""
    on_disk = set(names_on_disk)
    for kind, names in (("missing", expected.keys() - on_disk), ("unexpected", on_disk - expected.keys())):
        if names:
            listed = ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
            raise ValueError(
                f"{kind} tensors in the checkpoint: {len(names)} ({listed}); expected {len(expected)} in all"
            )
    for name, slot in expected.items():
        if shape_of(name) != slot.shape:
            raise ValueError(f"wrong shape of tensor {name}: expected {slot.shape}, got {shape_of(name)}")
