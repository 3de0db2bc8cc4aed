"""What a reader of a full race must doubt, and what would change its answer, each read off the numbers."""

from __future__ import annotations

from typing import Any

from ...statistics import seeds_needed, unequal_scatter
from ..units import bits_text, flops_text, gap_text, signed
from ..verdict import (
    IGNORED,
    differing_keys,
    environment_doubts,
    equal_budget,
    levels,
    run_doubts,
    stream_doubts,
    unequal_text,
)
from .charts import foremost
from .controls import controls_of, gains, own_controls, pair_of, sunk_costs
from .numbers import kind_of, starts_of, values_at
from .words import answer, answered, best_arm, conclusion, edge_text, headline, listed, progress, share_text

OVERLAPS = (
    ("overlap", "held-out text", "training text"),
    ("final_overlap", "final text", "training text"),
    ("final_held_out_overlap", "final text", "held-out text"),
)
OVERLAP = 0.05  # above this share of its stretches in the training text, a text is no longer held out (rule 4)
LZMA_SHARE = 0.25  # of what LZMA needs; below it a result is not believed (rule 5)
FEW_SEEDS = 3
SHORT_TRIALS = 0.5  # of the length; below it the best rate of trials is known to be too high (LOG.md)
FEW_BUDGETS = 3  # FLOPs to reach a loss are read at three thresholds, between budgets (rule 22)
UNWRITTEN = object()
# What arms of a race may have apart: what is tuned or drawn, and how a mixture is kept in balance, which is the arm.
OWN_SETTINGS = ("train.learning_rate", "train.seed", "train.keep_at", "train.expert_balance")
BEYOND = {"smallest": "a smaller one", "largest": "a larger one", "only": "another"}
WORTH_SEEDS = 30  # more than so many seeds are not worth naming a number for


# --- warnings ---


def status_warnings(report: dict[str, Any]) -> list[dict[str, str]]:
    bad, warn = [], []
    runs = [run for arm in report["arms"] for run in arm["runs"]]
    if any(run["status"] not in ("finished", "failed") for run in runs):
        tuning = sum(not arm["learning_rate"] for arm in report["arms"])
        more = f"; {tuning} arms have no headline run yet" if tuning else ""
        warn.append(f"The race is not finished: {progress(report)}{more}. Its numbers may still change.")
    for arm in report["arms"]:
        failed = [run for run in arm["runs"] if run["status"] == "failed"]
        if failed:
            where = listed([f"seed {run['seed']} at {share_text(report, run)}" for run in failed])
            why = f": {failed[0]['error']}" if failed[0]["error"] else ""
            bad.append(
                f"**{arm['name']}** failed ({where}{why}). It is compared over the seeds that are left, in its favour."
            )
    return levels(bad, warn)


