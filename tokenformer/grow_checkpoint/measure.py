"""What a growth did, measured on the files that it wrote."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .. import checkpoint as files
from ..growth import LoadCounter, duplicated_share, load_numbers
from ..growth.tensors import TensorMaps
from ..growth.verify import live_shares
from ..growth.weights import new_entries
from ..models.axes import parameter_dims
from .plan import Prepared

PROBE = (2, 64)  # sequences and tokens of the batch that a growth is measured on
# A growth is measured in full up to so many bytes of weights, beyond the smallest number only where that stays within
# 1.3 times the output's size; the logits alone up to the largest.
SMALL_BYTES, FULL_BYTES, LOGITS_BYTES = 2 * 10**9, 8 * 10**9, 64 * 10**9
PROCESS_BYTES = 6 * 10**8  # of a process that holds no model
MEASURES = ("auto", "full", "logits", "none")


class NewEntries(Mapping[str, Tensor]):
    """Where each parameter has new entries, `copies` among them or not; worked out when asked for."""

    def __init__(self, prepared: Prepared, copies: bool) -> None:
        self.names = [name for name, _ in prepared.new.named_parameters()]
        self.find: Callable[[str], Tensor | None] = lambda name: None
        for maps in prepared.maps:
            self.find = self._after(maps, copies, self.find)

    @staticmethod
    def _after(
        maps: TensorMaps, copies: bool, before: Callable[[str], Tensor | None]
    ) -> Callable[[str], Tensor | None]:
        return lambda name: new_entries(name, len(parameter_dims(maps.config, name)), maps, copies, before)

    def __getitem__(self, name: str) -> Tensor:
        mask = self.find(name)
        if mask is None:
            raise KeyError(name)
        return mask

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def measured(prepared: Prepared, new: Path, measure: str) -> dict[str, Any]:
    """What the growth did, from the files as they now are: one model at a time, its weights mapped, not copied."""
    if measure == "auto":
        measure = affordable(prepared)
    if measure == "none":
        return {}
    ids = torch.randint(prepared.old.config.vocab_size, PROBE, generator=torch.Generator().manual_seed(0))
    before, load_before = logits_of(mapped_model(prepared.folder), ids)
    model = mapped_model(new)
    after, load_after = logits_of(model, ids)
    result: dict[str, Any] = {
        "max_logit_change": (before - after).abs().max().item(),
        "largest_logit": before.abs().max().item(),
    }
    if load_after:
        result["expert_load"] = {"before": load_before, "after": load_after}
    if measure == "full":
        trained = prepared.event.get("trained_parameters")
        for name, p in model.named_parameters():
            p.requires_grad_(trained is None or name in trained)
        masks = NewEntries(prepared, copies=True)
        result["live_at_once"] = live_shares(model, masks, ids)
        result["duplicated_rows"] = duplicated_share(model, masks)
    return result


def affordable(prepared: Prepared) -> str:
    """How much may be measured. The weights are mapped; besides them the largest gradient, and what works on it, takes
    three and a half times its size."""
    largest = max(size.bytes for size in prepared.sizes.values())
    within = PROCESS_BYTES + 3.5 * largest <= 0.3 * prepared.bytes or prepared.bytes <= SMALL_BYTES
    return "full" if within and prepared.bytes <= FULL_BYTES else "logits" if prepared.bytes <= LOGITS_BYTES else "none"


def mapped_model(folder: Path) -> PreTrainedModel:
    model, _ = files.load_checkpoint(folder, mapped=True)
    if model.dtype == torch.float64:  # grouped matrix products know no doubles
        model.config._experts_implementation = "eager"
    return model


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, dict[str, float]]:
    """And how its experts share the tokens, if it has any."""
    with LoadCounter(model) as load:
        logits = model(input_ids=ids, use_cache=False).logits.double()
    return logits, load_numbers(load.counts)
