"""The report as one HTML page that needs no network: answer, numbers, charts, tables, recipes, provenance."""

from __future__ import annotations

import json
import textwrap
from importlib.resources import files
from typing import Any

from .charts import DARK, EVENTS_IN_WORDS, LIGHT, Chart, chart_of, colour_of, is_cut, shade, y_range
from .markup import e, name_of, prose
from .svg import svg
from .tables import arms_table, data_section, difference, growth_table, provenance, recipes, samples
from .units import bits_text, gap_text
from .verdict import by_rank, unmeasured

TOGGLE = '<label class="toggle" hidden><input type="checkbox" id="logx"> log x-axis</label>'


def top_charts(report: dict[str, Any]) -> list[Chart]:
    """Held-out bits per byte over FLOPs and over seconds, on one y-axis."""
    charts = [
        chart_of(
            report["arms"],
            "eval",
            "bits_per_byte",
            over,
            f"Held-out bits per byte over {title}",
            "bits per byte",
        )
        for over, title in (("flops", "training FLOPs"), ("seconds", "seconds"))
    ]
    lows, highs = zip(*(y_range(chart, False) for chart in charts), strict=True)
    for chart in charts:
        chart.shared_y = min(lows), max(highs)
    return charts


def training_charts(report: dict[str, Any]) -> list[Chart]:
    arms = report["arms"]
    loss = chart_of(arms, "train", "loss", "flops", "Training loss", "training loss, nats per token")
    rate = chart_of(arms, "train", "learning_rate", "flops", "Learning rate", "learning rate")
    rate.whole = True
    return [loss, rate]


def png_texts(report: dict[str, Any], charts: list[Chart]) -> tuple[str, str]:
    """The answer and the small print of the picture of these charts."""
    whole, lead = " ".join(report["answer"]), report["answer"][0]
    answer = (whole if len(whole) < 400 else lead).replace("**", "")
    cut = " The start of training runs out of the top." if any(map(is_cut, charts)) else ""
    if len(charts[0].events) > EVENTS_IN_WORDS:
        cut += " Dashed and numbered: growths; the page lists them."
    noise = "" if report["kind"] == "run" else " Noise: " + noise_text(report) + "."
    return answer, small_print(report, f"Held-out text, bits per byte; lower is better.{noise}{cut}")


def small_print(report: dict[str, Any], text: str) -> str:
    """At most three lines under the picture, the red notes first."""
    red = [item["text"] for item in report["status_warnings"] + report["warnings"] if item["level"] == "bad"]
    doubts = f"Red notes: {' '.join(red)} ".replace("**", "") if red else ""
    small = textwrap.wrap(doubts + text, 190)
    return "\n".join(small[:3] if len(small) <= 3 else [*small[:2], small[2][:180] + " …"])


