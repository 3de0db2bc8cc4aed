"""Make this record again: memory added for a new domain, against other ways to learn it.

    python remake.py TRAIN HELD_OUT FINAL OUT --jobs 2       the texts of records/README.md; needs tokenformer[adapters]

A base is trained on prose and then goes on with Python source. How well does it know Python after that, and how much
of its prose has it forgotten? What follows was fixed before the first result.

Base      the Llama of recipes/growth_llama_cpu.toml (504,672 parameters, bytes, windows of 256 tokens, batches of 8),
          trained on TRAIN by a recipe: wsd, 1.0e13 FLOPs, learning rate 4e-3; three seeds.
Python    the embedded corpus, the standard library of the running Python. It differs between builds: the report names
          it by version and hash. A fifth of its files is kept apart and dealt, file by file in a fixed random order,
          into a held-out part, by which rates are chosen, and a final part, by which nothing is. Of either, windows
          are left out of which any of four stretches of 64 bytes occurs in the training text (tables, templates).
Arms      ARMS: equal tokens, none seen twice but those replayed, each from the base of its seed, moments fresh.
Controls  the base untouched; and `prose`, full fine-tuning on prose that its base has not seen, at the rate of `full`:
          what of prose is lost to other text, and not to going on at all.
Tuned     every arm on one grid of rates, at full length on seed 0, by held-out Python. While the best rate of any arm
          lies at an edge, the grid grows there by a factor of 2 for all arms, twice at most. Seeds 1 and 2 run at each
          arm's best rate; seed 0's run at it is its headline run. All else is equal: AdamW, betas 0.9 and 0.95, weight
          decay 0.1 on matrices, gradients clipped at 1, warm-up of 30 steps, linear to zero over the last 30 %.
Judged    on 131,072 bytes of the final part of Python and as many of FINAL, windows evenly spaced over either.
          Forgetting is bits per byte on FINAL, after minus before. Intervals and words are those of docs/fairness.md,
          rules 20 and 21, over the tuned arms.

A seed sets the base's weights, the order of text and what is added. Stopped and started again it goes on: OUT has one
small JSON for each run that has ended. `--fraction 0.02` is the same in miniature, to see that it works.
"""

import argparse
import functools
import hashlib
import math
import multiprocessing
import os
import platform
import sys
import threading
import time
import tomllib
import warnings
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from tokenformer import add_parameter_tokens, evaluate, grow, load_checkpoint, train
from tokenformer.adapters import lora_rank, memories_of
from tokenformer.adapters.memory import base_of
from tokenformer.adapters.training import train_memory
from tokenformer.data import Batches, cut_windows, eval_windows, load_tokenizer, prepare, text_windows
from tokenformer.environment import environment, version
from tokenformer.evaluate import cross_entropy
from tokenformer.race.checks import STRETCH_BYTES, hashes
from tokenformer.recipe import Recipe, recipe_from_dict
from tokenformer.report.charts import LIGHT, spread
from tokenformer.runs import read_json, write_json
from tokenformer.statistics import difference, differences, false_alarms, own_interval, spread_of

HERE = Path(__file__).resolve().parent
SEEDS, RATES, FACTOR, MOST_EXTENSIONS = (0, 1, 2), (5e-4, 1e-3, 2e-3, 4e-3), 2.0, 2
BASE_FLOPS, BASE_RATE, STEPS, WARM_UP, LENGTH, BATCH = 1.0e13, 4e-3, 200, 30, 256, 8
PARTS = {"python_held_out": 65_536, "python_final": 131_072, "prose_held_out": 65_536, "prose_final": 131_072}  # tokens
ROWS, PATTENTION_TOKENS = 256, 384  # a layer: as many parameters
FEED_FORWARD = ["gate_proj", "up_proj", "down_proj"]
LORA = {"lora": ["q_proj", "k_proj", "v_proj", "o_proj", *FEED_FORWARD], "lora_ffn": FEED_FORWARD}
ARMS = {
    "rows": f"{ROWS} rows a layer are added to the feed-forward, and trained alone",
    "pattention": f"a Pattention of {PATTENTION_TOKENS} tokens beside each feed-forward, trained alone",
    "lora": "PEFT's LoRA on the projections of attention and feed-forward, alpha = rank, as many parameters as rows",
    "lora_ffn": "the same on those of the feed-forward alone",
    "full": "full fine-tuning: all of the base is trained",
    "replay": "the same, every tenth window being prose that the base has seen",
    "grown": f"{ROWS} rows a layer are added, the same at their start as in rows (operator zero), and all is trained",
}
CONTROL = "full fine-tuning on prose that the base has not seen, at the rate of full"


