"""What the numbers of a full race support, in words: the answer, its tiles, pairs and ratios."""

from __future__ import annotations

from typing import Any

from ..charts import ARMS_WITH_LEADERS, MANY_ARMS
from ..units import bits_text, flops_text, gap_text, signed
from .controls import best_of_sizes, controls_of, pair_of, sizes_beside
from .numbers import cell_of, mean_of, runs_at

LABELS = {
    "scratch": "the target size from scratch",
    "small": "the small size, trained longer",
    "dropped": "the same growth without its optimizer's state",
}
NOT_COMPARED: dict[str, Any] = {"value": None}  # FLOPs to a loss, where there is no ratio
BY_ITS_LOSS = "by its loss at that budget"  # where a word rests, when the FLOPs to a loss lie beyond the budgets


def against(pair: dict[str, Any], label: str) -> str:
    """ "better than X by 0.020 [0.012 to 0.028]", or "not told apart from X: +0.004 [-0.010 to +0.018]"."""
    value, low, high = pair["value"], pair["low"], pair["high"]
    if low is None:
        return f"**not told apart** from {label}: {signed(value)}, too few runs for an interval"
    if pair["word"] == "not told apart":
        return f"**not told apart** from {label}: {signed(value)} [{signed(low)} to {signed(high)}]"
    near, far = sorted((abs(low), abs(high)))
    return f"**{pair['word']}** than {label} by {gap_text(value)} [{gap_text(near)} to {gap_text(far)}]"


def share_text(report: dict[str, Any], budget: dict[str, Any]) -> str:
    share = budget["share"] / report["race"]["budgets"][-1]
    return "the whole budget" if share == 1 else f"{100 * share:g} % of the budget"


def listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def times(values: list[float], bounds: list[float]) -> list[str]:
    """Ratios with two digits, or with as many as keep a bound beside 1 from reading 1.00; at most four."""
    digits = next((d for d in (2, 3) if all(bound == 1 or round(bound, d) != 1 for bound in bounds)), 4)
    return [f"{value:.{digits}f}" for value in values]


def ratio_text(ratio: dict[str, Any]) -> str:
    """ "0.72 [0.60 to 0.86]", "more than 1.40"."""
    value = ratio["value"] if "value" in ratio else ratio["ratio"]
    if value is None:
        return "not compared"
    if ratio["side"] == "unbounded":
        return "beyond the budgets on both sides"
    if ratio["low"] is None:
        return f"{ratio['side']} {value:.2f}".strip()
    shown, low, high = times([value, ratio["low"], ratio["high"]], [ratio["low"], ratio["high"]])
    return f"{shown} [{low} to {high}]"


def edge_text(best: dict[str, Any]) -> str:
    """ "the largest of 3 sizes", "the only size": the best of an architecture, where none beyond it was tried."""
    return "the only size" if best["edge"] == "only" else f"the {best['edge']} of {best['sizes']} sizes"


def growth_state(report: dict[str, Any], budget: dict[str, Any], arm: str) -> str:
    """ "before growth", or "grown 1 of 3 times", where what an arm is at a budget is not what it ends as (rule 17)."""
    cell = cell_of(budget, arm)
    growths = max(cell_of(b, arm)["growths"] for b in report["budgets"])
    if cell["mean"] is None or cell["growths"] == growths:
        return ""
    return f"grown {cell['growths']} of {growths} times" if cell["growths"] else "before growth"


# --- the answer ---


def progress(report: dict[str, Any]) -> str:
    runs = [run for arm in report["arms"] for run in arm["runs"]]
    return f"{sum(run['status'] == 'finished' for run in runs)} of {len(runs)} headline runs have finished"


def answered(report: dict[str, Any]) -> dict[str, Any] | None:
    """The largest budget at which at least two arms have results."""
    full = [b for b in report["budgets"] if sum(cell["mean"] is not None for cell in b["arms"]) > 1]
    return full[-1] if full else None


def best_arm(report: dict[str, Any], budget: dict[str, Any], grows: bool | None = None) -> dict[str, Any] | None:
    """The entrant (no control) with the lowest mean; of those that grow, or of all where `grows` is None."""
    means = {cell["arm"]: cell["mean"] for cell in budget["arms"]}
    entrants = [a for a in report["arms"] if a["role"] == "arm" and (grows is None or a["grows"] == grows)]
    entrants = [a for a in entrants if means[a["name"]] is not None] or (
        [a for a in report["arms"] if means[a["name"]] is not None and a["role"] != "copy"] if grows is None else []
    )
    return min(entrants, key=lambda a: means[a["name"]], default=None)


