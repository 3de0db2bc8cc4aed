"""Growth by parameter tokens: more rows in the tables of a TokenFormer.

A Pattention's scale is stored, so rows can be added under it. Which additions leave the function alone follows from
y = theta(x Kᵀ) V with z = scale * s / root(sum s² + eps * scale²):

zero keys   s = 0 for a new row: the sum stays, z = 0, gelu(0) = 0; the value may be anything. Exact for both L2 forms.
            The key's gradient is alive at once, the value's after one step. (Zero keys *and* zero values never wake.)
            For softmax it is refused: exp(0) takes mass from the old rows.
tiling      r copies of every row: the sum becomes r times as large and the scale root(r) times (softmax: r times), so
            each copy has its old z and the values' parts sum to the old value. Exact for every theta.
published   random rows and the scale made anew from the row count, as in the authors' release, which also starts the
            optimizer afresh. Changes the function.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ..models.tokenformer import initial_stds
from ..pattention import default_scale
from .plan import Fill, Plan


def zero_keys(config: PreTrainedConfig, sizes: dict[str, int]) -> Plan:
    """New rows with zero keys and random values under the stored scale. Exact; ValueError for softmax."""
    if config.theta == "softmax":
        raise ValueError(
            "operator: zero_keys cannot grow theta=softmax exactly, since exp(0) = 1 takes weight from the old rows; "
            "tile can"
        )

    def fill(name: str, axis: str) -> Fill:
        key_std, value_std = initial_stds(config, axis.removesuffix("_tokens"))
        return Fill(new_std={"key": 0.0, "up": key_std, "value": value_std}[name.rsplit(".", 1)[-1]])

    return Plan(_resized(config, sizes), _appended(config, sizes), fill, "exact")


def tile(config: PreTrainedConfig, sizes: dict[str, int]) -> Plan:
    """Every row r times; copy c gets the share (2c + 1) / r² of its value, so that copies differ. Exact.

    Sizes must be whole multiples. The values' moments push forward exactly, and so do those of a gated layer's second
    keys. The keys' gradient also passes through the norm, where the copies share alike: the leading term is carried.
    """
    copies = {}
    for axis, size in sizes.items():
        old = getattr(config, axis)
        if size % old:
            near = f"{size // old * old} or {(size // old + 1) * old}"
            raise ValueError(f"to.{axis}: {size} is not a multiple of the model's {old}; for tile, nearest: {near}")
        copies[axis] = size // old
    slots = {axis: torch.arange(size) % getattr(config, axis) for axis, size in sizes.items()}

    def fill(name: str, axis: str) -> Fill:
        r, old = copies[axis], getattr(config, axis)
        share = (2.0 * torch.arange(r, dtype=torch.float64) + 1) / r**2
        share = share.repeat_interleave(old)
        return Fill(weight=share) if name.endswith(".value") else Fill(moment=share)

    scales = {}
    for axis, r in copies.items():
        scale = axis.replace("_tokens", "_scale")
        scales[scale] = getattr(config, scale) * (r if config.theta == "softmax" else math.sqrt(r))
    return Plan(_resized(config, sizes | scales), slots, fill, "exact")


def published(config: PreTrainedConfig, sizes: dict[str, int]) -> Plan:
    """Random rows, the scale recomputed from the new count, no optimizer state: the release's way. Approximate."""

    def fill(name: str, axis: str) -> Fill:
        key_std, value_std = initial_stds(config, axis.removesuffix("_tokens"))
        return Fill(new_std=value_std if name.endswith(".value") else key_std)

    scales = {axis.replace("_tokens", "_scale"): default_scale(config.theta, size) for axis, size in sizes.items()}
    note = "the scale is recomputed from the row count and new rows are random: the function changes"
    plan_config = _resized(config, sizes | scales)
    return Plan(plan_config, _appended(config, sizes), fill, "approximate", note, drops_moments=True)


OPERATORS: dict[str, Callable[[PreTrainedConfig, dict[str, int]], Plan]] = {
    "zero_keys": zero_keys,
    "tile": tile,
    "published": published,
}


def _appended(config: PreTrainedConfig, sizes: dict[str, int]) -> dict[str, Tensor]:
    """Slot maps that keep the old rows in front and mark the rest as new."""
    slots = {}
    for axis, size in sizes.items():
        old = getattr(config, axis)
        slots[axis] = torch.cat([torch.arange(old), torch.full((size - old,), -1)])
    return slots


def _resized(config: PreTrainedConfig, changes: Mapping[str, int | float]) -> PreTrainedConfig:
    """A copy of the configuration with new sizes and scales; refuses token axes that the model does not have."""
    for axis in changes:
        if axis not in ("qkv_tokens", "proj_tokens", "ffn_tokens", "qkv_scale", "proj_scale", "ffn_scale"):
            raise ValueError(f"to.{axis}: parameter tokens grow along ffn, qkv and proj only")
        if config.attention_projections == "linear" and axis in ("qkv_tokens", "proj_tokens"):
            raise ValueError(f"to.{axis}: this model's attention projections are linear and hold no parameter tokens")
    resized = copy.deepcopy(config)
    for key, value in changes.items():
        setattr(resized, key, value)
    return resized
