"""The other tables of a full race: its arms, their growths, trials of the learning rate, every hyperparameter."""

from __future__ import annotations

import math
from typing import Any

from ...statistics import NO_RISE, mean_sd
from ..markup import e, name_of, pairs, table
from ..tables import architecture_html, differing_table, linear_attention
from ..units import MISSING, bits_text, count_text, flops_text, gap_text, seconds_text, signed, small_text
from ..verdict import IGNORED, differing_keys, flatten
from .charts import trunks
from .numbers import spread_of_held_out
from .words import growth_state, share_text

ROLES = {
    "arm": "",
    "scratch": "control: target size from scratch",
    "small": "control: small size, longer",
    "dropped": "control: optimizer state dropped",
    "size": "control: another size",
    "copy": "control: copy, for the noise",
}
OF_ATTENTION = ("qkv_tokens", "proj_tokens", "qkv_scale", "proj_scale")  # of no effect where attention is linear


def span(start: Any, end: Any) -> str:
    """A count, or from one to another where it grows."""
    return count_text(end) if start == end or start is None else f"{count_text(start)} → {count_text(end)}"


def mean_text(mean: float | None, sd: float | None) -> str:
    return MISSING if mean is None else bits_text(mean) + ("" if sd is None else f" ± {e(gap_text(sd))}")


def arms_section(report: dict[str, Any]) -> str:
    budgets = report["budgets"]
    final = any(b["measure"] == "final_bits_per_byte" for b in budgets)
    memory = any(cell["peak_memory_bytes"] for b in budgets for cell in b["arms"])
    sparse = any(arm["parameters_end"].get("active") != arm["parameters_end"].get("total") for arm in report["arms"])
    counts = ["total", *(["active"] if sparse else []), "embedding", "other"]
    head = ["arm", *(f"{share_text(report, b)}<br>{flops_text(b['flops'])}" for b in reversed(budgets))]
    head += ["architecture", "parameters", *counts[1:], "learning rate"]
    grows = any(arm["grows"] for arm in report["arms"])
    head += ["tokens", "tokens per parameter", *(["FLOPs of growing"] if grows else [])]
    head += [*(["memory"] if memory else []), "time"]
    last, rows = budgets[-1], []
    for i, arm in enumerate(report["arms"]):
        beside = f", beside {arm['of']}" if arm["of"] else ""
        role = f"<span class=about>{e(ROLES[arm['role']] + beside)}</span>"
        about = f"<span class=about>{e(arm['description'])}</span>" if arm["description"] else ""
        start, end = arm["parameters"], arm["parameters_end"]
        row = [name_of(report, arm) + (role if ROLES[arm["role"]] else "") + about]
        for budget in reversed(budgets):
            cell = budget["arms"][i]
            text = f"<b>{mean_text(cell['mean'], cell['sd'])}</b>"
            if final:
                text += f"<span class=about>held out {mean_text(cell['held_out_mean'], cell['held_out_sd'])}</span>"
            if len(cell["seeds"]) != len(report["race"]["seeds"]):
                asked = len(report["race"]["seeds"])
                text += f'<span class="tag warn">{len(cell["seeds"])} of {asked} seeds</span>'
            state = growth_state(report, budget, arm["name"])
            row.append(text + (f'<span class="tag">{state}</span>' if state else ""))
        row += [architecture_html(arm), *(span(start.get(key), end.get(key)) for key in counts)]
        row.append(MISSING if arm["learning_rate"] is None else f"{arm['learning_rate']:g}")
        cell = last["arms"][i]
        spent = [sum(v.get("growth_flops", 0) for v in run["growth"]) for run in trunks(arm)]
        grown = flops_text(sum(spent) / len(spent)) if spent and any(spent) else ("0" if spent else MISSING)
        per = MISSING if cell["tokens_per_parameter"] is None else f"{cell['tokens_per_parameter']:.1f}"
        row += [count_text(cell["tokens"]), per, *([grown] if grows else [])]
        row += [bytes_text(cell["peak_memory_bytes"])] if memory else []
        rows.append([*row, seconds_text(cell["seconds"])])
    text = "the final text, on which verdicts rest, and the held-out text" if final else "the held-out text"
    note = (
        f'<p class="small">Bits per byte on {text}: mean ± standard deviation over seeds, each fully decayed at its '
        "budget. Tokens, memory and time are of the whole budget; arms that ran side by side shared a machine."
        f"{'' if sparse else ' All parameters are active.'}</p>"
    )
    numbers = tuple(i for i in range(1, len(head)) if head[i] != "architecture")
    return f"<h2>Arms</h2>{table(head, rows, 'arms', numbers)}{note}"