def control_labels(report: dict[str, Any], budget: dict[str, Any], arm: dict[str, Any]) -> dict[str, str]:
    """name -> what it is, of the controls that stand beside a growing arm."""
    names: dict[str, str] = {}
    labels = {**LABELS, "optimal": best_of_sizes(sizes_beside(report, budget, arm))}
    for role, name in controls_of(report, budget, arm).items():
        names[name] = f"{names[name]}, {labels[role]}" if name in names else labels[role]
    return names


def answer(report: dict[str, Any]) -> list[str]:
    budget = answered(report)
    if budget is None:
        return [f"No answer yet: {progress(report)}."]
    arm = best_arm(report, budget, grows=True) or best_arm(report, budget)
    assert arm is not None
    cell = cell_of(budget, arm["name"])
    text = "the final text" if budget["measure"] == "final_bits_per_byte" else "held-out text"
    grown = [a for a in report["arms"] if a["role"] == "arm" and a["grows"]]
    title = "the growing arm" if grown else "the best arm"
    title = f"the best of {len(grown)} growing arms" if len(grown) > 1 else title
    where = f"At {flops_text(budget['flops'])}, ancestors included, {title}, **{arm['name']}**"
    if not all(other["mean"] is not None for other in budget["arms"]):
        where = f"With arms missing: at{where[2:]}"
    figure = f"({bits_text(cell['mean'])} bits per byte on {text}, {count_seeds(len(cell['seeds']))})"
    labels = control_labels(report, budget, arm)
    others = list(labels) or [a["name"] for a in report["arms"] if a is not arm and a["role"] != "copy"]
    phrases = []
    for name in others:
        pair = pair_of(budget, arm["name"], name)
        if pair is not None:
            phrases.append(against(pair, f"**{name}**" + (f" ({labels[name]})" if labels else "")))
    if not labels and len(phrases) > 4:
        phrases = counted(budget, arm, others)
    stands = f"is {listed(phrases)}" if phrases else "stands alone"
    return [f"{where} {figure} {stands}.", second_sentence(report, budget, arm)]


def scratch_of(report: dict[str, Any], arm: str) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Of a growing arm: its own scratch (name, pair), and its FLOPs to the loss that it has."""
    row = next((row for row in report["own_controls"] if row["arm"] == arm), None)
    return (row["controls"].get("scratch"), row["flops_to_scratch"]) if row else (None, None)


def standings(report: dict[str, Any], budget: dict[str, Any], arm: dict[str, Any]) -> str:
    """How many of the arms are better, worse or not told apart: growing ones from their scratch, else all from the
    reference. Nothing where the first sentence has said so of its one arm.
    """
    if arm["grows"]:
        own = [scratch_of(report, row["arm"])[0] for row in report["own_controls"]]
        pairs = [control["pair"] for control in own if control and control["pair"]]
        names = {pair["other"] for pair in pairs}
        whom, who = (f"**{names.pop()}**" if len(names) == 1 else "its own scratch"), "growing arms"
    else:
        reference = report["race"]["reference"]
        others = [a["name"] for a in report["arms"] if a["role"] == "arm" and a["name"] not in (reference, arm["name"])]
        pairs = [pair for name in others if (pair := pair_of(budget, name, reference))]
        whom, who = f"**{reference}**", "other arms" if arm["name"] == reference else "further arms"
    if len(pairs) < 2:
        return ""
    parts = []
    for word, link in (("better", f" than {whom}"), ("not told apart", ""), ("worse", "")):
        found = [f"**{pair['arm']}**" for pair in pairs if pair["word"] == word]
        named = f" ({listed(found)})" if 0 < len(found) < len(pairs) else ""
        count = ("all" if len(found) == len(pairs) else len(found)) if found else "none"
        if found or word == "better":
            verb = ("is " if len(found) < 2 else "are ") if link else ""
            parts.append(f"{count} {verb}**{word}**{link}{named}")
    return f"Of {len(pairs)} {who} {listed(parts)}"


def counted(budget: dict[str, Any], arm: dict[str, Any], others: list[str]) -> list[str]:
    """Where an arm met many others: how many it beat, and by name those that it did not."""
    pairs = [pair for name in others if (pair := pair_of(budget, arm["name"], name)) is not None]
    beaten = [pair for pair in pairs if pair["word"] == "better"]
    out = [f"**better** than {len(beaten)} of {len(pairs)} other arms"] if beaten else []
    for word, link in (("not told apart", "from"), ("worse", "than")):
        names = [f"**{pair['other']}**" for pair in pairs if pair["word"] == word]
        out += [f"**{word}** {link} {listed(names)}"] if names else []
    return out


def count_seeds(n: int) -> str:
    return "1 seed" if n == 1 else f"{n} seeds"


def second_sentence(report: dict[str, Any], budget: dict[str, Any], arm: dict[str, Any]) -> str:
    """How all arms stand, what they gained over scratch compared, and FLOPs to the loss of scratch or the reference."""
    name, ratio = flops_to_loss(report, budget, arm)
    parts = [standings(report, budget, arm)]
    gains = [gain for gain in report["gains"] if gain["share"] == budget["share"]]
    if gains:
        apart = sum(gain["word"] != "not told apart" for gain in gains)
        which = f"of {len(gains)} differences" if len(gains) > 1 else "of one difference"
        parts.append(f"{which} between what they gained {apart or 'none'} can be told from zero")
    if bounded(ratio):
        rests = f", {BY_ITS_LOSS}" if ratio["side"] else ""
        parts.append(
            f"to the loss that **{name}** has there **{arm['name']}** needs {ratio_text(ratio)} times the FLOPs of "
            f"**{name}**: **{ratio['word']}**{rests}"
        )
    itself = f"**{name}** is the reference itself" if name == arm["name"] else ""
    said = "; ".join(filter(None, parts)) or itself or f"FLOPs to the loss of **{name}**: {ratio_text(ratio)}"
    return f"{said[0].upper()}{said[1:]}."


def flops_to_loss(report: dict[str, Any], budget: dict[str, Any], arm: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Whose loss, and an arm's FLOPs to it at a budget: its own scratch's where it grows, else the reference's."""
    scratch, ratio = scratch_of(report, arm["name"])
    if not scratch:
        at = next((r for r in report["reach"] if r["share"] == budget["share"]), None)
        ratio = at["ratios"].get(arm["name"]) if at else None
    return scratch["name"] if scratch else report["race"]["reference"], ratio or NOT_COMPARED


