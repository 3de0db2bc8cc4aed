"""Run and race folders, or the report.json of a race -> report.html, report.png and report.json. Never trains.

read.py reads the folders, verdict.py says what the numbers support, charts.py chooses what is drawn,
svg.py and png.py draw, page.py lays out. race/ does the first two and the last for a full race, whose race.json has a
"race" table (docs/fairness.md); the drawing is the same.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["read_report", "write_report"]


def read_report(folder: Path | str) -> dict[str, Any]:
    """Every number and sentence of the page for a run or race folder, as report.json holds it.

    Arms stand in the race's own order and carry their `rank` (1 = lowest bits per byte, None = not finished).
    Raises ValueError, one line naming the file, for a folder that is neither and for a broken piece.
    """
    from .race.read import is_full_race, read_full_race
    from .read import read_folder
    from .verdict import judge

    folder = Path(folder)
    if is_full_race(folder):
        from .race.doubts import judge_race
        from .race.numbers import calculate

        return judge_race(calculate(read_full_race(folder)))
    return judge(read_folder(folder))


def redrawn(path: Path) -> dict[str, Any]:
    """The report of a full race from its report.json alone: numbers and words anew, its warnings as they were.

    Raises ValueError, one line, for a file that is no such report.
    """
    from .race.doubts import put_in_words
    from .race.numbers import calculate
    from .read import read_json

    stored = read_json(path)
    if not isinstance(stored.get("race"), dict):
        raise ValueError(f"{path}: not the report.json of a race by the rules, which alone can be drawn anew from it")
    try:
        for key in ("kind", "name", "description", "command", "environment", "checks", "warnings", "differing_keys"):
            stored[key]
        return put_in_words(calculate(stored))
    except (KeyError, TypeError, IndexError, AttributeError, StopIteration) as error:
        raise ValueError(f"{path}: not a whole report.json, or one of another version ({error!r})") from None


def write_report(folder: Path | str) -> dict[str, Path]:
    """Writes the page of a run or race into its folder; returns {"html", "png", "json"} -> path.

    A report.json of a full race does as well, and the page is written beside it. Each file appears whole or not at
    all; what a kill leaves has a name that a race removes as it goes on. Raises ValueError as `read_report` does, or
    where it cannot write.
    """
    from . import page as simple
    from .png import write_png
    from .race import page as full

    folder = Path(folder)
    report = redrawn(folder) if folder.is_file() else read_report(folder)
    folder = folder.parent if folder.is_file() else folder
    layout = full if report.get("race") else simple
    paths = {kind: folder / f"report.{kind}" for kind in ("html", "png", "json")}
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".report.tmp-") as staging:
            made = {kind: Path(staging) / path.name for kind, path in paths.items()}
            made["json"].write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
            charts = layout.top_charts(report)
            made["html"].write_text(layout.page(report, charts), encoding="utf-8", errors="replace")
            title, note = layout.png_texts(report, charts)
            write_png(report, charts, title, note, made["png"])
            for kind, path in paths.items():
                os.replace(made[kind], path)
    except OSError as error:
        raise ValueError(f"{folder}: the report cannot be written here ({error.strerror})") from None
    return paths
