"""What the numbers say, in words that they support: ranks, differences, warnings, the answer.

Two arms are told apart when their gap exceeds what two runs that differ in their seed alone would show:
t * sqrt(2) * s, with s the standard deviation of one run and t the two-sided 95 % point of Student's
distribution for the runs that s came from (`noise.runs`), or 2 where their number is not given.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any

from ..statistics import student
from .units import bits_text, count_text, flops_text, gap_text, seconds_text, small_text

EQUAL_FLOPS = 0.01  # budgets within this share of each other count as one: arms stop at whole steps
IMPLAUSIBLE_BITS_PER_BYTE = 0.5  # text is not that predictable: repeated or leaked text is
EXACT_LOGIT_CHANGE = 1e-4  # float32 rounding of logits up to 25 or so; tiling reaches 4e-5 on a trained model
IGNORED = ("name", "description", "arm", "race", "noise")  # of a recipe: what is no hyperparameter of a run
NO_RULES = (
    "A race without a [race] table is a look, no verdict: rates are not tuned, and controls and checks are those of "
    "its recipe (docs/fairness.md)."
)


def noise_threshold(noise: dict[str, Any] | None, arms: list[dict[str, Any]]) -> float | None:
    """The gap in bits per byte above which two arms are told apart; None where noise was not measured, or at another
    budget (`noise.flops`) than one of the finished arms had."""
    if noise is None:
        return None
    flops = noise.get("flops")
    if flops and any(abs(a["flops"] / flops - 1) > EQUAL_FLOPS for a in arms if a["status"] == "finished"):
        return None
    runs = noise.get("runs")
    factor = student(max(1, int(runs) - 1)) if runs else 2.0
    return factor * math.sqrt(2) * noise["standard_deviation_bits_per_byte"]


def unmeasured(noise: dict[str, Any] | None) -> str:
    """Why there is no threshold."""
    return "not measured" if noise is None else f"not measured at this budget, only at {flops_text(noise['flops'])}"


def relation(value: float, other: float, threshold: float | None) -> str:
    """How `value` stands to `other`: lower, higher, level, or not told apart."""
    if threshold is not None and abs(value - other) <= threshold:
        return "not told apart"
    return "level" if value == other else "lower" if value < other else "higher"


def rank(arms: list[dict[str, Any]], threshold: float | None) -> None:
    """Writes rank, difference_to_best and against_best into each arm; only finished arms have a rank."""
    finished = sorted((a for a in arms if a["status"] == "finished"), key=lambda a: a["bits_per_byte"])
    for arm in arms:
        arm["rank"] = arm["difference_to_best"] = arm["against_best"] = None
    for place, arm in enumerate(finished, start=1):
        best = finished[0]["bits_per_byte"]
        arm["rank"], arm["difference_to_best"] = place, arm["bits_per_byte"] - best
        arm["against_best"] = "best" if place == 1 else relation(arm["bits_per_byte"], best, threshold)


def by_rank(arms: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Best first; arms that have not finished last, in the race's order."""
    return sorted(arms, key=lambda a: a["rank"] or len(arms) + 1)


def flatten(value: Any, path: str = "") -> dict[str, Any]:
    """Nested tables and lists of tables -> {"train.steps": 700, "growth.0.to.ffn_tokens": 512, ...}."""
    if isinstance(value, dict) and value:
        parts = [(f"{path}.{key}" if path else str(key), item) for key, item in value.items()]
    elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        parts = [(f"{path}.{index}", item) for index, item in enumerate(value)]
    else:
        return {path: value} if path else {}
    return {key: item for at, part in parts for key, item in flatten(part, at).items()}


def differing_keys(tables: list[dict[str, Any]], ignore: tuple[str, ...] = ()) -> list[str]:
    """The dotted keys whose values are not the same in all tables (absent counts as a value)."""
    flat = [flatten(table) for table in tables]
    keys = dict.fromkeys(key for table in flat for key in table if key.split(".")[0] not in ignore)
    missing = object()
    apart = [key for key in keys if any(t.get(key, missing) != flat[0].get(key, missing) for t in flat[1:])]
    return [key for key in apart if not any(other.startswith(f"{key}.") for other in apart)]  # an empty list


