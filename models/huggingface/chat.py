"""Chats: text, images and videos in turns, as a processor takes them and a chat template renders them."""

import dataclasses
from collections.abc import Sequence

from models.media.image import Image
from models.media.video import Video
from models.media.video_stream import VideoStream

type Medium = Image | Video | VideoStream
"""An image or a video: it becomes vision tokens."""

type Part = str | Medium

MARK = "\ue000"
"""Mark in a rendered chat template where a prompt is cut; of a range that no text uses (Unicode, private use area)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a chat: who speaks (`system`, `user`, `assistant`), and text, images and videos in order."""

    role: str = "user"
    parts: tuple[Part, ...]

    def __post_init__(self):
        """Checks that the message says something."""
        if not any(not isinstance(part, str) or part.strip() for part in self.parts):
            raise ValueError(f"a message must hold text, an image or a video, got {self.parts} from {self.role!r}")


type Chat = Sequence[Part] | Sequence[Message]
"""One prompt: the parts of one user's turn, or messages."""


def messages_of(prompt: Chat) -> list[Message]:
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


def media_of(messages: Sequence[Message]) -> list[Medium]:
    """All images and videos in order."""
    return [part for message in messages for part in message.parts if not isinstance(part, str)]


def with_mark(messages: Sequence[Message], *, at_end: bool) -> list[Message]:
    """The messages with a mark before, or after, the parts of the last one."""
    *before, last = messages
    parts = (*last.parts, MARK) if at_end else (MARK, *last.parts)
    return [*before, dataclasses.replace(last, parts=parts)]


def template_fields(messages: Sequence[Message]) -> list[dict]:
    """The messages as a chat template reads them: images and videos by their kind alone."""
    return [{"role": message.role, "content": [_content(part) for part in message.parts]} for message in messages]


def _content(part: Part) -> dict[str, str]:
    match part:
        case str():
            return {"type": "text", "text": part}
        case Image():
            return {"type": "image"}
        case Video() | VideoStream():
            return {"type": "video"}


def check_no_placeholders(messages: Sequence[Message], placeholders: Sequence[str]) -> None:
    """Raises ValueError if a text holds a placeholder of images or videos."""
    for text in (part for message in messages for part in message.parts if isinstance(part, str)):
        if reserved := [token for token in placeholders if token in text]:
            raise ValueError(
                f"text must not contain the model's placeholders {placeholders}, which represent images and videos: "
                f"got {reserved} in {_excerpt(text, reserved[0])!r}"
            )


def _excerpt(text: str, token: str) -> str:
    start = text.index(token)
    return text[max(start - 20, 0) : start + len(token) + 20]
