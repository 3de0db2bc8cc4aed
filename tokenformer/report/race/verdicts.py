"""The verdicts of a full race as tables: arm by arm, FLOPs to a loss, sunk costs, sizes, noise, checks."""

from __future__ import annotations

from typing import Any

from ...statistics import false_alarms
from ..charts import colour_of, shade
from ..markup import e, name_of, table
from ..units import MISSING, bits_text, count_text, flops_text, gap_text, signed, small_text
from .controls import best_of_sizes, pair_of, sizes_beside
from .numbers import cell_of
from .words import (
    BY_ITS_LOSS,
    NOT_POOLED,
    answered,
    count_seeds,
    edge_text,
    growth_state,
    listed,
    of_own_seeds,
    own_rows,
    ratio_text,
    share_text,
    times,
)

CLASSES = {"better": "better", "faster": "better", "worse": "worse", "slower": "worse"}
SIGNS = {"better": "▲", "worse": "▼"}  # so that a page printed in grey says the same
FAR = 4  # times as far off as the arm in the middle: such stand at the end of the axis, with their figure
OWN = {
    "scratch": "its target size from scratch",
    "small": "its small size, trained longer",
    "dropped": "itself, the optimizer’s state dropped",
    "optimal": "the best of the sizes from scratch",
}


def named(report: dict[str, Any], name: str) -> str:
    return name_of(report, next(arm for arm in report["arms"] if arm["name"] == name))


def about(text: str) -> str:
    return f'<span class="about">{text}</span>'


def budget_name(report: dict[str, Any], budget: dict[str, Any]) -> str:
    """ "3.00 TFLOP (25 % of the budget)"."""
    return f"{flops_text(budget['flops'])} ({share_text(report, budget)})"


def verdict_cell(word: str, detail: str, *small: str) -> str:
    """A coloured cell that reads without its colour: sign, word, numbers, and in small what else belongs to them."""
    look = CLASSES.get(word, "same")
    sign = f"{SIGNS[look]} " if look in SIGNS else ""
    more = "".join(f"<small>{e(text)}</small>" for text in small if text)
    return f'<span class="verdict {look}">{sign}{e(word)}<br><b>{e(detail)}</b>{more}</span>'


def half_width(pair: dict[str, Any]) -> str:
    """ " ±0.026", of the pooled interval; nothing without one."""
    return "" if pair["low"] is None else f" ±{gap_text((pair['high'] - pair['low']) / 2)}"


def pair_cell(pair: dict[str, Any], about: str = "") -> str:
    """A difference with its pooled interval, and in small the pair's own and that over stretches of the text."""
    small = [
        f"{side} {signed(pair[f'{side}_low'])} to {signed(pair[f'{side}_high'])}"
        for side in ("own", "text")
        if pair.get(f"{side}_low") is not None
    ]
    return verdict_cell(pair["word"], signed(pair["value"]) + half_width(pair), *small, about)


def ratio_cell(ratio: dict[str, Any], state: str = "") -> str:
    """FLOPs to a loss with their pooled interval; where the word rests on the loss, that is said."""
    own = NOT_POOLED if of_own_seeds(ratio) else ""
    if not own and ratio["own_low"] is not None and ratio["low"] is not None:
        own = f"own {times(ratio['own_low'])} to {times(ratio['own_high'])}"
    return verdict_cell(ratio["word"], ratio_text(ratio), own, BY_ITS_LOSS if ratio["side"] else "", state)


def tagged(report: dict[str, Any], budget: dict[str, Any], arm: str) -> str:
    """The arm's name, and whether it has not grown yet at the budget."""
    state = growth_state(report, budget, arm)
    return named(report, arm) + (f' <span class="tag">{state}</span>' if state else "")


