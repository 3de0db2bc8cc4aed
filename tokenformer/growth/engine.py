"""Growth as algebra on named axes: where each new slot of an axis comes from, and with what factor.

An operator turns a configuration and target sizes into a Plan. The engine applies one plan to weights and to an
optimizer's state alike: old entries are gathered by the slot map and multiplied by their factor, entries in a new slot
are zero or drawn at random. If the new loss equals the old one and the gradients push forward as g -> c g, the first
moment moves as c m and the second as c² v. New entries start with no moments and their own step count: their birth.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..models.axes import parameter_axes
from .plan import Fill, Plan
from .tokens import OPERATORS

SHORT_NAMES = {"ffn": "ffn_tokens", "qkv": "qkv_tokens", "proj": "proj_tokens"}

# What an optimizer may keep of a parameter's shape: state -> the power of the gradient that it is made of.
GRADIENT_POWERS = {"exp_avg": 1, "momentum_buffer": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}


@dataclass(frozen=True)
class Growth:
    """A grown model, the optimizer that goes on with it (None if none was given), and what was done."""

    model: PreTrainedModel
    optimizer: torch.optim.Optimizer | None
    promise: str
    event: dict[str, Any]
    slots: dict[str, Tensor] = field(repr=False)


def grow(
    model: PreTrainedModel,
    operator: str = "zero_keys",
    to: dict[str, int] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    seed: int = 0,
    moments: str = "keep",
) -> Growth:
    """A larger model made from `model` by the operator of that name; nothing that is passed in is altered.

    to: axis -> new size, with the configuration's names (ffn_tokens) or the short ones (ffn, qkv, proj).
    optimizer: one over the model's parameters; the answer holds one of its class over the new parameters, the moments
    of old entries carried over ("keep") or all started afresh ("drop"). tokenformer.AdamW gives new entries their own
    step count; other Adams, which have one count per tensor, get the mean second moment of the old entries there
    instead, so that the first steps do not overshoot.
    Raises ValueError on an unknown operator or axis, a smaller or equal target, an operator that does not fit, or an
    optimizer with a state that growth does not know.
    """
    if operator not in OPERATORS:
        raise ValueError(f"operator: {operator!r} is not known; allowed: {', '.join(OPERATORS)}")
    if moments not in ("keep", "drop"):
        raise ValueError(f"moments: {moments!r} is not known; allowed: keep, drop")
    sizes = target_sizes(model.config, to or {})
    plan = OPERATORS[operator](model.config, sizes)
    grown = _grow_weights(model, plan, torch.Generator().manual_seed(seed))
    dropped = moments == "drop" or plan.drops_moments
    grown_optimizer = None
    if optimizer is not None:
        grown_optimizer = _grow_optimizer(model, grown, plan, optimizer, dropped)
    event = {
        "operator": operator,
        "promise": plan.promise,
        "note": plan.note,
        "seed": seed,
        "moments": "dropped" if dropped else "kept",
        "from": {axis: getattr(model.config, axis) for axis in sizes},
        "to": sizes,
        "scales": {
            axis.replace("_tokens", "_scale"): getattr(plan.config, axis.replace("_tokens", "_scale"))
            for axis in sizes
            if axis.endswith("_tokens")
        },
        "parameters_before": sum(p.numel() for p in model.parameters()),
        "parameters_after": sum(p.numel() for p in grown.parameters()),
    }
    return Growth(grown, grown_optimizer, plan.promise, event, plan.slots)


def target_sizes(config: PreTrainedConfig, to: dict[str, int]) -> dict[str, int]:
    """`to` with full axis names; ValueError unless they are this model's, each once, none smaller, one larger."""
    if not to:
        raise ValueError("to: no target size given, for example ffn=512")
    sizes: dict[str, int] = {}
    for name, size in to.items():
        axis = SHORT_NAMES.get(name, name)
        if not isinstance(getattr(config, axis, None), int):
            raise ValueError(f"to.{name}: {config.model_type} has no such axis; allowed: {', '.join(SHORT_NAMES)}")
        if not isinstance(size, int) or size < getattr(config, axis):
            raise ValueError(f"to.{name}: {size} is smaller than the model's {getattr(config, axis)}; growth only adds")
        if axis in sizes:
            raise ValueError(f"to.{name}: {axis} is given twice, as {sizes[axis]} and as {size}")
        sizes[axis] = size
    if all(size == getattr(config, axis) for axis, size in sizes.items()):
        raise ValueError(f"to: {to} is the size that the model already has")
    return sizes


def expand(old: Tensor, axes: tuple[str, ...], slots: dict[str, Tensor], factor: Tensor | float = 1.0) -> Tensor:
    """`old` gathered along every grown axis, times a factor per slot; zero in new slots. A size of 1 stays."""
    new = old
    for dim, axis in enumerate(axes):
        if axis not in slots or old.shape[dim] == 1:
            continue
        source = slots[axis].to(old.device)
        new = new.index_select(dim, source.clamp(min=0))
        keep = _along(source >= 0, dim, new.ndim)
        new = torch.where(keep, new, torch.zeros((), dtype=new.dtype, device=new.device))
        if isinstance(factor, Tensor):
            new = new * _along(factor.to(new), dim, new.ndim)
    return new if isinstance(factor, Tensor) or factor == 1.0 else new * factor


def _along(vector: Tensor, dim: int, ndim: int) -> Tensor:
    return vector.view([-1 if d == dim else 1 for d in range(ndim)])


