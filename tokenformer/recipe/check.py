"""Nested tables of plain values -> the dataclasses of sections.py: each key known, of its type, in its range.

Every mistake is a ValueError of one line: the dotted key, the value, what is allowed, and where it came from.
"""

import dataclasses
import json
import math
import operator
import re
import types
from collections.abc import Callable
from typing import Any, get_args, get_origin, get_type_hints

from ..nearest import nearest

Where = Callable[[str], str]  # dotted key -> the file, or the command line, that it came from
KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text in quotes",
    dict: "a table",
}
LISTED = {int: "whole numbers", float: "numbers", str: "texts"}
BOUNDS = {
    "low": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "high": ("at most", operator.le),
    "below": ("below", operator.lt),
}


def build(cls: Any, table: Any, path: str, where: Where) -> Any:
    """The dataclass `cls` from a table, each value checked against the field's type and limits."""
    if not isinstance(table, dict):
        raise ValueError(f"{path}: must be a table, not {describe(table)} (from {where(path)})")
    hints, prefix = get_type_hints(cls), f"{path}." if path else ""
    fields = {f.metadata.get("file", f.name): f for f in dataclasses.fields(cls) if "rest" not in f.metadata}
    rest = next((f for f in dataclasses.fields(cls) if "rest" in f.metadata), None)
    values: dict[str, Any] = {rest.name: {}} if rest else {}
    for name, value in table.items():
        dotted = prefix + name
        if name in fields:
            field = fields[name]
            values[field.name] = check_value(dotted, value, hints[field.name], field.metadata, where)
        elif rest and (rest.metadata["rest"] is True or name in rest.metadata["rest"]):
            values[rest.name][name] = check_plain(dotted, value, where)
        else:
            valid = [*fields, *(rest.metadata["rest"] if rest else ())]
            hint = nearest(name, valid, "key") or "; `tokenformer recipe` lists the valid ones"
            raise ValueError(f"{dotted}: unknown key in {where(dotted)}{hint}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in table:
            raise ValueError(f"{prefix}{name}: missing in {where(prefix + name)}; {field.metadata['doc']}")
    return cls(**values)


def check_value(dotted: str, value: Any, hint: Any, limits: Any, where: Where) -> Any:
    """The value in its declared type; ValueError if it is of another, or outside its limits."""
    if isinstance(hint, types.UnionType):  # every union here is "T or None"
        if value is None:
            return None
        hint = get_args(hint)[0]
    if dataclasses.is_dataclass(hint):
        return build(hint, value, dotted, where)
    if get_origin(hint) is list:
        (inner,) = get_args(hint)
        if not isinstance(value, list):
            several = LISTED.get(inner, "tables")
            raise ValueError(f"{dotted}: must be a list of {several}, not {describe(value)} (from {where(dotted)})")
        return [check_value(f"{dotted}.{i}", entry, inner, limits, where) for i, entry in enumerate(value)]
    kind = get_origin(hint) or hint
    if kind is float and type(value) is int:
        value = float(value) if abs(value) < 2**1000 else math.inf
    if type(value) is not kind:
        raise ValueError(f"{dotted}: must be {KINDS[kind]}, not {describe(value)} (from {where(dotted)})")
    if trouble := out_of_limits(value, limits):
        raise ValueError(
            f"{dotted}: {describe(value)} is not allowed; it must {trouble} (from {where(dotted)})"
        )
    return value


def check_plain(dotted: str, value: Any, where: Where) -> Any:
    """A value whose type is not known here; it must be one that JSON can hold (TOML also has dates)."""
    if isinstance(value, dict | list):
        for name, entry in value.items() if isinstance(value, dict) else enumerate(value):
            check_plain(f"{dotted}.{name}", entry, where)
        return value
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        raise ValueError(f"{dotted}: {describe(value)} is not allowed here (from {where(dotted)})") from None
    return value


def out_of_limits(value: Any, limits: Any) -> str:
    """What the value must do and does not; empty if it is well."""
    if isinstance(value, float) and not math.isfinite(value):
        return "be finite"
    if "choices" in limits and value not in limits["choices"]:
        return f"be one of {', '.join(limits['choices'])}{nearest(value, limits['choices'], 'value')}"
    if "pattern" in limits and not re.fullmatch(limits["pattern"], value, re.DOTALL):
        return f"be {limits['allowed']}" if "allowed" in limits else "not be empty"
    bounds = {name: limits[name] for name in BOUNDS if name in limits}
    if all(BOUNDS[name][1](value, limit) for name, limit in bounds.items()):
        return ""
    return "be " + " and ".join(f"{BOUNDS[name][0]} {limit}" for name, limit in bounds.items())


def describe(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, dict | list):
        return "a table" if isinstance(value, dict) else "a list"
    return json.dumps(value) if isinstance(value, str | bool | int | float) else str(value)