@dataclass(frozen=True)
class Setting:
    """What all runs share: the texts' files, the folder of the runs, the share of every length."""

    train: str
    held_out: str
    final: str
    out: Path
    fraction: float

    def scaled(self, length: float) -> int:
        return max(1, round(length * self.fraction))


@dataclass(frozen=True)
class Job:
    """One run: a base, or an arm from the base of its seed."""

    arm: str
    seed: int
    rate: float = BASE_RATE

    @property
    def name(self) -> str:
        return f"{self.arm}-seed{self.seed}" + ("" if self.arm == "base" else f"-lr{self.rate:g}")


# --- texts ---


def base_recipe(setting: Setting, seed: int) -> Recipe:
    table = tomllib.loads((HERE.parent.parent / "recipes" / "growth_llama_cpu.toml").read_text(encoding="utf-8"))
    table["data"] |= {"source": setting.train, "valid_source": setting.held_out, "seed": seed}
    table["train"] |= {"flops": BASE_FLOPS * setting.fraction, "learning_rate": BASE_RATE, "seed": seed}
    table["train"] |= {"warmup_steps": setting.scaled(table["train"]["warmup_steps"]), "evaluate_every": 10**6}
    return recipe_from_dict({"name": f"base-{seed}", **{k: table[k] for k in ("model", "data", "train")}}, "remake.py")


