"""Masked growth (MSG, arXiv 2305.02869; FLM-101B, arXiv 2309.03852): new entries of any value, faded in by training.

Everything new is multiplied by a mask m that rises from 0 to 1 over a number of training steps: feed-forward units,
heads, key-value groups, hidden channels after a norm, what a new layer adds to the residual stream. The norms count a
new channel with the weight m. With w_i = 1 for old channels, m for new ones and S = sum w_i, d channels in all:

    RMSNorm     w_i g_i x_i / root(sum w_j x_j² / S + eps)
    LayerNorm   w_i (g_i (x_i - mean) / root(sum w_j (x_j - mean)² / S + eps) + b_i),  mean = sum w_j x_j / S

So at m = 0 the model computes what the small one did, whatever the new entries are, and at m = 1 it is an ordinary one.
All but LayerNorm is a factor on each entry of each parameter: readers of a new unit times m; and for RMSNorm, with
c = S / d, writers of a channel times root(w_i / c), gains times root(w_i c), since the norm takes a common factor away.
The ordinary form of a model in mid-ramp is its parameters times those factors. LayerNorm has no such form, and is
replaced by a module with weights while the mask rises; checkpoints then hold the model as it is at m = 1.

At m = 0 no gradient reaches the new entries: the first training step after the growth is the small model's.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..models.axes import Dim, axis_sizes, norm_kind, parameter_dims, table_of
from .depth import new_blocks
from .plan import FRESH, Plan, padded
from .tensors import TensorMaps
from .width import grown_axes

AXES = ("hidden", "ffn", "group", "kv_heads")
Powers = tuple[Tensor, Tensor]  # of m and of c = S / d, for each entry of a dimension


def masked(config: PreTrainedConfig, sizes: Mapping[str, int], ramp_steps: int = 0, where: str = "spread") -> Plan:
    """Masked growth (MSG, arXiv 2305.02869): new entries random on all sides, times a mask that rises from 0 to 1 over
    `ramp_steps` training steps. Exact, under LayerNorm too, since norms count new channels by the mask.

    `where` new layers go: "spread" among the old ones, or at the "end".
    """
    if ramp_steps < 1:
        raise ValueError(f"ramp_steps: {ramp_steps}; masked needs the number of training steps, at least 1")
    table = table_of(config)
    if table.unit_norm:
        raise ValueError(f"operator: masked does not fit {config.model_type}, whose vectors are kept at unit length")
    new, grown = grown_axes(config, sizes)
    for axis in grown:
        if axis not in AXES:
            raise ValueError(f"operator: masked does not grow {axis}, and these sizes change it; zero does")
    layers = new_blocks(config, new.num_hidden_layers, where, closed=False)
    maps = {axis: padded(old, size, closed="none") for axis, (old, size) in grown.items()}
    return Plan(new, maps, layers, ramp_steps=ramp_steps)


def attach(model: PreTrainedModel, before: PreTrainedConfig, plan: Plan) -> Masked:
    """The mask of a model that was just grown by the plan, at 0."""
    sizes = axis_sizes(before)
    layers = [i for i, layer in enumerate(plan.layers or ()) if layer.source == FRESH]
    return Masked(model, {axis: sizes[axis] for axis in plan.maps}, layers, plan.ramp_steps)


class Masked:
    """The mask on a model. old: axis -> how many of its slots are old; layers: the numbers of the new ones."""

    kind = "masked"

    def __init__(
        self, model: PreTrainedModel, old: dict[str, int], layers: list[int], ramp_steps: int, steps: int = 0
    ) -> None:
        self.model, self.old, self.layers, self.ramp_steps, self.steps = model, old, layers, ramp_steps, steps
        self.weighs_norms = "hidden" in old and norm_kind(model.config, "hidden") == "layer"
        self.hidden = axis_sizes(model.config)["hidden"]
        self.norms: list[tuple[nn.Module, str, nn.LayerNorm]] = []
        self.masks: list[tuple[str, nn.Module, _Factors]] = []  # name, module
        self._attach()
        self._set()
        model.carried = self

    def _attach(self) -> None:
        config = self.model.config
        maps = TensorMaps(config, Plan(config))
        for name, module in list(self.model.named_modules()):
            powers: dict[str, list[Powers]] = {}
            for key, _ in module.named_parameters(recurse=False):
                tied = maps.tied and module is self.model.get_output_embeddings()
                full_name = self._embedding_name() if tied else f"{name}.{key}"
                exponents = [_exponents(config, dim, self.old) for dim in parameter_dims(config, full_name)]
                if maps.layer_of(full_name) in self.layers and maps.closes(full_name):
                    exponents[0][0].add_(1)
                if any(bool(power.any()) for pair in exponents for power in pair):
                    powers[key] = exponents
            if powers:
                factors = _Factors(powers).to(self.model.device, self.model.dtype)
                module.add_module(_Factors.place, factors)
                kind: Any = type(module)
                module.__class__ = masked_class(kind, tuple(powers))
                self.masks.append((name, module, factors))
            if self.weighs_norms and isinstance(module, nn.LayerNorm) and module.normalized_shape == (self.hidden,):
                parent, _, key = name.rpartition(".")
                self.norms.append((self.model.get_submodule(parent), key, module))
        for parent, key, norm in self.norms:
            weighted = WeightedLayerNorm(norm, self.old["hidden"])
            setattr(parent, key, weighted.to(self.model.device, self.model.dtype))

    def _embedding_name(self) -> str:
        table = self.model.get_input_embeddings()
        return next(f"{name}.weight" for name, module in self.model.named_modules() if module is table)

    @property
    def mask(self) -> float:
        return min(1.0, self.steps / self.ramp_steps)

    @property
    def finished(self) -> bool:
        return self.steps >= self.ramp_steps

    def advance(self) -> None:
        self.steps += 1
        self._set()

    def _set(self) -> None:
        m, old = self.mask, self.old.get("hidden", self.hidden)
        share = (old + m * (self.hidden - old)) / self.hidden
        for _, _, factors in self.masks:
            factors.set(m, share)
        for parent, key, _ in self.norms:
            getattr(parent, key).set(m)

    def remove(self) -> None:
        assert self.finished  # every factor is 1
        for _, module, _ in self.masks:
            module.__class__ = type(module).__bases__[0]
            delattr(module, _Factors.place)
        for parent, key, norm in self.norms:
            setattr(parent, key, norm)
        del self.model.carried

    @torch.no_grad()
    def ordinary(self) -> dict[str, Tensor]:
        """The parameters times their factors; with LayerNorm over new channels, the parameters as they are at m = 1."""
        state = self.model.state_dict()
        if not self.weighs_norms:
            done: dict[int, Tensor] = {}  # tied parameters stay one tensor
            for name, module, key in self._masked_parameters():
                state[name] = done.setdefault(id(module._parameters[key]), getattr(module, key))
        return state

    def tensors(self) -> dict[str, Tensor]:
        if self.weighs_norms:
            return {}
        masked = {name for name, _, _ in self._masked_parameters()}
        return {name: p.detach() for name, p in self.model.named_parameters() if name in masked}

    def _masked_parameters(self) -> list[tuple[str, nn.Module, str]]:
        return [(f"{name}.{key}", module, key) for name, module, factors in self.masks for key in factors.powers]

    def describe(self) -> dict[str, Any]:
        form = "the model at the end of the ramp" if self.weighs_norms else "what the model computes now"
        sizes = {"old": self.old, "layers": self.layers, "ramp_steps": self.ramp_steps, "steps": self.steps}
        return {"kind": self.kind, **sizes, "model.safetensors": form}

    @classmethod
    @torch.no_grad()
    def restored(cls, model: PreTrainedModel, description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        parameters = dict(model.named_parameters())
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)
        cls(model, *(description[key] for key in ("old", "layers", "ramp_steps", "steps")))


def _exponents(config: PreTrainedConfig, dim: Dim, old: dict[str, int]) -> Powers:
    """The powers that each entry of a dimension is multiplied by."""
    sizes, parts = axis_sizes(config), []
    for part in dim:
        mask, share = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        for axis, mark in part:
            new = (torch.arange(sizes[axis]) >= old.get(axis, sizes[axis])).double()
            of_mask, of_share = _powers(config, axis, mark) if axis in old else (0.0, 0.0)
            mask = torch.maximum(mask[:, None], (new * of_mask)[None, :]).flatten()  # once, however many axes are new
            share = (share[:, None] + torch.full_like(new, of_share)[None, :]).flatten()
        parts.append((mask, share))
    return torch.cat([mask for mask, _ in parts]), torch.cat([share for _, share in parts])


def _powers(config: PreTrainedConfig, axis: str, mark: str) -> tuple[float, float]:
    if axis != "hidden":
        return (1.0, 0.0) if mark == "<" else (0.0, 0.0)
    if norm_kind(config, axis) == "layer":
        return 0.0, 0.0
    if mark == "@" and config.tie_word_embeddings:  # the head is written as the embedding is
        return 0.0, 1.0
    return {">": (0.5, -0.5), "=": (0.5, 0.5), "@": (0.5, 0.5)}.get(mark, (0.0, 0.0))


@cache
def masked_class(kind: Any, keys: tuple[str, ...]) -> type:
    """A module's class, but its parameters `keys` read as what they are times their factors.

    The parameters themselves stay where they are, under their names, for optimizers and state dicts.
    """

    def product(key: str) -> property:
        return property(lambda module: getattr(module, _Factors.place)(key, module._parameters[key]))

    return type(f"Masked{kind.__name__}", (kind,), {key: product(key) for key in keys})


class _Factors(nn.Module):
    """What the parameters of a module are multiplied by: one factor along each of their dimensions, m^p c^q."""

    place = "growth_mask"  # the attribute of the module that it is

    def __init__(self, powers: dict[str, list[Powers]]) -> None:
        super().__init__()
        self.powers = {
            key: {i: pair for i, pair in enumerate(of) if any(bool(power.any()) for power in pair)}
            for key, of in powers.items()
        }
        for key, of in self.powers.items():
            for i, (p, _) in of.items():
                shape = [len(p) if k == i else 1 for k in range(len(powers[key]))]
                self.register_buffer(f"{key}{i}", torch.ones(shape), persistent=False)

    def forward(self, key: str, parameter: Tensor) -> Tensor:
        for i in self.powers[key]:
            parameter = parameter * getattr(self, f"{key}{i}")
        return parameter

    @torch.no_grad()
    def set(self, mask: float, share: float) -> None:
        for key, of in self.powers.items():
            for i, (p, q) in of.items():
                factor = getattr(self, f"{key}{i}")
                factor.copy_((torch.full_like(p, mask) ** p * torch.full_like(q, share) ** q).view_as(factor))


class WeightedLayerNorm(nn.Module):
    """LayerNorm in whose mean, variance and result the channels after the first `old` count with the weight m."""

    mask: Tensor

    def __init__(self, norm: nn.LayerNorm, old: int) -> None:
        super().__init__()
        self.weight, self.bias, self.eps, self.old = norm.weight, norm.bias, norm.eps, old
        self.register_buffer("mask", torch.ones(norm.normalized_shape), persistent=False)

    @torch.no_grad()
    def set(self, mask: float) -> None:
        self.mask[self.old :] = mask

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # as autocast has it of LayerNorm
        weights = self.mask.to(x)
        total = weights.sum()
        centered = x - (x * weights).sum(-1, keepdim=True) / total
        y = centered * torch.rsqrt((centered.square() * weights).sum(-1, keepdim=True) / total + self.eps)
        if self.weight is not None:
            y = y * self.weight
        if self.bias is not None:
            y = y + self.bias
        return y * weights
