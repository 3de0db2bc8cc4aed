"""AdamW whose entries may have different ages, parameter groups, the learning rate over a run, state by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class AdamW(torch.optim.AdamW):
    """torch's AdamW (arXiv 1711.05101), and the same for tensors some of whose entries were born later.

    A tensor that grew carries a state `birth`, broadcastable to it: the step at which each entry was added. Such an
    entry's bias correction counts from its birth, which is what a tensor of its own would get. Under one shared count a
    new entry with empty moments would take steps of up to sqrt-ratio (1-beta1)/sqrt(1-beta2) and more, 6.6 times the
    learning rate for beta2 = 0.999. With `rewarm_steps` an entry born after the start also ramps its learning rate up
    linearly over that many steps.
    """

    counts_ages = True

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        fused: bool = True,
        rewarm_steps: int = 0,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)
        self.defaults["rewarm_steps"] = rewarm_steps
        for group in self.param_groups:
            group.setdefault("rewarm_steps", rewarm_steps)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grown = [
            (group, p, p.grad)
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None and "birth" in self.state[p]
        ]
        for _, p, _ in grown:  # torch's step passes over tensors without a gradient
            p.grad = None
        super().step()
        for group, p, grad in grown:
            p.grad = grad
            self._step_by_age(group, p, grad)
        return loss

    def _step_by_age(self, group: dict[str, Any], p: Tensor, grad: Tensor) -> None:
        state = self.state[p]
        beta1, beta2 = group["betas"]
        state["step"] += 1
        birth = state["birth"]
        age = state["step"].to(birth.device) - birth
        rate = torch.full_like(age, group["lr"])
        if group["rewarm_steps"]:
            rate = torch.where(birth > 0, rate * (age / group["rewarm_steps"]).clamp(max=1), rate)
        first, second = state["exp_avg"], state["exp_avg_sq"]
        first.lerp_(grad, 1 - beta1)
        second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = (second / (1 - beta2**age)).sqrt_().add_(group["eps"])
        p.mul_((1 - rate * group["weight_decay"]).to(p.dtype))
        p.sub_((rate / (1 - beta1**age) * (first / denominator)).to(p.dtype))
        youngest = float(age.min())
        if max(beta1, beta2) ** youngest < 1e-8 and youngest >= group["rewarm_steps"]:
            del state["birth"]  # old enough for the shared count to give the same numbers


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: tensors of two and more dimensions decay by `weight_decay`, vectors (norms, biases) do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class Schedule(Protocol):
    learning_rate: float
    min_learning_rate_ratio: float
    schedule: str
    warmup_steps: int
    decay_fraction: float


def learning_rate(section: Schedule, progress: float, step: int) -> float:
    """The learning rate of a step, `progress` (0 to 1) being the share of the run's training FLOPs already spent.

    wsd: linear warm-up, flat, linear to the minimum over the last `decay_fraction`; cosine: warm-up, half a cosine to
    the minimum; constant: warm-up, flat. Measured in FLOPs, the shape is the same whether or not the model grows.
    """
    floor = section.min_learning_rate_ratio
    if section.schedule == "wsd":
        left = min(1.0, (1.0 - progress) / section.decay_fraction) if section.decay_fraction else 1.0
        shape = floor + (1 - floor) * max(0.0, left)
    elif section.schedule == "cosine":
        shape = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    else:
        shape = 1.0
    warm = min(1.0, (step + 1) / section.warmup_steps) if section.warmup_steps else 1.0
    return section.learning_rate * shape * warm


def named_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state as flat tensors, "exp_avg.model.norm.weight" and so on.

    A parameter that has no state, since it has had no gradient or its moments were dropped, is written as step 0 alone.
    """
    return {
        f"{key}.{name}": value
        for name, p in model.named_parameters()
        for key, value in (optimizer.state.get(p) or {"step": torch.zeros(())}).items()
    }


def load_named_state(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put AdamW's state from `named_state` back, all of it or, when something is wrong, nothing.

    Raises ValueError unless every parameter that is trained has its step and both moments, or step 0 alone, and
    everything belongs to the model, is finite and of the right shape. Which file it came from is the caller's to say.
    """
    parameters = dict(model.named_parameters())
    states: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        key, _, name = full_name.partition(".")
        if name not in parameters:
            raise ValueError(f"optimizer state {full_name!r} belongs to no parameter of the model")
        wrong = _what_is_wrong(key, tensor, parameters[name])
        if wrong:
            raise ValueError(f"optimizer state {full_name!r} {wrong}")
        states.setdefault(name, {})[key] = tensor
    for name, p in parameters.items():
        state = states.get(name, {})
        if set(state) == {"step"} and not state["step"]:
            del states[name]
        elif state or p.requires_grad:
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if key not in state:
                    raise ValueError(f"optimizer state '{key}.{name}' is missing")
            if "birth" in state and state["birth"].max() > state["step"]:
                raise ValueError(f"optimizer state 'birth.{name}' lies after its step {state['step'].item():g}")
    for name, state in states.items():
        p = parameters[name]
        optimizer.state[p] = {key: tensor.to(p.device, copy=True) for key, tensor in state.items()}


def _what_is_wrong(key: str, tensor: Tensor, p: Tensor) -> str | None:
    """Why `tensor` cannot be the state `key` of a parameter; None if it can."""
    if key not in ("step", "exp_avg", "exp_avg_sq", "birth"):
        return "is no state of AdamW; allowed: step, exp_avg, exp_avg_sq, birth"
    shape = tuple(tensor.shape)
    if key == "step" and shape:
        return f"has shape {shape}, and a step is one number"
    if key == "birth":
        if len(shape) != p.ndim or any(n not in (1, wide) for n, wide in zip(shape, p.shape, strict=True)):
            return f"has shape {shape}, which does not spread over {tuple(p.shape)}"
    elif key != "step" and tensor.shape != p.shape:
        return f"has shape {shape}, not {tuple(p.shape)}"
    if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
        return "holds NaN or infinite values" if tensor.is_floating_point() else f"is of {tensor.dtype}, not of floats"
    if key != "exp_avg" and bool((tensor < 0).any()):
        return "holds negative values"
    return None
