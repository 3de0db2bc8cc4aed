"""Bits per byte against a size: the numbers as JSON, and beside them a curve as PNG, drawn without a display."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .runs import write_json

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
Line = Sequence[tuple[float, float, str]]  # x, bits per byte, label


def write_curve(file: Path, numbers: Any, lines: Mapping[str, Line], x_label: str, title: str) -> None:
    """`numbers` into `file`, and `lines`, at most four, by their names as PNG on a logarithmic x into the file of that
    name with .png at the end: both whole, or on an error neither."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for (name, points), colour in zip(lines.items(), COLOURS, strict=False):
        xs, ys, style = [x for x, _, _ in points], [y for _, y, _ in points], "o-" if len(points) > 1 else "o"
        axes.plot(xs, ys, style, color=colour, linewidth=1.6, label=name)
        for x, y, label in points:
            axes.annotate(label, (x, y), (4, 5), textcoords="offset points", size=8, color="#333333")
    axes.set_xscale("log")
    axes.margins(x=0.1, y=0.1)  # room for the labels
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.set_xlabel(x_label)
    axes.set_ylabel("bits per byte")
    axes.set_title(title, loc="left", size=11)
    axes.grid(color="#dddddd", linewidth=0.6)
    if len(lines) > 1:
        axes.legend(frameon=False, fontsize=9)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    picture = file.with_suffix(".png")
    temporary = picture.with_name(f".{picture.name}.tmp-{os.getpid()}")
    try:
        try:
            temporary.write_bytes(drawn.getvalue())
        except OSError as error:  # which names the temporary file, or none
            raise OSError(error.errno, error.strerror, str(picture)) from error
        write_json(file, numbers)
        os.replace(temporary, picture)
    finally:
        temporary.unlink(missing_ok=True)
