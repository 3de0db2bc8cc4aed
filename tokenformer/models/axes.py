"""Named axes: what each dimension of each parameter is, one table per architecture, read by the growth engine.

A table is data. Its `parameters` give, for a name with * for the layer's number, one text per dimension, separated by
commas; a dimension is a product of axes, slowest first, or several such parts side by side with | between them (a fused
tensor, slice by slice). Every axis carries a mark that says what the tensor does along it:

    hidden>   writes it: rows that make entries of the axis (biases too)
    hidden<   reads it: columns that take entries of the axis
    hidden=   is the gain of a norm over it
    hidden@   is the gain of the last norm, which the head reads; hidden+ its bias. A tied head is the embedding, which
              is written as that must be: what readers would share among copies, these two take then
    ffn~      passes over it, entry by entry, changing no function when entries are repeated (a convolution's taps)
    experts#  has one slice of it for each entry, read as a whole
    vocab     no mark: it does not grow
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from transformers import PreTrainedConfig

from ..nearest import nearest

MARKS = "><=@+~#"
Part = tuple[tuple[str, str], ...]  # (axis, mark), slowest first
Dim = tuple[Part, ...]  # parts side by side


@dataclasses.dataclass(frozen=True)
class Table:
    """One architecture. Expressions are fields of its configuration with * and / between, alternatives after `or`."""

    parameters: Mapping[str, str]  # name, with * for the layer's number -> dimensions
    sizes: Mapping[str, str]  # axis -> expression
    grows: Mapping[str, str]  # field of the configuration that a person may enlarge -> axis
    norms: Mapping[str, str]  # axis that a norm runs over -> "rms", "layer", or the field that says which
    eps: str = "rms_norm_eps"  # the field with the norms' epsilon, which all of them share
    fixed_writers: tuple[str, ...] = ()  # normed axes whose entries cannot be rescaled (a nonlinearity writes them)
    pins: Mapping[str, str] = dataclasses.field(default_factory=dict)  # fields to write out before sizes change
    follows: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)  # field -> (field grown, value)
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)  # what people say -> field
    refuses: Mapping[str, str] = dataclasses.field(default_factory=dict)  # field -> why it cannot grow
    closes: tuple[str, ...] = ()  # what is zero in a layer that does nothing; by default all that writes `hidden`
    by_layer: tuple[str, ...] = ()  # fields that make a layer depend on its number: depth then cannot grow exactly
    layers: str = "model.layers"  # where the layers lie
    gainless: Mapping[str, str] = dataclasses.field(default_factory=dict)  # axis -> kind of norm without gain in layers
    rows: tuple[str, ...] = ()  # axes whose entries are rows of a memory: any of them make a smaller model (rows.py)
    unit_norm: bool = False  # rows and columns along `hidden` are kept at unit length (nGPT)


@lru_cache(maxsize=4096)
def parse_dims(text: str) -> tuple[Dim, ...]:
    """ "kv> d, hidden<" -> one Dim per dimension."""
    dims = []
    for dim in text.split(","):
        parts = []
        for part in dim.split("|"):
            words = part.split()
            parts.append(tuple((w.rstrip(MARKS), w[len(w.rstrip(MARKS)) :]) for w in words))
        dims.append(tuple(parts))
    return tuple(dims)


def parameter_dims(config: PreTrainedConfig, name: str) -> tuple[Dim, ...]:
    """The dimensions of the parameter called `name`; ValueError if the architecture or the parameter is in no table."""
    pattern = re.sub(r"\.\d+\.", ".*.", name)
    known = table_of(config).parameters
    if pattern not in known:
        raise ValueError(f"parameter {name!r} is in no table of axes of {config.model_type}; it would not be grown")
    return parse_dims(known[pattern])


def table_of(config: PreTrainedConfig) -> Table:
    from .tables import TABLES

    if config.model_type not in TABLES:
        raise ValueError(f"model type {config.model_type!r} has no table of axes; known: {', '.join(TABLES)}")
    return TABLES[config.model_type]


def axis_sizes(config: PreTrainedConfig) -> dict[str, int]:
    """Every axis of the architecture with its size."""
    return {axis: evaluate(expression, config) for axis, expression in table_of(config).sizes.items()}


def norm_kind(config: PreTrainedConfig, axis: str) -> str:
    kind = table_of(config).norms[axis]
    return {"rmsnorm": "rms", "layernorm": "layer"}.get(getattr(config, kind, ""), kind)


def evaluate(expression: str, config: PreTrainedConfig, extra: Mapping[str, int] | None = None) -> Any:
    """`a * b / c or d`, worked from the left; a part with a field that is None is passed over."""
    for alternative in expression.split(" or "):
        words = alternative.split()
        values = [_value(word, config, extra or {}) for word in words[::2]]
        if None in values:
            continue
        result = values[0]
        for operator, value in zip(words[1::2], values[1:], strict=True):
            if operator == "/" and result % value:
                does = f"{result} is not a multiple of {value}"
                raise ValueError(f"{config.model_type} needs {' '.join(words)} to be a whole number, and {does}")
            result = result * value if operator == "*" else result // value
        return result
    raise ValueError(f"{expression}: {config.model_type}'s configuration has no such field")


def _value(word: str, config: PreTrainedConfig, extra: Mapping[str, int]) -> Any:
    return int(word) if word.isdecimal() else extra[word] if word in extra else getattr(config, word, None)


def field_of(config: PreTrainedConfig, name: str) -> str:
    """The configuration's field that a person means by `name`; ValueError if it is none that can grow."""
    table = table_of(config)
    field = table.names.get(name, name)
    if field in table.refuses:
        raise ValueError(f"to.{name}: {table.refuses[field]}")
    if field != "num_hidden_layers" and field not in table.grows:
        known = [*table.grows, "num_hidden_layers"]
        near = nearest(name, [*table.names, *known])
        raise ValueError(f"to.{name}: {config.model_type} has no such axis{near}; allowed: {', '.join(known)}")
    return field


