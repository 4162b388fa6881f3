"""Text, images and videos to a Prompt: chat template, placeholders, patches, positions."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from models.huggingface.chat import (
    MARK,
    Chat,
    Medium,
    Message,
    Part,
    check_no_placeholders,
    media_of,
    messages_of,
    template_fields,
    with_mark,
)
from models.huggingface.hub import locate
from models.huggingface.tokenizer import Tokenizer, read_end_tokens
from models.media.image import Frame, Image
from models.media.video import Video
from models.media.video_stream import VideoStream
from models.prompt import Prompt, TokenizedPrompt, collate
from models.qwen2_5_vl.checkpoints.dialects import read_config
from models.qwen2_5_vl.config import Qwen2_5_VLConfig
from models.qwen2_5_vl.processing.pixels import PixelPatches, num_and_shape, pixel_source
from models.qwen2_5_vl.processing.placeholders import Grid, num_tokens, token_layout
from models.qwen2_5_vl.processing.positions import EXACT, PositionRule, mrope_positions
from models.qwen2_5_vl.processing.preprocess import Preprocess, capped, frame_grid, patchify, resize, resize_all
from models.qwen2_5_vl.processing.preprocess_config import read_preprocess


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processor:
    """Preprocessing of a Qwen2.5-VL checkpoint's inputs.

    Args:
        config: the model's; gives placeholder ids, merge size and steps per second.
        tokenizer: the checkpoint's.
        image, video: how images and the frames of videos become patches.
        rule: which published reading of the positions inside and after a video.
        cap_pixels_per_frame: the frames of a long video have the pixels of 115,200 tokens at most; warns when it acts.
        end_tokens: ids that end an answer, ascending.
    """

    config: Qwen2_5_VLConfig
    tokenizer: Tokenizer
    image: Preprocess
    video: Preprocess
    rule: PositionRule = EXACT
    cap_pixels_per_frame: bool = False
    end_tokens: tuple[int, ...] = ()

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
        ends = read_end_tokens(directory, tokenizer)
        return cls(config=config, tokenizer=tokenizer, image=image, video=video, end_tokens=ends, **options)

    def __call__(
        self,
        *prompts: Chat,
        add_generation_prompt: bool = True,
        cuts_on_device: bool = False,
    ) -> Prompt:
        """A batch with one row per prompt, padded at the end to the longest.

        A prompt is the parts of one user's turn, or a chat:

            processor(["Compare", Image(...), "with", video, "in a word."])
            processor([Message(role="system", parts=("Be brief.",)), Message(parts=(video, "What happens?"))])

        With a `VideoStream` among them the patches are cut on the device, as frames arrive from its thread.

        Args:
            *prompts: text, images and videos in the order the model reads them; any number of each.
            add_generation_prompt: the rendered text ends where the assistant's answer begins.
            cuts_on_device: patches are cut where the model runs, whatever the media: the same values, no work here.

        Raises:
            ValueError: nothing to say, a placeholder written in the text, or a chat template that does not render each
                image and video once and in order.
        """
        return self._prompt(
            prompts, lambda messages: self._render(messages, add_generation_prompt), cuts_on_device=cuts_on_device
        )

    def opening(self, *prompts: Chat) -> Prompt:
        """The beginning of prompts whose last turn goes on: the cache of its prefill serves any `continuation`.

            video = prefill(model, processor.opening([video]), max_new_tokens=512)
            first = prefill(model, processor.continuation(["What happens?"]), cache=video)
            other = prefill(model, processor.continuation(["Who is there?"]), cache=video)

        Args:
            *prompts: as for a call.

        Raises:
            ValueError: as for a call.
        """
        return self._prompt(prompts, lambda messages: self._render_around(with_mark(messages, at_end=True))[0])

    def continuation(self, *prompts: Sequence[Part], closes: bool = True) -> Prompt:
        """What goes on in a turn left open by `opening`, counted from 0: for `prefill(..., cache=)`.

        An opening and its continuations have the tokens of one call with all their parts, where the tokenizer does not
        join across the seam: it never does next to an image or video.

        Args:
            *prompts: the further parts of each prompt: text, images, videos or a further piece of a video.
            closes: the turn ends, and the text where the assistant's answer begins; else the turn stays open.

        Raises:
            ValueError: as for a call, or messages in place of parts.
        """
        for parts in prompts:
            if any(isinstance(part, Message) for part in parts):
                raise ValueError(f"a continuation goes on with parts of a turn, not with messages: got {parts}")

        def render(messages: Sequence[Message]) -> str:
            marked = with_mark(messages, at_end=False)
            return self._render_around(marked if closes else with_mark(marked, at_end=True))[1]

        return self._prompt(prompts, render)

    def _prompt(
        self,
        prompts: Sequence[Chat],
        render: Callable[[Sequence[Message]], str],
        *,
        cuts_on_device: bool = False,
    ) -> Prompt:
        """A batch with one row per prompt, whose text is what `render` makes of its messages."""
        if not prompts:
            raise ValueError("a batch must hold one prompt or more, got none")
        chats = [messages_of(prompt) for prompt in prompts]
        rows = [self._row(messages, render(messages)) for messages in chats]
        media = [part for messages in chats for part in media_of(messages)]
        if media and (cuts_on_device or any(isinstance(part, VideoStream) for part in media)):
            return collate(
                rows, PixelPatches(sources=tuple(pixel_source(part, self._preprocess(part)) for part in media))
            )
        patches = [self._patches(part) for part in media if not isinstance(part, VideoStream)]
        # One video is not copied: its patches may be most of the host's memory.
        none = np.zeros((0, self.config.vision.patch_dim), np.float32)
        return collate(rows, patches[0] if len(patches) == 1 else np.concatenate([none, *patches]))

    def tokenize(self, prompt: Chat, *, add_generation_prompt: bool = True) -> TokenizedPrompt:
        """One prompt without its patches: of images and videos only the sizes are read."""
        messages = messages_of(prompt)
        return self._row(messages, self._render(messages, add_generation_prompt))

    def _row(self, messages: Sequence[Message], text: str) -> TokenizedPrompt:
        media = media_of(messages)
        grids = tuple(self.grid(part) for part in media)
        tokens = expand_placeholders(self.tokenizer.encode(text), media, grids, self.config)
        seconds = [_seconds_per_grid(part, self.video) for part in media]
        rope_pos = mrope_positions(tokens, grids, seconds, self.config, rule=self.rule)
        return TokenizedPrompt(
            tokens=tokens, rope_pos=rope_pos, layout=token_layout(tokens, grids, self.config), grids=grids
        )

    def render(self, prompt: Chat, *, add_generation_prompt: bool = True) -> str:
        """The chat template's text of one prompt, with one placeholder for each image and video."""
        return self._render(messages_of(prompt), add_generation_prompt)

    def _render_around(self, messages: Sequence[Message]) -> list[str]:
        """The chat template's text before, between and after the marks; with the assistant's turn begun."""
        pieces = self._render(messages, True).split(MARK)
        marks = sum(part == MARK for message in messages for part in message.parts)
        if len(pieces) != marks + 1:
            raise ValueError(
                f"a chat template must write every text once: expected {marks} marks, got {len(pieces) - 1}"
            )
        return pieces

    def grid(self, part: Medium) -> Grid:
        """Frames, rows and columns of an image or video in patches."""
        return frame_grid(*num_and_shape(part), self._preprocess(part))

    def num_tokens(self, part: Medium) -> int:
        """Tokens of an image or video, without the marks around it."""
        return num_tokens(self.grid(part), self.config)

    def fit_frame(self, frame: Frame, num_frames: int) -> np.ndarray:
        """A video frame at the size the model sees, given how many are sampled: the `resize` of `read_video`."""
        return resize(frame, self._video_preprocess(num_frames))

    def _preprocess(self, part: Medium) -> Preprocess:
        return self.image if isinstance(part, Image) else self._video_preprocess(part.num_frames)

    def _video_preprocess(self, num_frames: int) -> Preprocess:
        return capped(self.video, num_frames) if self.cap_pixels_per_frame else self.video

    @property
    def placeholders(self) -> tuple[int, int]:
        """Ids that stand for the vision tokens of images and of videos."""
        return self.config.image_token, self.config.video_token

    @property
    def temporal_patch_len(self) -> int:
        """Video frames of one temporal patch."""
        return self.video.temporal_patch_size

    @property
    def _placeholder_ids(self) -> tuple[int, ...]:
        config = self.config
        return config.image_token, config.video_token, config.vision_start_token, config.vision_end_token

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """The chat template's text, with one placeholder for each image and video."""
        check_no_placeholders(messages, [self.tokenizer.token_text(token) for token in self._placeholder_ids])
        return self.tokenizer.render(template_fields(messages), add_generation_prompt=add_generation_prompt)

    def _patches(self, part: Image | Video) -> np.ndarray:
        if isinstance(part, Image):
            return patchify(resize(part.pixels, self.image)[None], self.image)[0]
        config = self._video_preprocess(part.num_frames)
        return patchify(resize_all(part.frames, config), config)[0]


def expand_placeholders(
    tokens: Int32[np.ndarray, " t"], media: Sequence[Medium], grids: Sequence[Grid], config: Qwen2_5_VLConfig
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


def _seconds_per_grid(part: Medium, config: Preprocess) -> float:
    """Seconds of video in one temporal patch; an image has none."""
    return 0.0 if isinstance(part, Image) else config.temporal_patch_size / part.fps
