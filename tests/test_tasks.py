"""The evaluation harness: its numbers are those worked out by hand, on any model, offline; and what is refused."""

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenformer import cli
from tokenformer.checkpoint import load_checkpoint, save_checkpoint
from tokenformer.data import ByteTokenizer
from tokenformer.models import build_config, build_model

QUESTIONS = [
    {"context": "The sky is", "choices": ["blue", "a very long answer"], "answer": 0},
    {"context": "Grass is", "choices": ["green", "1"], "answer": 1},
    {"context": "Snow is", "choices": ["white", "black", "größer"], "answer": 2},
    {"context": "Coal is", "choices": ["white", "black"], "answer": 1},
    {"context": "Blood is", "choices": ["red", "rot"], "answer": 0},
]
CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
metadata: {{version: 1.5}}
"""
TEXT = """
task: tiny_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{context}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models as folders, and a folder of tasks."""
    folder = tmp_path_factory.mktemp("harness")
    sizes = {"vocab_size": 256, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = sizes | {"intermediate_size": 24, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0}
    tokens = {"qkv_tokens": 4, "proj_tokens": 4, "ffn_tokens": 8, "max_position_embeddings": 64}
    for name, fields in (("tokenformer", sizes | tokens | {"initializer_range": 0.5}), ("llama", llama)):
        model = build_model(build_config(name, fields=fields))
        save_checkpoint(folder / "models" / name, model, ByteTokenizer())
    (folder / "tasks").mkdir()
    data = folder / "tasks" / "questions.jsonl"
    data.write_text("".join(json.dumps(each) + "\n" for each in QUESTIONS))
    for name, text in (("choice", CHOICE), ("text", TEXT)):
        (folder / "tasks" / f"{name}.yaml").write_text(text.format(data=data))
    return folder


@torch.no_grad()
def nats(model: Any, context: str, text: str) -> float:
    """-log p(text | context), a byte at a time, after an end mark where there is no context."""
    before, ids = list(context.encode()) or [0], list(text.encode())
    total = 0.0
    for i, byte in enumerate(ids):
        logits = model(torch.tensor([before + ids[:i]])).logits[0, -1].double()
        total -= float(logits.log_softmax(-1)[byte])
    return total


def expected(model: Any, questions: list[dict[str, Any]]) -> dict[str, float]:
    hits, hits_norm, surprise, size = 0, 0, 0.0, 0
    for each in questions:
        costs = [nats(model, each["context"], f" {choice}") for choice in each["choices"]]
        rates = [cost / len(choice) for cost, choice in zip(costs, each["choices"], strict=True)]
        hits += costs.index(min(costs)) == each["answer"]
        hits_norm += rates.index(min(rates)) == each["answer"]
        surprise += nats(model, "", each["context"])
        size += len(each["context"])
    count = len(questions)
    return {"acc": hits / count, "acc_norm": hits_norm / count, "bits_per_byte": surprise / math.log(2) / size}


def run(*words: Any) -> int:
    return cli.main([str(word) for word in words])


@pytest.mark.parametrize("name", ["tokenformer", "llama"])
def test_the_harness_s_numbers_are_those_worked_out_by_hand(
    name: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = place / "models" / name
    words = ("--tasks", "tiny_choice, tiny_text", "--include-path", place / "tasks", "--batch-size", 2)
    assert run("eval", folder, *words) == 0
    numbers = json.loads((place / "models" / f"{name}.tasks.json").read_text())
    wanted = expected(load_checkpoint(folder)[0], QUESTIONS)
    choice, text = numbers["tasks"]["tiny_choice"], numbers["tasks"]["tiny_text"]
    assert {key: choice[key] for key in ("acc", "acc_norm")} == {key: wanted[key] for key in ("acc", "acc_norm")}
    assert choice["acc_stderr"] == pytest.approx(math.sqrt(wanted["acc"] * (1 - wanted["acc"]) / 4))
    assert text["bits_per_byte"] == pytest.approx(wanted["bits_per_byte"], rel=1e-5)
    assert (choice["examples"], choice["version"], text["examples"]) == (5, 1.5, 5)
    assert numbers["harness"].startswith("lm_eval 0.") and numbers["dtype"] == "float32" and "loss" not in numbers
    out = capsys.readouterr().out
    assert f"tiny_choice: acc {wanted['acc']:.4f} ± " in out and "5 examples" in out and "tasks.json" in out
    other = expected(build_model(load_checkpoint(folder)[0].config, seed=7), QUESTIONS)  # the control
    assert other["bits_per_byte"] != pytest.approx(wanted["bits_per_byte"], rel=1e-3)


def test_tasks_text_and_a_limit_in_one_file(place: Path, tmp_path: Path) -> None:
    folder, text = place / "models" / "tokenformer", place / "tasks" / "questions.jsonl"
    words = ("--tasks", "tiny_choice", "--include-path", place / "tasks", "--limit", 2, "--text", text)
    assert run("eval", folder, *words, "--out", tmp_path / "both.json") == 0
    both = json.loads((tmp_path / "both.json").read_text())
    assert both["tasks"]["tiny_choice"]["examples"] == both["limit"] == 2
    assert both["tasks"]["tiny_choice"]["acc"] == expected(load_checkpoint(folder)[0], QUESTIONS[:2])["acc"]
    assert run("eval", folder, "--text", text) == 0
    alone = json.loads((place / "models" / "tokenformer.text.json").read_text())
    assert alone == {key: value for key, value in both.items() if key in alone} and "tasks" not in alone
    assert both["bytes"] == len(text.read_bytes())


def test_a_model_on_the_hub_is_scored_and_its_numbers_lie_here(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def snapshot_download(name: str, allow_patterns: list[str], local_files_only: bool) -> str:
        asked.append((name, set(allow_patterns)))
        return str(place / "models" / "llama")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    text = place / "tasks" / "questions.jsonl"
    assert run("eval", "org/tiny-llama", "--text", text) == 0
    ((name, patterns),) = asked
    assert name == "org/tiny-llama" and "model*.safetensors" in patterns and not {"*", "*.py", "*.bin"} & patterns
    found = json.loads(Path("tiny-llama.text.json").read_text())
    assert run("eval", place / "models" / "llama", "--text", text, "--out", "local.json") == 0
    assert found == json.loads(Path("local.json").read_text()) | {"checkpoint": "org/tiny-llama"}


@pytest.mark.parametrize(
    ("line", "wrong", "message"),
    [
        ("test_split: test", "test_split: valid", "KeyError: 'valid'"),
        ('"{{choices}}"', '"{{nothing}}"', "UndefinedError: 'nothing' is undefined"),
        ('"{{choices}}"', '"{{choices"', "TemplateSyntaxError: "),
    ],
)
def test_a_task_that_is_wrong_in_itself_is_named(
    line: str, wrong: str, message: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (place / "tasks" / "choice.yaml").read_text()
    (tmp_path / "wrong.yaml").write_text(text.replace("tiny_choice", "wrong").replace(line, wrong))
    words = ("--tasks", "wrong", "--include-path", tmp_path, "--out", tmp_path / "out.json")
    assert run("eval", place / "models" / "llama", *words) == 2
    error = [each for each in capsys.readouterr().err.splitlines() if each.startswith("tokenformer: ")]
    assert len(error) == 1 and f"--tasks wrong: the harness stopped at {message}" in error[0]
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tasks", "hellaswagg"), "hellaswagg: the harness has no such task; nearest valid name: hellaswag"),
        (("--tasks", ","), "--tasks ',': names no task"),
        (("--tasks", "tiny_text", "--limit", "0"), "--limit 0: must be 1 or more"),
        (("--tasks", "tiny_text", "--batch-size", "0"), "--batch-size 0: must be 1 or more"),
        (("--tasks", "tiny_text", "--sequence-length", "9"), "--sequence-length 9: has no effect with --tasks alone"),
        (("--tasks", "tiny_text", "--include-path", "nowhere"), "--include-path nowhere: no such folder"),
        (("--limit", "3"), "--limit 3: has no effect without --tasks"),
    ],
)
def test_a_mistake_gets_one_line_and_leaves_nothing(
    words: tuple[str, ...], message: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(place.rglob("*"))
    own = () if "--include-path" in words or "--tasks" not in words else ("--include-path", place / "tasks")
    assert run("eval", place / "models" / "llama", *words, *own) == 2
    error = capsys.readouterr().err
    assert error.startswith("tokenformer: ") and error.count("\n") == 1 and message in error
    assert sorted(place.rglob("*")) == before


def test_without_the_extra_one_line_says_how_to_get_it(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    without = lambda name, *rest: None if name == "lm_eval" else found(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", without)
    assert run("eval", place / "models" / "llama", "--tasks", "piqa") == 2
    line = "tokenformer: --tasks: needs the evaluation harness: pip install 'tokenformer[eval]'\n"
    assert capsys.readouterr().err == line
    assert run("eval", place / "models" / "llama", "--text", place / "tasks" / "choice.yaml") == 0  # which needs none


def test_a_place_that_cannot_be_written_is_told_before_the_work(place: Path, capsys: Any) -> None:
    assert run("eval", place / "nowhere", "--tasks", "piqa") == 2
    assert capsys.readouterr().err == f"tokenformer: {place / 'nowhere'}: no such checkpoint\n"
    assert run("eval", place / "models" / "llama", "--tasks", "piqa", "--out", place / "no" / "x.json") == 2
    assert "there is no folder" in capsys.readouterr().err
