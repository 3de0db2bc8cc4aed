"""A full race through the statistics: cells, verdicts, FLOPs to a loss, sizes, growths, trials.

All verdicts of a budget rest on one text: the final one where the race has it and a run at that budget was tested
on it (docs/fairness.md, rule 26), else the held-out one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Hashable
from dataclasses import asdict
from typing import Any

from ...statistics import (
    Curve,
    Difference,
    Spread,
    Table,
    compute_optimal,
    copy_noise,
    difference,
    differences,
    false_alarms,
    flops_ratios,
    mean_sd,
    own_interval,
    power_law,
    recovery,
    spread_of,
)

FROM_SCRATCH = ("scratch", "small", "size")  # the roles of controls that are trained from scratch
THRESHOLDS = 3
# Of a recipe's model: what its initial weights do not depend on, but for a factor of all values of a table (theta).
NOT_IN_WEIGHTS = (
    "theta",
    "hidden_act",
    "router_aux_loss_coef",
    "max_position_embeddings",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
    "attention_dropout",
)


def calculate(report: dict[str, Any]) -> dict[str, Any]:
    """The report with every number that the page shows; each is None or absent where its runs are missing."""
    arms, race = report["arms"], report["race"]
    for arm in arms:
        judge_trials(arm)
        note_growths(arm)
    report["budgets"] = [budget_of(report, share) for share in race["budgets"]]
    report["reach"] = reach(report, reference_of(report), spread_out(race["budgets"], THRESHOLDS))
    report["power_laws"] = {arm["name"]: law_of(report, arm) for arm in arms}
    report["cosine"] = cosine_check(report)
    report["copies"] = [
        {"share": b["share"], **copy_noise(values_at(report, b["share"]), arm["name"], arm["of"])}
        for arm in arms
        if arm["role"] == "copy" and any(other["name"] == arm["of"] for other in arms)
        for b in report["budgets"]
    ]
    return report


# --- cells ---


def runs_at(arm: dict[str, Any], share: float) -> list[dict[str, Any]]:
    return [run for run in arm["runs"] if run["share"] == share]


def measure_at(report: dict[str, Any], share: float) -> str:
    """ "final_bits_per_byte" or "bits_per_byte": what the verdicts of a budget rest on."""
    asked = report["race"].get("final_text")
    tested = any(run["final_bits_per_byte"] is not None for arm in report["arms"] for run in runs_at(arm, share))
    return "final_bits_per_byte" if asked and tested else "bits_per_byte"


def measure_of_all(report: dict[str, Any]) -> str:
    """What curves over budgets are drawn of: one text for all of them."""
    measures = {measure_at(report, share) for share in report["race"]["budgets"]}
    return measures.pop() if len(measures) == 1 else "bits_per_byte"


def value_of(run: dict[str, Any], measure: str) -> float | None:
    return run[measure] if run["status"] == "finished" else None


def values_at(report: dict[str, Any], share: float, measure: str = "") -> Table:
    """arm -> seed -> its result at a budget, by what the verdicts there rest on unless a measure is named."""
    measure = measure or measure_at(report, share)
    table: Table = {}
    for arm in report["arms"]:
        found = {run["seed"]: value_of(run, measure) for run in runs_at(arm, share)}
        table[arm["name"]] = {seed: value for seed, value in found.items() if value is not None}
    return table


def spread_of_held_out(report: dict[str, Any], share: float) -> Spread:
    """The scatter of runs on the text that trials are judged by, at a budget."""
    return spread_of(values_at(report, share, "bits_per_byte"), starts_of(report))


def text_interval(report: dict[str, Any], share: float, pair: Difference) -> dict[str, float]:
    """95 % interval of a pair's difference over the stretches of the final text, which are its sample: each the mean of
    the seeds that both have. Empty where runs were not judged in stretches."""
    found: dict[str, dict[int, list[float]]] = {}
    for arm in report["arms"]:
        if arm["name"] in (pair.arm, pair.other):
            found[arm["name"]] = {run["seed"]: run.get("final_stretches") or [] for run in runs_at(arm, share)}
    both = [(found[pair.arm][seed], found[pair.other][seed]) for seed in pair.seeds]
    if len({len(bits) for of in both for bits in of}) > 1:  # some of the runs were judged by an older version
        return {}
    apart = [[a - b for a, b in zip(*of, strict=True)] for of in both]
    _, low, high = own_interval([sum(of) / len(of) for of in zip(*apart, strict=True)])
    return {} if low is None or high is None else {"text_low": low, "text_high": high}


def mean_of(runs: list[dict[str, Any]], key: str) -> float | None:
    return mean_sd([run[key] for run in runs if run[key] is not None])[0]


def starts_of(report: dict[str, Any]) -> dict[str, Hashable]:
    """What an arm's weights start as at each seed: models of which all is the same that decides on them (rule 20), as
    their recipes say it or as their configurations have it, where one recipe leaves to follow what another says.

    A copy has a seed of its own for its weights beside that of its text.
    """
    groups: list[tuple[set[str], list[str]]] = []  # how models are said, and the arms of which that is so
    for arm in report["arms"]:
        model, train, data = (arm["recipe"].get(key) or {} for key in ("model", "train", "data"))
        shift = train.get("seed", 0) - data.get("seed", 0)
        own = shift, arm["architecture"], *map(model.get, ("checkpoint", "rank", "rank_start"))
        said = [model, arm.get("config") or {}] if model else []
        about = [{k: v for k, v in each.items() if k not in NOT_IN_WEIGHTS and v is not None} for each in said]
        keys = {json.dumps([*own, each], sort_keys=True) for each in about if each}
        same = [group for group in groups if group[0] & keys]
        joined = keys.union(*(ways for ways, _ in same)), [name for _, names in same for name in names] + [arm["name"]]
        groups = [group for group in groups if group not in same] + [joined]
    return {name: names[0] for _, names in groups for name in names}


def budget_of(report: dict[str, Any], share: float) -> dict[str, Any]:
    table = values_at(report, share)
    spread, cells = spread_of(table, starts_of(report)), []
    for arm in report["arms"]:
        finished = [run for run in runs_at(arm, share) if run["status"] == "finished"]
        mean, sd = mean_sd(list(table[arm["name"]].values()))
        held_out, held_out_sd = mean_sd([run["bits_per_byte"] for run in finished])
        memory = [run["peak_memory_bytes"] for run in finished if run["peak_memory_bytes"] is not None]
        total = mean_sd([run["parameters"]["total"] for run in finished if run["parameters"].get("total")])[0]
        tokens = mean_of(finished, "tokens")
        cells.append(
            {
                "arm": arm["name"],
                "seeds": sorted(table[arm["name"]]),
                "values": [table[arm["name"]][seed] for seed in sorted(table[arm["name"]])],
                "mean": mean,
                "sd": sd,
                "held_out_mean": held_out,
                "held_out_sd": held_out_sd,
                "flops": mean_of(finished, "flops"),
                "seconds": mean_of(finished, "seconds"),
                "tokens": tokens,
                "peak_memory_bytes": max(memory, default=None),
                "parameters": total,
                "tokens_per_parameter": tokens / total if tokens and total else None,
                "growths": max((len(growths_of(arm, run)) for run in finished), default=0),
            }
        )
    compared = [d for d in differences(table, spread) if d.value is not None]
    return {
        "share": share,
        "flops": report["race"]["flops"] * share / report["race"]["budgets"][-1],
        "measure": measure_at(report, share),
        "s": spread.s,
        "df": spread.df,
        "s_same": spread.s_same,
        "df_same": spread.df_same,
        "arms": cells,
        "pairs": [{**asdict(d), **text_interval(report, share, d)} for d in compared],
        "told_apart": sum(d.word != "not told apart" for d in compared),
        "expected_false_alarms": false_alarms(len(compared)),
        "compute_optimal": optimal_sizes(report, cells),
    }


def cell_of(budget: dict[str, Any], arm: str) -> dict[str, Any]:
    return next(cell for cell in budget["arms"] if cell["arm"] == arm)


def optimal_sizes(report: dict[str, Any], cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per kind of model that controls are of, the best of the sizes trained from scratch, arms that do not grow and are
    no control among them; a model of thin factors is none."""
    groups: dict[tuple[str, str], dict[str, tuple[float, float]]] = {}
    kinds = {kind_of(arm) for arm in report["arms"] if arm["role"] in FROM_SCRATCH}
    for arm, cell in zip(report["arms"], cells, strict=True):
        whole = from_scratch(arm) and not is_thin(arm)
        scratch = whole and (arm["role"] in FROM_SCRATCH or arm["role"] == "arm" and kind_of(arm) in kinds)
        if scratch and cell["mean"] is not None and cell["parameters"]:
            groups.setdefault(kind_of(arm), {})[arm["name"]] = (cell["parameters"], cell["mean"])
    found = [(kind, sizes, compute_optimal(sizes)) for kind, sizes in groups.items()]
    return [{"architecture": kind[0], "of": list(sizes), **best} for kind, sizes, best in found if best]


