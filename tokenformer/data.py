"""Text -> documents -> tokens -> deterministic, resumable batches.

`prepare` turns a source into a `Corpus`: two streams of token ids on disk, one to train on, one held out.
`Batches` deals the training stream out as a pure function of (seed, step); `eval_windows` cuts the held-out
stream and says how many bytes of text every token stands for.

Sources (`data.source`)
  embedded        the running Python's standard library without tests and GUI tools, about 10 MB, a document
                  for each file: "Python source", not English
  a file          UTF-8 text, plain, .gz or .xz
  a folder        every such file below it in sorted order, except names that begin with a dot; files that
                  are not UTF-8 or hold a NUL are skipped and counted
  hf:NAME         a dataset on the hub, streamed: hf:NAME, hf:OWNER/NAME or hf:OWNER/NAME/CONFIG
  hf:FORMAT:PATH  a local file through the same way in: hf:json:rows.jsonl (also csv, parquet, text)

How files become documents
  1. With `data.document_separator`, every file is cut at that string, which belongs to no document.
  2. Without it, a file that stands alone is cut at form feeds, at NULs and at lines `<|endoftext|>`. If it
     holds none of these, it is cut into chunks: at the first blank line after 4,096 characters; if there is
     none within 16,384, at the last line end before that; if there is none either, right there.
  3. Without it, a file of a folder is one document; one of more than 1,048,576 characters is cut as under 2.

What happens to documents
  NULs are removed and counted (byte 0 marks a document's end), lone surrogates become `?`, nothing else
  changes. Blank documents are dropped. The rest is decided by a document's BLAKE2b hash, taken without white
  space at its ends: one seen before is a duplicate and dropped, and whether it is held out follows from the
  hash alone, so not from the order, a seed or other documents. Near duplicates are not looked for.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import lzma
import os
import platform
import re
import shutil
import sysconfig
import time
import uuid
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

FORMAT = 1  # of the token files: raise it when they would come out different
BLOCK = 2**20  # characters read at a time; a folder's file up to this size is one document
LONGEST_CHUNK = 2**14
MARKS = re.compile(r"[\f\0]|^<\|endoftext\|>[ \t]*\r?(?:\n|\Z)", re.M)
CHUNK = re.compile(r".{4096,16384}?\n[ \t\r]*\n|.{4096,16383}\n|.{1,16384}", re.S)
TOKEN_FILES = ("train.bin", "valid.bin", "valid_bytes.bin")
NOT_EMBEDDED = frozenset(
    "site-packages dist-packages test tests idlelib tkinter lib2to3 distutils ensurepip turtledemo".split()
)


@dataclass
class Corpus:
    """Token streams, memory-mapped; each document is followed by the tokenizer's end mark.

    train        (N,) uint16 or uint32 token ids
    valid        (M,) the same, held out; at most `data.valid_tokens`
    valid_bytes  (M,) uint32, the UTF-8 bytes of text each held-out token stands for; 0 for an end mark
    tokenizer    vocab_size, eos_token_id, encode(text), decode(ids), save(folder)
    info         where it came from and what was done to it, JSON-able; `sha256` is the training stream's
    """

    train: np.ndarray
    valid: np.ndarray
    valid_bytes: np.ndarray
    tokenizer: Tokenizer
    info: dict[str, Any]


def prepare(
    section: Any, train_tokens: int, cache: Path | None = None, progress: Say | None = None
) -> Corpus:
    """The corpus that `section` (a recipe's data section) describes, from the cache or else built there.

    A local source is taken whole. A streamed one is read until it has given `train_tokens` (and the one
    after, which the last window looks ahead to) and `data.valid_tokens` held-out tokens, or has ended: the
    held-out text does not depend on the training budget. The cache is `cache`, else $TOKENFORMER_CACHE, else
    ~/.cache/tokenformer; its files are checked against their size and SHA-256 whenever they are opened, and
    built again if they differ. Building holds about 100 bytes of memory per document. Processes that build
    the same corpus at once all do the work, and one result is kept. `progress(text)` hears about long work.
    Raises ValueError, in one line, for a source, tokenizer or cache that cannot be used.
    """
    if not 0 < section.valid_fraction < 1:
        raise ValueError(f"data.valid_fraction = {section.valid_fraction}: between 0 and 1 is allowed")
    if section.valid_tokens < 1:
        raise ValueError(f"data.valid_tokens = {section.valid_tokens}: 1 or more is allowed")
    say = progress or (lambda text: None)
    try:
        source = Source(section, train_tokens)
        identity = source.identity()
    except OSError as error:
        raise ValueError(f"data.source = {section.source!r} cannot be read: {error}") from error
    tokenizer = load_tokenizer(section.tokenizer)
    key = [FORMAT, identity, tokenizer.identity(), section.valid_fraction, section.valid_tokens]
    root = Path(cache or os.environ.get("TOKENFORMER_CACHE") or "~/.cache/tokenformer").expanduser()
    folder = root / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:20]
    dtype = token_dtype(tokenizer.vocab_size)
    try:
        info = read_cache(folder, say) or build_cache(folder, source, tokenizer, section, say)
        train = np.memmap(folder / "train.bin", dtype, "r")
        valid = np.memmap(folder / "valid.bin", dtype, "r")
        valid_bytes = np.memmap(folder / "valid_bytes.bin", np.uint32, "r")
    except OSError as error:  # trouble with the source is a ValueError by now
        raise ValueError(
            f"cache folder {root} cannot be used ({error.strerror or error}): it must be writable and have "
            "room for the token files; TOKENFORMER_CACHE names another"
        ) from error
    return Corpus(train, valid, valid_bytes, tokenizer, info)


# ------------------------------------------------------------------------------------- source -> documents


class Source:
    """Where documents come from: `documents()` yields their texts; `skipped_files` is complete after that."""

    def __init__(self, section: Any, train_tokens: int) -> None:
        self.name, self.separator = str(section.source), section.document_separator
        self.split, self.text_field = section.split, section.text_field
        self.embedded, self.streamed = self.name == "embedded", self.name.startswith("hf:")
        self.needed_tokens = train_tokens + 1 if self.streamed else None
        self.description = "text"
        self.skipped_files = 0
        if self.separator and (self.streamed or self.embedded):
            raise ValueError(
                f"data.document_separator = {self.separator!r} has no effect with data.source = "
                f"{self.name!r}, which has documents of its own: leave it out"
            )
        if self.streamed:
            self.root, self.files = Path("/"), data_files(self.name)
        elif self.embedded:
            self.description = f"Python source: the standard library of Python {platform.python_version()}"
            self.root = Path(sysconfig.get_paths()["stdlib"])
            files = ((path, path.relative_to(self.root)) for path in self.root.rglob("*.py"))
            self.files = sorted(path for path, inside in files if not NOT_EMBEDDED.intersection(inside.parts))
        else:
            self.root = Path(self.name).expanduser().absolute()
            self.files = files_below(self.root, self.name)
        self.alone = self.files == [self.root]

    def identity(self) -> list[Any]:
        """For the cache's key: files by name, size and time, for they need not be read to find the cache."""
        files = [(str(path), (stat := path.stat()).st_size, stat.st_mtime_ns) for path in self.files]
        return [self.name, self.separator, self.split, self.text_field, self.needed_tokens, files]

    def documents(self) -> Iterator[str]:
        if self.streamed:
            yield from streamed_documents(self.name, self.split, self.text_field)
            return
        separator_seen = False
        for path in self.files:
            size, text, nul, marked = inspect(path, self.separator)
            if not text and self.alone:
                raise ValueError(f"data.source = {self.name!r} is not UTF-8 text; allowed: plain, .gz or .xz")
            if not text or nul and not self.alone and "\0" not in self.separator:
                self.skipped_files += 1
            elif self.separator:
                separator_seen |= marked
                yield from cut(read_blocks(path), re.compile(re.escape(self.separator)))
            elif not self.alone and (self.embedded or size <= BLOCK):
                yield "".join(read_blocks(path))
            else:
                yield from cut(read_blocks(path), MARKS) if marked else cut_chunks(read_blocks(path))
        if self.separator and not separator_seen:
            raise ValueError(f"data.document_separator = {self.separator!r} does not occur in {self.name!r}")


def files_below(root: Path, name: str) -> list[Path]:
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise ValueError(
            f'data.source = {name!r} does not exist; allowed: "embedded", a text file (plain, .gz, .xz), a '
            'folder of them, or "hf:NAME" for a dataset'
        )

    def refuse(error: OSError) -> None:
        raise error

    found = []
    for folder, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [each for each in folders if not each.startswith(".")]
        found += [Path(folder, each) for each in names if not each.startswith(".")]
    return sorted((path for path in found if path.is_file()), key=Path.as_posix)


def read_blocks(path: Path) -> Iterator[str]:
    """A file's text in parts of about BLOCK characters that end where a line ends, unless it is long."""
    opener: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix.lower(), open)
    try:
        with opener(path, "rt", encoding="utf-8", newline="") as file:
            while block := file.read(BLOCK):
                yield block + file.readline(LONGEST_CHUNK)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"data.source: {path} cannot be read: {first_line(error)}") from error


