"""Text -> documents -> tokens -> deterministic, resumable batches.

`prepare` turns a source into a `Corpus`: two streams of token ids on disk, one to train on, one held out.
`Batches` deals the training stream out as a pure function of (seed, step); `eval_windows` cuts the held-out
stream and says how many bytes of text every token stands for; `text_windows` does so for files of one's own.

sources.py     source -> documents: what `data.source` may be, how files are cut
tokenizers.py  text -> token ids, and the bytes of text each stands for
cache.py       documents -> token files: what is dropped, what is held out, where it is kept
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .cache import FORMAT, Say, TooFewDocuments, build_cache, read_cache, token_dtype
from .sources import Source, files_below, is_streamed, read_blocks, say_not_text, sought_in
from .tokenizers import ByteTokenizer, HFTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "Batches",
    "ByteTokenizer",
    "Corpus",
    "HFTokenizer",
    "Tokenizer",
    "TooFewDocuments",
    "eval_windows",
    "held_out_name",
    "is_streamed",
    "load_tokenizer",
    "prepare",
    "require_file",
    "require_texts",
    "text_windows",
]


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


def prepare(section: Any, train_tokens: int, cache: Path | None = None, progress: Say | None = None) -> Corpus:
    """The corpus that `section` (a recipe's data section) describes, from the cache or else built there.

    A local source is taken whole. A streamed one is read until it has given `train_tokens`, or `data.stream_tokens` if
    those are more (and the one after, which the last window looks ahead to), and `data.valid_tokens` held-out tokens,
    or has ended: the held-out text does not depend on the training budget. The cache is `cache`, else
    $TOKENFORMER_CACHE, else ~/.cache/tokenformer; its files are checked against their size and SHA-256 whenever they
    are opened, and built again if they differ. Building holds about 100 bytes of memory per document. Processes that
    build the same corpus at once all do the work, and one result is kept; what killed ones left in the cache is
    removed a day later. `progress(text)` hears about long work.
    Raises ValueError, in one line, for a source, tokenizer or cache that cannot be used.
    """
    if not 0 < section.valid_fraction < 1:
        raise ValueError(f"data.valid_fraction = {section.valid_fraction}: between 0 and 1 is allowed")
    if section.valid_tokens < 1:
        raise ValueError(f"data.valid_tokens = {section.valid_tokens}: 1 or more is allowed")
    if section.stream_tokens and not is_streamed(section.source):
        raise ValueError(
            f"data.stream_tokens = {section.stream_tokens} has no effect with data.source = {section.source!r}, which "
            "is read whole: leave it out"
        )
    say = progress or (lambda text: None)
    try:
        source, held_out = Source(section, max(train_tokens, section.stream_tokens)), held_out_source(section)
        identity = source.identity() + ([] if held_out is None else held_out.identity())
    except OSError as error:
        raise ValueError(f"data.source = {section.source!r} cannot be read: {error}") from error
    tokenizer = load_tokenizer(section.tokenizer)
    key = [FORMAT, identity, tokenizer.identity(), section.valid_fraction, section.valid_tokens]
    root = cache.expanduser() if cache else cache_root()
    folder = root / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:20]
    dtype = token_dtype(tokenizer.vocab_size)
    try:
        info = read_cache(folder, say) or build_cache(folder, source, held_out, tokenizer, section, say)
        train = np.memmap(folder / "train.bin", dtype, "r")
        valid = np.memmap(folder / "valid.bin", dtype, "r")
        valid_bytes = np.memmap(folder / "valid_bytes.bin", np.uint32, "r")
    except OSError as error:  # trouble with the source is a ValueError by now
        raise ValueError(
            f"cache folder {root} cannot be used ({error.strerror or error}): it must be writable and have "
            "room for the token files; TOKENFORMER_CACHE names another"
        ) from error
    return Corpus(train, valid, valid_bytes, tokenizer, info)


def cache_root() -> Path:
    return Path(os.environ.get("TOKENFORMER_CACHE") or "~/.cache/tokenformer").expanduser()


def require_file(key: str, text: str) -> None:
    """ValueError where the text that a key of a recipe names is no file."""
    if not Path(text).is_file():
        found = "is a folder" if Path(text).is_dir() else f"no such file{sought_in(text)}"
        raise ValueError(f"{key} = {text!r}: {found}; it must be one text file")


def require_texts(section: Any) -> None:
    """ValueError or OSError, at once, where data.source or data.valid_source is not to be had."""
    Source(section, 0)
    held_out_source(section)


def held_out_source(section: Any) -> Source | None:
    """Of data.valid_source: local text, cut into documents as data.source is."""
    name = section.valid_source
    if name is None:
        return None
    if is_streamed(name):
        raise ValueError(f"data.valid_source = {name!r}: must be a text file or folder, or embedded")
    try:
        return Source(dataclasses.replace(section, source=name, document_separator=""), 0)
    except ValueError as error:
        raise ValueError(str(error).replace("data.source", "data.valid_source", 1)) from None


def held_out_name(section: Any) -> str:
    """What `prepare` holds out, in words."""
    return f"held-out text {section.valid_source}" if section.valid_source else f"held-out share of {section.source}"


class Batches(torch.utils.data.Dataset[torch.Tensor]):
    """Batch `step` of the training stream, LongTensor (batch_size, sequence_length + 1), from (seed, step).

    The stream is cut into windows of `sequence_length` tokens and the one after; every epoch deals all of
    them out in an order of its own, going on in the batch in which the epoch before ends. `len` is the number
    of whole batches in one epoch, past the first `skip_tokens` that an ancestor saw; a step after them raises
    ValueError unless `repeat`; what was skipped counts as seen. Of these, `first` tokens lie before the part of
    the stream that is cut into windows: what an ancestor had of it when it was shorter. To resume, with
    any number of workers: DataLoader(batches, batch_size=None, sampler=range(step, steps), num_workers=n)
    """

    def __init__(
        self,
        tokens: np.ndarray,
        sequence_length: int,
        batch_size: int,
        seed: int,
        repeat: bool = False,
        skip_tokens: int = 0,
        first: int = 0,
    ) -> None:
        if not 0 <= seed < 2**32:
            raise ValueError(f"data.seed = {seed}: allowed is an integer from 0 to 4294967295")
        tokens = tokens[first:]
        if len(tokens) <= sequence_length:
            raise ValueError(
                f"data.sequence_length = {sequence_length} needs {sequence_length + 1:,} training tokens; "
                f"the corpus holds {len(tokens):,}" + (f" after the first {first:,}" if first else "")
            )
        self.first, self.tokens, self.sequence_length, self.batch_size = first, tokens, sequence_length, batch_size
        self.seed, self.repeat = seed, repeat
        self.windows = (len(tokens) - 1) // sequence_length
        self.skipped = -(-(skip_tokens - first) // sequence_length)
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return max(0, self.windows - self.skipped) // self.batch_size

    def __getitem__(self, step: int) -> torch.Tensor:
        if step < 0:
            raise IndexError(step)
        self.require(step + 1)
        places = [divmod(self.skipped + step * self.batch_size + row, self.windows) for row in range(self.batch_size)]
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
            skipped_tokens = self.first + self.skipped * self.sequence_length
            asked = skipped_tokens + steps * self.batch_size * self.sequence_length
            skipped = f" after {skipped_tokens:,} skipped" if skipped_tokens else ""
            held = self.first + len(self.tokens)
            raise ValueError(
                f"{steps:,} steps{skipped} ask for {asked:,} training tokens; the corpus holds {held:,} "
                f"({len(self):,} steps): take a shorter run (train.steps or train.flops) or a larger data.source, or "
                "let tokens be seen again with data.repeat = true"
            )

    def epochs(self, steps: int) -> float:
        before = self.first / self.sequence_length
        return (before + self.skipped + steps * self.batch_size) / (before + self.windows)

    def unique_tokens(self, steps: int) -> int:
        return self.first + min(self.skipped + steps * self.batch_size, self.windows) * self.sequence_length

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
        raise TooFewDocuments(
            f"data.sequence_length = {sequence_length} is more than the {len(corpus.valid):,} held-out "
            "tokens: lower it, hold out a larger text, or raise data.valid_tokens"
        )
    return cut_windows(corpus.valid, corpus.valid_bytes, corpus.tokenizer.eos_token_id, sequence_length)


def cut_windows(
    stream: np.ndarray, stream_bytes: np.ndarray, context: int, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows (W, length + 1) of a stream's ids and bytes, `context` before the first; a shorter rest is left out."""
    index = np.arange(len(stream) // length)[:, None] * length + np.arange(length + 1)
    tokens = np.concatenate([[context], stream]).astype(np.int64)[index]
    text_bytes = np.concatenate([[0], stream_bytes]).astype(np.int64)[index]
    return torch.from_numpy(tokens), torch.from_numpy(text_bytes)


def text_windows(
    paths: Sequence[str], tokenizer: Tokenizer, sequence_length: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Evaluation windows over all of some files, each a document: those of `eval_windows`, and one over the rest.

    A list of one or two parts, ids and bytes each: the windows of `sequence_length`, and the shorter window that
    what is left fills; together they hold every token once. A path is a UTF-8 text file (plain, .gz, .xz) or a
    folder, of which every such file is read whose name does not begin with a dot.
    Raises ValueError, naming the path, if one does not exist or is not text, or if there is no text in any.
    """
    ids: list[Any] = []
    counts: list[Any] = []
    for path in paths:
        if not path or not (Path(path).is_file() or Path(path).is_dir()):
            raise ValueError(f"--text {path or repr(path)}: no such file or folder")
        for file in files_below(Path(path), path):
            tokens, text_bytes = tokenizer.encode_with_bytes(read_text(file))
            ids += [tokens, [tokenizer.eos_token_id]]
            counts += [text_bytes, [0]]
    stream, stream_bytes = (np.concatenate([[], *parts]).astype(np.int64) for parts in (ids, counts))
    if not stream_bytes.sum():
        raise ValueError(f"--text {' '.join(paths)}: holds no text")
    whole = len(stream) // sequence_length * sequence_length
    parts = []
    if whole:
        parts.append(cut_windows(stream[:whole], stream_bytes[:whole], tokenizer.eos_token_id, sequence_length))
    if rest := len(stream) - whole:
        context = stream[whole - 1] if whole else tokenizer.eos_token_id
        parts.append(cut_windows(stream[whole:], stream_bytes[whole:], context, rest))
    return parts


def read_text(file: Path) -> str:
    """All of a file named by --text, without NULs, which the byte tokenizer takes for end marks."""
    try:
        return "".join(read_blocks(file, "--text")).replace("\0", "")
    except UnicodeDecodeError:
        raise ValueError(f"--text {file}: {say_not_text(file)}") from None
