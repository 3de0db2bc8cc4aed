"""A growth of a checkpoint in words: its plan, and what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from ..checkpoint import gigabytes
from ..event import change_text
from ..flops import forward_flops
from ..growth.operators import OPERATORS, exact_for
from ..models.axes import table_of
from .plan import Prepared

CONTEXT = 1024  # positions over which the FLOPs of a token are counted


def plan_lines(prepared: Prepared) -> list[str]:
    """The plan in words: sizes, cost, promise and what it hangs on, moments, what will be written."""
    event, before, after = prepared.event, prepared.old.config, prepared.new.config
    into = "" if after.model_type == before.model_type else f", into a {after.model_type}"
    lines = [f"grow {before.model_type} by {prepared.operator}{into}"]
    lines += [f"  {name} {old:,} -> {event['to'][name]:,}" for name, old in event["from"].items()]
    for name, old, new in followers(before, after, event["to"]):
        change = "comes with it" if old is None else "follows"
        lines.append(f"  {name} {'' if old is None else f'{number(old)} -> '}{number(new)}, which {change}")
    lines.append(f"  parameters {event['parameters_before']:,} -> {event['parameters_after']:,}")
    lines.append(f"  forward FLOPs per token: {flops_text(before, after)}")
    lines += [f"  {line}" for line in promise_lines(prepared)]
    factors = f", factors {event['moment_factors']}" if event["moments"] == "kept" else ""
    lines.append(f"  optimizer moments: {event['moments']}{factors}")
    dtypes = sorted({str(size.dtype).removeprefix("torch.") for size in prepared.sizes.values()})
    how = f"in memory: {prepared.in_memory}" if prepared.in_memory else "tensor by tensor"
    lines.append(f"  to be written: {gigabytes(prepared.bytes)} of weights in {', '.join(dtypes)}, {how}")
    return lines


def followers(before: PreTrainedConfig, after: PreTrainedConfig, to: Mapping[str, int]) -> list[tuple[str, Any, Any]]:
    """Numbers of the configuration that change besides the ones asked for; old is None where it had none."""
    old, new = before.to_dict(), after.to_dict()
    asked = {before.attribute_map.get(name, name) for name in to}
    changed = [name for name, value in new.items() if name not in asked and type(value) in (int, float)]
    pinned = [name for name in table_of(before).pins if old.get(name) is None]  # written out at the size that it had
    return [(name, old.get(name), new[name]) for name in changed if old.get(name) != new[name] and name not in pinned]


def number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def flops_text(before: PreTrainedConfig, after: PreTrainedConfig) -> str:
    try:
        old, new = (forward_flops(config, CONTEXT) // CONTEXT for config in (before, after))
    except ValueError:
        return f"no formula for {before.model_type}"
    return f"{old:.3g} -> {new:.3g} over a context of {CONTEXT:,}"


def promise_lines(prepared: Prepared) -> list[str]:
    """What is promised and what that hangs on; where it is not the same function, why, and which operators keep it."""
    event = prepared.event
    if event["promise"] == "exact":
        ties = any("no logits tie" in promise for promise in prepared.promises)  # the one condition that no plan shows
        return ["promise: exact if no logits tie" if ties else "promise: exact"]
    exact = [name for name in exact_for(prepared.old.config, event["to"]) if not OPERATORS[name].carried]
    instead = f"exact would be: {', '.join(exact)}" if exact else "no one operator does it exactly"
    why = f"since {event['note']}" if event["note"] else "though these sizes change nothing"
    return [f"promise: approximate, {why}", instead]


def measured_lines(event: Mapping[str, Any]) -> list[str]:
    if "max_logit_change" not in event:
        return ["not measured: --measure full or logits reads the whole of both models"]
    lines = [f"measured on random tokens: {change_text(event)}; the largest was {event['largest_logit']:.1e}"]
    if "live_at_once" in event:
        kinds: dict[str, list[str]] = {}
        for kind, share in event["live_at_once"].items():
            kinds.setdefault(f"{share:.0%}", []).append(kind)
        shares = "; ".join(f"{share} in {', '.join(names)}" for share, names in kinds.items())
        lines.append(f"measured: new entries that get gradient in the first step: {shares}")
        lines.append(f"measured: rows with new entries that equal another: {event['duplicated_rows']:.0%}")
    else:
        lines.append("not measured: gradients and copies; --measure full does")
    if "largest_rounding" in event:
        rounding = event["largest_rounding"]
        lines.append(f"measured: old entries rounded by at most {rounding:.1e} of themselves, as the stored dtype can")
    return lines
