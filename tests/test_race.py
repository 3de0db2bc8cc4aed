"""A race: arms side by side, resumed, told to stop, failing; and nothing left behind in any of these cases."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import ended, start_child, tiny

from tokenformer import environment, runs
from tokenformer.race import processes, run_race
from tokenformer.race.jobs import Job
from tokenformer.race.processes import run_jobs, with_threads
from tokenformer.recipe import Recipe, arm_recipe, recipe_from_dict, recipe_to_dict
from tokenformer.train import Stopped


@pytest.fixture(scope="module", autouse=True)
def shared(tmp_path_factory: pytest.TempPathFactory) -> Any:
    place = tmp_path_factory.mktemp("shared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKENFORMER_CACHE", str(place / "cache"))
        yield place


def racing(folder: Path, **arms: dict[str, Any]) -> Recipe:
    table = recipe_to_dict(tiny(folder, growth=[], train={"steps": 6, "threads": 0}))
    table["arm"] = [{"name": name, "description": f"arm {name}", **changes} for name, changes in arms.items()]
    return recipe_from_dict(table, "the test")


GROWN = {"growth": [{"at_fraction": 0.5, "to": {"ffn_tokens": 32}}]}
LARGE = {"model": {"ffn_tokens": 32}}


def test_a_race_runs_every_arm_and_can_be_taken_up_again(shared: Path, tmp_path: Path) -> None:
    recipe, folder = racing(shared, grown=GROWN, large=LARGE), tmp_path / "race"
    said: list[str] = []
    page = run_race(recipe, folder, say=said.append, jobs=2)
    assert page == folder / "report.html" and page.exists()
    stored = runs.read_json(folder / runs.RACE)
    assert [(arm["name"], arm["folder"]) for arm in stored["arms"]] == [
        ("grown", "arms/grown"),
        ("large", "arms/large"),
    ]
    assert stored["noise"] is None and stored["recipe"] == recipe_to_dict(recipe)
    results = {name: runs.read_json(folder / "arms" / name / runs.RESULT) for name in ("grown", "large")}
    assert all(result["status"] == "finished" for result in results.values())
    assert len(results["grown"]["growth"]) == 1 and results["large"]["growth"] == []
    assert results["grown"]["flops"] < results["large"]["flops"]
    threads = runs.read_json(folder / "arms" / "grown" / runs.RECIPE)["train"]["threads"]
    assert threads == max(1, environment.usable_cores() // 2)
    for name in results:  # line by line; that arms run side by side is test_so_many_arms_run_at_a_time's
        assert any(line.startswith(name) and "| step 6/6" in line for line in said)
    table = said[said.index(next(line for line in said if line.startswith("arm "))) :]
    assert {line.split()[0] for line in table[1:3]} == {"grown", "large"}
    assert float(table[1].split()[1]) <= float(table[2].split()[1])  # best first
    assert any("lowest held-out bits per byte" in line for line in table)

    with pytest.raises(ValueError, match="already holds a race; --resume continues it"):
        run_race(recipe, folder)
    with pytest.raises(ValueError, match="train.steps is 6 there and 7 here"):
        other = recipe_from_dict({**recipe_to_dict(recipe), "train": {"steps": 7}}, "the test")
        run_race(other, folder, resume=True)
    # One arm is lost: the resume trains that one alone, and gets the same numbers with as many threads as before.
    before = (folder / "arms" / "grown" / runs.METRICS).read_bytes()
    (folder / "arms" / "large" / runs.RESULT).unlink()
    said.clear()
    run_race(recipe, folder, resume=True, say=said.append, jobs=1)
    assert "grown: finished before" in said and any(line.startswith("large | resumed from") for line in said)
    again = runs.read_json(folder / "arms" / "large" / runs.RESULT)
    assert again["bits_per_byte"] == results["large"]["bits_per_byte"]
    assert (folder / "arms" / "grown" / runs.METRICS).read_bytes() == before


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ({}, r"has no \[\[arm\]\]"),
        ({"good": {}, "bad": {"train": {"steps": 100_000}}}, "arm bad: .*data.repeat = true"),
        ({"good": {}, "bad": {"growth": [{"at_step": 3, "to": {"ffn": 4}}]}}, "arm bad: growth.0.to.ffn"),
    ],
)
def test_a_mistake_in_any_arm_is_found_before_one_is_trained(
    shared: Path, tmp_path: Path, arms: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run_race(racing(shared, **arms), tmp_path / "race")
    assert not (tmp_path / "race").exists()


# What follows is about processes, not about training: arms that do as their names say, and start at once.
STAND_IN = """
import json, os, signal, sys, threading, time
request = json.loads(sys.stdin.readline())
name = os.path.basename(request["folder"])
def note(word):
    os.makedirs(request["folder"], exist_ok=True)
    with open(os.path.join(request["folder"], word), "w") as file:
        file.write(f"{os.getpid()} {time.monotonic()}")
