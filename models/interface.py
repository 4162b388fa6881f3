"""Interface of a model family: its models, processor and checkpoints, as commands, tasks and benchmarks use them.

A new family takes four steps; no command, task or benchmark changes.

1. A folder `models/<model_type>/` with the config (a frozen dataclass with the fields of `ModelConfig`), the model (an
   `nnx.Module` with the members of `Model`, its vision tower those of `VisionTower`), and the processor (`Processor`).
   `models/huggingface` reads tokenizers, chat templates and safetensors; `models/media` reads images and videos.
2. `family.py` in it: one class with every method of `Family`, and `FAMILY`, an instance of it.
3. One entry in `models.families.FAMILIES`: the `model_type` of config.json, and the module of `FAMILY`.
4. Tests in `tests/models/<model_type>/`: the logits of a tiny random checkpoint against those that transformers gave
   (`scripts/make_golden.py` writes such a file), positions and layout of tokens by hand, and `models.load` of it.
   `tests/models/test_families.py` runs for every family.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from mmi_jax.engine.protocols import VisionLanguageModel
from models.huggingface.chat import Chat, Medium, Part
from models.huggingface.tokenizer import Tokenizer
from models.media.video import Video
from models.media.video_stream import VideoStream
from models.prompt import LazyPatches, Prompt, TokenizedPrompt
from pallas_kernels.notation import AnyArray

Grid = tuple[int, int, int]
"""Frames, rows and columns of an image or video in patches; a frame is a temporal patch."""

FrameSize = tuple[int, int]
"""Rows and columns of a frame in patches."""

VisionImplementation = Literal["cudnn", "xla"]
"""Backends of a vision tower's attention."""

OnTensor = Callable[[int, int, str], None]
"""Called with tensors done, tensors in all and a name, after each tensor of a checkpoint."""


@runtime_checkable
class ModelConfig(Protocol):
    """Sizes of a model; a frozen dataclass, so that `dataclasses.replace` gives one with fewer layers.

    Fields:
        model_type: the family, as config.json names it.
        vision: sizes of the vision tower; at least `patch_size` (side of a patch in pixels), `merge_size` (side of a
            token in patches), `block_len` (patches of a token) and `patch_dim` (numbers in a flattened patch).
    """

    model_type: ClassVar[str]

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
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
        """Width of an attention head."""
        ...

    @property
    def embed_dim(self) -> int:
        """Width of the decoder."""
        ...

    @property
    def mlp_dim(self) -> int:
        """Hidden width of the decoder's MLP."""
        ...

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        ...

    @property
    def vision(self) -> Any:
        """Sizes of the vision tower."""
        ...


@runtime_checkable
class VisionTower(Protocol):
    """Patches of images and videos to tokens; an `nnx.Module`."""

    config: Any
    dtype: Any

    def __call__(
        self, patches: Float[AnyArray, "p c"], grids: tuple[Grid, ...], *, attention: VisionImplementation | None = None
    ) -> Float[Array, "t o"]:
        """The tokens of every grid, in order of appearance."""
        ...

    def encoder(
        self, size: FrameSize, attention: VisionImplementation | None = None
    ) -> Callable[[Float[AnyArray, "n p c"]], Float[Array, "n t o"]]:
        """A function from the patches of frames of one size to their tokens: one call of a compiled program."""
        ...

    def batch_frames(self, num_frames: int, size: FrameSize) -> int:
        """Frames that are encoded in one call, of a video of so many."""
        ...

    def frame_flops(self, size: FrameSize) -> float:
        """Floating-point operations of one frame, two per multiply-add."""
        ...


@runtime_checkable
class Model(VisionLanguageModel, Protocol):
    """A vision-language model: what `mmi_jax.prefill` needs, and the vision tower."""

    vision: Any

    def __call__(self, prompt: Prompt, attend: Any = None) -> Float[Array, "b t v"]:
        """Logits of every token by the plain forward pass, dense and causal unless `attend` says otherwise."""
        ...


