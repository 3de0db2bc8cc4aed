"""The command line: what it parses, what it says when it is asked and when it is given something wrong."""

import errno
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from tokenformer import cli, verbs

VERBS = (
    *("quickstart", "train", "grow", "shrink", "inspect", "adapt", "operators"),
    *("convert", "eval", "generate", "report", "recipe"),
)


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
        (("grow", "a", "b", "--to", "ffn"), "--to ffn: write FIELD=SIZE"),
        (("grow", "a", "b", "--to", "ffn=0"), "--to ffn=0: write FIELD=SIZE"),
        (("grow", "a", "b", "--to", "ffn=8", "--to", "ffn=9"), "--to ffn=9: ffn is given twice"),
        (("generate", "a", "--greedy", "--top-k", "3"), "--temperature and --top-k have no effect"),
        (("grow", "a", "b", "--to", f"ffn={10**20}"), "--to ffn=100000000000000000000: write FIELD=SIZE"),
        (("grow", "a", "b", "--to", "ffn=8", "--seed", "-1"), "--seed -1: allowed is a whole number from 0 to"),
        (("grow", "a", "b", "--to", "ffn=8", "--seed", str(2**64)), f"--seed {2**64}: allowed is a whole number"),
        (("generate", "a", "--seed", str(2**32)), "--seed 4294967296: allowed is a whole number from 0 to"),
        (("generate", "a", "--temperature", "0"), "--temperature 0.0: must be 0.001 or more"),
        (("generate", "a", "--temperature", "nan"), "--temperature nan: must be 0.001 or more"),
        (("generate", "a", "--temperature", "1e-320"), "--temperature 1e-320: must be 0.001 or more"),
        (("generate", "a", "--prompt", "caf\udce9"), "'caf\\udce9': is not UTF-8 text"),
        (("train", "tiny", "--out", "caf\udce9"), "'caf\\udce9': is not UTF-8 text"),
        (("train", "tiny", "--out", "r", "data.source=hf:"), "data.source = 'hf:': names no dataset"),
        (("train", "tiny", "--out", "r", "train.threads=100000"), "train.threads: 100000 is not allowed"),
        (("eval", "a", "--out", "no/such/x.json"), "--out no/such/x.json: there is no folder no/such"),
        (("eval", "a", "--out", "."), "--out .: is a folder"),
        (("generate", "a", "--top-k", "-1"), "--top-k -1: must be 0"),
        (("generate", "a", "--max-new-tokens", "0"), "--max-new-tokens 0: must be 1 or more"),
        (("eval", "a", "--sequence-length", "0"), "--sequence-length 0: must be 1 or more"),
        (("eval", "a"), "a: no such checkpoint"),
        (("generate", "a"), "a: no such checkpoint"),
        (("report", "a"), "a: "),
        # What is just allowed gets as far as the checkpoint.
        (("grow", "a", "b", "--to", f"ffn={10**12 - 1}", "--seed", str(2**32 - 1)), "a: no such checkpoint"),
        (("generate", "a", "--seed", str(2**32 - 1), "--temperature", "0.001", "--prompt", "café"), "a: no such"),
        (("eval", "a", "--out", "x.json"), "a: no such checkpoint"),
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
        (MemoryError(), 2, "not enough memory"),
        (RuntimeError("CUDA error: out of memory"), 2, "not enough memory"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 2, "Broken pipe"),  # not that of say: an arm's, a file's
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


