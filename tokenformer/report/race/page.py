"""A full race as one page: answer, results over FLOPs and seconds, verdicts, arms, trials, what would change it."""

from __future__ import annotations

import re
from typing import Any

from ..charts import Chart, is_cut
from ..markup import pairs, prose
from ..page import TOGGLE, document, figure, growth_key, head, legend, small_print
from ..tables import data_texts, provenance
from .charts import top_charts, training_chart
from .tables import arms_section, growth_section, hyperparameters, trials_section
from .verdicts import (
    cosine_section,
    law_section,
    noise_section,
    optimal_section,
    own_section,
    reach_section,
    standing_section,
    sunk_section,
    verdict_section,
)

__all__ = ["page", "png_texts", "top_charts"]


def png_texts(report: dict[str, Any], charts: list[Chart]) -> tuple[str, str]:
    """The answer and the small print of the picture of these charts."""
    bare = [re.sub(r" \(the [^)]*\)", "", said).replace("**", "") for said in report["answer"]]
    told = " ".join(bare) if sum(map(len, bare)) < 430 else bare[0]
    text = "Fully decayed results, bits per byte, lower is better: means over seeds, bands of one standard deviation."
    text += " What is far behind runs out of the top." if any(map(is_cut, charts)) else ""
    text += " Grey: the other arms." if report["foremost"] else ""
    return told, small_print(report, text)


def page(report: dict[str, Any], top: list[Chart]) -> str:
    """The whole page, `top` its first charts, in the frame of every page of this package."""
    results = "".join(figure(chart, f"top{i}") for i, chart in enumerate(top))
    training = training_chart(report)
    band = "Each mark is a run that decayed fully at that budget, mean over seeds; the band is one standard deviation."
    if report["foremost"]:
        band += " In colour: the reference and what the answer speaks of; grey: the other arms. Pointing at a name or "
        band += "a line brings it forward, and a click on a name keeps it there."
    body = (
        f"{head(report)}{standing_section(report)}"
        f'<div class="bar-top"><h2>Results at each budget</h2>{TOGGLE}</div>'
        f'{legend(report)}<div class="charts">{results}</div><p class="small">{band}</p>'
        f"{own_section(report)}{verdict_section(report)}{changes_section(report)}{reach_section(report)}{arms_section(report)}"
        f"{optimal_section(report)}{growth_section(report)}{sunk_section(report)}"
        f'<h2>On the way</h2><div class="charts one">{figure(training, "way")}</div>{growth_key(training)}'
        '<p class="small">Runs of the whole budget: mean over seeds, the band from the lowest to the highest seed; '
        f"failed runs are left out.{' Dashed: growths.' if training.events else ''}</p>"
        f"{noise_section(report)}{law_section(report)}{cosine_section(report)}"
        f"{trials_section(report)}{hyperparameters(report)}{checks_section(report)}"
        f"{data_texts(report)}{provenance(report)}"
    )
    return document(report, body)


def changes_section(report: dict[str, Any]) -> str:
    items = "".join(f"<li>{prose(text)}</li>" for text in report["changes"])
    return f'<h2>What would change the answer</h2><ul class="changes">{items}</ul>'


def checks_section(report: dict[str, Any]) -> str:
    """What was measured before the race: leaks, and how predictable the text is."""
    checks = {key: value for key, value in report["checks"].items() if value is not None}
    return f"<h2>Checks before the race</h2>{pairs(checks)}" if checks else ""
