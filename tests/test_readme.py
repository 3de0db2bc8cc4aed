"""The README's commands and its Python do what they say; sizes are made small, the commands are the reader's own."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import stand_ins

from tokenformer.recipe import recipe_from_dict

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALL = "train.threads=1 train.evaluate_every=100 data.batch_size=2 data.sequence_length=32 data.valid_tokens=512"
# What is added to a command so that it takes seconds: a budget of few steps, and for the GPU recipe no network.
SHRINK = {
    "quickstart": f"train.flops=1e9 train.warmup_steps=2 {SMALL}",
    "adapt runs/first --text": (
        "train.steps=3 train.warmup_steps=0 train.threads=1 data.batch_size=2 data.valid_tokens=512"
    ),
    "race growth_llama_cpu": (
        "train.flops=3e11 train.warmup_steps=2 data.source=embedded data.valid_source=README.md "
        f"race.final_text=notes.txt {SMALL}"
    ),
    "train gpu_150m": (
        f"train.steps=3 train.warmup_steps=1 growth.0.at_fraction=0.4 growth.0.rewarm_steps=1 {SMALL} "
        "train.compile=false train.accumulation_steps=1 "
        "data.source=embedded data.tokenizer=bytes data.valid_fraction=0.05 model.num_hidden_layers=1 "
        "model.hidden_size=24 model.qkv_tokens=8 model.proj_tokens=8 model.ffn_tokens=16 model.vocab_size=256 "
        "growth.0.to.ffn_tokens=32 train.device=cpu"
    ),
}


def program(words: list[str]) -> list[str]:
    modules = {"tokenformer": "tokenformer", "torchrun": "torch.distributed.run"}
    return [sys.executable, "-m", modules[words[0]], *words[1:]]


def test_the_commands_run_one_after_the_other(tmp_path):
    stand_ins.prepare(tmp_path)
    notes = "".join(f"note {i} has {i * i % 9973}\n" for i in range(15_000))  # by what it says a document is held out
    (tmp_path / "notes.txt").write_text(notes, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    commands = stand_ins.commands(README)
    assert len(commands) >= 15
    for command in commands:
        extra = next((words for start, words in SHRINK.items() if start in command), "")
        line = command.replace("--nproc-per-node 8", "--nproc-per-node 2")
        if "torchrun" in line:
            line = line.replace("runs/gpu_150m", "runs/two_ranks")
        done = subprocess.run(
            program(stand_ins.words_here(f"{line} {extra}")),
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    for page in ("quickstart", "first", "gpu_150m", "two_ranks"):
        assert (tmp_path / "runs" / page / "report.html").stat().st_size > 10_000
    assert json.loads((tmp_path / "tokenformer-150m.tasks.json").read_text())["tasks"]
    wrong = subprocess.run(
        program(["tokenformer", "eval", "runs/nowhere"]), cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1  # the control: a command that is wrong does fail


def test_the_python_runs_and_the_function_is_the_same():
    (code,) = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
    assert len([line for line in code.splitlines() if line and not line.startswith(("import", "from"))]) <= 10
    names: dict = {}
    lines = code.splitlines()
    cut = next(i for i, line in enumerate(lines) if line.startswith("grown ="))
    exec("\n".join(lines[:cut]), names)
    small = names["model"]
    before = small(names["ids"]).logits
    exec("\n".join(lines[cut:]), names)
    assert (names["model"](names["ids"]).logits - before).abs().max() < 1e-5
    assert names["model"].config.ffn_tokens == 512 and names["optimizer"].state


def test_the_growth_is_one_that_a_recipe_may_have():
    (example,) = re.findall(r"^```toml\n(.*?)^```", README, re.M | re.S)
    recipe = recipe_from_dict({"name": "x", "train": {"flops": 1e12}, **tomllib.loads(example)}, "README.md")
    assert [event.learning_rate for event in recipe.growth] == ["rewind"]


@pytest.mark.parametrize("path", re.findall(r"^\| `([\w./]+)` \|", README.split("## Files")[1], re.M))
def test_the_file_map_names_what_is_there(path):
    assert (ROOT / path).exists()
