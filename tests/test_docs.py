"""The pages under docs/ are true: their code runs, what they add passes the generated tests, the tables are current."""

import re
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import architectures
import pytest
import stand_ins
import test_growth_matrix as matrix

from tokenformer import cli
from tokenformer.growth import OPERATORS
from tokenformer.models.tables import TABLES

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"


def blocks_of(page: str, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.M | re.S)


def run_blocks(page: str, at_least: int = 3) -> dict:
    """The page's Python, block after block, as a reader would run it."""
    blocks = blocks_of(page, "python")
    assert len(blocks) >= at_least
    names: dict = {}
    exec("\n".join(blocks), names)
    return names


def quoted_line(page: str, start: str) -> tuple:
    """An indented line of the page that begins with `start`, as Python reads it."""
    (line,) = re.findall(rf"^    ({re.escape(start)}.*),$", (DOCS / page).read_text(encoding="utf-8"), re.M)
    return eval(line if line.startswith("(") else f"({line.split(': ', 1)[1]})")


@pytest.fixture
def registries(monkeypatch):
    for registry in (TABLES, OPERATORS, architectures.MODELS):
        for key in ("gpt_neox", "uneven"):
            monkeypatch.setitem(registry, key, None)
            del registry[key]  # what a page adds is taken out again when the test ends


def test_the_architecture_of_the_page_passes_the_generated_tests(registries, capsys):
    run_blocks("new_architecture.md")
    assert "gpt_neox.layers.0.attention.query_key_value.weight (144, 48)" in capsys.readouterr().out
    architectures.MODELS["gpt_neox"] = quoted_line("new_architecture.md", '"gpt_neox"')
    for operator in matrix.AT_ONCE:
        matrix.test_each_size_is_grown_as_promised_or_refused_with_its_reason(operator, "gpt_neox")
        if "gpt_neox" in OPERATORS[operator].architectures:
            matrix.test_every_kind_of_new_entry_is_alive_within_two_steps(operator, "gpt_neox")


def test_the_race_of_the_page_can_be_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOKENFORMER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tokenformer.race.planned.seconds_per_flop", lambda *arguments: 1e-9)
    for name, start, lines in (("train", 0, 65_000), ("held_out", 10**7, 8_000), ("final", 2 * 10**7, 8_000)):
        (tmp_path / f"{name}.txt").write_text("".join(f"{start + i} and {i * i % 9973}\n" for i in range(lines)))
    (block,) = blocks_of("new_race.md", "toml")
    (tmp_path / "mine.toml").write_text(block)
    assert cli.main(["race", "mine.toml", "--plan"]) == 0
    said = capsys.readouterr().out
    assert "small-stack of stack" in said and "size-1 of small" in said and "copies stay equal" not in said
    equal = block.replace('"zero"', '"net2wider"')
    (tmp_path / "mine.toml").write_text(equal)
    assert cli.main(["race", "mine.toml", "--plan"]) == 0
    assert "without an option noise or dropout: wide" in capsys.readouterr().out
    (tmp_path / "mine.toml").write_text(equal.replace('"net2wider"', '"net2wider"\noptions = { noise = 0.01 }'))
    assert cli.main(["race", "mine.toml", "--plan"]) == 0
    assert "copies stay equal" not in capsys.readouterr().out  # the control
    gpt2 = "architecture = 'gpt2', n_embd = 32, n_layer = 4, n_head = 2, resid_pdrop = 0.0, embd_pdrop = 0.0"
    added = f"[[arm]]\nname = 'gpt2'\nmodel = {{ {gpt2}, attn_pdrop = 0.0 }}\n"
    added += "growth = [{ at_fraction = 0.1, operator = 'fpi', to = { n_embd = 64 } }]\n"
    (tmp_path / "mine.toml").write_text(block + added)
    assert cli.main(["race", "mine.toml", "--plan"]) == 0
    assert "noise or dropout: gpt2" in " ".join(capsys.readouterr().out.split())


