"""The rows of a memory ranked by use: how strongly and how often each speaks on a text.

A row with weight w(x) and value v adds w(x) v to its module's output; what counts here is the length |w(x)| ||v||.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.axes import parameter_dims
from ..pattention import Pattention
from .layers import is_joined, together
from .memory import Memory
from .places import BESIDE, rows_axis


@dataclass(frozen=True)
class RowUse:
    """One row: the module that it stands beside, its number there (of expert e with n rows each: e n + row), the mean
    length of what it adds over all positions, and the share of positions where it adds more than the memory's mean row
    there."""

    place: str
    row: int
    strength: float
    often: float


@torch.no_grad()
def rank_rows(memory: Memory, input_ids: Tensor, batch_size: int = 8) -> list[RowUse]:
    """The rows of a memory on token ids (B, T), strongest first. ValueError if the memory is off."""
    if not memory.on:
        raise ValueError(f"name: the memory {memory.name!r} is off, so none of its rows is used")
    model, training = memory.model.eval(), memory.model.training
    strength: dict[str, Tensor] = {}
    often: dict[str, Tensor] = {}
    positions = 0

    def count(place: str, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        lengths = (weights_at(memory, place, module, inputs).abs() * value_lengths(memory, place)).double()
        strength[place] = strength.get(place, 0) + lengths.sum(0)
        often[place] = often.get(place, 0) + (lengths > lengths.mean(1, keepdim=True)).double().sum(0)

    handles = [
        model.get_submodule(place).register_forward_hook(partial(count, place), prepend=True) for place in memory.layers
    ]
    try:
        for batch in input_ids.split(batch_size):
            model(input_ids=batch.to(model.device), use_cache=False)
            positions += batch.numel()
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    ranked = [
        RowUse(place, row, float(total) / positions, float(often[place][row]) / positions)
        for place, totals in strength.items()
        for row, total in enumerate(totals.tolist())
    ]
    return sorted(ranked, key=lambda use: -use.strength)


def weights_at(memory: Memory, place: str, module: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
    """The weight of each row of a memory at one place, (positions, rows), of what the module is given there."""
    layer: Any = memory.layers[place]
    if is_joined(layer):
        beside = getattr(module, BESIDE)
        on = [name for name in beside if name in beside.on]
        weights = together(module, [beside[name] for name in on], inputs[0])[1][on.index(memory.name)]
        x = inputs[0].to(weights.dtype)
        return (weights if layer.up is None else weights * (x @ layer.up.t())).flatten(0, -2)
    x = inputs[0].to(next(layer.parameters()).dtype)
    if isinstance(layer, Pattention):
        return layer.row_weights(x).flatten(0, -2)
    if memory.parameters()[0].ndim == 3:
        return _expert_weights(layer, x, *inputs[1:])
    seen: list[Tensor] = []
    reader = layer.get_submodule(_reader(memory, place).rpartition(".")[0])
    handle = reader.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    layer(x)
    handle.remove()
    return seen[0].flatten(0, -2)


def _expert_weights(layer: Any, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
    """Of x (N, C), with `chosen` experts (N, k) and their shares (N, k): (N, experts * rows), zero where not chosen."""
    experts, _, rows = layer.down_proj.shape
    weights = x.new_zeros(len(x), experts, rows)
    for expert in range(experts):
        where, rank = torch.where(chosen == expert)
        gate, up = F.linear(x[where], layer.gate_up_proj[expert]).chunk(2, dim=-1)
        weights[where, expert] = layer.act_fn(gate) * up * shares[where, rank, None].to(x.dtype)
    return weights.flatten(1)


def value_lengths(memory: Memory, place: str) -> Tensor:
    """||v|| of each row, (rows,)."""
    layer = memory.layers[place]
    if isinstance(layer, Pattention):
        return layer.value.norm(dim=1)
    name = _reader(memory, place)
    dims = parameter_dims(memory.model.config, f"{place}.{name}")
    output = next(i for i, dim in enumerate(dims) if (("hidden", ">"),) in dim)
    return layer.get_parameter(name).norm(dim=output).flatten()


def _reader(memory: Memory, place: str) -> str:
    """The parameter that reads the rows' weights: down_proj.weight, c_proj.weight."""
    config = memory.model.config
    axis, _ = rows_axis(config)
    names = [name for name, _ in memory.layers[place].named_parameters()]
    return next(n for n in names if any(((axis, "<"),) in dim for dim in parameter_dims(config, f"{place}.{n}")))
