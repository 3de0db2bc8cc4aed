"""What the rows of a checkpoint on the disk do on a text, as tables, as numbers and as a picture. Nothing is changed.

    OUT.json    everything: by memory its load, by origin and by group; what sparse use costs; the most used rows
    OUT.png     beside it: bits per byte against the share of the rows that act
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import checkpoint as files
from . import runs
from .curve import write_curve
from .evaluate import evaluate_parts
from .growth import LoadCounter, load_of
from .inspection import (
    Origin,
    RowLoad,
    numbers_of,
    origins,
    promoted,
    row_loads,
    speaks_to_the_head,
    window_starts,
)
from .models.axes import size_of
from .rows import kept_rows, row_fields
from .sparse import Amount, Sparsity, amounts, best_groups, group_all, masked_to

TOKENS = 20_000  # at most so many are looked at
BATCH = 8  # windows that pass through the model at a time
SHARES = (0.5, 0.25, 0.125, 0.0625, 0.03125)  # of the rows, or of the groups, that act
CONTEXTS, LEFT, PROMOTED = 5, 24, 8  # contexts of a row, tokens before each, tokens that it promotes
Parts = Sequence[tuple[Tensor, Tensor]]
Groups = Mapping[str, Tensor]  # by a memory's place, for each row its group, or for each group a count


@files.quiet()
def inspect_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    parts: Parts,
    tokenizer: Any,
    source: str = "",
    *,
    layer: int | None = None,
    rows: int = 3,
    k: Amount | None = None,
    groups: Amount | None = None,
    top: Amount | None = None,
    device: torch.device | str = "cpu",
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Look at the model in `checkpoint` (a folder, or a run's newest) on windows of a text, say it, write it to `out`.

    parts: as data.text_windows gives them; of the text called `source`. layer: tables and rows of that one alone. rows:
    how many of each memory, the most used ones, are told one by one. k: how many rows a token uses (a tenth); groups,
    top: as in `sparse`. Of a mixture, the load of its experts, and nothing of rows. Returns what is written.
    Raises ValueError as `sparse` and `load_checkpoint` do, or for a layer that there is not.
    """
    folder = files.find_checkpoint(checkpoint)
    files.require_nothing_carried(folder)
    config = files.load_config(folder)
    if layer is not None and not 0 <= layer < config.num_hidden_layers:
        raise ValueError(f"--layer {layer}: the model has the layers 0 to {config.num_hidden_layers - 1}")
    mixture = getattr(config, "num_local_experts", None) is not None and k is None and groups is None
    used = {} if k is None else amounts(config, "k", k)
    counts = {} if groups is None else amounts(config, "groups", groups)
    best = {} if top is None else best_groups(config, counts, top)
    if not mixture:
        row_fields(config)
    model, lineage = files.load_checkpoint(folder)
    model.to(device)
    parts = first_tokens(parts)
    batches = [batch for tokens, _ in parts for batch in tokens.split(BATCH)]
    looked = sum(batch[:, 1:].numel() for batch in batches)
    say(f"{folder}: {looked:,} tokens of {source}" if source else f"{folder}: {looked:,} tokens")
    answer: dict[str, Any] = {"checkpoint": str(folder), "text": source, "tokens": looked}
    if mixture:
        answer["experts"] = told(experts_of(model, batches, lineage), layer, say)
        runs.write_json(out, answer)
        return answer
    loads = row_loads(model, batches, used, CONTEXTS)
    born = {place: origins(lineage, load.memory.field, len(load.counts)) for place, load in loads.items()}
    entries = [
        entry_of(place, load.k, load.counts, born[place], partial(numbers_of, load))
        for place, load in loads.items()
    ]
    say("")
    say("load: each token uses the k rows of a memory that add most to its output")
    answer["memories"] = told(entries, layer, say)
    say("")
    answer["sparse"], grouped = measured(model, parts, used, counts, best, device, say)
    if grouped:
        say("")
        say("groups: rows with alike keys; each token uses the groups whose mean key agrees most with it")
        answer["groups"] = told(grouped_entries(grouped, loads, best, born), layer, say)
    shown = [load for place, load in loads.items() if layer is None or layer_of(place) == layer]
    answer["rows"] = rows_told(model, shown, batches, born, tokenizer, rows, say)
    out = Path(out)
    runs.write_json(out, answer)
    write_curve(out.with_suffix(".png"), lines_of(answer["sparse"]), "share of the rows that act", "sparse use")
    return answer


