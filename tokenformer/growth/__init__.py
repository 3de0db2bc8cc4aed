"""Growth: operators on named axes, the engine that applies them to weights and moments, what they did, measured."""

from .balance import LossFree
from .engine import Growth, freeze_as_grown, grow
from .experts import PhaseIn, TrainsOnly
from .load import LoadCounter, expert_load, load_numbers, load_of
from .operators import OPERATORS
from .verify import duplicated_share, largest_logit_change, live_share

__all__ = [
    "OPERATORS",
    "Growth",
    "LoadCounter",
    "LossFree",
    "PhaseIn",
    "TrainsOnly",
    "duplicated_share",
    "expert_load",
    "freeze_as_grown",
    "grow",
    "largest_logit_change",
    "live_share",
    "load_numbers",
    "load_of",
]
