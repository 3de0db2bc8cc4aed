"""Wider layers: hidden size, feed-forward, query heads, key-value groups, head width; of any architecture with a table.

Most are pairs of maps (see plan.py) with Rᵀ W = 1, so that they keep the function; they differ in where new slots come
from and in how readers share among copies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ..models.axes import axis_sizes, norm_kind, resize, size_of, table_of
from .depth import closed_copies, new_blocks
from .plan import AVERAGE, FRESH, AxisMap, Plan, copied, padded

Sizes = Mapping[str, int]


def zero(config: PreTrainedConfig, sizes: Sizes, **options: Any) -> Plan:
    """Composable function-preserving expansions (arXiv 2308.06103): one side of every new entry zero, the other random.

    Entries that a norm runs over are closed where they are written, all others where they are read. With what the paper
    leaves out: the norm's epsilon moves with its gain, query heads are inserted into their key-value groups, new layers
    add nothing. Exact, but for LayerNorm over the grown axis, which no zeros leave alone.
    """
    new, grown = grown_axes(config, sizes, kept_rotary(config, sizes))
    table, maps = table_of(config), {}
    for axis, (old, size) in grown.items():
        maps[axis] = padded(old, size, closed="write" if axis in table.norms and axis != "head_dim" else "read")
    if "head_dim" in grown:  # attention divides by the root of the new width; queries, which write it, make up for that
        old, size = grown["head_dim"]
        maps["head_dim"] = replace(maps["head_dim"], scale=math.sqrt(size / old))
    return Plan(new, maps, new_blocks(config, new.num_hidden_layers))


def net2wider(config: PreTrainedConfig, sizes: Sizes, noise: float = 0.0, seed: int = 0) -> Plan:
    """Net2Wider (arXiv 1511.05641): new units are copies of old ones drawn at random, readers share alike.

    Exact; over a norm only for whole multiples, where every entry is drawn equally often. Copies stay equal but for
    `noise`, which sums to zero over the copies that a reader takes.
    """
    new, grown = grown_axes(config, sizes)
    generator = torch.Generator().manual_seed(seed)
    maps = {}
    for axis, (old, size) in grown.items():
        drawn = torch.randint(old, (size - old,), generator=generator)
        if axis in table_of(config).norms:
            rounds = [torch.randperm(old, generator=generator) for _ in range(-(-(size - old) // old))]
            drawn = torch.cat(rounds)[: size - old]
        maps[axis] = copied(torch.cat([torch.arange(old), drawn]))
    return Plan(new, maps, noise=noise)


def fpi(config: PreTrainedConfig, sizes: Sizes) -> Plan:
    """bert2BERT's function-preserving initialisation (arXiv 2110.07143): Net2Wider on every matrix of a Transformer,
    heads as wholes, units repeated in order. Exact; over a norm for whole multiples."""
    new, grown = grown_axes(config, sizes)
    return Plan(new, {axis: copied(torch.arange(size) % old) for axis, (old, size) in grown.items()})


def aki(config: PreTrainedConfig, sizes: Sizes) -> Plan:
    """bert2BERT's advanced knowledge initialisation (arXiv 2110.07143): as FPI, but second copies are made by the
    weights of the layer above, so that copies differ from the start; what reads them is FPI's. Changes the function."""
    return replace(fpi(config, sizes), next_layer=True)


