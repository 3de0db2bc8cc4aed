"""What an operator answers: where each slot of a grown axis comes from, and how its entries start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Fill:
    """How one parameter takes its new shape along a grown axis; factors are per new slot, or one number for all."""

    weight: Tensor | float = 1.0
    moment: Tensor | float = 1.0
    new_std: float = 0.0


@dataclass(frozen=True)
class Plan:
    """An operator's answer. slots: axis -> old slot of each new slot, -1 for a new one."""

    config: PreTrainedConfig
    slots: dict[str, Tensor]
    fill: Callable[[str, str], Fill]  # (parameter name, grown axis) -> Fill
    promise: str  # "exact" or "approximate"
    note: str = ""
    drops_moments: bool = False

    @property
    def adds_entries(self) -> bool:
        """Whether any slot is new; copies of old slots are not, and have no birth of their own."""
        return any(bool((source < 0).any()) for source in self.slots.values())
