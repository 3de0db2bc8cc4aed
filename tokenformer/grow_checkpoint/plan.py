"""A growth of a checkpoint worked out, and not yet done: from its configuration and its files' headers alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from .. import checkpoint as files
from .. import hub, runs
from ..growth import freeze_as_grown
from ..growth.engine import event_of
from ..growth.operators import DEFAULT, require_done_at_once, settled_operator, steps_of
from ..growth.tensors import TensorMaps
from ..growth.weights import is_trained
from ..models.tables import TABLES
from .names import how_stored, parts_of
from .shards import Size, Stored, stored_tensors

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
    split: bool = False  # whether the files hold some parameters in parts
    in_memory: str = ""  # why the tensors cannot pass one by one

    @property
    def bytes(self) -> int:
        return sum(size.bytes for size in self.sizes.values())


@files.quiet()
def prepare(
    checkpoint: str | Path,
    operator: str,
    to: dict[str, int],
    moments: str = "keep",
    seed: int = 0,
    options: dict[str, Any] | None = None,
) -> Prepared:
    """Everything about a growth but the growth itself; reads no weights. ValueError if it cannot be done."""
    if operator != DEFAULT:
        require_done_at_once(operator)
    folder = find_or_download(checkpoint)
    require_supported(folder)
    files.require_nothing_carried(folder)
    config, lineage = files.load_config(folder), files.read_lineage(folder)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{folder / 'config.json'}: the weights are quantised; growth takes those that are not")
    stored = stored_tensors(files.weight_files(folder))
    operator = settled_operator(config, operator, to)
    steps = steps_of(config, operator, to, seed, options)
    if any(plan.learning is not None for _, _, plan in steps):
        raise ValueError(
            f"operator: {operator} learns its maps on text, and none is given: it grows a model in a run, by a "
            "[[growth]], or by tokenformer.grow(..., batches=...)"
        )
    if any(plan.trains_only for _, _, plan in steps):
        raise ValueError("router: 'retrain' needs training, which carries it; train with it as a [[growth]]")
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
    split, reason = how_stored(old, stored)
    if new.config.model_type != config.model_type:
        reason = f"files name a {new.config.model_type}'s tensors otherwise than the model does"
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
        sizes=new_sizes(maps, old, new, stored),
        split=split,
        in_memory="its optimizer state grows too" if has_moments else reason,
    )


def find_or_download(checkpoint: str | Path) -> Path:
    """The folder that is meant: one on the disk, or "org/name" on the Hugging Face hub, of which a copy is kept."""
    if not hub.is_on_hub(checkpoint):
        return files.find_checkpoint(checkpoint)
    require_supported(hub.download(str(checkpoint), hub.SMALL_FILES))  # before what is large comes
    return hub.download(str(checkpoint), hub.SMALL_FILES + HUB_WEIGHTS)


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


def new_sizes(
    maps: list[TensorMaps], old: PreTrainedModel, new: PreTrainedModel, stored: Mapping[str, Stored]
) -> dict[str, Size]:
    """Every new parameter; its dtype is its source's, or, in a new layer, that of the same in another."""
    dtypes = {name: each.dtype for name, each in stored.items()}
    for name, p in old.named_parameters():
        part = next(iter(parts_of(old, name, p)))
        if part in stored:
            dtypes[name] = stored[part].dtype
    usual = max((each.dtype for each in stored.values()), key=[each.dtype for each in stored.values()].count)
    sizes = {}
    for name, p in new.named_parameters():
        source: str | None = name
        for each in reversed(maps):
            source = source and (each.source_of(source)[0] or each.with_layer(source, 0))
        sizes[name] = Size(tuple(p.shape), dtypes.get(source or "", usual))
    return sizes
