"""A race: the runs of one recipe side by side, then one report over all of them.

    RACE/race.json      the recipe, the environment, the arms and their folders, what was checked before
    RACE/arms/NAME/     run folders (see runs.py), of which a race with a [race] table has many per arm (see jobs.py)

arms.py       the arms and the controls that are always there
jobs.py       what is to be run next, read off what has been run
processes.py  runs as processes, side by side
checks.py     leaks between texts, models that look ahead
final.py      headline runs on text that nothing of a run was chosen by
planned.py    what a race comes to, before anything is trained
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import environment, runs
from ..data import Corpus, is_streamed, load_tokenizer
from ..recipe import Recipe, arm_recipe, recipe_to_dict
from ..report import write_report
from ..report.read import finite
from ..report.units import printable
from ..runs import Say
from ..train import require_feasible
from .arms import NOT_SIZES, Arm, arms_of, ends, parameters_of
from .checks import check_texts, require_causal
from .final import final_windows, judged, note_judged, require_another_text, sha256_of
from .jobs import (
    FINAL,
    Job,
    Race,
    all_jobs,
    bits_of,
    grid,
    headline,
    jobs_of_arms,
    require_branches,
    require_warm,
    skipped_tokens,
    todo,
    trial,
)
from .planned import plan_lines, table, text_lines
from .processes import Piece, Progress, run_jobs, run_main

__all__ = ["plan_race", "run_main", "run_race"]


def run_race(
    recipe: Recipe,
    folder: str | Path,
    resume: bool = False,
    say: Say = None,
    jobs: int = 2,
    minutes: float | None = None,
    began: float | None = None,
) -> Path:
    """Run every arm of the recipe, `jobs` runs at a time, into `folder`; returns the path of the report's page.

    Runs whose train.threads is 0 get an equal share of the cores. With `resume`, what has ended is left as it is and
    the rest goes on. A mistake in the last arm is found before the first one has run. The first run that fails ends
    the race: the others are told to stop, write a checkpoint, and its message is raised as ValueError; but with [race],
    one that diverges counts as a result. Raises `Stopped` after SIGTERM or SIGINT and, so early that every run has
    stopped by then, before `minutes` are over, counted from `began` of time.monotonic(), or else from now.
    """
    piece = None if minutes is None else Piece(minutes, time.monotonic() if began is None else began)
    folder, tell = Path(folder), say or (lambda line: None)
    race = race_of(recipe, folder, checkpoints_of(folder, recipe))
    with runs.locked(folder, runs.LOCK_SECONDS if resume else 0):
        runs.check_folder(folder, recipe_to_dict(recipe), resume, "race")
        corpus = require_all_feasible(race, say)
        open_race(race, corpus)
        progress = None if recipe.race is None else progress_of(race)
        for arm in race.arms if recipe.race is None else []:
            if runs.finished_result(race.place(arm.name)):
                tell(f"{arm.name}: finished before")

        def left() -> list[Job]:
            note_final_text(race, lambda line: None)  # at once: a race that is killed has been judged as well
            return todo(race)

        try:
            run_jobs(left, folder, jobs, tell, progress, piece)
        finally:
            note_final_text(race, tell)
        if recipe.race is not None:
            note_rates(race)
        paths = write_report(folder)
    for line in summary(runs.read_json(paths["json"])):
        tell(line)
    return paths["html"]


def note_final_text(race: Race, tell: Callable[[str], None]) -> None:
    """Keep that the final text has judged this race, as soon as it has judged a run; the race goes on without."""
    if race.recipe.race is None or not race.final_text or not any(race.place("").rglob(FINAL)):
        return
    try:
        note_judged(race.folder, sha256_of(race.final_text[0]))
    except (OSError, ValueError) as error:
        tell(f"race.final_text: that it has judged this race cannot be kept: {error}")


def plan_race(recipe: Recipe, jobs: int = 2) -> list[str]:
    """What the race would be, in lines: arms, parameters, FLOPs, runs, and the time that a few timed steps foretell."""
    race = race_of(recipe, Path())
    corpus = require_all_feasible(race, None)
    lines = plan_lines(race, jobs)
    if recipe.race is not None:
        final = final_tokens(race)
        lines[-1:-1] = text_lines(race, corpus, final, check_texts(corpus, final))
    return lines


def checkpoints_of(folder: Path, recipe: Recipe) -> dict[str, str]:
    """Those that arms started from when the race in the folder was begun; none where there is no race yet."""
    begun = runs.read_json(folder / runs.RACE) if (folder / runs.RACE).exists() else {"checkpoints": {}}
    if "checkpoints" in begun:
        return dict(begun["checkpoints"])
    # An older version began it: its arms have theirs as they are written.
    written = {each.name: arm_recipe(recipe, each).model.checkpoint for each in recipe.arms}
    return {name: place for name, place in written.items() if place}


def race_of(recipe: Recipe, folder: Path, checkpoints: dict[str, str] | None = None) -> Race:
    if not recipe.arms:
        raise ValueError(f"{recipe.name}: has no [[arm]], so there is nothing to race")
    vocab_size = load_tokenizer(recipe.data.tokenizer).vocab_size
    return Race(recipe, folder, arms_of(recipe, vocab_size, checkpoints), vocab_size)


def require_all_feasible(race: Race, say: Say) -> Corpus:
    """ValueError, naming the arm, unless every arm can be run to its end; returns the text that all of them read.

    Of a streamed text all read as much as the longest run of any, and so in one order.
    """
    if race.recipe.race is not None and race.final_text:
        require_another_text(race.recipe, race.final_text[0])
        final_windows(race.recipe, *race.final_text)
    steps = {}
    for arm in race.arms:
        with by_name(arm):
            longest = 0
            if race.recipe.race is not None:
                longest = require_branches(race, arm)
                require_warm_trial(race, arm)
            steps[arm.name] = max(longest, *(race.plan(arm, job.recipe).steps for job in first_jobs(race, arm)))
    streamed = [arm.name for arm in race.arms if is_streamed(arm.recipe.data.source)]
    tokens = max((stream_tokens(arm, steps[arm.name]) for arm in race.arms if arm.name in streamed), default=0)
    race.arms = [reading(arm, tokens) if arm.name in streamed else arm for arm in race.arms]
    for arm in race.arms:
        with by_name(arm):
            for job in first_jobs(race, arm):
                _, corpus, _, _ = require_feasible(job.recipe, race.place(job.name), say, steps[arm.name])
            if race.recipe.race is not None:
                for config in ends(arm.recipe, race.vocab_size)[: 1 + arm.grows]:
                    require_causal(config, arm.name, arm.recipe.data.sequence_length)
    return corpus


def require_warm_trial(race: Race, arm: Arm) -> None:
    """ValueError where a warm-up, as long in a trial as in the run that it tunes for, ends in the trial's decay."""
    recipe = trial(race, arm, race.section.learning_rates[0]).recipe
    try:
        require_warm(race.plan(arm, recipe), recipe)
    except ValueError as error:
        share = race.section.tune_fraction
        raise ValueError(f"race.tune_fraction: {share:g}: in a trial of that length {error}") from None