def equal_budget(arms: list[dict[str, Any]]) -> bool:
    spent = [arm["flops"] for arm in arms]
    return max(spent) - min(spent) <= EQUAL_FLOPS * max(spent)


def progress_text(arm: dict[str, Any]) -> str:
    if arm["steps"]:
        return f"step {arm['step']:,} of {arm['steps']:,}"
    if arm["flops_budget"] and arm["flops"]:
        return f"step {arm['step']:,}, {arm['flops'] / arm['flops_budget']:.0%} of its FLOPs"
    return f"step {arm['step']:,}"


def status_warnings(arms: list[dict[str, Any]]) -> list[dict[str, str]]:
    notes = []
    for arm in arms:
        if arm["status"] == "failed":
            reason = f": {arm['error']}" if arm["error"] else ""
            notes.append(
                {"level": "bad", "text": f"**{arm['name']}** failed at {progress_text(arm)}{reason}."}
            )
        elif arm["status"] == "not started":
            notes.append({"level": "warn", "text": f"**{arm['name']}** has not started."})
        elif arm["status"] != "finished":
            word = "was stopped" if arm["status"] == "stopped" else "has not finished: it stands"
            notes.append({"level": "warn", "text": f"**{arm['name']}** {word} at {progress_text(arm)}."})
    return notes


def run_doubts(arm: dict[str, Any]) -> list[tuple[str, str]]:
    """(kind, text) of what makes one run's result hard to believe; all of it is red."""
    name, bits, epochs = f"**{arm['name']}**", arm["bits_per_byte"], arm["epochs"]
    doubts = []
    if epochs is not None and epochs > 1 + 1e-9:
        doubts.append(("repeated", f"{name} saw its training text {epochs:.2f} times: its loss is partly memory."))
    if arm.get("reads_again"):
        doubts.append(("read again", f"{name} may have read text that its ancestor had read: its loss may be memory."))
    if bits is not None and bits < IMPLAUSIBLE_BITS_PER_BYTE:
        text = (
            f"{name}: {bits_text(bits)} bits per byte is below {IMPLAUSIBLE_BITS_PER_BYTE}, which is "
            "implausible for text; look for held-out text in the training data."
        )
        doubts.append(("too low", text))
    for event in arm["growth"]:
        moved = event["max_logit_change"]
        if event["promise"] == "exact" and (moved is None or moved > EXACT_LOGIT_CHANGE):
            text = (
                f"{name} grew at step {event['step']} by {event['operator']}, which promises to be "
                f"exact, but the logits moved by {small_text(moved)}."
            )
            doubts.append(("not exact", text))
    return doubts


def stream_doubts(arms: list[dict[str, Any]]) -> list[str]:
    """Whether runs that are compared read the same text and were evaluated on the same; all of it is red."""
    doubts = []
    if len({arm["data"].get("sha256") for arm in arms}) > 1:
        doubts.append("The arms did not read the same token stream: their data have different sha256.")
    if len({(arm["data"].get("token_files") or {}).get("valid.bin", {}).get("sha256") for arm in arms}) > 1:
        doubts.append("The arms were not evaluated on the same held-out text: its sha256 differs.")
    return doubts


def environment_doubts(arms: list[dict[str, Any]], environment: dict[str, Any]) -> list[str]:
    doubts = []
    starts = [start for a in arms for start in (a["environment"], *(a["environment"].get("resumed") or []))]
    keys = differing_keys(starts, ignore=("command", "started", "resumed")) if starts else []
    if keys:
        apart = [key + spread([flatten(start).get(key) for start in starts]) for key in keys]
        doubts.append(f"Not all of this ran in the same environment; what differs: {', '.join(apart)}.")
    if environment.get("dirty"):
        doubts.append("The code had uncommitted changes: the commit named below is not all of it.")
    return doubts


def spread(values: list[Any]) -> str:
    """ " (2 in 3, 64 in 1)": how many sessions had each value, commits shortened; nothing of many or long ones."""
    found = Counter(str(value)[:12] if re.fullmatch("[0-9a-f]{40}", str(value)) else str(value) for value in values)
    short = len(found) <= 4 and all(len(value) <= 12 for value in found)
    return f" ({', '.join(f'{value} in {n}' for value, n in found.items())})" if short else ""


