"""More layers: closed ones, which leave the function alone, or repetitions of those that are there."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from transformers import PreTrainedConfig

from ..models.axes import resize
from .plan import FRESH, Layer, Plan

Sizes = Mapping[str, int]


def identity_blocks(config: PreTrainedConfig, sizes: Sizes, where: str = "spread") -> Plan:
    """Layer addition (arXiv 2308.06103): new layers with random weights whose last projections are zero. Exact.

    `where`: "spread" among the old layers, or at the "end".
    """
    return Plan(resize(config, sizes), layers=new_blocks(config, sizes["num_hidden_layers"], where))


def llama_pro(config: PreTrainedConfig, sizes: Sizes, freeze: bool = False) -> Plan:
    """LLaMA Pro (arXiv 2401.02415): after every group of old layers a copy of its last, with zero output. Exact.

    With `freeze` only the new layers are trained.
    """
    layers = closed_copies(config, sizes["num_hidden_layers"])
    old, added = config.num_hidden_layers, sizes["num_hidden_layers"] - config.num_hidden_layers
    if added and old % added:
        divisors = ", ".join(str(old + n) for n in range(1, old + 1) if old % n == 0)
        raise ValueError(f"to.num_hidden_layers: {old} layers do not fall into {added} groups; allowed: {divisors}")
    return Plan(resize(config, sizes), layers=layers, frozen=freeze)


def stack(config: PreTrainedConfig, sizes: Sizes, order: str = "stack") -> Plan:
    """G_stack (arXiv 2405.15319): the whole of the old layers, several times over: 0 .. L-1, 0 .. L-1.

    `order` = "interleave" repeats each layer in place instead: 0, 0, 1, 1. Changes the function, and recovers fast.
    """
    old, size = config.num_hidden_layers, sizes["num_hidden_layers"]
    if order not in ("stack", "interleave"):
        raise ValueError(f"order: {order!r} is not known; allowed: stack, interleave")
    if not old or size % old:
        raise ValueError(f"to.num_hidden_layers: {size} is not a multiple of {old}; stack repeats the whole")
    times = size // old
    return _sources(config, sizes, [i % old if order == "stack" else i // times for i in range(size)])


def gradual_stack(config: PreTrainedConfig, sizes: Sizes) -> Plan:
    """Gradual stacking (arXiv 2409.19044): a copy of the last block of layers, put on top."""
    old, added = config.num_hidden_layers, _at_most_twice(config, sizes)
    return _sources(config, sizes, [*range(old), *range(old - added, old)])


def midas(config: PreTrainedConfig, sizes: Sizes) -> Plan:
    """MIDAS (arXiv 2409.19044): the block of layers in the middle, twice."""
    old, added = config.num_hidden_layers, _at_most_twice(config, sizes)
    start = (old - added) // 2
    return _sources(config, sizes, [*range(start + added), *range(start, old)])


def solar(config: PreTrainedConfig, sizes: Sizes) -> Plan:
    """SOLAR's depth up-scaling (arXiv 2312.15166): two copies of L layers, without the last m of the first and the
    first m of the second: 2 (L - m) layers."""
    old, size = config.num_hidden_layers, sizes["num_hidden_layers"]
    if size % 2 or size > 2 * old:
        raise ValueError(f"to.num_hidden_layers: {size}; solar makes an even number of layers, at most {2 * old}")
    return _sources(config, sizes, [*range(size // 2), *range(old - size // 2, old)])


def jump(config: PreTrainedConfig, sizes: Sizes, layers: str = "random") -> Plan:
    """From no layer or one to full depth at once (arXiv 2511.04981), in the stable phase of the learning rate.

    `layers`: the new ones "random", as the architecture begins, or "copied" from the one there is.
    """
    old, size = config.num_hidden_layers, sizes["num_hidden_layers"]
    if old > 1:
        raise ValueError(f"operator: jump starts from a model of 0 or 1 layers, and this one has {old}; stack does not")
    if layers not in ("random", "copied") or (layers == "copied" and old == 0):
        allowed = "random, copied" if old else "random, there is no layer to copy"
        raise ValueError(f"layers: {layers!r} is not known; allowed: {allowed}")
    return _sources(config, sizes, [*range(old), *[FRESH if layers == "random" else 0] * (size - old)])


# --- what they share ---


def new_blocks(
    config: PreTrainedConfig, size: int, where: str = "spread", closed: bool = True
) -> tuple[Layer, ...] | None:
    """Layers of the architecture's own initialisation among the old ones; None if none are added."""
    if where not in ("spread", "end"):
        raise ValueError(f"where: {where!r} is not known; allowed: spread, end")
    return _insert(config, size, where, lambda last: Layer(FRESH, closed))


def closed_copies(config: PreTrainedConfig, size: int) -> tuple[Layer, ...] | None:
    """Closed copies, each of the layer below it, spread among the old ones; None if none are added."""
    if config.num_hidden_layers == 0 and size:
        raise ValueError("to.num_hidden_layers: there is no layer to copy; identity_blocks adds new ones")
    return _insert(config, size, "spread", lambda last: Layer(last, closed=True))


def _insert(
    config: PreTrainedConfig, size: int, where: str, make: Callable[[int], Layer]
) -> tuple[Layer, ...] | None:
    old, added = config.num_hidden_layers, size - config.num_hidden_layers
    if added == 0:
        return None
    layers: list[Layer] = []
    for i in range(old):
        layers.append(Layer(i))
        due = (i + 1) * added // old if where == "spread" else 0
        layers += [make(i)] * (due - (len(layers) - 1 - i))
    return (*layers, *[make(old - 1)] * (size - len(layers)))


def _sources(config: PreTrainedConfig, sizes: Sizes, sources: list[int]) -> Plan:
    return Plan(resize(config, sizes), layers=tuple(Layer(source) for source in sources))


def _at_most_twice(config: PreTrainedConfig, sizes: Sizes) -> int:
    old, size = config.num_hidden_layers, sizes["num_hidden_layers"]
    if size > 2 * old:
        raise ValueError(f"to.num_hidden_layers: {size} is more than twice {old}, and a block is copied once at a time")
    return size - old
