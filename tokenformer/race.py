"""A race: the arms of one recipe, each a run in a process of its own, then one report over all of them.

    RACE/race.json      the recipe, the environment, the arms and their folders
    RACE/arms/NAME/     run folders (see runs.py)

The parent trains nothing. It works out every arm's plan and data first, so that a mistake in the last arm is
found before the first one has run, then keeps `jobs` arms going and passes their progress on, line by line.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import environment, runs
from .recipe import Recipe, arm_recipe, recipe_from_dict, recipe_to_dict
from .report import write_report
from .report.units import printable
from .runs import Say
from .train import Stopped, require_feasible, stop_signals, train

GRACE_SECONDS = 120.0  # for an arm that was told to stop: to finish its step and write its checkpoint
# The arm imports what the parent does, wherever that was found.
ARM_PROGRAM = "import sys; sys.path = sys.argv[1:]; from tokenformer.race import arm_main; sys.exit(arm_main())"


@dataclass
class Child:
    """An arm at work."""

    name: str
    process: subprocess.Popen
    reader: threading.Thread
    last_line: str = "it ended without a word"


def run_race(recipe: Recipe, folder: str | Path, resume: bool = False, say: Say = None, jobs: int = 2) -> Path:
    """Run every arm of the recipe, `jobs` at a time, into `folder`; returns the path of the report's page.

    Arms whose train.threads is 0 get an equal share of the cores. With `resume`, finished arms are left as
    they are and the others go on. The first arm that fails ends the race: the others are told to stop, write
    a checkpoint, and its message is raised as ValueError. Raises `Stopped` after SIGTERM or SIGINT, when
    every arm has stopped.
    """
    folder, tell = Path(folder), say or (lambda line: None)
    arms = {arm.name: arm_recipe(recipe, arm) for arm in recipe.arms}
    if not arms:
        raise ValueError(f"{recipe.name}: has no [[arm]], so there is nothing to race")
    with runs.locked(folder, runs.LOCK_SECONDS if resume else 0):
        runs.check_folder(folder, recipe_to_dict(recipe), resume, "race")
        for name, arm in arms.items():
            arms[name] = with_threads(arm, folder / runs.ARMS / name, jobs)
            try:
                require_feasible(arm, folder / runs.ARMS / name, tell)
            except ValueError as error:
                raise ValueError(f"arm {name}: {error}") from None
        open_race(recipe, folder)
        waiting = [name for name in arms if not runs.finished_result(folder / runs.ARMS / name)]
        for name in arms:
            if name not in waiting:
                tell(f"{name}: finished before")
        run_arms({name: arms[name] for name in waiting}, folder, jobs, tell)
        paths = write_report(folder)
    for line in summary(runs.read_json(paths["json"])):
        tell(line)
    return paths["html"]


def open_race(recipe: Recipe, folder: Path) -> None:
    """Remove what a killed process left half written, and write race.json unless it is there."""
    runs.remove_unfinished(folder)
    path = folder / runs.RACE
    if path.exists():
        return
    race = {
        "name": recipe.name,
        "description": recipe.description,
        "recipe": recipe_to_dict(recipe),
        "command": environment.command(),
        "environment": environment.environment(),
        "arms": [
            {"name": arm.name, "description": arm.description, "folder": f"{runs.ARMS}/{arm.name}"}
            for arm in recipe.arms
        ],
        "noise": recipe_to_dict(recipe)["noise"],
    }
    runs.write_json(path, race)


def with_threads(arm: Recipe, folder: Path, jobs: int) -> Recipe:
    """The arm with its share of the cores, if it leaves that open; a run that was begun keeps its number."""
    if arm.train.threads:
        return arm
    begun = folder / runs.RECIPE
    share = max(1, environment.usable_cores() // jobs)
    threads = share
    if begun.exists():
        threads = runs.read_object(begun, {"train": dict})["train"].get("threads", share)
    return replace(arm, train=replace(arm.train, threads=threads))


# --- the arms at work ---


def run_arms(arms: dict[str, Recipe], folder: Path, jobs: int, tell: Callable[[str], None]) -> None:
    """Run the arms, `jobs` at a time; whatever happens, no child is left behind."""
    waiting = list(arms)
    running: dict[str, Child] = {}
    lines: queue.Queue[tuple[str, str | None]] = queue.Queue()  # (arm, a line of its output; None when it ended)
    width = max((len(name) for name in arms), default=0)
    with stop_signals() as stop:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    name = waiting.pop(0)
                    running[name] = start_arm(name, arms[name], folder / runs.ARMS / name, lines)
                name, line = next_line(lines)
                if line:
                    running[name].last_line = line
                    tell(f"{name:<{width}} | {line}")
                elif name:
                    finish_arm(running.pop(name))
                if stop:
                    break
        finally:
            stop_arms(list(running.values()))
            while (rest := next_line(lines))[0]:  # where the arms say what they have written
                if rest[1]:
                    tell(f"{rest[0]:<{width}} | {rest[1]}")
        if stop and (running or waiting):
            caught = signal.Signals(stop[0]).name
            raise Stopped(f"race stopped by {caught}, its arms with checkpoints; --resume continues", stop[0])


def next_line(lines: "queue.Queue[tuple[str, str | None]]") -> tuple[str, str | None]:
    try:
        return lines.get(timeout=0.2)
    except queue.Empty:  # a chance to see that a signal came
        return "", None


def start_arm(name: str, arm: Recipe, folder: Path, lines: "queue.Queue[tuple[str, str | None]]") -> Child:
    """A process that trains one arm. Its recipe comes over stdin, which stays open while the parent lives."""
    threads = str(arm.train.threads)
    process = subprocess.Popen(
        [sys.executable, "-c", ARM_PROGRAM, *sys.path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, "OMP_NUM_THREADS": threads},
        start_new_session=True,  # Ctrl-C reaches the parent alone, which tells its children
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps({"recipe": recipe_to_dict(arm), "folder": str(folder), "argv": sys.argv}) + "\n")
    process.stdin.flush()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip():
                lines.put((name, line.rstrip()))
        lines.put((name, None))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    return Child(name, process, reader)


def finish_arm(child: Child) -> None:
    """Take the exit code of an arm whose output has ended; ValueError with its last words when it failed."""
    code = child.process.wait()
    if child.process.stdin is not None:
        child.process.stdin.close()
    if code:
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else child.last_line
        raise ValueError(f"arm {child.name} failed: {how}")


def stop_arms(children: list[Child]) -> None:
    """Tell the arms to stop, give them the time to write their checkpoints, and kill what is left then."""
    try:
        for child in children:
            child.process.terminate()
        for child in children:
            child.process.wait(timeout=GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        pass
    finally:  # also on a second Ctrl-C
        for child in children:
            if child.process.poll() is None:
                child.process.kill()
                child.process.wait()


def arm_main() -> int:
    """What the process of an arm runs; its last line of output is its message when it fails."""
    request = json.loads(sys.stdin.readline())
    sys.argv = request["argv"]  # the command that makes the arm again is the race's
    threading.Thread(target=stop_with_parent, daemon=True).start()
    try:
        train(recipe_from_dict(request["recipe"], "the race"), request["folder"], resume=True, say=say_at_once)
    except Stopped as stopped:
        say_at_once(str(stopped))
        return stopped.exit_code
    except (ValueError, OSError) as error:
        say_at_once(" ".join(str(error).split()))
        return 2
    return 0


def say_at_once(line: str) -> None:
    print(line, flush=True)


def stop_with_parent() -> None:
    """When the parent is gone, however it went, its end of the pipe closes: stop as after SIGTERM."""
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


# --- what came of it ---


def summary(report: dict[str, Any]) -> list[str]:
    """The table of arms, best first, and the report's answer, as plain text."""
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
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    best = arms[0]
    if best.get("sample"):
        sample = best["sample"]
        lines += ["", f"A sample from {best['name']}, after {sample['prompt']!r}:", printable(sample["text"])]
    return ["", *lines, "", *(sentence.replace("**", "") for sentence in report["answer"])]