def test_what_a_table_cannot_say_is_as_the_page_says(registries, monkeypatch):
    """Gemma by Qwen2's table: all but the width, and the control, the width."""
    sizes = {"hidden_size": 48, "intermediate_size": 44, "num_attention_heads": 6, "num_key_value_heads": 2}
    monkeypatch.setitem(architectures.MODELS, "gemma", ("gemma", sizes | {"head_dim": 8}))
    others = {field: axis for field, axis in TABLES["qwen2"].grows.items() if field != "hidden_size"}
    monkeypatch.setitem(TABLES, "gemma", replace(TABLES["qwen2"], grows=others))
    for operator in ("zero", "lemon", "llama_pro"):
        matrix.test_each_size_is_grown_as_promised_or_refused_with_its_reason(operator, "gemma")
    monkeypatch.setitem(TABLES, "gemma", TABLES["qwen2"])
    with pytest.raises(AssertionError, match="hidden_size"):
        matrix.test_each_size_is_grown_as_promised_or_refused_with_its_reason("zero", "gemma")


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("attention.query_key_value.weight", "kv_heads> three head_dim>", "three kv_heads> head_dim>"),
        ("attention.dense.weight", "kv_heads< head_dim<", "head_dim< kv_heads<"),
        ("mlp.dense_4h_to_h.weight", "ffn<", "ffn>"),
        ("input_layernorm.weight", "hidden=", "hidden>"),
        ("mlp.dense_4h_to_h.bias", "hidden>", "hidden="),
    ],
)
def test_a_wrong_mark_in_the_table_fails_a_generated_test(registries, name, right, wrong):
    run_blocks("new_architecture.md")
    rows = TABLES["gpt_neox"].parameters
    rows[f"gpt_neox.layers.*.{name}"] = rows[f"gpt_neox.layers.*.{name}"].replace(right, wrong)
    architectures.MODELS["gpt_neox"] = quoted_line("new_architecture.md", '"gpt_neox"')
    with pytest.raises(AssertionError):
        for operator in ("lemon", "hyperclone", "llama_pro"):
            matrix.test_each_size_is_grown_as_promised_or_refused_with_its_reason(operator, "gpt_neox")


def test_the_operator_of_the_page_passes_the_generated_tests(registries, capsys, monkeypatch):
    run_blocks("new_operator.md")
    assert "zero, lemon can" in capsys.readouterr().out
    monkeypatch.setattr(matrix, "REFUSALS", [*matrix.REFUSALS, quoted_line("new_operator.md", '("uneven"')])
    for name, (architecture, _) in architectures.MODELS.items():
        matrix.test_each_size_is_grown_as_promised_or_refused_with_its_reason("uneven", name)
        if architecture in OPERATORS["uneven"].architectures:
            matrix.test_every_kind_of_new_entry_is_alive_within_two_steps("uneven", name)
    assert matrix.parted_after_training("uneven", "qwen3", {"intermediate_size": 88}) > 1e-2
    assert matrix.parted_after_training("uneven", "qwen3", {"intermediate_size": 88}, share=0.5) < 1e-6


def run_commands(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's commands one after the other, in this process; what they would fetch has been made here."""
    commands = stand_ins.commands((DOCS / page).read_text(encoding="utf-8"))
    assert len(commands) >= 4
    for command in commands:
        program, *words = stand_ins.words_here(command)
        if program == "tokenformer":
            assert cli.main(words) == 0, command
        else:
            monkeypatch.setattr(sys, "argv", words)
            runpy.run_path(words[0], run_name="__main__")


def test_the_commands_and_the_python_of_the_page_on_released_checkpoints_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    stand_ins.prepare(tmp_path)
    run_commands("convert.md", monkeypatch)
    run_blocks("convert.md", at_least=1)
    assert "The capital of France is" in capsys.readouterr().out
    there, back = (Path(place) / "pytorch_model.bin" for place in ("authors", "back"))
    assert there.read_bytes() == back.read_bytes()
    assert cli.main(["convert", "authors", "back"]) == 2  # the control: a command that is wrong does fail


def test_the_commands_and_the_task_of_the_page_on_evaluation_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    stand_ins.prepare(tmp_path)
    assert cli.main(["convert", "authors", "tokenformer-150m"]) == 0
    (tmp_path / "my_tasks").mkdir()
    for kind, name in (("yaml", "capitals.yaml"), ("json", "capitals.jsonl")):
        (block,) = blocks_of("evaluate.md", kind)
        (tmp_path / "my_tasks" / name).write_text(block)
    run_commands("evaluate.md", monkeypatch)
    assert "capitals: acc " in capsys.readouterr().out


def test_the_tables_of_the_growth_page_are_current():
    command = [sys.executable, str(DOCS / "write_growth_table.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