def warnings(report: dict[str, Any]) -> list[dict[str, str]]:
    """Red where the answer is spoilt, amber where a reader should know; one note per arm and kind."""
    bad: list[str] = []
    started = [(arm, run) for arm in report["arms"] for run in arm["runs"] if run["status"] != "not started"]
    seen: dict[tuple[str, str], int] = {}
    notes: dict[tuple[str, str], str] = {}
    floor = report["checks"].get("lzma_bits_per_byte")
    others = [(arm, {"epochs": None, "growth": [], **run}) for arm in report["arms"] for run in arm["trials"]]
    others += [(arm, run) for arm in report["arms"] for run in arm["cosine"]]
    for arm, run in started + others:
        found = [b for b in (run["bits_per_byte"], run.get("final_bits_per_byte")) if b is not None]
        lowest = min(found, default=None)
        doubts = run_doubts({**run, "name": arm["name"], "bits_per_byte": lowest})
        if floor and lowest is not None and lowest < LZMA_SHARE * floor:
            text = f"**{arm['name']}**: {bits_text(lowest)} bits per byte is less than a quarter of LZMA's {floor:.2f}."
            doubts.append(("below LZMA", text))
        for kind, text in doubts:
            key = arm["name"], kind
            notes.setdefault(key, text)
            seen[key] = seen.get(key, 0) + 1
    bad += [text + (f" ({seen[key]} of its runs.)" if seen[key] > 1 else "") for key, text in notes.items()]
    for check, what, where in OVERLAPS:
        share = report["checks"].get(check)
        if share is not None and share > OVERLAP:
            bad.append(f"{share:.0%} of the {what} also occurs in the {where}, which is above {OVERLAP:.0%}.")
    if len({run["final_sha256"] for _, run in started if run["final_sha256"]}) > 1:
        bad.append("The runs were not tested on the same final text: its sha256 differs.")
    bad += stream_doubts([run for _, run in started]) + order_doubts(report) + rate_doubts(report)
    if len(report["race"]["seeds"]) < FEW_SEEDS:
        bad.append(f"Fewer than {FEW_SEEDS} seeds: {len(report['race']['seeds'])}. Intervals are wide and fragile.")
    for budget in report["budgets"]:
        spent = [cell for cell in budget["arms"] if cell["flops"]]
        if len(spent) > 1 and not equal_budget(spent):
            bad.append(f"At {flops_text(budget['flops'])}: {unequal_text(spent)}")
    every = [run for _, run in started + others]
    return levels(bad, soft_doubts(report) + environment_doubts(every, report["environment"]))


def order_doubts(report: dict[str, Any]) -> list[str]:
    """The windows and their order follow from the recipe: data.seed may differ between arms by no more than `seeds`."""
    recipes = [arm["recipe"] for arm in report["arms"] if arm["recipe"]]
    apart = [k for k in differing_keys([{"data": r.get("data")} for r in recipes]) if k != "data.skip_tokens"]
    firsts = {run["seed"] for arm in report["arms"] for run in started_trunks(arm)[:1]}
    if len(firsts) > 1:  # the recipes at hand are of different seeds
        apart = [key for key in apart if key != "data.seed"]
    return [f"The arms did not read the same windows in one order: {', '.join(apart)} differ."] if apart else []


def started_trunks(arm: dict[str, Any]) -> list[dict[str, Any]]:
    return [run for run in arm["runs"] if run["share"] == arm["runs"][-1]["share"] and run["status"] != "not started"]


def rate_doubts(report: dict[str, Any]) -> list[str]:
    """Whether each arm ran at the best rate of its trials, or, without trials, at that of the arm it stands beside."""
    bad, rates = [], {arm["name"]: arm["learning_rate"] for arm in report["arms"]}
    for arm in report["arms"]:
        if arm["trials"] and all(trial["status"] == "failed" for trial in arm["trials"]):
            bad.append(f"Every trial of **{arm['name']}** failed: its learning rate is not tuned.")
        due = arm["best_rate"] if arm["trials"] else rates.get(arm["of"])
        if arm["learning_rate"] and due and arm["learning_rate"] != due:
            whose = "the best of its trials" if arm["trials"] else f"the rate of **{arm['of']}**"
            bad.append(f"**{arm['name']}** ran at a learning rate of {arm['learning_rate']:g}, and {whose} is {due:g}.")
    return bad


