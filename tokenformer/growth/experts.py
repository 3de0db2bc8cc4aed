"""Mixtures of experts: made of a dense model, or given more experts.

A Mixtral layer computes sum_e g_e f_e(x) over the top_k experts e with the largest router logits; their gates g are the
softmax over those alone, so that they sum to 1. All that follows rests on this sum:

upcycling       every expert is the dense f, whichever are chosen: sum_e g_e f = f.
virtual groups  f = sum_s f_s, split into S shards of its units. Every group of S experts holds all shards once and has
                one router row, so that a group is chosen as a whole if top_k = S k: a place in the ranking is shared by
                S equal logits, and no tie lies across its border. A group with the weight p gives each of its shards
                p / S, and sum_groups p / S sum_s (c f_s) = f needs c = S, whatever the p. It stands on down_proj, the
                linear branch: silu(c x) is not c silu(x).
more experts    m copies of every expert and row, top_k m times as large: the copies of the chosen take all places, each
                with a gate of 1 / m of the old. With top_k as it was copies take the places of other experts.

That holds while no two *different* experts have equal logits at the border of the ranking: a tie, which top-k breaks as
it pleases. In float32 and float64 that does not happen by chance; logits in bfloat16, of 8 bits, meet it for a few
tokens of 1,000 in each layer, and a growth's measured change of the logits shows it. Upcycling alone does not mind.
What is chosen together lies side by side, so that a top-k that goes by the order of equals keeps it together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import MixtralConfig, PreTrainedConfig

from ..models.axes import resize
from .load import count_choices, routers_of
from .plan import Plan, Reading, copied, padded
from .tensors import spread, with_noise_over_copies

Sizes = Mapping[str, int]
HELD = -1
ROUTER, GATE_UP, DOWN = ".mlp.gate.weight", ".mlp.experts.gate_up_proj", ".mlp.experts.down_proj"


def upcycle(
    config: PreTrainedConfig, sizes: Sizes, top_k: int = 2, expert_moments: str = "fresh", router: str = "redraw"
) -> Plan:
    """Sparse upcycling (arXiv 2212.05055): a Mixtral whose experts are copies of the dense feed-forward, its router
    random. Exact, since the gates of the chosen sum to 1.

    Which tokens an expert sees is the router's choice, so no factor pushes gradients forward to it: its moments start
    "fresh"; "shared" gives each its share of the old ones, 1 / experts, which is right on average over the router.
    """
    return _upcycled(config, sizes, 1, top_k, expert_moments, router)


def virtual_groups(
    config: PreTrainedConfig,
    sizes: Sizes,
    shards: int = 2,
    top_k: int = 2,
    expert_moments: str = "fresh",
    router: str = "redraw",
) -> Plan:
    """Virtual groups (arXiv 2410.07524): the feed-forward split into `shards`, copies of each, a router row for every
    group of all shards; down_proj times `shards`. Exact if top_k is a multiple of `shards`.

    Experts lie group by group. Moments as for upcycle.
    """
    if shards < 1 or top_k % shards:
        raise ValueError(
            f"top_k: {top_k} is not a multiple of shards = {shards}, so a group would be chosen in part, and the other "
            "shards of the feed-forward be missing"
        )
    return _upcycled(config, sizes, shards, top_k, expert_moments, router, down=float(shards))


def virtual_groups_published(
    config: PreTrainedConfig,
    sizes: Sizes,
    shards: int = 2,
    top_k: int = 2,
    expert_moments: str = "fresh",
    router: str = "redraw",
) -> Plan:
    """Virtual groups with the paper's scaling (arXiv 2410.07524): each of the three matrices times the cube root of
    `shards`. Changes the function: silu(c x) is not c silu(x)."""
    plan = virtual_groups(config, sizes, shards, top_k, expert_moments, router)
    root = shards ** (1 / 3)
    reads = _read_as_mixtral(config, plan.grows_from(config), shards, root, root)
    return replace(plan, reads=reads, approximate="the scaling stands before silu too, and silu(c x) is not c silu(x)")


def duplicate_experts(
    config: PreTrainedConfig, sizes: Sizes, noise: float = 0.01, router: str = "keep", router_steps: int = 0
) -> Plan:
    """Expert upcycling (arXiv 2604.19835): experts and their router rows copied in turn, the copies' rows with noise
    (relative to their spread), top_k as it was. Changes the function: copies take each other's places.

    `router`: "keep", "redraw", or "retrain": kept, and trained alone for the first `router_steps` training steps.
    """
    _require("router", router, "keep", "redraw", "retrain")
    _require_steps(router, router_steps)
    old, new = config.num_local_experts, sizes["num_local_experts"]
    source = torch.arange(new) % old
    why = f"copies of an expert compete for the {config.num_experts_per_tok} places with what stood there"
    return Plan(
        resize(config, sizes),
        {"experts": copied(source)},
        approximate=why,
        amend=_redrawn(torch.arange(new), config) if router == "redraw" else _with_noisy_copies(old, noise, config),
        newborn=(ROUTER,) if router == "redraw" else (),
        trains_only=(ROUTER,) if router == "retrain" else (),
        alone_steps=router_steps,
    )


def scale_experts(
    config: PreTrainedConfig, sizes: Sizes, noise: float = 0.0, router: str = "keep", router_steps: int = 0
) -> Plan:
    """Whole multiples of the experts, and top_k as many times as large: copies share the gate of their expert. Exact.

    Copies are chosen together and stay equal; `noise` on down_proj, which sums to zero over them, breaks that and not
    the function (gradients then push forward but for its leading term). `router`: "keep", or "retrain" as above.
    """
    _require("router", router, "keep", "retrain", redraw="other rows choose other experts; duplicate_experts allows it")
    _require_steps(router, router_steps)
    old, new = config.num_local_experts, sizes["num_local_experts"]
    if new % old:
        near = f"{new // old * old} or {(new // old + 1) * old}"
        raise ValueError(
            f"to.num_local_experts: {new} is not a multiple of {old}, and experts with more copies would "
            f"count more; nearest: {near}"
        )
    source = torch.arange(new) // (new // old)  # side by side

    def amend(name: str, weight: Tensor, generator: torch.Generator) -> Tensor:
        noisy = noise and name.endswith(DOWN)
        return with_noise_over_copies(weight, 0, source, noise, generator) if noisy else weight

    return Plan(
        resize(config, sizes, {"num_experts_per_tok": config.num_experts_per_tok * (new // old)}),
        {"experts": copied(source)},
        amend=amend,
        leading_moments=bool(noise),
        trains_only=(ROUTER,) if router == "retrain" else (),
        alone_steps=router_steps,
    )


def phase_in_experts(
    config: PreTrainedConfig,
    sizes: Sizes,
    ramp_steps: int = 0,
    bias: float = 10.0,
    experts: str = "copied",
    router: str = "keep",
) -> Plan:
    """New experts that a bias on the choice alone keeps out at first and then lets in, step by step (after arXiv
    2408.15664). Exact at the start, an ordinary Mixtral at the end, at the latest after `ramp_steps` training steps.

    `bias`: minus that is where it starts (PhaseIn). `experts`: "copied" in turn, or "random" at the spread of the old
    ones, as then are their router rows.
    """
    _require("experts", experts, "copied", "random")
    _require("router", router, "keep", redraw="the old experts would be chosen anew", retrain="the bias is what moves")
    if ramp_steps < 1 or bias <= 0:
        wrong = f"ramp_steps: {ramp_steps}" if ramp_steps < 1 else f"bias: {bias}"
        raise ValueError(f"{wrong} is not above 0; phase_in_experts needs a number of training steps and a bias")
    old, new = config.num_local_experts, sizes["num_local_experts"]
    axis = padded(old, new)
    if experts == "copied":  # the old ones are alone in seeing tokens, and have the whole of their gradient
        axis = copied(torch.arange(new) % old, (torch.arange(new) < old).double())
    return Plan(resize(config, sizes), {"experts": axis}, resets_copies=True, ramp_steps=ramp_steps, bias=bias)


# --- from dense to mixture ---


def _upcycled(
    config: PreTrainedConfig,
    sizes: Sizes,
    shards: int,
    top_k: int,
    expert_moments: str,
    router: str,
    down: float = 1.0,
) -> Plan:
    _require("expert_moments", expert_moments, "fresh", "shared")
    _require(
        "router",
        router,
        "redraw",
        keep="a dense model has none",
        retrain="while the experts are equal it has no gradient",
        zero="it would choose the same experts for all tokens, and while these are equal it has no gradient",
    )
    experts = sizes["num_local_experts"]
    if experts % shards:
        raise ValueError(f"to.num_local_experts: {experts} is not a multiple of shards = {shards}")
    if not 2 <= top_k <= experts:
        raise ValueError(
            f"top_k: {top_k} is not between 2 and the {experts} experts of to.num_local_experts; the gate of a single "
            "one is always 1, and its router would never learn"
        )
    reads = _read_as_mixtral(config, mixtral_config(config, shards), shards, 1.0, down)
    shared = expert_moments == "shared"
    return Plan(
        resize(reads.config, {"num_local_experts": experts}, {"num_experts_per_tok": top_k}),
        {"experts": copied(torch.arange(experts) % shards)},
        reads=reads,
        amend=_redrawn(torch.arange(experts) // shards, config),
        newborn=(ROUTER,) if shared else (ROUTER, GATE_UP, DOWN),
        leading_moments=shared and experts > shards,
    )


def mixtral_config(config: PreTrainedConfig, experts: int) -> MixtralConfig:
    """That of the Mixtral which shares out a dense Llama's or Mistral's feed-forward among `experts`, all chosen.

    Raises ValueError where a Mixtral has no place for what the model has.
    """
    for field in ("attention_bias", "mlp_bias"):
        if getattr(config, field, False):
            raise ValueError(f"operator: a Mixtral has no biases, and this {config.model_type} has {field} = true")
    if config.intermediate_size % experts:
        raise ValueError(f"shards: {experts} does not divide intermediate_size = {config.intermediate_size}")
    own = {"model_type", "architectures", "transformers_version"}
    both = MixtralConfig().to_dict().keys() & config.to_dict().keys() - own
    fields = {key: value for key, value in config.to_dict().items() if key in both}
    fields |= {"intermediate_size": config.intermediate_size // experts}
    made = MixtralConfig(**fields, num_local_experts=experts, num_experts_per_tok=experts)
    made._attn_implementation = config._attn_implementation
    return made


def _read_as_mixtral(
    config: PreTrainedConfig, mixtral: PreTrainedConfig, shards: int, before: float, down: float
) -> Reading:
    """The dense model as a Mixtral of its shards; `before` stands on gate_proj and up_proj, `down` on down_proj."""
    width, inner = config.hidden_size, config.intermediate_size // shards

    def sources(name: str) -> tuple[str, ...]:
        if name.endswith(GATE_UP):
            return tuple(name.replace(GATE_UP, f".mlp.{each}_proj.weight") for each in ("gate", "up"))
        if name.endswith(DOWN):
            return (name.replace(DOWN, ".mlp.down_proj.weight"),)
        return () if name.endswith(ROUTER) else (name,)

    def join(name: str, olds: list[Tensor], exponent: int) -> Tensor:
        if name.endswith(GATE_UP):
            parts = [(old * before**exponent).view(shards, inner, width) for old in olds]  # (F, C) -> (S, F/S, C)
            return torch.cat(parts, dim=1)
        if name.endswith(DOWN):
            return (olds[0] * down**exponent).view(width, shards, inner).permute(1, 0, 2)  # (C, F) -> (S, C, F/S)
        return torch.zeros(shards, width) if name.endswith(ROUTER) else olds[0]

    return Reading(mixtral, sources, join)


# --- the router ---


def _redrawn(groups: Tensor, config: PreTrainedConfig) -> Callable[[str, Tensor, torch.Generator], Tensor]:
    """Random rows as the architecture begins, one for each group; groups: (experts,)."""

    def amend(name: str, weight: Tensor, generator: torch.Generator) -> Tensor:
        if not name.endswith(ROUTER):
            return weight
        rows = torch.randn(int(groups.max()) + 1, weight.shape[1], generator=generator)
        return (rows * config.initializer_range)[groups].to(weight)

    return amend


def _with_noisy_copies(
    old: int, noise: float, config: PreTrainedConfig
) -> Callable[[str, Tensor, torch.Generator], Tensor]:
    def amend(name: str, weight: Tensor, generator: torch.Generator) -> Tensor:
        if not noise or not name.endswith(ROUTER):
            return weight
        drawn = torch.randn(weight.shape, generator=generator) * (noise * spread(weight, config))
        drawn[:old] = 0
        return weight + drawn.to(weight)

    return amend


def _require(key: str, value: str, *allowed: str, **refused: str) -> None:
    if value not in allowed:
        why = f"; {value}: {refused[value]}" if value in refused else ""
        raise ValueError(f"{key}: {value!r} is not possible; allowed: {', '.join(allowed)}{why}")


def _require_steps(router: str, router_steps: int) -> None:
    if (router == "retrain") != (router_steps > 0):
        why = "the number of training steps, at least 1" if router == "retrain" else "none, unless router = 'retrain'"
        raise ValueError(f"router_steps: {router_steps}; router = {router!r} needs {why}")


# --- carried by training ---


class TrainsOnly:
    """Some parameters, by name, trained alone for the first steps after a growth: router = "retrain".

    All others have gradients too, which are dropped before an optimizer sees them (`before_update`), so that neither
    the optimizer nor what wraps the model has to be made anew. The weights are an ordinary model's all along.
    """

    kind = "trains_only"

    def __init__(self, model: Any, names: Sequence[str], ramp_steps: int, steps: int = 0) -> None:
        """steps: how many of the `ramp_steps` are done."""
        self.model, self.names, self.ramp_steps, self.steps = model, frozenset(names), ramp_steps, steps
        model.carried = self

    @property
    def finished(self) -> bool:
        return self.steps >= self.ramp_steps

    def before_update(self) -> None:
        for name, p in self.model.named_parameters():
            if name not in self.names:
                p.grad = None

    def advance(self) -> None:
        self.steps += 1

    def remove(self) -> None:
        del self.model.carried

    def ordinary(self) -> dict[str, Tensor]:
        return self.model.state_dict()

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def describe(self) -> dict[str, Any]:
        numbers = {"names": sorted(self.names), "ramp_steps": self.ramp_steps, "steps": self.steps}
        return {"kind": self.kind, **numbers, "model.safetensors": "what the model computes"}

    @classmethod
    def restored(cls, model: Any, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        cls(model, *(description[key] for key in ("names", "ramp_steps", "steps")))


class PhaseIn:
    """A bias on the choice of a Mixtral's experts, hung on the model: top_k of logits + bias, gates from logits alone.

    New experts have minus infinity in the first training step, so that the model computes what it did. After that they
    start at -`start` and rise by start / ramp_steps after every step in which they had less than the mean load, up to
    0. Once each has reached 0, or the mean load, it is `finished`, and `remove` takes away what is left of the bias.
    The weights are an ordinary Mixtral's all along.
    """

    kind = "phase_in"

    def __init__(self, model: Any, old: int, ramp_steps: int, start: float, steps: int = 0) -> None:
        """model: grown already, by phase_in_experts; old: its experts before; steps: how many are done."""
        self.model, self.old, self.ramp_steps, self.start, self.steps = model, old, ramp_steps, start, steps
        self.routers: list[Any] = routers_of(model)
        shape = (len(self.routers), model.config.num_local_experts)
        self.raises = torch.full(shape, ramp_steps)  # how often each bias has been raised; HELD: not let go yet
        self.raises[:, old:] = HELD
        self.full = torch.zeros(shape, dtype=torch.bool)  # has had the mean load
        self.counts = torch.zeros(shape, device=model.device)  # of the choices in this training step
        for layer, router in enumerate(self.routers):
            router.forward = partial(self._choose, router, layer)
        self._set()
        model.carried = self

    def _set(self) -> None:
        biases = -self.start * (1 - self.raises / self.ramp_steps)
        self.biases = biases.masked_fill(self.raises == HELD, -torch.inf).to(self.counts)  # (layers, experts)

    def _choose(self, router: Any, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(hidden.reshape(-1, router.hidden_dim), router.weight)  # (tokens, experts)
        chosen = torch.topk(logits + self.biases[layer], router.top_k, dim=-1).indices
        gates = F.softmax(logits.float(), dim=-1).gather(-1, chosen)
        if router.training:
            count_choices(self.counts[layer], chosen)
        return logits, gates / gates.sum(dim=-1, keepdim=True), chosen

    @property
    def finished(self) -> bool:
        return bool(((self.raises == self.ramp_steps) | self.full).all())

    def advance(self) -> None:
        """One more training step is done; its choices, those of all ranks, decide what rises."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.counts)
        counts = self.counts.cpu()
        self.full |= counts * counts.shape[1] >= counts.sum(-1, keepdim=True)
        raised = (self.raises.clamp(min=0) + 1).clamp(max=self.ramp_steps)
        self.raises = torch.where(self.full, self.raises, raised)
        self.counts.zero_()
        self.steps += 1
        self._set()

    def remove(self) -> None:
        for router in self.routers:
            del router.forward
        del self.model.carried

    def ordinary(self) -> dict[str, Tensor]:
        return self.model.state_dict()

    def tensors(self) -> dict[str, Tensor]:
        return {"raises": self.raises, "full": self.full}

    def describe(self) -> dict[str, Any]:
        form = "what the model computes without the bias"
        numbers = {"old": self.old, "ramp_steps": self.ramp_steps, "start": self.start, "steps": self.steps}
        return {"kind": self.kind, **numbers, "model.safetensors": form}

    @classmethod
    def restored(cls, model: Any, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        phase = cls(model, *(description[key] for key in ("old", "ramp_steps", "start", "steps")))
        phase.raises.copy_(tensors["raises"])
        phase.full.copy_(tensors["full"])
        phase._set()
