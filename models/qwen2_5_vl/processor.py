"""Text, images and videos to a Prompt: chat template, placeholders, patches, positions."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from mmi_jax.layout import TokenLayout, stack
from models.hub import locate
from models.media import Frame, Image, Video
from models.prompt import Prompt
from models.qwen2_5_vl.config import Qwen2_5_VLConfig
from models.qwen2_5_vl.dialects import read_config
from models.qwen2_5_vl.placeholders import Grid, num_tokens, token_layout
from models.qwen2_5_vl.preprocess import Preprocess, capped, patchify, resize, smart_resize
from models.qwen2_5_vl.preprocess_config import read_preprocess
from models.qwen2_5_vl.rope import EXACT, PositionRule, mrope_positions
from models.tokenizer import Tokenizer, read_json

type Part = str | Image | Video


@dataclasses.dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a chat: who speaks (`system`, `user`, `assistant`), and text, images and videos in order."""

    role: str = "user"
    parts: tuple[Part, ...]

    def __post_init__(self):
        """Checks that the message says something."""
        if not any(not isinstance(part, str) or part.strip() for part in self.parts):
            raise ValueError(f"a message must hold text, an image or a video, got {self.parts} from {self.role!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processor:
    """What a Qwen2.5-VL checkpoint does to its inputs.

    Args:
        config: the model's; gives placeholder ids, merge size and steps per second.
        tokenizer: the checkpoint's.
        image, video: how images and the frames of videos become patches.
        rule: which published reading of the positions inside and after a video.
        cap_pixels_per_frame: the frames of a long video share 115,200 tokens' worth of pixels; warns when it acts.
    """

    config: Qwen2_5_VLConfig
    tokenizer: Tokenizer
    image: Preprocess
    video: Preprocess
    rule: PositionRule = EXACT
    cap_pixels_per_frame: bool = False

    def __post_init__(self):
        """Checks that the tokenizer knows the model's placeholders."""
        for token in self._placeholder_ids:
            self.tokenizer.token_text(token)

    @classmethod
    def from_directory(cls, name: str | os.PathLike, **options: Any) -> "Processor":
        """The processor of a Hugging Face checkpoint.

        Args:
            name: a directory with config.json, tokenizer.json, a chat template and, optionally, preprocessing settings;
                or a repository name on the hub.
            **options: `rule`, `cap_pixels_per_frame`.

        Raises:
            ValueError: a file is missing, cannot be read, or does not fit the model.
        """
        directory = locate(os.fspath(name))
        config = read_config(directory)
        image, video = read_preprocess(directory, config.vision)
        tokenizer = Tokenizer.from_directory(directory)
        return cls(config=config, tokenizer=tokenizer, image=image, video=video, **options)

    def __call__(self, *prompts: Sequence[Part] | Sequence[Message], add_generation_prompt: bool = True) -> Prompt:
        """A batch with one row per prompt, padded at the end to the longest.

        A prompt is the parts of one user's turn, or a chat:

            processor(["Compare", Image(...), "with", video, "in a word."])
            processor([Message(role="system", parts=("Be brief.",)), Message(parts=(video, "What happens?"))])

        Args:
            *prompts: text, images and videos in the order the model reads them; any number of each.
            add_generation_prompt: the rendered text ends where the assistant's answer begins.

        Raises:
            ValueError: nothing to say, a placeholder written in the text, or a chat template that does not render each
                image and video once and in order.
        """
        if not prompts:
            raise ValueError("a batch must hold one prompt or more, got none")
        rows, patches = [], []
        for prompt in prompts:
            rows.append(self.lay_out(prompt, add_generation_prompt=add_generation_prompt))
            media = [part for message in _messages(prompt) for part in message.parts if not isinstance(part, str)]
            patches += [self._patches(part) for part in media]
        return self._batch(rows, patches)

    def lay_out(self, prompt: Sequence[Part] | Sequence[Message], *, add_generation_prompt: bool = True) -> "Row":
        """One prompt without its patches: of images and videos only the sizes are read."""
        messages = _messages(prompt)
        media = [part for message in messages for part in message.parts if not isinstance(part, str)]
        grids = tuple(self.grid(part) for part in media)
        tokens = self.tokenizer.encode(self._render(messages, add_generation_prompt))
        tokens = expand_placeholders(tokens, media, grids, self.config)
        seconds = [_seconds_per_grid(part, self.video) for part in media]
        rope_pos = mrope_positions(tokens, grids, seconds, self.config, rule=self.rule)
        return Row(tokens=tokens, rope_pos=rope_pos, layout=token_layout(tokens, grids, self.config), grids=grids)

    def render(self, prompt: Sequence[Part] | Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The chat template's text of one prompt, with one placeholder for each image and video."""
        return self._render(_messages(prompt), add_generation_prompt)

    def grid(self, part: Image | Video) -> Grid:
        """Frames, rows and columns of an image or video in patches."""
        shape = part.pixels.shape if isinstance(part, Image) else part.frames.shape[1:]
        num_frames = 1 if isinstance(part, Image) else part.num_frames
        config = self.image if isinstance(part, Image) else self._video_preprocess(num_frames)
        rows, columns = smart_resize(shape[0], shape[1], config)
        grids = -(-num_frames // config.temporal_patch_size)
        return grids, rows // config.patch_size, columns // config.patch_size

    def num_tokens(self, part: Image | Video) -> int:
        """Tokens of an image or video, without the marks around it."""
        return num_tokens(self.grid(part), self.config)

    def fit_frame(self, frame: Frame, num_frames: int) -> np.ndarray:
        """A video frame at the size the model sees, given how many are sampled: the `resize` of `read_video`."""
        return resize(frame, self._video_preprocess(num_frames))

    def _video_preprocess(self, num_frames: int) -> Preprocess:
        return capped(self.video, num_frames) if self.cap_pixels_per_frame else self.video

    @property
    def _placeholder_ids(self) -> tuple[int, ...]:
        config = self.config
        return config.image_token, config.video_token, config.vision_start_token, config.vision_end_token

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """The chat template's text, with one placeholder for each image and video."""
        reserved = [self.tokenizer.token_text(token) for token in self._placeholder_ids]
        for text in (part for message in messages for part in message.parts if isinstance(part, str)):
            if found := [token for token in reserved if token in text]:
                raise ValueError(
                    f"text must not contain the model's placeholders {reserved}, which stand for images and videos: "
                    f"got {found} in {_excerpt(text, found[0])!r}"
                )
        rendered = [
            {"role": message.role, "content": [_content(part) for part in message.parts]} for message in messages
        ]
        return self.tokenizer.render(rendered, add_generation_prompt=add_generation_prompt)

    def _patches(self, part: Image | Video) -> np.ndarray:
        if isinstance(part, Image):
            return patchify(resize(part.pixels, self.image)[None], self.image)[0]
        config = self._video_preprocess(part.num_frames)
        first = resize(part.frames[0], config)
        if first.shape == part.frames.shape[1:]:
            return patchify(part.frames, config)[0]
        return patchify(np.stack([resize(frame, config) for frame in part.frames]), config)[0]

    def _batch(self, rows: Sequence["Row"], patches: Sequence[np.ndarray]) -> Prompt:
        """The rows padded at their end to the longest; token and position 0 in padding, modality -1."""
        longest = max(len(row.tokens) for row in rows)
        pads = [longest - len(row.tokens) for row in rows]
        none = np.zeros((0, self.config.vision.patch_dim), np.float32)
        return Prompt(
            tokens=np.stack([np.pad(row.tokens, (0, pad)) for row, pad in zip(rows, pads, strict=True)]),
            rope_pos=np.stack(
                [np.pad(row.rope_pos, ((0, 0), (0, pad))) for row, pad in zip(rows, pads, strict=True)], axis=1
            ),
            layout=stack([row.layout for row in rows]),
            # One video is not copied: its patches may be most of the host's memory.
            patches=patches[0] if len(patches) == 1 else np.concatenate([none, *patches]),
            grids=tuple(grid for row in rows for grid in row.grids),
        )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """One prompt without padding and patches; fields as of `Prompt`."""

    tokens: Int32[np.ndarray, " t"]
    rope_pos: Int32[np.ndarray, "3 t"]
    layout: TokenLayout
    grids: tuple[Grid, ...]


def expand_placeholders(
    tokens: Int32[np.ndarray, " t"], media: Sequence[Image | Video], grids: Sequence[Grid], config: Qwen2_5_VLConfig
) -> Int32[np.ndarray, " s"]:
    """The tokens with the one placeholder of each image and video repeated once per vision token.

    An image of 2 tokens and a video of 3 (I, V placeholders; S, E vision start and end; a, b text):

        a S I E b S V E      ->      a S I I E b S V V V E

    Raises:
        ValueError: the placeholders in `tokens` are not those of `media`, one each and in order.
    """
    is_placeholder = (tokens == config.image_token) | (tokens == config.video_token)
    expected = [config.image_token if isinstance(part, Image) else config.video_token for part in media]
    got = tokens[is_placeholder].tolist()
    if got != expected:
        raise ValueError(
            f"a chat template must write one placeholder for each image ({config.image_token}) and video "
            f"({config.video_token}), in order: {expected=}, {got=}"
        )
    repeats = np.ones(len(tokens), np.int64)
    repeats[is_placeholder] = [num_tokens(grid, config) for grid in grids]
    return np.repeat(tokens, repeats)


def read_stop_tokens(directory: str | os.PathLike, tokenizer: Tokenizer) -> frozenset[int]:
    """The ids that end an answer: `eos_token_id` of generation_config.json, else the tokenizer's `eos_token`."""
    path = Path(directory) / "generation_config.json"
    found = read_json(path).get("eos_token_id") if path.is_file() else None
    if found is None:
        found = tokenizer.special_id("eos_token")
    ids = found if isinstance(found, list) else [found]
    return frozenset(token for token in ids if token is not None)


def _messages(prompt: Sequence[Part] | Sequence[Message]) -> list[Message]:
    """A chat as it is; parts as one user's turn."""
    if isinstance(prompt, str):
        raise ValueError(f"a prompt must be a list of parts or messages, got the text {prompt[:60]!r} without a list")
    if not prompt:
        raise ValueError("a prompt must hold text, an image or a video, got no part at all")
    chat = [part for part in prompt if isinstance(part, Message)]
    parts = tuple(part for part in prompt if not isinstance(part, Message))
    if chat and parts:
        raise ValueError(f"a prompt must be parts or messages, not both: got {len(parts)} parts, {len(chat)} messages")
    return chat or [Message(parts=parts)]


def _content(part: Part) -> dict[str, str]:
    match part:
        case str():
            return {"type": "text", "text": part}
        case Image():
            return {"type": "image"}
        case Video():
            return {"type": "video"}


def _seconds_per_grid(part: Image | Video, config: Preprocess) -> float:
    """Seconds of video in one temporal patch; an image has none."""
    return config.temporal_patch_size / part.fps if isinstance(part, Video) else 0.0


def _excerpt(text: str, found: str) -> str:
    start = text.index(found)
    return text[max(start - 20, 0) : start + len(found) + 20]
