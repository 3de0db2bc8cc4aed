"""The training loop: the same weights however often it was killed, growth as an event, refusals, two ranks as one."""

import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import corpus as tiny_corpus
from tiny_runs import ended, losses, same, start_child, tiny, weights
from transformers.utils import logging as transformers_logging

from tokenformer import checkpoint, runs
from tokenformer.data import Batches
from tokenformer.grow_checkpoint import grow_checkpoint
from tokenformer.models import build_model
from tokenformer.plan import Event, Phase, Plan, model_config, plan
from tokenformer.race.jobs import bits_of
from tokenformer.recipe import GrowthSection, Recipe, recipe_from_dict, recipe_to_dict
from tokenformer.report import write_report
from tokenformer.start import start_of
from tokenformer.step import Diverged, learning_rate_at, rank_rows
from tokenformer.train import Stopped, require_feasible, train

pytestmark = pytest.mark.usefixtures("shared")


@pytest.fixture(scope="module")
def whole(shared: Path) -> Path:
    """A run that was never stopped: the reference."""
    train(tiny(shared), shared / "whole", say=None)
    return shared / "whole"


def lines(run: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in runs.read_metrics(run) if line["kind"] == kind]


# --- what a run leaves behind ---


def test_a_run_folder_says_everything(shared: Path, whole: Path) -> None:
    planned, result = plan(tiny(shared)), runs.read_json(whole / runs.RESULT)
    assert recipe_from_dict(runs.read_json(whole / runs.RECIPE), "run") == tiny(shared)
    assert runs.read_json(whole / runs.DATA)["vocab_size"] == 256
    assert result["status"] == "finished" and result["step"] == result["steps"] == 12
    assert result["flops"] == planned.flops and result["tokens"] == planned.tokens == 12 * 4 * 16
    assert result["unique_tokens"] == 12 * 4 * 16 and 0 < result["epochs"] < 1
    assert result["parameters"]["total"] == result["parameters"]["embedding"] + result["parameters"]["other"]
    assert result["flops_per_token"] == planned.phases[-1].flops_per_step // 64
    assert result["bits_per_byte"] == lines(whole, "eval")[-1]["bits_per_byte"]
    assert result["sample"]["text"] and result["seconds"] > 0
    assert (whole / result["checkpoint"]).name == "step-00000012"
    assert [line["step"] for line in lines(whole, "train")] == [3, 6, 9, 12]
    assert [line["step"] for line in lines(whole, "eval")] == [0, 5, 6, 6, 10, 11, 12]  # 11: five after the growth
    for line in runs.read_metrics(whole):
        assert line["flops"] == planned.flops_at(line["step"]) and line["tokens"] == line["step"] * 64
    assert [path.name for path in runs.checkpoints(whole)] == ["step-00000008", "step-00000012"]
    assert not [path for path in whole.rglob(".*") if path.name != runs.LOCK]


def test_the_result_says_the_peak_memory_which_is_kept_over_a_resume(shared: Path, tmp_path: Path) -> None:
    recipe, run = tiny(shared, growth=[]), tmp_path / "run"
    found = train(recipe, run, say=None)["peak_memory_bytes"]
    status = Path("/proc/self/status")
    if status.exists():
        [high] = [int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        assert found == pytest.approx(high, rel=0.05)
    for stored, expected in ((10**15, 10**15), (0, found)):  # that of a larger process before; the control
        (run / runs.RESULT).unlink()
        path = runs.checkpoints(run)[-1] / checkpoint.TRAINER
        path.write_text(json.dumps(runs.read_json(path) | {"peak_memory_bytes": stored}))
        resumed = train(recipe, run, resume=True, say=None)["peak_memory_bytes"]
        assert resumed == pytest.approx(expected, rel=0.05)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux hands memory on over exec")
def test_the_peak_memory_of_a_child_is_not_its_parents() -> None:
    touched = b"x" * 300_000_000
    code = "import resource; from tokenformer.environment import peak_memory_bytes; "
    code += "print(peak_memory_bytes(), 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    own, kept = map(int, done.stdout.split())
    assert own < len(touched) < kept  # the control: ru_maxrss is the parent's


def test_growth_is_exact_said_and_written_into_the_lineage(shared: Path, whole: Path, tmp_path: Path) -> None:
    [line] = lines(whole, "growth")
    assert (line["step"], line["from"], line["to"]) == (6, {"ffn_tokens": 16}, {"ffn_tokens": 32})
    assert line["max_logit_change"] <= 1e-5 and line["promise"] == "exact"
    before, after = (entry for entry in lines(whole, "eval") if entry["step"] == 6)
    assert after["loss"] == pytest.approx(before["loss"], abs=1e-6)
    model, [entry] = checkpoint.load_checkpoint(whole)
    assert model.config.ffn_tokens == 32
    assert (entry["step"], entry["operator"], entry["to"]) == (6, "zero_keys", {"ffn_tokens": 32})
    assert entry["parameters_after"] - entry["parameters_before"] == 16 * 2 * 8
    said: list[str] = []
    growth = [{"at_step": 6, "to": {"ffn_tokens": 32}, "operator": "published"}]
    train(tiny(shared, growth=growth), tmp_path / "published", say=said.append)
    [control] = lines(tmp_path / "published", "growth")
    assert control["max_logit_change"] > 1e-4
    assert any("grown at step 6: ffn_tokens 16 -> 32" in text and "logits moved by at most" in text for text in said)
    assert sum("tokens/s" in text and "left" in text and "of the FLOPs" in text for text in said) == 4


def test_the_loss_falls(shared: Path, tmp_path: Path) -> None:
    train(tiny(shared, train={"steps": 100, "evaluate_every": 1000}, growth=[]), tmp_path / "run", say=None)
    first, *_, last = lines(tmp_path / "run", "eval")
    assert first["bits_per_byte"] == pytest.approx(8, abs=0.5)
    assert last["bits_per_byte"] < 0.7 * first["bits_per_byte"]


# --- killed and resumed ---


def run_in_child(table: dict[str, Any], folder: Path, resume: bool) -> None:
    train(recipe_from_dict(table, "the test"), folder, resume=resume, say=None)


def killed_at(table: dict[str, Any], folder: Path, module: str, name: str, calls: int) -> None:
    """Train, and kill this process for good on the n-th call of a function, before it does anything."""
    place = sys.modules[module]
    real, count = getattr(place, name), [0]

    def deadly(*arguments: Any, **keywords: Any) -> Any:
        count[0] += 1
        if count[0] == calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **keywords)

    setattr(place, name, deadly)
    run_in_child(table, folder, False)


