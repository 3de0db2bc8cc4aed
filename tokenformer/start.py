"""Where a run starts from: fresh, or a checkpoint with all that this has cost and seen.

`model.checkpoint` may be a run folder, whose newest checkpoint changes. So it is looked up once; RUN/start.json keeps
the answer, and a resumed run reads nothing else of its ancestor.
"""

import dataclasses
import hashlib
import math
from pathlib import Path
from typing import Any

from . import runs
from .checkpoint import ancestry, find_checkpoint, load_config, read_carried, read_lineage
from .data import ByteTokenizer, Corpus, Tokenizer, is_streamed, load_tokenizer
from .data.tokenizers import byte_symbols
from .recipe import DataSection, Recipe

Stream = dict[str, Any]  # what text was trained on, in what order, and how many `tokens` of it


@dataclasses.dataclass(frozen=True)
class Start:
    """The checkpoint that a run goes on from, and what led to it: training FLOPs, tokens, seconds, streams of text."""

    checkpoint: str | None = None
    config: dict[str, Any] | None = None
    carried: dict[str, Any] | None = None  # the growth that it is amid (growth/carried.py)
    trained_parameters: list[str] | None = None  # where an earlier growth has frozen the others
    flops: int = 0
    tokens: int = 0
    seconds: float = 0.0
    streams: list[Stream] = dataclasses.field(default_factory=list)


def start_of(recipe: Recipe, folder: Path | None = None) -> Start:
    """What the folder of a run that was begun says; else what model.checkpoint is now. ValueError if it is none."""
    place = recipe.model.checkpoint
    if not place:
        return Start()
    if folder is not None and is_begun(folder):
        kinds = {"checkpoint": str, "config": dict}
        stored = runs.read_object(folder / runs.START, kinds | runs.COST)
        return Start(**{field.name: stored[field.name] for field in dataclasses.fields(Start) if field.name in stored})
    found = find_checkpoint(place).resolve()
    load_config(found)  # says what is wrong with it
    trained = next((event.get("trained_parameters") for event in read_lineage(found)[-1:]), None)
    return Start(str(found), runs.read_json(found / "config.json"), read_carried(found), trained, **ancestry(found))


def is_begun(folder: Path) -> bool:
    return (folder / runs.RECIPE).exists()


def start_config(start: Start) -> Any:
    """The transformers configuration of the checkpoint, which itself may be gone by now."""
    from transformers import CONFIG_MAPPING

    assert start.config is not None
    return CONFIG_MAPPING[start.config["model_type"]].from_dict(with_floats(start.config))


