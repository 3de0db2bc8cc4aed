"""Growth of a checkpoint on the disk: planned, grown, measured, written anew. The old one is not touched.

Weights pass through one tensor at a time (shards.py): the memory that growth needs does not depend on the number of
layers. Where that cannot be, the whole model grows in memory, and the reason is said.
"""

from __future__ import annotations

import copy
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from . import checkpoint as files
from . import runs
from .event import change_text
from .flops import forward_flops
from .growth import duplicated_share, freeze_as_grown, grow
from .growth.engine import event_of, grown_reader, is_trained, new_entries
from .growth.operators import exact_for, steps_of, takers
from .growth.tensors import TensorMaps
from .growth.verify import live_shares
from .models.axes import parameter_dims
from .models.tables import TABLES
from .optim import AdamW, parameter_groups
from .shards import MAX_SHARD_BYTES, Size, Stored, read_tensor, stored_tensors, write_shards

PROBE = (2, 64)  # sequences and tokens of the batch that a growth is measured on
CONTEXT = 1024  # positions over which the FLOPs of a token are counted
DEFAULT_OPERATORS = "zero_keys+zero"  # each for the axes that it has
# Up to so many bytes of weights a growth is measured in full; up to so many, at least its logits.
FULL_BYTES, LOGITS_BYTES = 8 * 10**9, 64 * 10**9
MEASURES = ("auto", "full", "logits", "none")
SECONDS_OF_SILENCE = 5.0
# Of a checkpoint's files these are written anew or belong to weights that are; all others are copied.
NOT_COPIED = (
    *("config.json", files.LINEAGE, files.TRAINER, ".*", "*.safetensors", "*.index.json"),
    *("*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx", "*.gguf"),
)
HUB_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
HUB_WEIGHTS = ("model*.safetensors",)


@dataclass(frozen=True)
class Prepared:
    """A growth worked out and not yet done. old, new: models without memory; sizes: what the new files will hold."""

    folder: Path
    operator: str
    maps: list[TensorMaps]
    old: PreTrainedModel
    new: PreTrainedModel
    event: dict[str, Any]
    lineage: list[dict[str, Any]]
    seed: int
    promises: list[str]
    stored: dict[str, Stored] = field(repr=False)
    sizes: dict[str, Size] = field(repr=False)
    in_memory: str = ""  # why the tensors cannot pass one by one

    @property
    def bytes(self) -> int:
        return sum(size.bytes for size in self.sizes.values())


