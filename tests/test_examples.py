"""The scripts under examples/: each grows in the middle, and cut before or after that it ends as if it had not been."""

import json
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from tokenformer import grow

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NAMES = ["plain_loop", "hf_trainer", "accelerate_loop"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{i} plus {i} is {2 * i}.\n" for i in range(2000)))
    return path


def run(name: str, text: Path, out: Path, steps: int = 40) -> None:
    script = runpy.run_path(str(EXAMPLES / f"{name}.py"))
    script["main"].__globals__["STEPS"] = steps
    script["main"](str(text), str(out))


def weights(name: str, out: Path) -> dict[str, torch.Tensor]:
    if name == "plain_loop":
        return torch.load(out / "checkpoint.pt", weights_only=True)["model"]
    return load_file(out / ("checkpoint-40" if name == "hf_trainer" else "step-40") / "model.safetensors")


def cut(name: str, whole: Path, out: Path, text: Path, step: int) -> None:
    """What `out` would hold, had the run been killed after its checkpoint at `step`."""
    if name == "plain_loop":
        return run(name, text, out, step)
    for folder in whole.glob("*-[0-9]*"):
        if int(folder.name.rpartition("-")[2]) <= step:
            shutil.copytree(folder, out / folder.name)
    if name == "accelerate_loop":
        (out / "done.json").write_text(json.dumps({"step": step}))
    return None


@pytest.mark.parametrize("name", NAMES)
def test_an_example_grows_and_resumes_to_the_same_weights(name: str, text: Path, tmp_path: Path) -> None:
    run(name, text, tmp_path / "whole")
    whole = weights(name, tmp_path / "whole")
    assert whole["model.layers.2.mlp.up_proj.weight"].shape == (64, 64)  # a third layer, twice the width
    for step in (20, 30):  # before the growth, and after it
        out = tmp_path / str(step)
        cut(name, tmp_path / "whole", out, text, step)
        run(name, text, out)
        again = weights(name, out)
        assert again.keys() == whole.keys() and all(torch.equal(again[key], whole[key]) for key in whole)
    if name == "plain_loop":  # the control: other text, other weights
        other = tmp_path / "other.txt"
        other.write_bytes(text.read_bytes()[::-1])
        run(name, other, tmp_path / "other")
        assert not torch.equal(weights(name, tmp_path / "other")["lm_head.weight"], whole["lm_head.weight"])


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_a_screen_long_and_says_how_it_is_called(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = EXAMPLES / f"{name}.py"
    assert len(path.read_text().splitlines()) <= 65
    monkeypatch.setattr(sys, "argv", [str(path)])
    with pytest.raises(SystemExit, match=f"usage: .*{name}.py TEXT OUT"):
        runpy.run_path(str(path), run_name="__main__")


def test_what_an_example_needs_besides_is_said_at_its_head_and_is_an_extra() -> None:
    extras = tomllib.loads((EXAMPLES.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["accelerate"] == ["accelerate"]
    for name in NAMES:
        text = (EXAMPLES / f"{name}.py").read_text()
        needs = "Trainer(" in text or "Accelerator(" in text
        assert ("`pip install 'tokenformer[accelerate]'`" in text.split('"""')[1]) == needs == (name != "plain_loop")
    assert "the last two need `pip install 'tokenformer[accelerate]'`" in (EXAMPLES.parent / "README.md").read_text()


def test_the_object_itself_becomes_the_grown_model() -> None:
    config = {"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaForCausalLM.config_class(**config, num_key_value_heads=1, intermediate_size=16))
    ids = torch.arange(12)[None]
    before, forward = model(ids).logits, model.forward
    model.forward = forward  # as a framework patches it
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    grown = grow(model, "zero", to={"intermediate_size": 24})
    grown.replace(model)
    assert model.config.intermediate_size == 24 and model.model.layers[0].mlp.up_proj.weight.shape == (24, 8)
    torch.testing.assert_close(model(ids).logits, before)
    assert vars(model)["forward"] is forward and calls == [1]
    grown.model(ids)
    assert calls == [1]  # the control: the hook is the object's own

    with pytest.raises(ValueError, match="a Linear cannot become the grown LlamaForCausalLM"):
        grown.replace(torch.nn.Linear(2, 2))
    masked = grow(model, "masked", to={"intermediate_size": 32}, options={"ramp_steps": 4})
    with pytest.raises(ValueError, match="it would carry"):
        masked.replace(model)


def test_the_accelerate_example_runs_by_the_command_that_it_names(text: Path, tmp_path: Path) -> None:
    path = EXAMPLES / "accelerate_loop.py"
    assert "`accelerate launch examples/accelerate_loop.py TEXT OUT`" in path.read_text()
    out = tmp_path / "out"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", str(path), str(text), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "grown, exact" in done.stdout
    assert weights("accelerate_loop", out)["model.layers.2.mlp.up_proj.weight"].shape == (64, 64)
