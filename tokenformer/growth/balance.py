"""Loss-free balancing of a mixture's experts (arXiv 2408.15664): a bias on their choice that training moves.

With the scores s = softmax(router logits) of a token, in float32 as Mixtral has them:

    chosen    the top_k experts by s + b
    gates     s of the chosen, divided by their sum: the bias is not in them
    a step    b += u sign(mean load - load), the load of an expert being how often it was chosen in the step, by all
              tokens of all ranks and accumulation steps

The paper has sigmoid scores; a Mixtral has these. b has no gradient, and adds nothing to the loss.

An ordinary Mixtral has no place for b: it chooses by s, whose order a bias changes, and b cannot be folded into router
weights, since s + b is no softmax and the gates would move along. So model.safetensors holds the weights of a Mixtral
that chooses without b, and b lies beside it, as what training carries; evaluation in a run is with b.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .load import count_choices, routers_of
from .plan import Plan

RATE = 1e-3  # u


class LossFree:
    """The bias b (layers, experts) on the choice of a Mixtral's experts, hung on the model. It is never finished."""

    kind = "loss_free"
    finished = False

    def __init__(self, model: Any, biases: Tensor | None = None, rate: float = RATE) -> None:
        self.model, self.rate = model, rate
        self.routers: list[Any] = routers_of(model)
        shape = (len(self.routers), model.config.num_local_experts)
        self.biases = torch.zeros(shape, device=model.device)
        if biases is not None:
            if biases.shape != shape:
                raise ValueError(f"biases: {tuple(biases.shape)} is not the model's (layers, experts) = {shape}")
            self.biases.copy_(biases)
        self.counts = torch.zeros_like(self.biases)  # of the choices in this training step
        for layer, router in enumerate(self.routers):
            router.forward = partial(self._choose, router, layer)
        model.carried = self

    def _choose(self, router: Any, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(hidden.reshape(-1, router.hidden_dim), router.weight)  # (tokens, experts)
        scores = F.softmax(logits.float(), dim=-1)
        chosen = torch.topk(scores + self.biases[layer], router.top_k, dim=-1).indices
        gates = scores.gather(-1, chosen)
        if router.training:
            count_choices(self.counts[layer], chosen)
        return logits, gates / gates.sum(dim=-1, keepdim=True), chosen

    def advance(self) -> None:
        """One more training step is done; its choices, those of all ranks, move the bias."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.counts)
        self.biases += self.rate * torch.sign(self.counts.mean(-1, keepdim=True) - self.counts)
        self.counts.zero_()

    def grown(self, plans: list[Plan]) -> Tensor:
        """The biases after growth. A new layer takes those of its source, or zeros; a copy of an expert its parent's
        times its share, since its score is that share of the parent's; a fresh expert zero."""
        biases = self.biases
        for plan in plans:
            if plan.layers is not None:
                zeros = torch.zeros_like(biases[0])
                biases = torch.stack([biases[each.source] if each.source >= 0 else zeros for each in plan.layers])
            if "experts" in plan.maps:
                axis = plan.maps["experts"]
                shares = axis.read.masked_fill(axis.fresh, 0).to(biases)
                biases = biases[:, axis.source.clamp(min=0).to(biases.device)] * shares
        return biases

    def remove(self) -> None:
        for router in self.routers:
            del router.forward
        del self.model.carried

    def ordinary(self) -> dict[str, Tensor]:
        return self.model.state_dict()

    def tensors(self) -> dict[str, Tensor]:
        return {"biases": self.biases}

    def describe(self) -> dict[str, Any]:
        form = "a Mixtral that chooses its experts without the bias, which the model computes with"
        return {"kind": self.kind, "rate": self.rate, "model.safetensors": form}

    @classmethod
    def restored(cls, model: Any, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        cls(model, tensors["biases"], description["rate"])