def with_floats(value: Any) -> Any:
    """What transformers writes as {"__float__": "Infinity"}, since JSON has no such number, as that number again."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: with_floats(each) for key, each in value.items()}
    return [with_floats(each) for each in value] if isinstance(value, list) else value


# --- the tokenizer ---


def require_same_tokenizer(start: Start, tokenizer: Tokenizer, name: str) -> None:
    """ValueError when the checkpoint has a tokenizer that gives other ids than data.tokenizer (`name`)."""
    if not start.checkpoint or not (Path(start.checkpoint) / "tokenizer.json").exists():
        return
    theirs, mine = vocabulary(load_tokenizer(start.checkpoint)), vocabulary(tokenizer)
    if theirs != mine:
        raise ValueError(
            f"data.tokenizer = {name!r} is not that of model.checkpoint ({len(mine[0]):,} and {len(theirs[0]):,} "
            f"tokens): its ids would mean something else; take data.tokenizer = {start.checkpoint!r}"
        )


def vocabulary(tokenizer: Tokenizer) -> tuple[dict[str, int], int]:
    """Token -> id, and the id of the end mark."""
    if isinstance(tokenizer, ByteTokenizer):
        return {symbol: byte for byte, symbol in enumerate(byte_symbols())}, tokenizer.eos_token_id
    return tokenizer.tokenizer.get_vocab(), tokenizer.eos_token_id


# --- text that was seen ---


def begins_with(corpus: Corpus, stream: Stream) -> bool:
    """Whether all training tokens of an ancestor are those that the corpus begins with: its stream, read further."""
    length = stream.get("length", len(corpus.train))
    return length < len(corpus.train) and hashlib.sha256(corpus.train[:length].data).hexdigest() == stream["sha256"]


def first_token(data: DataSection, ancestors: list[Stream], corpus: Corpus) -> int:
    """Where the windows of a run begin: past the longest shorter stream of an ancestor that data.skip_tokens covers.

    A longer stream is dealt in another order, so of a shorter one all counts as seen.
    """
    covered = [stream for stream in ancestors if stream.get("length", math.inf) <= data.skip_tokens]
    return max((stream["length"] for stream in covered if begins_with(corpus, stream)), default=0)


def stream_of(data: DataSection, corpus: Corpus, first: int = 0) -> Stream:
    """What text a run is trained on and in what order, `first` from `first_token`.

    With equal sha256, seed, sequence_length and first the windows are the same.
    """
    return {
        "source": absolute(data.source),
        "split": data.split,
        "text_field": data.text_field,
        "document_separator": data.document_separator,
        "tokenizer": corpus.tokenizer.identity(),
        "valid_fraction": 0.0 if data.valid_source else data.valid_fraction,  # of this source
        "sha256": corpus.info["sha256"],  # of the training tokens
        "seed": data.seed,
        "sequence_length": data.sequence_length,
        "length": len(corpus.train),
        "first": first,
        # What was held out decides nothing of what was seen.
        "valid_source": data.valid_source and absolute(data.valid_source),
        "valid_tokens": data.valid_tokens,
    }


def absolute(source: str) -> str:
    """data.source or data.valid_source, so that it can be found from anywhere."""
    local = source != "embedded" and not is_streamed(source)
    return str(Path(source).expanduser().resolve()) if local else source


def same_windows(a: Stream, b: Stream) -> bool:
    return all(a[key] == b[key] for key in ("sha256", "seed", "sequence_length"))


def streams_with(ancestors: list[Stream], mine: Stream, tokens: int) -> list[Stream]:
    """The ancestors' streams and the run's own, `tokens` far, which comes last; the same windows are listed once."""
    before = [stream["tokens"] for stream in ancestors if same_windows(stream, mine)]
    others = [stream for stream in ancestors if not same_windows(stream, mine)]
    return [*others, {**mine, "tokens": max([tokens, *before])}]


def reads_again(data: DataSection, ancestors: list[Stream], mine: Stream, corpus: Corpus) -> bool:
    """Whether the run reads text that an ancestor has read, or may have, which only data.repeat allows."""
    try:
        require_unseen(dataclasses.replace(data, repeat=False), ancestors, mine, corpus)
    except ValueError:
        return True
    return False


def require_unseen(data: DataSection, ancestors: list[Stream], mine: Stream, corpus: Corpus) -> None:
    """ValueError when the run would train on text that an ancestor saw, or be measured on it.

    data.repeat allows the first. The second it does not: held-out text is chosen by data.valid_fraction, and a larger
    share holds out what was trained on before.
    """
    for stream in ancestors:
        if same_windows(stream, mine):
            passed_over = data.skip_tokens >= stream["tokens"] and mine["first"] == stream.get("first", 0)
            if not passed_over and not data.repeat:
                raise ValueError(
                    f"data.skip_tokens = {data.skip_tokens}: model.checkpoint has seen the first "
                    f"{stream['tokens']:,} tokens; set it to {stream['tokens']}, or data.repeat = true"
                )
            continue
        longer = begins_with(corpus, stream)
        if longer or mine["source"] == stream["source"] or mine["sha256"] == stream["sha256"]:
            seen = f"model.checkpoint: has seen {stream['tokens']:,} tokens of {data.source!r} with "
            if mine["valid_fraction"] > stream["valid_fraction"]:
                raise ValueError(
                    f"{seen}data.valid_fraction = {stream['valid_fraction']}; {mine['valid_fraction']} would hold out "
                    "text that it was trained on"
                )
            if data.repeat or longer and stream["length"] <= mine["first"]:
                continue
            unused = ("source",) if is_streamed(data.source) else ("source", "split", "text_field")
            key = next(key for key in mine if key not in unused and mine[key] != stream.get(key, mine[key]))
            what = f"data.{key} = {stream[key]!r}, and here it is {mine[key]!r}"
            way = "what it saw cannot be passed over; data.repeat = true allows that"
            if key == "sha256":
                what = "other tokens (data.sha256): the text has changed, or is a streamed one of another length"
                if data.skip_tokens < stream.get("length", 0):
                    way = f"data.skip_tokens = {stream['length']} passes over it if it has only grown longer"
            raise ValueError(f"{seen}{what}; {way}")
