"""What the rows of a model do on a text: how the load lies on them, what each fires on, which tokens it promotes.

    load        of row i: the tokens at which |w_i| ||v_i|| is above zero and among the k largest of its memory. In
                numbers by growth.load.load_of: entropy, effective number of rows, dead rows, the winner
    fires on    the tokens of largest |w_i|, each with what stands before it in its window
    promotes    the tokens of largest W (g * (v - mean v) / std v): the value through the last norm (g its gain; RMSNorm
                subtracts no mean) and the head W. This is the logit lens (nostalgebraist, 2020) on one row: its own
                share in the logits, up to one factor for all tokens. The norm's bias and the head's, which come
                whatever the row says, are left out. Where w_i is below zero the row says the opposite
    origin      of a row or an expert, by the lineage of its checkpoint: growth appends rows, and most operators
                experts, so that each growth added a range

Legend: N tokens, n rows, C hidden size, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .growth.load import load_of
from .models.axes import norm_kind, parameter_dims, size_of
from .rows import STRONGEST, RowTable, kept_rows, loudness, row_tables, rows_of, value_norms, watch_text
from .sparse import Amount, amounts, strongest_rows

# Operators after which old experts do not come first: each lies beside its copies, or all are made of a feed-forward.
MIX_EXPERTS = ("scale_experts", "upcycle", "virtual_groups", "virtual_groups_published")


@dataclasses.dataclass(eq=False)
class RowLoad:
    """One memory's rows on a text of so many tokens, k of them counted as used by each.

    counts: (n,) tokens at which a row is among the k strongest. strength, loudest: (n,) mean and largest |w| ||v||.
    places, weights: (n, contexts) where in the text its |w| is largest, from the largest on, and its w there. A place
    is the number of a token, windows one after the other.
    """

    memory: RowTable
    k: int
    tokens: int
    counts: Tensor
    strength: Tensor
    loudest: Tensor
    places: Tensor
    weights: Tensor

    @property
    def ranking(self) -> Tensor:
        """The rows (n,) from the most used to the least; of rows used alike the stronger one first."""
        order = torch.sort(self.strength, descending=True, stable=True).indices
        return order[torch.sort(self.counts[order], descending=True, stable=True).indices]


@dataclasses.dataclass(frozen=True)
class Origin:
    """Rows (or experts) start to stop - 1, and the growth that added them; "start" for those it began with."""

    name: str
    start: int
    stop: int


@torch.no_grad()
def row_loads(
    model: PreTrainedModel, batches: Iterable[Tensor], k: Amount | None = None, contexts: int = 0
) -> dict[str, RowLoad]:
    """For each memory, by its place, what its rows do on token ids (B, T + 1), of which the first T are looked at.

    k: how many rows of a memory a token counts as used, as in `sparse`; a tenth of them where it says nothing.
    contexts: how many places are kept for each row. The model is left as it was. ValueError as of `sparse`.
    """
    asked = {} if k is None else amounts(model.config, "k", k)
    loads, norms = {}, {}
    for memory in row_tables(model):
        rows = size_of(model.config, memory.field)
        zeros, none = torch.zeros(rows, dtype=torch.float64), torch.zeros(rows, 0)
        used = asked.get(memory.field, max(1, kept_rows(rows, STRONGEST)))
        counts = torch.zeros(rows, dtype=torch.long)
        loads[memory.place] = RowLoad(memory, used, 0, counts, zeros, zeros.clone(), none.long(), none)
        norms[memory.place] = value_norms(model, memory)

    def see(memory: RowTable, weights: Tensor) -> None:
        load, loud = loads[memory.place], loudness(weights, norms[memory.place])
        load.counts += (strongest_rows(loud, load.k) & (loud > 0)).sum(0).cpu()
        load.strength += loud.double().sum(0).cpu()
        load.loudest = torch.maximum(load.loudest, loud.double().amax(0).cpu())
        if contexts:
            best = weights.abs().topk(min(contexts, len(weights)), dim=0).indices  # (contexts, n)
            places = torch.cat([load.places, (best + load.tokens).t().cpu()], 1)
            seen = torch.cat([load.weights, weights.gather(0, best).t().cpu()], 1)
            order = seen.abs().argsort(dim=1, descending=True, stable=True)[:, :contexts]
            load.places, load.weights = places.gather(1, order), seen.gather(1, order)
        load.tokens += len(weights)

    watch_text(model, batches, see)
    for load in loads.values():
        load.strength /= max(1, load.tokens)
    return loads


def numbers_of(load: RowLoad, rows: slice = slice(None)) -> dict[str, Any]:
    """The load on some rows of a memory in numbers: how many they are, "load", their share of all choices, what
    `load_of` says of them alone, "silent", how many never say anything, and their mean strength."""
    counts = load.counts[rows]
    return {
        "rows": len(counts),
        "load": int(counts.sum()) / max(1, int(load.counts.sum())),
        **load_of(counts),
        "silent": int((load.loudest[rows] == 0).sum()),
        "strength": load.strength[rows].mean().item(),
    }


def origins(lineage: Sequence[Mapping[str, Any]], field: str, rows: int) -> list[Origin]:
    """The rows of a memory by where they come from, oldest first, read off a checkpoint's lineage.

    A cut by order takes rows from the end; of one by another rule it is not known which rows it kept, so those count
    as a start. So do experts after MIX_EXPERTS, and all rows where the lineage does not lead to as many as there are.
    """
    found: list[Origin] = []
    for number, event in enumerate(lineage, 1):
        old, new = (event.get(side, {}).get(field) for side in ("from", "to"))
        if old is None or new is None or old == new:
            continue
        operator = str(event.get("operator"))
        if not found or found[-1].stop != old:  # the first that is told of, or something is missing before it
            found = [Origin("start", 0, old)]
        if new > old and not set(operator.split("+")) & set(MIX_EXPERTS):
            found.append(Origin(f"{operator} ({number})", old, new))
        elif event.get("options", {}).get("by") == "order":
            found = [dataclasses.replace(o, stop=min(o.stop, new)) for o in found if o.start < new]
        else:
            found = [Origin("start", 0, new)]
    return found if found and found[-1].stop == rows else [Origin("start", 0, rows)]


# --- what a row fires on, and what it promotes ---


def speaks_to_the_head(model: PreTrainedModel, memory: RowTable) -> bool:
    """Whether its values are added to the residual stream, which the head reads."""
    dims = parameter_dims(model.config, memory.value)
    return (("hidden", ">"),) in dims[1 - memory.dims[memory.value]]


def _is_last_gain(model: PreTrainedModel, name: str) -> bool:
    return parameter_dims(model.config, name) == (((("hidden", "@"),),),)


@torch.no_grad()
def promoted(model: PreTrainedModel, memory: RowTable, rows: Tensor) -> Tensor:
    """(rows, V): what the values of these rows add to the logits, up to a factor for each; zero for a zero value.

    ValueError if the memory's values do not go into the residual stream.
    """
    if not speaks_to_the_head(model, memory):
        raise ValueError(f"{memory.place}: its values go into attention, not to the head, so they promote no tokens")
    last = next(name for name, _ in model.named_parameters() if _is_last_gain(model, name))
    gain = model.get_parameter(last)
    head = model.get_output_embeddings().weight
    value = rows_of(model, memory, memory.value)[rows.to(head.device)]
    if norm_kind(model.config, "hidden") == "layer":
        value = value - value.mean(1, keepdim=True)
    spread = value.square().mean(1, keepdim=True).sqrt()
    value = torch.where(spread > 0, value / spread, 0) * gain.to(value)
    return value @ head.to(value).t()


def window_starts(batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """The tokens that were looked at, one window after the other (N,), and for each where its window begins (N,)."""
    ids, starts, seen = [], [], 0
    for batch in batches:
        inputs = batch[:, :-1]
        ids.append(inputs.flatten())
        starts.append(seen + torch.arange(len(inputs)).repeat_interleave(inputs.shape[1]) * inputs.shape[1])
        seen += inputs.numel()
    return torch.cat(ids), torch.cat(starts)
