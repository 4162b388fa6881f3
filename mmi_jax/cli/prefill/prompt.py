"""The parts of a prompt from the command line's options."""

import re
from collections.abc import Sequence
from typing import Any

_MARK = re.compile(r"\{(video|image)\}")


def arrange(text: str, *, videos: Sequence[Any], images: Sequence[Any]) -> list[Any]:
    """Text, videos and images in the order the model reads them.

    A `{video}` or `{image}` in the text stands for the next video or image:

        "First {video} then {image}: which?"   ->   "First ", video 0, " then ", image 0, ": which?"

    Without marks all videos come first, then all images, then the text.

    Raises:
      ValueError: the text has marks, but not one for each video and image.
    """
    pieces = _MARK.split(text)
    if len(pieces) == 1:
        return [*videos, *images, *([text] if text.strip() else [])]
    waiting = {"video": list(videos), "image": list(images)}
    for kind, media in waiting.items():
        if pieces[1::2].count(kind) != len(media):
            raise ValueError(
                f"a prompt with marks must have one {{{kind}}} for each --{kind}: "
                f"expected {len(media)}, got {pieces[1::2].count(kind)} in {text!r}"
            )
    parts = [waiting[piece].pop(0) if n % 2 else piece for n, piece in enumerate(pieces)]
    return [part for part in parts if not isinstance(part, str) or part.strip()]