def levels(bad: list[str], warn: list[str]) -> list[dict[str, str]]:
    return [{"level": "bad", "text": t} for t in bad] + [{"level": "warn", "text": t} for t in warn]


def warnings(report: dict[str, Any]) -> list[dict[str, str]]:
    """What a reader must know before believing the numbers; "bad" is shown in red, "warn" in amber."""
    arms = [arm for arm in report["arms"] if arm["status"] != "not started"]
    finished = [arm for arm in arms if arm["status"] == "finished"]
    bad, warn = [text for arm in arms for _, text in run_doubts(arm)] + stream_doubts(arms), []
    if len(finished) > 1 and not equal_budget(finished):
        warn.append(unequal_text(finished))
    return levels(bad, warn + environment_doubts(arms, report["environment"]))


def unequal_text(arms: list[dict[str, Any]]) -> str:
    low, high = min(a["flops"] for a in arms), max(a["flops"] for a in arms)
    return f"The arms did not spend equal FLOPs: {flops_text(low)} to {flops_text(high)}."


def comparison(arm: dict[str, Any], others: list[dict[str, Any]], threshold: float | None) -> str:
    """ "0.057 lower than **a** and not told apart from **b**"; over four arms are counted."""
    parts, counted = [], len(others) > 4
    groups: dict[str, list[dict[str, Any]]] = {}
    for other in sorted(others, key=lambda o: abs(o["bits_per_byte"] - arm["bits_per_byte"])):
        word = relation(arm["bits_per_byte"], other["bits_per_byte"], threshold)
        groups.setdefault(word if counted else f"{word} {len(groups)}", []).append(other)
    for key, group in groups.items():
        word = key.rstrip("0123456789 ")
        gaps = [gap_text(o["bits_per_byte"] - arm["bits_per_byte"]) for o in group]
        names = f"**{group[0]['name']}**" if len(group) == 1 else f"{len(group)} arms"
        if word in ("level", "not told apart"):
            parts.append(f"{word} {'with' if word == 'level' else 'from'} {names}")
        else:
            parts.append(f"{gaps[0]}{f' to {gaps[-1]}' if len(gaps) > 1 else ''} {word} than {names}")
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def race_answer(report: dict[str, Any], threshold: float | None) -> list[str]:
    ranked = [arm for arm in by_rank(report["arms"]) if arm["rank"]]
    waiting = len(report["arms"]) - len(ranked)
    if len(ranked) < 2:
        return [f"No answer yet: {len(ranked)} of {len(report['arms'])} arms have finished."]
    best, second = ranked[:2]
    gap = second["bits_per_byte"] - best["bits_per_byte"]
    equal = equal_budget(ranked)
    budget = f"At equal training FLOPs ({flops_text(best['flops'])}, ancestors included)"
    where = budget if equal else "At the end of training, **not at equal FLOPs**,"
    if waiting:
        where = f"With {waiting} of {len(report['arms'])} arms missing: {where[0].lower()}{where[1:]}"
    bits = bits_text(best["bits_per_byte"])
    first = f"{where} **{best['name']}** has the lowest held-out bits per byte, {bits}"
    if gap == 0:
        first += f", level with **{second['name']}**."
    else:
        first += f", {gap_text(gap)} lower than **{second['name']}**"
        if threshold is None:
            first += f"; noise {unmeasured(report['noise'])}, so a small gap may be chance."
        elif gap > threshold:
            first += f"; the gap is larger than the noise ({gap_text(threshold)})."
        else:
            first += f", but the two are not told apart: the gap is within the noise ({gap_text(threshold)})."
    sentences = [first]
    for arm in [a for a in ranked if a["growth"]][:2]:
        others = [o for o in ranked if o is not arm]
        if arm is best:
            others = [o for o in others if o is not second]
        if others:
            also = "also " if arm is best else ""
            sentences.append(f"Growth: **{arm['name']}** is {also}{comparison(arm, others, threshold)}.")
    return sentences