def from_scratch(arm: dict[str, Any]) -> bool:
    return not arm["grows"] and not (arm["recipe"].get("model") or {}).get("checkpoint")


def is_thin(arm: dict[str, Any]) -> bool:
    """Whether its matrices are factors of low rank."""
    return bool((arm["recipe"].get("model") or {}).get("rank"))


def kind_of(arm: dict[str, Any]) -> tuple[str, str]:
    """What models of several sizes have in common: all of a configuration but numbers, which may follow from sizes."""
    config, numbers = (arm.get("config") or {}).items(), int | float | list
    chosen = {key: value for key, value in config if isinstance(value, bool) or not isinstance(value, numbers)}
    return arm["architecture"], json.dumps(chosen, sort_keys=True)


# --- FLOPs: to reach a loss, as a power law ---


def curves_of(report: dict[str, Any], arm: dict[str, Any]) -> dict[int, Curve]:
    """seed -> its decayed results over FLOPs."""
    measure, curves = measure_of_all(report), {}
    for seed in report["race"]["seeds"]:
        ended = [run for run in arm["runs"] if run["seed"] == seed and value_of(run, measure) is not None]
        if ended:
            curves[seed] = [(run["flops"], run[measure]) for run in ended]
    return curves


def reference_of(report: dict[str, Any]) -> dict[str, Any]:
    return next(arm for arm in report["arms"] if arm["name"] == report["race"]["reference"])


