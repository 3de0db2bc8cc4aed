"""What the rows of a checkpoint on the disk do on a text, as tables, as numbers and as a picture. Nothing is changed.

    OUT.json    everything: by memory its load, by origin and by group; what sparse use costs; the most used rows
    OUT.png     beside it: bits per byte against the share of the rows that act

What is said fits into 80 columns; what does not, whole contexts and all tokens, is in the numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from .sparse import Amount, amounts, best_groups, group_all, masked_to

TOKENS = 20_000  # at most so many are looked at
BATCH = 8  # windows that pass through the model at a time
SHARES = (0.5, 0.25, 0.125, 0.0625, 0.03125)  # of the rows, or of the groups, that act
CONTEXTS, LEFT, PROMOTED = 5, 24, 8  # contexts of a row, tokens before each, tokens that it promotes
COLUMNS = 80  # of what is said
Parts = Sequence[tuple[Tensor, Tensor]]
Count = Mapping[str, int]  # by field
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
    mixture, used, counts, best = what_is_asked(config, layer, k, groups, top)
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
    loads = row_loads(model, batches, k, CONTEXTS)
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
        say("groups of rows with alike keys: a token uses those whose mean key fits it best")
        answer["groups"] = told(grouped_entries(grouped, loads, best, born), layer, say)
    shown = [load for place, load in loads.items() if layer is None or layer_of(place) == layer]
    answer["rows"] = rows_told(model, shown, batches, born, tokenizer, rows, say)
    lines = lines_of(answer["sparse"], row_fields(config))
    write_curve(Path(out), answer, lines, "share of the rows that act", "sparse use")
    return answer


def what_is_asked(
    config: Any, layer: int | None, k: Amount | None, groups: Amount | None, top: Amount | None
) -> tuple[bool, Count, Count, Count]:
    """Whether it is the load of a mixture's experts; and k, groups and top by field, empty where nothing was said.

    ValueError, before any work, on what cannot be.
    """
    mixture = getattr(config, "num_local_experts", None) is not None and k is None and groups is None
    if not mixture:
        row_fields(config)
    if layer is not None and not 0 <= layer < config.num_hidden_layers:
        raise ValueError(f"--layer {layer}: the model has the layers 0 to {config.num_hidden_layers - 1}")
    used = {} if k is None else amounts(config, "k", k)
    counts = {} if groups is None else amounts(config, "groups", groups)
    return mixture, used, counts, {} if top is None else best_groups(config, counts, top)


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


def name_of(place: str) -> str:
    """model.layers.0.mlp -> layer 0 mlp"""
    return f"layer {layer_of(place)} {place.rpartition('.')[2]}"


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


HEAD = f"{'memory':<24}{'n':>5} {'k':>4} {'load':>6} {'entropy':>7} {'effective':>9} {'dead':>5} {'silent':>6} "
HEAD += f"{'winner':>6}"


def told(entries: list[dict[str, Any]], layer: int | None, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Say the entries of one layer, or of all, as a table; those that were said."""
    shown = [entry for entry in entries if layer in (None, entry["layer"])]
    say(HEAD)
    for entry in shown:
        say(f"{name_of(entry['memory']):<24}{columns(entry, entry['k'])}")
        for origin in entry["origins"]:
            say(f"  {origin['name']:<22}{columns(origin, '')}")
    return shown


def columns(n: Mapping[str, Any], k: Any) -> str:
    return (
        f"{n['rows']:>5} {k:>4} {n['load']:>6.1%} {n['entropy']:>7.3f} {n['effective']:>9.1f} {n['dead']:>5} "
        f"{n.get('silent', ''):>6} {n['winner']:>6.2f}"
    )


# --- sparse use ---


