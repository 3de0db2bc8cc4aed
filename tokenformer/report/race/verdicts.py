"""The verdicts of a full race as tables: arm by arm, FLOPs to a loss, sunk costs, sizes, noise, growths, checks."""

from __future__ import annotations

from typing import Any

from ...statistics import mean_sd
from ..markup import e, name_of, table
from ..units import MISSING, bits_text, count_text, flops_text, gap_text, small_text
from .words import pair_of, ratio_text, share_text, signed

CLASSES = {"better": "better", "faster": "better", "worse": "worse", "slower": "worse"}
SIGNS = {"better": "▲", "worse": "▼"}  # so that a page printed in grey says the same


def named(report: dict[str, Any], name: str) -> str:
    return name_of(report, next(arm for arm in report["arms"] if arm["name"] == name))


def budget_name(report: dict[str, Any], budget: dict[str, Any]) -> str:
    """ "3.00 TFLOP (25 % of the budget)"."""
    return f"{flops_text(budget['flops'])} ({share_text(report, budget)})"


def verdict_cell(word: str, detail: str, small: str = "") -> str:
    """A coloured cell that reads without its colour: sign, word, numbers."""
    look = CLASSES.get(word, "same")
    sign = f"{SIGNS[look]} " if look in SIGNS else ""
    small = f"<small>{small}</small>" if small else ""
    return f'<span class="verdict {look}">{sign}{e(word)}<br><b>{detail}</b>{small}</span>'


def matrix(report: dict[str, Any], budget: dict[str, Any]) -> str:
    """Each arm (row) against each other (column), best first; the row's loss less the column's."""
    cells = sorted((c for c in budget["arms"] if c["mean"] is not None), key=lambda c: c["mean"])
    if len(cells) < 2:
        return '<p class="small">Fewer than two arms have results here.</p>'
    rows = []
    for row in cells:
        out = [f'{named(report, row["arm"])}<span class="about">{bits_text(row["mean"])}</span>']
        for column in cells:
            pair = None if row is column else pair_of(budget, row["arm"], column["arm"])
            if pair is None:
                out.append("" if row is column else "not compared")
                continue
            half = "" if pair["low"] is None else f" ±{gap_text((pair['high'] - pair['low']) / 2)}"
            own = "" if pair["own_low"] is None else f"own {signed(pair['own_low'])} to {signed(pair['own_high'])}"
            out.append(verdict_cell(pair["word"], signed(pair["value"]) + half, own))
        rows.append(out)
    pairs = len(budget["pairs"])
    spread = "".join(f"s = {gap_text(s)} of {of}, with {df:.3g} degrees of freedom. " for of, s, df in noise(budget))
    text = "the final text" if budget["measure"] == "final_bits_per_byte" else "the held-out text"
    note = (
        f'<p class="small">The row’s bits per byte less the column’s, on {text}, ± the pooled 95 % interval; beneath '
        f"it the interval of the pair’s own differences. {spread}{pairs} pairs compared, {budget['told_apart']} told "
        f"apart; chance alone would tell about {budget['expected_false_alarms']:.1f} apart.</p>"
    )
    head = ["", *(named(report, c["arm"]) for c in cells)]
    return table(head, rows, "matrix") + note


def noise(budget: dict[str, Any]) -> list[tuple[str, float, float]]:
    """What the pooled deviations of a budget are of, each with its degrees of freedom (rule 20)."""
    found = [("arms of different starts", budget["s"], budget["df"])]
    found.append(("arms that start as the same model", budget["s_same"], budget["df_same"]))
    return [each for each in found if each[1] is not None]


def verdict_section(report: dict[str, Any]) -> str:
    """The matrix of the largest budget that has one, the others folded away."""
    *others, last = report["budgets"]
    out = [f"<h2>Verdicts</h2><h3>At {budget_name(report, last)}</h3>{matrix(report, last)}"]
    for budget in reversed(others):
        title = f"<summary>Verdicts at {budget_name(report, budget)}</summary>"
        out.append(f"<details>{title}<div>{matrix(report, budget)}</div></details>")
    return "".join(out)


