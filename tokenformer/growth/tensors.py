"""One plan, applied to one tensor: weights, gradients and moments, and which entries are new.

Along a dimension that writes an axis, weights move by W and gradients by R; along one that reads it, weights by R and
gradients by W: if the grown model computes the same function, its gradient with respect to what was W w Rᵀ is R g Wᵀ.
A norm's gain takes root(rho), the factor by which growth changed the root mean square that it divides by; and its
gradient one over that. Fresh entries are zero or random, as the sides of their slots say, and have no gradient before.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ..models.axes import Dim, axis_sizes, norm_kind, parameter_dims, table_of
from .plan import AVERAGE, FRESH, AxisMap, Layer, Plan, identity

ZERO, RANDOM, PICK, MEAN = range(4)  # how a fresh entry starts; PICK: as an old entry drawn at random
KEEP = -1


@dataclass(frozen=True)
class DimMap:
    """One dimension of one tensor. All (new,): source, factors of weights and of gradients, how fresh entries start
    (KEEP where the entry is old), the copy that the slot is, and whether it is a second copy that is made, not read."""

    source: Tensor
    weight: Tensor
    gradient: Tensor
    start: Tensor
    copy_number: Tensor
    makes_copy: Tensor
    reads_copies: bool
    crosses: bool  # counts as a side of a block-diagonal matrix

    def keeps(self, size: int) -> bool:
        """Whether a dimension of that size stays as it is."""
        plain = len(self.source) == size and bool((self.source == torch.arange(size)).all())
        return plain and bool((self.weight == 1).all()) and bool((self.gradient == 1).all())


class TensorMaps:
    """A plan against the architecture that it is for: the maps of whole tensors."""

    def __init__(self, config: PreTrainedConfig, plan: Plan) -> None:
        self.config, self.plan, self.table = config, plan, table_of(config)
        self.old_sizes = axis_sizes(config)
        self.maps = dict(plan.maps)
        self.tied = bool(getattr(config, "tie_word_embeddings", False))
        normed = [axis for axis in self.table.norms if axis in plan.maps and not plan.ramp_steps]
        self.rho = {axis: mean_square_factor(plan.maps[axis]) for axis in normed}
        self.prefix = self.table.layers
        # Where a norm has no gain to make up for rho, what reads it does.
        gainless = self.table.gainless
        self.folded = {axis for axis in self.rho if axis in gainless and norm_kind(config, axis) == gainless[axis]}
        self._cache: dict[tuple[Dim, bool], DimMap] = {}

    # --- names ---

    def layer_of(self, name: str) -> int | None:
        match = re.match(rf"{re.escape(self.prefix)}\.(\d+)\.", name)
        return int(match[1]) if match else None

    def source_of(self, name: str) -> tuple[str | None, Layer | None]:
        """The old parameter that the new one called `name` comes from, None for a layer without a source."""
        index = self.layer_of(name)
        if index is None or self.plan.layers is None:
            return name, None
        layer = self.plan.layers[index]
        if layer.source == FRESH:
            return None, layer
        return self.with_layer(name, layer.source), layer

    def with_layer(self, name: str, index: int) -> str:
        return re.sub(rf"^{re.escape(self.prefix)}\.\d+\.", f"{self.prefix}.{index}.", name)

    def closes(self, name: str) -> bool:
        """Whether a layer that does nothing has zeros in this parameter."""
        if self.layer_of(name) is None:
            return False
        if self.table.closes:
            return name.endswith(tuple(f".{end}" for end in self.table.closes))
        return any(("hidden", ">") in part for dim in parameter_dims(self.config, name) for part in dim)

    def old_names(self, name: str) -> tuple[str, ...]:
        """The parameters of the old model that the one called `name`, of what that is read as, is made of."""
        return (name,) if self.plan.reads is None else self.plan.reads.sources(name)

    def read(self, name: str, get: Callable[[str], Tensor], exponent: int = 1) -> Tensor:
        """It, from `get`, which gives those; `exponent` as for `Reading.join`."""
        reads = self.plan.reads
        return get(name) if reads is None else reads.join(name, [get(old) for old in reads.sources(name)], exponent)

    # --- dimensions ---

    def dims(self, name: str, ndim: int) -> list[DimMap]:
        dims = parameter_dims(self.config, name)
        if len(dims) != ndim:
            raise ValueError(f"parameter {name!r} has {ndim} dimensions, and its table of axes {len(dims)}")
        return [self.dim(dim, self.layer_of(name) is not None) for dim in dims]

    def dim(self, dim: Dim, in_layer: bool) -> DimMap:
        key = (dim, in_layer)
        if key not in self._cache:
            self._cache[key] = self._concatenated([self._part(part, in_layer) for part in dim])
        return self._cache[key]

    def _part(self, part: tuple[tuple[str, str], ...], in_layer: bool) -> tuple[DimMap, int]:
        """The product of the part's axes, and its old size."""
        result: DimMap | None = None
        size = 1
        for axis, mark in part:
            old = self.old_sizes[axis]
            each = self._axis(axis, mark, self.maps.get(axis) or identity(old), in_layer)
            result = each if result is None else _product(result, each, old)
            size *= old
        assert result is not None
        return result, size

    def _axis(self, axis: str, mark: str, m: AxisMap, in_layer: bool) -> DimMap:
        if not mark and axis in self.plan.maps:
            raise ValueError(f"axis {axis!r} does not grow in {self.config.model_type}: its table does not mark it")
        root = math.sqrt(self.rho.get(axis, 1.0))
        fold = root if in_layer and axis in self.folded else 1.0
        written = m.write * m.scale
        last = (torch.full_like(m.read, root), m.read * m.write / root)  # the last norm, unless its head is tied
        last_bias = (m.write, m.read)
        if self.tied:
            last, last_bias = (root * m.read / written, written * m.write / root), (m.read / m.scale, written)
        weight, gradient = {
            ">": (written, m.read / m.scale),
            "<": (m.read * fold, m.write / fold),
            "=": (torch.full_like(m.read, root), m.read * m.write / root),
            "@": last,
            "+": last_bias,
            "~": (torch.ones_like(m.read), m.read * m.write),
            "#": (torch.ones_like(m.read), m.read),
            "": (torch.ones_like(m.read), torch.ones_like(m.read)),
        }[mark]
        kinds = {"zero": ZERO, "random": RANDOM}
        begins = {">": kinds[m.fresh_write], "<": kinds[m.fresh_read], "=": MEAN, "@": MEAN, "+": ZERO, "~": PICK}
        fresh = begins.get(mark, kinds[m.fresh_write])
        start = torch.full((len(m.source),), KEEP, dtype=torch.int8).masked_fill(m.fresh, fresh)
        if mark in "<>":
            start = start.masked_fill(m.source == AVERAGE, KEEP if mark == ">" else ZERO)
        copies = m.copy_number
        second, crosses = copies > 0, mark in "<>" and axis in self.plan.maps
        makes, reads = second & (mark != "<"), mark == "<" and bool(second.any())
        return DimMap(m.source, weight, gradient, start, copies, makes, reads, crosses)

    def _concatenated(self, parts: list[tuple[DimMap, int]]) -> DimMap:
        sources, offset = [], 0
        for part, size in parts:
            sources.append(torch.where(part.source >= 0, part.source + offset, part.source))
            offset += size
        first = [part for part, _ in parts]
        return DimMap(
            torch.cat(sources),
            torch.cat([part.weight for part in first]),
            torch.cat([part.gradient for part in first]),
            torch.cat([part.start for part in first]),
            torch.cat([part.copy_number for part in first]),
            torch.cat([part.makes_copy for part in first]),
            any(part.reads_copies for part in first),
            any(part.crosses for part in first),
        )

    # --- tensors ---

    def weight(self, name: str, old: Tensor, above: Tensor | None = None, seed: int = 0) -> Tensor:
        """The parameter called `name` after growth, from the old one of its source layer (`above`: of the next)."""
        dims = self.dims(name, old.ndim)
        generator = generator_for(name, seed)
        new = gather(old, dims, "weight")
        if self.plan.next_layer and above is not None:
            second = _any([d.makes_copy for d in dims], new.shape)
            new = torch.where(second, gather(above, dims, "weight"), new)
        off = self._off_diagonal(dims)
        if off is not None:  # each copy reads the whole of its own, and nothing of the others
            copies = 1 + max(int(d.copy_number.max()) for d in dims if d.crosses)
            new = (new * copies).masked_fill(off.to(new.device), 0)
        if self.plan.shrink != 1.0 and old.ndim > 1:
            new = new * self.plan.shrink
        new = self._start_fresh(name, old, new, dims, generator)
        if self.plan.noise:
            new = _with_zero_sum_noise(new, dims, self.plan.noise, generator)
        if self.plan.perturb and new.ndim > 1:
            std = self.plan.perturb * spread(old, self.config) * self._fan_in_root(name, old, new)
            new = new + (torch.randn(new.shape, generator=generator) * std).to(new)
        return self.plan.amend(name, new, generator)

    def gradient(self, name: str, old: Tensor, power: int = 1) -> Tensor:
        """What a gradient (power 1), or its elementwise square (power 2), becomes; zero where entries are fresh."""
        dims = self.dims(name, old.ndim)
        new = gather(old, dims, "gradient", power)
        return new.masked_fill(self.fresh(name, old.ndim, copies=self.plan.resets_copies).to(new.device), 0)

    def fresh(self, name: str, ndim: int, copies: bool = False) -> Tensor:
        """True where an entry is new (with `copies`: also where it is a second copy); broadcastable to the tensor."""
        new = torch.zeros([1] * ndim, dtype=torch.bool)
        dims = self.dims(name, ndim)
        for i, d in enumerate(dims):
            mask = (d.source < 0) | ((d.copy_number > 0) if copies else False)
            if bool(mask.any()):
                new = new | along(mask, i, ndim)
        off = self._off_diagonal(dims)
        return new if off is None else new | off

    def _off_diagonal(self, dims: list[DimMap]) -> Tensor | None:
        """Where a matrix of staged training's joins two different copies; None for any other tensor or plan."""
        sides = [(i, d) for i, d in enumerate(dims) if d.crosses]
        if not self.plan.blocks or len(sides) != 2:
            return None
        (i, one), (k, two) = sides
        return along(one.copy_number, i, len(dims)) != along(two.copy_number, k, len(dims))

    def spread_over(self, name: str, value: Tensor) -> Tensor:
        """`value`, broadcastable to the old tensor, gathered to the new one; 0 where entries are fresh."""
        new = value
        for i, d in enumerate(self.dims(name, value.ndim)):
            if new.shape[i] != 1:
                kept = along(d.source >= 0, i, value.ndim).to(value.device)
                new = new.index_select(i, d.source.clamp(min=0).to(value.device)) * kept
        return new

    def _start_fresh(
        self, name: str, old: Tensor, new: Tensor, dims: list[DimMap], generator: torch.Generator
    ) -> Tensor:
        if all(bool((d.start == KEEP).all()) for d in dims):
            return new
        start = along(dims[0].start, 0, old.ndim)
        for i, d in enumerate(dims[1:], 1):
            start = _first_start(start, along(d.start, i, old.ndim))
        start = start.expand(new.shape)
        if old.ndim == 1:
            start = start.masked_fill(start == RANDOM, ZERO)  # biases begin at zero
        # In place, as `new` is a copy wherever an entry is fresh: whole embeddings pass here, and what that takes
        # bounds the memory of a growth.
        mean = new[(start == KEEP).to(new.device)].float().mean() if bool((start == MEAN).any()) else None
        new.masked_fill_((start != KEEP).to(new.device), 0)
        if bool((start == RANDOM).any()):
            drawn = torch.randn(new.shape, generator=generator).mul_(self._std(name, old))
            for i, d in enumerate(dims):  # as large as old entries come to be in its place
                drawn.mul_(along(d.weight, i, old.ndim).to(drawn))
            torch.where((start == RANDOM).to(new.device), drawn.to(new), new, out=new)
        if bool((start == PICK).any()):
            flat = old.detach().flatten().float().cpu()
            drawn = flat[torch.randint(len(flat), new.shape, generator=generator)]
            torch.where((start == PICK).to(new.device), drawn.to(new), new, out=new)
        if mean is not None:
            new.masked_fill_((start == MEAN).to(new.device), mean.to(new))
        return new

    def _fan_in_root(self, name: str, old: Tensor, new: Tensor) -> float:
        """root(n / n'), n being the number of entries that a row of the tensor sums over; 1 where it sums over none."""
        share = 1.0
        for i, dim in enumerate(parameter_dims(self.config, name)):
            if all(mark == "<" for part in dim for _, mark in part):
                share *= old.shape[i] / new.shape[i]
        return math.sqrt(share)

    def _std(self, name: str, old: Tensor) -> float:
        for axis in self.plan.maps:
            if any(axis == each for dim in parameter_dims(self.config, name) for part in dim for each, _ in part):
                std = self.plan.stds(name, axis)
                if std is not None:
                    return std
        return spread(old, self.config)


