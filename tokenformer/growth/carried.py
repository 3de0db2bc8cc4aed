"""Growth that training carries for a while: a mask that ramps up (masked.py), low-rank factors (lowrank.py),
new experts that are let in step by step (experts.py); and, for good, what keeps experts in balance (balance.py).

What is carried hangs on its model as `model.carried`; the loop tells it of every training step, and takes it off when
it is finished. It is no part of an ordinary checkpoint: model.safetensors holds ordinary weights under their ordinary
names, and what a resumed run needs besides lies beside it, in carried.safetensors and carried.json.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn


class Carried(Protocol):
    """What hangs on a model; the attaching is done by whoever makes it."""

    kind: str

    @property
    def finished(self) -> bool:
        """Whether it can be removed, the model being an ordinary one without it."""

    def advance(self) -> None:
        """One more training step is done."""

    def remove(self) -> None:
        """Leave an ordinary model that computes what the model computes now. Only when finished."""

    def ordinary(self) -> dict[str, Tensor]:
        """The state dict of an ordinary model that computes the same now, or what `describe` says instead."""

    def tensors(self) -> dict[str, Tensor]:
        """What `ordinary` does not tell, for a resume bit for bit."""

    def describe(self) -> dict[str, Any]:
        """Its kind and all else that is no tensor, for JSON."""


def carried_of(model: nn.Module) -> Carried | None:
    return getattr(model, "carried", None)


def restore(model: nn.Module, description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Attach to an ordinary model, just loaded, what was carried when it was saved. ValueError if they do not fit."""
    from .balance import LossFree
    from .experts import PhaseIn, TrainsOnly
    from .lowrank import LowRank
    from .masked import Masked

    kinds = {"masked": Masked.restored, "rank": LowRank.restored, "relora": LowRank.restored}
    kinds |= {"phase_in": PhaseIn.restored, "trains_only": TrainsOnly.restored, "loss_free": LossFree.restored}
    kind = description.get("kind")
    if kind not in kinds:
        raise ValueError(f"kind {kind!r} is not known; allowed: {', '.join(kinds)}")
    try:
        kinds[kind](model, description, tensors)
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"does not fit the model ({type(error).__name__}: {error})") from error
