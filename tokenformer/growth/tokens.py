"""Growth by parameter tokens: more rows in the tables of a TokenFormer.

A Pattention's scale is stored, so rows can be added under it. Which additions leave the function alone follows from
y = theta(x Kᵀ) V with z = scale * s / root(sum s² + eps * scale²), or z = scale * s without a norm:

zero keys   s = 0 for a new row: the sum stays, z = 0, gelu(0) = 0; the value may be anything. Exact for both L2 forms
            and those without a norm. The key's gradient is alive at once, the value's after one step; of relu2, whose
            slope at zero is zero, neither ever is, so it is refused. (Zero keys *and* zero values never wake either.)
            For softmax it is refused: exp(0) takes mass from the old rows.
zero values the key may be anything. Exact without a norm; with one, new scores would take from the old. The value's
            gradient is alive at once, the key's after one step.
rotation    zero values with keys that are mixtures of the old ones, so chosen that the sum of squared scores grows by
            the same factor for every x; the scale grows by its root, as the release's root(n) does. Exact for the norm
            over scores too. zero_keys keeps the scale: once its new rows have scores, all z are smaller.
tiling      r copies of every row: the sum becomes r times as large and the scale root(r) times (softmax: r times;
            without a norm: the same), so each copy has its old z and the values' parts sum to the old value. Exact for
            every theta.
published   random rows and the scale made anew from the row count, as in the authors' release, which also starts the
            optimizer afresh. Changes the function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ..models.axes import parameter_dims, resize
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
        others = "rotated_keys can, and tile" if config.theta == "l2_norm_gelu" else "tile can,"
        raise ValueError(
            f"operator: zero_values cannot grow theta={config.theta} exactly, since the scores of new rows enter the "
            f"norm of the old; {others} by whole multiples"
        )
    return Plan(resize(config, sizes), _padded(config, sizes, "read"), stds=_stds(config))


def rotated_keys(config: PreTrainedConfig, sizes: Sizes) -> Plan:
    """New rows whose keys are a rotation of the old keys among rows, and whose values are zero. Exact.

    With n rows so far, m new ones, and G (m, rank) of orthonormal columns drawn at random, the new keys are
    root(m / n) G R, R being the old keys or the triangle of their QR decomposition: whatever x is, the sum of its
    squared scores becomes (n + m) / n times as large. So does the square of the scale, and every old row has its old z.
    ValueError for a theta whose norm is of anything but the scores, and for m < min(n, width), where there is no G.
    """
    require_tokens(config, sizes)
    if config.theta in ("softmax", "gelu_l2_norm"):
        raise ValueError(
            f"operator: rotated_keys cannot grow theta={config.theta} exactly, since a rotation keeps the sum of "
            "squared scores, and its norm is another; tile can, by whole multiples"
        )
    sizes = {axis: size for axis, size in sizes.items() if size > getattr(config, axis)}
    scales: dict[str, float] = {}
    for axis, size in sizes.items():
        old = getattr(config, axis)
        width = config.num_attention_heads * config.head_dim if axis == "proj_tokens" else config.hidden_size
        if size < old + min(old, width):
            raise ValueError(
                f"to.{axis}: {size} is too small; rotated_keys makes {old} rows {old + min(old, width)} or more"
            )
        scales |= _scale_along(config, axis, size)

    def amend(name: str, weight: Tensor, generator: torch.Generator) -> Tensor:
        axis = parameter_dims(config, name)[0][0][0][0]
        if axis in sizes and name.endswith(".key"):
            old = getattr(config, axis)
            weight[old:] = _rotation(weight[:old].double(), len(weight) - old, generator).to(weight)
        return weight

    normed = config.theta not in WITHOUT_NORM
    maps = _padded(config, sizes, "read")
    return Plan(resize(config, sizes, scales), maps, stds=_stds(config), amend=amend, leading_moments=normed)


def _rotation(keys: Tensor, rows: int, generator: torch.Generator) -> Tensor:
    """`rows` keys B with Bᵀ B = rows / n Kᵀ K, K being the n old ones."""
    few = keys if len(keys) <= keys.shape[1] else torch.linalg.qr(keys).R
    drawn = torch.randn(rows, len(few), dtype=torch.float64, generator=generator).to(keys.device)
    return math.sqrt(rows / len(keys)) * torch.linalg.qr(drawn).Q @ few


def tile(config: PreTrainedConfig, sizes: Sizes) -> Plan:
    """Every row r times; copy c gets the share (2c + 1) / r² of its value, so that copies differ. Exact.

    Sizes must be whole multiples. The values' moments push forward exactly, and so do those of a gated layer's second
    keys. The keys' gradient also passes through the norm, where the copies share alike: the leading term is carried.
    """
    require_tokens(config, sizes)
    maps: dict[str, AxisMap] = {}
    scales: dict[str, float] = {}
    for axis, size in sizes.items():
        old = getattr(config, axis)
        if size % old:
            near = f"{size // old * old} or {(size // old + 1) * old}"
            raise ValueError(f"to.{axis}: {size} is not a multiple of the model's {old}; for tile, nearest: {near}")
        source = torch.arange(size) % old
        maps[axis] = copied(source, unequal_shares(source))
        scales |= _scale_along(config, axis, size)
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


def _scale_along(config: PreTrainedConfig, axis: str, size: int) -> dict[str, float]:
    """The axis's scale, which grows as that of a new layer does."""
    scale = axis.replace("_tokens", "_scale")
    factor = default_scale(config.theta, size) / default_scale(config.theta, getattr(config, axis))
    return {scale: getattr(config, scale) * factor}


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
