"""What a growth did, measured: how far the logits moved, which new entries are alive, which coordinates are equal."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .engine import Growth


@torch.no_grad()
def largest_logit_change(old: PreTrainedModel, new: PreTrainedModel, input_ids: Tensor) -> float:
    """Largest absolute difference of the two models' logits on `input_ids` (B, T), both in eval mode for the while."""
    logits = []
    for model in (old, new):
        training = model.training
        model.eval()
        logits.append(model(input_ids=input_ids.to(model.device), use_cache=False).logits.double())
        model.train(training)
    return (logits[0] - logits[1]).abs().max().item()


def live_share(growth: Growth, input_ids: Tensor) -> dict[str, float]:
    """Share of the new entries, second copies too, that the loss on a batch (B, T) sends gradient to: by the last part
    of the parameter's name that tells (key, value, up; q_proj, down_proj)."""
    return live_shares(growth.model, growth.copies, input_ids)


def live_shares(model: PreTrainedModel, masks: Mapping[str, Tensor], input_ids: Tensor) -> dict[str, float]:
    """The same for any model, `masks` telling which entries of a parameter to look at; of an embedding only rows that
    the loss depends on. Gradients are looked at as they come and let go of at once, so that no second model's memory is
    needed."""
    counts: dict[str, list[float]] = {}
    seen: dict[Tensor, Tensor] = {}  # embedding -> the rows looked up
    handles = []
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, p in trained.items():
        handles.append(p.register_post_accumulate_grad_hook(partial(_count, counts, name, masks, seen)))
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            handles.append(module.register_forward_hook(partial(_look_up, seen)))
    kept = {name: p.grad for name, p in trained.items()}
    for p in trained.values():
        p.grad = None
    input_ids = input_ids.to(model.device)
    training = model.training
    model.eval()
    try:
        model(input_ids=input_ids, labels=input_ids, use_cache=False).loss.backward()
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
        for name, p in trained.items():
            p.grad = kept[name]
    return {kind: alive / total for kind, (alive, total) in counts.items()}


def _look_up(seen: dict[Tensor, Tensor], module: nn.Embedding, inputs: tuple[Tensor, ...], _: Tensor) -> None:
    """Note the rows looked up for (..., T) positions but the last, which predicts nothing; padding has no gradient."""
    rows = inputs[0][..., :-1].unique()
    seen[module.weight] = rows if module.padding_idx is None else rows[rows != module.padding_idx]


def _count(
    counts: dict[str, list[float]],
    name: str,
    masks: Mapping[str, Tensor],
    seen: Mapping[Tensor, Tensor],
    p: Tensor,
) -> None:
    gradient, mask, p.grad = p.grad, masks.get(name), None
    if mask is None or gradient is None:
        return
    mask = mask.to(gradient.device)
    if p in seen:
        gradient, mask = gradient[seen[p]], mask if len(mask) == 1 else mask[seen[p]]
    total = counts.setdefault(kind_of(name), [0.0, 0.0])
    # A sum of booleans would make whole numbers of them first, eight bytes each.
    total[0] += torch.count_nonzero((gradient != 0) & mask).item()
    total[1] += torch.count_nonzero(mask).item() * (gradient.numel() // mask.numel())


def kind_of(name: str) -> str:
    parts = name.split(".")
    return parts[-2] if parts[-1] in ("weight", "bias") and len(parts) > 1 else parts[-1]


@torch.no_grad()
def duplicated_share(model: PreTrainedModel, masks: Mapping[str, Tensor]) -> float:
    """Share of the rows with new entries, in matrices, that equal another row of the same matrix bit for bit. Rows of
    nothing but zeros are closed, not copied, and do not count as equal."""
    equal, total = 0, 0
    for name, p in model.named_parameters():
        if name not in masks or p.ndim < 2:
            continue
        rows = p.detach().flatten(0, -2).cpu().contiguous()
        new = masks[name].cpu().expand_as(p).flatten(0, -2).any(-1).tolist()
        held = (rows != 0).any(-1).tolist()
        digests = [hashlib.blake2b(row, digest_size=16).digest() for row in rows.view(torch.uint8).numpy()]
        counts = Counter(digests)
        equal += sum(n and h and counts[d] > 1 for n, h, d in zip(new, held, digests, strict=True))
        total += sum(new)
    return equal / total if total else 0.0
