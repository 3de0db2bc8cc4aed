"""Make this record again: nested training against separate sizes and against cutting a plain model; and whether the
oldest rows of a grown model are the most important.

    python PATH/remake.py TRAIN HELD_OUT FINAL OUT --jobs 2     about an hour on two cores; the texts: records/README.md

What has ended is read off OUT, so a stopped run goes on. `--fraction 0.02` is a miniature of all of it. Ends by writing
OUT/report.json and OUT/report.png and by printing the tables. The design, fixed before the first result:

The model is the target of recipes/growth_tokens_long_cpu.toml, preset modern: hidden size 96, 4 layers, 480 rows a
layer; bytes, windows of 256, batch 8, warm-up 50 steps, the last 30 % of FLOPs decay. Sizes are 480, 240, 120, 60, 30
and 15 rows a layer, F is 0.9e13 training FLOPs, seeds are 0, 1 and 2, each for initial weights, order of text, rows.

    power_of_two, uniform    nested training down to 1/32, F in all; its six prefixes are measured
    separate-N               N rows, trained for as many steps as power_of_two spent on that size, so for as many FLOPs:
                             the six cost what it costs. The aim: nested within 0.05 bits per byte of each
    long-N                   the harder view, on seed 0 alone: as many steps as power_of_two took in all, so on all the
                             text that it saw; the six cost six times as much
    plain                    480 rows, not nested, F; cut to the five smaller sizes by each rule of docs/shrink.md and,
                             the control, to a random choice of rows; no training after the cut
    zero_keys, zero_values   grown from 120 to 480 rows at a tenth of F, F in all; cut to 240, 120 and 60 by the same
                             rules and, a control too, by reverse order: the newest stay

Every arm is tuned on one grid of peak rates, 2e-3, 4e-3, 8e-3, at 15 % of its length on another seed, by bits per byte
on HELD_OUT; if any best lies at an edge the grid grows there by a factor of 2 for all arms, once. The two views of a
size share a rate, tuned at 15 % of the longer one's steps (nine tenths of the shorter one's); 240, 60 and 15 rows take
that of 480, 120 and 30. Rules that look at a text see 98,304 tokens of TRAIN. A row's age is set against its score by
Spearman's rank correlation, the mean over layers. Nothing is chosen by FINAL, by which all is judged.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from tokenformer import evaluate, load_checkpoint, load_recipe, runs, train
from tokenformer.checkpoint import find_checkpoint
from tokenformer.data import Batches, prepare
from tokenformer.environment import environment
from tokenformer.nested import powers, share_at
from tokenformer.plan import plan
from tokenformer.race.final import final_windows
from tokenformer.race.jobs import FINAL, bits_of
from tokenformer.recipe import Recipe, recipe_from_dict, recipe_to_dict
from tokenformer.rows import RULES, scores
from tokenformer.shrink import cut
from tokenformer.statistics import difference, mean_sd, own_interval, spread_of
from tokenformer.train import Diverged, Stopped

REPOSITORY = Path(__file__).resolve().parents[2]
ROWS, SMALLEST, SMALL_ROWS, GROW_AT = 480, 1 / 32, 120, 0.1
SIZES = [round(ROWS * share) for share in powers(SMALLEST)]
GROWN_SIZES = [240, 120, 60]
FLOPS, WARM_UP, VALID_TOKENS, FINAL_TOKENS, CALIBRATION_BATCHES = 0.9e13, 50, 65_536, 270_000, 48
SEEDS, LONG_SEEDS, TUNE_SEED, CALIBRATION_SEED = (0, 1, 2), (0,), 1000, 2000
RATES, FACTOR, TUNE_FRACTION, WITHIN = [2e-3, 4e-3, 8e-3], 2, 0.15, 0.05
NESTED, GROWN = ("power_of_two", "uniform"), ("zero_keys", "zero_values")
WHOLE_BUDGET = (*NESTED, "plain", *GROWN)
TUNED = (*WHOLE_BUDGET, *(f"separate-{rows}" for rows in SIZES[::2]))
PLAIN_RULES = (*RULES, "random")
GROWN_RULES = (*PLAIN_RULES, "reverse")


@dataclass(frozen=True)
class Job:
    """One run, in a folder of its own, and what is measured of it on FINAL: for each rule, how many rows are kept."""

    arm: str
    seed: int
    folder: Path
    recipe: Recipe
    final: tuple[str, int, int] | None  # the text, its tokens, batches to rank rows on; None of a trial
    cuts: dict[str, list[int]] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        return bits_of(self.folder, final=self.final is not None) is not None

    @property
    def work(self) -> float:
        """FLOPs of training and about those of measuring, by which the time left is told."""
        planned = plan(self.recipe, 256)
        tokens = self.final[1] * (1 + sum(map(len, self.cuts.values()))) if self.final else 0
        return planned.flops + tokens * planned.phases[-1].flops_per_step / planned.tokens_per_step / 3


@dataclass(frozen=True)
class Record:
    """The texts, the folder, and the share of all lengths."""

    train: str
    held_out: str
    final: str
    out: Path
    fraction: float

    def scaled(self, count: int, least: int = 1) -> int:
        return max(least, round(count * self.fraction))

    def job(self, arm: str, seed: int, rate: float, trial: bool = False) -> Job:
        """The run of an arm, at its whole length or as a trial of the rate."""
        kind, _, size = arm.partition("-")
        name = f"{arm}/tune/lr-{rate:g}" if trial else f"{arm}/seed-{seed}"
        table = recipe_to_dict(load_recipe(REPOSITORY / "recipes/growth_tokens_long_cpu.toml"))
        table |= {"name": name, "description": "", "arm": [], "race": None}
        table["model"]["ffn_tokens"] = int(size) if size else SMALL_ROWS if kind in GROWN else ROWS
        table["data"] |= {"source": self.train, "valid_source": self.held_out, "seed": seed}
        table["data"]["valid_tokens"] = self.scaled(VALID_TOKENS, least=256)
        table["train"] |= {"learning_rate": rate, "seed": seed, "warmup_steps": self.scaled(WARM_UP)}
        table["train"] |= {"evaluate_every": 10**6, "keep_checkpoints": 1}
        cuts: dict[str, list[int]] = dict.fromkeys(PLAIN_RULES, SIZES[1:]) if kind == "plain" else {}
        if kind in NESTED:
            table["train"] |= {"nested": kind, "nested_smallest": SMALLEST}
            cuts = {"order": SIZES[1:]}
        if kind in GROWN:
            grow = {"at_fraction": GROW_AT, "operator": kind, "to": {"ffn_tokens": ROWS}, "seed": seed}
            table["growth"], cuts = [grow], dict.fromkeys(GROWN_RULES, GROWN_SIZES)
        if kind in WHOLE_BUDGET:
            table["train"]["flops"] = FLOPS * self.fraction * (TUNE_FRACTION if trial else 1)
        else:
            table["train"] |= {"flops": None, "steps": self.steps(kind, int(size), seed, trial)}
        final = (self.final, self.scaled(FINAL_TOKENS, least=256), self.scaled(CALIBRATION_BATCHES))
        recipe = recipe_from_dict(table, "remake.py")
        return Job(arm, seed, self.out / name, recipe, None if trial else final, cuts)

    @functools.cached_property
    def nested_steps(self) -> int:
        return plan(self.job("power_of_two", SEEDS[0], RATES[0]).recipe, 256).steps

    def steps(self, kind: str, rows: int, seed: int, trial: bool) -> int:
        """Of a separate model: those that power_of_two took at its size; of a long one, all; of a trial, a part."""
        if trial or kind == "long":
            return max(1, round(TUNE_FRACTION * self.nested_steps)) if trial else self.nested_steps
        shares = [share_at("power_of_two", SMALLEST, seed, step) for step in range(self.nested_steps)]
        return shares.count(rows / ROWS)

    def trials(self, rates: list[float]) -> list[Job]:
        return [self.job(arm, TUNE_SEED, rate, trial=True) for rate in rates for arm in TUNED]

    def headlines(self, best: dict[str, float]) -> list[Job]:
        arms = [(arm, seed) for arm in WHOLE_BUDGET for seed in SEEDS]
        for rows in SIZES:
            arms += [(f"separate-{rows}", seed) for seed in SEEDS] + [(f"long-{rows}", seed) for seed in LONG_SEEDS]
        return [self.job(arm, seed, best[tuned_as(arm)]) for arm, seed in arms]


def tuned_as(arm: str) -> str:
    """The arm whose learning rate it takes: its own, or that of the nearest tuned size that is not smaller."""
    kind, _, rows = arm.partition("-")
    return f"separate-{SIZES[SIZES.index(int(rows)) // 2 * 2]}" if rows else kind


# --- the work, side by side ---


def do(job: Job) -> Job:
    """Train the run, from where it was stopped, then measure it. A trial may diverge; nothing else may."""
    try:
        train(job.recipe, job.folder, resume=True, say=None)
    except Diverged:
        if job.final:
            raise
    except Stopped:  # its checkpoint is written, and the parent is gone: take up nothing more
        os._exit(1)
    if job.final:
        runs.write_json(job.folder / FINAL, measured(job, *job.final))
    return job


def measured(job: Job, text: str, tokens: int, batches: int) -> dict[str, Any]:
    """Bits per byte on FINAL of the whole model and of its cuts; of a grown one how a row's age and score go together.

    old_among_first: of the rows that a rule ranks first, as many as there were before growth, the share that is old.
    """
    model, _ = load_checkpoint(find_checkpoint(job.folder))
    windows, data = final_windows(job.recipe, text, tokens), job.recipe.data
    stream = Batches(prepare(data, 0).train, data.sequence_length, data.batch_size, CALIBRATION_SEED)
    found: dict[str, Any] = {"final_bits_per_byte": evaluate(model, windows)["bits_per_byte"], "cut": {}, "age": {}}
    for rule, sizes in job.cuts.items():
        scored = row_scores(model, rule, [stream[i] for i in range(batches)], job.seed)
        ranked = {place: torch.sort(each, descending=True, stable=True).indices for place, each in scored.items()}
        smaller = {rows: cut(model, {"ffn_tokens": rows}, ranked).model for rows in sizes}
        found["cut"][rule] = {rows: evaluate(each, windows)["bits_per_byte"] for rows, each in smaller.items()}
        if job.recipe.growth:  # it appends: the rows of before are the first
            old = np.arange(ROWS) < SMALL_ROWS
            correlations = [spearmanr(old, each).statistic for each in scored.values()]
            among = [old[rows[:SMALL_ROWS]].mean() for rows in ranked.values()]
            found["age"][rule] = {"spearman": float(np.mean(correlations)), "old_among_first": float(np.mean(among))}
    return found


def row_scores(model: Any, rule: str, batches: list[torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """The scores of a rule of the library, or of one of the controls, for the rows of each memory."""
    if rule == "random":
        draw = torch.Generator().manual_seed(seed)
        return {place: torch.rand(len(each), generator=draw) for place, each in scores(model, "order").items()}
    if rule == "reverse":
        return {place: -each for place, each in scores(model, "order").items()}
    return scores(model, rule, batches)


def start_worker(parent: int) -> None:
    """One thread; and when the parent is gone, a run stops with a checkpoint and the process ends."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def work_off(jobs: list[Job], processes: int, later: float = 0.0) -> None:
    """Do what is not done yet, the longest first. `later`: the work that comes after these, for the time left."""
    waiting = {job.folder: job for job in jobs if not job.done}
    work = {folder: job.work for folder, job in waiting.items()}
    count, left, done, began = len(jobs) - len(work), later + sum(work.values()), 0.0, time.monotonic()
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), start_worker, (os.getpid(),))
    try:
        longest_first = sorted(waiting, key=lambda folder: -work[folder])
        for future in as_completed([pool.submit(do, waiting[folder]) for folder in longest_first]):
            job = future.result()
            count, left, done = count + 1, left - work[job.folder], done + work[job.folder]
            minutes, bits = left / done * (time.monotonic() - began) / 60, bits_of(job.folder)
            told = f"{count} of {len(jobs)} runs · about {minutes:.0f} min left"
            print(f"{told} · {job.recipe.name}: {bits:.4f} bits per byte held out", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)