def measured(
    model: Any,
    parts: Parts,
    k: Count,
    groups: Count,
    top: Count,
    device: torch.device | str,
    say: Callable[[str], None],
) -> tuple[dict[str, Any], tuple[Groups, Groups] | None]:
    """Bits per byte with all rows and with few, and the groups that those of `top` made, with how often each acted."""
    dense = evaluate_parts(model, parts, BATCH, device)
    say(f"{'rows that act':<28} {'bits per byte':>13} {'lost':>8} {'rows':>7} {'row FLOPs needed':>17}")
    say(f"{'all':<28} {dense['bits_per_byte']:>13.4f} {'':>8} {1:>7.1%} {1:>17.1%}")

    def points(asked: Count, of: Count, assigned: Groups | None, words: str) -> tuple[list[dict[str, Any]], Groups]:
        """At what was asked and at SHARES of `of`, rows or groups; and how often each group acted at the first."""
        found, chosen = [], []
        for count, share in to_measure(asked, of):
            with masked_to(model, count, assigned) as used:
                numbers = evaluate_parts(model, parts, BATCH, device)
            label = f"1/{1 / share:g}" if share and count != asked else "as asked"
            lost = numbers["bits_per_byte"] - dense["bits_per_byte"]
            shares = {"rows_share": used.rows_share, "flops_share": used.flops_share}
            say(
                f"{f'{words}, {label}':<28} {numbers['bits_per_byte']:>13.4f} {lost:>+8.4f} {used.rows_share:>7.1%} "
                f"{used.flops_share:>17.1%}"
            )
            counts = {"k": dict(count)} if assigned is None else {"groups": dict(of), "top": dict(count)}
            found.append({**counts, "share": share, **numbers, "lost_bits_per_byte": lost, **shares})
            chosen.append(used.chosen)
        return found, chosen[0]

    fields = k or groups or row_fields(model.config)
    answer: dict[str, Any] = {"dense": dense, "k": [], "groups": []}
    answer["k"], _ = points(k, {field: size_of(model.config, field) for field in fields}, None, "the strongest")
    if not groups:
        return answer, None
    assigned = group_all(model, groups)
    answer["groups"], chosen = points(top, groups, assigned, "the best groups")
    return answer, (assigned, chosen)


def to_measure(asked: Count, of: Count) -> list[tuple[Count, float | None]]:
    """What was asked, if anything, and SHARES of `of`: each number once, with the share that it is (None if none)."""
    shares: list[tuple[Count, float | None]] = []
    for share in SHARES:
        count = {field: max(1, kept_rows(n, share)) for field, n in of.items()}
        if count not in [other for other, _ in shares]:
            shares.append((count, share))
    first = next((each for each in shares if each[0] == asked), (asked, None))
    return [first, *(each for each in shares if each[0] != asked)] if asked else shares


def lines_of(sparse: Mapping[str, Any], fields: Iterable[str]) -> dict[str, list[tuple[float, float, str]]]:
    """The picture: from all rows down to few, and what was asked, where it is none of the shares, as a point alone.

    fields: all of the model; a line for some of them says for which.
    """
    lines: dict[str, list[tuple[float, float, str]]] = {}
    alone: dict[str, list[tuple[float, float, str]]] = {}
    all_rows, every = (1.0, sparse["dense"]["bits_per_byte"], "100 %"), set(fields)
    for name, kind, count in (("the strongest rows", "k", "k"), ("the best groups", "groups", "top")):
        for point in sorted(sparse[kind], key=lambda p: -(p["share"] or 0)):
            full = name if set(point[count]) == every else f"{name} of {', '.join(point[count])}"
            dot = (point["rows_share"], point["bits_per_byte"], f"{100 * point['rows_share']:.3g} %")
            if point["share"] is None:
                alone[f"{full}, as asked"] = [dot]
            else:
                lines.setdefault(full, [all_rows if not lines else (*all_rows[:2], "")]).append(dot)
    return lines | alone


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
            often = f"used by {entry['load'] / load.tokens:.1%} of the tokens"
            say(f"{name_of(memory.place)}, row {row} ({origin}): {often}")
            for c in entry["fires_on"]:
                left = end_of(c["left"], COLUMNS - 25 - len(c["token"]))
                say(f"    w {c['weight']:>+9.3f}  ...{left} >>{c['token']}<<")
            for verb in ("promotes", "demotes"):
                if entry.get(verb):
                    say(f"    {verb:<11}  {as_many_as_fit(map(quoted, entry[verb]), COLUMNS - 17)}")
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


def end_of(text: str, room: int) -> str:
    """The end of a text with escapes, of which none is cut in two."""
    signs = re.findall(r"\\x..|\\u.{4}|\\U.{8}|\\.|.", text)
    while sum(map(len, signs)) > max(0, room):
        del signs[0]
    return "".join(signs)


def as_many_as_fit(words: Iterable[str], room: int) -> str:
    """Words with two spaces between, the first in any case."""
    line = ""
    for word in words:
        if line and len(line) + 2 + len(word) > room:
            break
        line = f"{line}  {word}" if line else word
    return line
