"""Documents -> token files: what is kept of the text, what is held out, and the cache the files lie in.

NULs are removed and counted (byte 0 marks a document's end), lone surrogates become `?`, nothing else
changes. Blank documents are dropped. The rest is decided by a document's BLAKE2b hash, taken without white
space at its ends: one seen before is a duplicate and dropped, and whether it is held out follows from the
hash alone, so not from the order, a seed or other documents. A source of its own for what is held out comes
first and is held out whole. Near duplicates are not looked for.

A cache folder holds TOKEN_FILES and info.json, which says what they should be like. It is written under
another name in the same place and gets its own when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .sources import BLOCK, Source
from .tokenizers import Tokenizer

FORMAT = 1  # of the token files: raise it when they would come out different
TOKEN_FILES = ("train.bin", "valid.bin", "valid_bytes.bin")
WORK = re.compile(r"\.[0-9a-f]{20}-[0-9a-f]{32}")  # the name of a folder while it is being written
STALE_SECONDS = 24 * 60 * 60

Say = Callable[[str], None]


class TooFewDocuments(ValueError):
    """So few that none or less than a window is held out, or none is left to train on."""


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def documents(source: Source, held_out: Source | None) -> Iterator[tuple[str, bool]]:
    """Texts, and whether each is held out whatever its hash: those of a source of their own, which come first."""
    if held_out is not None:
        yield from ((text, True) for text in held_out.documents())
    yield from ((text, False) for text in source.documents())


def write_tokens(
    folder: Path, source: Source, held_out: Source | None, tokenizer: Tokenizer, section: Any, say: Say
) -> dict[str, Any]:
    """Documents -> TOKEN_FILES in `folder`; returns what `Corpus.info` says about them."""
    fraction = section.valid_fraction if held_out is None else 0.0
    count: Counter[str] = Counter()
    seen: set[bytes] = set()
    text_hash = hashlib.sha256()
    dtype, mark, limit = token_dtype(tokenizer.vocab_size), tokenizer.eos_token_id, section.valid_tokens
    waiting: list[str] = []  # training documents: tokenized many at a time, so that every core has work
    waiting_bytes, told = 0, time.monotonic()
    train, valid, valid_bytes = (open(folder / name, "wb") for name in TOKEN_FILES)

    def write_waiting() -> None:
        nonlocal waiting_bytes
        for ids in tokenizer.encode_documents(waiting):
            train.write(np.append(ids, mark).astype(dtype).tobytes())
            count["train_tokens"] += len(ids) + 1
        count["train_documents"] += len(waiting)
        count["train_bytes"] += waiting_bytes
        waiting.clear()
        waiting_bytes = 0

    with train, valid, valid_bytes:
        say(f"reading data.source = {source.name!r}")
        for raw, apart in documents(source, held_out):
            data = raw.replace("\0", "").encode("utf-8", "replace")
            text = data.decode("utf-8")
            count["nul_characters_removed"] += len(raw) - len(text)
            content = text.strip().encode("utf-8")
            key = hashlib.blake2b(content, digest_size=16).digest()
            if not content or key in seen:
                count["duplicates_dropped" if content else "blank_dropped"] += 1
                continue
            seen.add(key)
            text_hash.update(key)
            if apart or int.from_bytes(key[:8], "big") < fraction * 2**64:
                ids, widths = tokenizer.encode_with_bytes(text)
                room = limit - count["valid_tokens"]
                valid.write(np.append(ids, mark)[:room].astype(dtype).tobytes())
                valid_bytes.write(np.append(widths, 0)[:room].astype(np.uint32).tobytes())
                count["valid_documents"] += 1
                count["valid_tokens"] += min(room, len(ids) + 1)
                count["valid_bytes"] += int(widths[:room].sum())
                count["valid_bytes_unused"] += int(widths[room:].sum())
            elif source.needed_tokens is None or count["train_tokens"] < source.needed_tokens:
                waiting.append(text)
                waiting_bytes += len(data)
                if waiting_bytes >= BLOCK // 4:
                    write_waiting()
            elif count["valid_tokens"] >= limit:
                break
            if time.monotonic() - told > 2:
                told = time.monotonic()
                say(f"{len(seen):,} documents, {count['train_bytes'] / 1e6:,.1f} MB of training text so far")
        write_waiting()

    names = [path.name if source.alone else path.relative_to(source.root).as_posix() for path in source.files]
    if not seen:
        skipped = f"{len(names)} files, {source.skipped_files} of them not text"
        raise ValueError(f"data.source = {source.name!r} holds no text ({skipped})")
    for side in ("valid", "train"):
        if not count[f"{side}_documents"] and held_out is not None:
            empty = f"data.valid_source = {held_out.name!r} holds no text"
            if side == "train":
                empty = f"data.source = {source.name!r} has no document that data.valid_source has not"
            raise TooFewDocuments(f"{empty}, so there is none to {'train on' if side == 'train' else 'hold out'}")
        if not count[f"{side}_documents"]:
            raise TooFewDocuments(
                f"data.source = {source.name!r}: none of its {len(seen):,} documents falls to the {side} "
                f"side at data.valid_fraction = {section.valid_fraction}; change that, add documents, or cut "
                "files into more of them with data.document_separator"
            )
    counted = f"{count['train_tokens']:,} training, {count['valid_tokens']:,} held-out tokens"
    say(f"{len(seen):,} documents: {counted}")
    info: dict[str, Any] = {"source": source.name, "description": source.description}
    info |= {"tokenizer": section.tokenizer, "vocab_size": tokenizer.vocab_size, "end_token_id": mark}
    info["valid_fraction"] = section.valid_fraction
    info["documents"] = count["train_documents"] + count["valid_documents"]
    info["bytes"] = count["train_bytes"] + count["valid_bytes"] + count["valid_bytes_unused"]
    for name in ("tokens", "bytes", "documents"):
        info |= {f"train_{name}": count[f"train_{name}"], f"valid_{name}": count[f"valid_{name}"]}
    for name in ("valid_bytes_unused", "duplicates_dropped", "blank_dropped", "nul_characters_removed"):
        info[name] = count[name]
    info |= {"text_hash": text_hash.hexdigest(), "skipped_files": source.skipped_files}
    return info | {"files": len(names), "file_names": names[:1000]}


def read_cache(folder: Path, say: Say) -> dict[str, Any] | None:
    """The info of token files that are as they were written, or None."""
    if not folder.exists():
        return None
    try:
        info = json.loads((folder / "info.json").read_text(encoding="utf-8"))
        files = info["token_files"]
        if files["train.bin"]["bytes"] > 2**30:
            say(f"checking the token files in {folder}")
        if all(fingerprint(folder / name) == files[name] for name in TOKEN_FILES):
            return info
    except (FileNotFoundError, KeyError, TypeError, ValueError):
        pass
    say(f"the token files in {folder} are damaged: building them again")
    return None


def fingerprint(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def build_cache(
    folder: Path, source: Source, held_out: Source | None, tokenizer: Tokenizer, section: Any, say: Say
) -> dict[str, Any]:
    """Writes the token files to a folder beside `folder` and, when they are complete, gives it that name."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_stale_work(folder.parent)
    work = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    work.mkdir()
    try:
        info = write_tokens(work, source, held_out, tokenizer, section, say)
        info["token_files"] = {name: fingerprint(work / name) for name in TOKEN_FILES}
        info["sha256"] = info["token_files"]["train.bin"]["sha256"]
        (work / "info.json").write_text(json.dumps(info, indent=1), encoding="utf-8")
        try:
            os.replace(work, folder)
        except OSError:  # the name is taken: by a process that was faster, or by damaged files
            if not folder.is_dir():
                raise
            if complete := read_cache(folder, lambda text: None):
                return complete
            os.replace(folder, work / "damaged")
            shutil.rmtree(work / "damaged")
            os.replace(work, folder)
        return info
    finally:
        shutil.rmtree(work, ignore_errors=True)


def remove_stale_work(root: Path) -> None:
    """Removes the work folders of builds that were killed: nothing was written to them for a day."""
    for work in root.glob(".*-*"):
        if not WORK.fullmatch(work.name):
            continue
        try:
            written = max(path.stat().st_mtime for path in (work, *work.iterdir()))
        except OSError:  # another process finished or removed it just now
            continue
        if written < time.time() - STALE_SECONDS:
            shutil.rmtree(work, ignore_errors=True)