@pytest.mark.parametrize(
    ("name", "calls", "left"),
    [
        ("tokenformer.train.evaluate_now", 1, []),  # before the first step: no checkpoint yet
        ("tokenformer.checkpoint.flush_to_disk", 1, []),  # amid the first checkpoint
        ("tokenformer.runs.prune_checkpoints", 1, [4]),  # right after it
        ("tokenformer.train.grow_now", 1, [4]),  # at the boundary where it grows
        ("tokenformer.train.evaluate_now", 4, [4]),  # right after the growth
        ("tokenformer.checkpoint.flush_to_disk", 2, [4]),  # amid the first checkpoint of the grown model
        ("tokenformer.runs.prune_checkpoints", 3, [4, 8, 12]),  # amid the last
        ("tokenformer.train.sample_text", 1, [8, 12]),  # all trained, no result yet
    ],
)
def test_killed_at_a_bad_moment_and_resumed_gives_the_same_bits(
    shared: Path, whole: Path, tmp_path: Path, name: str, calls: int, left: list[int]
) -> None:
    module, _, function = name.rpartition(".")
    table, run = recipe_to_dict(tiny(shared)), tmp_path / "run"
    assert ended(start_child(killed_at, table, run, module, function, calls)) == -signal.SIGKILL
    assert [int(path.name[5:]) for path in runs.checkpoints(run)] == left
    assert not (run / runs.RESULT).exists()
    with pytest.raises(ValueError, match="already holds a run; --resume continues it"):
        train(tiny(shared), run, say=None)
    train(tiny(shared), run, resume=True, say=None)
    assert same(weights(run), weights(whole))
    assert losses(run) == losses(whole)
    assert not [path for path in run.rglob(".*") if path.name != runs.LOCK]


def test_killed_at_random_moments_and_resumed_gives_the_same_bits(shared: Path, tmp_path: Path) -> None:
    """benchmarks/kill_resume.py does the same as often as one likes."""
    recipe = tiny(shared, train={"steps": 60, "checkpoint_every": 7}, growth=[{"at_step": 30, "to": {"ffn": 32}}])
    began = time.monotonic()
    train(recipe, tmp_path / "whole", say=None)
    duration, draw = time.monotonic() - began, random.Random(0)
    run, kills = tmp_path / "run", 0
    for _ in range(3):
        child = start_child(run_in_child, recipe_to_dict(recipe), run, True)
        child.join(0.2 + draw.random() * duration / 2)
        if child.exitcode is None:
            os.kill(child.pid, signal.SIGKILL)
        kills += ended(child) == -signal.SIGKILL
    assert kills > 0
    train(recipe, run, resume=True, say=None)
    assert same(weights(run), weights(tmp_path / "whole"))
    assert losses(run) == losses(tmp_path / "whole")


