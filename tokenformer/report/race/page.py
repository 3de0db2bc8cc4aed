"""A full race as one page: answer, results over FLOPs and seconds, verdicts, arms, trials, what would change it."""

from __future__ import annotations

import re
from typing import Any

from ..charts import Chart, is_cut
from ..markup import e, prose, table
from ..page import TOGGLE, document, figure, growth_key, head, legend, small_print
from ..tables import data_texts, provenance
from ..units import count_text, low_to_high
from .charts import top_charts, training_chart
from .doubts import LZMA_SHARE, OVERLAP, OVERLAPS
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

MOST_TOLD = 680  # letters of the answer that a picture has room for


def png_texts(report: dict[str, Any], charts: list[Chart]) -> tuple[str, str]:
    """The answer and the small print of the picture of these charts."""
    bare = [re.sub(r" \(the [^)]*\)", "", said).replace("**", "") for said in report["answer"]]
    bare = [report["conclusion"], *bare] if report["conclusion"] else bare
    while len(bare) > 1 and sum(map(len, bare)) > MOST_TOLD:
        bare.pop()
    told = " ".join(bare)
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
        band += " In colour: the reference, the best arm of the answer, its controls, and of those that are better as "
        band += "many as colours reach; grey: the others. Pointing at a name or a line brings it forward, and a click "
        band += "on a name keeps it there."
    body = (
        f"{head(report)}{standing_section(report)}"
        f'<div class="bar-top"><h2>Results at each budget</h2>{TOGGLE}</div>'
        f'{legend(report)}<div class="charts">{results}</div><p class="small">{band}</p>'
        f"{own_section(report)}{verdict_section(report)}{changes_section(report)}{scope_section(report)}"
        f"{reach_section(report)}{arms_section(report)}"
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


def scope_section(report: dict[str, Any]) -> str:
    """What no number of the race speaks of: other scales, texts and schedules."""
    totals = [arm["parameters_end"]["total"] for arm in report["arms"] if arm["parameters_end"].get("total")]
    per = [cell["tokens_per_parameter"] for cell in report["budgets"][-1]["arms"] if cell["tokens_per_parameter"]]
    data = next((arm["recipe"]["data"] for arm in report["arms"] if arm["recipe"].get("data")), None)
    said = []
    if totals:
        tokens = f" with {low_to_high(per, '{:.1f}'.format)} tokens a parameter" if per else ""
        said.append(
            f"Another scale: these are models of {low_to_high(totals, count_text)} parameters{tokens}, and what holds "
            "there need not hold of larger ones or of longer training."
        )
    if data:
        said.append(f"Another text: this is {e(data['source'])}, read in windows of {data['sequence_length']} tokens.")
    if all(row["cosine"] is None for row in report["cosine"]):
        said.append("Another schedule of the learning rate: no arm was run with cosine.")
    items = "".join(f"<li>{text}</li>" for text in said)
    return f'<h2>What this race does not speak of</h2><ul class="changes">{items}</ul>'


def checks_section(report: dict[str, Any]) -> str:
    """What was measured of the texts before the race, what each is held to, and the final text's name and hash."""
    limit = f"above {OVERLAP:.0%} it is red on this page"
    rows = [
        [f"{what[0].upper()}{what[1:]} that also occurs in the {where}", f"{100 * share:.2g} % of it", limit]
        for check, what, where in OVERLAPS
        if (share := report["checks"].get(check)) is not None
    ]
    if floor := report["checks"].get("lzma_bits_per_byte"):
        held_to = f"a result below {LZMA_SHARE * floor:.2f} is red on this page"
        rows.append(["LZMA on the held-out text", f"{floor:.2f} bits per byte", held_to])
    runs = [run for arm in report["arms"] for run in (*arm["runs"], *arm["trials"], *arm["cosine"])]
    if most := max((run["epochs"] for run in runs if run.get("epochs")), default=None):
        rows.append(["Training text read, at most", f"{100 * most:.3g} %", "no token is seen twice, or it is red"])
    if report["budgets"][-1]["measure"] == "final_bits_per_byte":
        hashes = sorted({run["final_sha256"] for run in runs if run.get("final_sha256")})
        name = f"{e(str(report['race'].get('final_text')))}<br><small>{'<br>'.join(map(e, hashes))}</small>"
        rows.append(["Final text", name, "verdicts rest on it, and nothing of a run is chosen by it"])
    if started := report["environment"].get("started"):
        commit = f"<br><small>{e(str(report['environment'].get('commit')))}</small>"
        held_to = "no run had begun; the race has refused another recipe since (rule 25)"
        rows.append(["Recipe and seeds", f"kept since {e(started)}{commit}", held_to])
    return f"<h2>Checks</h2>{table(['', 'found', 'held to'], rows)}" if rows else ""
