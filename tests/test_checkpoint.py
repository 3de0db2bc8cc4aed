"""Checkpoints: what is saved comes back bit for bit, and every kind of bad input is one line that names the file."""

import errno
import json
import os
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tokenformer import checkpoint
from tokenformer.checkpoint import find_checkpoint, load_checkpoint, load_training_state, save_checkpoint
from tokenformer.data import ByteTokenizer
from tokenformer.models import TokenFormerConfig, build_model
from tokenformer.optim import AdamW, parameter_groups

WEIGHTS = checkpoint.WEIGHTS


def llama(**changes: Any) -> LlamaForCausalLM:
    sizes = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **changes}))


def tokenformer() -> Any:
    sizes = {"vocab_size": 32, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    rope = {"rope_parameters": {"partial_rotary_factor": 0.5}}
    return build_model(TokenFormerConfig(**sizes, **rope, qkv_tokens=4, proj_tokens=4, ffn_tokens=8), seed=0)


def trained(model: Any) -> AdamW:
    optimizer = AdamW(parameter_groups(model, 0.1), lr=0.01)
    model(input_ids=torch.arange(12).view(2, 6)).logits.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "good", llama(), lineage=[{"operator": "zero_keys"}])


@pytest.mark.parametrize("make", [llama, tokenformer])
def test_weights_lineage_and_moments_come_back_bit_for_bit(tmp_path: Path, make: Any) -> None:
    model = make()
    optimizer = trained(model)
    trainer = {"step": 7, "seconds": 0.1}
    folder = save_checkpoint(tmp_path / "a", model, ByteTokenizer(), optimizer, trainer, [{"to": {"ffn_tokens": 8}}])
    loaded, lineage = load_checkpoint(folder)
    assert lineage == [{"to": {"ffn_tokens": 8}}]
    assert not loaded.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    again = AdamW(parameter_groups(loaded, 0.1), lr=0.01)
    assert load_training_state(folder, loaded, again) == trainer
    for old, new in zip(model.parameters(), loaded.parameters(), strict=True):
        for key, value in optimizer.state[old].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(again.state[new][key])), key


def test_loaded_weights_lie_where_new_ones_would(tmp_path: Path) -> None:
    """Matrix products may round by the address of their operands; a file's tensors are mapped at odd ones."""
    model = tokenformer()
    save_checkpoint(tmp_path / "saved", model)
    mapped = load_file(tmp_path / "saved" / WEIGHTS).values()
    assert {tensor.data_ptr() % 64 for tensor in mapped} != {0}  # the control
    again, _ = load_checkpoint(tmp_path / "saved")
    assert {p.data_ptr() % 64 for p in again.parameters()} == {p.data_ptr() % 64 for p in model.parameters()}


def test_random_states_of_all_generators_come_back(tmp_path: Path) -> None:
    model = llama()
    optimizer = trained(model)
    random.gauss(0, 1)  # leaves a second number in store, in both generators
    np.random.normal()
    folder = save_checkpoint(tmp_path / "a", model, optimizer=optimizer, trainer={})

    def draw() -> list[Any]:
        return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.normal(), torch.rand(3).tolist()]

    first, other = draw(), draw()
    load_training_state(folder, model, optimizer)
    assert draw() == first
    assert first != other


def test_a_checkpoint_is_a_plain_transformers_folder_without_pickle(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = tokenformer()
    folder = save_checkpoint(tmp_path / "a", model, ByteTokenizer(), trained(model), {"step": 1})
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    text = AutoTokenizer.from_pretrained(folder).decode([72, 105])
    assert text == "Hi"
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder)(ids).logits, model.eval()(ids).logits)


def test_a_run_folder_stands_for_its_newest_checkpoint(tmp_path: Path) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path / "checkpoints" / f"step-{step:08d}", llama(), lineage=[{"step": step}])
    assert find_checkpoint(tmp_path).name == "step-00000002"
    assert load_checkpoint(tmp_path)[1] == [{"step": 2}]


def test_a_folder_without_a_checkpoint_says_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a checkpoint"):
        find_checkpoint(tmp_path)
    (tmp_path / "recipe.json").write_text("{}")
    with pytest.raises(ValueError, match="is a run without a checkpoint yet"):
        find_checkpoint(tmp_path)
    (tmp_path / "arms" / "small").mkdir(parents=True)
    (tmp_path / "race.json").write_text("{}")
    with pytest.raises(ValueError, match="is a race; name one of its arms: .*arms/small"):
        find_checkpoint(tmp_path)


