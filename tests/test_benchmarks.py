"""The benchmarks' correctness checks: green on what is shipped, red and without a table on a side made wrong.

No test looks at a time.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenformer.recipe import arm_recipe, load_recipe

FOLDER = Path(__file__).parents[1] / "benchmarks"
SMALL = ["--size", "1x16", "--sequences", "2", "--length", "9", "--rounds", "1", "--fill", "0"]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A benchmark's module by name; the scripts import each other as they do when run from their folder."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def test_training_step_shows_every_side_after_its_check(benchmark: Any, capsys: Any, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    assert benchmark("train_step").main([*SMALL, "--allocator", "as-is", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "RED" not in printed and printed.index("correctness") < printed.index("published / ours")
    (result,) = json.loads(file.read_text())
    sides = {"ours", "published", "llama", "gpt2"}
    assert set(result["seconds"]) == sides | {f"floor {side}" for side in sides}
    assert all(len(each) == 1 and each[0] > 0 for each in result["seconds"].values())
    kept = result["bytes_kept_for_backward"]
    assert kept["ours"] < kept["published"]


@pytest.mark.parametrize("side", ["ours", "published", "llama", "gpt2"])
def test_training_step_refuses_its_table_when_a_side_is_wrong(benchmark: Any, capsys: Any, side: str) -> None:
    assert benchmark("train_step").main([*SMALL, "--allocator", "as-is", "--break", side]) == 1
    captured = capsys.readouterr()
    assert "RED" in captured.out and "the correctness check is red" in captured.err
    assert "published / ours" not in captured.out and "tokens/s" not in captured.out


def test_tuned_allocator_runs_in_a_process_of_its_own_and_hands_its_redness_on() -> None:
    command = [sys.executable, str(FOLDER / "train_step.py"), *SMALL, "--allocator", "tuned"]
    environment = os.environ | {"PYTHONPATH": str(FOLDER.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--break", "llama"], env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "allocator tuned" in done.stdout and "RED" in done.stdout and "tokens/s" not in done.stdout


def test_decoding_compares_the_texts_before_their_times(benchmark: Any, capsys: Any) -> None:
    small = ["--size", "1x16", "--tokens", "12", "--prompt", "4", "--rounds", "1"]
    assert benchmark("decode").main(small) == 0
    assert "ours without cache" in capsys.readouterr().out
    assert benchmark("decode").main([*small, "--break-cache"]) == 1
    assert "tokens/s" not in capsys.readouterr().out


def test_quickstart_size_is_the_grown_one(benchmark: Any) -> None:
    size = benchmark("sides").parse_size("quickstart")
    recipe = load_recipe("quickstart")
    (growth,) = (event for arm in recipe.arms for event in arm_recipe(recipe, arm).growth)
    assert {axis: getattr(size.config, axis) for axis in growth.to} == growth.to


@pytest.mark.parametrize("text", ["12", "x768", "0x768", "12x", "quick"])
def test_sizes_that_mean_nothing_are_refused(benchmark: Any, capsys: Any, text: str) -> None:
    assert benchmark("train_step").main(["--size", text]) == 2
    assert f"--size: '{text}'; allowed: quickstart, or LAYERSxWIDTH" in capsys.readouterr().err


def test_floor_runs_the_products_of_the_step_and_nothing_else(benchmark: Any) -> None:
    weight = torch.randn(5, 7, requires_grad=True)
    x = torch.randn(3, 7, requires_grad=True)
    recorder = benchmark("floor").Recorder()
    with recorder:
        (x @ weight.t()).exp().sum().backward()
    assert [key[0] for key in recorder.calls] == [torch.ops.aten.mm.default] * 3  # one forward, two gradients
    benchmark("floor").matrix_products(lambda: torch.mm(x.detach(), weight.detach().t()))()


def test_a_large_growth_is_compared_with_its_start_and_with_a_spoilt_one(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenformer.grow_checkpoint import grow_checkpoint

    large = benchmark("grow_large")
    monkeypatch.setattr(large, "LAYERS", 2)
    monkeypatch.setattr(large, "VOCABULARY", 300)
    config = large.write_random(tmp_path / "old", scale=0.1)
    to = {"hidden_size": 288, "intermediate_size": 768, "num_hidden_layers": 3}
    grow_checkpoint(tmp_path / "old", tmp_path / "new", "zero", to, say=lambda line: None, measure="none")
    assert large.size_of(tmp_path / "new") > large.size_of(tmp_path / "old") > 2 * 2 * 300 * 192
    compared = large.compared(tmp_path / "old", tmp_path / "new", config)
    assert 0 < large.CONTROL * compared["logit_change"] < compared["control_logit_change"]