def reach_section(report: dict[str, Any]) -> str:
    thresholds = [t for t in report["reach"] if t["loss"] is not None]
    if not thresholds:
        return ""
    reference, rows = report["race"]["reference"], []
    for arm in report["arms"]:
        if arm["name"] == reference:
            continue
        row = [name_of(report, arm)]
        for t in thresholds:
            ratio = t["ratios"][arm["name"]]
            own = ratio["own_low"] is not None and ratio["low"] is not None
            small = f"own {ratio['own_low']:.2f} to {ratio['own_high']:.2f}" if own else ""
            row.append(verdict_cell(ratio["word"], e(ratio_text(ratio)), small))
        rows.append(row)
    head = ["arm", *(f"to {bits_text(t['loss'])}<br>({flops_text(t['flops'])} of the reference)" for t in thresholds)]
    note = (
        f'<p class="small">FLOPs of the arm over those of <b>{e(reference)}</b>, ancestors included, to reach the loss '
        "that it has at each budget, seed by seed. Below 1 is fewer. Nothing is extrapolated beyond the budgets.</p>"
    )
    return f"<h2>FLOPs to reach a loss</h2>{note}{table(head, rows, 'matrix')}"


def sunk_section(report: dict[str, Any]) -> str:
    if not report["sunk"]:
        return ""
    rows = [
        [
            named(report, s["arm"]),
            flops_text(report["race"]["flops"] * s["share"] / report["race"]["budgets"][-1]),
            flops_text(s["flops"]),
            e(ratio_text(s)),
            str(s["seeds"]),
        ]
        for s in report["sunk"]
    ]
    head = ["arm", "budget", "FLOPs after the last growth", "of the reference’s to the same loss", "seeds"]
    note = (
        '<p class="small"><b>Not a comparison of equal budgets.</b> For one who already owns the model before its last '
        "growth, all that came before is paid. Verdicts never rest on this view.</p>"
    )
    return f"<h2>Sunk-cost view</h2>{note}{table(head, rows, '', (1, 2, 3, 4))}"


def optimal_section(report: dict[str, Any]) -> str:
    rows = []
    for budget in report["budgets"]:
        for best in budget["compute_optimal"]:
            edge = f"not bracketed: the {best['edge']} of {best['sizes']}" if best["edge"] else f"of {best['sizes']}"
            bracket = f'<span class="tag warn">{edge}</span>' if best["edge"] else f"bracketed, {edge}"
            row = [flops_text(budget["flops"]), e(best["architecture"]), named(report, best["arm"])]
            rows.append([*row, count_text(best["parameters"]), bits_text(best["loss"]), bracket])
    if not rows:
        return ""
    head = ["budget", "architecture", "lowest mean", "parameters", "bits per byte", "is it the optimum?"]
    return "<h2>Compute-optimal size, found among those from scratch</h2>" + table(head, rows, "", (0, 3, 4))


def growth_section(report: dict[str, Any]) -> str:
    """Every growth of the whole-budget runs: what grew, the rise of the loss after it, and what made it good."""
    rows = []
    for arm in report["arms"]:
        runs = [run for run in arm["runs"] if run["share"] == arm["runs"][-1]["share"] and run["growth"]]
        for i in range(max((len(run["growth"]) for run in runs), default=0)):
            events = [run["growth"][i] for run in runs if i < len(run["growth"])]
            event = events[0]
            axes = "<br>".join(f"{e(k)} {e(event['from'].get(k, '?'))} → {e(v)}" for k, v in event["to"].items())
            rises = [v["rise"] for v in events if v.get("rise") is not None]
            recovered = [v["recovery_flops"] for v in events if v.get("recovery_flops") is not None]
            back = flops_text(mean_sd(recovered)[0]) if len(recovered) == len(events) else ""
            missing = f"{len(recovered)} of {len(events)} seeds got back"
            moved = [v["max_logit_change"] for v in events]
            rows.append(
                [
                    name_of(report, arm),
                    f"{e(event['operator'])}<br>{e(event['promise'])}",
                    axes,
                    f"{count_text(event['parameters_before'])} → {count_text(event['parameters_after'])}",
                    flops_text(mean_sd([v["flops"] for v in events])[0]),
                    flops_text(mean_sd([v.get("growth_flops", 0) for v in events])[0]),
                    small_text(None if None in moved else max(moved)),
                    signed(mean_sd(rises)[0] or 0.0) if rises else MISSING,
                    back or e(missing),
                ]
            )
    if not rows:
        return ""
    head = [
        "arm",
        "operator",
        "axes",
        "parameters",
        "at FLOPs",
        "FLOPs of the growth itself",
        "largest change of a logit",
    ]
    note = '<p class="small">Means over seeds of the whole-budget runs, as fine as their evaluations are.</p>'
    more = ["rise of held-out loss", "FLOPs until made good"]
    return f"<h2>Growths, and what they cost on the way</h2>{table(head + more, rows, '', (3, 4, 5, 6, 7, 8))}{note}"


