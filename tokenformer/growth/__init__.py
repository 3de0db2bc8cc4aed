"""Growth: operators on named axes, the engine that applies them to weights and moments, what they did, measured."""

from .engine import Growth, freeze_as_grown, grow
from .operators import OPERATORS
from .verify import duplicated_share, largest_logit_change, live_share

__all__ = ["OPERATORS", "Growth", "duplicated_share", "freeze_as_grown", "grow", "largest_logit_change", "live_share"]
