"""A growth as an event: done, measured and put into words, alike in a run and on the disk."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .growth import Growth, LoadCounter, grow, largest_logit_change, live_share, load_numbers


def grow_measured(
    model: Any,
    operator: str,
    to: dict[str, int],
    input_ids: Tensor,
    optimizer: torch.optim.Optimizer | None = None,
    seed: int = 0,
    moments: str = "keep",
    options: dict[str, Any] | None = None,
    batches: Any = None,
) -> Growth:
    """`growth.grow`, its event with three measurements more: max_logit_change and live_at_once, both on `input_ids`
    (B, T), and grow_seconds, of the growth alone; with experts also expert_load, before and after, on the same.
    """
    began = time.perf_counter()
    growth = grow(model, operator, to, optimizer, seed, moments, options, batches)
    seconds = time.perf_counter() - began
    with LoadCounter(model) as before, LoadCounter(growth.model) as after:
        change = largest_logit_change(model, growth.model, input_ids)
    if after.counts:
        growth.event["expert_load"] = {"before": load_numbers(before.counts), "after": load_numbers(after.counts)}
    growth.event.update(
        max_logit_change=change,
        live_at_once=live_share(growth, input_ids),
        grow_seconds=round(seconds, 3),
    )
    return growth


def sizes_text(event: dict[str, Any]) -> str:
    """ffn_tokens 16 -> 32, 4,096 -> 5,120 parameters"""
    axes = [f"{axis} {old} -> {event['to'][axis]}" for axis, old in event["from"].items()]
    return f"{', '.join(axes)}, {event['parameters_before']:,} -> {event['parameters_after']:,} parameters"


def learning_text(event: Mapping[str, Any]) -> str:
    """What learning its maps took and gave; empty if the growth learned nothing."""
    if not event.get("learning_losses"):
        return ""
    first, last = event["learning_losses"]
    return f"its maps were learned: loss {first:.4f} -> {last:.4f}, {event['growth_flops']:.3g} FLOPs"


def change_text(event: Mapping[str, Any]) -> str:
    return f"logits moved by at most {event['max_logit_change']:.1e}"