def size_of(config: PreTrainedConfig, field: str) -> int:
    """The size that a field stands for, worked out where the configuration leaves it to be derived."""
    table, value = table_of(config), getattr(config, field, None)
    if value is not None:
        return value
    return evaluate(table.pins.get(field) or table.sizes[table.grows[field]], config)


def resize(config: PreTrainedConfig, sizes: Mapping[str, Any], changes: Mapping[str, Any] | None = None) -> Any:
    """A copy of the configuration with the fields of `sizes` enlarged, those that follow from them, and `changes`.

    Raises ValueError in one line when the architecture does not allow the sizes together.
    """
    table, before = table_of(config), axis_sizes(config)
    new = copy.deepcopy(config)
    for field, expression in table.pins.items():
        setattr(new, field, evaluate(expression, config))
    for field, value in sizes.items():
        setattr(new, field, value)
    for field, (grown, expression) in table.follows.items():
        if grown in sizes and field not in sizes:
            try:
                setattr(new, field, evaluate(expression, new, before))
            except ValueError as error:
                raise ValueError(f"to.{grown}: {sizes[grown]} does not fit, since {error}") from None
    for field, value in (changes or {}).items():
        setattr(new, field, value)
    if isinstance(new.__dict__.get("layer_types"), list):  # which kind each new layer is follows from its source
        kinds = new.layer_types
        new.layer_types = (kinds + kinds[-1:] * new.num_hidden_layers)[: new.num_hidden_layers]
    try:
        new.validate()
    except Exception as error:  # the validators' errors share no narrower class
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"to: {config.model_type} does not allow these sizes: {reason}") from error
    try:
        axis_sizes(new)
    except ValueError as error:
        raise ValueError(f"to: {config.model_type} does not allow these sizes: {error}") from None
    return new
