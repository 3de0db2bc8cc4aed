"""LoRA (arXiv 2106.09685) held against a memory: the rank at which it trains as many parameters."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from .places import base_parameters


def lora_rank(model: nn.Module, targets: Iterable[str], parameters: int) -> tuple[int, int]:
    """The rank at which LoRA on `targets` trains nearest to `parameters` parameters, and how many it trains then.

    targets: the ends of names, of modules or of parameters, as PEFT's target_modules and target_parameters take them. A
    matrix (m, n) costs m + n a rank, each matrix of a stack of them too. ValueError if a target is not there.
    """
    names = {name: p.shape for name, p in base_parameters(model) if p.ndim in (2, 3)}
    found: set[str] = set()
    for target in targets:
        ends = (f".{target}", f".{target}.weight")
        matching = {name for name in names if f".{name}".endswith(ends)}
        if not matching:
            raise ValueError(f"targets: {target!r} is the end of no matrix's name in this model")
        found |= matching
    shapes = [names[name] for name in found]
    per_rank = sum((shape[-1] + shape[-2]) * (shape[0] if len(shape) == 3 else 1) for shape in shapes)
    rank = max(1, round(parameters / per_rank))
    return rank, rank * per_rank
