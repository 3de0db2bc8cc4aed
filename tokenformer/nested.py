"""Nested training: every step trains a prefix of the rows, so that each prefix of the trained model is a model.

A step draws one share, the same for all memories (rows.py), and computes with the first rows of each, that share of
them, under the scale that `kept_scale` gives to so many: what it computes, and the gradients of what it keeps, are
those of the ordinary model that `shrink` by order cuts out. Rows beyond the prefix get a gradient of zero, which is the
true one: the step's loss does not depend on them. So they go on as under any AdamW: they decay, and what momentum they
have runs out, as with the embeddings of words that a batch does not have. On average a step follows the gradient of the
mean loss over the shares.

    power_of_two    1, 1/2, 1/4 ... down to the smallest, all equally often (the exponents of FlexTok, arXiv 2502.13967)
    uniform         any share from the smallest to 1 (nested dropout, arXiv 1402.0915)

The share is a function of the seed and the step. Steps come in cycles, in which every share of power_of_two, and every
sixteenth of uniform's range, comes once, in an order drawn anew: after a whole cycle what was spent is what the mean
says, whatever the seed.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
from transformers import PreTrainedConfig, PreTrainedModel

from .models.axes import size_of
from .pattention import Pattention
from .rows import kept_rows, kept_scale, row_fields, row_tables

UNIFORM_PARTS = 16


def powers(smallest: float) -> list[float]:
    """1, 1/2, 1/4 ... down to the smallest."""
    shares = [1.0]
    while shares[-1] / 2 >= smallest:
        shares.append(shares[-1] / 2)
    return shares


def share_at(rule: str, smallest: float, seed: int, step: int) -> float:
    """The share of the rows that step `step` computes with; 1 for the rule "none"."""
    if rule == "none":
        return 1.0
    parts = len(powers(smallest)) if rule == "power_of_two" else UNIFORM_PARTS
    cycle, place = divmod(step, parts)
    draw = np.random.RandomState([seed, cycle])  # whose streams numpy keeps for good
    part = int(draw.permutation(parts)[place])
    if rule == "power_of_two":
        return powers(smallest)[part]
    return smallest + (1 - smallest) * (part + float(draw.random_sample(parts)[place])) / parts


def mean_share(rule: str, smallest: float) -> Fraction:
    """The mean of `share_at` over the steps."""
    if rule == "none":
        return Fraction(1)
    if rule == "uniform":
        return (1 + Fraction(smallest)) / 2
    shares = powers(smallest)
    return sum(map(Fraction, shares), Fraction(0)) / len(shares)


def without_rows(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of the configuration, for counting alone, in which no memory has rows."""
    empty = copy.deepcopy(config)
    for field in row_fields(config):
        setattr(empty, field, 0)
    return empty


def require_nested(config: PreTrainedConfig, smallest: float) -> None:
    """ValueError unless the model has rows, and the smallest prefix has one of every memory."""
    try:
        fields = row_fields(config)
    except ValueError as error:
        raise ValueError(f"train.nested: {error}") from None
    for field in fields:
        if size_of(config, field) * smallest < 1:
            raise ValueError(
                f"train.nested_smallest = {smallest:g} of {field} = {size_of(config, field)} is less than one row"
            )


@contextlib.contextmanager
def prefix(model: PreTrainedModel, share: float) -> Iterator[None]:
    """Inside, the model computes, forward and backward, with the first rows of every memory, `share` of them.

    Its parameters are replaced by views of their first rows, through which gradients reach the whole. They are put back
    at the end, so gradients of what was computed inside are to be taken inside, if layers are worked anew for them.
    """
    held: list[tuple[dict[str, Any], str, Any]] = []

    def put(place: dict[str, Any], key: str, value: Any) -> None:
        held.append((place, key, place[key]))
        place[key] = value

    try:
        for memory in row_tables(model) if share < 1 else ():
            rows = size_of(model.config, memory.field)
            kept = kept_rows(rows, share)
            for name, dim in memory.dims.items():
                module_name, _, key = name.rpartition(".")
                module = model.get_submodule(module_name)
                put(module._parameters, key, module.get_parameter(key).narrow(dim, 0, kept))
                if hasattr(module, "nf") and dim == 1:  # GPT-2's linear layers say their width beside their weight
                    put(module.__dict__, "nf", kept)
            module = model.get_submodule(memory.place)
            if isinstance(module, Pattention):
                put(module.__dict__, "scale", kept_scale(module.theta, module.scale, kept, rows))
        yield
    finally:
        for place, key, value in reversed(held):
            place[key] = value