def figure(chart: Chart, key: str) -> str:
    """A chart in four drawings (wide or narrow, linear or log), of which the style sheet shows one."""
    drawings = []
    for narrow in (False, True):
        for log in (False, True):
            drawing, points = svg(chart, log, narrow, f"{key}-{int(narrow)}{int(log)}")
            data = json.dumps(points, separators=(",", ":"))
            classes = f"{'narrow' if narrow else 'wide'} {'log' if log else 'linear'}"
            drawings.append(f'<div class="drawing {classes}" data-points="{data}">{drawing}</div>')
    notes = json.dumps([s.notes for s in chart.series], ensure_ascii=False, separators=(",", ":"))
    arms = [s.colour for s in chart.series]
    caption = ""
    if not chart.whole and is_cut(chart):
        what = f"What lies above {bits_text(y_range(chart, False)[1])}" if chart.points else "The start"
        caption = f'<p class="cut">{what} runs out of the top; with “log x-axis” all is shown.</p>'
    return (
        f'<figure data-notes="{e(notes)}" data-arms="{arms}"><h3>{e(chart.title)}</h3>{"".join(drawings)}'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def growth_key(chart: Chart) -> str:
    """What the numbers on the dashed lines stand for, where the growths are too many for words."""
    if len(chart.events) <= EVENTS_IN_WORDS:
        return ""
    items = "".join(f"<li><b>{e(v.lines[0])}</b> {e('; '.join(v.lines[1:]))}</li>" for v in chart.events)
    return f'<ol class="key">{items}</ol>'


def legend(report: dict[str, Any]) -> str:
    if report["kind"] == "run":
        return ""
    arms = report["arms"] if report.get("race") else by_rank(report["arms"])
    if report.get("foremost"):
        arms = sorted(arms, key=lambda arm: colour_of(report, arm))
    attributes = 'tabindex="0" role="button"'
    chips = (f'<li data-arm="{colour_of(report, a)}" {attributes}>{name_of(report, a)}</li>' for a in arms)
    return f'<ul class="legend{" many" if report.get("foremost") else ""}">{"".join(chips)}</ul>'


def noise_text(report: dict[str, Any]) -> str:
    noise, threshold = report["noise"], report["noise_threshold_bits_per_byte"]
    if threshold is None:
        return unmeasured(noise)
    deviation = gap_text(noise["standard_deviation_bits_per_byte"])
    runs = f" of {noise['runs']} runs" if noise.get("runs") else ""
    source = f", {noise['source']}" if noise.get("source") else ""
    return (
        f"standard deviation {deviation} bits per byte{runs}{source}; "
        f"gaps up to {gap_text(threshold)} are not told apart"
    )


def ranking(report: dict[str, Any]) -> str:
    """Final bits per byte of the finished arms on one axis, best first, with what the noise covers behind."""
    ranked = [arm for arm in by_rank(report["arms"]) if arm["rank"]]
    if report["kind"] == "run" or len(ranked) < 2:
        return ""
    best, worst = ranked[0]["bits_per_byte"], ranked[-1]["bits_per_byte"]
    threshold = report["noise_threshold_bits_per_byte"]
    reach = max(worst - best, (threshold or 0.0), 1e-3)

    def place(bits: float) -> float:
        return 3 + 94 * (bits - best) / reach

    band = "" if not threshold else f'<i class="band" style="width:{place(best + threshold):.2f}%"></i>'
    rows = []
    for arm in ranked:
        at, colour = place(arm["bits_per_byte"]), colour_of(report, arm)
        grown = ' <span class="tag">grown</span>' if arm["growth"] else ""
        track = (
            f'<span class="track">{band}<i class="bar f{shade(colour)}" style="left:3%;width:{at - 3:.2f}%"></i>'
            f'<i class="dot f{shade(colour)}" style="left:{at:.2f}%"></i></span>'
        )
        rows.append(
            f'<li data-arm="{colour}"><span class="who">{name_of(report, arm)}{grown}</span>{track}'
            f'<span class="bits">{bits_text(arm["bits_per_byte"])}</span>'
            f'<span class="gap">{difference(arm)}</span></li>'
        )
    band_note = " The band is what the noise covers." if threshold else ""
    return (
        f'<h2>Final bits per byte, held-out text</h2><ol class="ranking">{"".join(rows)}</ol>'
        f'<p class="small">Lower is better; the bar is the distance to the best.{band_note} '
        f"Noise: {e(noise_text(report))}.</p>"
    )


def notes(items: list[dict[str, str]]) -> str:
    return "".join(
        f'<p class="note {item["level"]}" role="status">{prose(item["text"])}</p>' for item in items
    )


def style() -> str:
    def palette(colours: tuple[str, ...]) -> str:
        return "".join(f"--s{i}:{colour};" for i, colour in enumerate(colours))

    each = "".join(
        f".s{i}{{stroke:var(--s{i})}}.f{i}{{fill:var(--s{i});--own:var(--s{i})}}" for i in range(len(LIGHT))
    )
    dark = f"@media (prefers-color-scheme:dark){{:root{{{palette(DARK)}}}}}"
    return f":root{{{palette(LIGHT)}}}{dark}{each}" + files(__package__).joinpath("page.css").read_text(
        "utf-8"
    )


def page(report: dict[str, Any], top: list[Chart]) -> str:
    """The whole page, `top` its first charts. It names no address, so it reads the same from a disk or a server."""
    charts = "".join(figure(chart, f"top{i}") for i, chart in enumerate(top))
    training = "".join(figure(chart, f"train{i}") for i, chart in enumerate(training_charts(report)))
    plural = "Arms" if report["kind"] == "race" else "Run"
    body = (
        f"{head(report)}{ranking(report)}"
        f'<div class="bar-top"><h2>Along the way</h2>{TOGGLE}</div>'
        f'{legend(report)}<div class="charts">{charts}</div>'
        f"{growth_key(top[0])}"
        f"<details><summary>Training loss and learning rate</summary>"
        f'<div class="charts">{training}</div></details>'
        f"<h2>{plural}</h2>{arms_table(report)}{growth_table(report)}{samples(report)}{recipes(report)}"
        f"{data_section(report)}{provenance(report)}"
    )
    return document(report, body)


def head(report: dict[str, Any]) -> str:
    """The answer first, what to doubt about it, and its figures as tiles."""
    lead, *rest = report["answer"]
    short = f'<p class="conclusion">{e(report["conclusion"])}</p>' if report.get("conclusion") else ""
    about = f'<p class="about">{e(report["description"])}</p>' if report["description"] else ""
    tiles = "".join(
        f'<div class="tile"><dt>{e(t["label"])}</dt>'
        f"<dd>{e(t['text'])}<small>{e(t['note'])}</small></dd></div>"
        for t in report["headline"]
    )
    return (
        f'<header><p class="kind">tokenformer {report["kind"]}</p><h1>{e(report["name"])}</h1>'
        f'{notes(report["status_warnings"])}{short}<p class="answer">{prose(lead)}</p>'
        f"{''.join(f'<p class=answer2>{prose(s)}</p>' for s in rest)}{about}"
        f"{notes(report['warnings'])}</header>"
        f'<dl class="tiles">{tiles}</dl>'
    )


def document(report: dict[str, Any], body: str) -> str:
    """A body inside the frame that all pages share: style, script, and a policy that forbids the network."""
    script = files(__package__).joinpath("page.js").read_text("utf-8")
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{e(report['name'])}</title><style>{style()}</style></head>"
        f'<body><main>{body}</main><div id="tip" hidden></div><script>{script}</script></body></html>\n'
    )
