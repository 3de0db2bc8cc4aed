"""A curve as a picture: bits per byte against a size, drawn without a display."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

COLOURS = ("#0072B2", "#D55E00")


def write_curve(
    picture: Path, lines: Mapping[str, Sequence[tuple[float, float, str]]], x_label: str, title: str
) -> None:
    """Lines of points (x, bits per byte, label) on a logarithmic x, as PNG, whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for (name, points), colour in zip(lines.items(), COLOURS, strict=False):
        axes.plot(
            [x for x, _, _ in points], [y for _, y, _ in points], color=colour, marker="o", linewidth=1.6, label=name
        )
        for x, y, label in points:
            axes.annotate(label, (x, y), (4, 5), textcoords="offset points", size=8, color="#333333")
    axes.set_xscale("log")
    axes.set_xlabel(x_label)
    axes.set_ylabel("bits per byte")
    axes.set_title(title, loc="left", size=11)
    axes.grid(color="#dddddd", linewidth=0.6)
    if len(lines) > 1:
        axes.legend(frameon=False)
    temporary = picture.with_name(f".{picture.name}.tmp-{os.getpid()}")
    try:
        figure.savefig(temporary, format="png")
        os.replace(temporary, picture)
    finally:
        temporary.unlink(missing_ok=True)
