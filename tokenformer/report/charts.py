"""What a chart shows: lines, growths and axes, chosen once for the page's SVG and for the PNG.

The palette is after Okabe and Ito's, made for eyes with any of the common forms of colour blindness: darker
where theirs is pale on white, lighter on a dark page. An eighth arm starts again at the first colour, dashed. Of more
than MANY_ARMS in a full race a few have colours, and all others one thin grey.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from .units import bits_text, count_text, flops_text, prefix, seconds_text, small_text

LIGHT = ("#0072B2", "#D55E00", "#009E73", "#B0568F", "#C98200", "#3D9BD1", "#555555", "#B3B7BB")
DARK = ("#56A8E8", "#F08A4B", "#2CC296", "#E08FC0", "#EDB33B", "#8ED1F5", "#B5B5B5", "#5C6369")
GREY = 7  # its place in both; the colours stand before it
DASHES = ("", "7 4", "2 3")
MANY_ARMS = 8
QUIET = 1000  # an arm with a number from here on is drawn in grey
SHOWN_FROM = 0.1  # on a linear axis the fall over the first tenth of training would flatten all the rest
EVENTS_IN_WORDS = 2
ARMS_WITH_LEADERS = 6  # with more arms a fan of leaders says less than a plain list of names


@dataclass
class Series:
    name: str
    colour: int  # the arm's number, see colour_of
    x: list[float]
    y: list[float]
    notes: list[str] = field(default_factory=list)  # the read-out of each point, in lines
    low: list[float] = field(default_factory=list)  # a band about y, where there is one
    high: list[float] = field(default_factory=list)


@dataclass
class Event:
    number: int  # in the order of FLOPs, the same in every chart
    x: float
    colour: int
    lines: list[str]  # the arm, what grew, its parameters, the logits


@dataclass
class Chart:
    title: str
    x_label: str
    y_label: str
    series: list[Series]
    events: list[Event]
    whole: bool = False  # show all of y from 0 on, also on a linear axis, and growths without words
    shared_y: tuple[float, float] | None = None  # of charts that stand side by side
    points: bool = False  # few results, each marked, rather than a curve; x and y show just them


def colour_of(report: dict[str, Any], arm: dict[str, Any]) -> int:
    """An arm's number, which its name and lines carry: its place, or QUIET and more where others are `foremost`."""
    place, foremost = report["arms"].index(arm), report.get("foremost")
    if not foremost:
        return place
    return foremost.index(arm["name"]) if arm["name"] in foremost else QUIET + place


def shade(colour: int) -> int:
    """The place of an arm's colour in the palettes."""
    return GREY if colour >= QUIET else colour % GREY


def dashing(colour: int) -> int:
    """0, 1, 2: whether an arm's line is whole, dashed or dotted."""
    return 0 if colour >= QUIET else colour // GREY % 3


def time_unit(seconds: float) -> tuple[float, str]:
    return (1.0, "s") if seconds < 600 else (60.0, "min") if seconds < 7200 else (3600.0, "h")


def event_lines(event: dict[str, Any]) -> list[str]:
    """What grew, from and to how many parameters, how far the logits moved."""
    axes = [f"{k.removesuffix('_tokens')} {event['from'].get(k, '?')}→{v}" for k, v in event["to"].items()]
    what = ", ".join(axes) if len(axes) <= 2 else f"{len(axes)} axes"
    before, after = count_text(event["parameters_before"]), count_text(event["parameters_after"])
    moved = small_text(event["max_logit_change"])
    return [f"growth: {what}", f"{before} → {after} parameters", f"logits moved: {moved}"]


def chart_of(
    arms: list[dict[str, Any]], kind: str, quantity: str, over: str, title: str, y_label: str
) -> Chart:
    """One line per arm: `quantity` of the `kind` curve over "flops" or "seconds", in a readable unit."""
    highest = max((v for a in arms for v in a["curves"][kind][over] if v is not None), default=1.0) or 1.0
    if over == "flops":
        unit, letter = prefix(highest)
        x_label = f"training FLOPs, ancestors included ({letter}FLOP)"
    else:
        unit, letter = time_unit(highest)
        x_label = f"training time ({letter})"
    series = []
    for colour, arm in enumerate(arms):
        curve = arm["curves"][kind]
        line = Series(arm["name"], colour, [], [])
        for i, (x, y) in enumerate(zip(curve[over], curve[quantity], strict=True)):
            if x is None or y is None:
                continue
            line.x.append(x / unit)
            line.y.append(y)
            value = f"{bits_text(y)} bits per byte" if quantity == "bits_per_byte" else f"{y:.4g} {y_label}"
            spent = f"{flops_text(curve['flops'][i])} · {seconds_text(curve['seconds'][i])}"
            steps = f"step {curve['step'][i]:,} · {count_text(curve['tokens'][i])} tokens"
            line.notes.append("\n".join((arm["name"], value, spent, steps)))
        series.append(thinned(line))
    grown = sorted(
        ((e["flops"], colour, e) for colour, a in enumerate(arms) for e in a["growth"]), key=lambda g: g[0]
    )
    events = [
        Event(number, e[over] / unit, colour, [arms[colour]["name"], *event_lines(e)])
        for number, (_, colour, e) in enumerate(grown, start=1)
    ]
    return Chart(title, x_label, y_label, series, events)


