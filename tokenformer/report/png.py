"""The picture for a README: the first two charts side by side under the answer, drawn without a display."""

from __future__ import annotations

import textwrap
import warnings
from pathlib import Path
from typing import Any

from .charts import (
    EVENTS_IN_WORDS,
    LIGHT,
    QUIET,
    Chart,
    dashing,
    label_place,
    label_places,
    last_x_within,
    shade,
    shortened,
    with_leaders,
    x_range,
    y_range,
)
from .units import linear_ticks, printable, tick_texts


def write_png(report: dict[str, Any], charts: list[Chart], title: str, note: str, path: Path) -> None:
    """The first two charts side by side under the answer, for a README; drawn without a display."""
    from matplotlib import rc_context

    with rc_context({"text.parse_math": False}), warnings.catch_warnings():  # a $ in a name is a $
        warnings.filterwarnings("ignore", "Glyph")  # a box stands for what the font lacks
        draw_figure(report, charts, title, note, path)


def draw_figure(report: dict[str, Any], charts: list[Chart], title: str, note: str, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.6, 5.6), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    lines = textwrap.wrap(title, 145, max_lines=5, placeholder=" …")
    figure.text(0.012, 0.955, printable(report["name"]), size=16, weight="bold", color="#1a1a1a", va="center")
    figure.text(0.012, 0.915, "\n".join(lines), size=11, color="#333333", va="top", linespacing=1.35)
    figure.text(0.012, 0.018, note, size=8.5, color="#666666", va="bottom", linespacing=1.3)
    top = 0.80 - 0.042 * max(0, len(lines) - 1)
    bottom = 0.16 + 0.032 * note.count("\n")
    for place, chart in enumerate(charts):
        axes = figure.add_axes((0.045 + 0.485 * place, bottom, 0.31, top - bottom))
        draw_axes(axes, chart)
    figure.savefig(path, format="png", metadata={"Software": None})


def draw_axes(axes: Any, chart: Chart) -> None:
    from matplotlib.patheffects import withStroke

    (x0, x1), (y0, y1) = x_range(chart, False), y_range(chart, False)
    axes.set_xlim(x0, x1 * 1.005)
    axes.set_ylim(y0, y1)
    axes.set_xticks(linear_ticks(x0, x1, 6), tick_texts(linear_ticks(x0, x1, 6)))
    axes.set_yticks(linear_ticks(y0, y1, 6), tick_texts(linear_ticks(y0, y1, 6)))
    axes.tick_params(length=3, color="#999999", labelcolor="#555555", labelsize=9.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#999999")
    axes.set_xlabel(chart.x_label, size=10, color="#555555")
    axes.set_title(chart.y_label, size=10, color="#555555", loc="left", pad=9)
    drawn, styles = [s for s in chart.series if s.x], ("-", (0, (5, 3)), (0, (1, 2)))
    for s in drawn:
        colour, quiet = LIGHT[shade(s.colour)], s.colour >= QUIET
        if s.low:
            axes.fill_between(s.x, s.low, s.high, color=colour, alpha=0.12, linewidth=0, zorder=2)
        marks = [(x, y) for x, y in zip(s.x, s.y, strict=True) if y <= y1]
        if chart.points and marks:
            x, y = zip(*marks, strict=True)
            axes.plot(x, y, "o", color=colour, markersize=2 if quiet else 3.5, zorder=3, clip_on=False)
        width = 0.9 if quiet else 1.9
        axes.plot(s.x, s.y, color=colour, linestyle=styles[dashing(s.colour)], linewidth=width, zorder=3)
        if s.y[-1] <= y1:
            size = 2 if quiet else 4.5
            axes.plot(s.x[-1:], s.y[-1:], "o", color=colour, markersize=size, zorder=3 if quiet else 4, clip_on=False)
    heights = [min((s.y[-1] - y0) / (y1 - y0), 1.0) for s in drawn]
    places = label_places(list(zip(drawn, heights, strict=True)), 0.058, 0.0, 1.0)
    for s, height, at in zip(drawn, heights, places, strict=True) if len(chart.series) > 1 else ():
        if at is None:
            continue
        colour = LIGHT[shade(s.colour)]
        end = (s.x[-1] - x0) / (x1 * 1.005 - x0) + 0.012, height
        look: dict[str, Any]
        if with_leaders(chart):
            tie, look = ((end[0], 1.035), (end[1], at)), {"linewidth": 0.7, "alpha": 0.55}
        else:
            tie, look = ((1.025, 1.07), (at, at)), {"linewidth": 1.9, "linestyle": styles[dashing(s.colour)]}
        axes.plot(*tie, color=colour, clip_on=False, transform=axes.transAxes, **look)
        axes.text(
            tie[0][1] + 0.012,
            at,
            shortened(s.name),
            color="#666666" if s.colour >= QUIET else colour,
            size=10,
            va="center",
            transform=axes.transAxes,
        )
    lines = [
        [((x - x0) / (x1 - x0), (y - y0) / (y1 - y0)) for x, y in zip(s.x, s.y, strict=True)] for s in drawn
    ]
    for event in chart.events:
        colour, at = LIGHT[shade(event.colour)], (event.x - x0) / (x1 * 1.005 - x0)
        axes.axvline(event.x, color=colour, linewidth=1, linestyle=(0, (4, 3)), zorder=2)
        words = len(chart.events) <= EVENTS_IN_WORDS
        top = 0.985 - ((event.number - 1) * 0.2 if words else (event.number - 1) % 4 * 0.06)
        clear = last_x_within(lines, top - 0.17, top + 0.02) if words else at
        start, ends = label_place(at, 0.42 if words else 0.03, clear, 1.0, 0.012)
        if start > at + 0.02:
            tie_y = top - 0.022
            axes.plot(
                (at, start - 0.006), (tie_y, tie_y), color=colour, linewidth=0.7, transform=axes.transAxes
            )
        for row, text in enumerate(event.lines[1:] if words else [str(event.number)]):
            axes.text(
                start,
                top - 0.053 * row,
                text,
                size=9,
                va="top",
                ha="right" if ends else "left",
                zorder=5,
                color="#333333" if row else colour,
                weight="normal" if row else "bold",
                transform=axes.transAxes,
                path_effects=[withStroke(linewidth=3, foreground="white")],
            )
