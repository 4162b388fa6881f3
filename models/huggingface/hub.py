"""Directories of checkpoints by name: local, or downloaded from the Hugging Face hub."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

CHECKPOINT_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja")


def locate(name: str | Path) -> Path:
    """The directory of a checkpoint: `name` itself, or a download of the Hugging Face repository of that name.

    Raises:
        ValueError: `name` is no directory and cannot be downloaded.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists() or not _is_repository(str(name)):
        raise ValueError(f"a model is a directory or a Hugging Face repository 'owner/name', got {str(name)!r}")
    try:
        return Path(snapshot_download(str(name), allow_patterns=list(CHECKPOINT_FILES)))
    except (OSError, HfHubHTTPError) as error:
        raise ValueError(f"{str(name)!r} is no directory here and could not be downloaded: {error}") from error


def _is_repository(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith(("/", ".", "~")) and not name.endswith("/")