def matrix(report: dict[str, Any], budget: dict[str, Any]) -> str:
    """Each arm (row, best first) against each other (column); the row's loss less the column's.

    The reference and the controls are the first columns: they are what a screen shows without scrolling.
    """
    cells = sorted((c for c in budget["arms"] if c["mean"] is not None), key=lambda c: c["mean"])
    if len(cells) < 2:
        return '<p class="small">Fewer than two arms have results here.</p>'
    roles = {arm["name"]: arm["role"] for arm in report["arms"]}
    reference = report["race"]["reference"]
    columns = sorted((c["arm"] for c in cells), key=lambda name: (name != reference, roles[name] == "arm"))
    rows = []
    for row in cells:
        out = [f'{tagged(report, budget, row["arm"])}<span class="about">{bits_text(row["mean"])}</span>']
        for column in columns:
            pair = None if row["arm"] == column else pair_of(budget, row["arm"], column)
            out.append(pair_cell(pair) if pair else "" if row["arm"] == column else "not compared")
        rows.append(out)
    pairs = len(budget["pairs"])
    spread = "".join(f"s = {e(gap_text(s))} of {of}, with {df:.3g} degrees of freedom. " for of, s, df in noise(budget))
    text = "the final text" if budget["measure"] == "final_bits_per_byte" else "the held-out text"
    stretches = any(pair.get("text_low") is not None for pair in budget["pairs"])
    beneath = " (own), and (text) of their mean over seeds in stretches of the text, the seeds as they are"
    beneath = beneath if stretches else ""
    note = (
        f'<p class="small">The row’s bits per byte less the column’s, on {text}, ± the pooled 95 % interval; beneath '
        f"it the interval of the pair’s own differences{beneath}. {spread}{pairs} pairs compared, "
        f"{budget['told_apart']} told apart; chance alone would tell about {budget['expected_false_alarms']:.1f} "
        "apart.</p>"
    )
    return table(["", *(tagged(report, budget, name) for name in columns)], rows, "matrix") + note


