"""How the routers of a mixture share out tokens among its experts: counted as the model runs, and put in numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn


def routers_of(model: nn.Module) -> list[nn.Module]:
    """The model's routers, from the first layer on; empty for a dense one."""
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

    return [module for module in model.modules() if isinstance(module, MixtralTopKRouter)]


class LoadCounter:
    """Within `with`, how many times each router of the model chose each expert; entered again, it counts on.

    counts: per layer (experts,), on the model's device; empty without a router. The passes that gradient checkpointing
    repeats amid the backward pass are not counted.
    """

    def __init__(self, model: nn.Module) -> None:
        self.routers = routers_of(model)
        self.counts: list[Tensor] = [torch.zeros(r.num_experts, device=r.weight.device) for r in self.routers]  # type: ignore[arg-type, call-overload]
        self.handles: list[Any] = []

    def __enter__(self) -> LoadCounter:
        for counts, router in zip(self.counts, self.routers, strict=True):
            hook = router.register_forward_hook(lambda _m, _i, out, counts=counts: count_choices(counts, out[2]))
            self.handles.append(hook)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None) -> None:
        while self.handles:
            self.handles.pop().remove()


@torch.no_grad()
def count_choices(counts: Tensor, chosen: Tensor) -> None:
    """Add to counts (experts,) how often each was chosen; not where checkpointing repeats a pass."""
    if torch._C._current_graph_task_id() != -1:  # amid a backward pass, as torch's checkpointing tells it
        return
    counts.scatter_add_(0, chosen.flatten(), torch.ones((), device=counts.device).expand(chosen.numel()))


@torch.no_grad()
def expert_load(model: nn.Module, input_ids: Tensor) -> list[Tensor]:
    """Per layer, the share of all choices that fell on each expert, on a batch (B, T): they sum to 1."""
    with LoadCounter(model) as load:
        model(input_ids=input_ids.to(load.counts[0].device) if load.counts else input_ids, use_cache=False)
    return [counts / counts.sum() for counts in load.counts]


def load_of(counts: Tensor) -> dict[str, float]:
    """How evenly n rows, groups or experts are used, of how often each was chosen (n,).

    entropy: -sum p ln p of the shares p, over ln n: 1 where all are alike. effective: its exponential (perplexity), how
    many chosen alike would have that entropy. winner: the largest load over the mean. top_share: the share of all
    choices that fell on the most chosen hundredth, one at the least. dead: how many were never chosen. All but that are
    0 where nothing was chosen.
    """
    counts = counts.double().cpu()
    n, total = len(counts), counts.sum()
    shares = counts / total if total > 0 else counts
    entropy = torch.special.entr(shares).sum()
    return {
        "entropy": (entropy / math.log(max(2, n))).item(),
        "effective": entropy.exp().item() if total > 0 else 0.0,
        "winner": (shares.max() * n).item(),
        "top_share": shares.topk(max(1, n // 100)).values.sum().item(),
        "dead": int((counts == 0).sum()),
    }


def load_numbers(loads: Sequence[Tensor]) -> dict[str, float]:
    """Of counts or shares per layer: max_violation, the largest load over the mean less 1 (arXiv 2408.15664), as mean
    over the layers, and max_violation_worst, in the worst of them; load_entropy, mean, over that of equal loads;
    dead_experts, how many in all are never chosen. Empty without layers."""
    if not loads:
        return {}
    each = [load_of(counts) for counts in loads]
    violations = [numbers["winner"] - 1 for numbers in each]
    return {
        "max_violation": sum(violations) / len(each),
        "max_violation_worst": max(violations),
        "load_entropy": sum(numbers["entropy"] for numbers in each) / len(each),
        "dead_experts": int(sum(numbers["dead"] for numbers in each)),
    }