def lemon(config: PreTrainedConfig, sizes: Sizes) -> Plan:
    """LEMON (arXiv 2310.07999): copies whose readers get unequal shares, (2c + 1) / k² for copy c of k; any width.

    Where a norm runs over the axis and the size is no multiple, what is left over holds zeros under RMSNorm and the
    mean of all channels under LayerNorm, and the gain makes up for it. Layers are copies whose last projections are
    zero.
    """
    new, grown = grown_axes(config, sizes)
    maps = {}
    for axis, (old, size) in grown.items():
        source = torch.arange(size) % old
        if axis in table_of(config).norms:
            rest = AVERAGE if norm_kind(config, axis) == "layer" else FRESH
            source[size // old * old :] = rest
        maps[axis] = copied(source, unequal_shares(source))
    return Plan(new, maps, closed_copies(config, new.num_hidden_layers))


def hyperclone(config: PreTrainedConfig, sizes: Sizes, noise: float = 0.0) -> Plan:
    """HyperCloning (arXiv 2409.12903): whole multiples, everything tiled, readers share alike; with `noise` (relative
    to the weights) that sums to zero over the copies, so that it breaks their symmetry and not the function."""
    for field, size in sizes.items():
        old = size_of(config, field)
        if size % old:
            raise ValueError(f"to.{field}: {size} is not a multiple of {old}; hyperclone tiles whole copies, not lemon")
    return replace(fpi(config, sizes), noise=noise)


def staged(config: PreTrainedConfig, sizes: Sizes, noise: float = 0.0) -> Plan:
    """Staged training's width operator (arXiv 2203.06211): all widths twice as large, every matrix block-diagonal, each
    copy reading its own; the last norm's gain halved.

    Exact, and exactly symmetric: without dropout the halves stay equal for ever. `noise` breaks that: it sums to zero
    over the two copies that a reader takes, so the function stays.
    """
    if table_of(config).unit_norm or "kv_heads" not in axis_sizes(config):
        raise ValueError(f"operator: staged doubles every width at once, and {config.model_type}'s heads it cannot")
    new, grown = grown_axes(config, sizes)
    wanted = {axis for axis in ("hidden", "ffn", "kv_heads") if axis in axis_sizes(config)}
    halves = {axis for axis, (old, size) in grown.items() if size == 2 * old}
    if wanted != halves or halves != set(grown):
        fields = {axis: field for field, axis in table_of(config).grows.items()}
        need = {fields[axis]: 2 * axis_sizes(config)[axis] for axis in sorted(wanted) if axis in fields}
        if need == sizes:
            kind = config.model_type
            raise ValueError(f"to: staged doubles every width at once, and those of {kind} do not all double")
        raise ValueError(f"to: staged doubles every width at once: {', '.join(f'{f}={n}' for f, n in need.items())}")
    maps = {axis: copied(torch.arange(size) % old) for axis, (old, size) in grown.items()}
    return Plan(new, maps, blocks=True, noise=noise)


def sparkling(config: PreTrainedConfig, sizes: Sizes, source: str = "copy") -> Plan:
    """SPARKLING (arXiv 2602.02472): new channels copied or random, scaled so that the root mean square of activations
    stays; optimizer state reset for the new channels only (and their learning rate warmed up again: rewarm_new).

    Changes the function a little, unless copies come out even.
    """
    if source not in ("copy", "random"):
        raise ValueError(f"source: {source!r} is not known; allowed: copy, random")
    new, grown = grown_axes(config, sizes)
    maps = {}
    for axis, (old, size) in grown.items():
        if source == "copy":
            maps[axis] = copied(torch.arange(size) % old)
        else:  # sums of independent terms grow as the root of their number
            m = padded(old, size, closed="none")
            maps[axis] = replace(m, read=m.read * math.sqrt(old / size))
    why = "new channels are random, at the scale of the old" if source == "random" else ""
    return Plan(new, maps, approximate=why, resets_copies=True)


def shrink_pad_perturb(config: PreTrainedConfig, sizes: Sizes, shrink: float = 0.5, perturb: float = 0.5) -> Plan:
    """Shrink, pad, perturb (arXiv 2605.13405): old matrices times `shrink`, zeros around them, noise of `perturb` times
    their spread over all, less by the root of the growth of what is summed over. The arm that preserves nothing."""
    new, grown = grown_axes(config, sizes)
    maps = {axis: padded(old, size, closed="both") for axis, (old, size) in grown.items()}
    return Plan(new, maps, shrink=shrink, perturb=perturb, drops_moments=True)


# --- what they share ---


def grown_axes(
    config: PreTrainedConfig, sizes: Sizes, changes: Mapping[str, Any] | None = None
) -> tuple[PreTrainedConfig, dict[str, tuple[int, int]]]:
    """The new configuration, and (old, new) of every axis that it enlarges, those that follow included."""
    new = resize(config, sizes, changes)
    before, after = axis_sizes(config), axis_sizes(new)
    for axis, size in after.items():
        if size < before[axis]:
            raise ValueError(f"to: {axis} would shrink from {before[axis]} to {size}; growth only adds")
    return new, {axis: (before[axis], size) for axis, size in after.items() if size > before[axis]}


def unequal_shares(source: Tensor) -> Tensor:
    """(2c + 1) / k² for copy number c of a slot that has k copies: they sum to 1 and no two are equal."""
    axis = AxisMap(source, source, source)
    kept = source.clamp(min=0)
    counts = torch.bincount(source[source >= 0]).double()[kept]
    return (2 * axis.copy_number.double() + 1) / counts**2


def kept_rotary(config: PreTrainedConfig, sizes: Sizes) -> dict[str, Any]:
    """What lets the same leading dimensions of a head turn as before, by the same frequencies, where heads widen."""
    if "head_dim" not in sizes:
        return {}
    size, share = sizes["head_dim"], config.rope_parameters["partial_rotary_factor"]
    turned = int(config.head_dim * share)
    share = turned / size
    while int(size * share) < turned:  # the quotient may be rounded down, and its product cut off
        share = math.nextafter(share, 1.0)
    return {"rope_parameters": config.rope_parameters | {"partial_rotary_factor": share}}