def mean_square_factor(axis: AxisMap) -> float:
    """rho: the mean square over the new slots by that over the old, when every old slot counts alike; fresh ones that
    are written at random are as large as those."""
    kept = axis.source >= 0
    loud = int((axis.source == FRESH).sum()) if axis.fresh_write == "random" else 0
    return (float((axis.write[kept] ** 2).sum()) + loud) / len(axis.source)


def spread(old: Tensor, config: PreTrainedConfig) -> float:
    """Standard deviation for new entries of a tensor: that of its old ones, or the initial one if those are equal."""
    std = old.detach().float().std().item() if old.numel() > 1 else 0.0
    return std if std > 0 else float(getattr(config, "initializer_range", 0.02))


def generator_for(name: str, seed: int) -> torch.Generator:
    """Random numbers that depend on the parameter's name and the seed, not on the order in which tensors are made."""
    return torch.Generator().manual_seed((zlib.crc32(name.encode()) + 7919 * seed) % 2**63)


def gather(old: Tensor, dims: list[DimMap], kind: str, power: int = 1) -> Tensor:
    """`old` taken along every dimension, times its factors to a power; entries without a source are the mean of all
    old ones where the map says so, else undefined."""
    new = old
    for i, d in enumerate(dims):
        if d.keeps(old.shape[i]):
            continue
        source, factor = d.source.to(old.device), getattr(d, kind) ** power
        averages = d.source == AVERAGE
        mean = new.mean(i, keepdim=True) if bool(averages.any()) and kind == "weight" else None
        new = new.index_select(i, source.clamp(min=0))
        if not bool((factor == 1).all()):
            new.mul_(along(factor, i, old.ndim).to(new))
        if mean is not None:
            new = torch.where(along(averages, i, old.ndim).to(new.device), mean, new)
    return new


