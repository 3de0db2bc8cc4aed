"""What an operator answers: where each new slot of an axis, and each new layer, comes from, and with what factors.

An axis is written by some tensors and read by others. A growth of it is a pair of maps: what writers make becomes W h
and readers take it by R. The function is kept exactly if Rᵀ W = 1. Each new slot has one source, an old slot, so W and
R are a list of sources with two factors each; a slot without a source is fresh, and then one of the two sides is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedConfig

FRESH, AVERAGE = -1, -2  # instead of a source: no source; the mean of all old slots, which nothing reads at first


@dataclass(frozen=True)
class AxisMap:
    """New slots of one axis. source: (new,) old slots, or FRESH, or AVERAGE; write, read: (new,) factors.

    fresh_write, fresh_read: how writers and readers of a fresh slot start, "zero" or "random".
    scale: what its writers make is this much larger besides, which the norm that reads it takes away again (or, for
    head_dim, the factor by which attention divides).
    """

    source: Tensor
    write: Tensor
    read: Tensor
    fresh_write: str = "random"
    fresh_read: str = "zero"
    scale: float = 1.0

    @property
    def fresh(self) -> Tensor:
        return self.source < 0

    @property
    def copy_number(self) -> Tensor:
        """For each slot, how many earlier slots have the same source; 0 where it has none."""
        numbers, seen = torch.zeros_like(self.source), dict[int, int]()
        for slot, source in enumerate(self.source.tolist()):
            numbers[slot] = seen.get(source, 0) if source >= 0 else 0
            seen[source] = seen.get(source, 0) + 1
        return numbers


@dataclass(frozen=True)
class Layer:
    """A new layer: the old one that it comes from (FRESH: the architecture's own initialisation), and whether it is
    closed, that is, adds nothing to the residual stream at first."""

    source: int
    closed: bool = False


@dataclass(frozen=True)
class Learning:
    """Maps that are only where learned ones start (ligo.py): steps, learning rate, noise of the copies at first."""

    steps: int
    learning_rate: float
    noise: float


@dataclass(frozen=True)
class Reading:
    """The old model read as one of another architecture that computes the same; what then grows is that one.

    config: of what it is read as. sources: a parameter of that -> the old ones it is made of, none if the old model has
    nothing of the kind. join: (name, those, exponent) -> the parameter; factors that it takes are to be raised to the
    exponent: 1 for weights, -1 for gradients, -2 for their squares, 0 for births.
    """

    config: PreTrainedConfig
    sources: Callable[[str], tuple[str, ...]]
    join: Callable[[str, list[Tensor], int], Tensor]


@dataclass(frozen=True)
class Plan:
    """An operator's answer.

    reads: where the architecture changes, what the old model is read as; the maps are of that.

    stds: (parameter, axis) -> standard deviation of its fresh entries along the axis; None: that of its old entries.
    blocks: copies read their own copy only (staged training's block-diagonal matrices).
    next_layer: second copies are made as in the layer above (bert2BERT's AKI); what reads them stays its layer's own.
    noise: standard deviation, over that of the weights, of noise that sums to zero over the copies that are read.
    shrink, perturb: old entries times the one, all plus noise of the other times their spread (shrink, pad, perturb).
    amend: (name, weight, generator) -> the weight as it is to be, after all else.
    newborn: endings of parameters that start without moments, whatever their weights come from.
    """

    config: PreTrainedConfig
    maps: Mapping[str, AxisMap] = field(default_factory=dict)
    layers: tuple[Layer, ...] | None = None
    stds: Callable[[str, str], float | None] = lambda name, axis: None
    blocks: bool = False
    next_layer: bool = False
    noise: float = 0.0
    shrink: float = 1.0
    perturb: float = 0.0
    approximate: str = ""  # why the function changes, where the maps alone do not show it
    drops_moments: bool = False
    resets_copies: bool = False  # second copies start with no moments, as fresh entries do
    frozen: bool = False  # old layers are not trained on
    ramp_steps: int = 0  # over which a mask fades in what is new (masked.py), and makes the growth exact
    reads: Reading | None = None
    amend: Callable[[str, Tensor, torch.Generator], Tensor] = lambda name, weight, generator: weight
    newborn: tuple[str, ...] = ()
    leading_moments: bool = False  # moments are moved by factors that hold on average only
    bias: float = 0.0  # above 0: new experts start with minus that on their choice, and rise over ramp_steps
    trains_only: tuple[str, ...] = ()  # endings of the parameters that alone are to be trained at first
    alone_steps: int = 0  # for how many training steps
    learning: Learning | None = None

    def grows_from(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The configuration that the maps are of."""
        return self.reads.config if self.reads else config

    def is_newborn(self, name: str) -> bool:
        return name.endswith(self.newborn) if self.newborn else False

    @property
    def adds_entries(self) -> bool:
        """Whether any slot is new; copies of old slots are not, and have no birth of their own."""
        fresh_layers = any(layer.source < 0 or layer.closed for layer in self.layers or ())
        fresh_slots = any(bool(axis.fresh.any()) for axis in self.maps.values())
        return bool(self.newborn) or self.resets_copies or fresh_layers or fresh_slots


def padded(old: int, new: int, closed: str = "read") -> AxisMap:
    """Old slots in front, fresh ones behind; `closed` is the side that is zero there: write, read, both, none."""
    source = torch.cat([torch.arange(old), torch.full((new - old,), FRESH)])
    ones = torch.ones(new, dtype=torch.float64)
    write, read = ("zero" if closed in (side, "both") else "random" for side in ("write", "read"))
    return AxisMap(source, ones, ones, fresh_write=write, fresh_read=read)


def copied(source: Tensor, shares: Tensor | None = None) -> AxisMap:
    """Each slot a copy of an old one; readers get its share, by default one over the number of copies."""
    if shares is None:
        kept = source.clamp(min=0)
        shares = 1.0 / torch.bincount(source[source >= 0]).double()[kept]
    shares = torch.where(source >= 0, shares, torch.ones((), dtype=torch.float64))
    return AxisMap(source, torch.ones_like(shares), shares, fresh_write="zero", fresh_read="random")


def identity(size: int) -> AxisMap:
    return padded(size, size)