def spread_out(values: list[Any], most: int) -> list[Any]:
    """The first, the last, and evenly between: at most so many of them."""
    if len(values) <= most:
        return values
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def reach(report: dict[str, Any], reference: dict[str, Any], shares: list[float]) -> list[dict[str, Any]]:
    """At each of some budgets, each arm's FLOPs over the reference's to reach the reference's loss there."""
    measure = measure_of_all(report)
    others = [arm for arm in report["arms"] if arm is not reference]
    curves, out = {arm["name"]: curves_of(report, arm) for arm in others}, []
    starts = starts_of(report)
    for share in shares:
        ended = [run for run in runs_at(reference, share) if value_of(run, measure) is not None]
        targets = {run["seed"]: (run["flops"], run[measure]) for run in ended}
        table = values_at(report, share)
        spread = spread_of(table, starts)
        losses: dict[str, Difference] = {
            arm["name"]: difference(table, arm["name"], reference["name"], spread) for arm in others
        }
        out.append(
            {
                "share": share,
                "flops": mean_sd([flops for flops, _ in targets.values()])[0],
                "loss": mean_sd([loss for _, loss in targets.values()])[0],
                "ratios": {name: asdict(r) for name, r in flops_ratios(curves, targets, losses, starts).items()},
            }
        )
    return out