def inspect(path: Path, separator: str) -> tuple[int, bool, bool, bool]:
    """A first pass over a file: its characters, whether it is UTF-8, holds a NUL, holds a mark to cut at."""
    pattern = re.compile(re.escape(separator)) if separator else MARKS
    size, nul, marked, tail = 0, False, False, ""
    try:
        for block in read_blocks(path):
            size += len(block)
            nul = nul or "\0" in block
            text = tail + block
            marked = marked or pattern.search(text) is not None
            tail = text[max(0, len(text) - len(separator) + 1) :]  # a separator may lie across blocks
    except UnicodeDecodeError:
        return size, False, nul, marked
    return size, True, nul, marked


def cut(blocks: Iterable[str], pattern: re.Pattern[str]) -> Iterator[str]:
    tail = ""
    for block in blocks:
        *documents, tail = pattern.split(tail + block)
        yield from documents
    yield tail


def cut_chunks(blocks: Iterable[str]) -> Iterator[str]:
    tail = ""
    for block in blocks:
        tail, start = tail + block, 0
        while len(tail) - start > 2 * LONGEST_CHUNK and (match := CHUNK.match(tail, start)):
            yield match.group()
            start = match.end()
        tail = tail[start:]
    yield from CHUNK.findall(tail)


def data_files(name: str) -> list[Path]:
    """The file of hf:FORMAT:PATH; none for a dataset on the hub or data behind a web address."""
    path = name.removeprefix("hf:").partition(":")[2]
    if not path or "://" in path:
        return []
    if not (file := Path(path).expanduser().absolute()).is_file():
        raise ValueError(f"data.source = {name!r}: {path} is not a file; hf:FORMAT:PATH needs one")
    return [file]


