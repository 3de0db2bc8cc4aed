"""Whether a plan keeps the function, read off its maps, and why not; and the epsilon that the norms then need."""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import PreTrainedConfig

from ..models.axes import axis_sizes, norm_kind, table_of
from .plan import AVERAGE, FRESH, AxisMap, Layer, Plan, identity
from .tensors import mean_square_factor


def why_not_exact(config: PreTrainedConfig, plan: Plan) -> list[str]:
    """Everything by which the grown model could compute something else; empty if it computes the same."""
    numbered = _number_reasons(config, plan.layers or ())
    if plan.ramp_steps:
        return numbered
    reasons = [plan.approximate] if plan.approximate else []
    if plan.next_layer:
        reasons.append("second copies take the weights of the layer above")
    if plan.shrink != 1.0 or plan.perturb:
        reasons.append("old weights are shrunk and perturbed")
    for axis, m in plan.maps.items():
        reasons += [f"{axis}: {reason}" for reason in _axis_reasons(config, axis, m)]
    if plan.layers is not None:
        reasons += numbered + _layer_reasons(config, plan.layers)
    return reasons


def _axis_reasons(config: PreTrainedConfig, axis: str, m: AxisMap) -> list[str]:
    table, reasons = table_of(config), []
    kept = m.source >= 0
    old = axis_sizes(config)[axis]
    sums = torch.zeros(old, dtype=torch.float64).index_add_(0, m.source[kept], (m.read * m.write)[kept])
    if not torch.allclose(sums, torch.ones_like(sums), atol=1e-12):
        reasons.append("the shares of the copies do not sum to 1")
    if bool((m.source == FRESH).any()) and m.fresh_write == m.fresh_read == "random":
        reasons.append("new entries are random on the side that writes and on the side that reads")
    if axis in table.norms and table.unit_norm:
        if bool(m.fresh.any()):
            reasons.append("what reads and what writes it are unit vectors, so neither side of a new entry can be zero")
    elif axis in table.norms:
        kind = norm_kind(config, axis)
        counts = torch.zeros(old, dtype=torch.float64).index_add_(0, m.source[kept], m.write[kept] ** 2)
        if not torch.allclose(counts, counts[:1].expand(old)):
            reasons.append("some entries would be counted more often than others by the norm over them")
        if kind == "layer" and bool((m.source == FRESH).any()):
            reasons.append("LayerNorm takes mean and variance over the new entries too, so they cannot be zeros")
        if kind == "rms" and bool((m.source == FRESH).any()) and m.fresh_write != "zero":
            reasons.append("what is written into new entries changes the norm over them")
    elif not table.unit_norm and not torch.equal(m.write[kept], torch.ones_like(m.write[kept])):
        reasons.append("a nonlinearity stands between what writes it and what reads it, so writers cannot be rescaled")
    return reasons


def _number_reasons(config: PreTrainedConfig, layers: tuple[Layer, ...]) -> list[str]:
    """Fields by which an old layer computes something else where it has another number."""
    numbers = [i for i, layer in enumerate(layers) if layer.source >= 0 and not layer.closed]
    if numbers == list(range(len(numbers))):
        return []
    fields = [field for field in table_of(config).by_layer if getattr(config, field)]
    return [f"{field} makes a layer depend on its number, so that new ones can only be at the end" for field in fields]


def _layer_reasons(config: PreTrainedConfig, layers: tuple[Layer, ...]) -> list[str]:
    if [layer.source for layer in layers if not layer.closed] != list(range(config.num_hidden_layers)):
        return ["layers are repeated or new, and add to the residual stream at once"]
    return []


def moments_are_exact(config: PreTrainedConfig, plan: Plan) -> bool:
    """Whether gradients push forward exactly by the plan's factors.

    Where a norm runs over copies with unequal shares, or over means, a part of the gradient comes through the norm,
    which shares alike: then the leading term is carried. So it is under noise, by which the readers of copies differ.
    """
    normed = {axis for axis in plan.maps if axis in table_of(config).norms or axis.endswith("_tokens")}
    for axis in normed - ({"hidden"} if table_of(config).unit_norm else set()):
        m = plan.maps[axis]
        kept = m.source >= 0
        if bool((m.source == AVERAGE).any()) or not torch.allclose(m.read[kept], m.read[kept][:1]):
            return False
    return not (plan.leading_moments or plan.noise) and not why_not_exact(config, plan)


def settled(config: PreTrainedConfig, plan: Plan) -> Plan:
    """The plan with what the architecture asks for: each layer's kind of attention, and what its norms need.

    Growth by zeros divides the mean square by h'/h; so must the epsilon be, or small activations are normalised
    otherwise. All norms share one epsilon: those over other axes are brought to the same factor by rescaling what
    writes these, except where a nonlinearity writes them, and then the others follow. Unit vectors (nGPT) stay so if
    copies take the root of their share on both sides.
    """
    table = table_of(config)
    kinds = config.__dict__.get("layer_types")
    if plan.layers is not None and isinstance(kinds, list) and kinds:
        plan.config.layer_types = [kinds[max(0, layer.source)] for layer in plan.layers]
    if plan.ramp_steps:
        return plan
    if table.unit_norm:
        shares = {axis: m.read**0.5 for axis, m in plan.maps.items() if axis in table.norms}
        roots = {axis: replace(plan.maps[axis], write=root, read=root) for axis, root in shares.items()}
        return replace(plan, maps={**plan.maps, **roots})
    rho = {axis: mean_square_factor(plan.maps[axis]) if axis in plan.maps else 1.0 for axis in table.norms}
    if all(abs(value - 1) < 1e-12 for value in rho.values()):
        return plan
    leading = next((axis for axis in table.fixed_writers if axis in rho), next(iter(rho)))
    target, sizes = rho[leading], axis_sizes(config)
    maps = dict(plan.maps)
    for axis, value in rho.items():
        if abs(value - target) > 1e-12:
            m = maps.get(axis) or identity(sizes[axis])
            maps[axis] = replace(m, scale=(target / value) ** 0.5)
    setattr(plan.config, table.eps, getattr(config, table.eps) * target)
    return replace(plan, maps=maps)