def new_entries(axes: tuple[str, ...], slots: dict[str, Tensor], device: torch.device, copies: bool = False) -> Tensor:
    """True where an entry lies in a new slot of any axis (with `copies`: also in a second copy of an old slot);
    broadcastable to the parameter."""
    new = torch.zeros([1] * len(axes), dtype=torch.bool, device=device)
    for dim, axis in enumerate(axes):
        if axis in slots:
            source = slots[axis]
            fresh = source < 0
            if copies:
                old, slot = source[~fresh], torch.arange(len(source))
                first = torch.zeros(int(old.max()) + 1, dtype=torch.long)
                first.scatter_reduce_(0, old, slot[~fresh], "amin", include_self=False)
                fresh = fresh | (first[source.clamp(min=0)] != slot)
            new = new | _along(fresh.to(device), dim, len(axes))
    return new


def _fill(plan: Plan, name: str, axes: tuple[str, ...]) -> Fill | None:
    grown = [axis for axis in axes if axis in plan.slots]
    return plan.fill(name, grown[0]) if grown else None


@torch.no_grad()
def _grow_weights(model: PreTrainedModel, plan: Plan, generator: torch.Generator) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        grown = type(model)(plan.config)
    grown = grown.to(device=model.device, dtype=model.dtype).train(model.training)
    _copy_buffers(model, grown)
    grown.generation_config = copy.deepcopy(model.generation_config)
    if model.is_activation_checkpointing:
        grown.activation_checkpointing_enable()
    targets = dict(grown.named_parameters())
    for name, old in model.named_parameters():
        axes = parameter_axes(model.config, name)
        fill = _fill(plan, name, axes)
        targets[name].requires_grad_(old.requires_grad)
        if fill is None:
            targets[name].copy_(old)
            continue
        new = expand(old, axes, plan.slots, fill.weight)
        if fill.new_std:
            noise = torch.randn(new.shape, generator=generator, dtype=torch.float32) * fill.new_std
            new = torch.where(new_entries(axes, plan.slots, new.device), noise.to(new), new)
        targets[name].copy_(new)
    return grown


def _copy_buffers(model: nn.Module, grown: nn.Module) -> None:
    """Old buffers as they are, their dtype too: a model read in bfloat16 keeps its rotary frequencies in float32."""
    modules = dict(grown.named_modules())
    for name, old in model.named_modules():
        for key, buffer in old._buffers.items():
            made = modules[name]._buffers.get(key)
            if buffer is not None and made is not None and buffer.shape != made.shape:
                full_name = f"{name}.{key}".lstrip(".")
                raise ValueError(f"buffer {full_name!r} changes its shape with growth, and no table says how")
            modules[name]._buffers[key] = None if buffer is None else buffer.clone()
        if hasattr(old, "max_seq_len_cached"):  # the length that dynamic rotary frequencies were made for
            modules[name].max_seq_len_cached = old.max_seq_len_cached


@torch.no_grad()
def _grow_optimizer(
    model: nn.Module, grown: nn.Module, plan: Plan, optimizer: torch.optim.Optimizer, drop: bool
) -> torch.optim.Optimizer:
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    targets = dict(grown.named_parameters())
    groups = []
    for group in optimizer.param_groups:
        unknown = [p for p in group["params"] if p not in names]
        if unknown:
            raise ValueError(f"optimizer: holds a tensor of shape {tuple(unknown[0].shape)} that the model does not")
        groups.append({**group, "params": [targets[names[p]] for p in group["params"]]})
    arguments = inspect.signature(type(optimizer)).parameters
    defaults = {k: v for k, v in optimizer.defaults.items() if k in arguments}
    result = type(optimizer)(groups, **defaults)
    if drop:
        return result
    for old, state in optimizer.state.items():
        axes = parameter_axes(model.config, names[old])
        fill = _fill(plan, names[old], axes)
        new_state = {key: copy.deepcopy(value) for key, value in state.items()}
        if fill is not None:
            _grow_state(new_state, old, axes, plan, fill, optimizer)
        result.state[targets[names[old]]] = new_state
    return result


def _grow_state(
    state: dict[str, Any], old: Tensor, axes: tuple[str, ...], plan: Plan, fill: Fill, optimizer: torch.optim.Optimizer
) -> None:
    """One parameter's state in place: what goes with the gradient by c, what goes with its square by c², scalars stay.

    Raises ValueError on any other tensor: how it would have to move is not known.
    """
    new = new_entries(axes, plan.slots, old.device)
    ages = getattr(optimizer, "counts_ages", False)
    for key, value in state.items():
        scalar = not isinstance(value, Tensor) or (value.numel() == 1 and value.shape != old.shape)
        if scalar or (ages and key == "birth"):
            continue
        if key not in GRADIENT_POWERS or value.shape != old.shape:
            raise ValueError(
                f"optimizer: {type(optimizer).__name__} keeps a state {key!r} of shape {tuple(value.shape)}, and "
                "growth does not know how it moves; moments = 'drop' starts it afresh"
            )
        power = GRADIENT_POWERS[key]
        grown = expand(value, axes, plan.slots, fill.moment**power)
        state[key] = grown if ages or power == 1 else torch.where(new, value.mean(), grown)
    if ages and (new.any() or "birth" in state):
        birth = new * state["step"].to(old.device)
        if "birth" in state:
            birth = torch.maximum(birth, expand(state["birth"], axes, plan.slots))
        state["birth"] = birth