def standing_section(report: dict[str, Any]) -> str:
    """Every arm's difference to the reference at the largest budget and its interval, on one axis, best first."""
    budget, reference = answered(report), report["race"]["reference"]
    arms = [(arm, pair_of(budget, arm["name"], reference) if budget else None) for arm in report["arms"]]
    compared = sorted(((arm, pair) for arm, pair in arms if pair), key=lambda found: found[1]["value"])
    if budget is None or not compared:
        return ""
    ends = [(pair["low"], pair["high"]) if pair["low"] is not None else (pair["value"],) * 2 for _, pair in compared]
    far = sorted(max(map(abs, each)) for each in ends)
    reach = max([end for end in far if end <= FAR * far[len(far) // 2]], default=0.0) or 1e-3
    left, right = (min(max(side, 0.05 * reach), reach) for side in (-min(ends)[0], max(high for _, high in ends)))

    def place(value: float) -> float:
        return 2 + 96 * (min(max(value, -left), right) + left) / (left + right)

    zero, rows = f'<i class="zero" style="left:{place(0):.2f}%"></i>', []
    itself = next(arm for arm, _ in arms if arm["name"] == reference)
    entries: list[tuple[Any, ...]] = [(0.0, itself, None, (0.0, 0.0))]
    entries += [(pair["value"], arm, pair, span) for (arm, pair), span in zip(compared, ends, strict=True)]
    for value, arm, pair, (low, high) in sorted(entries, key=lambda entry: entry[0]):
        look = f"f{shade(colour := colour_of(report, arm))}"
        span = f'<i class="bar {look}" style="left:{place(low):.2f}%;width:{place(high) - place(low):.2f}%"></i>'
        within = -left <= value <= right
        shape = "dot" if within else "beyond" if value > 0 else "beyond left"
        dot = f'<i class="{shape} {look}" style="left:{place(value):.2f}%"></i>'
        rows.append(
            f'<li data-arm="{colour}"><span class="who">{tagged(report, budget, arm["name"])}</span>'
            f'<span class="track">{zero}{span}{dot}</span>'
            f'<span class="bits">{bits_text(cell_of(budget, arm["name"])["mean"])}</span>'
            f'<span class="gap">{gap_words(pair)}</span></li>'
        )
    beyond = " An arrow: further off than the axis reaches." if any("beyond" in row for row in rows) else ""
    note = (
        f'<p class="small">Bits per byte less those of <b>{e(reference)}</b>, the line at zero, with the pooled 95 % '
        f"interval; the axis reaches from {signed(-left)} to {signed(right)}, left is better.{beyond}</p>"
    )
    title = f"<h2>Against {e(reference)} at {budget_name(report, budget)}</h2>"
    return f'{title}<ol class="ranking standing">{"".join(rows)}</ol>{note}'


def gap_words(pair: dict[str, Any] | None) -> str:
    """ "−0.036 ±0.026 ▲ better"; the reference itself has no pair."""
    if pair is None:
        return "the reference"
    sign = f"{SIGNS[pair['word']]} {pair['word']}" if pair["word"] in SIGNS else pair["word"]
    return f"<b>{signed(pair['value'])}</b>{half_width(pair)} {sign}"


def budget_at(report: dict[str, Any], share: float) -> dict[str, Any]:
    return next(budget for budget in report["budgets"] if budget["share"] == share)


def budgets_at(report: dict[str, Any], shares: set[float]) -> list[dict[str, Any]]:
    """The budgets of these shares, the largest first, as columns have them."""
    return [budget for budget in reversed(report["budgets"]) if budget["share"] in shares]


def own_section(report: dict[str, Any]) -> str:
    """Each growing arm against the controls that are its own, at each budget; gains over scratch compared."""
    out: list[str] = []
    for budget in reversed(report["budgets"]):
        rows = own_rows(report, budget)
        if not any(row["controls"] for row in rows):
            continue
        name, made = budget_name(report, budget), own_table(report, budget, rows)
        if out:
            out.append(f"<details><summary>The same at {name}</summary><div>{made}</div></details>")
        else:
            out.append(
                f'<h2>Each growing arm against its own controls</h2><p class="small">At {name}: the arm’s bits per '
                "byte less the control’s, below 0 is better. Arms of the same sizes share their controls; dropped is "
                f"run for one arm.</p>{made}"
            )
    return "".join(out) + gains_table(report) if out else ""


def own_table(report: dict[str, Any], budget: dict[str, Any], found: list[dict[str, Any]]) -> str:
    roles = [role for role in OWN if any(role in row["controls"] for row in found)]
    arms, rows = {arm["name"]: arm for arm in report["arms"]}, []
    tried = [sizes_beside(report, budget, arms[row["arm"]]) for row in found if "optimal" in row["controls"]]
    optimal = {best_of_sizes(sizes) for sizes in tried}
    titles = {**OWN, **({"optimal": optimal.pop()} if len(optimal) == 1 else {})}
    for row in found:
        name = tagged(report, budget, row["arm"])
        out = [f"{name}{about(bits_text(cell_of(budget, row['arm'])['mean']))}"]
        for role in roles:
            control = row["controls"].get(role)
            if control is None:
                out.append(MISSING)
            else:
                pair, name = control["pair"], control["name"]
                out.append(pair_cell(pair, f"from {name}") if pair else f"not compared{about('from ' + e(name))}")
        ratio = row["flops_to_scratch"]
        out.append(ratio_cell(ratio) if ratio and ratio["value"] is not None else MISSING)
        rows.append(out)
    head = ["", *(titles[role] for role in roles), "FLOPs to the loss of its scratch, over those of that scratch"]
    return table(head, rows, "matrix")


def gains_table(report: dict[str, Any]) -> str:
    if not report["gains"]:
        return ""
    found = {(gain["arm"], gain["other"], gain["share"]): gain for gain in report["gains"]}
    budgets = budgets_at(report, {share for _, _, share in found})
    rows = []
    for arm, other in dict.fromkeys(key[:2] for key in found):
        at = [found.get((arm, other, budget["share"])) for budget in budgets]
        one = next(gain for gain in at if gain)
        sides = ((arm, one["scratch"]), (other, one["other_scratch"]))
        cells = [f"{named(report, name)}{about('less ' + e(scratch))}" for name, scratch in sides]
        rows.append([*cells, *(pair_cell(gain) if gain else MISSING for gain in at)])
    note = (
        '<p class="small">(arm − its scratch) − (other − its scratch), ± the pooled 95 % interval; beneath it that of '
        f"the four runs of each seed alone; below 0 growing gained the arm more. {len(found)} pairs compared; chance "
        f"alone would tell about {false_alarms(len(found)):.1f} apart.</p>"
    )
    columns = [budget_name(report, each) for each in budgets]
    title = "<h3>Gain of growing over the arm’s own scratch, compared</h3>"
    return f"{title}{note}{table(['arm', 'other', *columns], rows, 'matrix')}"


def noise(budget: dict[str, Any]) -> list[tuple[str, float, float]]:
    """What the pooled deviations of a budget are of, each with its degrees of freedom (rule 20)."""
    found = [("arms of different starts", budget["s"], budget["df"])]
    found.append(("arms that start as the same model", budget["s_same"], budget["df_same"]))
    return [each for each in found if each[1] is not None]


def verdict_section(report: dict[str, Any]) -> str:
    """The matrix of the largest budget that has one, the others folded away."""
    last = answered(report) or report["budgets"][-1]
    out = [f"<h2>Verdicts</h2><h3>At {budget_name(report, last)}</h3>{matrix(report, last)}"]
    for budget in reversed([each for each in report["budgets"] if each is not last]):
        title = f"<summary>Verdicts at {budget_name(report, budget)}</summary>"
        out.append(f"<details>{title}<div>{matrix(report, budget)}</div></details>")
    return "".join(out)


def reach_section(report: dict[str, Any]) -> str:
    thresholds = [t for t in report["reach"] if t["loss"] is not None]
    if not thresholds:
        return ""
    reference, rows, states = report["race"]["reference"], [], set()
    for arm in report["arms"]:
        if arm["name"] == reference:
            continue
        row = [name_of(report, arm)]
        for t in thresholds:
            state = growth_state(report, budget_at(report, t["share"]), arm["name"])
            row.append(ratio_cell(t["ratios"][arm["name"]], state))
            states.add(state)
        rows.append(row)
    before = " “Before growth” is what the arm is at that budget." if "before growth" in states else ""
    head = ["arm", *(f"to {bits_text(t['loss'])}<br>({flops_text(t['flops'])} of the reference)" for t in thresholds)]
    note = (
        f'<p class="small">FLOPs of the arm over those of <b>{e(reference)}</b>, ancestors included, to reach the loss '
        f"that <b>{e(reference)}</b> has at each budget, seed by seed. Below 1 is fewer. Nothing is extrapolated "
        f"beyond the budgets.{before}</p>"
    )
    return f"<h2>FLOPs to reach a loss</h2>{note}{table(head, rows, 'matrix')}"


def sunk_about(report: dict[str, Any], sunk: dict[str, Any]) -> str:
    few = sunk["seeds"] < len(report["race"]["seeds"])
    return flops_text(sunk["flops"]) + (f", {count_seeds(sunk['seeds'])}" if few else "")


def sunk_section(report: dict[str, Any]) -> str:
    if not report["sunk"]:
        return ""
    found = {(s["arm"], s["share"]): s for s in report["sunk"]}
    budgets = budgets_at(report, {share for _, share in found})
    rows = []
    for arm in dict.fromkeys(arm for arm, _ in found):
        cells = [found.get((arm, budget["share"])) for budget in budgets]
        against = next(s["against"] for s in cells if s)
        each = [f"{e(ratio_text(s))}{about(sunk_about(report, s))}" if s else MISSING for s in cells]
        rows.append([named(report, arm), e(against), *each])
    own = {s["own_scratch"] for s in report["sunk"]}
    whose = "its scratch’s" if all(own) else "its scratch’s, else the reference’s," if any(own) else "the reference’s"
    head = ["arm", "over", *(budget_name(report, budget) for budget in budgets)]
    note = (
        '<p class="small"><b>Not a comparison of equal budgets.</b> For one who already owns the model before its last '
        f"growth, all that came before is paid: FLOPs of that growth and after it, in small, over {whose} from its "
        "first step to the same loss. Verdicts never rest on this view.</p>"
    )
    return f"<h2>Sunk-cost view</h2>{note}{table(head, rows, '', tuple(range(2, len(head))))}"


def optimal_section(report: dict[str, Any]) -> str:
    rows = []
    for budget in report["budgets"]:
        for best in budget["compute_optimal"]:
            bracket = f"bracketed, of {best['sizes']}"
            if best["edge"]:
                bracket = f'<span class="tag warn">not bracketed: {edge_text(best)}</span>'
            of = f"{e(best['architecture'])}{about(e(', '.join(best['of'])))}"
            row = [flops_text(budget["flops"]), of, named(report, best["arm"])]
            rows.append([*row, count_text(best["parameters"]), bits_text(best["loss"]), bracket])
    if not rows:
        return ""
    head = ["budget", "architecture", "lowest mean", "parameters", "bits per byte", "is it the optimum?"]
    note = (
        '<p class="small">The best of the sizes that were tried, which may differ in shape as well as in parameters. '
        "Bracketed: a smaller and a larger one of its kind were tried.</p>"
    )
    title = "<h2>Compute-optimal size, found among those from scratch</h2>"
    return f"{title}{note}{table(head, rows, '', (0, 3, 4))}"


def noise_section(report: dict[str, Any]) -> str:
    rows = []
    for copy in report["copies"]:
        budget = budget_at(report, copy["share"])
        pair = pair_of(budget, copy["copy"], copy["original"])
        verdict = verdict_cell(pair["word"], signed(pair["value"])) if pair else MISSING
        apart = e(", ".join(signed(d) for d in copy["differences"]))
        row = [budget_name(report, budget), named(report, copy["copy"]), e(copy["original"]), apart or MISSING]
        rows.append([*row, MISSING if copy["s"] is None else e(gap_text(copy["s"])), verdict])
    pooled = [
        [budget_name(report, b), what, e(gap_text(s)), f"{df:.3g}"]
        for b in report["budgets"]
        for what, s, df in noise(b)
    ]
    out = ["<h2>Noise</h2>"]
    if pooled:
        text = "Standard deviation of one run in a difference of two arms. Arms that start as the same model share "
        text += "what a seed’s initial weights do, and differ by less."
        wider = [budget_name(report, b) for b in report["budgets"] if b["s"] and (b["s_same"] or 0) > b["s"]]
        if wider:
            text += f" Not so at {listed(wider)}, where no such effect was found: s of different starts is of all arms."
        out.append(f'<p class="small">{text}</p>')
        out.append(table(["budget", "of", "pooled s", "degrees of freedom"], pooled, "", (2, 3)))
    if rows:
        text = "A copy is the same arm with other initial weights on the same text; what lies between is noise."
        head = ["budget", "copy", "of", "differences, seed by seed", "s of one run", "verdict"]
        out.append(f'<p class="small">{text}</p>{table(head, rows, "", (4,))}')
    return "".join(out) if len(out) > 1 else ""


def law_section(report: dict[str, Any]) -> str:
    laws = report["power_laws"]
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
        apart = e(signed(row["cosine"] - row["wsd"]) if known else row["status"])
        cells = [named(report, row["arm"]), str(row["seed"]), bits_text(row["wsd"]), bits_text(row["cosine"])]
        rows.append([*cells, apart])
    head = ["arm", "seed", "warm-up, stable, decay", "cosine", "difference"]
    note = '<p class="small">A check of the schedule on one seed; no verdict rests on it.</p>'
    return f"<h2>Cosine check</h2>{note}{table(head, rows, '', (1, 2, 3, 4))}"