def soft_doubts(report: dict[str, Any]) -> list[str]:
    warn, tuned = [], [arm for arm in report["arms"] if arm["trials"]]
    edges = [f"**{arm['name']}** ({arm['edge']})" for arm in tuned if arm["edge"]]
    if edges:
        warn.append(f"The best learning rate lies at an edge of the grid for {listed(edges)}: it may not be tuned.")
    if len({len(arm["trials"]) for arm in tuned}) > 1:
        warn.append("The arms do not have equally many trials of the learning rate.")
    if tuned and tuned_short(report):
        length = report["race"]["tune_fraction"]
        warn.append(
            f"Learning rates were tuned on runs of {100 * length:g} % of the length. The best rate falls with the "
            "length: one below the chosen may be better at the whole, and not by as much for every arm (rule 12)."
        )
    budgets = len(report["race"]["budgets"])
    if budgets < FEW_BUDGETS:
        warn.append(f"Fewer than {FEW_BUDGETS} budgets: {budgets}. FLOPs to reach a loss are hardly bounded.")
    growing = [arm for arm in report["arms"] if arm["grows"]]
    if growing and not report["race"].get("controls", True):
        names = listed([f"**{arm['name']}**" for arm in growing])
        warn.append(f"race.controls = false: {names} grew without the controls that rules 7 to 9 add.")
    elif bare := [f"**{arm['name']}**" for arm in growing if arm["role"] == "arm" and not arm.get("controls")]:
        warn.append(f"The race does not say which controls {listed(bare)} {'has' if len(bare) == 1 else 'have'}.")
    warn += [
        f"The arms do not share {key}: {value!r}, but {listed(others)}. Rule 15: only what an architecture needs."
        for key, value, others in train_differences(report)
    ]
    before = report["race"].get("judged_before")
    if before:
        warn.append(
            f"The final text had judged races on this machine before this one began ({listed(before)}): what was "
            "chosen after them was not chosen without it (rule 26)."
        )
    learned = [a for a in growing if any(event.get("operator") == "ligo" for event in a["recipe"].get("growth", ()))]
    if learned:
        names = listed([f"**{arm['name']}**" for arm in learned])
        warn.append(f"{names} learned growth maps on batches already trained on, so read those again (rule 3).")
    return warn


def tuned_short(report: dict[str, Any]) -> bool:
    length = report["race"].get("tune_fraction")
    return length is not None and length < SHORT_TRIALS


def train_differences(report: dict[str, Any]) -> list[tuple[str, Any, list[str]]]:
    """Each key of training that arms set apart: its most common value, and "0.0 for **ngpt**" of the others."""
    out = []
    recipes = {arm["name"]: arm["recipe"]["train"] for arm in report["arms"] if arm["recipe"].get("train")}
    for key in differing_keys([{"train": train} for train in recipes.values()]):
        values = {name: train.get(key.partition(".")[2], UNWRITTEN) for name, train in recipes.items()}
        if key not in OWN_SETTINGS and UNWRITTEN not in values.values():  # an older version did not write it at all
            usual = max(values.values(), key=list(values.values()).count)
            others = [f"{value!r} for **{name}**" for name, value in values.items() if value != usual]
            out.append((key, usual, others))
    return out


# --- what would change it ---


def changes(report: dict[str, Any]) -> list[str]:
    """What would have to be otherwise for the answer to be another, each read off the numbers."""
    budget = answered(report)
    arm = budget and best_arm(report, budget)
    if not budget or not arm:
        return ["Everything: there is no result yet."]
    out, grown = [], [a for a in report["arms"] if a["role"] == "arm" and a["grows"]]
    if len(grown) > 1:
        out.append(
            f"**{arm['name']}** is the best of {len(grown)} growing arms, chosen after the fact; chance favours it, "
            "and fresh seeds would be a fairer test."
        )
    own = dict.fromkeys(controls_of(report, budget, arm).values())
    names = list(own) or [a["name"] for a in report["arms"] if a is not arm]
    out += nearest(budget, arm["name"], names) + other_text(budget, arm["name"], names)
    for name in names:
        out += more_seeds(budget, arm["name"], name) + trend(report, budget, arm["name"], name)
    for best in budget["compute_optimal"]:
        if best["edge"]:
            out.append(
                f"The optimum of the sizes from scratch ({best['architecture']}) is not bracketed: **{best['arm']}** "
                f"is {edge_text(best)}, and {BEYOND[best['edge']]} may be better still."
            )
    for arm_at_edge in [a for a in report["arms"] if a["trials"] and a["edge"]]:
        word = "lower" if arm_at_edge["edge"] == "lowest" else "higher"
        out.append(
            f"A {word} learning rate may suit **{arm_at_edge['name']}** better: its best lies at the edge of the grid."
        )
    return out + unequal_noise(report, budget) + disagreeing_cosine(report, budget) + fewer_alarms(budget)


