"""Runs side by side, each in a process of its own. The parent trains nothing and passes their words on.

Whatever becomes of the parent, its children write a checkpoint and end.
"""

import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from .. import environment, runs
from ..environment import say
from ..recipe import Recipe, recipe_from_dict, recipe_to_dict
from ..train import Diverged, Stopped, stop_signals, train
from .final import evaluate_final
from .jobs import Job

GRACE_SECONDS = 120.0  # for a run that was told to stop: to finish its step and write its checkpoint
STOPPING_SECONDS = 60.0  # of a piece's minutes, a tenth at most, that are kept for stopping
STATUS_SECONDS = 20.0  # between two lines on how far a long race is
DIVERGED = 3  # exit code of a run whose loss is no number any more
OUT_OF_TIME = 75  # exit code of a race that its --minutes have ended: try again later
# The run imports what the parent does, wherever that was found.
RUN_PROGRAM = "import sys; sys.path = sys.argv[1:]; from tokenformer.race import run_main; sys.exit(run_main())"


@dataclass
class Child:
    """A run at work."""

    job: Job
    process: subprocess.Popen
    reader: threading.Thread
    last_line: str = "it ended without a word"
    share_done: float = 0.0  # the furthest that it has told; not every line tells how far it is
    share_before: float | None = 0.0  # of an earlier session; None from its line that it resumed to its first share

    def hear(self, line: str) -> None:
        self.last_line = line
        if line.startswith("resumed from") and not self.share_done:
            self.share_before = None
        if found := re.search(r"(\d+)% of the FLOPs", line):
            self.share_done = max(self.share_done, int(found[1]) / 100)
            self.share_before = self.share_done if self.share_before is None else self.share_before

    @property
    def flops_before(self) -> float:
        return self.job.flops * (self.share_before or 0.0)

    @property
    def flops_done(self) -> float:
        """In this session."""
        return self.job.flops * self.share_done - self.flops_before


@dataclass(frozen=True)
class Piece:
    """The time that a part of a race may take: `minutes` from `began`, a reading of time.monotonic()."""

    minutes: float
    began: float

    @property
    def ends_at(self) -> float:
        return self.began + 60 * self.minutes

    @property
    def stops_at(self) -> float:
        """When its runs are told to stop, so that they have stopped when it ends."""
        return self.ends_at - min(STOPPING_SECONDS, 6 * self.minutes)


@dataclass
class Progress:
    """How far a race is, counted in FLOPs; its speed is that of this session."""

    total: Callable[[], tuple[int, int]]  # runs and FLOPs of the whole, which grow with the grid of learning rates
    runs_done: int = 0
    flops_before: float = 0.0  # in earlier sessions
    flops_done: float = 0.0  # in this session

    def line(self, running: dict[str, Child], seconds: float) -> str:
        count, flops = self.total()
        before = self.flops_before + sum(child.flops_before for child in running.values())
        done = self.flops_done + sum(child.flops_done for child in running.values())
        left = (flops - before - done) / done * seconds if done else None
        until = "" if left is None else f" · about {clock(left)} left"
        now = ", ".join(f"{name} {child.share_done:.0%}" for name, child in running.items())
        return f"{self.runs_done} of {count} runs{until} · now {now}"