def alter(folder: Path, change: Any) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


UP = "model.layers.0.mlp.up_proj.weight"


def cut_off(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({}, folder / "pytorch_model.bin")


def indexed(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / checkpoint.WEIGHTS_INDEX).write_text(json.dumps({"weight_map": {UP: "model-00001.safetensors"}}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: shutil.rmtree(f), "no such checkpoint"),
        (lambda f: (f / "config.json").unlink(), "is not a checkpoint"),
        (lambda f: (f / "config.json").write_text("{"), "config.json: cannot be read as JSON"),
        (lambda f: (f / "config.json").write_text("{}"), "config.json: has no model_type"),
        (lambda f: (f / "config.json").write_text('{"model_type": "unheard"}'), "config.json: .*unheard"),
        (lambda f: (f / WEIGHTS).unlink(), "model.safetensors: no such file"),
        (pickled, "pickled weights are not read"),
        (indexed, "model-00001.safetensors: no such file"),
        (cut_off, "model.safetensors: truncated"),
        (lambda f: (f / WEIGHTS).write_bytes(b""), "model.safetensors: truncated"),
        (lambda f: alter(f, lambda t: t.update({UP: torch.zeros(3, 8)})), rf"{UP} has shape \[3, 8\].*\[16, 8\]"),
        (lambda f: alter(f, lambda t: t.pop(UP)), f"{UP} is missing"),
        (lambda f: alter(f, lambda t: t.update(extra=torch.zeros(1))), "extra has no place"),
        (lambda f: alter(f, lambda t: t[UP][0].fill_(float("nan"))), f"{UP} holds NaN or infinite"),
        (lambda f: alter(f, lambda t: t[UP][0].fill_(float("inf"))), f"{UP} holds NaN or infinite"),
        (lambda f: (f / "lineage.json").write_text("["), "lineage.json: cannot be read"),
        (lambda f: (f / "lineage.json").write_text("5"), "lineage.json: is not a list of growth events"),
        (lambda f: (f / "lineage.json").write_text("[5]"), "lineage.json: is not a list of growth events"),
        (lambda f: (f / checkpoint.WEIGHTS_INDEX).write_text("[]"), "index.json: must be a JSON object"),
        (
            lambda f: (f / checkpoint.WEIGHTS_INDEX).write_text('{"weight_map": {"a": 1}}'),
            "index.json: weight_map must give the name of a file",
        ),
    ],
)
def test_bad_input_is_one_line_that_names_the_file(good: Path, spoil: Any, message: str) -> None:
    load_checkpoint(good)  # the control: it is good before it is spoilt
    spoil(good)
    with pytest.raises(ValueError, match=message) as caught:
        load_checkpoint(good)
    assert "\n" not in str(caught.value)
    assert good.name in str(caught.value)


def test_code_that_a_checkpoint_brings_is_neither_run_nor_asked_about(
    good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoConfig

    from tokenformer.data import HFTokenizer

    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or "n")
    config = json.loads((good / "config.json").read_text())
    own = {"auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}, "model_type": "own"}
    (good / "config.json").write_text(json.dumps(config | own))
    (good / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["own.T", "own.T"]}}))
    (good / "own.py").write_text("raise SystemExit")
    for load in (load_checkpoint, lambda folder: HFTokenizer(str(folder))):
        with pytest.raises(ValueError, match="custom code") as caught:
            load(good)
        assert "\n" not in str(caught.value)
    assert not asked
    with pytest.raises(ValueError, match="custom code"):
        AutoConfig.from_pretrained(good)
    assert asked  # the control: transformers would have asked, and run it for a yes


@pytest.mark.parametrize("name", ["optimizer.safetensors", "rng.safetensors", "trainer.json"])
def test_training_does_not_go_on_without_a_part_of_its_state(tmp_path: Path, name: str) -> None:
    model = llama()
    optimizer = trained(model)
    folder = save_checkpoint(tmp_path / "a", model, optimizer=optimizer, trainer={})
    (folder / name).write_bytes((folder / name).read_bytes()[:1])
    with pytest.raises(ValueError, match=name):
        load_training_state(folder, model, optimizer)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"{name}: no such file"):
        load_training_state(folder, model, optimizer)


