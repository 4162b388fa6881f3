"""Text to token ids and chats to text, from the files of a Hugging Face directory."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import tokenizers
from jaxtyping import Int32

from models.huggingface.chat_template import compiled_template, read_chat_template
from models.huggingface.json_files import existing, read_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """The tokenizer and chat template of a checkpoint.

    Args:
        backend: the tokenizer of `tokenizers`.
        chat_template: Jinja source that renders messages to text.
        special_tokens: text of the named special tokens (`eos_token` ...), which a template may use.
    """

    backend: tokenizers.Tokenizer
    chat_template: str
    special_tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_directory(cls, directory: str | os.PathLike) -> "Tokenizer":
        """The tokenizer of a checkpoint: tokenizer.json and a chat template.

        Raises:
            ValueError: a file is missing or cannot be read.
        """
        path = existing(Path(directory) / "tokenizer.json")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"tokenizer.json must be in the format of `tokenizers`, got {path}: {error}") from error
        return cls(
            backend=backend,
            chat_template=read_chat_template(Path(directory)),
            special_tokens=_read_special_tokens(Path(directory) / "tokenizer_config.json"),
        )

    @property
    def vocab_size(self) -> int:
        """Ids the tokenizer knows; a model's table may be padded to more."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> Int32[np.ndarray, " t"]:
        """The token ids of `text`; special tokens written in it become their ids, none are added."""
        return np.array(self.backend.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, tokens: Sequence[int] | np.ndarray, *, skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        return self.backend.decode([int(token) for token in tokens], skip_special_tokens=skip_special_tokens)

    def token_id(self, token: str) -> int:
        """The id of a token given by its text."""
        if (token_id := self.backend.token_to_id(token)) is None:
            raise ValueError(f"the tokenizer has no token {token!r} among its {self.vocab_size}")
        return token_id

    def token_text(self, token_id: int) -> str:
        """The text of a token given by its id."""
        if (text := self.backend.id_to_token(token_id)) is None:
            raise ValueError(f"the tokenizer has no id {token_id}: its vocabulary holds {self.vocab_size} tokens")
        return text

    def special_id(self, name: str) -> int | None:
        """The id of a named special token such as `eos_token`; None if the checkpoint names none."""
        return self.token_id(self.special_tokens[name]) if name in self.special_tokens else None

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """The text of a chat: the chat template applied to messages of `role` and `content`.

        The template runs in Jinja's sandbox: it comes with a checkpoint and is not trusted.
        """
        try:
            template = compiled_template(self.chat_template)
            return template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **dict(self.special_tokens)
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"the checkpoint's chat template must render the messages, got: {error}") from error


def _read_special_tokens(path: Path) -> dict[str, str]:
    """The named special tokens of tokenizer_config.json: plain text, or an object with the text as its content."""
    entries = read_json(path) if path.is_file() else {}
    named = {k: v["content"] if isinstance(v, dict) else v for k, v in entries.items() if k.endswith("_token")}
    return {name: text for name, text in named.items() if isinstance(text, str)}


def read_end_tokens(directory: str | os.PathLike, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end an answer, ascending: `eos_token_id` of generation_config.json, else the named `eos_token`."""
    path = Path(directory) / "generation_config.json"
    ids = read_json(path).get("eos_token_id") if path.is_file() else None
    if ids is None:
        ids = tokenizer.special_id("eos_token")
    return tuple(sorted({token for token in (ids if isinstance(ids, list) else [ids]) if token is not None}))