def clock(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{max(1, minutes)} min"


def run_jobs(
    todo: Callable[[], list[Job]],
    folder: Path,
    slots: int,
    tell: Callable[[str], None],
    progress: Progress | None = None,
    piece: Piece | None = None,
) -> None:
    """Run what `todo` names, `slots` at a time, until it names nothing more; no child is left behind.

    `todo` is asked again whenever a run has ended. Without `progress` every line of a run is told; with it a run's end
    alone, and a line on the whole every STATUS_SECONDS. A run that diverges is an end like another where `progress` is
    kept; any other failure stops the rest and is raised as ValueError. Raises `Stopped` after SIGTERM or SIGINT, and
    when the piece is over, whose end no run outlives; ValueError when it is over before a run could be started.
    """
    running: dict[str, Child] = {}
    lines: queue.Queue[tuple[str, str | None]] = queue.Queue()  # (run, a line of its output; None when it ended)
    began = told = time.monotonic()
    waiting = todo()
    if piece and waiting and began > piece.stops_at:
        raise ValueError(f"--minutes {piece.minutes:g}: used up before a run could be started; give more")
    width = max((len(job.name) for job in waiting), default=0)
    with stop_signals() as stop:
        try:
            while waiting or running:
                while waiting and len(running) < slots:
                    job = waiting.pop(0)
                    running[job.name] = start_run(job, folder / runs.ARMS / job.name, slots, lines)
                name, line = next_line(lines)
                if line:
                    running[name].hear(line)
                    if progress is None:
                        tell(f"{name:<{width}} | {line}")
                elif name:
                    child = running.pop(name)
                    finish_run(child, diverging=progress is not None)
                    waiting = [job for job in todo() if job.name not in running]
                    if name in [job.name for job in waiting]:  # a full disk, say: it would be run for ever
                        raise ValueError(f"arm {name} ended without a result: {child.last_line}")
                    if progress is not None:
                        progress.runs_done += 1
                        progress.flops_before += child.flops_before
                        progress.flops_done += child.job.flops - child.flops_before
                        tell(f"{name}: {child.last_line.partition(';')[0]}")
                now = time.monotonic()
                if progress is not None and running and now - told > STATUS_SECONDS:
                    told = now
                    tell(progress.line(running, now - began))
                if piece and now > piece.stops_at and (running or waiting):
                    raise out_of_time(piece.minutes)
                if stop:
                    break
        finally:
            grace = GRACE_SECONDS if piece is None else min(GRACE_SECONDS, piece.ends_at - time.monotonic())
            stop_runs(list(running.values()), grace)
            while (rest := next_line(lines))[0]:  # where the runs say what they have written
                if rest[1]:
                    tell(f"{rest[0]:<{width}} | {rest[1]}")
        if stop and (running or waiting):
            caught = signal.Signals(stop[0]).name
            raise Stopped(f"race stopped by {caught}, its arms with checkpoints; --resume continues", stop[0])


def out_of_time(minutes: float) -> Stopped:
    told = f"stopped within {minutes:g} minutes, the runs have checkpoints; --resume continues"
    error = Stopped(told, signal.SIGTERM)
    error.exit_code = OUT_OF_TIME
    return error


def next_line(lines: "queue.Queue[tuple[str, str | None]]") -> tuple[str, str | None]:
    try:
        return lines.get(timeout=0.2)
    except queue.Empty:  # a chance to see that a signal came
        return "", None


def with_threads(recipe: Recipe, folder: Path, slots: int) -> Recipe:
    """The run with its share of the cores, if it leaves that open; one that was begun keeps its number."""
    if recipe.train.threads:
        return recipe
    begun = folder / runs.RECIPE
    share = max(1, environment.usable_cores() // slots)
    threads = share
    if begun.exists():
        threads = runs.read_object(begun, {"train": dict})["train"].get("threads", share)
    return replace(recipe, train=replace(recipe.train, threads=threads))


def start_run(job: Job, folder: Path, slots: int, lines: "queue.Queue[tuple[str, str | None]]") -> Child:
    """A process that trains one run. Its recipe comes over stdin, which stays open while the parent lives."""
    recipe = with_threads(job.recipe, folder, slots)
    process = subprocess.Popen(
        [sys.executable, "-c", RUN_PROGRAM, *sys.path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, "OMP_NUM_THREADS": str(recipe.train.threads)},
        start_new_session=True,  # Ctrl-C reaches the parent alone, which tells its children
    )
    assert process.stdin is not None
    how = {"final_text": job.final_text, "sample": job.sample}
    request = {"recipe": recipe_to_dict(recipe), "folder": str(folder), "argv": sys.argv, **how}
    process.stdin.write(json.dumps(request) + "\n")
    process.stdin.flush()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip():
                lines.put((job.name, line.rstrip()))
        lines.put((job.name, None))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    return Child(job, process, reader)


def finish_run(child: Child, diverging: bool) -> None:
    """Take the exit code of a run whose output has ended; ValueError with its last words when it failed."""
    code = child.process.wait()
    if child.process.stdin is not None:
        child.process.stdin.close()
    if code and not (diverging and code == DIVERGED):
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else child.last_line
        raise ValueError(f"arm {child.job.name} failed: {how}")


def stop_runs(children: list[Child], grace_seconds: float) -> None:
    """Tell the runs to stop, give all of them that time to write their checkpoints, and kill what is left then."""
    ends = time.monotonic() + grace_seconds
    try:
        for child in children:
            child.process.terminate()
        for child in children:
            child.process.wait(timeout=max(0.0, ends - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass
    finally:  # also on a second Ctrl-C
        for child in children:
            if child.process.poll() is None:
                child.process.kill()
                child.process.wait()


def run_main() -> int:
    """What the process of a run does; its last line of output is its message when it fails."""
    request = json.loads(sys.stdin.readline())
    sys.argv = request["argv"]  # the command that makes the run again is the race's
    threading.Thread(target=stop_with_parent, daemon=True).start()
    try:
        recipe = recipe_from_dict(request["recipe"], "the race")
        train(recipe, request["folder"], resume=True, say=say, sample=request["sample"])
        if request["final_text"]:
            evaluate_final(recipe, Path(request["folder"]), *request["final_text"])
    except Stopped as stopped:
        say(str(stopped))
        return stopped.exit_code
    except Diverged as error:
        say(str(error))
        return DIVERGED
    except (ValueError, OSError) as error:
        say(" ".join(str(error).split()))
        return 2
    return 0


def stop_with_parent() -> None:
    """When the parent is gone, however it went, its end of the pipe closes: stop as after SIGTERM."""
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