def first_tokens(parts: Parts) -> list[tuple[Tensor, Tensor]]:
    """The first windows of a text, TOKENS in all or a little less, and one at the least."""
    left = TOKENS
    kept: list[tuple[Tensor, Tensor]] = []
    for tokens, sizes in parts:
        windows = min(len(tokens), left // (tokens.shape[1] - 1) if kept else max(1, left // (tokens.shape[1] - 1)))
        if windows:
            kept.append((tokens[:windows], sizes[:windows]))
        left = left - windows * (tokens.shape[1] - 1) if windows == len(tokens) else 0
    return kept


def layer_of(place: str) -> int:
    return int(re.findall(r"\.(\d+)\.", f".{place}.")[0])


# --- the load ---


def entry_of(
    place: str, k: int, counts: Tensor, born: Sequence[Origin], numbers: Callable[[slice], dict[str, Any]]
) -> dict[str, Any]:
    """A memory's load in numbers, and by origin where it has more than one."""
    entry = {"memory": place, "layer": layer_of(place), "k": k, **numbers(slice(None)), "origins": []}
    if len(born) > 1:
        entry["origins"] = [asdict(o) | numbers(slice(o.start, o.stop)) for o in born]
    return entry | {"counts": counts.tolist()}


def experts_of(model: Any, batches: Sequence[Tensor], lineage: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The load of a mixture's experts, as that of rows is told."""
    experts = size_of(model.config, "num_local_experts")
    with LoadCounter(model) as load, torch.no_grad():
        for batch in batches:
            model(input_ids=batch[:, :-1].to(model.device), use_cache=False)
    entries, born = [], origins(lineage, "num_local_experts", experts)
    for i, counts in enumerate(each.cpu() for each in load.counts):
        numbers = of_counts(counts)
        entries.append(entry_of(f"layers.{i}.experts", model.config.num_experts_per_tok, counts, born, numbers))
    return entries


def of_counts(counts: Tensor) -> Callable[[slice], dict[str, Any]]:
    total = max(1.0, float(counts.sum()))

    def numbers(part: slice) -> dict[str, Any]:
        return {"rows": len(counts[part]), "load": float(counts[part].sum()) / total, **load_of(counts[part])}

    return numbers


def grouped_entries(
    grouped: tuple[Groups, Groups],
    loads: Mapping[str, RowLoad],
    best: Mapping[str, int],
    born: Mapping[str, Sequence[Origin]],
) -> list[dict[str, Any]]:
    """The load of each memory's groups; by origin, that of the rows in the groups that were chosen."""
    groups, chosen = grouped
    entries = []
    for place, assigned in groups.items():
        by_group, by_row = of_counts(chosen[place]), of_counts(chosen[place][assigned])
        entry = entry_of(place, best[loads[place].memory.field], chosen[place], (), by_group)
        if len(born[place]) > 1:
            entry["origins"] = [asdict(o) | by_row(slice(o.start, o.stop)) for o in born[place]]
        entries.append(entry | {"sizes": torch.bincount(assigned).tolist(), "group_of_row": assigned.tolist()})
    return entries


HEAD = f"{'layer':>5}  {'memory':<24}{'n':>6} {'k':>5} {'load':>7} {'entropy':>8} {'effective':>10} {'dead':>6}"
HEAD += f" {'silent':>7} {'winner':>7} {'top 1 %':>8}"


def told(entries: list[dict[str, Any]], layer: int | None, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Say the entries of one layer, or of all, as a table; those that were said."""
    shown = [entry for entry in entries if layer in (None, entry["layer"])]
    say(HEAD)
    for entry in shown:
        say(f"{entry['layer']:>5}  {entry['memory'].rpartition('.')[2]:<24}{columns(entry, entry['k'])}")
        for origin in entry["origins"]:
            say(f"{'':>5}    {origin['name']:<22}{columns(origin, '')}")
    return shown


def columns(n: Mapping[str, Any], k: Any) -> str:
    return (
        f"{n['rows']:>6} {k:>5} {n['load']:>7.1%} {n['entropy']:>8.3f} {n['effective']:>10.1f} {n['dead']:>6} "
        f"{n.get('silent', ''):>7} {n['winner']:>7.2f} {n['top_share']:>8.1%}"
    )


# --- sparse use ---


def measured(
    model: Any,
    parts: Parts,
    k: Mapping[str, int],
    groups: Mapping[str, int],
    top: Mapping[str, int],
    device: torch.device | str,
    say: Callable[[str], None],
) -> tuple[dict[str, Any], tuple[Groups, Groups] | None]:
    """Bits per byte with all rows and with few, and the groups that those of `top` made, with how often each acted."""
    dense = evaluate_parts(model, parts, BATCH, device)
    say(f"{'rows that act':<28} {'bits per byte':>13} {'lost':>8} {'rows':>7} {'row FLOPs needed':>17}")
    say(f"{'all':<28} {dense['bits_per_byte']:>13.4f} {'':>8} {1:>7.1%} {1:>17.1%}")
    rows = {field: size_of(model.config, field) for field in row_fields(model.config)}

    def point(count: Mapping[str, int], assigned: Groups | None, label: str) -> tuple[dict[str, Any], Sparsity]:
        with masked_to(model, count, assigned) as used:
            numbers = evaluate_parts(model, parts, BATCH, device)
        lost = numbers["bits_per_byte"] - dense["bits_per_byte"]
        shares = {"rows_share": used.rows_share, "flops_share": used.flops_share}
        say(
            f"{label:<28} {numbers['bits_per_byte']:>13.4f} {lost:>+8.4f} {used.rows_share:>7.1%} "
            f"{used.flops_share:>17.1%}"
        )
        kind = "k" if assigned is None else "top"
        return {"label": label, kind: dict(count), **numbers, "lost_bits_per_byte": lost, **shares}, used

    answer: dict[str, Any] = {"dense": dense, "k": [], "groups": []}
    asked = [(k, f"the strongest {in_words(k)}")] if k else []
    for count, label in unlike([*asked, *((of_share(rows, s), f"the strongest 1/{1 / s:g}") for s in SHARES)]):
        answer["k"].append(point(count, None, label)[0])
    if not groups:
        return answer, None
    assigned = group_all(model, groups)
    asked = [(top, f"the best {in_words(top)} of {in_words(groups)} groups")]
    lower = ((of_share(groups, s), f"the best 1/{1 / s:g} of the groups") for s in SHARES)
    points = [point(count, assigned, label) for count, label in unlike([*asked, *lower])]
    answer["groups"] = [numbers for numbers, _ in points]
    return answer, (assigned, points[0][1].chosen)


def of_share(rows: Mapping[str, int], share: float) -> dict[str, int]:
    return {field: max(1, kept_rows(n, share)) for field, n in rows.items()}


def unlike(asked: Sequence[tuple[Mapping[str, int], str]]) -> list[tuple[Mapping[str, int], str]]:
    """Each number once, by its first name."""
    return [(count, label) for i, (count, label) in enumerate(asked) if count not in [c for c, _ in asked[:i]]]


def in_words(count: Mapping[str, int]) -> str:
    """8, or where fields differ, ffn_tokens 8, qkv_tokens 4"""
    values = set(count.values())
    return str(values.pop()) if len(values) == 1 else ", ".join(f"{field} {n}" for field, n in count.items())


def lines_of(sparse: Mapping[str, Any]) -> dict[str, list[tuple[float, float, str]]]:
    """The points of the picture, from all rows down to few."""
    lines = {}
    for name, kind in (("the strongest rows", "k"), ("the best groups", "groups")):
        points = sorted(((p["rows_share"], p["bits_per_byte"]) for p in sparse[kind]), reverse=True)
        if points:
            points = [(1.0, sparse["dense"]["bits_per_byte"]), *points]
            lines[name] = [(share, bits, f"{100 * share:.3g} %") for share, bits in points]
    return lines


# --- row by row ---


def rows_told(
    model: Any,
    loads: Sequence[RowLoad],
    batches: Sequence[Tensor],
    born: Mapping[str, Sequence[Origin]],
    tokenizer: Any,
    count: int,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """The `count` most used rows of each memory: what they fire on, and what they promote."""
    ids, starts = window_starts(batches)
    answer: list[dict[str, Any]] = []
    for load in loads if count else ():
        memory, chosen = load.memory, load.ranking[:count]
        logits = promoted(model, memory, chosen).cpu() if speaks_to_the_head(model, memory) else None
        for i, row in enumerate(chosen.tolist()):
            origin = next(o.name for o in born[memory.place] if o.start <= row < o.stop)
            entry = {"memory": memory.place, "row": row, "origin": origin, "load": int(load.counts[row])}
            entry["fires_on"] = [
                context(ids, int(starts[place]), place, tokenizer) | {"weight": weight}
                for place, weight in zip(load.places[row].tolist(), load.weights[row].tolist(), strict=True)
                if weight
            ]
            if logits is not None:
                entry["promotes"] = tokens_of(logits[i], tokenizer)
                entry["demotes"] = tokens_of(-logits[i], tokenizer)
            answer.append(entry)
            say("")
            place = f"layer {layer_of(memory.place)}, {memory.place.rpartition('.')[2]}, row {row}"
            say(f"{place} ({origin}): among the {load.k} strongest at {entry['load'] / load.tokens:.1%} of the tokens")
            for c in entry["fires_on"]:
                say(f"    w {c['weight']:>+9.3f}  ...{c['left']} >>{c['token']}<<")
            for verb in ("promotes", "demotes"):
                if entry.get(verb):
                    say(f"    {verb:<11}  {'  '.join(map(quoted, entry[verb]))}")
    return answer


def context(ids: Tensor, start: int, place: int, tokenizer: Any) -> dict[str, Any]:
    """A token of the text, and what stands before it in its window."""
    left = ids[max(start, place - LEFT) : place].tolist()
    return {"left": tokenizer.spell(left), "token": tokenizer.spell([int(ids[place])])}


def tokens_of(logits: Tensor, tokenizer: Any) -> list[str]:
    """The tokens of the largest logits above zero."""
    best = logits.topk(min(PROMOTED, len(logits)))
    return [tokenizer.spell([i]) for i, x in zip(best.indices.tolist(), best.values.tolist(), strict=True) if x > 0]


def quoted(token: str) -> str:
    return f"'{token}'"  # a space is a token too, and escapes stay as they are
