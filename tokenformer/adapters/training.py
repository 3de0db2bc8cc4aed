"""A memory trained on a text for a checkpoint, whose base is frozen; and one that is saved, merged into its base."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from .. import checkpoint as files
from .. import runs
from ..data import Batches, Corpus, TooFewDocuments, eval_windows, is_streamed, load_tokenizer, prepare
from ..distributed import Ranks, choose_device, ranks_here
from ..evaluate import autocast, evaluate, next_token_loss
from ..flops import training_flops
from ..grow_checkpoint.plan import find_or_download
from ..grow_checkpoint.write import copy_others
from ..models.axes import size_of
from ..models.portable import keep_portable
from ..optim import AdamW, learning_rate, parameter_groups
from ..random_states import seed_all
from ..recipe import Recipe, override, parse_override, recipe_from_dict
from ..start import stream_of, streams_with
from .memory import Memory, add_parameter_tokens, load_parameter_tokens
from .merge import merge_parameter_tokens
from .places import rows_axis, rows_plan

TRAIN_KEYS = (
    *("steps", "learning_rate", "min_learning_rate_ratio", "schedule", "warmup_steps", "decay_fraction"),
    *("weight_decay", "beta1", "beta2", "epsilon", "clip_norm", "accumulation_steps", "dtype"),
    *("gradient_checkpointing", "log_every", "seed", "device", "threads"),
)
DATA_KEYS = (
    *("sequence_length", "batch_size", "valid_fraction", "valid_source", "valid_tokens", "document_separator"),
    *("skip_tokens", "repeat", "seed"),
)
TRAIN = {"steps": 200, "learning_rate": 1e-3, "warmup_steps": 10}
DATA = {"valid_fraction": 0.1, "repeat": True}  # of texts that may be small, and are seen as often as the steps ask for
SEQUENCE_LENGTH = 256
PARAGRAPH = "\n\n"


@files.quiet()
def adapt(
    base: str | Path,
    out: str | Path,
    text: str,
    overrides: Iterable[str] = (),
    merge: str | Path | None = None,
    say: runs.Say = print,
    **memory: Any,
) -> dict[str, dict[str, float]]:
    """Train a memory on `text` for the checkpoint `base`, write it to the new folder `out`, and return the held-out
    loss before and after, as `evaluate` gives it.

    text: a text file or folder, cut into what is trained on and what is held out as data.source is. overrides: keys of
    a recipe's [data] and [train], "train.steps=500". memory: the keywords of `add_parameter_tokens`. merge: a folder
    for the ordinary model that the memory makes of its base. Raises ValueError in one line, and leaves nothing half
    written.
    """
    if merge is not None and memory.get("kind", "rows") != "rows":
        raise ValueError(f"--merge {merge}: a memory of kind {memory['kind']!r} cannot be merged; rows can")
    if ranks_here().world > 1:
        raise ValueError("WORLD_SIZE: adapt trains in one process; start it without torchrun")
    folder = find_or_download(base)
    places = ({} if merge is None else {"--merge": merge}) | {"--out": out}
    require_places({option: Path(place) for option, place in places.items()}, [folder])
    files.require_nothing_carried(folder)
    recipe = settings(folder, text, overrides)
    device = choose_device(recipe.train.device, Ranks())
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    model, _ = files.load_checkpoint(folder)
    tell = say or (lambda line: None)
    corpus, batches, windows = read_text(recipe, model, tell)
    seed_all(recipe.train.seed)
    model.to(device)
    added = add_parameter_tokens(model, **memory)
    files.require_room(Path(out), files.bytes_of(added.parameters()))
    if merge is not None:
        files.require_room(Path(merge), files.bytes_of(model.parameters()))
    before = evaluate(model, windows, device=device, dtype=recipe.train.dtype)
    count = sum(p.numel() for p in added.parameters())
    tell(f"{count:,} parameters to train: {added.kind}, {added.tokens} tokens in each of {len(added.layers)} places")
    tell(f"text: {len(batches.tokens):,} tokens to train on, {windows[0][:, 1:].numel():,} held out")
    tell(f"before: {before['bits_per_byte']:.4f} bits per byte, loss {before['loss']:.4f}")
    seconds = train_memory(model, added, recipe, batches, tell)
    after = evaluate(model, windows, device=device, dtype=recipe.train.dtype)
    tell(f"after: {after['bits_per_byte']:.4f} bits per byte, loss {after['loss']:.4f}")
    if added.kind == "rows":
        added.cost = cost(folder, rows_plan(model.config, added.tokens).config, recipe, corpus, seconds)
    added.save(out)
    tell(f"memory: {out}")
    if merge is not None:
        write_merged(added, Path(out), folder, Path(merge))
        tell(f"merged: {merge}")
    return {"before": before, "after": after}


@files.quiet()
def merge_memory(base: str | Path, memory: str | Path, out: str | Path, say: runs.Say = print) -> Path:
    """Write the ordinary model that the saved memory of rows in the folder `memory` makes of the checkpoint `base`,
    which has to be the one that it was made for, to the new folder `out`. Raises ValueError in one line, and leaves
    nothing half written."""
    folder, memory, out = find_or_download(base), Path(memory), Path(out)
    require_places({"--merge": out}, [folder, memory])
    files.require_nothing_carried(folder)
    model, _ = files.load_checkpoint(folder)
    added = load_parameter_tokens(model, memory)
    if added.kind != "rows":
        raise ValueError(f"--memory {memory}: a memory of kind {added.kind!r} cannot be merged; rows can")
    files.require_room(out, files.bytes_of(model.parameters()))
    tell = say or (lambda line: None)
    if added.cost is None:
        tell(f"{memory} does not say what its training cost; the lineage has the cost of {folder} alone")
    write_merged(added, memory, folder, out)
    tell(f"merged: {out}")
    return out


def write_merged(memory: Memory, place: Path, base: Path, out: Path) -> None:
    """The model that a memory of rows, the only one on its model, makes of the checkpoint `base`. place: where the
    memory lies, for the lineage."""
    model = memory.model
    merged = merge_parameter_tokens(model, [memory.name])
    _, field = rows_axis(model.config)
    event = {"operator": "parameter_tokens", "promise": "approximate", "tokens": memory.tokens, "memory": str(place)}
    event |= {side: {field: size_of(each.config, field)} for side, each in (("from", model), ("to", merged))}
    event["ancestor"] = memory.cost or files.ancestry(base)
    with files.written_whole(out) as temporary:
        merged.save_pretrained(temporary)
        copy_others(base, temporary)
        keep_portable(merged.config, temporary)
        runs.write_json(temporary / files.LINEAGE, [*files.read_lineage(base), event])


def require_places(places: Mapping[str, Path], sources: list[Path]) -> None:
    """ValueError, before the work and not after it, if one of the folders to make, by their options, is there, lies
    inside one of the sources or another one, or cannot be made."""
    for option, place in places.items():
        for source in sources:
            files.require_free(place, source)
        for other in places.keys() - {option}:
            if place.resolve().is_relative_to(places[other].resolve()):
                raise ValueError(f"{option} {place}: is the place of {other}, or lies inside it; choose another")
        parent = next(each for each in place.absolute().parents if each.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise ValueError(f"{place}: {parent} cannot be written")


def settings(folder: Path, text: str, overrides: Iterable[str]) -> Recipe:
    """The [data] and [train] of the training; ValueError on any key that has no effect here."""
    longest = getattr(files.load_config(folder), "max_position_embeddings", None) or SEQUENCE_LENGTH
    data = {"source": text, "tokenizer": str(folder), "sequence_length": min(SEQUENCE_LENGTH, longest)}
    table: dict[str, Any] = {"name": "adapt", "data": DATA | data, "train": dict(TRAIN)}
    allowed = [f"data.{key}" for key in DATA_KEYS] + [f"train.{key}" for key in TRAIN_KEYS]
    for dotted, value in map(parse_override, overrides):
        if dotted not in allowed:
            raise ValueError(f"{dotted}: has no effect on adapt; allowed: {', '.join(allowed)}")
        override(table, dotted, value)
    recipe = recipe_from_dict(table, "the command line")
    if recipe.data.sequence_length > longest:
        raise ValueError(
            f"data.sequence_length = {recipe.data.sequence_length}: is more than the model's "
            f"max_position_embeddings = {longest}"
        )
    return recipe


def read_text(
    recipe: Recipe, model: Any, tell: Callable[[str], None] = print
) -> tuple[Corpus, Batches, tuple[Tensor, Tensor]]:
    """The text, its batches, its held-out windows; ValueError if there is too little, or the model has no such ids.

    Where so few documents leave less than a window to hold out, or nothing to train on, each paragraph is one:
    recipe.data then says so.
    """
    data, steps = recipe.data, recipe.train.steps
    assert steps is not None
    if data.source != "embedded" and not is_streamed(data.source) and not Path(data.source).exists():
        raise ValueError(f"--text {data.source}: no such file or folder")
    vocabulary = load_tokenizer(data.tokenizer).vocab_size
    if vocabulary > model.config.vocab_size:
        raise ValueError(
            f"{data.tokenizer}: its tokenizer has {vocabulary:,} tokens, and the model {model.config.vocab_size:,}"
        )
    tokens = data.skip_tokens + steps * data.batch_size * data.sequence_length

    def cut() -> tuple[Corpus, tuple[Tensor, Tensor]]:
        corpus = prepare(data, tokens)
        return corpus, eval_windows(corpus, data.sequence_length)

    try:
        corpus, windows = cut()
    except TooFewDocuments as error:
        if data.document_separator or data.valid_source or not Path(data.source).expanduser().exists():
            raise
        data.document_separator = PARAGRAPH
        try:
            corpus, windows = cut()
        except ValueError:  # there are no paragraphs, or too few of them as well
            raise error from None
        tell("text: too few documents to hold enough of them out, so each paragraph is one (data.document_separator)")
    batches = Batches(
        corpus.train, data.sequence_length, data.batch_size, data.seed, data.repeat, skip_tokens=data.skip_tokens
    )
    batches.require(steps)
    return corpus, batches, windows


def train_memory(model: Any, memory: Memory, recipe: Recipe, batches: Batches, tell: Any) -> float:
    """The optimizer's steps, on the memory alone; returns their seconds. ValueError if the loss leaves the numbers."""
    train, began = recipe.train, time.perf_counter()
    assert train.steps is not None
    if train.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    betas = (train.beta1, train.beta2)
    groups = parameter_groups(nn.ParameterList(memory.parameters()), train.weight_decay)
    optimizer = AdamW(groups, lr=train.learning_rate, betas=betas, eps=train.epsilon)
    model.train()
    for step in range(train.steps):
        rate = learning_rate(train, step / train.steps, step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = 0.0
        for part in batches[step].to(model.device).chunk(train.accumulation_steps):
            with autocast(model.device, train.dtype):
                logits = model(input_ids=part[:, :-1], use_cache=False).logits
                share = next_token_loss(logits, part) / train.accumulation_steps
            share.backward()
            loss += share.item()
        norm = nn.utils.clip_grad_norm_(memory.parameters(), train.clip_norm or math.inf).item()
        if not math.isfinite(loss + norm):
            lost = f"the loss is no longer finite at step {step + 1}; take less"
            raise ValueError(f"train.learning_rate = {train.learning_rate}: {lost}")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % train.log_every == 0 or step + 1 == train.steps:
            speed = (step + 1) * batches.batch_size * batches.sequence_length / (time.perf_counter() - began)
            tell(f"step {step + 1}/{train.steps} · loss {loss:.4f} · {speed:,.0f} tokens/s")
    model.eval()
    return time.perf_counter() - began


def cost(folder: Path, merged: PreTrainedConfig, recipe: Recipe, corpus: Corpus, seconds: float) -> dict[str, Any]:
    """What led to a memory of rows, its base's cost included. FLOPs as if all of the merged model had been trained: no
    less than they were."""
    spent, data, steps = files.ancestry(folder), recipe.data, recipe.train.steps
    assert steps is not None
    tokens = steps * data.batch_size * data.sequence_length
    return {
        "flops": spent["flops"] + training_flops(merged, data.sequence_length, steps * data.batch_size),
        "tokens": spent["tokens"] + tokens,
        "seconds": round(spent["seconds"] + seconds, 3),
        "streams": streams_with(spent["streams"], stream_of(data, corpus), data.skip_tokens + tokens),
    }