def tune(record: Record, processes: int) -> tuple[list[float], dict[str, float]]:
    """The grid as far as it was extended, and the best rate of each tuned arm; of equal ones the lower."""
    rates, best = RATES, dict.fromkeys(TUNED, RATES[0])
    later = sum(job.work for job in record.headlines(best) if not job.done)
    while True:
        work_off(record.trials(rates), processes, later)
        for arm in TUNED:
            tried = [(bits_of(record.job(arm, TUNE_SEED, rate, trial=True).folder), rate) for rate in rates]
            best[arm] = min((bits, rate) for bits, rate in tried if bits is not None)[1]
        lower = [rates[0] / FACTOR] if rates[0] in best.values() else []
        higher = [rates[-1] * FACTOR] if rates[-1] in best.values() else []
        if rates is not RATES or not lower + higher:
            return rates, best
        rates = [*lower, *rates, *higher]


# --- the report ---


def texts_of(record: Record) -> dict[str, Any]:
    """Each text by its hash, and whether it is the one that records/README.md names."""
    table = (REPOSITORY / "records/README.md").read_text(encoding="utf-8")
    known = dict(re.findall(r"^\| `(\w+)\.txt` .*`([0-9a-f]{64})`", table, re.MULTILINE))
    hashes = {name: hashlib.sha256(Path(getattr(record, name)).read_bytes()).hexdigest() for name in known}
    for name in known:
        if hashes[name] != known[name]:
            print(f"{name}: is not the text of records/README.md, so its numbers are not comparable", flush=True)
    return {name: {"sha256": sha256, "as_in_records": sha256 == known[name]} for name, sha256 in hashes.items()}