def stop(number, frame):
    note("stopped")
    print("wrote a checkpoint", flush=True)
    os._exit(128 + number)
signal.signal(signal.SIGTERM, signal.SIG_IGN if name.startswith("deaf") else stop)
def with_parent():
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=with_parent, daemon=True).start()
note("started")
print(f"I am {name}, threads {request['recipe']['train']['threads']}", flush=True)
others = os.path.dirname(request["folder"])
while name.startswith(("fails", "dies")) and len(os.listdir(others)) < 2:  # until the arm beside it is at work
    time.sleep(0.02)
time.sleep(0.2)
if name.startswith("fails"):
    print("step 3: the loss is nan at learning rate 1", flush=True)
    sys.exit(2)
if name.startswith("dies"):
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60 if name.startswith(("slow", "deaf")) else 0.2)
note("ended")
"""


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, shared: Path) -> Callable[..., dict[str, Recipe]]:
    monkeypatch.setattr(processes, "RUN_PROGRAM", STAND_IN)

    def arms(*names: str) -> dict[str, Recipe]:
        recipe = racing(shared, **{name: {} for name in names})
        return {arm.name: arm_recipe(recipe, arm) for arm in recipe.arms}

    return arms


def run_arms(arms: dict[str, Recipe], folder: Path, slots: int, say: Callable[[str], None]) -> None:
    """The arms as jobs; those that have left their last note are done."""

    def todo() -> list[Job]:
        left = [name for name in arms if not (folder / "arms" / name / "ended").exists()]
        return [Job(name, arms[name], 1) for name in left]

    run_jobs(todo, folder, slots, say)


def gone(process: int, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.kill(process, 0)
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False


def process_of(folder: Path, name: str, seconds: float = 20.0) -> int:
    """The process of an arm, once it has started."""
    path, deadline = folder / "arms" / name / "started", time.monotonic() + seconds
    while not (path.exists() and " " in path.read_text()):
        assert time.monotonic() < deadline, f"{name} did not start"
        time.sleep(0.02)
    return int(path.read_text().split()[0])


def when(folder: Path, name: str, word: str) -> float:
    return float((folder / "arms" / name / word).read_text().split()[1])


@pytest.mark.parametrize("jobs", [1, 2])
def test_so_many_arms_run_at_a_time(stand_in: Any, tmp_path: Path, jobs: int) -> None:
    said: list[str] = []
    run_arms(stand_in("a", "b", "c"), tmp_path, jobs, said.append)
    spans = [(when(tmp_path, name, "started"), when(tmp_path, name, "ended")) for name in "abc"]
    most = max(sum(start <= moment < end for start, end in spans) for moment, _ in spans)
    assert most == jobs
    share = max(1, environment.usable_cores() // jobs)
    assert sorted(said) == [f"{name} | I am {name}, threads {share}" for name in "abc"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("fails", "arm fails failed: step 3: the loss is nan"), ("dies", "arm dies failed: killed by SIGKILL")],
)
def test_an_arm_that_fails_ends_the_race_and_the_others_write_checkpoints(
    stand_in: Any, tmp_path: Path, name: str, message: str
) -> None:
    said: list[str] = []
    with pytest.raises(ValueError, match=message):
        run_arms(stand_in("slow", name, "never"), tmp_path, 2, said.append)
    assert gone(process_of(tmp_path, "slow"))
    assert (tmp_path / "arms" / "slow" / "stopped").exists()
    assert [line.split(" | ")[1] for line in said].count("wrote a checkpoint") == 1
    assert not (tmp_path / "arms" / "never").exists()


def test_a_signal_stops_every_arm_with_a_checkpoint(stand_in: Any, tmp_path: Path) -> None:
    said: list[str] = []

    def signal_soon() -> None:
        process_of(tmp_path, "slow1"), process_of(tmp_path, "slow2")
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=signal_soon).start()
    with pytest.raises(Stopped, match="race stopped by SIGINT") as caught:
        run_arms(stand_in("slow1", "slow2", "slow3"), tmp_path, 2, said.append)
    assert caught.value.exit_code == 130
    assert said.count("slow1 | wrote a checkpoint") == said.count("slow2 | wrote a checkpoint") == 1
    assert not (tmp_path / "arms" / "slow3").exists()


def test_an_arm_that_does_not_stop_is_killed(stand_in: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.5)
    with pytest.raises(ValueError, match="arm fails failed"):
        run_arms(stand_in("deaf", "fails"), tmp_path, 2, lambda line: None)
    assert gone(process_of(tmp_path, "deaf"))


def race_of_slow_arms(tables: dict[str, Any], folder: Path) -> None:
    processes.RUN_PROGRAM = STAND_IN
    arms = {name: recipe_from_dict(table, "the test") for name, table in tables.items()}
    run_arms(arms, folder, 2, lambda line: None)


def test_arms_stop_when_their_race_is_killed(stand_in: Any, tmp_path: Path) -> None:
    tables = {name: recipe_to_dict(recipe) for name, recipe in stand_in("slow1", "slow2").items()}
    parent = start_child(race_of_slow_arms, tables, tmp_path)
    arms = [process_of(tmp_path, name) for name in tables]
    os.kill(parent.pid, signal.SIGKILL)
    assert ended(parent) == -signal.SIGKILL
    assert all(gone(arm) for arm in arms)
    assert all((tmp_path / "arms" / name / "stopped").exists() for name in tables)


def race_of_one_long_run(table: dict[str, Any], folder: Path) -> None:
    run_arms({"long": recipe_from_dict(table, "the test")}, folder, 1, lambda line: None)


def test_a_run_whose_race_was_killed_keeps_all_that_it_did(shared: Path, tmp_path: Path) -> None:
    often = {"steps": 100_000, "flops": None, "log_every": 1, "evaluate_every": 100_000, "checkpoint_every": 100_000}
    recipe = tiny(shared, data={"repeat": True}, train=often)
    parent = start_child(race_of_one_long_run, recipe_to_dict(recipe), tmp_path)
    run, ends = tmp_path / "arms" / "long", time.monotonic() + 60
    told = run / runs.METRICS
    while time.monotonic() < ends and not (told.exists() and '"train"' in told.read_text()):
        time.sleep(0.02)
    os.kill(parent.pid, signal.SIGKILL)
    assert ended(parent) == -signal.SIGKILL
    while time.monotonic() < ends and not (run / runs.RESULT).exists():
        time.sleep(0.02)
    result = runs.read_object(run / runs.RESULT, {"status": str, "step": int})  # nobody reads what it says any more
    assert result["status"] == "stopped" and runs.checkpoints(run)[-1].name == f"step-{result['step']:08}"


def test_an_arm_that_was_begun_keeps_its_number_of_threads(shared: Path, tmp_path: Path) -> None:
    arm = tiny(shared, train={"threads": 0})
    assert with_threads(arm, tmp_path, 1).train.threads == environment.usable_cores()
    assert with_threads(arm, tmp_path, 10_000).train.threads == 1
    assert arm.train.threads == 0
    (tmp_path / runs.RECIPE).write_text(json.dumps({"train": {"threads": 7}}))
    assert with_threads(arm, tmp_path, 1).train.threads == 7
    assert with_threads(tiny(shared, train={"threads": 3}), tmp_path, 1).train.threads == 3