def rise_html(rises: list[float]) -> str:
    if not rises:
        return MISSING
    if all(abs(rise) < NO_RISE for rise in rises):
        return "none"
    low, mean, high = (e(signed(value)) for value in (min(rises), sum(rises) / len(rises), max(rises)))
    return mean if low == high else f"{mean}<br>{low} to {high}"


def recovery_text(events: list[dict[str, Any]]) -> str:
    """FLOPs until the rise after one growth was made good, over its seeds; one evaluation is all they resolve."""
    found = [v["recovery_flops"] for v in events if v.get("recovery_flops") is not None]
    if len(found) < len(events):
        return f"{len(found)} of {len(events)} seeds got back"
    if not any(found):
        return "none"
    if all(v["recovered_at_next"] for v in events if v["recovery_flops"]):
        return f"by the next evaluation, ≤ {flops_text(max(found))}"
    return flops_text(sum(found) / len(found))


def growth_section(report: dict[str, Any]) -> str:
    """Every growth of the whole-budget runs: what grew, the rise of the loss after it, and what made it good."""
    rows = []
    for arm in report["arms"]:
        runs = [run for run in arm["runs"] if run["share"] == arm["runs"][-1]["share"] and run["growth"]]
        for i in range(max((len(run["growth"]) for run in runs), default=0)):
            events = [run["growth"][i] for run in runs if i < len(run["growth"])]
            event = events[0]
            axes = "<br>".join(f"{e(k)} {e(event['from'].get(k, '?'))} → {e(v)}" for k, v in event["to"].items())
            axes = axes.replace(" ", "\N{NO-BREAK SPACE}")
            rises = [v["rise"] for v in events if v.get("rise") is not None]
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
                    rise_html(rises),
                    e(recovery_text(events)),
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
    note = (
        '<p class="small">Means over seeds of the whole-budget runs, as fine as their evaluations are; of a logit’s '
        f"change the largest of any seed. A rise below {NO_RISE:g} bits per byte is none.</p>"
    )
    more = ["rise of held-out loss", "FLOPs until made good"]
    growths = table(head + more, rows, "", (3, 4, 5, 6, 7, 8))
    return f"<h2>Growths, and what they cost on the way</h2>{growths}{note}"


def bytes_text(value: float | None) -> str:
    return MISSING if value is None else f"{value / 2**20:,.0f} MiB"


def trials_section(report: dict[str, Any]) -> str:
    """A row per arm, a column per learning rate; the chosen one marked, an edge flagged."""
    tuned = [arm for arm in report["arms"] if arm["trials"]]
    rates = sorted({trial["learning_rate"] for arm in tuned for trial in arm["trials"]})
    if not tuned:
        return ""
    rows = []
    for arm in tuned:
        found, row = {trial["learning_rate"]: trial for trial in arm["trials"]}, [name_of(report, arm)]
        for rate in rates:
            row.append(trial_html(found.get(rate), rate == (arm["learning_rate"] or arm["best_rate"])))
        edge = f'<span class="tag warn">at the {arm["edge"]} of the grid</span>' if arm["edge"] else ""
        rows.append([*row, edge])
    race = report["race"]
    note = (
        f'<p class="small">Every trial: bits per byte at {flops_text(race.get("tune_flops"))} '
        f"({100 * race.get('tune_fraction', 0):g} % of the budget), with a seed of its own. The lowest is taken; "
        f"copies and arms with dropped state take the rate of the arm that they stand beside.{close_trials(report)}</p>"
    )
    head = ["arm", *(f"{rate:g}" for rate in rates), ""]
    return f"<h2>Learning-rate trials</h2>{table(head, rows, 'trials', tuple(range(1, len(rates) + 1)))}{note}"


