"""The rows of a model's memories: which tensors hold them, and what each row does on a text.

A memory is a module with a table of n rows: a Pattention with its parameter tokens, or a feed-forward with its hidden
units. Row i has keys, which say when it speaks, and a value, which says what:

    y = sum_i w_i v_i        w_i = theta(x · k_i), times x · u_i where the layer is gated; v_i the value

So any subset of the rows is a memory of the same kind. Which rows matter is said by one of these scores, a number for
each row of a memory; the larger, the more it matters, and of two equal rows the earlier one counts as the larger:

    order        -i: the oldest rows are the first ones, where growth appends and nested training takes prefixes
    magnitude    ||k_i|| ||v_i||, gated ||k_i|| ||u_i|| ||v_i||; a bias is one more entry of its key
    activation   root(mean over tokens of w_i²) ||v_i||
    gradient     mean over batches of |sum_c dL/dv_ic v_ic|: the first-order change of the batch's mean loss L when the
                 row falls silent (arXiv 1906.10771, with |.| for its square)
    use          share of tokens at which |w_i| ||v_i|| is among the largest tenth of its memory

Legend: N tokens, n rows, C the width of a value.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .evaluate import cross_entropy
from .models.axes import parameter_dims, size_of, table_of
from .models.tables import TABLES
from .pattention import WITHOUT_NORM, Pattention, default_scale

RULES = ("order", "magnitude", "activation", "gradient", "use")
RULES_OF_TEXT = ("activation", "gradient", "use")
STRONGEST = 0.1  # share of a memory's rows that count as used by a token


@dataclasses.dataclass(eq=False)
class RowTable:
    """One table of rows in a model: where it is, and for each tensor of it the dimension along which its rows lie."""

    place: str  # the module's name
    field: str  # of the configuration, with the number of rows
    dims: dict[str, int] = dataclasses.field(default_factory=dict)  # parameter -> dimension
    value: str = ""  # the parameter that holds the values


def row_fields(config: PreTrainedConfig) -> dict[str, str]:
    """Fields of the configuration that are numbers of rows -> their axes; ValueError if there are none."""
    table = table_of(config)
    fields = {name: axis for name, axis in table.grows.items() if axis in table.rows}
    if getattr(config, "attention_projections", None) == "linear":
        fields = {name: axis for name, axis in fields.items() if name == "ffn_tokens"}
    if not fields:
        known = ", ".join(name for name, each in TABLES.items() if each.rows)
        raise ValueError(f"{config.model_type} has no rows that could be left out one by one; these have: {known}")
    return fields


def by_field(config: PreTrainedConfig, option: str, value: Any) -> dict[str, Any]:
    """What is meant for each field of rows: one value for all, or a mapping's by the names that `grow` takes ("ffn").

    ValueError, naming the option, on a name that is no field of rows or is given twice, or where none is named.
    """
    fields, said = row_fields(config), table_of(config).names
    if not isinstance(value, Mapping):
        return dict.fromkeys(fields, value)
    found: dict[str, Any] = {}
    for name, each in value.items():
        field = said.get(name, name)
        if field not in fields:
            raise ValueError(f"{option}: {name} is no number of rows; {config.model_type} has {', '.join(fields)}")
        if field in found:
            raise ValueError(f"{option}: {field} is given twice")
        found[field] = each
    if not found:
        raise ValueError(f"{option}: no memory is named; allowed: {', '.join(fields)}")
    return found


def row_tables(model: PreTrainedModel) -> list[RowTable]:
    """Every memory of a model, in the order of its modules. ValueError if the architecture has none."""
    axes = {axis: name for name, axis in row_fields(model.config).items()}
    found: dict[str, RowTable] = {}
    for name, _ in model.named_parameters():
        for i, dim in enumerate(parameter_dims(model.config, name)):
            axis, mark = dim[0][0]
            if axis in axes:
                place = _place(name)
                memory = found.setdefault(place, RowTable(place, axes[axis]))
                memory.dims[name] = i
                if mark == "<":
                    memory.value = name
    return list(found.values())


def _place(name: str) -> str:
    """The module whose rows a parameter holds: a Pattention itself, or what holds the linear layers."""
    module, _, last = name.rpartition(".")
    return module.rpartition(".")[0] if last in ("weight", "bias") else module


def rows_of(model: nn.Module, memory: RowTable, name: str) -> Tensor:
    """A parameter of the memory as (n, entries of a row), in float32 or wider."""
    p = model.get_parameter(name).detach().movedim(memory.dims[name], 0)
    return (p if p.dtype == torch.float64 else p.float()).reshape(len(p), -1)


def kept_rows(rows: int, share: float) -> int:
    """How many of `rows` rows a share of them is: the nearest whole number."""
    return math.floor(rows * share + 0.5)


def kept_scale(theta: str, scale: float, kept: int, rows: int) -> float:
    """The stored scale of a Pattention that keeps so many of its rows: scale(k) = scale(n) s(k) / s(n), s being the
    scale of a new layer: root(k / n) times the old for the L2 forms, k / n for softmax, the old itself without a norm.

    A norm over k of n alike scores is root(k / n) as large, so that each row goes on to speak as loudly as before.
    """
    return scale * (default_scale(theta, kept) / default_scale(theta, rows))


def heard(theta: str, key: Tensor) -> Tensor:
    """(n,): which rows take part in the norm. A zero key scores zero, which adds nothing to an L2 norm."""
    silent = theta not in (*WITHOUT_NORM, "softmax")
    return (key != 0).any(1) if silent else torch.ones(len(key), dtype=torch.bool, device=key.device)


# --- what rows do on a text ---


@contextlib.contextmanager
def watched(model: PreTrainedModel, see: Callable[[RowTable, Tensor], None]) -> Iterator[None]:
    """Inside, `see(memory, weights)` gets the weights w (N, n) of every memory that the model consults."""
    handles = []
    for memory in row_tables(model):
        module = model.get_submodule(memory.place)
        if not isinstance(module, Pattention):  # the layer that holds the values is given the weights
            module = model.get_submodule(memory.value.rpartition(".")[0])
        handles.append(module.register_forward_pre_hook(_telling(see, memory)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _telling(see: Callable[[RowTable, Tensor], None], memory: RowTable) -> Callable[[nn.Module, Any], None]:
    @torch.no_grad()
    def hook(module: nn.Module, inputs: Any) -> None:
        x = inputs[0].detach().flatten(0, -2)  # (N, C)
        if isinstance(module, Pattention):
            x = module.row_weights(x)
        see(memory, x if x.dtype == torch.float64 else x.float())

    return hook


@torch.no_grad()
def watch_text(model: PreTrainedModel, batches: Iterable[Tensor], see: Callable[[RowTable, Tensor], None]) -> None:
    """`watched` while the model reads the first T of token ids (B, T + 1), as in evaluation."""
    training = model.training
    model.eval()
    try:
        with watched(model, see):
            for batch in batches:
                model(input_ids=batch[:, :-1].to(model.device), use_cache=False)
    finally:
        model.train(training)


def scores(model: PreTrainedModel, by: str, batches: Iterable[Tensor] | None = None) -> dict[str, Tensor]:
    """For each memory, by its place, the score of each of its rows (n,) in float64; the module's head has the rules.

    batches: token ids (B, T + 1), for the rules that need a text. The model is left as it was. Raises ValueError for a
    rule that is not known, or one without the text that it needs.
    """
    if by not in RULES:
        raise ValueError(f"by: {by!r} is not known; allowed: {', '.join(RULES)}")
    if by in RULES_OF_TEXT:
        batches = list(batches or ())
        if not batches:
            raise ValueError(f"by: {by!r} looks at what rows do on a text, and none is given")
        return _gradient(model, batches) if by == "gradient" else _on_text(model, by, batches)
    result = {}
    for memory in row_tables(model):
        rows = size_of(model.config, memory.field)
        result[memory.place] = -torch.arange(rows, dtype=torch.float64) if by == "order" else _magnitude(model, memory)
    return result


def ranking(model: PreTrainedModel, by: str, batches: Iterable[Tensor] | None = None) -> dict[str, Tensor]:
    """For each memory, by its place, its rows (n,) from the one that matters most to the least: `scores`, sorted."""
    return {p: torch.sort(s, descending=True, stable=True).indices for p, s in scores(model, by, batches).items()}


@torch.no_grad()
def _magnitude(model: PreTrainedModel, memory: RowTable) -> Tensor:
    squares: dict[str, Any] = {}  # of one key or value; a bias belongs to its weight
    for name in memory.dims:
        one = name.rpartition(".")[0] if name.endswith((".weight", ".bias")) else name
        squares[one] = squares.get(one, 0) + rows_of(model, memory, name).double().square().sum(1)
    return torch.stack(list(squares.values())).prod(0).sqrt().cpu()


@torch.no_grad()
def value_norms(model: PreTrainedModel, memory: RowTable) -> Tensor:
    return rows_of(model, memory, memory.value).double().norm(dim=1)


@torch.no_grad()
def _on_text(model: PreTrainedModel, by: str, batches: list[Tensor]) -> dict[str, Tensor]:
    norms = {memory.place: value_norms(model, memory) for memory in row_tables(model)}
    sums = {place: torch.zeros_like(norm) for place, norm in norms.items()}
    tokens = sum(batch[:, 1:].numel() for batch in batches)

    def see(memory: RowTable, weights: Tensor) -> None:
        loud = loudness(weights, norms[memory.place])
        sums[memory.place] += loud.double().square().sum(0) if by == "activation" else strongest(loud).double().sum(0)

    watch_text(model, batches, see)
    power = 0.5 if by == "activation" else 1.0
    return {place: (total / tokens).pow(power).cpu() for place, total in sums.items()}


def loudness(weights: Tensor, norms: Tensor) -> Tensor:
    """|w_i| ||v_i|| of weights (N, n) and norms of values (n,), in float32 or wider."""
    wide = weights.detach().abs()
    wide = wide if wide.dtype == torch.float64 else wide.float()
    return wide * norms.to(wide)


def strongest(loudness: Tensor, share: float = STRONGEST) -> Tensor:
    """Where |w_i| ||v_i|| (N, n) is above zero and among the largest `share` of its row; ties at the edge are in."""
    count = max(1, kept_rows(loudness.shape[1], share))
    least = loudness.topk(count, dim=1).values[:, -1:]
    return (loudness >= least) & (loudness > 0)


def _gradient(model: PreTrainedModel, batches: list[Tensor]) -> dict[str, Tensor]:
    values = {memory: model.get_parameter(memory.value) for memory in row_tables(model)}
    trained = {memory: p.requires_grad for memory, p in values.items()}
    sums: dict[str, Any] = dict.fromkeys((memory.place for memory in values), 0)
    training = model.training
    model.eval()
    try:
        for p in values.values():
            p.requires_grad_(True)
        for batch in batches:
            with torch.enable_grad():
                loss = cross_entropy(model, batch.to(model.device))
            gradients = torch.autograd.grad(loss, list(values.values()))
            for (memory, p), gradient in zip(values.items(), gradients, strict=True):
                product = gradient.double() * p.detach().double()
                sums[memory.place] += product.sum(1 - memory.dims[memory.value]).abs().cpu() / len(batches)
    finally:
        for memory, p in values.items():
            p.requires_grad_(trained[memory])
        model.train(training)
    return sums