@functools.cache
def texts(setting: Setting) -> tuple[Any, Any, dict[str, Any]]:
    """The corpora of prose and of Python, and of each of PARTS its windows, evenly spaced: token ids and bytes."""
    data = base_recipe(setting, 0).data
    prose = prepare(data, 0)
    python = prepare(type(data)(source="embedded", valid_fraction=0.2, valid_tokens=10**9), 0)
    files = np.split(np.arange(len(python.valid)), np.flatnonzero(python.valid == 0) + 1)[:-1]
    order = np.random.RandomState(0).permutation(len(files))
    dealt = [np.concatenate([files[i] for i in order[side::2]]) for side in (0, 1)]
    seen = np.sort(hashes(np.asarray(python.train, np.uint8)))
    windows = [unseen(cut_windows(python.valid[i], python.valid_bytes[i], 0, LENGTH), seen) for i in dealt]
    windows += [eval_windows(prose, LENGTH), text_windows([setting.final], load_tokenizer("bytes"), LENGTH)[0]]
    parts = {}
    for (part, tokens), (ids, sizes) in zip(PARTS.items(), windows, strict=True):
        chosen = np.linspace(0, len(ids) - 1, max(1, setting.scaled(tokens) // LENGTH)).round().astype(int)
        parts[part] = ids[chosen], sizes[chosen]
    return prose, python, parts


def unseen(windows: Any, seen: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """The windows of which no stretch of 64 bytes, cut one after another, has a hash among those `seen`, sorted."""
    stretches = np.stack([hashes(ids)[::STRETCH_BYTES] for ids in windows[0][:, 1:].numpy().astype(np.uint8)])
    nearest = seen[np.searchsorted(seen, stretches).clip(max=len(seen) - 1)]
    kept = torch.from_numpy((nearest != stretches).all(1))
    return windows[0][kept], windows[1][kept]


def identity(setting: Setting) -> dict[str, Any]:
    """What the runs of a folder have in common, the texts by hash."""
    files = {name: getattr(setting, name) for name in ("train", "held_out", "final")}
    sums = {name: hashlib.sha256(Path(path).read_bytes()).hexdigest() for name, path in files.items()}
    _, python, windows = texts(setting)
    sums |= {"python_train": python.info["sha256"], "python_text": python.info["text_hash"]}
    sums |= {part: hashlib.sha256(ids.numpy().tobytes()).hexdigest() for part, (ids, _) in windows.items()}
    lengths = {"fraction": setting.fraction, "steps": STEPS, "base_flops": BASE_FLOPS, "parts": PARTS}
    return {"python": platform.python_version(), "sha256": sums, **lengths, "grid": list(RATES), "arms": ARMS}


class Replayed:
    """Batches of new text whose every tenth window is old."""

    batch_size, sequence_length = BATCH, LENGTH

    def __init__(self, new: Batches, old: Batches) -> None:
        self.new, self.old = new, old

    def __getitem__(self, step: int) -> torch.Tensor:
        tenth = (torch.arange(BATCH) + step * BATCH) % 10 == 9
        return torch.where(tenth[:, None], self.old[step], self.new[step])


def batches_of(setting: Setting, job: Job) -> Any:
    prose, python, _ = texts(setting)
    if job.arm == "prose":
        seen = read_json(setting.out / "runs" / f"{Job('base', job.seed).name}.json")["tokens"]
        return Batches(prose.train, LENGTH, BATCH, job.seed, skip_tokens=seen)
    new = Batches(python.train, LENGTH, BATCH, job.seed)
    return Replayed(new, Batches(prose.train, LENGTH, BATCH, job.seed)) if job.arm == "replay" else new


# --- one run, in a process of its own ---


def run(setting: Setting, job: Job) -> dict[str, Any]:
    """What the run came to, which is also written when it has ended."""
    folder, windows = setting.out / "bases" / f"seed{job.seed}", texts(setting)[2]
    found: dict[str, Any] = asdict(job)
    if job.arm == "base":
        done = train(base_recipe(setting, job.seed), folder, resume=True, say=None)
        model, _ = load_checkpoint(folder)
        found |= {key: done[key] for key in ("tokens", "flops", "seconds")}
    else:
        model, about = adapted(setting, job, load_checkpoint(folder)[0])
        found |= about
    if not found.get("diverged"):
        found["bits"] = {part: evaluate(model, each, BATCH)["bits_per_byte"] for part, each in windows.items()}
    for memory in memories_of(model).values() if "bits" in found else ():
        memory.on = False
        found["prose_final_while_off"] = evaluate(model, windows["prose_final"], BATCH)["bits_per_byte"]
    write_json(setting.out / "runs" / f"{job.name}.json", found)
    return found


def adapted(setting: Setting, job: Job, base: Any) -> tuple[Any, dict[str, Any]]:
    """The base made ready as the arm has it, trained; and what that took."""
    steps, before = setting.scaled(STEPS), base_of(base).sha256
    table = {"steps": steps, "learning_rate": job.rate, "min_learning_rate_ratio": 0.0, "log_every": 10**6}
    table["warmup_steps"] = setting.scaled(WARM_UP)
    recipe = recipe_from_dict({"name": job.name, "train": table}, "remake.py")
    model, trained, about = made(job, base)
    batches = batches_of(setting, job)
    about["trained_parameters"] = sum(p.numel() for p in trained.parameters() if p.requires_grad)
    about |= {"tokens": steps * BATCH * LENGTH, "flops": steps * flops_of_step(model, batches[0])}
    try:
        about["seconds"] = train_memory(model, trained, recipe, batches, lambda line: None)
    except ValueError:  # the loss has left the numbers
        return model, about | {"diverged": True}
    if memories_of(model):
        about["base_untouched"] = base_of(model).sha256 == before
    return model, about


def made(job: Job, base: Any) -> tuple[Any, Any, dict[str, Any]]:
    """The model of the arm, what of it is trained, and the rank of a LoRA."""
    if job.arm in ("rows", "pattention"):
        tokens = ROWS if job.arm == "rows" else PATTENTION_TOKENS
        return base, add_parameter_tokens(base, tokens, kind=job.arm, seed=job.seed), {}
    if job.arm == "grown":
        grown = grow(base, "zero", {"intermediate_size": base.config.intermediate_size + ROWS}, seed=job.seed).model
        return grown, grown, {}
    if job.arm in LORA:
        from peft import LoraConfig, get_peft_model

        rank, _ = lora_rank(base, LORA[job.arm], base.config.num_hidden_layers * 3 * ROWS * base.config.hidden_size)
        torch.manual_seed(job.seed)
        lora = get_peft_model(base, LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA[job.arm]))
        return lora, lora, {"rank": rank}
    return base, base, {}


def flops_of_step(model: Any, windows: torch.Tensor) -> int:
    """Forward and backward of one step by torch's counter, which is blind to the fused attention of a CPU."""
    fused, model.config._attn_implementation = model.config._attn_implementation, "eager"
    with FlopCounterMode(display=False) as counter:
        cross_entropy(model, windows).backward()
    model.config._attn_implementation = fused
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops()


# --- what is to be run ---


def grid(found: dict[str, Any]) -> tuple[list[float], list[Job]]:
    """The grid as far as the trials have extended it, and its trials that have not ended."""
    rates = list(RATES)
    for extension in range(MOST_EXTENSIONS + 1):
        waiting = [job for rate in rates for arm in ARMS if (job := Job(arm, 0, rate)).name not in found]
        best = set() if waiting else {best_rate(found, arm, rates) for arm in ARMS}
        if waiting or extension == MOST_EXTENSIONS or not best & {rates[0], rates[-1]}:
            break
        lower, higher = rates[0] / FACTOR, rates[-1] * FACTOR
        rates = [lower] * (rates[0] in best) + rates + [higher] * (rates[-1] in best)
    return rates, waiting


def best_rate(found: dict[str, Any], arm: str, rates: list[float]) -> float:
    """The rate of the lowest bits per byte on held-out Python; a run that diverged counts as infinite."""
    trials = {rate: found[Job(arm, 0, rate).name].get("bits", {}) for rate in rates}
    return min(rates, key=lambda rate: trials[rate].get("python_held_out", math.inf))


def headline(found: dict[str, Any], rates: list[float]) -> dict[str, list[Job]]:
    """Each arm's runs, and the control's, at the rates of a grid that is complete."""
    chosen = {arm: best_rate(found, arm, rates) for arm in ARMS}
    chosen["prose"] = chosen["full"]
    return {arm: [Job(arm, seed, rate) for seed in SEEDS] for arm, rate in chosen.items()}


def todo(found: dict[str, Any]) -> list[Job]:
    """The jobs that can start now, or are at work."""
    bases = [job for seed in SEEDS if (job := Job("base", seed)).name not in found]
    rates, jobs = grid(found)
    if not jobs:
        jobs = [job for each in headline(found, rates).values() for job in each if job.name not in found]
    return bases + [job for job in jobs if Job("base", job.seed) not in bases]


def cost(names: Iterable[str]) -> int:
    """In runs of an arm; a base takes five times as long."""
    return sum(5 if name.startswith("base") else 1 for name in names)


def follow_parent() -> None:
    """In a worker: one thread, and no life after the parent's, however that ends."""

    def wait_for_its_end() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=wait_for_its_end, daemon=True).start()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # of what PEFT asks transformers for


def run_all(setting: Setting, slots: int) -> dict[str, Any]:
    """Every run by name, those of earlier sessions included."""
    found = {path.stem: read_json(path) for path in sorted((setting.out / "runs").glob("*.json"))}
    began, before, at_work = time.monotonic(), cost(found), dict[Any, Job]()
    with ProcessPoolExecutor(slots, multiprocessing.get_context("spawn"), follow_parent) as pool:
        while ready := todo(found):
            for job in ready:
                if len(at_work) < slots and job not in at_work.values():
                    at_work[pool.submit(run, setting, job)] = job
            for future in wait(at_work, return_when=FIRST_COMPLETED).done:
                job = at_work.pop(future)
                found[job.name] = future.result()
                whole = len(SEEDS) * cost(["base", "prose"]) + len(ARMS) * (len(grid(found)[0]) + len(SEEDS) - 1)
                left = (whole - cost(found)) / (cost(found) - before) * (time.monotonic() - began) / 60
                bits = " · ".join(f"{part} {value:.3f}" for part, value in found[job.name].get("bits", {}).items())
                print(f"{len(found)} ended: {job.name} · {bits or 'diverged'} · about {left:.0f} min left", flush=True)
    return found


# --- what it says ---


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Every run, and what three seeds say of the headline ones, for JSON."""
    rates, _ = grid(found)
    bases = {seed: found[Job("base", seed).name] for seed in SEEDS}
    runs = {arm: {job.seed: found[job.name] for job in jobs} for arm, jobs in headline(found, rates).items()}
    said: dict[str, Any] = {"rates": rates, "base": list(bases.values()), "arms": {}}
    for arm, by_seed in runs.items():
        lost = [r["bits"]["prose_final"] - bases[s]["bits"]["prose_final"] for s, r in by_seed.items() if "bits" in r]
        said["arms"][arm] = {
            "what": ARMS.get(arm, CONTROL),
            **{key: by_seed[0].get(key) for key in ("rate", "rank", "trained_parameters", "tokens", "flops")},
            "forgetting": dict(zip(("mean", "own_low", "own_high"), own_interval(lost), strict=True)),
            "trials": [found[Job(arm, 0, rate).name] for rate in rates] if arm in ARMS else [],
            "runs": list(by_seed.values()),
        }
    for part in ("python_final", "prose_final"):
        table = {arm: {s: r["bits"][part] for s, r in runs[arm].items() if "bits" in r} for arm in ARMS}
        rest = spread_of(table)
        pairs = [asdict(pair) for pair in differences(table, rest)]
        minus = {arm: asdict(difference(table, arm, "rows", rest)) for arm in ARMS if arm != "rows"}
        said[part] = {"s": rest.s, "df": rest.df, "half_width": rest.half_width(len(SEEDS))}
        said[part] |= {"minus_rows": minus, "pairs": pairs}
        said[part]["chance_alone_tells_apart"] = false_alarms(len(pairs))
    off = {"base_untouched": True, "off_minus_base": 0.0}  # of every run with a memory, trials too
    for run in found.values():
        if "base_untouched" in run:
            off["base_untouched"] &= run["base_untouched"]
            apart = abs(run["prose_final_while_off"] - bases[run["seed"]]["bits"]["prose_final"])
            off["off_minus_base"] = max(off["off_minus_base"], apart)
    said["memories"] = off
    return said


def mean(runs: list[dict[str, Any]], key: str) -> float:
    return float(np.mean([run[key] if key in run else run["bits"][key] for run in runs if "bits" in run]))


def table_of(said: dict[str, Any]) -> str:
    """The headline runs as a table of Markdown."""
    head = "arm|trained|training FLOPs|seconds|rate|Python|minus rows|prose|forgotten|minus rows".split("|")
    rows = [head, ["---"] * len(head)]
    bits = [f"{mean(said['base'], part):.3f}" for part in ("python_final", "prose_final")]
    rows.append(["base", "", "", "", "", bits[0], "", bits[1], "0", ""])
    for arm, about in said["arms"].items():
        seconds = mean(about["runs"], "seconds")
        row = [arm, f"{about['trained_parameters']:,}", f"{about['flops']:.3g}", f"{seconds:.0f}", f"{about['rate']:g}"]
        row[-1] += " (edge)" * (about["rate"] in (said["rates"][0], said["rates"][-1]))
        for part in ("python_final", "prose_final"):
            row.append(f"{mean(about['runs'], part):.3f}")
            if part == "prose_final":
                row.append("{mean:+.3f} [{own_low:+.3f} to {own_high:+.3f}]".format(**about["forgetting"]))
            minus = said[part]["minus_rows"].get(arm)
            row.append("{value:+.3f} {word}".format(**minus) if minus else "")
        rows.append(row)
    widths = said["python_final"]["half_width"], said["prose_final"]["half_width"]
    note = "95 % intervals of every difference: Python ±{:.3f}, prose ±{:.3f}".format(*widths)
    off = "With a memory: base untouched {base_untouched}; switched off, {off_minus_base:g} from it"
    return "\n".join([*(f"| {' | '.join(row)} |" for row in rows), "", note, off.format(**said["memories"])])


def draw(said: dict[str, Any], picture: Path) -> None:
    """New against old domain, and the grids of learning rates."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    looks = dict(zip(ARMS, zip(LIGHT, "osD^vPX", strict=True), strict=True))
    figure = Figure(figsize=(13.6, 5.4), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    places: Any = ((0.05, 0.33), (0.53, 0.2), (0.79, 0.2))
    plane, *grids = (figure.add_axes((left, 0.21, wide, 0.71)) for left, wide in places)
    points: Any = {arm: [mean(said["arms"][arm]["runs"], p) for p in ("prose_final", "python_final")] for arm in ARMS}
    for arm, (colour, marker) in looks.items():
        for bits in (run["bits"] for run in said["arms"][arm]["runs"] if "bits" in run):
            plane.plot(bits["prose_final"], bits["python_final"], marker, color=colour, ms=4, alpha=0.45)
        plane.plot(*points[arm], marker, color=colour, ms=9)
        trials = [trial for trial in said["arms"][arm]["trials"] if "bits" in trial]
        for axes, part in zip(grids, ("python_held_out", "prose_held_out"), strict=True):
            axes.plot([t["rate"] for t in trials], [t["bits"][part] for t in trials], color=colour, marker=marker, ms=5)
    controls = [(mean(said["base"], "prose_final"), "base")]
    controls.append((mean(said["arms"]["prose"]["runs"], "prose_final"), "prose"))
    left, right = min(controls)[0], plane.get_xlim()[1]
    plane.set_xlim(left - 0.14 * (right - left), right)
    for (x, text), (shift, side) in zip(sorted(controls), ((-3, "right"), (3, "left")), strict=True):
        plane.axvline(x, color="#888888", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        at: Any = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "ha": side}
        plane.annotate(text, (x, 0.015), (shift, 0), size=9, color="#555555", **at)
    low, high = plane.get_ylim()
    heights = spread([(points[arm][1] - low) / (high - low) for arm in ARMS], 0.065, 0.0, 1.0)
    for arm, height in zip(ARMS, heights, strict=True):
        line = {"arrowstyle": "-", "color": looks[arm][0], "linewidth": 0.6, "alpha": 0.6}
        look: Any = {"color": looks[arm][0], "size": 10, "va": "center", "textcoords": "axes fraction"}
        plane.annotate(arm, points[arm], (1.03, height), arrowprops=line, annotation_clip=False, **look)
    plane.set_xlabel("prose, bits per byte of FINAL (left is better)")
    titles = ["Python, bits per byte of its final part (lower is better)", "held-out Python, seed 0"]
    titles.append("held-out prose, seed 0")
    for axes, title in zip((plane, *grids), titles, strict=True):
        axes.set_title(title, loc="left", size=10)
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
    for axes in grids:
        axes.set_xscale("log")
        axes.set_xticks(said["rates"], [f"{rate:g}" for rate in said["rates"]], rotation=45)
        axes.minorticks_off()
        axes.set_xlabel("learning rate")
    note = "Large marks are means of three seeds, small ones single seeds. Dashed: prose of the base untouched, and of "
    note += "the control that went on with prose. Right: every trial of the learning rate."
    figure.text(0.012, 0.015, note, size=9, color="#666666")
    figure.savefig(picture, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("train", "held_out", "final", "out"):
        parser.add_argument(name.upper(), type=Path if name == "out" else str)
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side")
    parser.add_argument("--fraction", type=float, default=1.0, help="of every length")
    given = vars(parser.parse_args())
    setting = Setting(*(given[key] for key in ("TRAIN", "HELD_OUT", "FINAL", "OUT", "fraction")))
    shared, kept = identity(setting), setting.out / "setting.json"
    if kept.exists() and read_json(kept) != shared:
        raise ValueError(f"{kept}: is of other texts, another Python or other lengths; choose another OUT")
    (setting.out / "runs").mkdir(parents=True, exist_ok=True)
    write_json(kept, shared)
    known = (HERE.parent / "README.md").read_text(encoding="utf-8")
    others = [name for name in ("train", "held_out", "final") if shared["sha256"][name] not in known]
    if others:
        print(f"not the texts of records/README.md: {', '.join(others)}", flush=True)
    said = summary(run_all(setting, given["jobs"]))
    about = {"environment": environment() | {"peft": version("peft")}, "setting": shared, "other_texts": others}
    write_json(setting.out / "report.json", about | said)
    draw(said, setting.out / "report.png")
    print(table_of(said))


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"remake.py: {error}")
