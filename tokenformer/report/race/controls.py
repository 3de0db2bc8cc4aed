"""Which controls stand beside a growing arm; what growing gained over them (rules 7 to 10), and what it costs to one
who owns the small model.

A race makes a control once, for the first arm that needs it; every other arm of the same sizes shares it. Which are an
arm's own the race says.
"""

from __future__ import annotations

import math
from itertools import combinations, product
from typing import Any

from ...statistics import Spread, flops_to_reach, mean_sd, own_interval, verdict
from .numbers import (
    cell_of,
    curves_of,
    growths_of,
    measure_of_all,
    reach,
    reference_of,
    runs_at,
    value_of,
    values_at,
)

SQRT2 = math.sqrt(2)


def control_of(report: dict[str, Any], arm: dict[str, Any], role: str) -> dict[str, Any] | None:
    """The scratch, small or dropped that the race gave the arm; None where it has none. A copy, and one whose
    moments are dropped, have those of the arm that they stand beside."""
    arms = {a["name"]: a for a in report["arms"]}
    owner = arms.get(arm["of"], arm) if arm["role"] in ("dropped", "copy") and role != "dropped" else arm
    return arms.get(owner.get("controls", {}).get(role))


def controls_of(report: dict[str, Any], budget: dict[str, Any], arm: dict[str, Any]) -> dict[str, str]:
    """scratch, small, dropped, optimal -> the name of that control of a growing arm, of those that it has."""
    if not arm["grows"]:
        return {}
    names = {role: control["name"] for role, control in made_controls(report, arm).items()}
    sizes = sizes_beside(report, budget, arm)
    return names | ({"optimal": min(sizes, key=lambda best: best["loss"])["arm"]} if sizes else {})


