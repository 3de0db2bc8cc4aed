"""What the numbers of a full race support, in words: the answer, its tiles, pairs and ratios."""

from __future__ import annotations

from typing import Any

from ..units import bits_text, flops_text, gap_text, low_to_high, signed
from .controls import best_of_sizes, controls_of, pair_of, sizes_beside
from .numbers import cell_of, from_scratch, is_thin, kind_of, mean_of, runs_at

LABELS = {
    "scratch": "the target size from scratch",
    "small": "the small size, trained longer",
    "dropped": "the same growth without its optimizer's state",
}
KNOWN_BY = {"scratch", "small", "optimal"}  # the controls without which nothing says that growing paid
MOST_BETTER, MOST_OTHERS, MOST_GAINS = 4, 2, 6  # that the answer names; of more it says how many
NOT_COMPARED: dict[str, Any] = {"value": None}  # FLOPs to a loss, where there is no ratio
BY_ITS_LOSS = "by its loss at that budget"  # where a word rests, when the FLOPs to a loss lie beyond the budgets
NOT_POOLED = "own seeds alone"  # the same, where rule 22 finds no noise to pool


def against(pair: dict[str, Any], label: str) -> str:
    """ "better than X by 0.020 [0.012 to 0.028]", or "not told apart from X: +0.004 [-0.010 to +0.018]"."""
    value, low, high = pair["value"], pair["low"], pair["high"]
    if low is None:
        return f"**not told apart** from {label}: {signed(value)}, too few runs for an interval"
    if pair["word"] == "not told apart":
        return f"**not told apart** from {label}: {signed(value)} [{signed(low)} to {signed(high)}]"
    return f"**{pair['word']}** than {label} {by_how_much(pair)}"


def share_text(report: dict[str, Any], budget: dict[str, Any]) -> str:
    share = budget["share"] / report["race"]["budgets"][-1]
    return "the whole budget" if share == 1 else f"{100 * share:g} % of the budget"


def listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def times(ratio: float) -> str:
    """A ratio with two digits, or with as many as keep one beside 1 from reading 1.00; at most four."""
    digits = next((d for d in (2, 3) if ratio == 1 or round(ratio, d) != 1), 4)
    return f"{ratio:.{digits}f}"


def ratio_text(ratio: dict[str, Any]) -> str:
    """ "0.72 [0.60 to 0.86]", "more than 1.40"."""
    value = ratio["value"] if "value" in ratio else ratio["ratio"]
    if value is None:
        return "not compared"
    if ratio["side"] == "unbounded":
        return "beyond the budgets on both sides"
    if ratio["low"] is None:
        return f"{ratio['side']} {value:.2f}".strip()
    return f"{times(value)} [{times(ratio['low'])} to {times(ratio['high'])}]"


def edge_text(best: dict[str, Any]) -> str:
    """ "the largest of 3 sizes", "the only size": the best of an architecture, where none beyond it was tried."""
    return "the only size" if best["edge"] == "only" else f"the {best['edge']} of {best['sizes']} sizes"


def growth_state(report: dict[str, Any], budget: dict[str, Any], arm: str) -> str:
    """ "before growth", or "grown 1 of 3 times", where what an arm is at a budget is not what it ends as (rule 17)."""
    cell = cell_of(budget, arm)
    growths = max(cell_of(b, arm)["growths"] for b in report["budgets"])
    if cell["mean"] is None or cell["growths"] == growths:
        return ""
    return f"grown {cell['growths']} of {growths} times" if cell["growths"] else "before growth"


# --- the answer ---


def progress(report: dict[str, Any]) -> str:
    runs = [run for arm in report["arms"] for run in arm["runs"]]
    return f"{sum(run['status'] == 'finished' for run in runs)} of {len(runs)} headline runs have finished"


def answered(report: dict[str, Any]) -> dict[str, Any] | None:
    """The largest budget at which at least two arms have results."""
    full = [b for b in report["budgets"] if sum(cell["mean"] is not None for cell in b["arms"]) > 1]
    return full[-1] if full else None


def best_arm(report: dict[str, Any], budget: dict[str, Any]) -> dict[str, Any] | None:
    """The arm with the lowest mean of those that grow; where none does, of all entrants, or of the controls."""
    means = {cell["arm"]: cell["mean"] for cell in budget["arms"]}
    found = [a for a in report["arms"] if means[a["name"]] is not None and a["role"] != "copy"]
    entrants = [a for a in found if a["role"] == "arm"]
    return min(
        [a for a in entrants if a["grows"]] or entrants or found, key=lambda a: means[a["name"]], default=None
    )