def growths_of(arm: dict[str, Any], run: dict[str, Any]) -> list[dict[str, Any]]:
    """The growths behind a run's result: its own, and those of its trunk before it branched off."""
    trunk = next((r for r in arm["runs"] if r["seed"] == run["seed"] and r["share"] == arm["runs"][-1]["share"]), run)
    if trunk is run or not run["curve"]:
        return run["growth"]
    began = min((flops for flops in run["curve"]["flops"] if flops is not None), default=0.0)
    size = run["parameters"].get("total")  # tells apart a branch that starts just before a growth from one just after
    behind = [v for v in trunk["growth"] if v["flops"] <= began]
    return [v for v in behind if v["flops"] < began or v["parameters_after"] == size] + run["growth"]


def law_of(report: dict[str, Any], arm: dict[str, Any]) -> dict[str, Any]:
    """The power law of an arm's results, or the reason why there is none; of those with all of its growths behind them,
    since before one it is another model."""
    measure, growths = measure_of_all(report), max((len(growths_of(arm, run)) for run in arm["runs"]), default=0)
    curves: dict[int, Curve] = {}
    for share in report["race"]["budgets"]:
        ended = [run for run in runs_at(arm, share) if value_of(run, measure) is not None]
        ended = [run for run in ended if len(growths_of(arm, run)) == growths]
        flops = mean_of(ended, "flops")  # runs end at whole steps; one x for all seeds
        for run in ended:
            curves.setdefault(run["seed"], []).append((flops or 0.0, run[measure]))
    fit = power_law(curves)
    return {"reason": fit} if isinstance(fit, str) else {"reason": None, **asdict(fit)}


# --- one arm at a time ---


def judge_trials(arm: dict[str, Any]) -> None:
    """Rule 13: the lowest of the finished trials, and whether it lies at an edge of the grid."""
    trials = [t for t in arm["trials"] if t["status"] == "finished" and t["bits_per_byte"] is not None]
    best = min(trials, key=lambda t: t["bits_per_byte"], default=None)
    arm["best_rate"] = best["learning_rate"] if best else None
    rates = sorted(t["learning_rate"] for t in arm["trials"])
    edges = {rates[0]: "lowest", rates[-1]: "highest"} if len(rates) > 1 else {}
    arm["edge"] = edges.get(arm["best_rate"], "")


def note_growths(arm: dict[str, Any]) -> None:
    """Writes rise, recovery_flops and recovered_at_next into each growth of each run, from its held-out curve."""
    for run in arm["runs"]:
        if not run["curve"]:
            continue
        points = list(zip(*(run["curve"][k] for k in ("step", "flops", "bits_per_byte")), strict=True))
        ends = [event["step"] for event in run["growth"][1:]] + [math.inf]
        for event, until in zip(run["growth"], ends, strict=False):
            at = [p for p in points if p[0] == event["step"]]  # one before the growth, one right after it
            earlier = [p for p in points if p[0] < event["step"]]
            after = [p for p in points if event["step"] < p[0] < until]
            if not at + earlier:
                continue
            before, first = (at[0], at[1:]) if at else (earlier[-1], [])
            seen = [(flops, bits) for _, flops, bits in (*first, *after) if bits is not None]
            found = recovery(before[2], event["flops"], seen) if before[2] is not None else recovery(0.0, 0.0, [])
            event |= {"rise": found["rise"], "recovery_flops": found["flops"], "recovered_at_next": found["at_next"]}


def cosine_check(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Per arm and seed with a cosine run: both schedules at the largest budget."""
    share, out = report["race"]["budgets"][-1], []
    measure = measure_at(report, share)
    for arm in report["arms"]:
        for run in arm["cosine"]:
            key = measure if run[measure] is not None else "bits_per_byte"
            same = next((r for r in runs_at(arm, share) if r["seed"] == run["seed"]), None)
            wsd = value_of(same, key) if same else None
            more = {"status": run["status"], "measure": key, "cosine": value_of(run, key), "wsd": wsd}
            out.append({"arm": arm["name"], "seed": run["seed"], **more})
    return out
