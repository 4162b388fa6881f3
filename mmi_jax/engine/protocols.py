"""Protocols: what the engine reads of a model and of a prompt; every model family fits them, none is imported."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from jax.typing import DTypeLike
from jaxtyping import Float, Int32, PyTree

from mmi_jax.layout import TokenLayout
from pallas_kernels.notation import AnyArray, Array


@runtime_checkable
class ModelConfig(Protocol):
    """The sizes that prefill reads of a model."""

    @property
    def num_layers(self) -> int:
        """Layers of the decoder."""
        ...

    @property
    def num_heads(self) -> int:
        """Query heads of a layer."""
        ...

    @property
    def num_kv_heads(self) -> int:
        """Key and value heads of a layer."""
        ...

    @property
    def head_dim(self) -> int:
        """Features of a head."""
        ...

    @property
    def embed_dim(self) -> int:
        """Features between layers."""
        ...

    @property
    def mlp_dim(self) -> int:
        """Features inside an MLP."""
        ...

    @property
    def vocab_size(self) -> int:
        """Tokens that there are logits for."""
        ...


@runtime_checkable
class Prompt(Protocol):
    """A batch of right-padded prompts, a dataclass; whatever else `model.embed` reads of it belongs to the model."""

    @property
    def tokens(self) -> Int32[AnyArray, "b t"]:
        """Token ids; any id in padding."""
        ...

    @property
    def rope_pos(self) -> Int32[AnyArray, "3 b t"]:
        """Rotary position on the axes time, height, width; any value in padding."""
        ...

    @property
    def layout(self) -> TokenLayout:
        """Modality and place of each token, fields `[b, t]`; modality -1 marks padding."""
        ...


@runtime_checkable
class VisionLanguageModel(Protocol):
    """Interface that prefill needs of a model: an `nnx.Module` whose `layers` carry a leading layer axis.

    A layer is called as `layer(x, rotary, attend) -> (x, aux)`, where `attend(q, k, v) -> (out, aux)` takes
    `[b, t, h, d]` and `[b, t, g, d]` after rotation.
    """

    layers: Any
    embedding: Callable[..., Array]

    @property
    def config(self) -> ModelConfig:
        """Its sizes."""
        ...

    @property
    def dtype(self) -> DTypeLike:
        """The dtype that it computes in."""
        ...

    def embed(self, prompt: Any) -> Float[Array, "b t e"]:
        """Embeddings of the tokens, vision included; the prompt is of the family's type."""
        ...

    def embed_bytes(self, prompt: Any) -> int:
        """Bytes that `embed` holds on the device at a time, except weights and the embeddings; for the planner."""
        ...

    def rotary(self, rope_pos: Int32[AnyArray, "3 b t"]) -> PyTree:
        """Whatever the layers need to rotate by these positions."""
        ...

    def unembed(self, x: Float[Array, "*b e"]) -> Float[Array, "*b v"]:
        """Logits, float32."""
        ...
