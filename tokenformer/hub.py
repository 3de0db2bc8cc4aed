"""The Hugging Face hub: what is meant as a name there, and a copy of a model's files, asked for once, not for long."""

from __future__ import annotations

import re
from pathlib import Path

SECONDS = 10.0  # for the hub to answer
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")  # configuration and tokenizer


def is_on_hub(place: str | Path, without_owner: bool = False) -> bool:
    """Whether "owner/name" (or, where allowed, a name alone) is meant as one on the hub: nothing on the disk looks like
    it, and it does not end as tokenizer.json or pytorch_model.bin do."""
    path = Path(place)
    if path.exists() or path.suffix in (".json", ".bin"):
        return False
    if re.fullmatch(r"[\w.-]+", str(place)):
        return without_owner
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", str(place))) and not path.parent.exists()


def download(name: str, patterns: tuple[str, ...]) -> Path:
    """The folder of a copy of those files of a model on the hub, which is kept in the hub's cache; what is there
    already does where the hub has no answer."""
    from huggingface_hub import model_info, snapshot_download

    unanswered = None
    try:
        model_info(name, timeout=SECONDS)  # snapshot_download sets no limit of its own
    except Exception as error:  # no network, no such model, no right to it: of many classes
        unanswered = error
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), local_files_only=unanswered is not None))
    except Exception as error:
        why = reason(unanswered) if unanswered else first_line(error)
        raise ValueError(f"{name}: no such file or folder here, and not to be had from the hub ({why})") from error


def reason(error: Exception) -> str:
    from huggingface_hub.errors import HfHubHTTPError

    text = first_line(error)
    return text if isinstance(error, HfHubHTTPError | ValueError) else f"it cannot be reached: {text}"


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:150]