def test_the_comparison_of_bits_can_fail(
    shared: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    controls = {
        "seed": tiny(shared, train={"seed": 1}),
        "order of the data": tiny(shared, data={"seed": 1}),
        "no moments carried": tiny(shared, growth=[{"at_step": 6, "to": {"ffn": 32}, "moments": "drop"}]),
        "growth one step later": tiny(shared, growth=[{"at_step": 7, "to": {"ffn": 32}}]),
    }
    for name, recipe in controls.items():
        train(recipe, tmp_path / name, say=None)
        assert not same(weights(tmp_path / name), weights(whole)), name
    # A resume that forgets the moments: stop at step 8 as a kill would, then go on without them.
    run, table = tmp_path / "forgetful", recipe_to_dict(tiny(shared))
    assert ended(start_child(killed_at, table, run, "tokenformer.runs", "prune_checkpoints", 2)) == -signal.SIGKILL
    monkeypatch.setattr("tokenformer.optim.load_named_state", lambda *_: None)
    train(tiny(shared), run, resume=True, say=None)
    assert not same(weights(run), weights(whole))


# --- stopped, resumed, refused ---


def stopped_by_signal(table: dict[str, Any], folder: Path, number: int, at: int) -> None:
    """Train as the command line does and get a signal amid step `at`."""
    from tokenformer import step
    from tokenformer.cli import main

    real = step.backward

    def backward(run: Any, state: Any, wrapped: Any) -> Any:
        if state.step == at and run.ranks.rank == run.ranks.world - 1:
            os.kill(os.getpid(), number)
        return real(run, state, wrapped)

    step.backward = backward
    path = folder.parent / f"{folder.name}-{os.environ.get('RANK', '0')}.json"
    path.write_text(json.dumps(table))
    sys.exit(main(["train", str(path), "--out", str(folder), "--resume"]))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_writes_a_checkpoint_and_sets_the_exit_code(
    shared: Path, whole: Path, tmp_path: Path, number: signal.Signals
) -> None:
    run = tmp_path / "run"
    child = start_child(stopped_by_signal, recipe_to_dict(tiny(shared)), run, int(number), 5)
    assert ended(child) == 128 + number
    result = runs.read_json(run / runs.RESULT)
    assert result["status"] == "stopped" and result["step"] == 6
    assert result["checkpoint"] == "checkpoints/step-00000006"  # on the boundary where the growth is still to come
    assert checkpoint.load_checkpoint(run)[0].config.ffn_tokens == 16
    train(tiny(shared), run, resume=True, say=None)
    assert same(weights(run), weights(whole))
    assert losses(run) == losses(whole)


def test_a_signal_says_where_the_checkpoint_is(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def say(line: str) -> None:
        if line.startswith("step 3/"):
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="SIGTERM after step 4: checkpoint .*step-00000004; --resume") as caught:
        train(tiny(shared), tmp_path / "run", say=say)
    assert caught.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_resumed_finished_run_returns_its_result_and_trains_nothing(shared: Path, whole: Path) -> None:
    said: list[str] = []
    before = (whole / runs.METRICS).read_bytes()
    assert train(tiny(shared), whole, resume=True, say=said.append) == runs.read_json(whole / runs.RESULT)
    assert len(said) == 1 and "is finished" in said[0]
    assert (whole / runs.METRICS).read_bytes() == before


def test_a_resume_with_another_recipe_names_the_key(shared: Path, whole: Path) -> None:
    with pytest.raises(ValueError, match="train.learning_rate is 0.01 there and 0.02 here"):
        train(tiny(shared, train={"learning_rate": 0.02}), whole, resume=True, say=None)


def test_a_run_does_not_go_on_with_another_text(shared: Path, tmp_path: Path) -> None:
    text = Path(shutil.copy(tiny_corpus(shared), tmp_path / "corpus.txt"))
    recipe, run, content = tiny(shared, data={"source": str(text)}, growth=[]), tmp_path / "run", text.read_bytes()
    train(recipe, run, say=None)
    (run / runs.RESULT).unlink()
    before = {path: path.read_bytes() for path in run.glob("*.json*")}
    text.write_bytes(content + b" and more")
    with pytest.raises(ValueError, match="run was begun with another text: the .* text had SHA-256 .*; put it back"):
        train(recipe, run, resume=True, say=None)
    assert {path: path.read_bytes() for path in run.glob("*.json*")} == before
    text.write_bytes(content)
    assert train(recipe, run, resume=True, say=None)["status"] == "finished"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"steps": 100_000}}, "data.repeat = true"),
        ({"train": {"device": "cuda:99"}}, "train.device"),
        ({"data": {"sequence_length": 4096}}, "sequence_length"),
        ({"growth": [{"at_step": 6, "to": {"ffn": 8}}]}, "growth.0.to.ffn"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_trained(
    shared: Path, tmp_path: Path, changes: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        train(tiny(shared, **changes), tmp_path / "run", say=None)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("result.json", [], "result.json: must be a JSON object"),
        ("result.json", {"status": "finished"}, "result.json: bits_per_byte must be of type float, and is missing"),
        ("checkpoints/step-00000012/trainer.json", {"grown_at": [9]}, r"grown_at = \[9\]: the recipe grows at \[6\]"),
        ("checkpoints/step-00000012/trainer.json", {"step": 13}, "trainer.json: step = 13: the recipe allows 0 to 12"),
    ],
)
def test_a_damaged_run_is_not_resumed(
    shared: Path, whole: Path, tmp_path: Path, name: str, content: Any, message: str
) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    if name != runs.RESULT:
        (run / runs.RESULT).unlink()
        train(tiny(shared), run, resume=True, say=None)  # the control: without its result, it is finished again
        (run / runs.RESULT).unlink()
        content = runs.read_json(run / name) | content
    (run / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        train(tiny(shared), run, resume=True, say=None)


@pytest.mark.parametrize("name", [checkpoint.WEIGHTS, checkpoint.OPTIMIZER])
def test_a_run_from_a_damaged_checkpoint_leaves_no_folder(
    shared: Path, whole: Path, tmp_path: Path, name: str
) -> None:
    ancestor = shutil.copytree(runs.checkpoints(whole)[-1], tmp_path / "ancestor")
    (ancestor / name).write_bytes((ancestor / name).read_bytes()[:-10])
    table = recipe_to_dict(tiny(shared)) | {"model": {"checkpoint": str(ancestor)}, "growth": []}
    table["data"] |= {"skip_tokens": 768}
    with pytest.raises(ValueError, match=f"{name}: truncated"):
        train(recipe_from_dict(table, "test"), tmp_path / "on", say=None)
    assert not (tmp_path / "on").exists()


def test_a_damaged_checkpoint_is_not_trained_on(shared: Path, whole: Path, tmp_path: Path) -> None:
    run, table = tmp_path / "run", recipe_to_dict(tiny(shared))
    assert ended(start_child(killed_at, table, run, "tokenformer.runs", "prune_checkpoints", 1)) == -signal.SIGKILL
    file = runs.checkpoints(run)[-1] / checkpoint.WEIGHTS
    file.write_bytes(file.read_bytes()[:-10])
    broken = "step-00000004/model.safetensors: truncated.*; once .*step-00000004 is removed, .* from its first step$"
    with pytest.raises(ValueError, match=broken):
        train(tiny(shared), run, resume=True, say=None)
    shutil.rmtree(runs.checkpoints(run)[-1])
    train(tiny(shared), run, resume=True, say=None)
    assert same(weights(run), weights(whole))


def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(shared: Path, tmp_path: Path) -> None:
    recipe = tiny(shared, train={"learning_rate": 1e30, "clip_norm": 0.0, "checkpoint_every": 1, "warmup_steps": 0})
    with pytest.raises(Diverged, match=r"step (\d): the (loss|gradient norm) is (nan|inf) at learning rate 1e\+30"):
        train(recipe, tmp_path / "run", say=None)
    result = runs.read_json(tmp_path / "run" / runs.RESULT)
    assert result["status"] == "failed"
    newest = runs.checkpoints(tmp_path / "run")[-1]
    assert f"the last good checkpoint is {newest}" in result["error"]
    assert result["step"] == int(newest.name[5:])
    checkpoint.load_checkpoint(newest)  # which refuses NaN


def test_a_run_that_diverges_in_its_last_step_is_no_result(shared: Path, tmp_path: Path) -> None:
    recipe = tiny(shared, growth=[], train={"steps": 1, "learning_rate": 1e30, "clip_norm": 0.0, "warmup_steps": 0})
    with pytest.raises(Diverged, match="step 1: the held-out loss is (nan|inf); "):
        train(recipe, tmp_path / "run", say=None)
    assert bits_of(tmp_path / "run") == math.inf


def test_a_full_disk_is_one_line_and_the_last_good_checkpoint_stays(
    shared: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = checkpoint.save_tensors

    def fill(tensors: Any, path: Path) -> None:
        if "step-00000008" in str(path):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(tensors, path)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_tensors", fill)
        with pytest.raises(ValueError, match="no space left on the disk.*the last good checkpoint is") as caught:
            train(tiny(shared), run, say=None)
    assert "\n" not in str(caught.value)
    assert [path.name for path in (run / runs.CHECKPOINTS).iterdir()] == ["step-00000004"]
    assert runs.read_json(run / runs.RESULT)["status"] == "failed"
    train(tiny(shared), run, resume=True, say=None)
    assert same(weights(run), weights(whole))


def test_a_disk_that_is_really_full_during_training_keeps_the_last_good_checkpoint(
    shared: Path, whole: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
        if subprocess.run(command, capture_output=True, timeout=20).returncode:
            pytest.skip("mounting a small disk needs root")
    except OSError:
        pytest.skip("this machine has no mount")

    def fill(line: str) -> None:
        if line.startswith("step 6/"):
            with open(disk / "filler", "wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    pass

    try:
        with pytest.raises(ValueError, match="[Nn]o space left on.*the last good checkpoint is .*step-00000004"):
            train(tiny(shared), disk / "run", say=fill)
        assert [path.name for path in (disk / "run" / runs.CHECKPOINTS).iterdir()] == ["step-00000004"]
        (disk / "filler").unlink()
        train(tiny(shared), disk / "run", resume=True, say=None)
        assert same(weights(disk / "run"), weights(whole))
    finally:
        subprocess.run(["umount", "-l", str(disk)], capture_output=True, timeout=20)


# --- growth when, how much, in what order ---


def scheduled(folder: Path, **slope: Any) -> Recipe:
    """A run of a FLOP budget that grows at a step, by the slope of its loss, and in two stages of two axes each."""
    growth = [
        {"at_step": 3, "to": {"qkv": 12}},
        {
            "at_slope": -0.6,
            "at_earliest_fraction": 0.35,
            "at_latest_fraction": 0.6,
            "slope_window": 0.15,
            "to": {"ffn": 32},
            "learning_rate": "restart",
            "rewarm_steps": 3,
            **slope,
        },
        {
            "at_fraction": 0.7,
            "until_fraction": 0.9,
            "stages": 2,
            "order": "one_by_one",
            "to": {"ffn": 64, "qkv": 20},
            "learning_rate": "rewind",
            "rewind_to": 0.5,
            "rewarm_steps": 2,
        },
    ]
    train = {"steps": None, "flops": 7e7, "log_every": 1, "checkpoint_every": 1000, "keep_checkpoints": 3}
    return tiny(folder, train=train, growth=growth)


@pytest.fixture(scope="module")
def unbroken(shared: Path) -> Path:
    """`scheduled`, never stopped."""
    train(scheduled(shared), shared / "unbroken", say=None)
    return shared / "unbroken"


def grown_at(run: Path) -> list[tuple[int, str]]:
    return [(line["step"], line["trigger"]) for line in lines(run, "growth")]


def stop_after(step: int) -> Any:
    """A listener that has the run stop after so many steps."""

    def say(line: str) -> None:
        if line.startswith(f"step {step - 1}/") and "of the FLOPs" in line:
            os.kill(os.getpid(), signal.SIGTERM)

    return say


def test_growth_comes_when_and_in_the_parts_that_the_recipe_says(shared: Path, unbroken: Path) -> None:
    result, planned = runs.read_json(unbroken / runs.RESULT), plan(scheduled(shared))
    triggers = ["at_step", "at_slope", *["at_fraction"] * 4]
    assert [trigger for _, trigger in grown_at(unbroken)] == triggers
    assert [event["growth"] for event in result["growth"]] == [event.name for event in planned.events]
    sizes = [{"qkv_tokens": 12}, {"ffn_tokens": 32}]
    sizes += [{"ffn_tokens": 48}, {"qkv_tokens": 16}, {"ffn_tokens": 64}, {"qkv_tokens": 20}]
    assert [event["to"] for event in result["growth"]] == sizes
    steps = [step for step, _ in grown_at(unbroken)]
    slope = result["growth"][1]
    assert steps[0] == 3 and steps[0] < steps[1] < planned.growth_steps[1]
    # The loss falls ever more steeply and then less so: at the earliest share it is not yet time.
    assert slope["slope"] > -0.6 and slope["flops"] > 0.4 * 7e7
    for step, share in zip(steps[2:], (0.7, 0.7 + 0.2 / 3, 0.7 + 0.4 / 3, 0.9), strict=True):
        [line] = [line for line in lines(unbroken, "growth") if line["step"] == step]
        assert share * 7e7 <= line["flops"] < share * 7e7 + planned.phases[-1].flops_per_step
    # The budget holds: the early growth left fewer steps, and one more would not have fitted.
    assert result["step"] == result["steps"] < planned.steps
    assert result["flops"] <= 7e7 < result["flops"] + planned.phases[-1].flops_per_step
    evaluated = [line["step"] for line in lines(unbroken, "eval")]
    assert all(evaluated.count(step) == 2 for step in steps)


@pytest.mark.parametrize(
    ("slope", "trigger"),
    [
        ({"at_slope": -1e-9}, "at_latest_fraction"),  # the loss never stops to fall so soon
        ({"at_slope": -100.0, "at_earliest_fraction": 0.4}, "at_slope"),  # it always falls less steeply
    ],
)
def test_a_slope_is_waited_for_between_the_earliest_and_the_latest(
    shared: Path, tmp_path: Path, slope: Any, trigger: str
) -> None:
    recipe = scheduled(shared, **slope)
    train(recipe, tmp_path / "run", say=None)
    step, why = grown_at(tmp_path / "run")[1]
    assert why == trigger
    if trigger == "at_latest_fraction":
        assert step == plan(recipe).growth_steps[1]
    else:
        window = plan(recipe, grown_at=[3]).window
        assert window and 0 <= plan(recipe).flops_at(step) / 7e7 - 0.4 < 0.03 and (step - 3) % window.bin_steps == 0


def test_a_kept_checkpoint_stays_where_a_slope_moves_the_step_that_is_kept(shared: Path, tmp_path: Path) -> None:
    growth = [{"at_slope": -100.0, "at_earliest_fraction": 0.3, "at_latest_fraction": 0.6, "to": {"ffn": 256}}]
    section = {"steps": None, "flops": 1e7, "keep_at": [0.25], "keep_checkpoints": 1, "checkpoint_every": 1}
    recipe = tiny(shared, growth=growth, train=section)
    train(recipe, tmp_path / "run", say=None)
    [(step, _)] = grown_at(tmp_path / "run")
    kept, moved = (plan(recipe, grown_at=grown).step_at(0.25) for grown in ([], [step]))
    assert moved < kept < step  # the control: the plan after the growth no longer names it
    left = [int(folder.name.partition("-")[2]) for folder in runs.checkpoints(tmp_path / "run")]
    assert left[-2:] == [kept, plan(recipe, grown_at=[step]).steps]


@pytest.mark.parametrize("event", range(6))
@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_a_run_stopped_around_a_growth_and_resumed_gives_the_same_bits(
    shared: Path, unbroken: Path, tmp_path: Path, event: int, offset: int
) -> None:
    step = grown_at(unbroken)[event][0] + offset
    with pytest.raises(Stopped, match=f"after step {step}:"):
        train(scheduled(shared), tmp_path / "run", say=stop_after(step))
    result = train(scheduled(shared), tmp_path / "run", resume=True, say=None)
    assert same(weights(tmp_path / "run"), weights(unbroken))
    assert losses(tmp_path / "run") == losses(unbroken)
    assert result["growth"] == [
        event | {key: result["growth"][i][key] for key in ("seconds", "grow_seconds")}
        for i, event in enumerate(runs.read_json(unbroken / runs.RESULT)["growth"])
    ]


def test_a_resume_that_forgets_the_losses_would_differ(shared: Path, unbroken: Path, tmp_path: Path) -> None:
    """The control of the test above, and the size of what is kept."""
    slope = grown_at(unbroken)[1][0]
    with pytest.raises(Stopped):
        train(scheduled(shared), tmp_path / "run", say=stop_after(slope - 1))
    path = runs.checkpoints(tmp_path / "run")[-1] / checkpoint.TRAINER
    trainer = runs.read_json(path)
    assert trainer["grown_at"] == [3] and 2 <= len(trainer["loss_sums"]) <= 16
    runs.write_json(path, trainer | {"loss_sums": [100.0 / (1 + i) for i in range(len(trainer["loss_sums"]))]})
    train(scheduled(shared), tmp_path / "run", resume=True, say=None)
    assert grown_at(tmp_path / "run") != grown_at(unbroken)
    assert not same(weights(tmp_path / "run"), weights(unbroken))


def test_text_is_required_for_the_longest_run_that_may_be(shared: Path, unbroken: Path) -> None:
    most = plan(scheduled(shared)).tokens
    assert most > runs.read_json(unbroken / runs.RESULT)["tokens"]
    asked: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batches, "require", lambda self, steps: asked.append(steps * 64))
        require_feasible(scheduled(shared), unbroken, None)
    assert asked == [most]


def test_every_growth_of_a_run_is_in_its_report(unbroken: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(unbroken, copy)
    paths = write_report(copy)
    [arm] = runs.read_json(paths["json"])["arms"]
    assert [(event["step"], event["to"]) for event in arm["growth"]] == [
        (line["step"], line["to"]) for line in lines(unbroken, "growth")
    ]
    page = paths["html"].read_text()
    drawn = [chart.count('<line class="growth s') for chart in page.split("<svg")[1:]]
    assert {count for count in drawn if count} == {6} and drawn.count(6) >= 4
    table = page.split("<h2>Growth</h2>")[1].split("</table>")[0]
    assert all(re.search(rf">{step}<", table) for step, _ in grown_at(unbroken))
    slopes = [line["slope"] for line in lines(unbroken, "growth") if "slope" in line]
    assert slopes == [event["slope"] for event in arm["growth"] if event["trigger"] == "at_slope"] and slopes
    assert all(f"slope {slope:.4f}" in table for slope in slopes)
    assert "It grew 6 times" in " ".join(runs.read_json(paths["json"])["answer"])


# --- learning rate, precision, accumulation ---


def planned_by_hand(*sections: GrowthSection) -> Plan:
    """4 steps of 10 FLOPs, 3 of 20, and after a second growth 5 of 40: growth at 40 of 100, or at 40 and 100 of 300."""
    phases = (Phase(0, 4, {}, 10), Phase(4, 7, {}, 20), Phase(7, 12, {}, 40))[: len(sections) + 1]
    return Plan(phases, 1, tuple(Event(f"growth.{i}", section) for i, section in enumerate(sections)), 0)


def rates(schedule: str, *sections: GrowthSection) -> list[float]:
    settings = {"learning_rate": 1.0, "min_learning_rate_ratio": 0.0, "warmup_steps": 2, "decay_fraction": 0.5}
    recipe = recipe_from_dict({"name": "x", "train": {"steps": 99, "schedule": schedule, **settings}}, "test")
    planned = planned_by_hand(*sections)
    return [learning_rate_at(recipe, planned, step) for step in range(planned.steps)]


def policy(name: str, steps: int = 1, **settings: Any) -> GrowthSection:
    return GrowthSection(to={"a": 1}, learning_rate=name, rewarm_steps=steps, **settings)


def test_a_schedule_that_restarts_or_is_rewound_runs_to_its_end_over_the_rest_of_the_budget() -> None:
    # Shares of the FLOPs before each step: 0, .1, .2, .3, then .4, .6, .8, which is 0, 1/3, 2/3 of what is left.
    # wsd falls over its second half: twice what is left of it.
    before = [0.5, 1, 1, 1]  # 2 steps of warm-up
    assert rates("wsd", policy("keep")) == pytest.approx([*before, 1, 0.8, 0.4])
    assert rates("wsd", policy("restart")) == pytest.approx([*before, 1, 1, 2 / 3])
    assert rates("wsd", policy("restart", 4)) == pytest.approx([*before, 1 / 4, 2 / 4, 2 / 3 * 3 / 4])
    # Back to .25 of its course: .25, .25 + .75 / 3 = .5, .25 + 1.5 / 3 = .75
    assert rates("wsd", policy("rewind", rewind_to=0.25)) == pytest.approx([*before, 1, 1, 0.5])
    assert rates("wsd", policy("rewind", 2, rewind_to=0.25)) == pytest.approx([*before, 0.5, 1, 0.5])
    # Half a cosine at 0, 1/3, 2/3 is 1, 3/4, 1/4; at 1/2, 2/3, 5/6: 1/2, 1/4, (1 - cos 30 degrees) / 2
    assert rates("cosine", policy("restart"))[4:] == pytest.approx([1, 3 / 4, 1 / 4])
    assert rates("cosine", policy("rewind", rewind_to=0.5))[4:] == pytest.approx([1 / 2, 1 / 4, 0.5 - 3**0.5 / 4])


def test_the_newest_course_counts_and_warming_up_again_is_on_top_of_it() -> None:
    # Shares: the second growth lies at 100 of 300 FLOPs; from there 0, .2, .4, .6, .8 of what is left.
    twice = rates("wsd", policy("restart", 3), policy("restart", 1))
    assert twice[7:] == pytest.approx([1, 1, 1, 0.8, 0.4])
    assert twice[4:7] == pytest.approx([1 / 3, 2 / 3, 1])
    # The first restarts at 40 of 300 and goes on: 60/260, 100/260, 140/260, 180/260, 220/260 of its course.
    again = rates("wsd", policy("restart", 3), policy("rewarm_all", 2))
    assert again[7:] == pytest.approx([0.5, 1, 2 * 120 / 260, 2 * 80 / 260, 2 * 40 / 260])
    # A new course ends a warm-up that has not come to its end.
    assert rates("wsd", policy("rewarm_all", 100), policy("restart", 1))[7] == 1


def test_a_growing_run_has_the_same_schedule_over_its_flops(shared: Path) -> None:
    constant, growing = (
        tiny(shared, train={"steps": None, "flops": 3e8, "warmup_steps": 0}, growth=growth)
        for growth in ([], [{"at_fraction": 0.4, "to": {"ffn": 64}}])
    )
    first, second = plan(constant), plan(growing)
    assert first.steps > second.steps
    for share in (0.0, 0.3, 0.69, 0.8, 0.95):
        rates = []
        for recipe, planned in ((constant, first), (growing, second)):
            step = next(s for s in range(planned.steps) if planned.flops_at(s) >= share * planned.flops)
            rates.append(learning_rate_at(recipe, planned, step))
        assert rates[0] == pytest.approx(rates[1], rel=0.1), share


def test_rewarming_all_ramps_up_again_from_the_growth(shared: Path) -> None:
    rates = {}
    for policy in ("keep", "rewarm_all", "rewarm_new"):
        growth = [{"at_step": 6, "to": {"ffn": 32}, "learning_rate": policy, "rewarm_steps": 4}]
        recipe = tiny(shared, growth=growth, train={"schedule": "constant"})
        rates[policy] = [learning_rate_at(recipe, plan(recipe), step) for step in range(12)]
    shares = [new / old for new, old in zip(rates["rewarm_all"], rates["keep"], strict=True)]
    assert shares == [1, 1, 1, 1, 1, 1, 0.25, 0.5, 0.75, 1, 1, 1]
    assert rates["rewarm_new"] == rates["keep"]  # that one is the optimizer's, row by row


@pytest.mark.parametrize("policy", ["rewarm_new", "rewarm_all"])
def test_the_learning_rate_policy_survives_a_resume(
    shared: Path, whole: Path, tmp_path: Path, policy: str
) -> None:
    growth = [{"at_step": 6, "to": {"ffn_tokens": 32}, "learning_rate": policy, "rewarm_steps": 5}]
    recipe = tiny(shared, growth=growth)
    train(recipe, tmp_path / "whole", say=None)
    run = tmp_path / "run"
    child = start_child(killed_at, recipe_to_dict(recipe), run, "tokenformer.runs", "prune_checkpoints", 2)
    assert ended(child) == -signal.SIGKILL
    train(recipe, run, resume=True, say=None)
    assert same(weights(run), weights(tmp_path / "whole"))


def seventh_step(recipe: Recipe, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """How the seventh step, the first after the growth, moved the old rows of a table of keys and the new ones."""
    train(recipe, folder, say=None)
    before, after = (load_file(path / checkpoint.WEIGHTS) for path in runs.checkpoints(folder)[5:7])
    key = "model.layers.0.mlp.key"
    return after[key][:16] - before[key], after[key][16:]  # new keys start at zero


def test_a_policy_slows_the_rows_that_it_names_and_no_others(shared: Path, tmp_path: Path) -> None:
    moved = {}
    for policy in ("keep", "rewarm_new", "rewarm_all"):
        growth = [{"at_step": 6, "to": {"ffn_tokens": 32}, "learning_rate": policy, "rewarm_steps": 5}]
        changes = {"checkpoint_every": 1, "keep_checkpoints": 12, "schedule": "constant", "evaluate_every": 100}
        moved[policy] = seventh_step(tiny(shared, growth=growth, train=changes), tmp_path / policy)
    old, new = moved["keep"]
    assert old.abs().max() > 1e-3 and new.abs().max() > 1e-3
    torch.testing.assert_close(moved["rewarm_new"][0], old, rtol=0, atol=0)
    torch.testing.assert_close(moved["rewarm_new"][1], new / 5, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(moved["rewarm_all"][0], old / 5, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(moved["rewarm_all"][1], new / 5, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(("parts", "rows"), [(1, 4), (4, 1)])
def test_no_pass_holds_more_rows_than_one_of_training(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: int, rows: int
) -> None:
    from tokenformer.models import TokenFormerForCausalLM

    forward, seen = TokenFormerForCausalLM.forward, []

    def counted(self: Any, input_ids: Any = None, **keywords: Any) -> Any:
        seen.append(len(input_ids))
        return forward(self, input_ids=input_ids, **keywords)

    monkeypatch.setattr(TokenFormerForCausalLM, "forward", counted)
    growth = [{"at_step": 1, "to": {"ffn_tokens": 32}}]
    train(tiny(shared, train={"steps": 2, "accumulation_steps": parts}, growth=growth), tmp_path / "run", say=None)
    assert max(seen) == rows


def final_loss(recipe: Recipe, folder: Path) -> float:
    return train(recipe, folder, say=None)["loss"]


def test_accumulation_and_recomputation_change_nothing_but_rounding(shared: Path, whole: Path, tmp_path: Path) -> None:
    reference = runs.read_json(whole / runs.RESULT)["loss"]
    parts = final_loss(tiny(shared, train={"accumulation_steps": 4}), tmp_path / "parts")
    again = final_loss(tiny(shared, train={"gradient_checkpointing": True}), tmp_path / "again")
    half = final_loss(tiny(shared, train={"dtype": "bfloat16"}), tmp_path / "half")
    assert parts == pytest.approx(reference, abs=1e-4)
    assert again == pytest.approx(reference, abs=1e-4)
    assert half == pytest.approx(reference, abs=0.05) and abs(half - reference) > 1e-6


def test_a_compiled_run_is_the_same_and_is_compiled_anew_after_its_growth(
    shared: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, compiled = torch.compile, []

    def traced(model: Any) -> Any:  # the same graphs, without a C++ compiler
        compiled.append(model.config.ffn_tokens)
        return real(model, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", traced)
    train(tiny(shared, train={"compile": True}), tmp_path / "run", say=None)
    assert compiled == [16, 32]
    assert largest_difference(weights(tmp_path / "run"), weights(whole)) < 1e-4
    train(tiny(shared, train={"compile": True, "seed": 1}), tmp_path / "other", say=None)  # the control
    assert largest_difference(weights(tmp_path / "other"), weights(whole)) > 1e-3


def test_clipping_bounds_the_step_and_zero_turns_it_off(shared: Path, whole: Path, tmp_path: Path) -> None:
    train(tiny(shared, train={"clip_norm": 0.0}), tmp_path / "off", say=None)
    train(tiny(shared, train={"clip_norm": 1e9}), tmp_path / "never", say=None)
    train(tiny(shared, train={"clip_norm": 1e-3}), tmp_path / "tight", say=None)
    assert same(weights(tmp_path / "off"), weights(tmp_path / "never"))
    assert not same(weights(tmp_path / "off"), weights(tmp_path / "tight"))
    assert all(math.isfinite(line["grad_norm"]) for line in lines(tmp_path / "off", "train"))


def test_another_architecture_trains_in_the_same_loop(shared: Path, tmp_path: Path) -> None:
    recipe = tiny(shared, growth=[])
    recipe.model.architecture = "llama"
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    recipe.model.fields = sizes
    levels = set()
    result = train(recipe, tmp_path / "run", say=lambda line: levels.add(transformers_logging.get_verbosity()))
    assert levels == {transformers_logging.ERROR}  # what it warns of, such as its own defaults' end mark, is not ours
    assert result["status"] == "finished"
    assert type(checkpoint.load_checkpoint(tmp_path / "run")[0]).__name__ == "LlamaForCausalLM"


def test_the_model_is_the_seed_s_and_knows_the_end_mark(shared: Path, whole: Path) -> None:
    config = checkpoint.load_checkpoint(whole)[0].config
    assert config.eos_token_id == 0 and config.vocab_size == 256
    a, b, c = (build_model(model_config(tiny(shared), 256), seed) for seed in (0, 0, 1))
    assert torch.equal(a.lm_head.weight, b.lm_head.weight) and not torch.equal(a.lm_head.weight, c.lm_head.weight)


# --- TensorBoard ---


def test_tensorboard_gets_the_metrics(shared: Path, tmp_path: Path) -> None:
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(tiny(shared, train={"tensorboard": True}), tmp_path / "run", say=None)
    events = loading.EventAccumulator(str(tmp_path / "run" / runs.TENSORBOARD)).Reload()
    assert [entry.step for entry in events.Scalars("train/loss")] == [3, 6, 9, 12]
    assert events.Scalars("eval/bits_per_byte")[-1].value == pytest.approx(
        lines(tmp_path / "run", "eval")[-1]["bits_per_byte"]
    )


def test_a_missing_tensorboard_is_one_line_that_says_how_to_get_it(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"pip install 'tokenformer\[tensorboard\]'"):
        train(tiny(shared, train={"tensorboard": True}), tmp_path / "run", say=None)
    assert not (tmp_path / "run").exists()


# --- several ranks ---


def free_port() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


def on_two_ranks(work: Any, *arguments: Any) -> list[int]:
    """Exit codes of two processes that find each other as torchrun's do."""
    port = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    children = [start_child(work, *arguments, RANK=str(rank), LOCAL_RANK=str(rank), **port) for rank in range(2)]
    try:
        return [ended(child) for child in children]
    finally:
        for child in children:
            child.kill()


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    names = [name for name in a if name.startswith("model.safetensors")]
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in names)


def test_ranks_and_parts_share_out_a_batch_without_loss(shared: Path, whole: Path) -> None:
    from tokenformer.distributed import Ranks

    batch = torch.arange(8)
    rows = [rank_rows(batch, Ranks(rank, 2)).chunk(2) for rank in range(2)]
    assert sorted(torch.cat([part for parts in rows for part in parts]).tolist()) == list(range(8))
    assert all(len(part) == 2 for parts in rows for part in parts)


def test_two_ranks_end_where_one_does_growth_and_resume_included(shared: Path, whole: Path, tmp_path: Path) -> None:
    table = recipe_to_dict(tiny(shared))
    assert on_two_ranks(run_in_child, table, tmp_path / "two", False) == [0, 0]
    assert largest_difference(weights(tmp_path / "two"), weights(whole)) < 1e-4
    [grown] = lines(tmp_path / "two", "growth")
    assert grown["step"] == 6 and grown["max_logit_change"] <= 1e-5
    one, two = (lines(run, "eval") for run in (whole, tmp_path / "two"))
    assert [a["loss"] for a in one] == pytest.approx([b["loss"] for b in two], abs=1e-4)
    # The control: one rank with half of the batch is another run.
    train(tiny(shared, data={"batch_size": 2}), tmp_path / "half", say=None)
    assert largest_difference(weights(tmp_path / "half"), weights(whole)) > 1e-3
    # A signal that reaches one rank stops both after the same step, and both go on from there.
    stopped = on_two_ranks(stopped_by_signal, table, tmp_path / "stopped", int(signal.SIGTERM), 7)
    assert stopped == [143, 143]
    assert runs.read_json(tmp_path / "stopped" / runs.RESULT)["step"] == 8
    assert on_two_ranks(run_in_child, table, tmp_path / "stopped", True) == [0, 0]
    assert same(weights(tmp_path / "stopped"), weights(tmp_path / "two"))


def test_two_ranks_see_the_slope_that_one_does(shared: Path, unbroken: Path, tmp_path: Path) -> None:
    assert on_two_ranks(run_in_child, recipe_to_dict(scheduled(shared)), tmp_path / "two", False) == [0, 0]
    assert grown_at(tmp_path / "two") == grown_at(unbroken)
    assert largest_difference(weights(tmp_path / "two"), weights(unbroken)) < 1e-3


def refused(table: dict[str, Any], folder: Path) -> None:
    try:
        train(recipe_from_dict(table, "the test"), folder, say=None)
    except ValueError as error:
        assert "data.batch_size = 4 is not divisible by 8 (2 ranks times train.accumulation_steps = 4)" in str(error)
        sys.exit(7)


def test_a_batch_that_the_ranks_cannot_share_is_refused(shared: Path, tmp_path: Path) -> None:
    table = recipe_to_dict(tiny(shared, train={"accumulation_steps": 4}))
    assert on_two_ranks(refused, table, tmp_path / "run") == [7, 7]
    assert not (tmp_path / "run").exists()


def refused_together(table: dict[str, Any], folder: Path, trouble: str) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    def say(line: str) -> None:
        if trouble == "progress" and line.startswith("step 3/"):
            full()

    if trouble == "checkpoint":
        checkpoint.flush_to_disk = full
    if trouble == "metrics":
        runs.Metrics.write = full
    try:
        train(recipe_from_dict(table, "the test"), folder, say=say)
    except (ValueError, OSError) as error:
        assert ("holds files but no run" if trouble == "folder" else "o space left on ") in str(error)
        sys.exit(8 if getattr(error, "silent", False) else 7)


@pytest.mark.parametrize("trouble", ["folder", "checkpoint", "metrics", "progress"])
def test_what_rank_0_meets_all_ranks_raise_and_one_says(shared: Path, tmp_path: Path, trouble: str) -> None:
    if trouble == "folder":
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "thesis.txt").write_text("years of work")
    table = recipe_to_dict(tiny(shared, train={"steps": 4}, growth=[]))
    assert on_two_ranks(refused_together, table, tmp_path / "run", trouble) == [7, 8]


def test_the_batches_of_a_run_are_the_data_module_s(shared: Path, whole: Path) -> None:
    """What a resume relies on: a batch is a function of the seed and the step."""
    tokens = torch.arange(1000).numpy()
    assert torch.equal(Batches(tokens, 16, 4, 0)[5], Batches(tokens, 16, 4, 0)[5])
    assert not torch.equal(Batches(tokens, 16, 4, 0)[5], Batches(tokens, 16, 4, 1)[5])

# --- going on from a checkpoint ---


def test_a_run_goes_on_from_a_grown_checkpoint_with_its_moments_and_its_cost(
    shared: Path, whole: Path, tmp_path: Path
) -> None:
    before = runs.read_json(whole / runs.RESULT)
    grow_checkpoint(whole, tmp_path / "grown", "zero_keys", {"ffn": 48}, say=lambda line: None)
    seen = before["unique_tokens"]
    table = recipe_to_dict(tiny(shared)) | {"model": {"checkpoint": str(tmp_path / "grown")}, "growth": []}
    table["data"] |= {"skip_tokens": seen}
    table["train"] |= {"steps": 4, "warmup_steps": 0, "learning_rate": 1e-9}
    recipe = recipe_from_dict(table, "test")
    result = train(recipe, tmp_path / "on", say=None)
    assert result["flops"] == before["flops"] + plan(recipe).flops
    assert result["unique_tokens"] == result["tokens"] == seen + 4 * 4 * 16
    assert result["seconds"] > before["seconds"]
    assert lines(tmp_path / "on", "eval")[0]["tokens"] == before["tokens"]
    cost = checkpoint.ancestry(tmp_path / "on" / result["checkpoint"])
    assert (cost["flops"], cost["tokens"]) == (result["flops"], result["tokens"])
    assert [stream["tokens"] for stream in cost["streams"]] == [result["tokens"]]
    assert [event["operator"] for event in result["growth"]] == ["zero_keys", "zero_keys"]
    first, last = lines(tmp_path / "on", "eval")[0], lines(whole, "eval")[-1]
    assert first["bits_per_byte"] == pytest.approx(last["bits_per_byte"], abs=1e-4)
    moments = load_file(tmp_path / "on" / result["checkpoint"] / checkpoint.OPTIMIZER)
    assert moments["step.model.norm.weight"] == 12 + 4


def test_the_loss_is_evaluated_soon_after_a_growth(shared: Path, tmp_path: Path) -> None:
    growth = [{"at_step": 10, "to": {"ffn_tokens": 24}}]
    seldom = {"steps": 80, "evaluate_every": 1000}
    for folder, events, steps in (("grown", growth, [0, 10, 10, 15, 30, 70, 80]), ("same", [], [0, 80])):
        train(tiny(shared, growth=events, train=seldom), tmp_path / folder, say=None)
        assert [line["step"] for line in lines(tmp_path / folder, "eval")] == steps


def test_a_run_goes_on_past_a_text_that_has_grown_longer(shared: Path, tmp_path: Path) -> None:
    documents = tiny_corpus(shared).read_text().split("\f")
    text = tmp_path / "text.txt"
    text.write_text("\f".join(documents[:100]))
    train(tiny(shared, data={"source": str(text)}, growth=[]), tmp_path / "first", say=None)
    held = runs.read_json(tmp_path / "first" / runs.DATA)["train_tokens"]
    table = recipe_to_dict(tiny(shared, data={"source": str(text)}))
    table |= {"model": {"checkpoint": str(tmp_path / "first")}, "growth": []}
    table["data"] |= {"skip_tokens": held, "seed": 1}
    text.write_text("\f".join([documents[200], *documents[1:]]))  # the control: another text of the same length
    with pytest.raises(ValueError, match="the text has changed"):
        train(recipe_from_dict(table, "test"), tmp_path / "on", say=None)
    text.write_text("\f".join(documents))
    result = train(recipe_from_dict(table, "test"), tmp_path / "on", say=None)
    assert result["unique_tokens"] == held + 12 * 4 * 16 and result["tokens"] == 2 * 12 * 4 * 16
    shorter, longer = checkpoint.ancestry(tmp_path / "on" / result["checkpoint"])["streams"]
    assert (shorter["length"], longer["first"], longer["tokens"]) == (held, held, result["unique_tokens"])


@pytest.mark.parametrize("change", ["gains a checkpoint", "is removed"])
def test_a_resume_reads_nothing_of_its_ancestor(shared: Path, whole: Path, tmp_path: Path, change: str) -> None:
    ancestor, run = tmp_path / "ancestor", tmp_path / "run"
    shutil.copytree(whole, ancestor)
    table = recipe_to_dict(tiny(shared)) | {"model": {"checkpoint": str(ancestor)}, "growth": []}
    table["data"] |= {"skip_tokens": 768}
    recipe = recipe_from_dict(table, "test")
    train(recipe, tmp_path / "unbroken", say=None)
    before = start_of(recipe)

    def say(line: str) -> None:
        if line.startswith("step 3/"):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        train(recipe, run, say=say)
    if change == "is removed":
        shutil.rmtree(ancestor)
        with pytest.raises(ValueError, match="no such checkpoint"):  # the control
            start_of(recipe)
    else:
        shutil.copytree(runs.checkpoints(whole)[0], runs.checkpoint_folder(ancestor, 99))  # smaller and cheaper
        assert start_of(recipe) != before
    assert start_of(recipe, run) == before
    result = train(recipe, run, resume=True, say=None)
    assert same(weights(run), weights(tmp_path / "unbroken"))
    assert result["flops"] == runs.read_json(tmp_path / "unbroken" / runs.RESULT)["flops"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, r"data.skip_tokens = 0: model.checkpoint has seen the first 768 tokens; set it to 768"),
        ({"skip_tokens": 768, "seed": 1}, r"has seen 768 tokens of .* with data.seed = 0, and here it is 1;"),
        ({"skip_tokens": 10_000_000}, "take a shorter run .* or a larger data.source"),
    ],
)
def test_text_that_an_ancestor_saw_is_not_seen_again(
    data: dict[str, Any], message: str, shared: Path, whole: Path, tmp_path: Path
) -> None:
    table = recipe_to_dict(tiny(shared)) | {"model": {"checkpoint": str(whole)}, "growth": []}
    table["data"] |= data
    with pytest.raises(ValueError, match=message):
        train(recipe_from_dict(table, "test"), tmp_path / "on", say=None)
    assert not (tmp_path / "on").exists()


@pytest.mark.parametrize(
    ("data", "again"),
    [({"repeat": True}, True), ({"repeat": True, "skip_tokens": 768}, False), ({"skip_tokens": 768}, False)],
)
def test_a_result_says_whether_an_ancestor_had_read_its_text(
    data: dict[str, Any], again: bool, shared: Path, whole: Path, tmp_path: Path
) -> None:
    table = recipe_to_dict(tiny(shared)) | {"model": {"checkpoint": str(whole)}, "growth": []}
    table["data"] |= data
    table["train"] |= {"steps": 2, "warmup_steps": 0}
    assert train(recipe_from_dict(table, "test"), tmp_path / "on", say=None)["reads_again"] is again


def test_a_checkpoint_brings_the_whole_model(shared: Path, whole: Path) -> None:
    table = recipe_to_dict(tiny(shared))
    table["model"]["checkpoint"] = str(whole)
    with pytest.raises(ValueError, match="model.checkpoint: brings the whole model, so hidden_size"):
        recipe_from_dict(table, "test")
