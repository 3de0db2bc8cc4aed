"""A plan applied to an optimizer's state.

If the new loss equals the old one and gradients push forward as g -> c g, the first moment moves as c m and the second
as c² v (tensors.py). New entries start with no moments and their own step count: their birth.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from .tensors import TensorMaps

# What an optimizer may keep of a parameter's shape: state -> the power of the gradient that it is made of.
GRADIENT_POWERS = {"exp_avg": 1, "momentum_buffer": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}


@torch.no_grad()
def grow_optimizer(
    model: nn.Module, grown: nn.Module, maps: TensorMaps, optimizer: torch.optim.Optimizer, drop: bool
) -> torch.optim.Optimizer:
    olds: dict[str, Tensor] = dict(model.named_parameters())
    names: dict[Tensor, str] = {parameter: name for name, parameter in olds.items()}
    for group in optimizer.param_groups:
        unknown = [p for p in group["params"] if p not in names]
        if unknown:
            raise ValueError(f"optimizer: holds a tensor of shape {tuple(unknown[0].shape)} that the model does not")
    owners = {names[p]: i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    members: list[list[tuple[str, Tensor]]] = [[] for _ in optimizer.param_groups]
    for name, p in grown.named_parameters():
        owner = owners.get(_relative(name, p, maps, owners, olds) or "")
        if owner is not None and p.requires_grad:
            members[owner].append((name, p))
    result = same_kind(optimizer, members)
    if drop:
        return result
    owned = {name for named in members for name, _ in named}
    steps = [state["step"] for state in optimizer.state.values() if "step" in state]
    for name, p in grown.named_parameters():
        source, layer = maps.source_of(name)
        if not p.requires_grad:
            continue
        if source is None or (layer is not None and layer.closed) or maps.plan.is_newborn(name):
            if getattr(optimizer, "counts_ages", False) and steps and name in owned:
                result.state[p] = newborn(p, max(steps, key=float))
            continue
        state = _read_state(source, olds, maps, optimizer)
        if state:
            result.state[p] = _grown_state(state, name, maps.read(source, olds.__getitem__), maps, optimizer)
    return result


def _read_state(
    source: str, olds: dict[str, Tensor], maps: TensorMaps, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """The state of the old parameter `source`, joined of those that it is made of."""
    names = maps.old_names(source)
    states = {name: optimizer.state.get(olds[name]) or {} for name in names}
    result = dict(states[names[0]]) if all(states.values()) else {}
    if maps.plan.reads is None or not result:
        return result
    for key in {key for state in states.values() for key in state}:
        if key in GRADIENT_POWERS or key == "birth":

            def part(name: str, key: str = key) -> Tensor:
                return states[name].get(key, torch.zeros((), device=olds[name].device)).expand(olds[name].shape)

            result[key] = maps.read(source, part, exponent=-GRADIENT_POWERS.get(key, 0))
    return result


def same_kind(optimizer: torch.optim.Optimizer, members: list[list[tuple[str, Tensor]]]) -> torch.optim.Optimizer:
    """An optimizer of the same class and settings, without state; `members`: the parameters of each of its groups, by
    name, which a group that knows names takes along."""
    groups = []
    for group, named in zip(optimizer.param_groups, members, strict=True):
        if named:
            groups.append({**group, "params": named if "param_names" in group else [p for _, p in named]})
    arguments = inspect.signature(type(optimizer)).parameters
    return type(optimizer)(groups, **{k: v for k, v in optimizer.defaults.items() if k in arguments})


def _relative(
    name: str, p: Tensor, maps: TensorMaps, owners: dict[str, int], olds: dict[str, Tensor]
) -> str | None:
    """The old parameter whose group a new one joins: its source; for a layer without one, the same in another layer; in
    a model without layers, any that has as many dimensions."""
    source, _ = maps.source_of(name)
    if source is not None and maps.old_names(source):
        return maps.old_names(source)[0]
    alike = [each for i in range(maps.config.num_hidden_layers) if (each := maps.with_layer(name, i)) in olds]
    like = alike or [each for each in owners if (olds[each].ndim >= 2) == (p.ndim >= 2)]
    return next((each for each in like if each in owners), None)


def newborn(p: Tensor, step: Tensor) -> dict[str, Any]:
    birth = torch.full([1] * p.ndim, float(step), device=p.device)
    return {"step": step.clone(), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p), "birth": birth}


def _grown_state(
    state: dict[str, Any], name: str, old: Tensor, maps: TensorMaps, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """One parameter's state: what goes with the gradient by c, what goes with its square by c², scalars stay.

    Raises ValueError on any other tensor: how it would have to move is not known.
    """
    if all(dim.keeps(size) for dim, size in zip(maps.dims(name, old.ndim), old.shape, strict=True)):
        return copy.deepcopy(state)
    new = maps.fresh(name, old.ndim, copies=maps.plan.resets_copies).to(old.device)
    ages = getattr(optimizer, "counts_ages", False)
    result: dict[str, Any] = {}
    for key, value in state.items():
        scalar = not isinstance(value, Tensor) or (value.numel() == 1 and value.shape != old.shape)
        if scalar or (ages and key == "birth"):
            result[key] = copy.deepcopy(value)
            continue
        if key not in GRADIENT_POWERS or value.shape != old.shape:
            raise ValueError(
                f"optimizer: {type(optimizer).__name__} keeps a state {key!r} of shape {tuple(value.shape)}, and "
                "growth does not know how it moves; moments = 'drop' starts it afresh"
            )
        power = GRADIENT_POWERS[key]
        grown = maps.gradient(name, value, power)
        result[key] = grown if ages or power == 1 else torch.where(new, value.mean(), grown)
    if ages and (bool(new.any()) or "birth" in state):
        birth = new * state["step"].to(old.device)
        if "birth" in state:
            birth = torch.maximum(birth, maps.spread_over(name, state["birth"]))
        result["birth"] = birth
    return result
