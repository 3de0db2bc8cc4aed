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
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedConfig, PreTrainedModel

from ..models.axes import Dim, axis_sizes, norm_kind, parameter_dims, table_of
from .carried import ordinary_name
from .depth import new_blocks
from .plan import FRESH, Plan, padded
from .tensors import TensorMaps
from .width import grown_axes

AXES = ("hidden", "ffn", "group", "kv_heads")


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
        self.masks: list[tuple[nn.Module, str, _Factors]] = []
        self._attach()
        self._set()
        model.carried = self

    def _attach(self) -> None:
        config = self.model.config
        maps = TensorMaps(config, Plan(config))
        for module_name, module in list(self.model.named_modules()):
            for key, p in list(module.named_parameters(recurse=False)):
                name = f"{module_name}.{key}"
                # A tied head has the embedding's name in the tables.
                tied = module is self.model.get_output_embeddings() and maps.tied
                dims = parameter_dims(config, self._embedding_name() if tied else name)
                powers = [_exponents(config, dim, self.old) for dim in dims]
                if maps.layer_of(name) in self.layers and maps.closes(name):
                    powers[0][0].add_(1)
                if any(bool(power.any()) for pair in powers for power in pair):
                    factors = _Factors(powers, p)
                    parametrize.register_parametrization(module, key, factors)
                    self.masks.append((module, key, factors))
            if self.weighs_norms and isinstance(module, nn.LayerNorm) and module.normalized_shape == (self.hidden,):
                parent, _, key = module_name.rpartition(".")
                self.norms.append((self.model.get_submodule(parent), key, module))
        for parent, key, norm in self.norms:
            setattr(parent, key, WeightedLayerNorm(norm, self.old["hidden"]).to(self.model.device, self.model.dtype))

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
        for module, key, _ in self.masks:
            parametrize.remove_parametrizations(module, key, leave_parametrized=False)
        for parent, key, norm in self.norms:
            setattr(parent, key, norm)
        del self.model.carried

    @torch.no_grad()
    def ordinary(self) -> dict[str, Tensor]:
        """The parameters times their factors; with LayerNorm over new channels, the parameters as they are at m = 1."""
        done: dict[Tensor, Tensor] = {}  # tied parameters are one tensor again
        state = self.model.state_dict()
        for module_name, module in self.model.named_modules():
            for key in getattr(module, "parametrizations", {}):
                raw = module.parametrizations[key].original
                if raw not in done:
                    done[raw] = raw.detach() if self.weighs_norms else getattr(module, key).detach()
                state[f"{module_name}.parametrizations.{key}.original"] = done[raw]
        return {ordinary_name(name): tensor for name, tensor in state.items()}

    def tensors(self) -> dict[str, Tensor]:
        if self.weighs_norms:
            return {}
        parameters = self.model.named_parameters()
        return {ordinary_name(name): p.detach() for name, p in parameters if ordinary_name(name) != name}

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


def _exponents(config: PreTrainedConfig, dim: Dim, old: dict[str, int]) -> tuple[Tensor, Tensor]:
    """For each entry of a dimension the powers of m and of c = S / d that it is multiplied by."""
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


class _Factors(nn.Module):
    """A parametrization: a parameter times one factor along each of its dimensions, m^p c^q."""

    def __init__(self, powers: list[tuple[Tensor, Tensor]], like: Tensor) -> None:
        super().__init__()
        self.powers = {f"dim{i}": pair for i, pair in enumerate(powers) if any(bool(power.any()) for power in pair)}
        for key, (p, _) in self.powers.items():
            shape = [len(p) if f"dim{i}" == key else 1 for i in range(like.ndim)]
            self.register_buffer(key, torch.ones(shape, dtype=like.dtype, device=like.device), persistent=False)

    def forward(self, parameter: Tensor) -> Tensor:
        for key in self.powers:
            parameter = parameter * getattr(self, key)
        return parameter

    @torch.no_grad()
    def set(self, mask: float, share: float) -> None:
        for key, (p, q) in self.powers.items():
            factor = getattr(self, key)
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
