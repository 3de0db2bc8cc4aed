"""A chart as SVG inside the page: crisp at any size, coloured by the page's style sheet, light or dark."""

from __future__ import annotations

import math
from html import escape
from typing import Any

from .charts import (
    DASHES,
    EVENTS_IN_WORDS,
    QUIET,
    Chart,
    Series,
    dashing,
    label_place,
    label_places,
    last_x_within,
    shade,
    shortened,
    text_width,
    with_leaders,
    x_range,
    y_range,
)
from .units import linear_ticks, log_ticks, tick_texts

WIDE, NARROW = (600, 400), (360, 330)


def event_marks(
    chart: Chart, to_x: Any, lines: list[list[tuple[float, float]]], box: tuple[float, ...]
) -> str:
    """Dashed lines; one or two growths get a label in words, more a number that the page explains."""
    left, top, right, bottom = box
    out, words, row_ends = [], len(chart.events) <= EVENTS_IN_WORDS, [-math.inf] * 40
    for event in sorted(chart.events, key=lambda e: e.x):
        x, colour, number = to_x(event.x), shade(event.colour), event.number
        if not left - 1 <= x <= right + 1:
            continue
        out.append(f'<line class="growth s{colour}" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>')
        if chart.whole:
            continue
        if words:
            y = top + 14 + (number - 1) * 52
            width = max(text_width(text, 12) for text in event.lines[1:])
            at, ends = label_place(x, width, last_x_within(lines, y - 12, y + 34), right, 7)
            if not ends and at > x + 8:
                out.append(
                    f'<line class="growth-tie s{colour}" x1="{x:.1f}" x2="{at - 4:.1f}" '
                    f'y1="{y - 4}" y2="{y - 4}"/>'
                )
            for row, text in enumerate(event.lines[1:]):
                style = f"growth-text first f{colour}" if row == 0 else "growth-text"
                out.append(
                    f'<text class="{style}" x="{at:.1f}" y="{y + row * 15}" '
                    f'text-anchor="{"end" if ends else "start"}">{escape(text)}</text>'
                )
        else:
            row = next(r for r, end in enumerate(row_ends) if x - 9 > end or r == len(row_ends) - 1)
            row_ends[row] = x + 9
            y = top + 10 + row * 20
            out.append(f'<circle class="growth-number s{colour}" cx="{x:.1f}" cy="{y}" r="8.5"/>')
            out.append(
                f'<text class="growth-number" x="{x:.1f}" y="{y + 4}" text-anchor="middle">{number}</text>'
            )
    return "".join(out)


def name_labels(
    ends: list[tuple[Series, float, float]], leaders: bool, right: float, top: float, bottom: float
) -> str:
    """Names in the right margin at the height of the lines' ends, moved apart where they would touch; of those in grey
    the ones without room are there to be shown with their line.
    """
    out, places = [], label_places([(s, y) for s, _, y in ends], 16, top + 4, bottom - 4)
    for (s, x, y), place in zip(ends, places, strict=True):
        at, spare = (y, " spare") if place is None else (place, "")
        path = (
            f"M{x + 5:.1f} {y:.1f}L{right + 9:.1f} {at:.1f}" if leaders else f"M{right + 6:.1f} {at:.1f}h16"
        )
        shift, style = (12, "leader") if leaders else (27, "line")
        out.append(
            f'<g class="arm{spare}" data-arm="{s.colour}">'
            f'<path class="{style} s{shade(s.colour)}"{dash(s)} d="{path}"/>'
            f'<text class="name f{shade(s.colour)}" x="{right + shift:.1f}" y="{at + 4.3:.1f}">'
            f"{escape(shortened(s.name))}</text></g>"
        )
    return "".join(out)


def dash(s: Series) -> str:
    dashes = DASHES[dashing(s.colour)]
    return f' stroke-dasharray="{dashes}"' if dashes else ""