def noise_section(report: dict[str, Any]) -> str:
    rows = []
    for copy in report["copies"]:
        budget = next(b for b in report["budgets"] if b["share"] == copy["share"])
        pair = pair_of(budget, copy["copy"], copy["original"])
        verdict = verdict_cell(pair["word"], signed(pair["value"])) if pair else MISSING
        apart = ", ".join(signed(d) for d in copy["differences"])
        row = [budget_name(report, budget), named(report, copy["copy"]), e(copy["original"]), apart or MISSING]
        rows.append([*row, MISSING if copy["s"] is None else gap_text(copy["s"]), verdict])
    pooled = [
        [budget_name(report, b), what, gap_text(s), f"{df:.3g}"] for b in report["budgets"] for what, s, df in noise(b)
    ]
    out = ["<h2>Noise</h2>"]
    if pooled:
        text = "Standard deviation of one run in a difference of two arms. Arms that start as the same model share "
        text += "what a seed’s initial weights do, and differ by less."
        out.append(f'<p class="small">{text}</p>')
        out.append(table(["budget", "of", "pooled s", "degrees of freedom"], pooled, "", (2, 3)))
    if rows:
        text = "A copy is the same arm with other initial weights on the same text; what lies between is noise."
        head = ["budget", "copy", "of", "differences, seed by seed", "s of one run", "verdict"]
        out.append(f'<p class="small">{text}</p>{table(head, rows, "", (4,))}')
    return "".join(out) if len(out) > 1 else ""


def law_section(report: dict[str, Any]) -> str:
    laws = {name: law for name, law in report["power_laws"].items()}
    fitted = {name: law for name, law in laws.items() if not law["reason"]}
    if not fitted:
        reasons = sorted({law["reason"] for law in laws.values()})
        return f'<h2>Power law</h2><p class="small">None: {e("; ".join(reasons))}.</p>'
    rows = []
    for name, law in fitted.items():
        cells = [named(report, name)]
        for key in ("E", "A", "alpha"):
            (low, high), show = law["intervals"][key], small_text if key == "A" else bits_text
            cells.append(f"{show(law[key])} <span class=about>{show(low)} to {show(high)}</span>")
        rows.append([*cells, str(law["points"]), str(law["seeds"])])
    note = (
        '<p class="small">L = E + A C<sup>−α</sup>; intervals from a bootstrap over seeds, which few seeds make too '
        "short. Two laws differ only where their intervals lie apart.</p>"
    )
    head = ["arm", "E", "A", "α", "points", "seeds"]
    return "<h2>Power law</h2>" + table(head, rows, "", (4, 5)) + note


def cosine_section(report: dict[str, Any]) -> str:
    if not report["cosine"]:
        return ""
    rows = []
    for row in report["cosine"]:
        known = row["cosine"] is not None and row["wsd"] is not None
        apart = signed(row["cosine"] - row["wsd"]) if known else e(row["status"])
        cells = [named(report, row["arm"]), str(row["seed"]), bits_text(row["wsd"]), bits_text(row["cosine"])]
        rows.append([*cells, apart])
    head = ["arm", "seed", "warm-up, stable, decay", "cosine", "difference"]
    note = '<p class="small">A check of the schedule on one seed; no verdict rests on it.</p>'
    return f"<h2>Cosine check</h2>{note}{table(head, rows, '', (1, 2, 3, 4))}"
