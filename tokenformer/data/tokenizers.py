"""Text -> token ids: plain bytes, or a fast tokenizer of transformers.

Both kinds have vocab_size, eos_token_id (the mark after each document), identity() for the cache's key,
encode, decode, encode_documents, save, spell, and encode_with_bytes: ids with the UTF-8 bytes of text that
each stands for, so that a loss counted in tokens can be stated in bits per byte.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from .. import hub
from .sources import first_line


class ByteTokenizer:
    """Token ids are the bytes of UTF-8; id 0, which no document holds, is the end mark."""

    vocab_size, eos_token_id = 256, 0

    def identity(self) -> str:
        return "bytes"

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: Iterable[int]) -> str:
        """Text without end marks; bytes that are not UTF-8 become U+FFFD."""
        text = bytes(token for token in map(int, ids) if token != self.eos_token_id)
        return text.decode("utf-8", "replace")

    def encode_documents(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8"), np.uint8) for text in texts]

    def encode_with_bytes(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        ids = np.frombuffer(text.encode("utf-8"), np.uint8)
        return ids, np.ones(len(ids), np.uint32)

    def spell(self, ids: Iterable[int]) -> str:
        """The text of any tokens on one line, as `escaped` has it; <300> for an id that is no token."""
        return escaped(bytes([i]) if 0 <= i < 256 else f"<{i}>".encode() for i in map(int, ids))

    def save(self, folder: str | Path) -> None:
        """Writes the same tokenizer in the form that AutoTokenizer reads."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        symbols = byte_symbols()
        tokenizer = Tokenizer(models.BPE({symbol: byte for byte, symbol in enumerate(symbols)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        options = {"eos_token": symbols[0], "pad_token": symbols[0], "clean_up_tokenization_spaces": False}
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options).save_pretrained(str(folder))


def byte_symbols() -> list[str]:
    """The printable stand-in of each byte in GPT-2's scheme, but for byte 0, which stands for itself: its
    stand-in there is a letter of real languages, and as the end mark it would be found in their text."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(0x101)
    return ["\0", *(chr(byte if byte in printable else next(others)) for byte in range(1, 256))]


def escaped(pieces: Iterable[bytes]) -> str:
    """Bytes as one line of printable text: what is no UTF-8, no letter or sign, or a backslash, as Python's escapes."""
    text = b"".join(piece.replace(b"\\", b"\\\\") for piece in pieces).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class HFTokenizer:
    """A fast tokenizer, by hub name or folder. Its end-of-text token is the end mark, and nothing else is."""

    def __init__(self, name: str) -> None:
        from transformers import AutoTokenizer

        place = Path(name).expanduser()
        try:
            if hub.is_on_hub(name, without_owner=True):
                place = hub.download(name, hub.SMALL_FILES)
            if not place.exists():
                raise ValueError("no such folder")
            self.tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False, local_files_only=True)
        except Exception as error:  # of many kinds: a wrong name, a broken file, no network
            raise ValueError(
                f'data.tokenizer = {name!r} cannot be loaded; allowed: "bytes", the name of a tokenizer on '
                f"the hub, or a folder that holds one ({first_line(error)})"
            ) from error
        if not self.tokenizer.is_fast:
            raise ValueError(f"data.tokenizer = {name!r} has no tokenizer.json: a fast tokenizer is needed")
        if self.tokenizer.eos_token_id is None:
            raise ValueError(f"data.tokenizer = {name!r} has no eos_token to mark a document's end with")
        self.eos_token_id: int = self.tokenizer.eos_token_id
        self.vocab_size: int = 1 + max(self.tokenizer.get_vocab().values())

    def identity(self) -> str:
        return hashlib.sha256(f"{self.eos_token_id} {self.backend().to_str()}".encode()).hexdigest()

    def backend(self) -> Any:
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()  # either may be stored in its file
        backend.no_padding()
        backend.encode_special_tokens = True  # an end mark spelled out in a document is text like any other
        return backend

    def encode(self, text: str) -> list[int]:
        return self.backend().encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        return str(self.tokenizer.decode([int(token) for token in ids], skip_special_tokens=True))

    def spell(self, ids: Iterable[int]) -> str:
        """The text of any tokens on one line, special ones too, as `escaped` has it; <300> for an id that is none."""
        numbers = [int(token) for token in ids]
        tokens = zip(numbers, self.tokenizer.convert_ids_to_tokens(numbers), strict=True)
        return escaped(f"<{i}>".encode() if token is None else self._bytes_of(token) for i, token in tokens)

    def _bytes_of(self, token: str) -> bytes:
        from tokenizers.decoders import ByteLevel

        if isinstance(self.backend().decoder, ByteLevel):
            known = {symbol: byte for byte, symbol in enumerate(byte_symbols())} | {"\u0100": 0}  # GPT-2's byte 0
            stand_ins = [known.get(symbol) for symbol in token]
            return token.encode() if None in stand_ins else bytes(b for b in stand_ins if b is not None)
        byte = re.fullmatch("<0x([0-9A-F]{2})>", token)  # of SentencePiece, whose space is another sign
        return bytes.fromhex(byte[1]) if byte else token.replace("\u2581", " ").encode()

    def encode_documents(self, texts: list[str]) -> list[np.ndarray]:
        return [np.asarray(each.ids) for each in self.backend().encode_batch(texts, add_special_tokens=False)]

    def encode_with_bytes(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids, and for each the bytes of text from where the tokens before it end to where it ends.

        A character of several tokens counts for its first, what the tokenizer passes over for the token
        after; their sum is the text's length in UTF-8.
        """
        encoding = self.backend().encode(text, add_special_tokens=False)
        characters = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        widths = 1 + (characters >= 0x80) + (characters >= 0x800) + (characters >= 0x10000)
        position = np.concatenate([[0], np.cumsum(widths)])  # of each character, in bytes
        ends = np.maximum.accumulate(np.array([end for _, end in encoding.offsets], np.int64))
        ends[-1:] = len(text)
        return np.asarray(encoding.ids), np.diff(position[ends], prepend=0).astype(np.uint32)

    def save(self, folder: str | Path) -> None:
        self.tokenizer.save_pretrained(str(folder))


Tokenizer = ByteTokenizer | HFTokenizer


def load_tokenizer(name: str) -> Tokenizer:
    """`data.tokenizer`: "bytes", or a tokenizer on the hub or in a folder; raises ValueError if neither."""
    return ByteTokenizer() if name == "bytes" else HFTokenizer(name)