def made_controls(report: dict[str, Any], arm: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found = {role: control_of(report, arm, role) for role in ("scratch", "small", "dropped")}
    return {role: control for role, control in found.items() if control}


def sizes_beside(report: dict[str, Any], budget: dict[str, Any], arm: dict[str, Any]) -> list[dict[str, Any]]:
    """The best size from scratch of each kind of model that a growing arm's own scratch and small are of."""
    own = {control["name"] for control in made_controls(report, arm).values()}
    return [best for best in budget["compute_optimal"] if own.intersection(best["of"])]


def best_of_sizes(sizes: list[dict[str, Any]]) -> str:
    """ "the best of 4 sizes from scratch": what the control of rule 10 is, of as many as were tried."""
    count = sum(best["sizes"] for best in sizes)
    return f"the best of {count} sizes from scratch" if count > 1 else "the only size from scratch"


def pair_of(budget: dict[str, Any], arm: str, other: str) -> dict[str, Any] | None:
    """arm - other at a budget, whichever way round it was worked out; None where they share no seed."""
    for pair in budget["pairs"]:
        if (pair["arm"], pair["other"]) == (arm, other):
            return pair
        if (pair["arm"], pair["other"]) == (other, arm):
            turned = {"better": "worse", "worse": "better"}
            flipped = {**pair, "arm": arm, "other": other, "value": -pair["value"]}
            for low, high in (("low", "high"), ("own_low", "own_high"), ("text_low", "text_high")):
                if low in pair:
                    flipped[low], flipped[high] = (None if pair[end] is None else -pair[end] for end in (high, low))
            return {**flipped, "word": turned.get(pair["word"], pair["word"])}
    return None


def growing(report: dict[str, Any], budget: dict[str, Any]) -> list[dict[str, Any]]:
    """The entrants that grow and have a result at the budget, best first."""
    means = {arm["name"]: cell_of(budget, arm["name"])["mean"] for arm in report["arms"]}
    found = [a for a in report["arms"] if a["role"] == "arm" and a["grows"] and means[a["name"]] is not None]
    return sorted(found, key=lambda a: means[a["name"]])


def own_controls(report: dict[str, Any], budget: dict[str, Any]) -> list[dict[str, Any]]:
    """Each growing arm: its difference to each control of its own, and its FLOPs to its own scratch's loss."""
    arms, ratios, out = {arm["name"]: arm for arm in report["arms"]}, {}, []
    for arm in growing(report, budget):
        names = controls_of(report, budget, arm)
        scratch = names.get("scratch")
        if scratch and scratch not in ratios:
            ratios[scratch] = reach(report, arms[scratch], [budget["share"]])[0]["ratios"]
        compared = {role: {"name": name, "pair": pair_of(budget, arm["name"], name)} for role, name in names.items()}
        ratio = ratios[scratch][arm["name"]] if scratch else None
        out.append({"arm": arm["name"], "share": budget["share"], "controls": compared, "flops_to_scratch": ratio})
    return out


def gains(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Of two growing arms with different scratch: (arm - its scratch) - (other - its scratch), seed by seed; at each
    budget, the largest first, whose order the arms have.

    Four runs are in it, so its pooled interval is t s sqrt(4 / n), with the s of arms of different starts (rule 20).
    """
    budgets, out = report["budgets"][::-1], []
    scores = {each["share"]: (values_at(report, each["share"]), Spread(each["s"], each["df"])) for each in budgets}
    arms = {arm["name"]: arm for budget in budgets for arm in growing(report, budget)}
    scratch = {name: control_of(report, arm, "scratch") for name, arm in arms.items()}
    own = {name: control["name"] for name, control in scratch.items() if control}
    for budget, (arm, other) in product(budgets, combinations(own, 2)):
        values, spread = scores[budget["share"]]
        four = [values[name] for name in (arm, own[arm], other, own[other])]
        seeds = sorted(set.intersection(*map(set, four)))
        if own[arm] == own[other] or not seeds:
            continue
        value, *own_ends = own_interval([a - b - (c - d) for a, b, c, d in ([y[s] for y in four] for s in seeds)])
        half = spread.half_width(len(seeds))
        low, high = (None, None) if value is None or half is None else (value - SQRT2 * half, value + SQRT2 * half)
        ends = {"low": low, "high": high, "own_low": own_ends[0], "own_high": own_ends[1]}
        names = {"arm": arm, "scratch": own[arm], "other": other, "other_scratch": own[other], "seeds": seeds}
        word = verdict(low, high, ("better", "worse"))
        out.append({**names, "share": budget["share"], "value": value, **ends, "word": word})
    return out


def sunk_costs(report: dict[str, Any], arm: dict[str, Any]) -> list[dict[str, Any]]:
    """FLOPs of the last growth and after it, over what its own scratch needs from its first step for the same loss; an
    arm without one is held against the reference.
    """
    scratch, measure, out = control_of(report, arm, "scratch"), measure_of_all(report), []
    against = scratch or reference_of(report)
    curves = curves_of(report, against)
    for share in report["race"]["budgets"]:
        spent, logs, sides = [], [], set()
        for run in runs_at(arm, share):
            events, value = growths_of(arm, run), value_of(run, measure)
            if not events or value is None:
                continue
            after = run["flops"] - events[-1]["flops"] + events[-1].get("growth_flops", 0)
            spent.append(after)
            if run["seed"] in curves and after > 0:
                needed, side = flops_to_reach(curves[run["seed"]], value)
                logs.append(math.log(after / needed))
                # What bounds those FLOPs from below bounds the ratio from above.
                sides.add({"more than": "less than", "less than": "more than"}.get(side, ""))
        if spent:
            mean, low, high = own_interval(logs)
            inside = sides == {""}
            side = "" if inside or not sides else "unbounded" if len(sides - {""}) > 1 else (sides - {""}).pop()
            ratio = None if mean is None else math.exp(mean)
            bounds = [math.exp(b) if inside and b is not None else None for b in (low, high)]
            more = {"ratio": ratio, "side": side, "low": bounds[0], "high": bounds[1]}
            more |= {"against": against["name"], "own_scratch": scratch is not None}
            out.append({"arm": arm["name"], "share": share, "flops": mean_sd(spent)[0], "seeds": len(spent), **more})
    return out
