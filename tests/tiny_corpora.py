"""Small texts for the tests of the data: a recipe's data section, documents, a folder of them, and back again."""

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from tokenformer.data import Corpus


def section(source: Any, **changes: Any) -> SimpleNamespace:
    fields = {
        "source": str(source), "tokenizer": "bytes", "text_field": "text", "split": "train",
        "document_separator": "", "sequence_length": 16, "batch_size": 4, "valid_fraction": 0.2, "valid_source": None,
        "valid_tokens": 10**6, "stream_tokens": 0, "repeat": False, "seed": 0,
    }  # fmt: skip
    return SimpleNamespace(**fields | changes)


def texts(count: int) -> list[str]:
    return [f"Document {number}: größer, 語 and 🙂 {hashlib.md5(bytes(number)).hexdigest()}" for number in range(count)]


def write_folder(root: Path, documents: list[str]) -> Path:
    for number, text in enumerate(documents):
        root.mkdir(exist_ok=True)
        (root / f"{number:04}.txt").write_bytes(text.encode())
    return root


def split_of(corpus: Corpus) -> tuple[list[str], list[str]]:
    """The documents of a corpus in bytes, read back from its tokens."""
    train, valid = (bytes(tokens.astype(np.uint8)).split(b"\0")[:-1] for tokens in (corpus.train, corpus.valid))
    return [text.decode() for text in train], [text.decode() for text in valid]
