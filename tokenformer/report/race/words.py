"""What the numbers of a full race support, in words: the answer, its tiles, pairs and ratios."""

from __future__ import annotations

from typing import Any

from ..units import bits_text, flops_text, gap_text
from .numbers import cell_of, mean_of, runs_at


def signed(value: float) -> str:
    return f"{'−' if value < 0 else '+'}{gap_text(value)}"


def pair_of(budget: dict[str, Any], arm: str, other: str) -> dict[str, Any] | None:
    """arm - other at a budget, whichever way round it was worked out; None where they share no seed."""
    for pair in budget["pairs"]:
        if (pair["arm"], pair["other"]) == (arm, other):
            return pair
        if (pair["arm"], pair["other"]) == (other, arm):
            turned = {"better": "worse", "worse": "better"}
            flipped = {**pair, "arm": arm, "other": other, "value": -pair["value"]}
            for low, high in (("low", "high"), ("own_low", "own_high")):
                flipped[low] = None if pair[high] is None else -pair[high]
                flipped[high] = None if pair[low] is None else -pair[low]
            return {**flipped, "word": turned.get(pair["word"], pair["word"])}
    return None


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


def ratio_text(ratio: dict[str, Any]) -> str:
    """ "0.72 [0.60 to 0.86]", "more than 1.40"."""
    key = "value" if "value" in ratio else "ratio"
    if ratio[key] is None:
        return "not compared"
    if ratio["side"] == "unbounded":
        return "beyond the budgets on both sides"
    side = f"{ratio['side']} " if ratio["side"] else ""
    interval = "" if ratio["low"] is None else f" [{ratio['low']:.2f} to {ratio['high']:.2f}]"
    return f"{side}{ratio[key]:.2f}{interval}"


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


def controls_of(report: dict[str, Any], budget: dict[str, Any], arm: dict[str, Any]) -> dict[str, str]:
    """name -> what it is, of the controls that stand beside an arm, and of the compute-optimal size."""
    what = {
        "scratch": "the target size from scratch",
        "small": "the small size, trained longer",
        "dropped": "the same growth without its optimizer's state",
    }
    names: dict[str, str] = {}
    for role, label in what.items():
        found = [a for a in report["arms"] if a["role"] == role and a is not arm]
        own = [a for a in found if a["of"] == arm["name"]]
        names.update({a["name"]: label for a in own or found if a["architecture"] == arm["architecture"]})
    for best in budget["compute_optimal"]:
        if best["architecture"] == arm["architecture"] and best["arm"] != arm["name"]:
            label = "the compute-optimal size"
            names[best["arm"]] = f"{names[best['arm']]}, {label}" if best["arm"] in names else label
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
    labels = controls_of(report, budget, arm) if grown else {}
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
    """FLOPs to the reference's loss at the same budget."""
    at = next((r for r in report["reach"] if r["share"] == budget["share"]), None)
    ratio = at["ratios"].get(arm["name"]) if at else None
    if not ratio or ratio["value"] is None or ratio["side"] == "unbounded":
        return "FLOPs to the reference's loss: not compared."
    name = report["race"]["reference"]
    return (
        f"To the loss that **{name}** has there it needs {ratio_text(ratio)} times the FLOPs of **{name}**: "
        f"**{ratio['word']}**."
    )


# --- tiles ---


def headline(report: dict[str, Any]) -> list[dict[str, str]]:
    budget, tiles = answered(report), []
    if budget is not None:
        arm = best_arm(report, budget, grows=True) or best_arm(report, budget)
        if arm is not None:
            cell = cell_of(budget, arm["name"])
            tiles.append(("best growing arm" if arm["grows"] else "best arm", bits_text(cell["mean"]), arm["name"]))
        scratch = [b for b in budget["compute_optimal"] if not arm or b["architecture"] == arm["architecture"]]
        for best in scratch[:1]:
            edge = "bracketed" if not best["edge"] else f"not bracketed: the {best['edge']} size"
            tiles.append(("best size from scratch", bits_text(best["loss"]), f"{best['arm']}; {edge}"))
        if budget["s"] is not None:
            tiles.append(("noise of one run", gap_text(budget["s"]), f"pooled, {budget['df']:.3g} degrees of freedom"))
        at = next((r for r in report["reach"] if r["share"] == budget["share"]), None)
        ratio = at["ratios"].get(arm["name"]) if at and arm else None
        if ratio and ratio["value"] is not None and ratio["side"] != "unbounded":
            tiles.append(("FLOPs to the reference's loss", f"{ratio_text(ratio).split(' [')[0]} ×", ratio["word"]))
        spent = mean_of([run for a in report["arms"] for run in runs_at(a, budget["share"])], "flops")
        tiles.append(("training FLOPs per run", flops_text(spent), "ancestors included"))
    return [{"label": label, "text": text, "note": note} for label, text, note in tiles]