def unequal_noise(report: dict[str, Any], budget: dict[str, Any]) -> list[str]:
    """Whether one architecture, or in a race of one an arm, scatters more than the others that are pooled with it, or
    else one kind of model about its starts."""
    table, starts = values_at(report, budget["share"]), starts_of(report)
    architectures = {arm["name"]: arm["architecture"] for arm in report["arms"]}
    whole, about = len(set(architectures.values())) > 1, ""
    found = unequal_scatter(table, architectures if whole else {name: name for name in architectures}, starts)
    of = "arms of " if whole else ""
    if found is None:
        firsts: dict[tuple[str, str], str] = {}
        kinds = {arm["name"]: firsts.setdefault(kind_of(arm), arm["name"]) for arm in report["arms"]}
        found = unequal_scatter(table, kinds, starts, within=True)
        of, about = "models like ", " about what they start as"
    if found is None:
        return []
    name, s, rest = found
    return [
        f"Unequal noise: from seed to seed {of}**{name}** scatter{'' if of else 's'}{about} with s = {gap_text(s)}, "
        f"the others with {gap_text(rest)}, and intervals pool them: too wide for pairs of the others, too narrow for "
        "its own. In each cell of the verdicts the pair's own interval stands beneath."
    ]


def nearest(budget: dict[str, Any], arm: str, names: list[str]) -> list[str]:
    """Of the others that an arm is told apart from, the one that noise would hide first."""
    found = [pair for name in names if (pair := pair_of(budget, arm, name)) is not None]
    apart = [pair for pair in found if pair["word"] in ("better", "worse") and pair["high"] > pair["low"]]
    if not apart:
        return []
    pair = min(apart, key=lambda p: abs(p["value"]) / (p["high"] - p["low"]))
    times = abs(pair["value"]) / ((pair["high"] - pair["low"]) / 2)
    which = "is the first of these pairs that would" if len(apart) > 1 else "would"
    return [
        f"More noise: **{arm}** against **{pair['other']}** {which} no longer be told apart if runs scattered "
        f"{times:.2f} times as much as they did (s = {gap_text(noise_of(budget, pair)[0])})."
    ]


def other_text(budget: dict[str, Any], arm: str, names: list[str]) -> list[str]:
    """The others that an arm is told apart from by its seeds, but not by stretches of the text that judged it."""
    found = [pair for name in names if (pair := pair_of(budget, arm, name)) is not None]
    apart = [pair for pair in found if pair["word"] in ("better", "worse") and "text_low" in pair]
    mixed = [pair for pair in apart if pair["text_low"] <= 0 <= pair["text_high"]]
    if not mixed:
        return []
    others = [f"**{pair['other']}** ({signed(pair['text_low'])} to {signed(pair['text_high'])})" for pair in mixed]
    return [
        f"Another text: over stretches of the one that judged them, **{arm}** is not told apart from {listed(others)}."
    ]


def noise_of(budget: dict[str, Any], pair: dict[str, Any]) -> tuple[float, float]:
    """The deviation of one run that the interval of a pair rests on, and its degrees of freedom."""
    return (budget["s_same"], budget["df_same"]) if pair["same_start"] else (budget["s"], budget["df"])


def more_seeds(budget: dict[str, Any], arm: str, other: str) -> list[str]:
    """For a pair that is not told apart: the interval against the difference, and how many seeds would settle it."""
    pair = pair_of(budget, arm, other)
    if pair is None or pair["low"] is None or pair["word"] != "not told apart":
        return []
    (s, df), half = noise_of(budget, pair), (pair["high"] - pair["low"]) / 2
    n = max(len(each["seeds"]) for each in budget["pairs"])  # that the degrees of freedom come from
    needed = seeds_needed(pair["value"], s, df / (n - 1)) if pair["value"] and s and n > 1 else None
    what = f"about {needed} seeds" if needed and needed <= WORTH_SEEDS else f"more than {WORTH_SEEDS} seeds"
    return [
        f"More seeds: **{arm}** against **{other}** differs by {signed(pair['value'])} with an interval of "
        f"±{gap_text(half)}; if that difference is the true one, {what} would tell them apart four times in five."
    ]