def close_trials(report: dict[str, Any]) -> str:
    """Of how many arms the best rate leads the next by less than two runs that start alike differ by chance, going by
    the budget nearest to the trials' length."""
    length = report["race"].get("tune_fraction")
    if not length:
        return ""
    budget = min(report["budgets"], key=lambda b: abs(b["share"] - length))
    spread = spread_of_held_out(report, budget["share"])
    s = spread.s_same or spread.s
    ended = [[t["bits_per_byte"] for t in arm["trials"] if t["status"] == "finished"] for arm in report["arms"]]
    bits = [sorted(value for value in values if value is not None) for values in ended]
    leads = [found[1] - found[0] for found in bits if len(found) > 1]
    if not leads or not s:
        return ""
    near, by = math.sqrt(2) * s, share_text(report, budget)
    close = sum(lead < near for lead in leads)
    so = ": with another seed the next might have been taken" if close else ""
    return (
        f" In {close or 'none'} of {len(leads)} arms the best leads the next by less than {e(gap_text(near))}, one "
        f"deviation of such a difference at {by}{so}."
    )


def trial_html(trial: dict[str, Any] | None, chosen: bool) -> str:
    if trial is None:
        return MISSING
    if trial["status"] == "failed":
        return "diverged"
    if trial["status"] != "finished":
        return e(trial["status"])
    bits = bits_text(trial["bits_per_byte"])
    return f'<b class="chosen">✓ {bits}</b>' if chosen else bits


def config_of(arm: dict[str, Any]) -> dict[str, Any]:
    """The model as transformers has it, but for what has no effect in it."""
    hidden = OF_ATTENTION if linear_attention(arm) else ()
    return {key: value for key, value in (arm.get("config") or {}).items() if key not in hidden}


def hyperparameters(report: dict[str, Any]) -> str:
    """What differs, arm by arm, then what all share, once."""
    arms = [arm for arm in report["arms"] if arm["recipe"]]
    # The model as transformers has it, with every default; races of before this was kept know the recipe alone.
    told = [{"recipe": arm["recipe"], "config": {"config": config_of(arm)}} for arm in arms]
    keys = report["differing_keys"] + differing_keys([each["config"] for each in told])
    flat = [flatten(each["recipe"] | each["config"]) for each in told]
    out = ["<h2>Every hyperparameter</h2>"]
    shared = {k: v for k, v in flat[0].items() if k not in keys and k.split(".")[0] not in IGNORED} if flat else {}
    values = {key: [f[key] for f in flat if key in f] for key in keys}
    keys = [key for key in keys if any(value not in (None, "") for value in values[key])]
    growing = sum(any(key.startswith("growth.0.") for key in f) for f in flat)
    common = {
        key: values[key][0]
        for key in keys
        if key.startswith("growth.") and len(values[key]) == growing and all(v == values[key][0] for v in values[key])
    }
    keys = [key for key in keys if key not in common]
    if keys:
        out.append('<p class="small">What differs between the arms, in the recipe of each one’s first seed.</p>')
        out.append(differing_table(report, arms, flat, keys))
    if common:
        title = f"<summary>What all arms that grow share: {len(common)} keys</summary>"
        out.append(f"<details>{title}{pairs(common)}</details>")
    if shared:
        out.append(f"<details><summary>What all arms share: {len(shared)} keys</summary>{pairs(shared)}</details>")
    return "".join(out)