@pytest.mark.parametrize("error", [AssertionError("our own mistake"), RuntimeError("our own shapes do not fit")])
def test_an_error_of_ours_keeps_its_trace(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    replaced(monkeypatch, "report", error)
    with pytest.raises(type(error), match="our own"):
        run("report", "x")


def test_what_torch_and_numpy_raise_when_memory_is_short_is_told_in_one_line() -> None:
    import numpy as np
    import torch

    cuda = "CUDA out of memory. Tried to allocate 20.50 GiB. GPU 0 has a total capacity of 8 GiB of which"
    for ask, line in (
        (lambda: torch.empty(10**15), ": 4000000000000000 bytes were asked for at once"),
        (lambda: torch.empty(10**18, 64), ""),
        (lambda: np.empty(10**15), ": 7.11 PiB were asked for at once"),
        (lambda: raise_(torch.OutOfMemoryError(cuda)), ": 20.50 GiB were asked for at once"),
    ):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            ask()
        assert cli.exit_code(caught.value) == 2 and cli.one_line(caught.value) == f"not enough memory{line}"
    with pytest.raises(RuntimeError) as caught:
        torch.ones(2) @ torch.ones(3)
    assert cli.exit_code(caught.value) is None


def raise_(error: Exception) -> None:
    raise error


# --- verbs on a checkpoint ---


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that lies in no run."""
    from tokenformer.checkpoint import save_checkpoint
    from tokenformer.data import ByteTokenizer
    from tokenformer.models import build_config, build_model

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
    tables = {"vocab_size": 256, "qkv_tokens": 4, "proj_tokens": 4, "ffn_tokens": 8}
    model = build_model(build_config("tokenformer", fields=sizes | tables), seed=0)
    return save_checkpoint(tmp_path_factory.mktemp("models") / "grown", model, ByteTokenizer())


@pytest.mark.parametrize(
    ("verb", "words", "message"),
    [
        ("eval", ("--device", "tpu"), "--device = 'tpu': allowed are auto, cpu, cuda, cuda:N and mps"),
        ("generate", ("--device", ""), "--device = '': allowed are auto"),
        ("eval", ("--device", "cuda:99"), "--device = 'cuda:99': "),
        ("eval", ("--sequence-length", "65"), "--sequence-length 65: is more than the model's max_position_embeddings"),
        ("eval", ("--text", ""), "--text '': no such file or folder"),
        ("eval", ("--text", "empty.txt"), "--text empty.txt: holds no text"),
        ("generate", ("--max-new-tokens", "64"), "--max-new-tokens 64: is more than 63, what the 1 tokens of --prompt"),
        ("generate", ("--prompt", "x" * 64), "--max-new-tokens 1: is more than 0, what the 64 tokens of --prompt"),
        ("grow", ("run/checkpoints/step-00000009", "--to", "ffn=16"), "would be taken for a checkpoint of the run"),
        ("grow", ("astray", "--to", "ffn=16"), "astray already exists"),
        ("grow", ("out", "--to", "ffn=8"), "is the size that the model already has"),
    ],
)
def test_a_mistake_beside_a_good_checkpoint_gets_one_line_and_leaves_nothing(
    verb: str,
    words: tuple[str, ...],
    message: str,
    grown: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "astray").symlink_to("nowhere")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    assert run(verb, str(grown), *words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("tokenformer: ") and captured.err.count("\n") == 1 and message in captured.err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("environment", [{"RANK": ""}, {"RANK": "2"}, {"MASTER_PORT": ""}, {"WORLD_SIZE": "two"}])
def test_half_of_torchrun_s_environment_is_refused(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenformer.distributed import Ranks, ranks_here

    assert ranks_here() == Ranks(0, 1, 0)
    whole = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "here", "MASTER_PORT": "1"}
    for name, value in whole.items():
        monkeypatch.setenv(name, value)
    assert ranks_here() == Ranks(1, 2, 1)  # the control
    for name, value in environment.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    with pytest.raises(ValueError, match="start with torchrun, or unset WORLD_SIZE"):
        ranks_here()


def test_without_lengths_the_verbs_keep_within_the_model_s_positions(
    grown: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in ((), ("--prompt", ""), ("--max-new-tokens", "63"), ("--prompt", "x" * 63)):  # 256 would be too many
        assert run("generate", str(grown), *words) == 0
    assert run("eval", str(grown), "--text", str(grown / "config.json")) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and "windows of 64" in captured.out


@pytest.mark.parametrize("verb", ["eval", "generate"])
def test_a_checkpoint_s_own_trouble_is_told_before_its_tokenizer_s(
    verb: str, grown: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((shutil.copytree(grown, tmp_path / "bad") / "config.json").read_text())
    (tmp_path / "bad" / "config.json").write_text(json.dumps(config | {"num_attention_heads": 3}))
    assert run(verb, str(tmp_path / "bad"), *(("--text", str(grown / "config.json")) if verb == "eval" else ())) == 2
    assert "bad/config.json: " in (err := capsys.readouterr().err) and "num_attention_heads" in err


def test_growth_beyond_the_memory_is_one_line_and_leaves_nothing(
    grown: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("grow", str(grown), str(tmp_path / "out"), "--to", "ffn=100000000000") == 2
    assert capsys.readouterr().err.startswith("tokenformer: not enough memory: ")
    assert list(tmp_path.iterdir()) == []
    assert run("grow", str(grown), str(tmp_path / "out"), "--to", "ffn=10") == 0


def test_eval_scores_the_whole_of_a_text_its_last_short_window_too(
    grown: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import math

    import torch

    from tokenformer.checkpoint import load_checkpoint

    text = "Every byte counts, the last ones too: größer."
    (tmp_path / "text").write_text(text, encoding="utf-8")
    ids = [0, *text.encode(), 0]
    model, _ = load_checkpoint(grown)
    for length in (len(ids) - 2, 10, 64):  # a rest that is an end mark alone; one of a few bytes; nothing but a rest
        out = tmp_path / f"{length}.json"
        words = ("--text", str(tmp_path / "text"), "--sequence-length", str(length), "--out", str(out))
        assert run("eval", str(grown), *words) == 0
        measured = json.loads(out.read_text())
        nats, whole = 0.0, 0.0  # the reference: every window by itself, through transformers' own loss
        for start in range(0, len(ids) - 1, length):
            window = torch.tensor([ids[start : start + length + 1]])
            with torch.no_grad():
                part = float(model(window, labels=window).loss) * (window.shape[1] - 1)
            nats += part
            whole += part if window.shape[1] == length + 1 else 0.0
        assert (measured["tokens"], measured["bytes"]) == (len(ids) - 1, len(text.encode()))
        assert measured["loss"] == pytest.approx(nats / (len(ids) - 1), rel=1e-5)
        assert measured["bits_per_byte"] == pytest.approx(nats / math.log(2) / measured["bytes"], rel=1e-5)
        assert whole / math.log(2) / measured["bytes"] < 0.999 * measured["bits_per_byte"]  # the control
    capsys.readouterr()
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    assert run("eval", str(grown), "--text", str(tmp_path / "binary")) == 2
    assert capsys.readouterr().err.startswith(f"tokenformer: --text {tmp_path / 'binary'}: is not UTF-8 text")


@pytest.mark.parametrize("verb", [("race", "--plan"), ("race",), ("train", "--out", "r")])
def test_a_race_without_its_texts_is_refused_before_its_code_is_loaded(
    verb: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenformer.race", None)  # which importing then fails at
    name, *options = verb
    for missing, key in (("train", "data.source"), ("held_out", "data.valid_source"), ("final", "race.final_text")):
        assert run(name, "growth_llama_cpu", *options) == 2
        assert capsys.readouterr().err.startswith(f"tokenformer: {key} = '{missing}.txt'")
        (tmp_path / f"{missing}.txt").write_text("of this and that\n" * 50)
    with pytest.raises(ImportError):  # the control
        run(name, "growth_llama_cpu", *options)


def test_eval_outside_a_run_scores_what_the_last_training_held_out(
    grown: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tiny_corpora import texts, write_folder

    from tokenformer import checkpoint

    monkeypatch.setenv("TOKENFORMER_CACHE", str(tmp_path / "cache"))
    text = write_folder(tmp_path / "text", texts(60))

    def held_out_bytes(*streams: dict[str, Any]) -> int:
        monkeypatch.setattr(checkpoint, "ancestry", lambda folder: {"streams": list(streams)})
        assert run("eval", str(grown), "--out", str(tmp_path / "out.json")) == 0
        return json.loads((tmp_path / "out.json").read_text())["bytes"]

    stream = {"source": str(text), "valid_fraction": 0.5, "sequence_length": 1, "seed": 3, "tokenizer": "an identity"}
    large, small = held_out_bytes(stream), held_out_bytes(stream | {"valid_fraction": 0.1})
    assert 2 * small < large
    assert held_out_bytes(stream | {"valid_fraction": 0.1}, stream) == large  # the newest of them
    capsys.readouterr()
    for nothing in ({}, {"streams": []}, {"streams": None}):
        monkeypatch.setattr(checkpoint, "ancestry", lambda folder, nothing=nothing: nothing)
        assert run("eval", str(grown)) == 2
        assert "names no text that its run held out, so say what to score" in capsys.readouterr().err


def test_generate_prints_no_control_characters_of_the_model(
    grown: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tokenformer.data import HFTokenizer

    monkeypatch.setattr(HFTokenizer, "decode", lambda self, ids: "a\x1b[2J\tb\n\u3000\r")
    assert run("generate", str(grown), "--max-new-tokens", "1") == 0
    assert capsys.readouterr().out == "a\ufffd[2J\tb\n\u3000\ufffd\n"


# --- a reader that goes away ---


def train_into_a_closed_pipe(recipe: Path, out: Path, silent: bool) -> None:
    if not silent:
        verbs.say = lambda line: print(line, flush=True)  # the control
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    os._exit(cli.main(["train", str(recipe), "--out", str(out)]))


@pytest.mark.parametrize(("silent", "code"), [(True, 0), (False, 2)], ids=["say", "control"])
def test_training_goes_on_when_the_reader_of_its_output_has_gone(
    silent: bool, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tiny_runs import ended, start_child, tiny

    from tokenformer.recipe import recipe_to_dict

    monkeypatch.setenv("TOKENFORMER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tiny.json").write_text(json.dumps(recipe_to_dict(tiny(tmp_path, train={"steps": 2}, growth=[]))))
    child = start_child(train_into_a_closed_pipe, tmp_path / "tiny.json", tmp_path / "run", silent)
    assert ended(child) == code
    result = tmp_path / "run" / "result.json"
    assert (result.exists() and json.loads(result.read_text())["status"] == "finished") == silent
    assert (tmp_path / "run" / "report.html").exists() == silent


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
