"""Chat templates: Jinja sources that render messages to text."""

import functools
from pathlib import Path
from typing import NoReturn

import jinja2
import jinja2.sandbox

from models.huggingface.json_files import read_json

CHAT_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
"""Files that may hold a chat template, in the order of preference; the last two under the key `chat_template`."""


@functools.lru_cache(maxsize=8)
def compiled_template(source: str) -> jinja2.Template:
    """The template compiled: that takes longer than to render a short chat."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _raise_template_error
    return environment.from_string(source)


def _raise_template_error(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def read_chat_template(directory: Path) -> str:
    """The chat template of a checkpoint.

    Raises:
        ValueError: there is none.
    """
    for name in CHAT_TEMPLATE_FILES:
        path = directory / name
        if not path.is_file():
            continue
        template = path.read_text(encoding="utf-8") if path.suffix == ".jinja" else read_json(path).get("chat_template")
        if isinstance(template, list):  # several named templates
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if template:
            return template
    raise ValueError(
        f"a checkpoint must bring a chat template in one of {CHAT_TEMPLATE_FILES}, got none in {directory}"
    )
