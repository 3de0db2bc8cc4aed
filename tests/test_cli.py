"""The command line: what it parses, what it says when it is asked and when it is given something wrong."""

import errno
import signal
from pathlib import Path
from typing import Any

import pytest

from tokenformer import cli, verbs

VERBS = ("quickstart", "train", "grow", "eval", "generate", "report", "recipe")


def run(*arguments: str) -> int:
    """The exit code, as a shell would see it."""
    try:
        return cli.main(arguments)
    except SystemExit as stop:
        assert isinstance(stop.code, int)
        return stop.code


def replaced(monkeypatch: pytest.MonkeyPatch, verb: str, error: BaseException | None = None) -> list[Any]:
    """Put in the place of a verb one that only records its arguments, or raises."""
    calls: list[Any] = []

    def stub(arguments: Any) -> None:
        calls.append(arguments)
        if error is not None:
            raise error

    monkeypatch.setattr(verbs, verb, stub)
    return calls


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    text = capsys.readouterr().out
    assert all(verb in text for verb in VERBS) and "tokenformer quickstart" in text


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_shows_an_example_that_parses(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(verb, "--help") == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    examples = [line for line in lines if line.startswith(f"tokenformer {verb}")]
    assert examples
    for example in examples:
        words = example.split(" > ")[0].replace('"def main("', "x").replace('"import "', "x").split()[1:]
        _, rest = cli.parser().parse_known_args(words)
        assert not [word for word in rest if word.startswith("-")]


def test_overrides_may_stand_on_either_side_of_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = replaced(monkeypatch, "train")
    assert run("train", "tiny", "train.steps=5", "--out", "r", "train.seed=1", "model.x=-2") == 0
    assert run("train", "--out", "r", "tiny", "train.steps=5", "train.seed=1", "model.x=-2") == 0
    for call in calls:
        assert (call.recipe, call.out, call.resume) == ("tiny", "r", False)
        assert call.overrides == ["train.steps=5", "train.seed=1", "model.x=-2"]
    assert run("train", "tiny", "--out", "r") == 0 and calls[-1].overrides == []


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("frob",),
        ("train", "tiny"),
        ("train", "tiny", "--out", "r", "--fast"),
        ("train", "tiny", "--out", "r", "--res"),
        ("grow", "a", "b"),
        ("grow", "a", "b", "c", "--to", "ffn=8"),
        ("grow", "a", "b", "--to", "ffn=8", "--operator", "magic"),
        ("generate", "a", "--seed", "x"),
        ("eval", "a", "--text", "b", "--source", "c"),
        ("report",),
    ],
)
def test_a_command_that_does_not_parse_gets_one_line_and_code_2(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("tokenformer") and captured.err.count("\n") == 1
    assert "--help" in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "nowhere.toml", "--out", "r"), "nowhere.toml: no such recipe file"),
        (("train", "tiny", "--out", "r", "train.stps=5"), "train.stps: unknown key in the command line; nearest"),
        (("train", "tiny", "--out", "r", "steps"), "'steps': an override is written key=value"),
        (("train", "tiny", "--out", "r", "--jobs", "2"), "--jobs: tiny has no arms"),
        (("train", "quickstart", "--out", "r", "--jobs", "0"), "--jobs 0: must be 1 or more"),
        (("recipe", "nonesuch"), "nonesuch: neither a .toml or .json file nor a shipped recipe"),
        (("grow", "a", "b", "--to", "ffn"), "--to ffn: write AXIS=SIZE"),
        (("grow", "a", "b", "--to", "ffn=0"), "--to ffn=0: write AXIS=SIZE"),
        (("grow", "a", "b", "--to", "ffn=8", "--to", "ffn=9"), "--to ffn=9: ffn is given twice"),
        (("generate", "a", "--greedy", "--top-k", "3"), "--temperature and --top-k have no effect"),
        (("generate", "a", "--temperature", "0"), "--temperature 0.0: must be above 0"),
        (("generate", "a", "--temperature", "nan"), "--temperature nan: must be above 0"),
        (("generate", "a", "--top-k", "-1"), "--top-k -1: must be 0"),
        (("generate", "a", "--max-new-tokens", "0"), "--max-new-tokens 0: must be 1 or more"),
        (("eval", "a", "--sequence-length", "0"), "--sequence-length 0: must be 1 or more"),
        (("eval", "a"), "a: no such checkpoint"),
        (("generate", "a"), "a: no such checkpoint"),
        (("report", "a"), "a: "),
    ],
)
def test_a_mistake_gets_one_line_and_code_2_and_leaves_nothing(
    arguments: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("tokenformer: ") and captured.err.count("\n") == 1
    assert message in captured.err
    assert list(tmp_path.iterdir()) == []


class Stopped(Exception):
    exit_code = 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("two\n   lines"), 2, "two lines"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "No space left on device"),
        (OSError(errno.EROFS, "Read-only file system", "runs/x"), 2, "runs/x: Read-only file system"),
        (PermissionError(errno.EACCES, "Permission denied", "runs/x"), 2, "runs/x: Permission denied"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (Stopped("stopped at step 7"), 143, "stopped at step 7"),
    ],
)
def test_an_error_becomes_one_line_and_its_code(
    error: BaseException,
    code: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    replaced(monkeypatch, "report", error)
    assert run("report", "x") == code
    assert capsys.readouterr().err == f"tokenformer: {line}\n"
    assert run("report", "x", "--debug") == code
    assert "Traceback" in capsys.readouterr().err


def test_an_error_of_ours_keeps_its_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    replaced(monkeypatch, "report", AssertionError("our own mistake"))
    with pytest.raises(AssertionError, match="our own"):
        run("report", "x")


def test_sizes_are_read_from_one_option_or_several() -> None:
    assert verbs.sizes(["ffn=512,qkv=64", "proj_tokens = 32"]) == {"ffn": 512, "qkv": 64, "proj_tokens": 32}


def test_recipe_prints_a_recipe_that_can_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tokenformer.recipe import load_recipe

    assert run("recipe", "quickstart", "train.seed=7") == 0
    (tmp_path / "quickstart.toml").write_text(capsys.readouterr().out)
    assert load_recipe(tmp_path / "quickstart.toml") == load_recipe("quickstart", ["train.seed=7"])


def test_recipe_alone_lists_the_recipes_and_the_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("recipe") == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("quickstart", "gpu_150m", "learning_rate = 0.002", "[[growth]]"))