def streamed_documents(name: str, split: str, text_field: str) -> Iterator[str]:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"data.source = {name!r} needs datasets: pip install 'tokenformer[hf]'") from error
    dataset, _, path = name.removeprefix("hf:").partition(":")
    options: dict[str, Any] = {"data_files": os.path.expanduser(path)} if path else {}
    if dataset.count("/") == 2:
        dataset, _, options["name"] = dataset.rpartition("/")
    try:
        for row in datasets.load_dataset(dataset, split=split, streaming=True, **options):
            if text_field not in row:
                raise ValueError(f"data.text_field = {text_field!r} is none of its fields: {', '.join(row)}")
            if not isinstance(text := row[text_field], str | None):
                raise ValueError(f"data.text_field = {text_field!r} holds {type(text).__name__}, not text")
            yield text or ""
    except Exception as error:  # of many kinds: names, splits, files, the network
        raise ValueError(
            f"data.source = {name!r} with data.split = {split!r} cannot be read: {first_line(error)}"
        ) from error


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ------------------------------------------------------------------------------------- documents -> tokens


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


class HFTokenizer:
    """A fast tokenizer, by hub name or folder. Its end-of-text token is the end mark, and nothing else is."""

    def __init__(self, name: str) -> None:
        from transformers import AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(os.path.expanduser(name))
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
Say = Callable[[str], None]


