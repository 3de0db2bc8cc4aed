"""Rows made part of an ordinary model, which anything that runs its architecture runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from ..growth.tensors import TensorMaps
from ..growth.weights import grow_weights
from .layers import fresh
from .memory import Memory, memories_of, memory_of
from .places import BESIDE, rows_plan


@torch.no_grad()
def merge_parameter_tokens(model: PreTrainedModel, names: Iterable[str] | None = None) -> PreTrainedModel:
    """A new plain model of the same architecture, its feed-forward wider by the rows of the memories called `names` (by
    default all that are on). It computes what the model computes with those on, to the rounding of sums in another
    order; in half precision the rows are rounded to the model's dtype. The model itself is not altered.

    ValueError in one line if there is no such memory, none is on, or one is no memory of rows.
    """
    known = memories_of(model)
    chosen = [memory_of(model, name) for name in (names if names is not None else [n for n in known if known[n].on])]
    if not chosen:
        raise ValueError(f"names: no memory is on, so there is nothing to merge; the model has: {', '.join(known)}")
    for memory in chosen:
        if memory.kind != "rows":
            raise ValueError(
                f"names: {memory.name!r} is a {memory.kind}, which stands beside the model's own layers; only rows can "
                "be merged"
            )
    total = sum(memory.tokens for memory in chosen)
    maps = TensorMaps(model.config, rows_plan(model.config, total))
    with _taken_off(model):
        merged = grow_weights(model, maps, seed=0)
    parameters, first = dict(merged.named_parameters()), 0
    for memory in chosen:
        _put(parameters, memory, maps, first, total)
        first += memory.tokens
    return merged.requires_grad_(True)


def _put(parameters: dict[str, nn.Parameter], memory: Memory, maps: TensorMaps, first: int, total: int) -> None:
    """Write a memory's rows into the new slots from `first` on, of `total` in each part of a fused tensor."""
    for name, rows in memory.named_parameters().items():
        p = parameters[name]
        for dim, slots in fresh(maps, name, p.ndim).items():
            taken = slots.view(-1, total)[:, first : first + memory.tokens].flatten()
            p.index_copy_(dim, taken.to(p.device), rows.to(p))


@contextlib.contextmanager
def _taken_off(model: nn.Module) -> Iterator[None]:
    """The model with no memory in its tree of modules, for the while."""
    held = [(module, getattr(module, BESIDE)) for module in list(model.modules()) if hasattr(module, BESIDE)]
    for module, _ in held:
        delattr(module, BESIDE)
    try:
        yield
    finally:
        for module, beside in held:
            setattr(module, BESIDE, beside)
