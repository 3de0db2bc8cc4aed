"""Growth by parameter tokens: more rows in the tables of a TokenFormer.

A Pattention's scale is stored, so rows can be added under it. Which additions leave the function alone follows from
y = theta(x Kᵀ) V with z = scale * s / root(sum s² + eps * scale²), or z = scale * s without a norm:

zero keys   s = 0 for a new row: the sum stays, z = 0, gelu(0) = 0; the value may be anything. Exact for both L2 forms
            and those without a norm. The key's gradient is alive at once, the value's after one step; of relu2, whose
            slope at zero is zero, neither ever is, so it is refused. (Zero keys *and* zero values never wake either.)
            For softmax it is refused: exp(0) takes mass from the old rows.
zero values the key may be anything. Exact without a norm; with one, new scores would take from the old. The value's
            gradient is alive at once, the key's after one step.
tiling      r copies of every row: the sum becomes r times as large and the scale root(r) times (softmax: r times;
            without a norm: the same), so each copy has its old z and the values' parts sum to the old value. Exact for
            every theta.
published   random rows and the scale made anew from the row count, as in the authors' release, which also starts the
            optimizer afresh. Changes the function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from transformers import PreTrainedConfig

from ..models.axes import resize
from ..models.tokenformer import initial_stds
from ..pattention import WITHOUT_NORM, default_scale
from .plan import AxisMap, Plan, copied, padded
from .width import unequal_shares

Sizes = Mapping[str, int]


def zero_keys(config: PreTrainedConfig, sizes: Sizes) -> Plan:
    """New rows with zero keys and random values under the stored scale. Exact; ValueError for softmax and relu2."""
    if config.theta == "softmax":
        raise ValueError(
            "operator: zero_keys cannot grow theta=softmax exactly, since exp(0) = 1 takes weight from the old rows; "
            "tile can, by whole multiples"
        )
    if config.theta == "relu2":
        raise ValueError(
            "operator: zero_keys would add dead rows to theta=relu2, whose slope at a score of zero is zero; "
            "zero_values can"
        )
    require_tokens(config, sizes)
    return Plan(resize(config, sizes), _padded(config, sizes, "write"), stds=_stds(config))


def zero_values(config: PreTrainedConfig, sizes: Sizes) -> Plan:
    """New rows with random keys and zero values. Exact without a norm; ValueError for a theta that has one."""
    require_tokens(config, sizes)
    if config.theta not in WITHOUT_NORM:
        raise ValueError(
            f"operator: zero_values cannot grow theta={config.theta} exactly, since the scores of new rows enter the "
            "norm of the old; tile can, by whole multiples"
        )
    return Plan(resize(config, sizes), _padded(config, sizes, "read"), stds=_stds(config))


def tile(config: PreTrainedConfig, sizes: Sizes) -> Plan:
    """Every row r times; copy c gets the share (2c + 1) / r² of its value, so that copies differ. Exact.

    Sizes must be whole multiples. The values' moments push forward exactly, and so do those of a gated layer's second
    keys. The keys' gradient also passes through the norm, where the copies share alike: the leading term is carried.
    """
    require_tokens(config, sizes)
    maps, scales = {}, {}
    for axis, size in sizes.items():
        old = getattr(config, axis)
        if size % old:
            near = f"{size // old * old} or {(size // old + 1) * old}"
            raise ValueError(f"to.{axis}: {size} is not a multiple of the model's {old}; for tile, nearest: {near}")
        source = torch.arange(size) % old
        maps[axis] = copied(source, unequal_shares(source))
        scale = axis.replace("_tokens", "_scale")
        scales[scale] = getattr(config, scale) * default_scale(config.theta, size) / default_scale(config.theta, old)
    return Plan(resize(config, sizes, scales), maps)


def published(config: PreTrainedConfig, sizes: Sizes) -> Plan:
    """Random rows, the scale recomputed from the new count, no optimizer state: the release's way. Approximate."""
    require_tokens(config, sizes)
    scales = {axis.replace("_tokens", "_scale"): default_scale(config.theta, size) for axis, size in sizes.items()}
    why = "the scale is recomputed from the row count and new rows are random"
    return Plan(
        resize(config, sizes, scales),
        _padded(config, sizes, "none"),
        stds=_stds(config),
        approximate=why,
        drops_moments=True,
    )


def require_tokens(config: PreTrainedConfig, sizes: Sizes) -> None:
    for axis in sizes:
        if config.attention_projections == "linear" and axis in ("qkv_tokens", "proj_tokens"):
            raise ValueError(f"to.{axis}: this model's attention projections are linear and hold no parameter tokens")


def _padded(config: PreTrainedConfig, sizes: Sizes, closed: str) -> dict[str, AxisMap]:
    return {axis: padded(getattr(config, axis), size, closed) for axis, size in sizes.items()}


def _stds(config: PreTrainedConfig) -> Callable[[str, str], float | None]:
    """Spread of new rows: that of a new model's keys and values."""

    def std(name: str, axis: str) -> float | None:
        table = name.rsplit(".", 1)[-1]
        if not axis.endswith("_tokens") or table not in ("key", "value"):
            return None
        return initial_stds(config, axis.removesuffix("_tokens"))[table == "value"]

    return std
