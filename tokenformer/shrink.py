"""A smaller model made of some of a model's rows: the way back from growth, and the way out of nested training.

Every memory keeps as many of its rows as the others of its kind, each by its own ranking (rows.py), in the order in
which they stood. What is left is an ordinary model with smaller numbers in its configuration. A Pattention with a norm
gets a new stored scale, scale(k) = scale(n) s(k) / s(n) with s that of a new layer, which is the rule of nested
training. Rows with a zero key add nothing to an L2 norm and are not counted: so to cut by order what a growth by zero
keys, zero values or rotated keys has added gives back the model that was grown, bit for bit.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .growth.carried import carried_of
from .growth.moments import grow_optimizer
from .growth.plan import Plan, identity
from .growth.tensors import TensorMaps
from .growth.weights import grow_weights
from .models.axes import resize, size_of
from .rows import RowTable, by_field, heard, kept_rows, kept_scale, ranking, row_fields, row_tables

Keep = float | Mapping[str, float]


@dataclass(frozen=True)
class Shrunk:
    """A shrunken model, the optimizer that goes on with it (None if none was given), and what was done.

    rows: for each memory, by its place, which rows of the old model it keeps.
    """

    model: PreTrainedModel
    optimizer: Any
    event: dict[str, Any]
    rows: dict[str, Tensor] = dataclasses.field(repr=False)


def shrink(
    model: PreTrainedModel,
    keep: Keep,
    by: str = "order",
    batches: Iterable[Tensor] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> Shrunk:
    """A model of the same architecture with a share `keep` of the rows of each memory; nothing passed in is altered.

    keep: above 0 and below 1, or such shares by field, with the names that `grow` takes ({"ffn": 0.5}); what is not
    named stays. by: how rows are ranked, one of rows.RULES, whose formulas are at the head of rows.py. batches: token
    ids (B, T + 1), for the rules that look at a text. optimizer: one over the model's parameters; the answer holds one
    of its class in which every row has kept its moments and its age.
    Raises ValueError on a share or a rule that is not allowed, less than one row left, a rule without the text that it
    needs, a model that carries a growth, or an architecture whose rows are not known.
    """
    sizes, carried = kept_sizes(model.config, keep), carried_of(model)
    if carried is not None:
        raise ValueError(f"shrink: cannot cut a model that carries {carried.kind}, which training has to finish first")
    done = cut(model, sizes, ranking(model, by, batches), optimizer)
    return dataclasses.replace(done, event=done.event | {"options": {"keep": keep, "by": by}})


def kept_sizes(config: PreTrainedConfig, keep: Keep) -> dict[str, int]:
    """Field of the configuration -> how many rows it keeps. ValueError if that makes no smaller model."""
    sizes = {}
    for field, share in by_field(config, "keep", keep).items():
        if not 0 < share < 1:
            raise ValueError(f"keep: {share:g} is not allowed; it must be a share above 0 and below 1")
        rows = size_of(config, field)
        sizes[field] = kept_rows(rows, share)
        if sizes[field] < 1:
            raise ValueError(f"keep: {share:g} of {field} = {rows} is less than one row")
    if all(size == size_of(config, field) for field, size in sizes.items()):
        raise ValueError(f"keep: {keep} leaves every row, so there is nothing to cut")
    return sizes


def cut(
    model: PreTrainedModel,
    sizes: Mapping[str, int],
    ranked: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer | None = None,
) -> Shrunk:
    """The model with its first rows in the order of `ranked`, as many as `sizes` says for their field."""
    memories = [memory for memory in row_tables(model) if memory.field in sizes]
    rows = {m.place: torch.sort(ranked[m.place][: sizes[m.field]]).values for m in memories}
    ordered, its_optimizer = model, optimizer
    if any(not torch.equal(kept, torch.arange(len(kept))) for kept in rows.values()):
        ordered, its_optimizer = copy.deepcopy((model, optimizer))
        with torch.no_grad():
            for memory in memories:
                _bring_forward(ordered, its_optimizer, memory, rows[memory.place])
    config = resize(model.config, sizes, _scales(model, memories, sizes, rows))
    axes = row_fields(model.config)
    maps = TensorMaps(model.config, Plan(config, {axes[name]: identity(size) for name, size in sizes.items()}))
    small = grow_weights(ordered, maps, seed=0)
    if its_optimizer is not None:
        its_optimizer = grow_optimizer(ordered, small, maps, its_optimizer, drop=False)
    scales = [key for name in sizes if (key := name.replace("_tokens", "_scale")) != name]
    event = {
        "operator": "shrink",
        "promise": "approximate",
        "note": "rows are cut",
        "from": {name: size_of(model.config, name) for name in sizes},
        "to": dict(sizes),
        "scales": {key: getattr(config, key) for key in scales},
        "parameters_before": sum(p.numel() for p in model.parameters()),
        "parameters_after": sum(p.numel() for p in small.parameters()),
    }
    return Shrunk(small, its_optimizer, event, rows)


def _bring_forward(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, memory: RowTable, first: Tensor
) -> None:
    """Put these rows of a memory before its others, what an optimizer keeps of each with it; no function changes."""
    for name, dim in memory.dims.items():
        p = model.get_parameter(name)
        others = torch.ones(p.shape[dim], dtype=torch.bool)
        others[first] = False
        order = torch.cat([first, others.nonzero().flatten()]).to(p.device)
        state = optimizer.state.get(p, {}) if optimizer is not None else {}
        for tensor in (p, *state.values()):
            if isinstance(tensor, Tensor) and tensor.ndim == p.ndim and tensor.shape[dim] == len(order):
                tensor.copy_(tensor.index_select(dim, order))


def _scales(
    model: PreTrainedModel, memories: list[RowTable], sizes: Mapping[str, int], rows: Mapping[str, Tensor]
) -> dict[str, float]:
    """The stored scale of each kind of Pattention after the cut; it has one for all of its layers."""
    scales = {}
    for name, size in sizes.items():
        key = name.replace("_tokens", "_scale")
        if key == name:  # an ordinary feed-forward has none
            continue
        theta, scale, old = model.config.theta, getattr(model.config, key), size_of(model.config, name)
        tables = [(memory, model.get_parameter(f"{memory.place}.key")) for memory in memories if memory.field == name]
        all_heard = [heard(theta, table) for _, table in tables]
        kept = sum(int(h[rows[m.place].to(h.device)].sum()) for (m, _), h in zip(tables, all_heard, strict=True))
        total = sum(int(h.sum()) for h in all_heard)
        counts = (size, old) if total == old * len(tables) or not kept else (kept, total)
        scales[key] = kept_scale(theta, scale, *counts)
    return scales