@runtime_checkable
class Processor(Protocol):
    """Text, images and videos to a `Prompt`, and answers back to text."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer and chat template."""
        ...

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """Ids that end an answer."""
        ...

    @property
    def placeholders(self) -> tuple[int, int]:
        """Ids that stand for the vision tokens of images and of videos."""
        ...

    @property
    def temporal_patch_len(self) -> int:
        """Video frames of one temporal patch."""
        ...

    def __call__(self, *prompts: Chat, add_generation_prompt: bool = True, cuts_on_device: bool = False) -> Prompt:
        """A batch with one row per prompt, padded at the end to the longest.

        Args:
            *prompts: parts of one user's turn, or messages.
            add_generation_prompt: the rendered text ends where the assistant's answer begins.
            cuts_on_device: patches are cut where the model runs: the same values, no work on the host.
        """
        ...

    def opening(self, *prompts: Chat) -> Prompt:
        """The beginning of prompts whose last turn goes on: the cache of its prefill serves any `continuation`."""
        ...

    def continuation(self, *prompts: Sequence[Part], closes: bool = True) -> Prompt:
        """Further parts of a turn left open by `opening`, counted from 0: for `prefill(..., cache=)`."""
        ...

    def tokenize(self, prompt: Chat, *, add_generation_prompt: bool = True) -> TokenizedPrompt:
        """One prompt without its patches: of images and videos only the sizes are read."""
        ...

    def render(self, prompt: Chat, *, add_generation_prompt: bool = True) -> str:
        """The chat template's text of one prompt, with one placeholder for each image and video."""
        ...

    def grid(self, part: Medium) -> Grid:
        """Frames, rows and columns of an image or video in patches."""
        ...

    def num_tokens(self, part: Medium) -> int:
        """Tokens of an image or video, without the marks around it."""
        ...

    def fit_frame(self, frame: np.ndarray, num_frames: int) -> np.ndarray:
        """A video frame at the size the model sees, given how many are sampled: the `resize` of `read_video`."""
        ...


class MediumSize(NamedTuple):
    """An image or a video without pixels: its grid, and the seconds of a temporal patch."""

    grid: Grid
    is_image: bool = False
    seconds: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadShape:
    """Scores, in nats, that a head gives at distance 0, by what it attends to; kernels add noise of about 1 to 2.

    Args:
        near: tokens near in time: the window, and a ripple behind it.
        place: the same row and column, in every frame.
    """

    near: float = 0.0
    place: float = 0.0


class Family[C, M: nnx.Module](abc.ABC):
    """One architecture: its checkpoints, its models without a checkpoint, and its synthetic prompts.

    Attributes:
        model_type: as config.json names it.
        presets: published sizes by name.
    """

    model_type: str
    presets: Mapping[str, C]

    @abc.abstractmethod
    def read_config(self, directory: Path) -> C:
        """The sizes in a checkpoint's config.json.

        Raises:
            ValueError: a field is missing, or asks for what the models do not have.
        """

    @abc.abstractmethod
    def load_model(
        self, directory: Path, *, dtype: DTypeLike, on_tensor: OnTensor | None = None, mesh: Mesh | None = None
    ) -> M:
        """The model of a checkpoint, on the default device or sharded over a mesh.

        Raises:
            ValueError: a tensor is missing, unexpected or of another shape.
        """

    @abc.abstractmethod
    def read_processor(self, directory: Path, **options: Any) -> Processor:
        """The processor of a checkpoint; `options` are the family's.

        Raises:
            ValueError: a file is missing, cannot be read, or does not fit the model.
        """

    @abc.abstractmethod
    def save_checkpoint(self, model: M, processor: Any, directory: Path, *, max_shard_bytes: int | None = None) -> None:
        """Writes model and processor to a new or empty directory; a failed save leaves nothing.

        Args:
            model: in the dtype to write.
            processor: that `read_processor` gives back.
            directory: becomes a Hugging Face checkpoint.
            max_shard_bytes: the weights are written in files of at most so many bytes of tensors.

        Raises:
            ValueError: `directory` exists and is not empty.
        """

    @abc.abstractmethod
    def new_model(self, config: C, *, dtype: DTypeLike, rngs: nnx.Rngs) -> M:
        """A model of random weights, for training."""

    def abstract_model(self, config: C, *, dtype: DTypeLike = jnp.bfloat16) -> M:
        """The model with shapes in place of arrays: nothing is allocated."""
        return nnx.eval_shape(lambda: self.new_model(config, dtype=dtype, rngs=nnx.Rngs(0)))

    @abc.abstractmethod
    def without_vision(self, model: M) -> Any:
        """The decoder alone, with the parameters of the model: every token is looked up in the embedding."""

    @abc.abstractmethod
    def shape_heads(self, model: Any, shapes: Sequence[HeadShape]) -> None:
        """Writes weights of a model, or of its decoder, that let each query head of every layer attend so."""

    @abc.abstractmethod
    def num_words(self, config: C) -> int:
        """Ids from 0 on that are words: neither placeholders nor marks."""

    @abc.abstractmethod
    def medium_tokens(self, config: C, medium: MediumSize) -> Int32[np.ndarray, " t"]:
        """The ids of an image or video, marks included."""

    @abc.abstractmethod
    def tokenized(self, config: C, tokens: Int32[np.ndarray, " t"], media: Sequence[MediumSize]) -> TokenizedPrompt:
        """Positions and layout of the ids of one prompt, which holds these images and videos."""

    @abc.abstractmethod
    def pixel_patches(self, config: C, video: Video | VideoStream) -> LazyPatches:
        """The patches of a video, not resized, cut on the device; `numpy.asarray` cuts them on the host."""

    @abc.abstractmethod
    def vision_bytes(self, config: C, num_tokens: int, dtype: DTypeLike) -> int:
        """Device memory of the vision tower while it encodes a prompt of nothing but frames."""