def control_labels(report: dict[str, Any], budget: dict[str, Any], arm: dict[str, Any]) -> dict[str, str]:
    """name -> what it is, of the controls that stand beside a growing arm."""
    names: dict[str, str] = {}
    labels = {**LABELS, "optimal": best_of_sizes(sizes_beside(report, budget, arm))}
    for role, name in controls_of(report, budget, arm).items():
        names[name] = f"{names[name]}, {labels[role]}" if name in names else labels[role]
    return names


def answer(report: dict[str, Any]) -> list[str]:
    """Two sentences. Of several growing arms how all of them stand comes first, and then the best of them."""
    budget = answered(report)
    if budget is None:
        return [f"No answer yet: {progress(report)}."]
    arm = best_arm(report, budget)
    assert arm is not None
    cell = cell_of(budget, arm["name"])
    text = "the final text" if budget["measure"] == "final_bits_per_byte" else "held-out text"
    where = f"At {flops_text(budget['flops'])}, ancestors included, "
    if not all(other["mean"] is not None for other in budget["arms"]):
        where = f"With arms missing: at{where[2:]}"
    bits, seeds = f"{bits_text(cell['mean'])} bits per byte on {text}", count_seeds(len(cell["seeds"]))
    labels = control_labels(report, budget, arm)
    others = list(labels) or [a["name"] for a in report["arms"] if a is not arm and a["role"] != "copy"]
    phrases = []
    for name in others:
        pair = pair_of(budget, arm["name"], name)
        if pair is not None:
            phrases.append(against(pair, f"**{name}**" + (f" ({labels[name]})" if labels else "")))
    if not labels and len(phrases) > 4:
        phrases = counted(budget, arm, others)
    stands = f"is {listed(phrases)}" if phrases else "stands alone"
    all_of_them, more = standings(report, budget, arm), further(report, budget, arm)
    grown = [row["arm"] for row in own_rows(report, budget)]
    if all_of_them and arm["grows"]:
        counts = {len(cell_of(budget, name)["seeds"]) for name in grown}
        over = seeds if len(counts) == 1 else f"{min(counts)} to {max(counts)} seeds"
        best = "; ".join([f"The best of them, **{arm['name']}** ({bits}), {stands}", *more])
        return [f"{where}over {over}: {all_of_them}.", f"{best}."]
    title = "the growing arm" if arm["grows"] else "the best arm"
    title = f"the best of {len(grown)} growing arms" if len(grown) > 1 else title
    name, ratio = flops_to_loss(report, budget, arm)
    said = "; ".join(filter(None, [all_of_them, *more]))
    said = said or (f"**{name}** is the reference itself" if name == arm["name"] else "")
    said = said or f"FLOPs to the loss of **{name}**: {ratio_text(ratio)}"
    return [f"{where}{title}, **{arm['name']}** ({bits}, {seeds}) {stands}.", f"{said[0].upper()}{said[1:]}."]


def conclusion(report: dict[str, Any], trusted: bool) -> str:
    """Whether growing paid, in a few words: how the best growing arm stands to its scratch, its small size and the best
    size, and which others are better than all of theirs. Nothing before the race has ended, or where those controls
    are missing, nor that it paid where there is a `doubt`.
    """
    budget = answered(report)
    arm = best_arm(report, budget) if budget else None
    ended = all(run["status"] in ("finished", "failed") for each in report["arms"] for run in each["runs"])
    if not budget or not arm or not arm["grows"] or not ended or budget is not report["budgets"][-1]:
        return ""
    rows = {row["arm"]: row["controls"] for row in own_rows(report, budget)}
    words = {name: words_of(controls) for name, controls in rows.items()}
    mine, labels = words[arm["name"]], control_labels(report, budget, arm)
    if not KNOWN_BY <= rows[arm["name"]].keys() or "" in mine.values():
        return ""
    better, worse, level = (
        [name for name, said in mine.items() if said == word] for word in ("better", "worse", "not told apart")
    )
    best = f"the best of {len(words)} grown models, {arm['name']}," if len(words) > 1 else arm["name"]
    other = of_another_kind(report, budget, arm)
    beyond = f"; {other}, another kind of model from scratch, is better than {arm['name']}" if other else ""
    if not worse and not level:
        if but := doubt(report, budget, arm, trusted):
            return f"That growing pays is not shown here: {best} is better than {listed(better)}, but {but}{beyond}."
        return f"Growing paid here: at equal FLOPs {best} is better than {listed(better)}{beyond}."
    if worse:
        ahead = f"{listed([f'{name} ({labels[name]})' for name in worse])} {'are' if worse[1:] else 'is'} better than"
        said = f"Growing did not pay here: at equal FLOPs {ahead} {best.removesuffix(',')}"
    else:
        said = f"That growing pays is not shown here: {best} is not told apart from {listed(level)}{beyond}"
    arms = {each["name"]: each for each in report["arms"]}
    ahead_of_all = [n for n, each in words.items() if KNOWN_BY <= rows[n].keys() and set(each.values()) == {"better"}]
    paid = [name for name in ahead_of_all if not doubt(report, budget, arms[name], trusted)]
    own_controls = f"{'their' if paid[1:] else 'its'} own controls"
    return f"{said}; {listed(paid)} did better than {own_controls}." if paid else f"{said}."