def arms_of(record: Record, rates: list[float], best: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Every run and every trial, by arm, each as records/compare.py reads it."""
    arms: dict[str, dict[str, Any]] = {}
    for job in record.headlines(best) + record.trials(rates):
        about = {"name": job.arm, "tuned_as": tuned_as(job.arm), "learning_rate": best[tuned_as(job.arm)]}
        arm = arms.setdefault(job.arm, {**about, "trials": [], "runs": []})
        result = runs.read_json(job.folder / runs.RESULT)
        numbers = {key: result[key] for key in ("bits_per_byte", "flops", "steps", "tokens", "seconds", "parameters")}
        if job.final:
            arm["runs"].append({"seed": job.seed, "share": 1.0, **numbers, **runs.read_json(job.folder / FINAL)})
        else:
            bits = None if result.get("diverged") else result["bits_per_byte"]
            arm["trials"].append({"learning_rate": job.recipe.train.learning_rate, **numbers, "bits_per_byte": bits})
    return arms


Curve = dict[int, dict[int, float]]  # rows -> seed -> bits per byte on FINAL


def curves_of(arms: dict[str, dict[str, Any]]) -> dict[str, Curve]:
    """Against rows: both nested arms, both families, and "ARM by RULE" of plain and of grown models."""
    curves: dict[str, Curve] = {}
    for name, run in ((name, run) for name, arm in arms.items() for run in arm["runs"]):
        kind, _, size = name.partition("-")
        parts = {kind if kind in NESTED else f"{kind} by {rule}": points for rule, points in run["cut"].items()}
        for curve, points in (parts or {kind: {}}).items():
            for rows, bits in {size or ROWS: run["final_bits_per_byte"], **points}.items():
                curves.setdefault(curve, {}).setdefault(int(rows), {})[run["seed"]] = bits
    return curves


def best_rule(curves: dict[str, Curve], sizes: list[int]) -> str:
    """Of the curves of plain, the lowest over these sizes, which is chosen on FINAL, in favour of cutting."""
    names = [f"plain by {rule}" for rule in PLAIN_RULES]
    return min(names, key=lambda name: sum(np.mean([*curves[name][rows].values()]) for rows in sizes))


def comparisons(curves: dict[str, Curve]) -> list[dict[str, Any]]:
    """At each size, nested minus the others. low, high: 95 %, the deviation pooled over nested and separate arms;
    own_low, own_high: of the pairs alone."""
    found = []
    for rows in SIZES:
        names = (*NESTED, "separate", "long", best_rule(curves, [rows]))
        table = {name: curves[name][rows] for name in names}
        spread = spread_of({name: table[name] for name in names[:3]})
        pairs = [difference(table, nested, other, spread) for nested in NESTED for other in names[2:]]
        pairs.append(difference(table, *NESTED, spread))
        found += [{"rows": rows, **asdict(pair)} for pair in pairs]
    return found


def cut_comparisons(curves: dict[str, Curve]) -> list[dict[str, Any]]:
    """Of each model that is cut, at each size: every rule minus random, and every other minus order, by the pairs
    alone: the deviations of the rules differ too much to be pooled."""
    found = []
    models = [("plain", PLAIN_RULES, SIZES[1:]), *((kind, GROWN_RULES, GROWN_SIZES) for kind in GROWN)]
    for kind, rules, sizes in models:
        for rows in sizes:
            table = {rule: curves[f"{kind} by {rule}"][rows] for rule in rules}
            pairs = [(rule, "random") for rule in rules if rule != "random"]
            for rule, other in [*pairs, *((rule, "order") for rule in rules if rule not in ("order", "random"))]:
                values = [table[rule][seed] - table[other][seed] for seed in sorted(table[rule])]
                value, low, high = own_interval(values)
                pair = {"model": kind, "rows": rows, "rule": rule, "other": other}
                found.append({**pair, "value": value, "own_low": low, "own_high": high})
    return found


def tables_of(report: dict[str, Any], arms: dict[str, Any], curves: dict[str, Curve]) -> str:
    """The tables of the record's README, in Markdown."""

    def cell(values: Any) -> str:
        mean, sd = mean_sd(list(values))
        return f"{mean:.3f}" if sd is None else f"{mean:.3f} ± {sd:.3f}"

    def table(title: str, head: list[Any], lines: list[list[Any]]) -> str:
        ruled = [head, ["---"] * len(head), *lines]
        return "\n".join([f"\n{title}\n", *(f"| {' | '.join(map(str, line))} |" for line in ruled)])

    def compared(rows: int, arm: str, other: str, value: float, own_low: Any, own_high: Any, **more: Any) -> list[Any]:
        own, sure = "one seed", ""
        if own_low is not None:
            own = f"{own_low:+.3f} to {own_high:+.3f}"
            sure = "yes" if own_high <= WITHIN else "no" if own_low > WITHIN else "left open"
        return [rows, f"{arm} - {other}", f"{value:+.3f}", own, "yes" if value <= WITHIN else "no", sure, more["word"]]

    def interval(pair: dict[str, Any]) -> str:
        return "{value:+.3f} [{own_low:+.3f} to {own_high:+.3f}]".format(**pair)

    def age(arm: str, rule: str) -> str:
        found = [run["age"][rule] for run in arms[arm]["runs"]]
        return f"{cell(each['spearman'] for each in found)}; {cell(each['old_among_first'] for each in found)}"

    lines = [[name, *(cell(c[rows].values()) if rows in c else "" for rows in SIZES)] for name, c in curves.items()]
    parts = [table("Bits per byte on FINAL, mean and standard deviation over seeds", ["rows a layer", *SIZES], lines)]
    head = ["rows", "pair", "mean", "95 %, paired", f"mean within {WITHIN}", "interval within", "pooled, against 0"]
    parts.append(table("Nested minus the other", head, [compared(**each) for each in report["comparisons"]]))
    cuts = [[c["model"], c["rows"], f"{c['rule']} - {c['other']}", interval(c)] for c in report["cuts"]]
    parts.append(table("Rules of cutting held against each other", ["model", "rows", "pair", "mean, 95 %"], cuts))
    title = f"Rank correlation of a row's age with its score; share of old rows among the first {SMALL_ROWS}"
    lines = [[rule, *(age(arm, rule) for arm in GROWN)] for rule in GROWN_RULES]
    parts.append(table(f"{title} (of two ages at most 0.75; by chance 0 and 0.25)", ["rule", *GROWN], lines))
    trials = {name: [trial["bits_per_byte"] for trial in arms[name]["trials"]] for name in TUNED}
    lines = [[k, arms[k]["learning_rate"], *(f"{x:.4f}" if x else "diverged" for x in trials[k])] for k in TUNED]
    parts.append(table("Bits per byte on HELD_OUT of each trial", ["arm", "taken", *report["learning_rates"]], lines))
    parts.append(f"\nBest rate at an edge of the grid: {', '.join(report['at_edge']) or 'none'}")
    return "\n".join([*parts, f"FLOPs of all six sizes, seed {SEEDS[0]}: {report['family_flops']}"])


def draw(curves: dict[str, Curve], picture: Path) -> None:
    """Bits per byte against rows: the families; plain cut by each rule; both grown models cut by each rule."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8.4), dpi=130, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
    families = {"power_of_two": "nested, power_of_two", "uniform": "nested, uniform"}
    families |= {"separate": "separate, equal FLOPs per size", "long": "separate, six times the FLOPs (one seed)"}
    bits = [value for name in families for by_seed in curves[name].values() for value in by_seed.values()]
    families |= {name: name.replace(" by", ", cut by") for name in ("plain by order", best_rule(curves, SIZES))}
    panels = {"Nested, separate, and a plain model cut": families}
    panels["A plain model cut by each rule"] = {f"plain by {rule}": rule for rule in PLAIN_RULES}
    for kind in GROWN:
        names = {f"{kind} by {rule}": rule for rule in GROWN_RULES}
        panels[f"Grown from {SMALL_ROWS} to {ROWS} rows by {kind}, cut by each rule"] = names
    for axes, (title, names) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        for (name, label), colour in zip(names.items(), colours, strict=False):
            sizes = sorted(curves[name])
            means, deviations = zip(*(mean_sd(list(curves[name][rows].values())) for rows in sizes), strict=True)
            style = "--" if label in ("order", "reverse", "random") or name == "long" else "-"
            bars = [sd or 0 for sd in deviations]
            axes.errorbar(sizes, means, bars, color=colour, linestyle=style, marker="o", ms=4, capsize=2, label=label)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, map(str, sizes))
        axes.set(xlabel="rows a layer", ylabel="bits per byte on FINAL")
        axes.set_title(title, loc="left", size=11)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.legend(framealpha=1, edgecolor="none", fontsize=9)  # opaque: curves that leave the panel end behind it
    low, high = min(bits), max(bits)
    figure.axes[0].set_ylim(low - 0.1 * (high - low), high + 0.5 * (high - low))  # the next panel has what leaves it
    figure.savefig(picture, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("train", "held_out", "final"):
        parser.add_argument(name, metavar=name.upper())
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--fraction", type=float, default=1.0, help="of all lengths, for a miniature")
    given = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as SIGTERM: the workers see to their runs
    os.environ["OMP_NUM_THREADS"] = "1"  # of the workers
    record = Record(given.train, given.held_out, given.final, given.out, given.fraction)
    texts = texts_of(record)
    stream = prepare(record.job("plain", SEEDS[0], RATES[0]).recipe.data, 0).info["sha256"]  # and fill the cache
    rates, best = tune(record, given.jobs)
    work_off(record.headlines(best), given.jobs)
    arms = arms_of(record, rates, best)
    curves = curves_of(arms)
    report = {
        "fraction": given.fraction,
        "texts": {**texts, "stream_sha256": stream},
        "environment": environment(),
        "learning_rates": rates,
        "at_edge": [arm for arm, rate in best.items() if rate in (rates[0], rates[-1])],
        "family_flops": {
            kind: sum(arm["runs"][0]["flops"] for name, arm in arms.items() if name.partition("-")[0] == kind)
            for kind in (*NESTED, "separate", "long")
        },
        "comparisons": comparisons(curves),
        "cuts": cut_comparisons(curves),
        "arms": list(arms.values()),
    }
    runs.write_json(record.out / "report.json", report)
    draw(curves, record.out / "report.png")
    print(tables_of(report, arms, curves))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"remake.py: {error}")
