"""Source -> documents: what `data.source` may be, and how the text found there is cut into documents.

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
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import lzma
import os
import platform
import re
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError)
BLOCK = 2**20  # characters read at a time; a folder's file up to this size is one document
LONGEST_CHUNK = 2**14
MARKS = re.compile(r"[\f\0]|^<\|endoftext\|>[ \t]*\r?(?:\n|\Z)", re.M)
CHUNK = re.compile(r".{4096,16384}?\n[ \t\r]*\n|.{4096,16383}\n|.{1,16384}", re.S)
NOT_EMBEDDED = frozenset(
    "site-packages dist-packages test tests idlelib tkinter lib2to3 distutils ensurepip turtledemo".split()
)


def is_streamed(name: str) -> bool:
    """Whether the data.source of this name is read as it comes, and no further than it is needed."""
    return name.startswith("hf:")


class Source:
    """Where documents come from: `documents()` yields their texts; `skipped_files` is complete after that."""

    def __init__(self, section: Any, train_tokens: int) -> None:
        self.name, self.separator = str(section.source), section.document_separator
        self.split, self.text_field = section.split, section.text_field
        self.embedded, self.streamed = self.name == "embedded", is_streamed(self.name)
        self.needed_tokens = train_tokens + 1 if self.streamed else None
        self.description = "text"
        self.skipped_files = 0
        if self.separator and (self.streamed or self.embedded):
            raise ValueError(
                f"data.document_separator = {self.separator!r} has no effect with data.source = "
                f"{self.name!r}, which has documents of its own: leave it out"
            )
        if self.name == "hf:":
            raise ValueError(f"data.source = {self.name!r}: names no dataset; allowed: hf:NAME or hf:FORMAT:PATH")
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
                raise ValueError(f"data.source = {self.name!r} {say_not_text(path)}")
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


def sought_in(name: str) -> str:
    """Where a path that is not absolute was sought, for an error that says that it is not there."""
    return "" if Path(name).expanduser().is_absolute() else f" in {Path.cwd()}"


def files_below(root: Path, name: str) -> list[Path]:
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise ValueError(
            f'data.source = {name!r} does not exist{sought_in(name)}; allowed: "embedded", a text file (plain, .gz, '
            '.xz), a folder of them, or "hf:NAME" for a dataset'
        )

    def refuse(error: OSError) -> None:
        raise error

    found = []
    for folder, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [each for each in folders if not each.startswith(".")]
        found += [Path(folder, each) for each in names if not each.startswith(".")]
    return sorted((path for path in found if path.is_file()), key=Path.as_posix)


def read_blocks(path: Path, key: str = "data.source") -> Iterator[str]:
    """A file's text in parts of about BLOCK characters that end where a line ends, unless it is long.

    `key` is what named the file, for the message when it cannot be read.
    """
    try:
        with open_unpacked(path, "rt", encoding="utf-8", newline="") as file:
            while block := file.read(BLOCK):
                yield block + file.readline(LONGEST_CHUNK)
    except UNREADABLE as error:
        raise ValueError(f"{key}: {path} cannot be read: {first_line(error)}") from error


def open_unpacked(path: Path, mode: str, **options: Any) -> Any:
    opens: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix.lower(), open)
    return opens(path, mode, **options)


def say_not_text(path: Path) -> str:
    """What is wrong with a file of which UTF-8 could not be decoded, and where that is in what it unpacks to."""
    decoder, read, block, where = codecs.getincrementaldecoder("utf-8")(), 0, b" ", ""
    with contextlib.suppress(*UNREADABLE), open_unpacked(path, "rb") as file:  # one that is damaged further on as well
        while block and not where:
            block = file.read(BLOCK)
            begins = read - len(decoder.getstate()[0])  # with what the last block left undecided
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                where = f" ({error.reason} at byte {begins + error.start:,})"
            read += len(block)
    return f"is not UTF-8 text{where}; allowed: plain, .gz or .xz"


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