def thinned(line: Series, most: int = 400) -> Series:
    """Every k-th point, the last one kept, so that a page of long runs stays small."""
    if len(line.x) <= most:
        return line
    kept = [*range(0, len(line.x) - 1, math.ceil(len(line.x) / most)), len(line.x) - 1]
    x, y, notes = [line.x[i] for i in kept], [line.y[i] for i in kept], [line.notes[i] for i in kept]
    low, high = ([band[i] for i in kept] if band else [] for band in (line.low, line.high))
    return Series(line.name, line.colour, x, y, notes, low, high)


def x_range(chart: Chart, log: bool) -> tuple[float, float]:
    xs = [x for s in chart.series for x in s.x]
    if log:
        xs = [x for x in xs if x > 0] or [1.0]
        low, high = min(xs), max(xs)
        return (low, high) if high > low else (low / 2, high * 2)
    high = max(xs, default=1.0) or 1.0
    return (min(xs, default=0.0) - 0.03 * high if chart.points else 0.0), high


def y_range(chart: Chart, log: bool) -> tuple[float, float]:
    """All values on a log axis; on a linear one those after a tenth of each arm's training; and a margin."""
    if chart.shared_y and not log:
        return chart.shared_y
    shown = []
    for s in chart.series:
        start = 0.0 if log or chart.whole or chart.points else SHOWN_FROM * max(s.x, default=0.0)
        for y in (s.y, s.low, s.high):
            shown += [y for x, y in zip(s.x, y, strict=False) if x >= start and (x > 0 or not log)]
    low, high = min(shown, default=0.0), max(shown, default=1.0)
    margin = (high - low or abs(high) or 1.0) * 0.06
    return (0.0 if chart.whole else low - margin), high + margin


def is_cut(chart: Chart) -> bool:
    return any(y > y_range(chart, False)[1] for s in chart.series for y in s.y)


def spread(wanted: list[float], gap: float, low: float, high: float) -> list[float]:
    """Positions at least `gap` apart within [low, high], in the order of `wanted` and close to it."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    groups: list[list[float]] = []  # [sum of what the members ask for at their group's top, members]
    for n, i in enumerate(order):
        groups.append([wanted[i] - n * gap, 1])
        while len(groups) > 1 and groups[-2][0] / groups[-2][1] > groups[-1][0] / groups[-1][1]:
            total, members = groups.pop()
            groups[-1][0] += total
            groups[-1][1] += members
    placed, n = [0.0] * len(wanted), 0
    room = high - low - gap * (len(wanted) - 1)
    for total, members in groups:
        base = min(max(total / members, low), low + max(room, 0.0))
        for _ in range(int(members)):
            placed[order[n]] = base + n * gap
            n += 1
    return placed


def label_places(ends: list[tuple[Series, float]], gap: float, low: float, high: float) -> list[float | None]:
    """Where names stand, each near its line's end and `gap` from the next; None for a grey one that others crowd."""
    loud = [end for s, end in ends if s.colour < QUIET]
    free, out = iter(placed := spread(loud, gap, low, high)), []
    for s, end in ends:
        others = placed + [other for t, other in ends if t.colour >= QUIET and t is not s]
        alone = all(abs(end - other) >= gap for other in others)
        out.append(next(free) if s.colour < QUIET else end if alone else None)
    return out


def with_leaders(chart: Chart) -> bool:
    """Whether names are tied to their lines' ends; else each has a piece of its line beside it."""
    return sum(s.colour < QUIET for s in chart.series) <= ARMS_WITH_LEADERS


def shortened(name: str, most: int = 23) -> str:
    return name if len(name) <= most else name[: most - 1].rstrip() + "…"


def text_width(text: str, size: float = 12.5) -> float:
    return len(text) * size * 0.56


def last_x_within(lines: list[list[tuple[float, float]]], low: float, high: float) -> float:
    """The greatest x at which any of the polylines has its y within [low, high]; -inf where none has."""
    furthest = -math.inf
    for line in lines:
        for (xa, ya), (xb, yb) in zip(line, line[1:], strict=False):
            if max(ya, yb) < low or min(ya, yb) > high:
                continue
            inside = [0.0, 1.0] if ya == yb else sorted(((low - ya) / (yb - ya), (high - ya) / (yb - ya)))
            furthest = max(furthest, xa + (xb - xa) * min(1.0, inside[1]))
    return furthest


def label_place(x: float, width: float, clear: float, right: float, gap: float) -> tuple[float, bool]:
    """Where a growth's label starts, clear of the curves, or (ends, True) where it only fits to the left."""
    for start in (max(x, clear) + gap, x + gap):
        if start + width <= right:
            return start, False
    return x - gap, True