def load_tokenizer(name: str) -> Tokenizer:
    """`data.tokenizer`: "bytes", or a tokenizer on the hub or in a folder; raises ValueError if neither."""
    return ByteTokenizer() if name == "bytes" else HFTokenizer(name)


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def write_tokens(
    folder: Path, source: Source, tokenizer: Tokenizer, section: Any, say: Say
) -> dict[str, Any]:
    """Documents -> TOKEN_FILES in `folder`; returns what `Corpus.info` says about them."""
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
        for raw in source.documents():
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
            if int.from_bytes(key[:8], "big") < section.valid_fraction * 2**64:
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
        if not count[f"{side}_documents"]:
            raise ValueError(
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


# ----------------------------------------------------------------------------------------------- the cache


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


def build_cache(folder: Path, source: Source, tokenizer: Tokenizer, section: Any, say: Say) -> dict[str, Any]:
    """Writes the token files to a folder beside `folder` and, when they are complete, gives it that name."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    work.mkdir()
    try:
        info = write_tokens(work, source, tokenizer, section, say)
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


# --------------------------------------------------------------------------------------- tokens -> batches


class Batches(torch.utils.data.Dataset[torch.Tensor]):
    """Batch `step` of the training stream, LongTensor (batch_size, sequence_length + 1), from (seed, step).

    The stream is cut into windows of `sequence_length` tokens and the one after; every epoch deals all of
    them out in an order of its own, going on in the batch in which the epoch before ends. `len` is the number
    of whole batches in one epoch; a step after them raises ValueError unless `repeat`. To resume, with
    any number of workers: DataLoader(batches, batch_size=None, sampler=range(step, steps), num_workers=n)
    """

    def __init__(
        self, tokens: np.ndarray, sequence_length: int, batch_size: int, seed: int, repeat: bool = False
    ) -> None:
        if not 0 <= seed < 2**32:
            raise ValueError(f"data.seed = {seed}: allowed is an integer from 0 to 4294967295")
        if len(tokens) <= sequence_length:
            raise ValueError(
                f"data.sequence_length = {sequence_length} needs {sequence_length + 1:,} training tokens; "
                f"the corpus holds {len(tokens):,}"
            )
        self.tokens, self.sequence_length, self.batch_size = tokens, sequence_length, batch_size
        self.seed, self.repeat = seed, repeat
        self.windows = (len(tokens) - 1) // sequence_length
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.windows // self.batch_size

    def __getitem__(self, step: int) -> torch.Tensor:
        if step < 0:
            raise IndexError(step)
        self.require(step + 1)
        places = [divmod(step * self.batch_size + row, self.windows) for row in range(self.batch_size)]
        starts = [int(self.order(epoch)[place]) * self.sequence_length for epoch, place in places]
        rows = [self.tokens[start : start + self.sequence_length + 1] for start in starts]
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def order(self, epoch: int) -> np.ndarray:
        """The windows in an epoch's order, 4 bytes each; RandomState, whose streams numpy keeps for good."""
        if self._order is None or self._order[0] != epoch:
            windows = np.arange(self.windows, dtype=np.uint32)
            np.random.RandomState([self.seed, epoch]).shuffle(windows)
            self._order = epoch, windows
        return self._order[1]

    def require(self, steps: int) -> None:
        """Raises ValueError if `steps` steps would see a token twice without having been asked to."""
        if steps > len(self) and not self.repeat:
            asked = steps * self.batch_size * self.sequence_length
            raise ValueError(
                f"{steps:,} steps ask for {asked:,} training tokens; the corpus holds {len(self.tokens):,} "
                f"({len(self):,} steps): take fewer steps or a larger data.source, or let tokens be seen "
                "again with data.repeat = true"
            )

    def epochs(self, steps: int) -> float:
        return steps * self.batch_size / self.windows

    def unique_tokens(self, steps: int) -> int:
        return min(steps * self.batch_size, self.windows) * self.sequence_length

    def __getstate__(self) -> dict[str, Any]:
        """A worker that is not forked opens the token file itself: the tokens are not sent to it."""
        state, tokens = self.__dict__ | {"_order": None}, self.tokens
        file = getattr(tokens, "filename", None)  # None: not a memory map
        if file and tokens.nbytes == os.path.getsize(file):  # a part of one is sent as it is
            state["tokens"] = (file, tokens.dtype)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if isinstance(self.tokens, tuple):
            self.tokens = np.memmap(*self.tokens, "r")


def eval_windows(corpus: Corpus, sequence_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Held-out windows: token ids (W, T + 1) and the bytes of text each stands for (W, T + 1), both int64.

    Position 0 is context only: an end mark in the first window, in others the last token of the one before.
    So positions 1..T hold every held-out token once, save a rest shorter than T, and bits per byte is the sum
    of their losses in nats, end marks included, over ln 2 and over bytes[:, 1:].sum(). Two tokenizers see the
    same text only if `data.valid_tokens` is large enough for both (info["valid_bytes_unused"] == 0).
    """
    count = len(corpus.valid) // sequence_length
    if count < 1:
        raise ValueError(
            f"data.sequence_length = {sequence_length} is more than the {len(corpus.valid):,} held-out "
            "tokens: lower it, or raise data.valid_fraction or data.valid_tokens"
        )
    index = np.arange(count)[:, None] * sequence_length + np.arange(sequence_length + 1)  # (W, T + 1)
    tokens = np.concatenate([[corpus.tokenizer.eos_token_id], corpus.valid]).astype(np.int64)[index]
    text_bytes = np.concatenate([[0], corpus.valid_bytes]).astype(np.int64)[index]
    return torch.from_numpy(tokens), torch.from_numpy(text_bytes)