def bounded(ratio: dict[str, Any]) -> bool:
    """Whether there is a ratio, and the budgets bound it on some side."""
    return ratio["value"] is not None and ratio["side"] != "unbounded"


def foremost(report: dict[str, Any]) -> list[str]:
    """Of many arms those that charts have in colour: the reference, the arm of the answer, its controls, and the copies
    of the reference. None where all of them can be.
    """
    budget = answered(report)
    arm = budget and (best_arm(report, budget, grows=True) or best_arm(report, budget))
    if not budget or not arm or len(report["arms"]) <= MANY_ARMS:
        return []
    reference = report["race"]["reference"]
    copies = [a["name"] for a in report["arms"] if a["role"] == "copy" and a["of"] == reference]
    names = [reference, arm["name"], *controls_of(report, budget, arm).values(), *copies]
    return list(dict.fromkeys(names))[:ARMS_WITH_LEADERS]


# --- tiles ---


def headline(report: dict[str, Any]) -> list[dict[str, str]]:
    budget, tiles = answered(report), []
    if budget is not None:
        arm = best_arm(report, budget, grows=True) or best_arm(report, budget)
        if arm is not None:
            cell = cell_of(budget, arm["name"])
            tiles.append(("best growing arm" if arm["grows"] else "best arm", bits_text(cell["mean"]), arm["name"]))
        sizes = sizes_beside(report, budget, arm) if arm and arm["grows"] else budget["compute_optimal"][:1]
        if sizes:
            best = min(sizes, key=lambda size: size["loss"])
            edge = f"not bracketed: {edge_text(best)}" if best["edge"] else "bracketed"
            label = best_of_sizes(sizes).removeprefix("the ")
            tiles.append((label, bits_text(best["loss"]), f"{best['arm']}; {edge}"))
        if budget["s"] is not None:
            tiles.append(("noise of one run", gap_text(budget["s"]), f"pooled, {budget['df']:.3g} degrees of freedom"))
        name, ratio = flops_to_loss(report, budget, arm) if arm else ("", NOT_COMPARED)
        if bounded(ratio):
            rests = f", {BY_ITS_LOSS}" if ratio["side"] else ""
            text = f"{ratio_text(ratio).split(' [')[0]}\N{NO-BREAK SPACE}×"
            tiles.append((f"FLOPs to the loss of {name}", text, ratio["word"] + rests))
        spent = mean_of([run for a in report["arms"] for run in runs_at(a, budget["share"])], "flops")
        tiles.append(("training FLOPs per run", flops_text(spent), "ancestors included"))
    return [{"label": label, "text": text, "note": note} for label, text, note in tiles]