def run_answer(arm: dict[str, Any]) -> list[str]:
    verb = {"finished": "reaches", "failed": "failed, having reached"}.get(arm["status"], "so far reaches")
    spent = f"{flops_text(arm['flops'])} of training"
    detail = f"({arm['step']:,} steps, {count_text(arm['tokens'])} tokens, {seconds_text(arm['seconds'])})"
    if arm["bits_per_byte"] is None:
        first = f"**{arm['name']}** has not been evaluated yet, after {spent} {detail}."
    else:
        bits = bits_text(arm["bits_per_byte"])
        first = f"**{arm['name']}** {verb} {bits} bits per byte on held-out text after {spent} {detail}."
    events = arm["growth"]
    if not events:
        return [first]
    moved = [e["max_logit_change"] for e in events]
    change = small_text(None if None in moved else max(moved))
    times = f"at step {events[0]['step']:,}" if len(events) == 1 else f"{len(events)} times"
    sizes = f"{count_text(events[0]['parameters_before'])} to {count_text(events[-1]['parameters_after'])}"
    return [first, f"It grew {times}, from {sizes} parameters; largest change of the logits: {change}."]


def headline(report: dict[str, Any], threshold: float | None) -> list[dict[str, str]]:
    """Four or five numbers for the top of the page: label, text, note."""
    arms = report["arms"]
    ranked = [arm for arm in by_rank(arms) if arm["rank"]]
    tiles = []
    if report["kind"] == "race":
        if ranked:
            best = ranked[0]
            tiles.append(("lowest bits per byte", bits_text(best["bits_per_byte"]), best["name"]))
        if len(ranked) > 1:
            gap = ranked[1]["difference_to_best"]
            tiles.append(("gap to the next", gap_text(gap), ranked[1]["name"]))
            noise = report["noise"]
            value = "not measured" if threshold is None else gap_text(threshold)
            note = ""
            if noise is not None:
                scope = "seeds alone" if threshold is not None else f"only at {flops_text(noise['flops'])}"
                note = f"{scope}; {noise.get('source') or 'source not named'}"
            tiles.append(("noise of a gap", value, note))
            spent = [a["flops"] for a in ranked]
            equal = equal_budget(ranked)
            text = flops_text(spent[0]) if equal else f"{flops_text(min(spent))} – {flops_text(max(spent))}"
            tiles.append(("training FLOPs per arm", text, "ancestors included" if equal else "not equal"))
    else:
        arm = arms[0]
        tiles.append(("bits per byte", bits_text(arm["bits_per_byte"]), "held-out text"))
        tiles.append(("training FLOPs", flops_text(arm["flops"]), "ancestors included"))
        tiles.append(("training time", seconds_text(arm["seconds"]), f"{arm['step']:,} steps"))
        tiles.append(("parameters", count_text(arm["parameters"].get("total")), arm["architecture"]))
        epochs = "" if arm["epochs"] is None else f"{arm['epochs']:.2f} epochs"
        tiles.append(("tokens seen", count_text(arm["tokens"]), epochs))
    events = [event for arm in arms for event in arm["growth"]]
    if events:
        moved = [e["max_logit_change"] for e in events]
        worst = None if None in moved else max(moved)
        promises = " and ".join(sorted({e["promise"] for e in events}))
        tiles.append(("logits moved at growth", small_text(worst), f"at most; promised: {promises}"))
    return [{"label": label, "text": text, "note": note} for label, text, note in tiles]


def judge(report: dict[str, Any]) -> dict[str, Any]:
    """The report with ranks, threshold, statuses, warnings, headline and answer (names between **)."""
    threshold = noise_threshold(report["noise"], report["arms"])
    rank(report["arms"], threshold)
    answer = race_answer(report, threshold) if report["kind"] == "race" else run_answer(report["arms"][0])
    doubts = warnings(report) + (levels([], [NO_RULES]) if report["kind"] == "race" else [])
    if any(doubt["level"] == "bad" for doubt in doubts):
        answer[0] = f"**Read the red notes first.** {answer[0]}"
    return {
        **report,
        "answer": answer,
        "headline": headline(report, threshold),
        "noise_threshold_bits_per_byte": threshold,
        "status_warnings": status_warnings(report["arms"]),
        "warnings": doubts,
        "differing_keys": differing_keys([a["recipe"] for a in report["arms"] if a["recipe"]], IGNORED),
    }
