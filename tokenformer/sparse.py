"""Sparse use of a model: at each token only some rows of a memory (rows.py) act, and the others are silent.

    y = sum over i in S of w_i v_i        w_i as in the whole model; S, the rows that act, chosen anew at each token

    k           S is the k rows of largest |w_i| ||v_i||: so far the output moves when row i falls silent, which |w_i|
                alone does not say. All keys are read, the values of k rows
    groups      each row lies in one of G groups; S is the rows of the t groups of largest x · c, where c is the mean of
                a group's keys (biases too), so x · c is the mean of its rows' scores. Rows as experts without a router
                to train (arXiv 2110.01786). Centroids are read, and all of t groups

Groups are made of the keys by spherical k-means (Dhillon and Modha, 2001: unit keys, centroids of unit length, nearest
by cosine; starts drawn as in k-means++), or are contiguous blocks in the order of the rows. A gated row's key is its
gate.

The norm of a theta that has one runs over all rows, those that are silent too. So a row that acts says what it says in
the whole model, the error is exactly what is left out, and the stored scale, which is of that norm, stays right; over
fewer rows the norm would be smaller, and each would speak louder the fewer there are.

This is the mathematics, not a fast kernel: everything is worked out, and what does not act is masked. `Sparsity` counts
what a kernel would need.

Legend: N tokens, n rows, C the width of a key.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from .growth.carried import carried_of
from .models.axes import size_of
from .pattention import WITHOUT_NORM, Pattention
from .rows import RowTable, by_field, loudness, row_tables, rows_of, value_norms

Amount = int | Mapping[str, int]
GROUPINGS = ("keys", "order")
ROUNDS = 50  # of k-means, at most; as a rule it stands still earlier


@dataclasses.dataclass(eq=False)
class Sparsity:
    """What acted so far inside `sparse`, by the place of each memory that is sparse.

    groups: the group of each row (n,), where there are groups; chosen: how often each was chosen (G,).
    rows, dense: row-tokens that acted, and that there were. needed_flops, dense_flops: multiplications for them.
    """

    groups: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    chosen: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    rows: int = 0
    dense: int = 0
    needed_flops: int = 0
    dense_flops: int = 0

    @property
    def rows_share(self) -> float:
        return self.rows / self.dense

    @property
    def flops_share(self) -> float:
        """Of the multiplications by keys and values of these memories, the share that is needed, choosing included."""
        return self.needed_flops / self.dense_flops


@contextlib.contextmanager
def sparse(
    model: PreTrainedModel,
    k: Amount | None = None,
    *,
    groups: Amount | None = None,
    top: Amount | None = None,
    grouping: str = "keys",
    seed: int = 0,
) -> Iterator[Sparsity]:
    """Inside, only the k strongest rows of each memory act at a token, or those of the `top` best of its `groups`.

    Each is one number for all memories, or one for each field by the names that `grow` takes ({"ffn": 64}); memories
    that are not named stay whole. grouping: "keys" or "order", the module's head says how; seed: of k-means. What acts
    is counted in the `Sparsity` that comes with it. Where all rows act, the output is the whole model's bit for bit. It
    is meant for evaluation and generation; outside, the model is as it was.
    Raises ValueError, in one line, on a number below 1 or above the rows there are, top above groups, k and groups
    together or neither, a model that carries a growth, or an architecture whose rows are not known.
    """
    if (k is None) == (groups is None) or (groups is None) != (top is None):
        raise ValueError("k, groups, top: give either k, or groups and top")
    if grouping not in GROUPINGS:
        raise ValueError(f"grouping: {grouping!r} is not known; allowed: {', '.join(GROUPINGS)}")
    carried = carried_of(model)
    if carried is not None:
        raise ValueError(f"model: it carries {carried.kind}, a growth that training has to finish first")
    if k is not None:
        with masked_to(model, amounts(model.config, "k", k)) as used:
            yield used
    elif groups is not None and top is not None:
        counts = amounts(model.config, "groups", groups)
        best = best_groups(model.config, counts, top)
        with masked_to(model, best, group_all(model, counts, grouping, seed)) as used:
            yield used


@contextlib.contextmanager
def masked_to(
    model: PreTrainedModel, counts: Mapping[str, int], groups: Mapping[str, Tensor] | None = None
) -> Iterator[Sparsity]:
    """`sparse` of numbers that are known to fit: of rows for each field, or with `groups` (`group_all`), of groups."""
    used = Sparsity()
    handles: list[Any] = []
    try:
        for memory in row_tables(model):
            if memory.field in counts:
                count = counts[memory.field]
                if groups is None:
                    choose = _by_strength(model, memory, count, used)
                else:
                    choose = _by_group(model, memory, groups[memory.place], count, used)
                handles += _masked(model, memory, choose)
        yield used
    finally:
        for handle in handles:
            handle.remove()


def amounts(config: PreTrainedConfig, name: str, value: Amount) -> dict[str, int]:
    """A number for each field of rows that is meant; ValueError if it is none from 1 to the rows there are."""
    wanted = by_field(config, name, value)
    hint = "" if isinstance(value, Mapping) or len(wanted) == 1 else "; it may be given for each field"
    for field, number in wanted.items():
        require_up_to(size_of(config, field), field, name, number, hint)
    return wanted


def require_up_to(most: int, of: str, name: str, number: Any, hint: str = "") -> None:
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise ValueError(f"{name}: {number} is not allowed; it must be a whole number from 1 to {of} = {most}")
    if number > most:
        raise ValueError(f"{name}: {number} is more than {of} = {most}{hint}")


def best_groups(config: PreTrainedConfig, groups: Mapping[str, int], top: Amount) -> dict[str, int]:
    """How many groups are taken, for each field that has groups."""
    best = by_field(config, "top", top) if isinstance(top, Mapping) else dict.fromkeys(groups, top)
    if best.keys() != groups.keys():
        raise ValueError(f"top: is for {', '.join(best)}, and groups for {', '.join(groups)}")
    for field, number in best.items():
        require_up_to(groups[field], "groups", "top", number)
    return best


# --- which rows act ---


def strongest_rows(loudness: Tensor, k: int) -> Tensor:
    """Where |w_i| ||v_i|| (N, n) is among the k largest of its token; exactly k are."""
    return torch.zeros_like(loudness, dtype=torch.bool).scatter_(1, loudness.topk(k, dim=1).indices, True)


Choose = Callable[[Tensor, Tensor], Tensor | None]  # inputs (N, C), weights (N, n) -> which act (N, n); None: all


def _by_strength(model: PreTrainedModel, memory: RowTable, k: int, used: Sparsity) -> Choose:
    norms, (keys, value, _) = value_norms(model, memory), costs(model, memory)

    def choose(x: Tensor, weights: Tensor) -> Tensor | None:
        tokens, rows = weights.shape
        _count(used, tokens * rows, tokens * k, keys + value, tokens * (rows * keys + k * value))
        return None if k == rows else strongest_rows(loudness(weights, norms), k)

    return choose


def _by_group(model: PreTrainedModel, memory: RowTable, assigned: Tensor, top: int, used: Sparsity) -> Choose:
    groups = int(assigned.max()) + 1
    keys, value, first = costs(model, memory)
    key, bias = _keys(model, memory)
    sizes = torch.bincount(assigned, minlength=groups)
    centroids, offset = (
        torch.zeros(groups, t.shape[1], dtype=t.dtype).index_add_(0, assigned, t.cpu()) / sizes[:, None]
        for t in (key, bias)
    )
    theta = getattr(model.get_submodule(memory.place), "theta", "silu")
    used.groups[memory.place], used.chosen[memory.place] = assigned, torch.zeros(groups, dtype=torch.long)

    def choose(x: Tensor, weights: Tensor) -> Tensor | None:
        tokens, rows = weights.shape
        x = x.detach().to(centroids.dtype)
        scores = x @ centroids.to(x.device).t() + offset.to(x.device)[:, 0]  # (N, G)
        taken = strongest_rows(scores, top)
        used.chosen[memory.place] += taken.sum(0).cpu()
        acting = taken.cpu().long() @ sizes  # (N,)
        needed = int(acting.sum()) * (keys + value)
        if top < groups:
            # The scores of the others enter the norm. Their sum of squares is xᵀ (Kᵀ K) x, less what is known of it.
            others = rows - acting if theta not in WITHOUT_NORM else torch.zeros_like(acting)
            others = others.clamp(max=first) if theta == "l2_norm_gelu" else others
            needed += tokens * groups * first + int(others.sum()) * first
        _count(used, tokens * rows, int(acting.sum()), keys + value, needed)
        return None if top == groups else taken[:, assigned.to(taken.device)]

    return choose


def _count(used: Sparsity, dense: int, acting: int, each: int, needed: int) -> None:
    used.rows, used.dense = used.rows + acting, used.dense + dense
    used.needed_flops, used.dense_flops = used.needed_flops + needed, used.dense_flops + dense * each


def costs(model: PreTrainedModel, memory: RowTable) -> tuple[int, int, int]:
    """Multiplications of one row at one token: of its keys, of its value, and of its first key alone."""
    widths = {name: rows_of(model, memory, name).shape[1] for name in memory.dims if not name.endswith(".bias")}
    value = widths.pop(memory.value)
    return sum(widths.values()), value, next(iter(widths.values()))


def _masked(model: PreTrainedModel, memory: RowTable, choose: Choose) -> list[Any]:
    """Hooks by which the rows that `choose` leaves out are silent."""
    place: Any = model.get_submodule(memory.place)
    if isinstance(place, Pattention):

        def spoken(module: Any, inputs: Any, output: Tensor) -> Tensor | None:
            x = inputs[0]
            weights = module.row_weights(x)
            acting = choose(x.flatten(0, -2), weights.flatten(0, -2))
            return None if acting is None else (weights * acting.view(weights.shape)) @ module.value

        return [place.register_forward_hook(spoken, prepend=True)]  # before what others add to the output
    seen: list[Tensor] = []

    def heard(module: Any, inputs: Any) -> None:
        seen[:] = [inputs[0].flatten(0, -2)]

    def masked(module: Any, inputs: Any) -> Any:
        weights = inputs[0]
        acting = choose(seen.pop(), weights.flatten(0, -2))
        return None if acting is None else (weights * acting.view(weights.shape), *inputs[1:])

    reader = model.get_submodule(memory.value.rpartition(".")[0])
    return [place.register_forward_pre_hook(heard), reader.register_forward_pre_hook(masked)]


# --- groups ---


def _keys(model: PreTrainedModel, memory: RowTable) -> tuple[Tensor, Tensor]:
    """The first keys of a memory (n, C) and their biases (n, 1), zero where there are none."""
    name = next(iter(memory.dims))
    key, bias = rows_of(model, memory, name), name.removesuffix("weight") + "bias"
    return key, rows_of(model, memory, bias) if bias in memory.dims else key.new_zeros(len(key), 1)


def group_all(
    model: PreTrainedModel, counts: Mapping[str, int], grouping: str = "keys", seed: int = 0
) -> dict[str, Tensor]:
    """`group_rows` of every memory of these fields, by its place."""
    memories = [memory for memory in row_tables(model) if memory.field in counts]
    return {m.place: group_rows(model, m, counts[m.field], grouping, seed) for m in memories}


@torch.no_grad()
def group_rows(model: PreTrainedModel, memory: RowTable, count: int, grouping: str = "keys", seed: int = 0) -> Tensor:
    """The group (n,), from 0 to count - 1, of each row of a memory; none is empty."""
    key, _ = _keys(model, memory)
    if grouping == "order":
        return torch.arange(len(key)) * count // len(key)
    return spherical_k_means(key.cpu(), count, seed)


def spherical_k_means(keys: Tensor, count: int, seed: int) -> Tensor:
    """Of rows (n, C) the group of each (n,): those of largest cosine with its centroid, the direction of its rows' sum.

    The same for the same seed. Each of the `count` groups has a row.
    """
    unit = F.normalize(keys, dim=1)
    draw = torch.Generator().manual_seed(seed)
    distance = torch.ones(len(unit), dtype=torch.float64)
    starts: list[int] = []
    while len(starts) < count:  # k-means++: far from the starts before it
        distance[starts] = 0
        if not bool(distance.any()):  # what is left lies where a start is
            distance = torch.ones_like(distance)
            distance[starts] = 0
        starts.append(int(torch.multinomial(distance, 1, generator=draw)))
        distance = torch.minimum(distance, (1 - unit @ unit[starts[-1]]).clamp(min=0).double())
    centroids, assigned = unit[starts], torch.full((len(unit),), -1)
    for _ in range(ROUNDS):
        alike = unit @ centroids.t()  # (n, G)
        before, assigned = assigned, alike.argmax(1)
        for empty in (torch.bincount(assigned, minlength=count) == 0).nonzero().flatten().tolist():
            crowded = torch.bincount(assigned, minlength=count)[assigned] > 1
            fits = alike.gather(1, assigned[:, None])[:, 0].masked_fill(~crowded, torch.inf)
            assigned[fits.argmin()] = empty  # the row that fits worst where it is
        if torch.equal(before, assigned):
            break
        centroids = F.normalize(torch.zeros_like(centroids).index_add_(0, assigned, unit), dim=1)
    return assigned