def first_jobs(race: Race, arm: Arm) -> list[Job]:
    """A run of each kind that the arm has and that does not hang on the result of another."""
    if race.recipe.race is None:
        return [Job(arm.name, arm.recipe, 0)]
    rate = race.section.learning_rates[0]
    return [trial(race, arm, rate), headline(race, arm, race.section.seeds[0], rate)]


def stream_tokens(arm: Arm, steps: int) -> int:
    """How much of a streamed text an arm needs for so many steps."""
    data = arm.recipe.data
    return max(data.stream_tokens, skipped_tokens(data) + steps * data.batch_size * data.sequence_length)


def reading(arm: Arm, tokens: int) -> Arm:
    return replace(arm, recipe=replace(arm.recipe, data=replace(arm.recipe.data, stream_tokens=tokens)))


@contextlib.contextmanager
def by_name(arm: Arm) -> Iterator[None]:
    """What is wrong with the arm begins with its name."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        beside = "" if arm.role == "arm" else f" (a control of {arm.of})"
        raise ValueError(text if text.startswith("arm ") else f"arm {arm.name}{beside}: {text}") from None


def open_race(race: Race, corpus: Corpus) -> None:
    """Remove what a killed process left half written, check the texts, and write race.json unless it is there.

    ValueError where it is there and was begun with other texts.
    """
    runs.remove_unfinished(race.folder)
    settle_moved(race)
    path, recipe, texts = race.folder / runs.RACE, race.recipe, runs.texts_of(corpus.info)
    if recipe.race is not None and race.final_text:
        texts["race.final_text"] = sha256_of(race.final_text[0])
    if path.exists():
        return runs.require_same_texts(race.folder, runs.read_json(path).get("texts") or {}, texts)
    written: dict[str, Any] = {
        "name": recipe.name,
        "description": recipe.description,
        "recipe": recipe_to_dict(recipe),
        "command": environment.command(),
        "environment": environment.environment(),
        "arms": [
            {"name": arm.name, "description": arm.description, "folder": f"{runs.ARMS}/{arm.name}"}
            for arm in race.arms
        ],
        "noise": recipe_to_dict(recipe)["noise"],
        "texts": texts,
        "checkpoints": {a.name: a.recipe.model.checkpoint for a in race.arms if a.recipe.model.checkpoint},
    }
    if recipe.race is not None:
        flops = recipe.train.flops or 0.0
        whole = {"flops": flops, "tune_flops": flops * recipe.race.tune_fraction}
        written["race"] = {**recipe_to_dict(recipe)["race"], **whole}
        written["race"]["judged_before"] = sorted({entry["race"] for entry in judged(texts.get("race.final_text"))})
        written["checks"] = check_texts(corpus, final_tokens(race))
        written["arms"] = [arm_entry(race, arm) for arm in race.arms]
    runs.write_json(path, written)


def final_tokens(race: Race) -> np.ndarray | None:
    """What of race.final_text is judged by."""
    return final_windows(race.recipe, *race.final_text)[0][:, 1:].flatten().numpy() if race.final_text else None


def settle_moved(race: Race) -> None:
    """Branches that were begun name the checkpoint of their trunk: where it lies now, if the race has been moved."""
    for path in race.place("").glob(f"*/*/{runs.START}"):
        start, begun = runs.read_object(path, {"checkpoint": str}), path.parent / runs.RECIPE
        here = race.place("").resolve().joinpath(*Path(start["checkpoint"]).parts[-4:])  # ARM/seed-0/checkpoints/step
        if bits_of(path.parent) is None and str(here) != start["checkpoint"] and here.exists() and begun.exists():
            recipe = runs.read_object(begun, {"model": dict})
            recipe["model"]["checkpoint"] = str(here)
            runs.write_json(begun, recipe)
            runs.write_json(path, {**start, "checkpoint": str(here)})


def arm_entry(race: Race, arm: Arm) -> dict[str, Any]:
    start, end = parameters_of(arm.recipe, race.vocab_size)
    config = ends(arm.recipe, race.vocab_size)[0]
    return {
        "name": arm.name,
        "description": arm.description,
        "role": arm.role,
        "of": arm.of,
        "controls": arm.controls,
        "folder": f"{runs.ARMS}/{arm.name}",
        "architecture": config.model_type,
        "config": finite({k: v for k, v in config.to_dict().items() if k not in NOT_SIZES and v is not None}),
        "grows": arm.grows,
        "parameters": start,
        "parameters_end": end,
    }


def note_rates(race: Race) -> None:
    """Write into race.json how far the grid has grown."""
    path = race.folder / runs.RACE
    written = runs.read_json(path)
    written["race"]["learning_rates"] = grid(race)[0]
    runs.write_json(path, written)


def progress_of(race: Race) -> Progress:
    """How many runs and FLOPs have ended before this session, and how many there are."""
    done = [path.parent for path in race.place("").rglob(runs.RESULT) if bits_of(path.parent) is not None]
    return Progress(lambda: all_jobs(jobs_of_arms(race)), len(done), sum(run_flops(path) for path in done))


def run_flops(run: Path) -> int:
    """What a run cost itself, without the one that it started from."""
    total = runs.read_object(run / runs.RESULT, {"flops": int})["flops"]
    start = run / runs.START
    return total - (runs.read_object(start, {"flops": int})["flops"] if start.exists() else 0)


def summary(report: dict[str, Any]) -> list[str]:
    """The report's answer as plain text, after the table of arms, best first, where each arm is one run."""
    short = [report["conclusion"]] if report.get("conclusion") else []
    answer = [*short, *(sentence.replace("**", "") for sentence in report["answer"])]
    if "race" in report:
        return ["", *answer]
    arms = sorted(report["arms"], key=lambda arm: arm["rank"] or len(report["arms"]) + 1)
    rows = [("arm", "bits per byte", "parameters", "steps", "tokens", "FLOPs", "seconds")]
    for arm in arms:
        numbers = (arm["parameters"].get("total"), arm["step"], arm["tokens"])
        rows.append(
            (
                arm["name"],
                f"{arm['bits_per_byte']:.4f}",
                *(f"{number:,}" for number in numbers),
                f"{arm['flops']:.4g}",
                f"{arm['seconds']:.0f}",
            )
        )
    lines = table(rows)
    best = arms[0]
    if best.get("sample"):
        sample = best["sample"]
        lines += ["", f"A sample from {best['name']}, after {sample['prompt']!r}:", printable(sample["text"])]
    return ["", *lines, "", *answer]