def trend(report: dict[str, Any], budget: dict[str, Any], arm: str, other: str) -> list[str]:
    """Whether the difference to another arm shrinks or grows towards the largest budget."""
    earlier = [b for b in report["budgets"] if b["share"] < budget["share"]]
    before = pair_of(earlier[-1], arm, other) if earlier else None
    now = pair_of(budget, arm, other)
    if before is None or now is None or before["low"] is None or now["low"] is None:
        return []
    if before["high"] >= now["low"] and before["low"] <= now["high"]:
        return []  # the two intervals overlap: no trend can be read
    word = "gains on" if now["value"] < before["value"] else "loses to"
    return [
        f"A larger budget: **{arm}** {word} **{other}** as the budget grows, from {signed(before['value'])} at "
        f"{flops_text(earlier[-1]['flops'])} to {signed(now['value'])} at {flops_text(budget['flops'])}."
    ]


def disagreeing_cosine(report: dict[str, Any], budget: dict[str, Any]) -> list[str]:
    rows = [r for r in report["cosine"] if r["cosine"] is not None and r["wsd"] is not None]
    out = []
    for i, a in enumerate(rows):
        for b in rows[i + 1 :]:
            pair = pair_of(budget, a["arm"], b["arm"])
            turned = a["seed"] == b["seed"] and (a["cosine"] - b["cosine"]) * (a["wsd"] - b["wsd"]) < 0
            if turned and pair and pair["word"] != "not told apart":
                out.append(
                    f"Another schedule: with cosine **{a['arm']}** and **{b['arm']}** change places "
                    f"({signed(a['cosine'] - b['cosine'])} against {signed(a['wsd'] - b['wsd'])}, one seed)."
                )
    return out


def fewer_alarms(budget: dict[str, Any]) -> list[str]:
    if not budget["pairs"]:
        return []
    return [
        f"Chance: of {len(budget['pairs'])} pairs compared, {budget['told_apart']} are told apart; where none truly "
        f"differed, about {budget['expected_false_alarms']:.1f} would be."
    ]


def judge_race(report: dict[str, Any]) -> dict[str, Any]:
    """The calculated report with answer, warnings and what would change the answer (names between **)."""
    keys = differing_keys([arm["recipe"] for arm in report["arms"] if arm["recipe"]], IGNORED)
    found = {"status_warnings": status_warnings(report), "warnings": warnings(report), "differing_keys": keys}
    for arm in report["arms"]:  # said once: environment and data stand at the head of the report and in the run folders
        for run in (*arm["runs"], *arm["trials"], *arm["cosine"]):
            del run["environment"], run["data"]
    return put_in_words({**report, **found})


def put_in_words(report: dict[str, Any]) -> dict[str, Any]:
    """What is said of the numbers; all of it follows from what report.json keeps."""
    budget = answered(report)
    sunk = [each for arm in report["arms"] if arm["grows"] for each in sunk_costs(report, arm)]
    shares = [b for b in reversed(report["budgets"]) if budget and b["share"] <= budget["share"]]
    own = [row for each in shares for row in own_controls(report, each)]
    report = {**report, "sunk": sunk, "own_controls": own, "gains": gains(report)}
    said, short = answer(report), conclusion(report, not tuned_short(report))
    if any(note["level"] == "bad" for note in report["warnings"] + report["status_warnings"]):
        said[0], short = f"**Read the red notes first.** {said[0]}", ""
    found = {"headline": headline(report), "changes": changes(report), "foremost": foremost(report)}
    return {**report, "conclusion": short, "answer": said, **found}