def doubt(report: dict[str, Any], budget: dict[str, Any], arm: dict[str, Any], trusted: bool) -> str:
    """Why it is no sign that growing paid that an arm is better than its controls; "" where nothing speaks against it.

    Rates that are not `trusted`, the best of one at an edge of the grid, a best size at an end of its kind's.
    """
    if not trusted:
        return "at learning rates that were tuned on short runs"
    names = [arm["name"], *(name for role, name in controls_of(report, budget, arm).items() if role != "dropped")]
    edges = {each["name"] for each in report["arms"] if each["trials"] and each["edge"]}
    if at_edge := [name for name in dict.fromkeys(names) if name in edges]:
        return f"the best learning rate of {listed(at_edge)} lies at an edge of the grid"
    ends = [best for best in sizes_beside(report, budget, arm) if best["edge"]]
    said = [f"{best['arm']} is {edge_text(best)} of its kind" for best in ends]
    return f"{listed(said)}, so that a better one may lie beyond" if said else ""


def of_another_kind(report: dict[str, Any], budget: dict[str, Any], arm: dict[str, Any]) -> str:
    """Of the models from scratch that are better than a growing arm and are neither controls of it nor, but for thin
    factors, of their kinds, the best one; "" where there is none."""
    own = set(controls_of(report, budget, arm).values())
    kinds = {kind_of(a) for a in report["arms"] if a["name"] in own}
    fresh = [a for a in report["arms"] if from_scratch(a) and a["role"] != "copy" and a["name"] not in own]
    others = [a["name"] for a in fresh if kind_of(a) not in kinds or is_thin(a)]
    pairs = [pair for name in others if (pair := pair_of(budget, name, arm["name"])) and pair["word"] == "better"]
    return str(min(pairs, key=lambda pair: pair["value"])["arm"]) if pairs else ""


def words_of(controls: dict[str, Any]) -> dict[str, str]:
    """Of a growing arm: the word of each of its controls but the one without moments; empty where there is no pair."""
    own = {control["name"]: control["pair"] for role, control in controls.items() if role != "dropped"}
    return {name: pair["word"] if pair and pair["low"] is not None else "" for name, pair in own.items()}


