"""Growth by rank, done: a copy of the model with other factors (lowrank.py), the optimizer's state moved along."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .carried import carried_of
from .engine import Growth
from .lowrank import ALPHA, Factors, LowRank, Ranks, draw, layer_matrix, projections, ranks_of, settled_ranks
from .moments import GRADIENT_POWERS, newborn, same_kind
from .operators import OPERATORS
from .tensors import generator_for, spread


def next_ranks(
    config: PreTrainedConfig, now: Ranks | None, operator: str, to: Mapping[str, int], options: Mapping[str, Any]
) -> Ranks | None:
    """The ranks after a growth by rank or relora; None when it is an ordinary model. ValueError if it cannot be."""
    if set(to) != {"rank"}:
        raise ValueError(f"to: {operator} grows rank alone, for example rank=16, not {', '.join(to) or 'nothing'}")
    if type(to["rank"]) is not int or to["rank"] < 0:
        raise ValueError(f"to.rank: {to['rank']!r} is no rank; allowed: a whole number")
    OPERATORS[operator].check_options(options)
    return settled_ranks(config, OPERATORS[operator].function(now, to["rank"], **options))


@torch.no_grad()
def grow_low_rank(
    model: PreTrainedModel, operator: str, to: Mapping[str, int], optimizer: Any, seed: int, drop: bool, options: Any
) -> Growth:
    """`engine.grow` for the operators rank and relora. Moments of what stays are kept; new entries, and matrices that
    are whole again, start with none and their own step count."""
    before, ranks = ranks_of(model), next_ranks(model.config, ranks_of(model), operator, to, options)
    grown = copy.deepcopy(model)
    new: dict[str, Tensor] = {}
    if operator == "rank":
        _widen(grown, to["rank"], seed, new)
    else:
        _restart(grown, to["rank"], options.get("alpha", ALPHA), seed, new)
    carried = carried_of(grown)
    if isinstance(carried, LowRank):
        carried.ranks = ranks or carried.ranks
        if carried.finished:
            carried.remove()
    prune = options.get("prune", 1.0) if operator == "relora" and before is not None else 1.0
    optimizers = optimizer if isinstance(optimizer, list) else [optimizer] if optimizer is not None else []
    moved = [_moved(model, grown, each, new, drop, prune) for each in optimizers]
    event = {
        "operator": operator,
        "promise": "exact",
        "note": "",
        "moment_factors": "started afresh" if before and any(bool(mask.all()) for mask in new.values()) else "exact",
        "options": dict(options),
        "from": {"rank": before.rank if before else 0},
        "to": dict(to),
        "scales": {},
        "parameters_before": sum(p.numel() for p in model.parameters()),
        "parameters_after": sum(p.numel() for p in grown.parameters()),
        "seed": seed,
        "moments": "dropped" if drop else "kept",
    }
    others = [name for name, p in grown.named_parameters() if not p.requires_grad and not name.endswith(".base")]
    if others:  # an earlier growth froze them
        event["trained_parameters"] = [name for name, p in grown.named_parameters() if p.requires_grad]
    result = moved if isinstance(optimizer, list) else moved[0] if moved else None
    return Growth(grown, result, "exact", event, new, new)


def _widen(model: PreTrainedModel, rank: int, seed: int, new: dict[str, Tensor]) -> None:
    """More rows for A and zero columns for B, up to full rank, where W = B A becomes whole."""
    carried = carried_of(model)
    assert isinstance(carried, LowRank)
    for name, layer in carried.layers.items():
        (old, inputs), outputs = layer.A.shape, layer.B.shape[0]
        full = min(inputs, outputs)
        if layer.base is None and rank >= full:
            model.set_submodule(name, layer.whole())
            new[f"{name}.weight"] = torch.ones(1, 1, dtype=torch.bool)
            continue
        added = min(rank, full) - old
        rows = draw(f"{name}.A.{carried.draws}", (added, inputs), spread(layer.A, model.config), seed).to(layer.A)
        layer.A = nn.Parameter(torch.cat([layer.A, rows]))
        layer.B = nn.Parameter(torch.cat([layer.B, layer.B.new_zeros(outputs, added)], dim=1))
        late = torch.arange(old + added) >= old
        new |= {f"{name}.A": late[:, None], f"{name}.B": late[None, :]}
    carried.draws += 1


def _restart(model: PreTrainedModel, rank: int, alpha: float, seed: int, new: dict[str, Tensor]) -> None:
    """Factors merged into their matrices, if there are any; new ones beside them, unless the rank is 0."""
    carried = carried_of(model)
    draws = carried.draws if isinstance(carried, LowRank) else 0
    wanted = {name for name, layer in projections(model) if isinstance(layer, Factors) or layer.weight.requires_grad}
    if carried is not None:
        carried.remove()
    layers = {}
    for name, layer in projections(model):
        if name not in wanted:
            continue
        if rank == 0:
            new[f"{name}.weight"] = torch.ones(1, 1, dtype=torch.bool)
            continue
        matrix = layer_matrix(layer)
        outputs, inputs = matrix.shape
        r = min(rank, outputs, inputs)
        # What kaiming_uniform_(a=sqrt(5)) draws, as ReLoRA's code has it: uniform within 1 / root(inputs).
        uniform = torch.rand((r, inputs), generator=generator_for(f"{name}.A.{draws}", seed))
        a = ((uniform * 2 - 1) * inputs**-0.5).to(matrix)
        layers[name] = Factors(layer, a, matrix.new_zeros(outputs, r), alpha / rank, additive=True)
        new |= {f"{name}.{part}": torch.ones(1, 1, dtype=torch.bool) for part in "AB"}
    if layers:
        LowRank(model, Ranks("relora", rank), layers, draws + 1)


def _moved(
    before: nn.Module, after: nn.Module, optimizer: Any, new: dict[str, Tensor], drop: bool, prune: float
) -> torch.optim.Optimizer:
    """An optimizer of the same class over the new parameters, in the groups of the old ones of the same layer."""
    olds = dict(before.named_parameters())
    group_of = {p: i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    owners = {name: group_of[p] for name, p in olds.items() if p in group_of}
    members: list[list[tuple[str, Tensor]]] = [[] for _ in optimizer.param_groups]
    for name, p in after.named_parameters():
        layer = name.rpartition(".")[0]
        relatives = [name, *(f"{layer}.{part}" for part in ("weight", "A", "B") if name in new)]
        owner = next((owners[each] for each in relatives if each in owners), None)
        if owner is not None and p.requires_grad:
            members[owner].append((name, p))
    result = same_kind(optimizer, members)
    if drop:
        return result
    owned = {p for group in result.param_groups for p in group["params"]}
    steps = [state["step"] for state in optimizer.state.values() if "step" in state]
    for name, p in after.named_parameters():
        if p not in owned:
            continue
        state = optimizer.state[olds[name]] if name in olds and olds[name] in optimizer.state else {}
        mask = new.get(name)
        if mask is not None and bool(mask.all()):
            mask = _smallest(state, p, prune)
        if mask is not None:
            result.state[p] = _grown_state(state, p, mask, optimizer)
        elif name not in new:
            result.state[p] = copy.deepcopy(state)
        elif getattr(optimizer, "counts_ages", False) and steps:
            result.state[p] = newborn(p, max(steps, key=float))
    return result


def _smallest(state: dict[str, Any], p: Tensor, share: float) -> Tensor | None:
    """Where a restarted factor's first moments are among the smallest of that share; None if none of them is kept."""
    first = state.get("exp_avg", state.get("momentum_buffer"))
    if share == 1.0 or first is None or first.shape != p.shape:
        return None
    mask = torch.zeros(first.numel(), dtype=torch.bool, device=first.device)
    mask[first.abs().flatten().argsort()[: round(share * first.numel())]] = True
    return mask.view_as(first)


def _grown_state(state: dict[str, Any], p: Tensor, mask: Tensor, optimizer: Any) -> dict[str, Any]:
    """A factor's state, padded to its new shape; nothing where the mask is, and there the entries' birth."""
    ages, mask, result = getattr(optimizer, "counts_ages", False), mask.to(p.device), dict[str, Any]()

    def padded(value: Tensor) -> Tensor:
        wide = value.new_zeros(p.shape)
        wide[: value.shape[0], : value.shape[1]] = value
        return wide

    for key, value in state.items():
        if key in GRADIENT_POWERS:
            start = 0.0 if ages or GRADIENT_POWERS[key] == 1 else value.mean().item()
            result[key] = padded(value).masked_fill(mask, start)
        elif not isinstance(value, Tensor) or value.numel() == 1 and key != "birth":
            result[key] = copy.deepcopy(value)
        elif key != "birth":
            kind = type(optimizer).__name__
            raise ValueError(f"optimizer: {kind} keeps a state {key!r}; moments = 'drop' starts it afresh")
    if ages and state:
        birth = mask * state["step"].to(p.device)
        if "birth" in state:
            birth = torch.maximum(birth, padded(state["birth"].expand(state["exp_avg"].shape)))
        result["birth"] = birth
    return result
