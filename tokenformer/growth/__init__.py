"""Growth: a pure operation on a model and its optimizer, `grow`, and measurements of what it did."""

from .engine import Growth, grow
from .tokens import OPERATORS
from .verify import largest_logit_change, live_share

__all__ = ["OPERATORS", "Growth", "grow", "largest_logit_change", "live_share"]