def scratch_of(report: dict[str, Any], arm: str) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Of a growing arm: its own scratch (name, pair), and its FLOPs to the loss that it has."""
    row = next((row for row in report["own_controls"] if row["arm"] == arm), None)
    return (row["controls"].get("scratch"), row["flops_to_scratch"]) if row else (None, None)


def standings(report: dict[str, Any], budget: dict[str, Any], arm: dict[str, Any]) -> str:
    """How many of the arms are better, worse or not told apart: growing ones from their scratch and from their small
    size, else all from the reference. Nothing where there is one arm alone, of which `answer` says it.
    """
    if not arm["grows"]:
        reference = report["race"]["reference"]
        others = [a["name"] for a in report["arms"] if a["role"] == "arm" and a["name"] not in (reference, arm["name"])]
        pairs = [pair for name in others if (pair := pair_of(budget, name, reference))]
        who = "other arms" if arm["name"] == reference else "further arms"
        return f"of {len(pairs)} {who} {told(pairs, *[f'**{reference}**'] * 2)}" if len(pairs) > 1 else ""
    parts: list[str] = []
    grown = len(own_rows(report, budget))
    for role, what, theirs in (
        ("scratch", "scratch", "their own scratch"),
        ("small", "small size", "their small size trained longer"),
    ):
        pairs = own_pairs(report, budget, role)
        if len(pairs) < 2:
            continue
        whom = theirs.replace("their", "its")
        if len(names := {pair["other"] for pair in pairs}) == 1 and role == "scratch":
            whom = theirs = f"**{names.pop()}**"
        head = "" if parts else f"of {grown} growing arms "
        if len(pairs) < grown:
            head = f"of {len(pairs)} growing arms ({grown - len(pairs)} more have no {what}) "
        parts.append(head + told(pairs, whom, theirs))
    return "; ".join(parts)


def own_rows(report: dict[str, Any], budget: dict[str, Any]) -> list[dict[str, Any]]:
    """The growing arms and their own controls at a budget, best arm first."""
    return [row for row in report["own_controls"] if row["share"] == budget["share"]]


def own_pairs(report: dict[str, Any], budget: dict[str, Any], role: str) -> list[dict[str, Any]]:
    """Each growing arm and its own control of a role at a budget, best arm first."""
    own = [row["controls"].get(role) for row in own_rows(report, budget)]
    return [control["pair"] for control in own if control and control["pair"]]


def told(pairs: list[dict[str, Any]], whom: str, theirs: str) -> str:
    """ "1 is **better** than X (**a** by 0.040 [0.021 to 0.060]) and 4 are **not told apart**", "all are **worse**".

    whom, theirs: what they are held against, of one and of several.
    """
    parts: list[str] = []
    for word, link in (("better", "than"), ("not told apart", "from"), ("worse", "than")):
        found = [pair for pair in pairs if pair["word"] == word]
        if len(found) == len(pairs):
            return f"all are **{word}** {link} {theirs}"
        by = [f"**{pair['arm']}**" for pair in found]
        if len(found) <= MOST_OTHERS and word != "not told apart":
            by = [f"{name} {by_how_much(pair)}" for name, pair in zip(by, found, strict=True)]
        if found or word == "better":
            count = f"{len(found)} {'is' if len(found) == 1 else 'are'}" if found else "none is"
            named = f" ({listed(by)})" if 0 < len(found) <= (MOST_BETTER if word == "better" else MOST_OTHERS) else ""
            held = "" if parts else f" {link} {whom if len(found) < 2 else theirs}"
            parts.append(f"{count} **{word}**{held}{named}")
    return listed(parts)


def by_how_much(pair: dict[str, Any]) -> str:
    """ "by 0.040 [0.021 to 0.060]", of a pair that is told apart."""
    near, far = sorted((abs(pair["low"]), abs(pair["high"])))
    return f"by {gap_text(pair['value'])} [{gap_text(near)} to {gap_text(far)}]"


def counted(budget: dict[str, Any], arm: dict[str, Any], others: list[str]) -> list[str]:
    """Where an arm met many others: how many it beat, and by name those that it did not."""
    pairs = [pair for name in others if (pair := pair_of(budget, arm["name"], name)) is not None]
    beaten = [pair for pair in pairs if pair["word"] == "better"]
    out = [f"**better** than {len(beaten)} of {len(pairs)} other arms"] if beaten else []
    for word, link in (("not told apart", "from"), ("worse", "than")):
        names = [f"**{pair['other']}**" for pair in pairs if pair["word"] == word]
        out += [f"**{word}** {link} {listed(names)}"] if names else []
    return out


def count_seeds(n: int) -> str:
    return "1 seed" if n == 1 else f"{n} seeds"


def of_own_seeds(ratio: dict[str, Any]) -> bool:
    """Whether FLOPs to a loss have an interval, and it is that of the arm's own seeds."""
    return ratio["low"] is not None and (ratio["low"], ratio["high"]) == (ratio["own_low"], ratio["own_high"])


def rests_on(ratio: dict[str, Any]) -> str:
    """What is to be said after the word about FLOPs to a loss, where it does not rest on their pooled interval."""
    if ratio["side"]:
        return f", {BY_ITS_LOSS}"
    return f", by {NOT_POOLED}" if of_own_seeds(ratio) else ""


