"""A growth done: the plans of its operators applied to a model and to its optimizer's state, one after another."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..models.axes import size_of
from . import masked
from .balance import LossFree
from .carried import Carried, carried_of
from .exactness import moments_are_exact, why_not_exact
from .experts import PhaseIn, TrainsOnly
from .ligo import Batches, learn
from .moments import grow_optimizer
from .operators import DEFAULT, Operator, settled_operator, steps_of, target_sizes
from .plan import Plan
from .tensors import TensorMaps
from .weights import carry_entries, grow_weights


@dataclass(frozen=True)
class Growth:
    """A grown model, the optimizer that goes on with it (None if none was given), and what was done.

    new: for each parameter that has them, where its new entries are, second copies not counted; copies: those too.
    Both are masks that broadcast to the parameter.
    """

    model: PreTrainedModel
    optimizer: Any
    promise: str
    event: dict[str, Any]
    new: dict[str, Tensor] = field(repr=False)
    copies: dict[str, Tensor] = field(repr=False)

    @property
    def carried(self) -> Carried | None:
        """What hangs on the model for a while: tell it `advance()` after every training step (carried.py)."""
        return carried_of(self.model)

    def replace(self, model: nn.Module) -> None:
        """Make the object `model` the grown one, for a training loop that holds on to the one it was given.

        It takes the grown model's modules and configuration; what others have set on it (a patched `forward`, hooks)
        stays. What was set on its old modules is gone with them.
        Raises ValueError unless both are of one class and nothing is carried by training.
        """
        if type(model) is not type(self.model):
            names = type(model).__name__, type(self.model).__name__
            raise ValueError(f"model: a {names[0]} cannot become the grown {names[1]}; use Growth.model")
        if self.carried is not None:
            raise ValueError(f"model: it would carry {self.carried.kind}, which hangs on Growth.model; use that")
        hooks = {name for name in vars(nn.Module()) if "hook" in name}
        vars(model).update({name: value for name, value in vars(self.model).items() if name not in hooks})


def grow(
    model: PreTrainedModel,
    operator: str = DEFAULT,
    to: dict[str, int] | None = None,
    optimizer: torch.optim.Optimizer | list[torch.optim.Optimizer] | None = None,
    seed: int = 0,
    moments: str = "keep",
    options: dict[str, Any] | None = None,
    batches: Batches | None = None,
) -> Growth:
    """A larger model made from `model` by the operator of that name; nothing that is passed in is altered.

    operator: one of OPERATORS, or several joined by + ("lemon+llama_pro"), applied one after another; "default" takes
    an exact one for parameter tokens (settled_operator), zero for the rest.
    to: field -> new size, with the configuration's names (hidden_size, ffn_tokens) or short ones (ffn, qkv, proj).
    optimizer: one over the model's parameters, or a list of several that share them (Muon for matrices, AdamW for the
    rest); the answer holds one of its class over the new parameters, or a list of such, the moments of old entries
    carried over ("keep") or all started afresh ("drop"). tokenformer.AdamW gives new entries their own step count;
    other Adams, which have one count per tensor, get the mean second moment of the old entries there instead, so that
    the first steps do not overshoot. Muon's momentum moves as a gradient does; what it makes of it mixes old rows with
    new ones, so that its steps are not those of the small model.
    options: the operators' own keywords.
    masked, rank, relora, phase_in_experts and router = "retrain" leave something on the model that training carries:
    Growth.carried. Of what a model carries already, only a loss-free balance grows with it (balance.py).
    batches: text for an operator that learns (ligo): token ids (B, T + 1), one batch a step. The event says what that
    cost in growth_flops.
    Raises ValueError on an unknown operator, axis or option, a smaller or equal target, an operator that does not fit
    or cannot keep its promise, or an optimizer with a state that growth does not know.
    """
    if moments not in ("keep", "drop"):
        raise ValueError(f"moments: {moments!r} is not known; allowed: keep, drop")
    carried = carried_of(model)
    low_rank = ("rank", "relora")
    if operator in low_rank and (carried is None or carried.kind in low_rank):
        from .lowrank_growth import grow_low_rank

        return grow_low_rank(model, operator, to or {}, optimizer, seed, moments == "drop", options or {})
    if carried is not None and (operator in low_rank or not isinstance(carried, LossFree)):
        raise ValueError(f"operator: {operator} cannot grow a model that carries {carried.kind}")
    operator = settled_operator(model.config, operator, to or {})
    before, optimizers = model, []
    if optimizer is not None:
        optimizers = optimizer if isinstance(optimizer, list) else [optimizer]
    steps = steps_of(model.config, operator, to or {}, seed, options)
    for each, _, plan in steps[:-1]:
        if plan.ramp_steps or plan.trains_only:
            raise ValueError(f"operator: {operator}: {each.name} comes last, since what it adds is not there at first")
    if carried is not None and (steps[-1][2].ramp_steps or steps[-1][2].trains_only):
        raise ValueError(f"operator: {operator} is carried by training, and the model carries {carried.kind} already")
    new: dict[str, Tensor] = {}
    copies: dict[str, Tensor] = {}
    learned: dict[str, Any] = {"growth_flops": 0}
    dropped = moments == "drop" or any(plan.drops_moments for _, _, plan in steps)
    for _, config, plan in steps:
        maps = TensorMaps(config, plan)
        grown = grow_weights(model, maps, seed)
        if plan.learning is not None:
            learned |= learn(model, grown, maps, batches, seed)
        new, copies = (carry_entries(masks, grown, maps, also) for masks, also in ((new, False), (copies, True)))
        optimizers = [grow_optimizer(model, grown, maps, each, dropped) for each in optimizers]
        model = grown
    event = event_of(before, model, operator, to or {}, steps, options or {})
    event |= {"seed": seed, "moments": "dropped" if dropped else "kept", **learned}
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    if len(trained) < len(list(model.parameters())):
        event["trained_parameters"] = trained
    _, config, plan = steps[-1]
    if plan.bias:
        PhaseIn(model, config.num_local_experts, plan.ramp_steps, plan.bias)
    elif plan.ramp_steps:
        masked.attach(model, config, plan)
    elif plan.trains_only:
        alone = [name for name, _ in model.named_parameters() if name.endswith(plan.trains_only)]
        TrainsOnly(model, alone, plan.alone_steps)
    elif isinstance(carried, LossFree):
        LossFree(model, carried.grown([plan for _, _, plan in steps]), carried.rate)
    kept = optimizers if isinstance(optimizer, list) else optimizers[0] if optimizers else None
    return Growth(model, kept, event["promise"], event, new, copies)


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
