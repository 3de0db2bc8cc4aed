"""What the charts of a full race show: decayed results per budget, and the loss on the way, means over seeds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ...statistics import mean_sd
from ..charts import MANY_ARMS, QUIET, Chart, Event, Series, colour_of, event_lines, thinned, time_unit, y_range
from ..units import bits_text, flops_text, gap_text, prefix, seconds_text
from .controls import controls_of, pair_of
from .words import answered, best_arm, of_another_kind, own_pairs

COLOURED = 6  # arms of many, at most
FLOPS_LABEL = "training FLOPs, ancestors included ({}FLOP)"


def foremost(report: dict[str, Any]) -> list[str]:
    """Of many arms those in colour: the reference, the best arm of the answer, its controls, another kind of model that
    is better, arms that are better than their own scratch, or the reference, and its copies, as far as colours reach.
    None where all arms have one.
    """
    budget = answered(report)
    arm = budget and best_arm(report, budget)
    if not budget or not arm or len(report["arms"]) <= MANY_ARMS:
        return []
    reference = report["race"]["reference"]
    copies = [a["name"] for a in report["arms"] if a["role"] == "copy" and a["of"] == reference]
    entrants = [a["name"] for a in report["arms"] if a["role"] == "arm"]
    beside = (pair for name in entrants if (pair := pair_of(budget, name, reference)))
    pairs = own_pairs(report, budget, "scratch") if arm["grows"] else sorted(beside, key=lambda pair: pair["value"])
    better = [name for pair in pairs if pair["word"] == "better" for name in (pair["arm"], pair["other"])]
    rival = of_another_kind(report, budget, arm) if arm["grows"] else ""
    names = [reference, arm["name"], *controls_of(report, budget, arm).values(), rival, *better, *copies]
    return list(dict.fromkeys(filter(None, names)))[:COLOURED]


def unit_of(values: Iterable[float | None], over: str) -> tuple[float, str, str]:
    """Divisor, its name, and the label of an axis of FLOPs or of seconds."""
    highest = max((v for v in values if v is not None), default=1.0) or 1.0
    if over == "flops":
        unit, letter = prefix(highest)
        return unit, letter, FLOPS_LABEL.format(letter)
    unit, letter = time_unit(highest)
    return unit, letter, f"training time ({letter})"


def decayed_chart(report: dict[str, Any], over: str) -> Chart:
    """Mean of the fully decayed results at each budget, and a band of one standard deviation between seeds."""
    budgets = report["budgets"]
    unit, _, x_label = unit_of((cell[over] for b in budgets for cell in b["arms"]), over)
    series = []
    for place, arm in enumerate(report["arms"]):
        cells = [b["arms"][place] for b in budgets]
        cells = [cell for cell in cells if cell["mean"] is not None and cell[over] is not None]
        line = Series(arm["name"], colour_of(report, arm), [c[over] / unit for c in cells], [c["mean"] for c in cells])
        for c in cells:
            sd = c["sd"] or 0.0
            line.low.append(c["mean"] - sd)
            line.high.append(c["mean"] + sd)
            scatter = f" ± {gap_text(sd)}" if c["sd"] is not None else ""
            seeds = f"{len(c['seeds'])} seeds · {flops_text(c['flops'])} · {seconds_text(c['seconds'])}"
            line.notes.append(f"{arm['name']}\n{bits_text(c['mean'])}{scatter} bits per byte\n{seeds}")
        series.append(line)
    what = "training FLOPs" if over == "flops" else "seconds"
    return Chart(f"Fully decayed results over {what}", x_label, "bits per byte", in_layers(series), [], points=True)


def in_layers(series: list[Series]) -> list[Series]:
    """Those in grey first, without their bands, so that the others lie above them."""
    for line in series:
        if line.colour >= QUIET:
            line.low, line.high = [], []
    return sorted(series, key=lambda line: line.colour < QUIET)


def top_charts(report: dict[str, Any]) -> list[Chart]:
    """Over FLOPs and over seconds, on one y-axis, which ends a little above the worst result of the reference or of the
    arm in the middle: one that is far behind would press all others into one line.
    """
    charts = [decayed_chart(report, over) for over in ("flops", "seconds")]
    lows, highs = zip(*(y_range(chart, False) for chart in charts), strict=True)
    low, high = min(lows), max(highs)
    reference = report["race"]["reference"]
    ends = sorted((max(s.high or s.y), s.name == reference) for s in charts[0].series if s.y)
    worst = max([end for i, (end, named) in enumerate(ends) if named or i <= len(ends) // 2], default=high)
    for chart in charts:
        chart.shared_y = low, min(high, worst + 0.06 * (worst - low))
    return charts


def trunks(arm: dict[str, Any]) -> list[dict[str, Any]]:
    """The arm's runs of the whole budget that have begun and did not fail."""
    whole = [run for run in arm["runs"] if run["share"] == arm["runs"][-1]["share"]]
    return [run for run in whole if run["curve"] and run["status"] != "failed"]


def training_chart(report: dict[str, Any]) -> Chart:
    """Held-out loss on the way of the runs of the whole budget: mean, and the lowest and the highest seed."""
    whole = [(colour_of(report, arm), arm, trunks(arm)) for arm in report["arms"]]
    unit, _, x_label = unit_of((x for _, _, runs in whole for run in runs for x in run["curve"]["flops"]), "flops")
    series, events = [], []
    for colour, arm, runs in whole:
        line = Series(arm["name"], colour, [], [])
        curves = [list(zip(r["curve"]["flops"], r["curve"]["bits_per_byte"], strict=True)) for r in runs]
        # Seeds evaluate at the same steps, but for growths that wait for a slope; what all have is shown.
        for points in zip(*curves, strict=False):
            bits = [y for _, y in points if y is not None]
            flops = mean_sd([x for x, _ in points if x is not None])[0]
            if len(bits) < len(points) or flops is None or not bits:
                continue
            mean = sum(bits) / len(bits)
            line.x.append(flops / unit)
            line.y.append(mean)
            line.low.append(min(bits))
            line.high.append(max(bits))
            seeds = f"{len(bits)} seeds, {bits_text(min(bits))} to {bits_text(max(bits))}"
            line.notes.append(f"{arm['name']}\n{bits_text(mean)} bits per byte\n{seeds}\n{flops_text(flops)}")
        series.append(thinned(line))
        for event in runs[0]["growth"] if runs else ():
            events.append((event["flops"], colour, arm["name"], event))
    marks = [
        Event(number, flops / unit, colour, [name, *event_lines(event)])
        for number, (flops, colour, name, event) in enumerate(sorted(events, key=lambda v: v[0]), start=1)
    ]
    return Chart("Held-out bits per byte on the way", x_label, "bits per byte", in_layers(series), marks)