def along(vector: Tensor, dim: int, ndim: int) -> Tensor:
    return vector.view([-1 if d == dim else 1 for d in range(ndim)])


def _product(outer: DimMap, inner: DimMap, size: int) -> DimMap:
    """outer is the slower axis, inner the faster, of old size `size`."""

    def pair(a: Tensor, b: Tensor, join: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return join(a[:, None], b[None, :]).flatten()

    def sources(a: Tensor, b: Tensor) -> Tensor:
        return torch.where((a < 0) | (b < 0), torch.tensor(FRESH), a * size + b)

    return DimMap(
        pair(outer.source, inner.source, sources),
        pair(outer.weight, inner.weight, torch.mul),
        pair(outer.gradient, inner.gradient, torch.mul),
        pair(outer.start, inner.start, _first_start),
        pair(outer.copy_number, inner.copy_number, torch.maximum),
        pair(outer.makes_copy, inner.makes_copy, torch.logical_or),
        outer.reads_copies or inner.reads_copies,
        outer.crosses or inner.crosses,
    )


def _first_start(a: Tensor, b: Tensor) -> Tensor:
    """How an entry starts that is fresh on two sides: zero wins, so that a closed side stays closed."""
    return torch.maximum(a, b).masked_fill((a == ZERO) | (b == ZERO), ZERO)


def _any(masks: list[Tensor], shape: torch.Size) -> Tensor:
    result = torch.zeros([1] * len(shape), dtype=torch.bool)
    for i, mask in enumerate(masks):
        result = result | along(mask, i, len(shape))
    return result.expand(shape)


def _with_zero_sum_noise(new: Tensor, dims: list[DimMap], ratio: float, generator: torch.Generator) -> Tensor:
    """Noise along each dimension that reads copies, less its mean over the copies of a source: readers' sums stay."""
    for i, d in enumerate(dims):
        if not d.reads_copies:
            continue
        new = with_noise_over_copies(new, i, d.source.clamp(min=0), ratio, generator)
    return new


def with_noise_over_copies(
    new: Tensor, i: int, source: Tensor, ratio: float, generator: torch.Generator
) -> Tensor:
    """Plus noise, `ratio` of the spread, that sums to zero over the entries of dimension i with the same source."""
    noise = (torch.randn(new.shape, generator=generator) * (ratio * new.float().std().item())).to(new)
    counts = torch.bincount(source).to(new)
    sums = torch.zeros([len(counts) if k == i else n for k, n in enumerate(new.shape)], dtype=new.dtype)
    index = source.to(new.device)
    means = sums.to(new.device).index_add_(i, index, noise) / along(counts, i, new.ndim)
    return new + noise - means.index_select(i, index)