def further(report: dict[str, Any], budget: dict[str, Any], arm: dict[str, Any]) -> list[str]:
    """FLOPs to the loss of scratch or the reference, and who stands better against its own scratch than whom."""
    name, ratio = flops_to_loss(report, budget, arm)
    parts = []
    if bounded(ratio):
        rests = rests_on(ratio)
        loss = "to its loss" + (", which not every seed reaches" if ratio["side"] == "more than" else "")
        parts.append(
            f"**{arm['name']}** needs {ratio_text(ratio)} times the FLOPs of **{name}** {loss}: "
            f"**{ratio['word']}**{rests}"
        )
    gains = [gain for gain in report["gains"] if gain["share"] == budget["share"]]
    more: dict[str, list[str]] = {}
    for gain in gains:
        if gain["word"] != "not told apart":
            names = (gain["arm"], gain["other"]) if gain["word"] == "better" else (gain["other"], gain["arm"])
            more.setdefault(names[0], []).append(f"**{names[1]}**")
    apart = sum(map(len, more.values()))
    if 0 < apart <= MOST_GAINS:
        parts += [
            f"**{winner}** stands better against its own scratch than {listed(losers)} {'do' if losers[1:] else 'does'}"
            for winner, losers in more.items()
        ]
        parts[-1] += f" ({apart} of {len(gains)} differences)"
    elif gains:
        which = f"of {len(gains)} differences" if len(gains) > 1 else "of one difference"
        parts.append(f"{which} between what they gained over their own scratch {apart or 'none'} can be told from zero")
    return parts


def flops_to_loss(report: dict[str, Any], budget: dict[str, Any], arm: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Whose loss, and an arm's FLOPs to it at a budget: its own scratch's where it grows, else the reference's."""
    scratch, ratio = scratch_of(report, arm["name"])
    if not scratch:
        at = next((r for r in report["reach"] if r["share"] == budget["share"]), None)
        ratio = at["ratios"].get(arm["name"]) if at else None
    return scratch["name"] if scratch else report["race"]["reference"], ratio or NOT_COMPARED


def bounded(ratio: dict[str, Any]) -> bool:
    """Whether there is a ratio, and the budgets bound it on some side."""
    return ratio["value"] is not None and ratio["side"] != "unbounded"


# --- tiles ---


def headline(report: dict[str, Any]) -> list[dict[str, str]]:
    budget, tiles = answered(report), []
    if budget is not None:
        arm = best_arm(report, budget)
        if arm is not None:
            cell = cell_of(budget, arm["name"])
            tiles.append(("best growing arm" if arm["grows"] else "best arm", bits_text(cell["mean"]), arm["name"]))
        sizes = sizes_beside(report, budget, arm) if arm and arm["grows"] else budget["compute_optimal"][:1]
        if sizes:
            best = min(sizes, key=lambda size: size["loss"])
            edge = f"not bracketed: {edge_text(best)}" if best["edge"] else "bracketed"
            label = best_of_sizes(sizes).removeprefix("the ")
            scratch = scratch_of(report, arm["name"])[0] if arm else None
            pair = pair_of(budget, best["arm"], scratch["name"]) if scratch else None
            beside = f"; {signed(pair['value'])} to {pair['other']}, {pair['word']}" if pair else ""
            tiles.append((label, bits_text(best["loss"]), f"{best['arm']}; {edge}{beside}"))
        if budget["s"] is not None:
            tiles.append(("noise of one run", gap_text(budget["s"]), f"pooled, {budget['df']:.3g} degrees of freedom"))
        name, ratio = flops_to_loss(report, budget, arm) if arm else ("", NOT_COMPARED)
        if bounded(ratio):
            rests = rests_on(ratio)
            text, _, interval = ratio_text(ratio).partition(" [")
            note = f"{ratio['word']}{rests}" + (f"; {interval.removesuffix(']')}" if interval else "")
            tiles.append((f"FLOPs to the loss of {name}", f"{text}\N{NO-BREAK SPACE}×", note))
        ended = [run for a in report["arms"] for run in runs_at(a, budget["share"]) if run["status"] == "finished"]
        spent, per = mean_of(ended, "flops"), [cell["tokens_per_parameter"] for cell in budget["arms"]]
        found = [value for value in per if value]
        note = f"; {low_to_high(found, '{:.3g}'.format)} tokens a parameter" if found else ""
        tiles.append(("training FLOPs per run", flops_text(spent), f"ancestors included{note}"))
    return [{"label": label, "text": text, "note": note} for label, text, note in tiles]