COST = {"flops": 1, "tokens": 2, "seconds": 3.0, "streams": []}


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("trainer.json", {}, "trainer.json: flops must be of type int, and is missing"),
        ("trainer.json", 5, "trainer.json: must be a JSON object, and is 5"),
        ("trainer.json", COST | {"streams": "x"}, "trainer.json: streams must be of type list, and is x"),
        ("lineage.json", [{"ancestor": {}}], "lineage.json: 0.ancestor: flops must be"),
    ],
)
def test_what_a_checkpoint_has_cost_is_read_or_refused(tmp_path: Path, file: str, content: Any, message: str) -> None:
    assert checkpoint.ancestry(tmp_path) == {"flops": 0, "tokens": 0, "seconds": 0.0, "streams": []}
    (tmp_path / file).write_text(json.dumps([{"ancestor": COST}] if file == "lineage.json" else COST))
    assert checkpoint.ancestry(tmp_path) == COST
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        checkpoint.ancestry(tmp_path)


def test_moments_that_do_not_fit_are_one_line_that_names_the_file(tmp_path: Path) -> None:
    model = llama()
    optimizer = trained(model)
    folder = save_checkpoint(tmp_path / "a", model, optimizer=optimizer, trainer={})
    checkpoint.load_moments(folder, model, optimizer)  # the control
    save_file({"exp_avg.nothing": torch.zeros(1)}, folder / checkpoint.OPTIMIZER)
    with pytest.raises(ValueError, match="optimizer.safetensors: "):
        checkpoint.load_moments(folder, model, optimizer)


def test_an_existing_place_is_refused_and_left_alone(good: Path) -> None:
    before = {path.name: path.read_bytes() for path in good.iterdir()}
    with pytest.raises(ValueError, match="already exists"):
        save_checkpoint(good, llama())
    assert before == {path.name: path.read_bytes() for path in good.iterdir()}


@pytest.mark.parametrize(
    ("code", "reason"), [(errno.ENOSPC, "no space left on the disk"), (errno.EROFS, "the place is read-only")]
)
@pytest.mark.parametrize("moment", ["save_file", "flush_to_disk"])
def test_a_failed_save_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, reason: str, moment: str
) -> None:
    model = llama()
    optimizer = trained(model)

    def fail(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(checkpoint, moment, fail)
    with pytest.raises(ValueError, match=reason) as caught:
        save_checkpoint(tmp_path / "b" / "c" / "a", model, optimizer=optimizer, trainer={})
    assert str(tmp_path / "b" / "c" / "a") in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_when_the_tokenizer_comes_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    class Tokenizer:
        def __init__(self, error: Exception) -> None:
            self.error = error

        def save(self, folder: Path) -> None:
            raise self.error

    with pytest.raises(ValueError, match="cannot be written .no space left on the disk."):  # as tokenizers says it
        save_checkpoint(tmp_path / "a", llama(), Tokenizer(Exception("No space left on device (os error 28)")))
    with pytest.raises(KeyError):  # the control: a mistake of ours is not taken for the disk's
        save_checkpoint(tmp_path / "a", llama(), Tokenizer(KeyError("ours")))
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_goes_with_the_next_writing(tmp_path: Path) -> None:
    dead, mine, another = 99_999_999, os.getpid(), os.getppid()
    left = [tmp_path / f".model [1].tmp-{number}" for number in (dead, mine)]
    kept = [tmp_path / name for name in (f".model [1].tmp-{another}", f".model [1]2.tmp-{dead}", ".model [1].tmp-x")]
    for folder in left + kept:
        folder.mkdir()
        (folder / "half").write_text("")
    with checkpoint.written_whole(tmp_path / "model [1]") as temporary:
        assert list(temporary.iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} == {"model [1]", *(path.name for path in kept)}


def test_a_file_in_the_way_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        save_checkpoint(tmp_path / "file" / "a", llama())


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system of 256 kB, where the machine lets us mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    try:
        mounted = subprocess.run(command, capture_output=True, timeout=20).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a small disk needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], capture_output=True, timeout=20)


def test_a_disk_that_is_really_full_is_one_line_and_keeps_the_older_checkpoint(small_disk: Path) -> None:
    first = save_checkpoint(small_disk / "first", llama())
    with pytest.raises(ValueError, match="no space left on the disk") as caught:
        save_checkpoint(small_disk / "second", llama(hidden_size=64, intermediate_size=512))
    assert "\n" not in str(caught.value)
    assert [path.name for path in small_disk.iterdir()] == ["first"]
    load_checkpoint(first)


def test_a_place_that_is_read_only_is_one_line(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True, capture_output=True, timeout=20)
    with pytest.raises(ValueError, match="the place is read-only"):
        save_checkpoint(small_disk / "a", llama())
