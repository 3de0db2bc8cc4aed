"""What a growth did, measured: how far the logits moved and which new entries are alive."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..models.axes import parameter_axes
from .engine import Growth, new_entries


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
    """Share of the new entries, second copies too, that the loss on a batch (B, T) sends gradient to: by kind of table
    (key, value, up)."""
    model = growth.model
    parameters = dict(model.named_parameters())
    input_ids = input_ids.to(model.device)
    loss = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
    grown = [n for n in parameters if set(parameter_axes(model.config, n)) & set(growth.slots)]
    gradients = torch.autograd.grad(loss, [parameters[name] for name in grown])
    alive: dict[str, list[float]] = {}
    for name, gradient in zip(grown, gradients, strict=True):
        axes = parameter_axes(model.config, name)
        new = new_entries(axes, growth.slots, gradient.device, copies=True).expand_as(gradient)
        if new.any():
            alive.setdefault(name.rsplit(".", 1)[-1], []).append((gradient[new] != 0).double().mean().item())
    return {table: sum(shares) / len(shares) for table, shares in alive.items()}