@files.quiet()
def grow_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    operator: str | None,
    to: dict[str, int],
    moments: str = "keep",
    seed: int = 0,
    say: Callable[[str], None] = print,
    options: dict[str, Any] | None = None,
    measure: str = "auto",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Grow the model in `checkpoint` (a folder, a run's newest, or a name on the hub) into the new folder `out`.

    Each weight keeps the dtype that it is stored in. Moments, if the checkpoint has them, grow with the weights; the
    lineage gets one entry. What the growth did is measured on random tokens, said, and written down: with `measure`
    "full" logits, gradients and copies; "logits" those alone; "none" nothing; "auto" what the size allows.
    Raises ValueError as `load_checkpoint`, `grow` and `save_checkpoint` do; nothing half written is left.
    """
    out = Path(out)
    if measure not in MEASURES:
        raise ValueError(f"measure: {measure!r} is not known; allowed: {', '.join(MEASURES)}")
    prepared = prepare(checkpoint, operator, to, moments, seed, options)
    require_place(out, prepared)
    for line in plan_lines(prepared):
        say(line)
    remove_left_over(out)
    with files.written_whole(out) as temporary:
        rounding = write_in_memory(prepared, temporary, moments, max_shard_bytes)
        if not prepared.in_memory:
            rounding = write_streamed(prepared, temporary, max_shard_bytes, say)
        copy_others(prepared.folder, temporary)
        event = {**prepared.event, "ancestor": files.ancestry(prepared.folder), **rounding}
        event |= measured(prepared, temporary, measure, say)
        runs.write_json(temporary / files.LINEAGE, [*prepared.lineage, event])
    for line in measured_lines(event):
        say(line)
    say(f"written: {out}, {gigabytes(prepared.bytes)} of weights")
    return out


# --- planning ---


@files.quiet()
def prepare(
    checkpoint: str | Path,
    operator: str | None,
    to: dict[str, int],
    moments: str = "keep",
    seed: int = 0,
    options: dict[str, Any] | None = None,
) -> Prepared:
    """Everything about a growth but the growth itself; reads no weights. ValueError if it cannot be done."""
    folder = find_or_download(checkpoint)
    require_supported(folder)
    config, lineage = files.load_config(folder), files.read_lineage(folder)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{folder / 'config.json'}: the weights are quantised; growth takes those that are not")
    stored = stored_tensors(files.weight_files(folder))
    operator = operator or takers(config, DEFAULT_OPERATORS, to)
    steps = steps_of(config, operator, to, seed, options)
    if any(plan.learning is not None for _, _, plan in steps):
        raise ValueError(
            f"operator: {operator} learns its maps on text, and none is given: it grows a model in a run, by a "
            "[[growth]], or by tokenformer.grow(..., batches=...)"
        )
    maps = [TensorMaps(before, plan) for _, before, plan in steps]
    old, new = without_memory(config), without_memory(steps[-1][2].config)
    event = event_of(old, new, operator, to, steps, options or {})
    event["seed"] = seed
    drops = moments == "drop" or any(plan.drops_moments for _, _, plan in steps)
    has_moments = (folder / files.OPTIMIZER).exists()
    event["moments"] = "none stored" if not has_moments else "dropped" if drops else "kept"
    freeze_as_grown(old, lineage)
    trained = trained_names(maps, old, new)
    if len(trained) < len(list(new.named_parameters())):
        event["trained_parameters"] = trained
    return Prepared(
        folder=folder,
        operator=operator,
        maps=maps,
        old=old,
        new=new,
        event=event,
        lineage=lineage,
        seed=seed,
        promises=[each.promise for each, _, _ in steps],
        stored=stored,
        sizes=new_sizes(maps, new, stored),
        in_memory="its optimizer state grows too" if has_moments else why_in_memory(old, stored),
    )


def find_or_download(checkpoint: str | Path) -> Path:
    """The folder that is meant: one on the disk, or "org/name" on the Hugging Face hub, of which a copy is kept."""
    name, place = str(checkpoint), Path(checkpoint)
    if place.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or place.parent.exists():
        return files.find_checkpoint(place)
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=list(HUB_FILES)))
        require_supported(folder)  # before what is large comes
        return Path(snapshot_download(name, allow_patterns=[*HUB_FILES, *HUB_WEIGHTS]))
    except ValueError:
        raise
    except Exception as error:  # no network, no such model, no right to it: of many classes
        reason = str(error).strip().split("\n")[0][:150]
        raise ValueError(f"{name}: no such folder here, and not to be had from the hub ({reason})") from error


def require_supported(folder: Path) -> None:
    kind = runs.read_object(folder / "config.json", {}).get("model_type")
    if kind is not None and kind not in TABLES:
        raise ValueError(f"{folder / 'config.json'}: model_type {kind!r} cannot grow; known: {', '.join(TABLES)}")


def without_memory(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config))


def trained_names(maps: list[TensorMaps], old: PreTrainedModel, new: PreTrainedModel) -> list[str]:
    flags = {name: p.requires_grad for name, p in old.named_parameters()}
    trained = flags.__getitem__
    for each in maps:
        trained = _after(each, trained)
    return [name for name, _ in new.named_parameters() if trained(name)]


def _after(maps: TensorMaps, before: Callable[[str], bool]) -> Callable[[str], bool]:
    return lambda name: is_trained(name, maps, before)


def new_sizes(maps: list[TensorMaps], new: PreTrainedModel, stored: Mapping[str, Stored]) -> dict[str, Size]:
    """Every tensor of the new files; its dtype is its source's, or, in a new layer, that of the same in another."""
    usual = max((each.dtype for each in stored.values()), key=[each.dtype for each in stored.values()].count)
    sizes = {}
    for name, p in new.named_parameters():
        source: str | None = name
        for each in reversed(maps):
            source = source and (each.source_of(source)[0] or each.with_layer(source, 0))
        like = stored.get(source or "")
        sizes[name] = Size(tuple(p.shape), like.dtype if like else usual)
    return sizes


def why_in_memory(old: PreTrainedModel, stored: Mapping[str, Stored]) -> str:
    """Why the tensors of a checkpoint cannot be grown one by one; empty if they can. ValueError on a wrong shape."""
    if hasattr(old, "after_step"):
        return "its matrices are brought back to unit length as wholes"
    wanted = dict(old.named_parameters())
    aliases = set(old.state_dict()) - set(wanted)  # a tied head
    strange = sorted(set(stored) ^ set(wanted) - (aliases & set(stored)))
    strange = [name for name in strange if not (name in aliases and _same(name, old, stored))]
    if strange:
        return f"its files name tensors otherwise than the model does ({strange[0]})"
    for name, p in wanted.items():
        parameter_dims(old.config, name)
        if stored[name].shape != tuple(p.shape):
            shapes = f"{name} has shape {list(stored[name].shape)}, and config.json asks for {list(p.shape)}"
            raise ValueError(f"{stored[name].file}: {shapes}")
    return ""


def _same(alias: str, old: PreTrainedModel, stored: Mapping[str, Stored]) -> bool:
    """Whether the files hold the tied tensor twice, alike; ValueError if they hold two."""
    source = old.all_tied_weights_keys.get(alias)
    if source not in stored:
        return False
    if not torch.equal(read_tensor(alias, stored[alias]), read_tensor(source, stored[source])):
        raise ValueError(f"{stored[alias].file}: {alias} is not {source}, and config.json says tie_word_embeddings")
    return True


def require_place(out: Path, prepared: Prepared) -> None:
    if out.exists() or out.is_symlink():
        raise ValueError(f"{out} already exists; choose another place for the checkpoint")
    if out.resolve().is_relative_to(prepared.folder.resolve()):
        raise ValueError(f"{out} lies inside {prepared.folder}, which is not touched; choose a place outside")
    if out.resolve().parent.name == runs.CHECKPOINTS and (out.resolve().parent.parent / runs.RECIPE).exists():
        raise ValueError(f"{out} would be taken for a checkpoint of the run around it; choose a place outside")
    free = shutil.disk_usage(next(place for place in out.resolve().parents if place.exists())).free
    if prepared.bytes > free:
        needs = f"{gigabytes(prepared.bytes)} are to be written, {gigabytes(free)} are free"
        raise ValueError(f"{out}: the checkpoint cannot be written (no space left on the disk: {needs})")


def remove_left_over(out: Path) -> None:
    """What a growth to the same place left that was killed outright, if no such process is there any more."""
    for path in out.parent.glob(f".{out.name}.tmp-*"):
        number = path.name.rpartition("-")[2]
        if number.isdecimal() and not _alive(int(number)):
            shutil.rmtree(path, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


# --- writing ---


def write_streamed(
    prepared: Prepared, folder: Path, max_shard_bytes: int, say: Callable[[str], None]
) -> dict[str, float]:
    """Weights through the plans one by one, and config.json; returns the rounding of the stored dtype, if it is half.

    That is the largest relative error among old entries: factors are applied in float32, and the product is rounded.
    """

    def stored(name: str) -> Tensor:
        return read_tensor(name, prepared.stored[name])

    read: Callable[[str], Tensor] = stored
    for maps in prepared.maps:
        read = grown_reader(read, maps, prepared.seed)
    fresh = NewEntries(prepared, copies=False)
    rounding = 0.0

    def tensors() -> Iterator[tuple[str, Tensor]]:
        nonlocal rounding
        done, told = 0, time.monotonic()
        for i, (name, size) in enumerate(prepared.sizes.items()):
            tensor = read(name)
            rounding = max(rounding, largest_rounding(tensor, size.dtype, fresh.get(name)))
            yield name, tensor
            done += size.bytes
            if time.monotonic() - told > SECONDS_OF_SILENCE:
                told = time.monotonic()
                say(f"{i + 1} of {len(prepared.sizes)} tensors, {gigabytes(done)} of {gigabytes(prepared.bytes)}")

    with torch.no_grad():
        write_shards(folder, prepared.sizes, tensors(), max_shard_bytes)
    config = prepared.new.config
    config.architectures = config.architectures or [type(prepared.new).__name__]
    config.save_pretrained(folder)
    half = {size.dtype for size in prepared.sizes.values()} & {torch.bfloat16, torch.float16}
    return {"largest_rounding": rounding} if half else {}


def largest_rounding(tensor: Tensor, dtype: torch.dtype, new: Tensor | None) -> float:
    """Largest |rounded - exact| / |exact| over the entries of `tensor` that are not `new`; some rows at a time."""
    if tensor.dtype == dtype or tensor.numel() == 0:
        return 0.0
    rows = max(1, 2**24 * len(tensor) // tensor.numel())
    masks = [None] * len(tensor) if new is None else new.expand_as(tensor).split(rows)
    largest = 0.0
    for part, mask in zip(tensor.split(rows), masks, strict=False):
        error = part.to(dtype).to(part).sub_(part).abs_()
        if mask is not None:
            error.masked_fill_(mask, 0)
        if bool(error.any()):
            largest = max(largest, error.div_(part.abs().clamp_(min=torch.finfo(part.dtype).tiny)).max().item())
    return largest


def write_in_memory(prepared: Prepared, folder: Path, moments: str, max_shard_bytes: int) -> dict[str, float]:
    """The whole model, and its optimizer's state if there is one, grown as `growth.grow` does."""
    if not prepared.in_memory:
        return {}
    model, _ = files.load_checkpoint(prepared.folder)
    freeze_as_grown(model, prepared.lineage)
    optimizer = None
    if (prepared.folder / files.OPTIMIZER).exists():
        optimizer = AdamW(parameter_groups(model, weight_decay=0.1))
        files.load_moments(prepared.folder, model, optimizer)
    event = prepared.event
    growth = grow(model, prepared.operator, event["to"], optimizer, prepared.seed, moments, event["options"])
    with files.quiet():
        growth.model.save_pretrained(folder, max_shard_size=max_shard_bytes)
    if optimizer is not None:
        from .optim import named_state

        files.save_tensors(named_state(growth.optimizer, growth.model), folder / files.OPTIMIZER)
    return {}


def copy_others(folder: Path, target: Path) -> None:
    """Tokenizer, generation settings and whatever else lies beside the weights, as it is."""
    for file in folder.iterdir():
        if file.is_file() and not any(file.match(pattern) for pattern in NOT_COPIED):
            shutil.copyfile(file, target / file.name)


# --- measuring ---


class NewEntries(Mapping[str, Tensor]):
    """Where each parameter has new entries, `copies` among them or not; worked out when asked for."""

    def __init__(self, prepared: Prepared, copies: bool) -> None:
        self.ndims = {name: p.ndim for name, p in prepared.new.named_parameters()}
        self.find: Callable[[str, int], Tensor | None] = lambda name, ndim: None
        for maps in prepared.maps:
            self.find = self._after(maps, copies, self.find)

    @staticmethod
    def _after(
        maps: TensorMaps, copies: bool, before: Callable[[str, int], Tensor | None]
    ) -> Callable[[str, int], Tensor | None]:
        return lambda name, ndim: new_entries(name, ndim, maps, copies, lambda source: before(source, ndim))

    def __getitem__(self, name: str) -> Tensor:
        mask = self.find(name, self.ndims[name])
        if mask is None:
            raise KeyError(name)
        return mask

    def __iter__(self) -> Iterator[str]:
        return iter(self.ndims)

    def __len__(self) -> int:
        return len(self.ndims)


def measured(prepared: Prepared, new: Path, measure: str, say: Callable[[str], None]) -> dict[str, Any]:
    """What the growth did, from the files as they now are: one model at a time, its weights mapped, not copied."""
    if measure == "auto":
        measure = "full" if prepared.bytes <= FULL_BYTES else "logits" if prepared.bytes <= LOGITS_BYTES else "none"
    if measure == "none":
        return {}
    ids = torch.randint(prepared.old.config.vocab_size, PROBE, generator=torch.Generator().manual_seed(0))
    before = logits_of(files.load_checkpoint(prepared.folder, mapped=True)[0], ids)
    model, _ = files.load_checkpoint(new, mapped=True)
    after = logits_of(model, ids)
    result: dict[str, Any] = {
        "max_logit_change": (before - after).abs().max().item(),
        "largest_logit": before.abs().max().item(),
    }
    if measure == "full":
        for p in model.parameters():
            p.requires_grad_(True)
        masks = NewEntries(prepared, copies=True)
        result["live_at_once"] = live_shares(model, masks, ids)
        result["duplicated_rows"] = duplicated_share(model, masks)
    return result


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits.double()


# --- saying ---


def plan_lines(prepared: Prepared) -> list[str]:
    """The plan in words: sizes, cost, promise and what it hangs on, moments, what will be written."""
    event, before, after = prepared.event, prepared.old.config, prepared.new.config
    lines = [f"grow {before.model_type} by {prepared.operator}"]
    lines += [f"  {name} {old:,} -> {event['to'][name]:,}" for name, old in event["from"].items()]
    lines += [f"  {name} {old} -> {new}, which follows" for name, old, new in followers(before, after, event["to"])]
    lines.append(f"  parameters {event['parameters_before']:,} -> {event['parameters_after']:,}")
    lines.append(f"  forward FLOPs per token: {flops_text(before, after)}")
    lines += [f"  {line}" for line in promise_lines(prepared)]
    factors = f", factors {event['moment_factors']}" if event["moments"] == "kept" else ""
    lines.append(f"  optimizer moments: {event['moments']}{factors}")
    dtypes = sorted({str(size.dtype).removeprefix("torch.") for size in prepared.sizes.values()})
    how = f"in memory: {prepared.in_memory}" if prepared.in_memory else "tensor by tensor"
    lines.append(f"  to be written: {gigabytes(prepared.bytes)} of weights in {', '.join(dtypes)}, {how}")
    return lines


def followers(before: PreTrainedConfig, after: PreTrainedConfig, to: Mapping[str, int]) -> list[tuple[str, Any, Any]]:
    """Numbers of the configuration that change besides the ones asked for."""
    old, new = before.to_dict(), after.to_dict()
    asked = {before.attribute_map.get(name, name) for name in to}
    changed = [name for name, value in new.items() if name not in asked and isinstance(value, int | float)]
    return [(name, old.get(name), new[name]) for name in changed if old.get(name) != new[name]]


def flops_text(before: PreTrainedConfig, after: PreTrainedConfig) -> str:
    try:
        old, new = (forward_flops(config, CONTEXT) // CONTEXT for config in (before, after))
    except ValueError:
        return f"no formula for {before.model_type}"
    return f"{old:.3g} -> {new:.3g} over a context of {CONTEXT:,}"


def promise_lines(prepared: Prepared) -> list[str]:
    """What is promised and what that hangs on; where it is not the same function, why, and which operators keep it."""
    event = prepared.event
    if event["promise"] == "exact":
        conditions = [f" ({promise})" for promise in prepared.promises if promise != "exact"]
        return [f"promise: exact{''.join(conditions)}"]
    exact = exact_for(prepared.old.config, event["to"])
    instead = f"exact would be: {', '.join(exact)}" if exact else "no one operator does it exactly"
    return [f"promise: approximate, since {event['note']}", instead]


def measured_lines(event: Mapping[str, Any]) -> list[str]:
    if "max_logit_change" not in event:
        return ["not measured: --measure full or logits reads the whole of both models"]
    text = f"measured: {change_text(event)}, of {event['largest_logit']:.1e} at most"
    lines = [text]
    if "live_at_once" in event:
        shares = ", ".join(f"{kind} {share:.0%}" for kind, share in event["live_at_once"].items())
        lines.append(f"measured: new entries that get gradient at once: {shares}")
        lines.append(f"measured: rows with new entries that equal another: {event['duplicated_rows']:.0%}")
    else:
        lines.append("not measured: gradients and copies; --measure full does")
    if "largest_rounding" in event:
        rounding = event["largest_rounding"]
        lines.append(f"measured: old entries rounded by at most {rounding:.1e} of themselves, as the stored dtype can")
    return lines


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 10**9 else f"{count / 1e6:.1f} MB"
