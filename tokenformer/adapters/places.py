"""Where in a model a memory goes, read off the tables of named axes (models/axes.py)."""

from __future__ import annotations

import os.path
from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..growth.plan import Plan, padded
from ..models.axes import axis_sizes, parameter_dims, resize, size_of, table_of
from ..pattention import WITHOUT_NORM

BESIDE = "parameter_tokens"  # the attribute of a module that holds the memories beside it
WHERE = ("feed_forward", "attention")


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The model's own parameters, without those of memories; tied ones once."""
    return ((name, p) for name, p in model.named_parameters() if f".{BESIDE}." not in name)


def axes_of(config: PreTrainedConfig, name: str) -> set[str]:
    """The axes of a parameter; none if no table names it."""
    try:
        dims = parameter_dims(config, name)
    except ValueError:
        return set()
    return {axis for dim in dims for part in dim for axis, _ in part}


def rows_axis(config: PreTrainedConfig) -> tuple[str, str]:
    """The axis that a feed-forward's rows lie along, and the configuration's field that is its size."""
    fields = {axis: field for field, axis in table_of(config).grows.items()}
    for axis in ("ffn", "ffn_tokens"):
        if axis in fields:
            return axis, fields[axis]
    raise ValueError(f"where: 'feed_forward' is not there in {config.model_type}, whose layers have no feed-forward")


def places(model: PreTrainedModel, where: str) -> list[str]:
    """The names of the modules that a memory stands beside: of each layer the one that holds the feed-forward's rows (a
    mixture's experts), or the projections of attention. ValueError if there are none."""
    if where not in WHERE:
        raise ValueError(f"where: {where!r} is not known; allowed: {', '.join(WHERE)}")
    config, layers = model.config, table_of(model.config).layers
    if where == "attention" and "kv_heads" not in table_of(config).sizes:
        raise ValueError(f"where: 'attention' is not there in {config.model_type}")
    axis = rows_axis(config)[0] if where == "feed_forward" else "kv_heads"
    owners: dict[str, list[list[str]]] = {}
    for name, p in base_parameters(model):
        if name.startswith(f"{layers}.") and p.ndim > 1 and axis in axes_of(config, name):
            parts = name.split(".")
            group = parts[: layers.count(".") + 2] if where == "feed_forward" else parts[:-1]
            owners.setdefault(".".join(group), []).append(parts[:-1])
    if not owners:
        raise ValueError(
            f"where: no {where.replace('_', '-')} of a {config.model_type} is found in this {type(model).__name__}; "
            "give the model for causal language modelling itself, before PEFT or torch.compile wraps it"
        )
    return [".".join(os.path.commonprefix(each)) for each in owners.values()]


def rows_plan(config: PreTrainedConfig, tokens: int) -> Plan:
    """The exact growth of the feed-forward by so many rows, whose new slots are a memory of kind `rows`.

    Rows are closed on the side of their values, and start random on the other. A TokenFormer whose theta norms the
    scores of all rows together is grown by zero keys (growth/tokens.py says why that is exact). ValueError where no
    start is exact.
    """
    axis, field = rows_axis(config)
    theta = getattr(config, "theta", None)
    if table_of(config).unit_norm:
        raise ValueError(f"kind: 'rows' does not fit {config.model_type}, whose rows are unit vectors; pattention does")
    if theta == "softmax":
        raise ValueError(
            "kind: 'rows' cannot be added to theta=softmax exactly, since any new score, exp(0) = 1 too, takes weight "
            "from the old rows; all other theta can, and kind='pattention' stands beside any"
        )
    old = size_of(config, field)
    closed = "write" if theta is not None and theta not in WITHOUT_NORM else "read"
    return Plan(resize(config, {field: old + tokens}), {axis: padded(old, old + tokens, closed)})


def sizes_of(config: PreTrainedConfig) -> dict[str, int]:
    return {"layers": config.num_hidden_layers, **axis_sizes(config)}
