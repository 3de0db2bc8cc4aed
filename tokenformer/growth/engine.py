"""A growth done: the plans of its operators applied to a model and to its optimizer's state, one after another.

If the new loss equals the old one and gradients push forward as g -> c g, the first moment moves as c m and the second
as c² v (tensors.py). New entries start with no moments and their own step count: their birth.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..models import fit_experts
from ..models.axes import parameter_dims, size_of
from . import masked
from .carried import Carried, carried_of
from .exactness import moments_are_exact, why_not_exact
from .experts import PhaseIn
from .ligo import Batches, learn
from .operators import Operator, steps_of, target_sizes
from .plan import Plan
from .tensors import TensorMaps

# What an optimizer may keep of a parameter's shape: state -> the power of the gradient that it is made of.
GRADIENT_POWERS = {"exp_avg": 1, "momentum_buffer": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}


@dataclass(frozen=True)
class Growth:
    """A grown model, the optimizer that goes on with it (None if none was given), and what was done.

    new: for each parameter that has them, where its new entries are, second copies not counted; copies: those too.
    Both are masks that broadcast to the parameter.
    trains_only: parameters that the operator wants trained alone at first, by whoever trains; empty: all.
    """

    model: PreTrainedModel
    optimizer: Any
    promise: str
    event: dict[str, Any]
    new: dict[str, Tensor] = field(repr=False)
    copies: dict[str, Tensor] = field(repr=False)
    trains_only: tuple[str, ...] = field(default=(), repr=False)

    @property
    def carried(self) -> Carried | None:
        """What hangs on the model for a while: tell it `advance()` after every training step (carried.py)."""
        return carried_of(self.model)


def grow(
    model: PreTrainedModel,
    operator: str = "zero_keys",
    to: dict[str, int] | None = None,
    optimizer: torch.optim.Optimizer | list[torch.optim.Optimizer] | None = None,
    seed: int = 0,
    moments: str = "keep",
    options: dict[str, Any] | None = None,
    batches: Batches | None = None,
) -> Growth:
    """A larger model made from `model` by the operator of that name; nothing that is passed in is altered.

    operator: one of OPERATORS, or several joined by + ("lemon+llama_pro"), applied one after another.
    to: field -> new size, with the configuration's names (hidden_size, ffn_tokens) or short ones (ffn, qkv, proj).
    optimizer: one over the model's parameters, or a list of several that share them (Muon for matrices, AdamW for the
    rest); the answer holds one of its class over the new parameters, or a list of such, the moments of old entries
    carried over ("keep") or all started afresh ("drop"). tokenformer.AdamW gives new entries their own step count;
    other Adams, which have one count per tensor, get the mean second moment of the old entries there instead, so that
    the first steps do not overshoot. Muon's momentum moves as a gradient does; what it makes of it mixes old rows with
    new ones, so that its steps are not those of the small model.
    options: the operators' own keywords.
    masked, rank, relora and phase_in_experts leave something on the model that training has to carry: Growth.carried.
    batches: text for an operator that learns (ligo): token ids (B, T + 1), one batch a step. The event says what that
    cost in growth_flops.
    Raises ValueError on an unknown operator, axis or option, a smaller or equal target, an operator that does not fit
    or cannot keep its promise, or an optimizer with a state that growth does not know.
    """
    if moments not in ("keep", "drop"):
        raise ValueError(f"moments: {moments!r} is not known; allowed: keep, drop")
    carried = carried_of(model)
    if operator in ("rank", "relora") and not (carried and carried.kind == "masked"):
        from .lowrank_growth import grow_low_rank

        return grow_low_rank(model, operator, to or {}, optimizer, seed, moments == "drop", options or {})
    if carried is not None:
        raise ValueError(f"operator: {operator} cannot grow a model that still carries {carried.kind} growth")
    before, optimizers = model, []
    if optimizer is not None:
        optimizers = optimizer if isinstance(optimizer, list) else [optimizer]
    steps = steps_of(model.config, operator, to or {}, seed, options)
    if any(plan.ramp_steps for _, _, plan in steps[:-1]):
        raise ValueError(f"operator: {operator}: masked comes last, since what it adds is not there at first")
    new: dict[str, Tensor] = {}
    copies: dict[str, Tensor] = {}
    learned: dict[str, Any] = {"growth_flops": 0}
    dropped = moments == "drop" or any(plan.drops_moments for _, _, plan in steps)
    for _, config, plan in steps:
        maps = TensorMaps(config, plan)
        grown = _grow_weights(model, maps, seed)
        if plan.learning is not None:
            learned |= learn(model, grown, maps, batches, seed)
        new, copies = (_carry(masks, grown, maps, also) for masks, also in ((new, False), (copies, True)))
        optimizers = [_grow_optimizer(model, grown, maps, each, dropped) for each in optimizers]
        model = grown
    event = event_of(before, model, operator, to or {}, steps, options or {})
    event |= {"seed": seed, "moments": "dropped" if dropped else "kept", **learned}
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    if len(trained) < len(list(model.parameters())):
        event["trained_parameters"] = trained
    endings = tuple(event.get("trains_only", ()))
    alone = tuple(name for name, _ in model.named_parameters() if endings and name.endswith(endings))
    _, config, plan = steps[-1]
    if plan.bias:
        PhaseIn(model, config.num_local_experts, plan.ramp_steps, plan.bias)
    elif plan.ramp_steps:
        masked.attach(model, config, plan)
    kept = optimizers if isinstance(optimizer, list) else optimizers[0] if optimizers else None
    return Growth(model, kept, event["promise"], event, new, copies, alone)


def freeze_as_grown(model: nn.Module, lineage: list[dict[str, Any]]) -> None:
    """Train on what the last growth of a lineage left to train (LLaMA Pro's new layers); all if it froze nothing."""
    trained = lineage[-1].get("trained_parameters") if lineage else None
    if trained is not None:
        for name, p in model.named_parameters():
            p.requires_grad_(name in trained)


def event_of(
    before: PreTrainedModel,
    after: PreTrainedModel,
    operator: str,
    to: dict[str, int],
    steps: list[tuple[Operator, PreTrainedConfig, Plan]],
    options: dict[str, Any],
) -> dict[str, Any]:
    """What a growth was, for the lineage: operator, promise and its note, sizes before and after, parameters."""
    sizes = target_sizes(before.config, to)
    exact = all(each.exact for each, _, _ in steps)
    notes = [f"{each.name}: {why}" for each, config, plan in steps for why in why_not_exact(config, plan)]
    alone = [ending for _, _, plan in steps for ending in plan.trains_only]
    scales = [key for key in ("qkv_scale", "proj_scale", "ffn_scale") if key.replace("_scale", "_tokens") in sizes]
    return {
        "operator": operator,
        "promise": "exact" if exact else "approximate",
        "note": "" if exact else "; ".join(notes),
        "moment_factors": ("leading term", "exact")[all(moments_are_exact(c, p) for _, c, p in steps)],
        "options": options,
        "from": {axis: size_of(before.config, axis) for axis in sizes},
        "to": sizes,
        "scales": {key: getattr(after.config, key) for key in scales},
        "parameters_before": sum(p.numel() for p in before.parameters()),
        "parameters_after": sum(p.numel() for p in after.parameters()),
        **({"trains_only": alone} if alone else {}),
    }


# --- weights ---


def grown_tensors(
    names: dict[str, int], read: Callable[[str], Tensor], maps: TensorMaps, seed: int
) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of the grown model, one at a time; `names`: new name -> number of dimensions; `read`: an old one.

    Layers without a source have the architecture's own initialisation. ValueError on a parameter that no table names.
    """
    grown = grown_reader(read, maps, seed)
    for name in names:
        yield name, grown(name)


def grown_reader(read: Callable[[str], Tensor], maps: TensorMaps, seed: int) -> Callable[[str], Tensor]:
    """The same for any one parameter, so that plans that follow each other are readers of readers.

    What is kept in half precision is worked out, and handed on, in float32: it is rounded once, where it is put.
    """
    fresh = FreshLayers(maps, seed)

    def old(name: str) -> Tensor:
        return widened(maps.read(name, read))

    def grown(name: str) -> Tensor:
        source, layer = maps.source_of(name)
        if source is None:
            tensor = fresh.parameter(name)
        else:
            above = _above(name, source, maps)
            tensor = maps.weight(name, old(source), old(above) if above else None, seed)
        return torch.zeros_like(tensor) if layer is not None and layer.closed and maps.closes(name) else tensor

    return grown


def widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _above(name: str, source: str, maps: TensorMaps) -> str | None:
    """The same parameter one layer up; the last layer takes its own."""
    index = maps.layer_of(source)
    if not maps.plan.next_layer or index is None or index + 1 >= maps.config.num_hidden_layers:
        return None
    return maps.with_layer(source, index + 1)


class FreshLayers:
    """Layers as the architecture itself starts them, made one at a time from a model without memory."""

    def __init__(self, maps: TensorMaps, seed: int) -> None:
        self.maps, self.seed = maps, seed
        self.index: int | None = None
        self.parameters: dict[str, Tensor] = {}
        self.skeleton: Any = None

    def parameter(self, name: str) -> Tensor:
        index = self.maps.layer_of(name)
        assert index is not None
        if index != self.index:
            self.index, self.parameters = index, self._layer(index)
        return self.parameters[name]

    def _layer(self, index: int) -> dict[str, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed * 7919 + index)
            if self.skeleton is None:
                with torch.device("meta"):
                    self.skeleton = AutoModelForCausalLM.from_config(self.maps.plan.config)
            prefix = f"{self.maps.prefix}.{index}"
            layer = copy.deepcopy(self.skeleton.get_submodule(prefix)).to_empty(device="cpu").float()
            for module in layer.modules():
                if hasattr(module, "init_mamba2_weights"):
                    module.init_mamba2_weights()
            self.skeleton.apply(lambda m: None)
            for module in layer.modules():
                self.skeleton._init_weights(module)
            return {f"{prefix}.{name}": p.detach() for name, p in layer.named_parameters()}


@torch.no_grad()
def _grow_weights(model: PreTrainedModel, maps: TensorMaps, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        same = maps.plan.reads is None
        grown = type(model)(maps.plan.config) if same else AutoModelForCausalLM.from_config(maps.plan.config)
    grown = fit_experts(grown.to(device=model.device, dtype=model.dtype).train(model.training))
    _copy_buffers(model, grown, maps)
    grown.generation_config = copy.deepcopy(model.generation_config)
    if model.is_activation_checkpointing:
        grown.activation_checkpointing_enable()
    targets, sources = dict(grown.named_parameters()), dict(model.named_parameters())
    for name in sources:
        parameter_dims(model.config, name)  # an error here if no table names it
    names = {name: p.ndim for name, p in targets.items()}
    for name, tensor in grown_tensors(names, sources.__getitem__, maps, seed):
        targets[name].copy_(tensor)
        targets[name].requires_grad_(is_trained(name, maps, lambda source: sources[source].requires_grad))
    if hasattr(grown, "after_step"):
        grown.after_step()
    return grown


def is_trained(name: str, maps: TensorMaps, before: Callable[[str], bool]) -> bool:
    """Whether a parameter of the grown model is trained on; `before`: whether an old one was."""
    source, layer = maps.source_of(name)
    old_is_frozen = maps.plan.frozen and not (layer and (layer.closed or source is None))
    return not old_is_frozen and (source is None or all(before(old) for old in maps.old_names(source)))


def _copy_buffers(model: nn.Module, grown: nn.Module, maps: TensorMaps) -> None:
    """Old buffers as they are, their dtype too: a model read in bfloat16 keeps its rotary frequencies in float32."""
    sources = dict(model.named_modules())
    for name, module in grown.named_modules():
        source, _ = maps.source_of(f"{name}.")
        old = sources.get((source or "").rstrip("."))
        if old is None:
            continue
        for key, made in list(module._buffers.items()):
            buffer = old._buffers.get(key)
            if buffer is not None and made is not None and buffer.shape != made.shape:
                full_name = f"{name}.{key}".lstrip(".")
                raise ValueError(f"buffer {full_name!r} changes its shape with growth, and no table says how")
            module._buffers[key] = None if buffer is None else buffer.clone()
        if hasattr(old, "max_seq_len_cached"):  # the length that dynamic rotary frequencies were made for
            module.max_seq_len_cached = old.max_seq_len_cached


def _carry(masks: dict[str, Tensor], grown: nn.Module, maps: TensorMaps, copies: bool) -> dict[str, Tensor]:
    """Where entries are new after this plan: those of the plans before it, moved along, and its own."""
    found = {name: new_entries(name, p.ndim, maps, copies, masks.get) for name, p in grown.named_parameters()}
    return {name: mask for name, mask in found.items() if mask is not None}


def new_entries(
    name: str, ndim: int, maps: TensorMaps, copies: bool, before: Callable[[str], Tensor | None]
) -> Tensor | None:
    """Where one parameter has new entries, broadcastable to it; None if nowhere. `before`: where an old one had."""
    source, layer = maps.source_of(name)
    if source is None or (layer is not None and layer.closed and maps.closes(name)):
        return torch.ones([1] * ndim, dtype=torch.bool)
    mask, olds = maps.fresh(name, ndim, copies), maps.old_names(source)
    if copies and layer is not None and _is_repetition(name, maps):
        mask = torch.ones_like(mask)
    if maps.plan.is_newborn(name) and (copies or not olds):
        mask = torch.ones_like(mask)
    for earlier in map(before, olds):
        if earlier is not None:  # what is joined of parts of which one has new entries counts as new
            mask = mask | (maps.spread_over(name, earlier).bool() if olds == (source,) else torch.ones_like(mask))
    return mask if bool(mask.any()) else None


def _is_repetition(name: str, maps: TensorMaps) -> bool:
    """Whether the parameter's layer comes from an old one that an earlier new layer came from already."""
    index, layers = maps.layer_of(name), maps.plan.layers
    return index is not None and layers is not None and layers[index].source in [each.source for each in layers[:index]]


# --- the optimizer's state ---


@torch.no_grad()
def _grow_optimizer(
    model: nn.Module, grown: nn.Module, maps: TensorMaps, optimizer: torch.optim.Optimizer, drop: bool
) -> torch.optim.Optimizer:
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        unknown = [p for p in group["params"] if p not in names]
        if unknown:
            raise ValueError(f"optimizer: holds a tensor of shape {tuple(unknown[0].shape)} that the model does not")
    owners = {names[p]: i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    members: list[list[Tensor]] = [[] for _ in optimizer.param_groups]
    for name, p in grown.named_parameters():
        owner = owners.get(_relative(name, p, maps, owners, dict(model.named_parameters())) or "")
        if owner is not None and p.requires_grad:
            members[owner].append(p)
    result = same_kind(optimizer, members)
    if drop:
        return result
    olds = {name: p for p, name in names.items()}
    steps = [state["step"] for state in optimizer.state.values() if "step" in state]
    for name, p in grown.named_parameters():
        source, layer = maps.source_of(name)
        if not p.requires_grad:
            continue
        if source is None or (layer is not None and layer.closed) or maps.plan.is_newborn(name):
            if getattr(optimizer, "counts_ages", False) and steps and _owned(p, result):
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


def same_kind(optimizer: torch.optim.Optimizer, members: list[list[Tensor]]) -> torch.optim.Optimizer:
    """An optimizer of the same class and settings, without state; `members`: the parameters of each of its groups."""
    groups = [{**g, "params": params} for g, params in zip(optimizer.param_groups, members, strict=True) if params]
    arguments = inspect.signature(type(optimizer)).parameters
    return type(optimizer)(groups, **{k: v for k, v in optimizer.defaults.items() if k in arguments})


def _owned(p: Tensor, optimizer: torch.optim.Optimizer) -> bool:
    return any(p is each for group in optimizer.param_groups for each in group["params"])


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
    if all(dim.trivial for dim in maps.dims(name, old.ndim)):
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