def svg(chart: Chart, log: bool, narrow: bool, key: str) -> tuple[str, list[list[Any]]]:
    """The chart as inline SVG and its points as [x, y, series, index], in the same coordinates."""
    width, height = NARROW if narrow else WIDE
    (x0, x1), (y0, y1) = x_range(chart, log), y_range(chart, log)
    y_ticks = linear_ticks(y0, y1, 6)
    y_texts = tick_texts(y_ticks)
    named, leaders = len(chart.series) > 1 and not narrow, with_leaders(chart)
    label_width = max((text_width(shortened(s.name)) for s in chart.series), default=0) + 14 if named else 12
    label_width += 15 if named and not leaders else 0
    left, right = 14 + max(map(text_width, y_texts), default=0), width - label_width
    top, bottom = 26, height - 46
    span = math.log(x1 / x0) if log else x1 - x0

    def to_x(x: float) -> float:
        return left + (right - left) * ((math.log(x / x0) if log else x - x0) / span)

    def to_y(y: float) -> float:
        return bottom - (bottom - top) * (y - y0) / (y1 - y0)

    x_ticks = log_ticks(x0, x1) if log else linear_ticks(x0, x1, 4 if narrow else 6)
    out = [f'<text class="unit" x="2" y="13">{escape(chart.y_label)}</text>']
    for y, label in zip(y_ticks, y_texts, strict=True):
        out.append(
            f'<line class="grid" x1="{left:.1f}" x2="{right:.1f}" y1="{to_y(y):.1f}" y2="{to_y(y):.1f}"/>'
        )
        out.append(f'<text x="{left - 8:.1f}" y="{to_y(y) + 4.3:.1f}" text-anchor="end">{label}</text>')
    last_end = -math.inf
    for x, label in zip(x_ticks, tick_texts(x_ticks), strict=True):
        out.append(
            f'<line class="axis" x1="{to_x(x):.1f}" x2="{to_x(x):.1f}" y1="{bottom}" y2="{bottom + 5}"/>'
        )
        if to_x(x) - text_width(label) / 2 > last_end + 6:
            last_end = to_x(x) + text_width(label) / 2
            out.append(f'<text x="{to_x(x):.1f}" y="{bottom + 19}" text-anchor="middle">{label}</text>')
    out.append(f'<line class="axis" x1="{left:.1f}" x2="{right:.1f}" y1="{bottom}" y2="{bottom}"/>')
    middle = (left + right) / 2
    x_label = chart.x_label + (", log" if log else "")
    out.append(
        f'<text class="unit" x="{middle:.1f}" y="{height - 6}" text-anchor="middle">{escape(x_label)}</text>'
    )
    out.append(
        f'<clipPath id="{key}"><rect x="{left:.1f}" y="{top}" width="{right - left + 6:.1f}" '
        f'height="{bottom - top}"/></clipPath>'
    )
    points: list[list[Any]] = []
    ends: list[tuple[Series, float, float]] = []
    lines: list[list[tuple[float, float]]] = []
    for index, s in enumerate(chart.series):
        seen = [
            (to_x(x), to_y(y), i) for i, (x, y) in enumerate(zip(s.x, s.y, strict=True)) if x > 0 or not log
        ]
        if not seen:
            continue
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y, _ in seen)
        out.append(f'<g class="arm" data-arm="{s.colour}">')
        if s.low:
            edge = [(x, to_y(s.high[i])) for x, _, i in seen] + [(x, to_y(s.low[i])) for x, _, i in reversed(seen)]
            outline = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in edge) + "Z"
            out.append(f'<path class="spread f{shade(s.colour)}" d="{outline}" clip-path="url(#{key})"/>')
        out.append(f'<path class="line s{shade(s.colour)}"{dash(s)} d="{path}" clip-path="url(#{key})"/>')
        small, large = ("2", "2") if s.colour >= QUIET else ("3", "3.5")
        marks = [(x, y, small) for x, y, _ in seen[:-1] if chart.points] + [(*seen[-1][:2], large)]
        circles = (f'cx="{x:.1f}" cy="{y:.1f}" r="{r}"' for x, y, r in marks if y >= top)
        out += [f'<circle class="end f{shade(s.colour)}" {circle}/>' for circle in circles]
        out.append("</g>")
        ends.append((s, seen[-1][0], max(seen[-1][1], top)))
        points += [[round(x, 1), round(y, 1), index, i] for x, y, i in seen if top <= y <= bottom]
        lines.append([(x, y) for x, y, _ in seen])
    if named:
        out.append(name_labels(ends, leaders, right, top, bottom))
    out.append(event_marks(chart, to_x, lines, (left, top, right, bottom)))
    names = ", ".join(s.name for s in chart.series)
    label = escape(f"{chart.title}: {names}", quote=True)
    frame = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(out)}'
    return frame + '<circle class="cursor" r="6"/></svg>', points
