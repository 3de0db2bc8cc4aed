"""Shrinking: the rows that a rule names are kept, nothing else changes; it undoes growth; files are ordinary ones."""

import copy
import json
import math
import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from architectures import batch, gradients_of, logits_of, model_of, train, wide
from safetensors.torch import load_file
from test_nested import ROWS, by_hand, first
from tiny_runs import corpus, tiny
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import tokenformer
from tokenformer import AdamW, cli, runs, shrink
from tokenformer.checkpoint import load_checkpoint, read_lineage, save_checkpoint
from tokenformer.data import ByteTokenizer, eval_windows, prepare
from tokenformer.growth import grow
from tokenformer.models import build_config, build_model
from tokenformer.optim import parameter_groups
from tokenformer.rows import RULES, ranking, row_tables, scores, strongest
from tokenformer.shrink_checkpoint import text_of

DOCS = Path(__file__).resolve().parent.parent / "docs"


def text(sequences: int = 8, length: int = 32) -> Tensor:
    return torch.randint(1, 61, (sequences, length + 1), generator=torch.Generator().manual_seed(5))


def equal(a: PreTrainedModel, b: PreTrainedModel) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# --- which rows, and what is left ---


@pytest.mark.parametrize("by", RULES)
@pytest.mark.parametrize("name", ROWS)
def test_the_cut_model_is_the_one_cut_by_hand(name: str, by: str) -> None:
    model = model_of(name)
    weights = {key: p.clone() for key, p in model.named_parameters()}
    done = shrink(model, 0.5, by, [text(2)])

    def rows(place: str, count: int) -> Tensor:
        if place == "0":  # how many
            return torch.arange(math.floor(count / 2 + 0.5))
        return done.rows[place if place in done.rows else f"{place}.mlp"]

    assert equal(done.model, by_hand(model, rows))
    assert all(torch.equal(p, weights[key]) and p.requires_grad for key, p in model.named_parameters())
    assert all(torch.equal(kept, kept.sort().values) for kept in done.rows.values())
    prefix = all(torch.equal(kept, torch.arange(len(kept))) for kept in done.rows.values())
    assert prefix == (by == "order")
    assert done.event["parameters_after"] == sum(p.numel() for p in done.model.parameters())


def weights_of(model: PreTrainedModel, place: str, x: Tensor) -> Tensor:
    """The row weights (N, n) of a memory on its input x (N, C), from the formulas."""
    table = {name.removeprefix(f"{place}."): p for name, p in model.named_parameters() if name.startswith(f"{place}.")}
    if "gate_proj.weight" in table:
        gate = x @ table["gate_proj.weight"].T + table.get("gate_proj.bias", 0)
        return gate / (1 + torch.exp(-gate)) * (x @ table["up_proj.weight"].T + table.get("up_proj.bias", 0))
    if "c_fc.weight" in table:
        return F.gelu(x @ table["c_fc.weight"] + table["c_fc.bias"], approximate="tanh")
    scores, scale = x @ table["key"].T, model.get_submodule(place).scale
    z = scores * scale / torch.sqrt((scores**2).sum(1, keepdim=True) + 1e-6 * scale**2)
    return z * (1 + torch.erf(z / math.sqrt(2))) / 2 * (x @ table["up"].T if "up" in table else 1)


def value_of(model: PreTrainedModel, place: str) -> Tensor:
    table = dict(model.get_submodule(place).named_parameters())
    if "down_proj.weight" in table:
        return table["down_proj.weight"].T
    return table["value"] if "value" in table else table["c_proj.weight"]


def inputs_of(model: PreTrainedModel, place: str, ids: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = model.get_submodule(place).register_forward_hook(lambda m, x, y: seen.append(x[0].detach().flatten(0, 1)))
    with torch.no_grad(), wide():
        model(input_ids=ids[:, :-1], use_cache=False)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("name", ["llama", "gpt2", "tokenformer", "tokenformer rms"])
def test_each_score_is_what_its_formula_says(name: str) -> None:
    model, ids = copy.deepcopy(model_of(name)), text()
    places = [memory.place for memory in row_tables(model)]
    place = next(place for place in places if place.endswith("mlp"))
    with wide():
        found = {by: scores(model, by, [ids[:4], ids[4:]])[place] for by in RULES}
    w, v = weights_of(model, place, inputs_of(model, place, ids)), value_of(model, place).detach()
    loud = w.abs() * v.norm(dim=1)
    assert torch.equal(found["order"].argsort(descending=True), torch.arange(w.shape[1]))
    assert torch.allclose(found["activation"], (loud**2).mean(0).sqrt(), rtol=1e-9)
    least = loud.sort(dim=1, descending=True).values[:, round(w.shape[1] / 10) - 1, None]
    assert torch.allclose(found["use"], (loud >= least).double().mean(0), atol=1e-12)
    assert 0.05 < found["use"].mean() < 0.15
    assert strongest(torch.tensor([[0.0, 2.0, 1.0, 0.0], [0.0, 3.0, 0.0, 0.0]]), 0.5).tolist() == [
        [False, True, True, False], [False, True, False, False]  # what is silent is not among the loudest half
    ]
    table = dict(model.get_submodule(place).named_parameters())
    if "up_proj.weight" in table:
        keys = [torch.cat([table[f"{k}.weight"], table[f"{k}.bias"][:, None]], 1) for k in ("gate_proj", "up_proj")]
    else:
        keys = [torch.cat([table["c_fc.weight"].T, table["c_fc.bias"][:, None]], 1)] if "c_fc.weight" in table else []
        keys += [table[key] for key in ("key", "up") if key in table]
    assert torch.allclose(found["magnitude"], math.prod(key.norm(dim=1) for key in keys) * v.norm(dim=1))

    def loss(part: Tensor) -> float:
        with torch.no_grad(), wide():
            logits = model(input_ids=part[:, :-1], use_cache=False).logits
            return F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten()).item()

    for row in (0, 7):  # the loss with a little less of the row, and a little more
        value = value_of(model, place).data[row]
        kept, changes = value.clone(), []
        for part in (ids[:4], ids[4:]):
            ends = []
            for factor in (1 - 1e-5, 1 + 1e-5):
                value.copy_(kept * factor)
                ends.append(loss(part))
            value.copy_(kept)
            changes.append(abs(ends[1] - ends[0]) / 2e-5)
        assert found["gradient"][row] == pytest.approx(sum(changes) / 2, rel=1e-4, abs=1e-8)
    assert not torch.equal(found["activation"].argsort(), found["magnitude"].argsort())  # they are not one rule


@pytest.mark.parametrize("by", RULES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "tokenformer silu"])
def test_rows_that_say_nothing_are_cut_first_and_the_function_stays(name: str, by: str) -> None:
    model = copy.deepcopy(model_of(name))
    for memory in row_tables(model):
        value = value_of(model, memory.place)
        with torch.no_grad():
            value[::2] = 0
    found = scores(model, by, [text()])
    assert all(not score[::2].any() for score in found.values()) == (by != "order")
    if by != "use":  # others may be silent on this text too, and come earlier
        small = shrink(model, 0.5, by, [text()]).model
        assert ((logits_of(model) - logits_of(small)).abs().max() < 1e-9) == (by != "order")


def test_of_rows_that_matter_alike_the_earlier_is_kept() -> None:
    model = copy.deepcopy(model_of("llama"))
    for memory in row_tables(model):
        value_of(model, memory.place).data[:40] = 0  # of 44
    for by in ("magnitude", "activation", "gradient"):
        kept = shrink(model, 0.25, by, [text(2)]).rows
        assert all(rows.tolist() == [*range(7), 40, 41, 42, 43] for rows in kept.values()), by


def test_ranking_leaves_the_model_as_it_was() -> None:
    model = copy.deepcopy(model_of("tokenformer")).train()
    model.get_parameter("model.layers.0.mlp.value").requires_grad_(False)
    wanted = [p.requires_grad for p in model.parameters()]
    for by in RULES:
        first_time = ranking(model, by, [text(2)])
        again = ranking(model, by, [text(2)])
        assert all(torch.equal(first_time[place], again[place]) for place in again)
    assert model.training and [p.requires_grad for p in model.parameters()] == wanted
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


# --- shrinking and growing back ---


GROWTHS: list[tuple[str, str, dict[str, int], Any]] = [
    ("tokenformer", "zero_keys", {"ffn": 60, "qkv": 24, "proj": 14}, 0.5),
    ("tokenformer", "zero_keys", {"ffn": 40}, {"ffn": 0.75}),
    ("tokenformer", "rotated_keys", {"ffn": 60, "qkv": 24, "proj": 14}, 0.5),
    ("tokenformer gelu first", "zero_keys", {"ffn": 60, "qkv": 24, "proj": 14}, 0.5),
    ("tokenformer silu", "zero_values", {"ffn": 60, "qkv": 24, "proj": 14}, 0.5),
    ("tokenformer linear", "zero_keys", {"ffn": 60}, 0.5),
    ("llama", "zero", {"intermediate_size": 88}, 0.5),
    ("gpt2", "zero", {"intermediate_size": 384}, 0.5),
]


@pytest.mark.parametrize(("name", "operator", "to", "keep"), GROWTHS)
def test_cutting_what_growth_by_zeros_added_gives_the_old_model_and_moments_back(
    name: str, operator: str, to: dict[str, int], keep: Any
) -> None:
    model = copy.deepcopy(model_of(name, torch.float32))
    optimizer = AdamW(parameter_groups(model, 0.1))
    train(model, optimizer, 2)
    grown = grow(model, operator, to, optimizer)
    back = shrink(grown.model, keep, optimizer=grown.optimizer)
    assert equal(back.model, model) and back.model.config.to_dict() == {
        **model.config.to_dict(), **{key: back.event["to"][key] for key in back.event["to"] if key == "n_inner"}
    }
    old = dict(model.named_parameters())
    for key, p in back.model.named_parameters():
        state, before = back.optimizer.state[p], optimizer.state[old[key]]
        assert all(torch.equal(state[each], before[each]) for each in ("step", "exp_avg", "exp_avg_sq"))
    train(grown.model, grown.optimizer, 1)  # the control: after a step the rows have become others
    assert not equal(shrink(grown.model, keep).model, model)


@pytest.mark.parametrize("name", ["tokenformer", "tokenformer softmax", "llama", "gpt2"])
def test_a_shrunken_model_grows_and_computes_the_same(name: str) -> None:
    small = shrink(model_of(name), 0.5, "magnitude").model
    operator = {"tokenformer": "zero_keys", "tokenformer softmax": "tile"}.get(name, "zero")
    field = "ffn" if name.startswith("tokenformer") else "intermediate_size"
    size = {"llama": 44, "gpt2": 192}.get(name, 30)
    grown = grow(small, operator, {field: size}).model
    assert (logits_of(grown) - logits_of(small)).abs().max() < 1e-10
    assert (logits_of(model_of(name)) - logits_of(small)).abs().max() > 1e-3


def test_moments_and_ages_keep_to_their_rows() -> None:
    model = copy.deepcopy(model_of("tokenformer rms", torch.float32))
    optimizer = AdamW(parameter_groups(model, 0.1))
    train(model, optimizer, 2)
    grown = grow(model, "zero_keys", {"ffn": 40}, optimizer)
    train(grown.model, grown.optimizer, 1)
    grown.model.get_parameter("model.layers.1.mlp.key").data[35:] *= 1000
    done = shrink(grown.model, {"ffn": 0.5}, "magnitude", optimizer=grown.optimizer)
    kept = done.rows["model.layers.1.mlp"]
    assert not torch.equal(kept, torch.arange(20)) and bool((kept >= 30).any())
    for key in ("key", "up", "value"):
        name = f"model.layers.1.mlp.{key}"
        state = done.optimizer.state[done.model.get_parameter(name)]
        before = grown.optimizer.state[grown.model.get_parameter(name)]
        for each in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(state[each], before[each][kept])
        assert torch.equal(state["birth"], before["birth"][kept]) and state["step"] == before["step"]
    train(done.model, done.optimizer, 1)  # it goes on


# --- refusals of the library ---


@pytest.mark.parametrize(
    ("name", "keep", "by", "message"),
    [
        ("llama", 0.0, "order", "keep: 0 is not allowed; it must be a share above 0 and below 1"),
        ("llama", 2.0, "order", "keep: 2 is not allowed"),
        ("llama", 1.0, "order", "keep: 1 is not allowed"),
        ("llama", math.nan, "order", "keep: nan is not allowed"),
        ("llama", 0.01, "order", "keep: 0.01 of intermediate_size = 44 is less than one row"),
        ("llama", 0.999, "order", "keep: 0.999 leaves every row"),
        ("llama", {"hidden_size": 0.5}, "order", "keep: hidden_size is no number of rows; llama has intermediate_size"),
        ("tokenformer", {"ffn": 0.5, "ffn_tokens": 0.25}, "order", "keep: ffn_tokens is given twice"),
        ("tokenformer", {"fnn": 0.5}, "order", "keep: fnn is no number of rows; tokenformer has qkv_tokens, proj"),
        ("tokenformer linear", {"qkv": 0.5}, "order", "keep: qkv is no number of rows; tokenformer has ffn_tokens"),
        ("llama", 0.5, "oldest", "by: 'oldest' is not known; allowed: order, magnitude, activation, gradient, use"),
        ("llama", 0.5, "use", "by: 'use' looks at what rows do on a text, and none is given"),
        ("mixtral", 0.5, "order", "mixtral has no rows that could be left out one by one"),
    ],
)
def test_what_cannot_be_cut_is_refused_in_one_line(name: str, keep: Any, by: str, message: str) -> None:
    with pytest.raises(ValueError, match="(?s).") as caught:
        shrink(model_of(name), keep, by)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_model_amid_a_growth_is_refused() -> None:
    grown = grow(model_of("llama"), "masked", {"intermediate_size": 60}, options={"ramp_steps": 5}).model
    with pytest.raises(ValueError, match="carries masked"):
        shrink(grown, 0.5)


def test_shrink_is_a_public_name_that_stays_a_function() -> None:
    import tokenformer.shrink

    assert callable(tokenformer.shrink) and "shrink" in tokenformer.__all__


# --- checkpoints ---


def run(*words: str) -> int:
    try:
        return cli.main(words)
    except SystemExit as stop:
        assert isinstance(stop.code, int)
        return stop.code


@pytest.fixture(scope="module")
def trained(shared: Path) -> Path:
    """A run, its checkpoint with moments, whose held-out text is known."""
    tokenformer.train(tiny(shared, data={"valid_tokens": 1024}), shared / "shrink run", say=None)
    return shared / "shrink run"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A Llama that comes from nowhere, with the tokenizer of bytes, in bfloat16."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = build_config("llama", fields=sizes | {"vocab_size": 256, "max_position_embeddings": 64})
    return save_checkpoint(tmp_path / "llama", build_model(config, seed=0).bfloat16(), ByteTokenizer())


def test_a_run_s_checkpoint_becomes_an_ordinary_smaller_one(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], shared: Path
) -> None:
    out = tmp_path / "half"
    words = ("--keep", "0.5", "--by", "activation", "--text", str(corpus(shared)))
    assert run("shrink", str(trained), str(out), *words) == 0
    said = capsys.readouterr().out
    assert "ffn_tokens 32 -> 16" in said and "moments keep to their rows" in said
    model, lineage = load_checkpoint(out)
    config = AutoModelForCausalLM.from_pretrained(out).config
    assert (config.ffn_tokens, config.qkv_tokens, config.proj_tokens) == (16, 4, 4)
    event = lineage[-1]
    assert [entry["operator"] for entry in lineage] == ["zero_keys", "shrink"]
    assert event["options"] == {"keep": 0.5, "by": "activation"} and event["from"]["ffn_tokens"] == 32
    assert event["ancestor"]["flops"] == runs.read_json(trained / runs.RESULT)["flops"]
    assert (out / "tokenizer.json").exists() and not (out / "trainer.json").exists()
    # What it prints is the run's own figure, and what evaluation on the same text finds in the new files.
    section = tiny(shared, data={"valid_tokens": 1024}).data
    found = tokenformer.evaluate(model, eval_windows(prepare(section, 0), 16))["bits_per_byte"]
    for value, key in ((runs.read_json(trained / runs.RESULT)["bits_per_byte"], "before"), (found, "after")):
        assert event["measured"][key]["bits_per_byte"] == pytest.approx(value, rel=1e-6)
        assert f"{value:.4f}" in said
    # Moments are cut as the weights are.
    before = load_file(runs.checkpoints(trained)[-1] / "optimizer.safetensors")
    after = load_file(out / "optimizer.safetensors")
    big = load_checkpoint(trained)[0].get_parameter("model.layers.0.mlp.key")
    kept = [int((big == row).all(1).nonzero()[0]) for row in model.get_parameter("model.layers.0.mlp.key")]
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(after[f"{key}.model.layers.0.mlp.key"], before[f"{key}.model.layers.0.mlp.key"][kept])
    # And a run goes on from it, with its cost.
    recipe = tiny(shared, model={}, growth=[], data={"skip_tokens": 12 * 64}, train={"steps": 2, "warmup_steps": 0})
    recipe.model = type(recipe.model)(checkpoint=str(out))
    result = tokenformer.train(recipe, tmp_path / "on", say=None)
    assert result["flops"] > event["ancestor"]["flops"] and result["growth"][-1]["operator"] == "shrink"


def test_a_llama_is_cut_in_its_own_dtype_and_loads_in_transformers_alone(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], shared: Path
) -> None:
    (tmp_path / "some.txt").write_text(corpus(shared).read_text()[:10_000])
    words = ("--keep", "intermediate_size=0.5", "--by", "gradient", "--text", str(tmp_path / "some.txt"), "--curve")
    assert run("shrink", str(llama), str(tmp_path / "half"), *words) == 0
    said = capsys.readouterr().out
    assert "last fifth of" in said and "loss " in said and "moments" not in said
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert small.config.intermediate_size == 12 and small.dtype == torch.bfloat16
    assert json.loads((tmp_path / "half" / "config.json").read_text())["model_type"] == "llama"
    curve = json.loads((tmp_path / "half.curve.json").read_text())
    assert (tmp_path / "half.curve.png").read_bytes().startswith(b"\x89PNG")
    assert [point["keep"] for point in curve["points"]] == [1.0, 0.75, 0.5, 0.25, 0.125, 0.0625, 0.03125]
    assert [point["rows"].get("intermediate_size", 24) for point in curve["points"]] == [24, 18, 12, 6, 3, 2, 1]
    [half] = [point for point in curve["points"] if point["keep"] == 0.5]
    measured = read_lineage(tmp_path / "half")[-1]["measured"]
    assert half["bits_per_byte"] == measured["after"]["bits_per_byte"]
    assert curve["points"][0]["loss"] == measured["before"]["loss"]
    assert not list(tmp_path.glob(".*"))

    def full(*arguments: Any, **settings: Any) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:  # a disk that the checkpoint fits on, and its picture does not
        patch.setattr("matplotlib.figure.Figure.savefig", full)
        before = sorted(tmp_path.rglob("*"))
        assert run("shrink", str(llama), str(tmp_path / "other"), *words) == 2
    assert "other: cannot be written (no space left on the disk)" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.MonkeyPatch.context() as patch:  # one that is too small from the start, which is seen before measuring
        patch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=10**4))
        patch.setattr("tokenformer.shrink_checkpoint.evaluate", lambda *arguments: pytest.fail("measured"))
        assert run("shrink", str(llama), str(tmp_path / "other"), *words) == 2
    assert "other: cannot be written (no space left on the disk: 0.0 MB are" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_measured_on_is_not_ranked_on(
    llama: Path, tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "some.txt").write_text(corpus(shared).read_text()[:9000])
    section = tiny(shared, data={"tokenizer": str(llama)}).data
    section.source = ""  # as of a checkpoint that names none
    found = text_of(section, [str(tmp_path / "some.txt")], lambda line: None)
    assert found.calibration is not None and found.held_out is not None
    both = {tuple(w) for w in found.calibration.tolist()} & {tuple(w) for w in found.held_out[0].tolist()}
    share = len(found.held_out[0]) / (len(found.calibration) + len(found.held_out[0]))
    assert not both and share == pytest.approx(0.2, abs=0.01)
    monkeypatch.setattr("tokenformer.shrink_checkpoint.CALIBRATION_TOKENS", 160)
    for source in ("", str(corpus(shared))):
        section.source = source
        few = text_of(section, [str(tmp_path / "some.txt")], lambda line: None).calibration
        assert few is not None and torch.equal(few, found.calibration[:10])


def test_a_name_on_the_hub_is_fetched(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: str(llama))
    assert run("shrink", "some/llama", "half", "--keep", "0.5") == 0
    assert load_checkpoint("half")[0].config.intermediate_size == 12


def test_without_any_text_it_cuts_and_says_that_nothing_was_measured(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("shrink", str(llama), str(tmp_path / "half"), "--keep", "0.5") == 0
    assert "the loss is not measured" in capsys.readouterr().out
    assert "measured" not in read_lineage(tmp_path / "half")[-1]
    wanted = by_hand(load_checkpoint(llama)[0], first(0.5))
    assert equal(AutoModelForCausalLM.from_pretrained(tmp_path / "half"), wanted)


def test_text_that_is_gone_is_said_and_the_given_one_taken(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step = shutil.copytree(runs.checkpoints(trained)[-1], tmp_path / "moved")
    trainer = json.loads((step / "trainer.json").read_text())
    trainer["streams"][-1]["source"] = str(tmp_path / "gone.txt")
    (step / "trainer.json").write_text(json.dumps(trainer))
    (tmp_path / "some.txt").write_text("of this and that " * 200)
    assert run("shrink", str(step), str(tmp_path / "a"), "--keep", "0.5", "--text", str(tmp_path / "some.txt")) == 0
    said = capsys.readouterr().out
    assert "is not to be had" in said and "last fifth of" in said
    assert run("shrink", str(step), str(tmp_path / "b"), "--keep", "0.5") == 0
    assert "the loss is not measured" in capsys.readouterr().out


def test_what_is_cut_or_grown_is_scored_on_the_text_that_its_run_held_out(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of docs/shrink.md's first commands show one number for one model, with either kind of held-out text."""
    held_out = tmp_path / "held.txt"
    held_out.write_text(corpus(shared).read_text()[::-1])

    def scored(checkpoint: Path, *words: str) -> dict[str, Any]:
        assert run("eval", str(checkpoint), "--out", str(tmp_path / "out.json"), *words) == 0
        return json.loads((tmp_path / "out.json").read_text())

    for name, own in (("share", {}), ("source", {"valid_source": str(held_out)})):
        trained, half, grown = (tmp_path / f"{name} {kind}" for kind in ("run", "half", "grown"))
        tokenformer.train(tiny(shared, data={"valid_tokens": 512, **own}), trained, say=None)
        assert run("shrink", str(trained), str(half), "--keep", "0.5") == 0
        measured = read_lineage(half)[-1]["measured"]
        capsys.readouterr()
        assert scored(half)["bits_per_byte"] == pytest.approx(measured["after"]["bits_per_byte"], rel=1e-6)
        assert "does not say how much" not in capsys.readouterr().out
        assert run("grow", str(trained), str(grown), "--to", "ffn=64") == 0
        numbers = scored(grown)
        assert numbers["bits_per_byte"] == pytest.approx(scored(trained)["bits_per_byte"], rel=1e-6)
        assert numbers["bits_per_byte"] == pytest.approx(measured["before"]["bits_per_byte"], rel=1e-6)
        assert numbers["tokens"] == 512 and numbers.get("valid_source") == own.get("valid_source")
        assert run("inspect", str(grown), "--rows", "0", "--out", str(tmp_path / "rows.json")) == 0
        dense = json.loads((tmp_path / "rows.json").read_text())["sparse"]["dense"]
        assert dense["bits_per_byte"] == pytest.approx(numbers["bits_per_byte"], rel=1e-6)

        # A checkpoint of before these keys were kept: what is taken is said, and where nothing can be, that is.
        lineage = read_lineage(grown)
        for stream in lineage[-1]["ancestor"]["streams"]:
            del stream["valid_source"], stream["valid_tokens"]
        (grown / "lineage.json").write_text(json.dumps(lineage))
        capsys.readouterr()
        if own:
            assert run("eval", str(grown)) == 2
            assert "names no text that its run held out, so say what to score" in capsys.readouterr().err
            assert run("shrink", str(grown), str(tmp_path / "old"), "--keep", "0.5") == 0
            assert "the loss is not measured" in capsys.readouterr().out
            assert scored(grown, "--text", str(held_out))["bytes"] == len(held_out.read_text())
        else:
            assert 512 < scored(grown)["tokens"] < 100_000
            said = capsys.readouterr().out
            assert "does not say how much its run held out: taken is data.valid_tokens = 100000" in said
        assert scored(grown, "--source", str(corpus(shared)))["tokens"] > 512  # the share of a source that is named
        assert "does not say how much" not in capsys.readouterr().out


def test_a_named_source_is_scored_by_its_own_share_not_by_the_text_of_the_run(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out, other = tmp_path / "held.txt", tmp_path / "other.txt"
    held_out.write_text("of that\n" * 40)
    other.write_text("\f".join(f"{i} of {7 * i} " * 20 for i in range(90)))
    data = {"valid_source": str(held_out)}
    tokenformer.train(tiny(shared, data=data, train={"steps": 2}, growth=[]), tmp_path / "run", say=None)
    found = []
    monkeypatch.chdir(shared)
    for source in (other, corpus(shared), corpus(shared).relative_to(shared)):
        words = ("--source", str(source), "--out", str(tmp_path / "out.json"))
        assert run("eval", str(tmp_path / "run"), *words) == 0
        found.append(json.loads((tmp_path / "out.json").read_text()).get("valid_source"))
    assert found == [None, str(held_out), str(held_out)]


def test_frozen_layers_stay_frozen(llama: Path, tmp_path: Path) -> None:
    from tokenformer.grow_checkpoint import grow_checkpoint

    grow_checkpoint(llama, tmp_path / "pro", "llama_pro", {"num_hidden_layers": 3}, options={"freeze": True})
    assert run("shrink", str(tmp_path / "pro"), str(tmp_path / "half"), "--keep", "0.5") == 0
    pro, half = (read_lineage(tmp_path / name)[-1]["trained_parameters"] for name in ("pro", "half"))
    assert pro == half and len(half) < 20


def test_of_a_run_that_trains_new_layers_alone_moments_of_those_come_along(shared: Path, tmp_path: Path) -> None:
    event = {"at_step": 2, "to": {"num_hidden_layers": 2}, "operator": "llama_pro", "options": {"freeze": True}}
    tokenformer.train(tiny(shared, growth=[event], train={"steps": 4}), tmp_path / "pro", say=None)
    assert run("shrink", str(tmp_path / "pro"), str(tmp_path / "half"), "--keep", "0.5") == 0
    before = load_file(runs.checkpoints(tmp_path / "pro")[-1] / "optimizer.safetensors")
    after = load_file(tmp_path / "half" / "optimizer.safetensors")
    assert before.keys() == after.keys() and not any(name.startswith("exp_avg.model.layers.0.") for name in after)
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name][: len(tensor)] if tensor.ndim else before[name])
    assert after["exp_avg.model.layers.1.mlp.key"].shape == (8, 8)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--keep", "0"), "--keep 0: write a share above 0 and below 1"),
        (("--keep", "2"), "--keep 2: write a share above 0 and below 1"),
        (("--keep", "nan"), "--keep nan: write a share above 0 and below 1"),
        (("--keep", "half"), "--keep half: write a share above 0 and below 1"),
        (("--keep", "ffn=0.5,ffn=0.25"), "write one share for all rows, or one for each field"),
        (("--keep", "0.5,ffn=0.25"), "write one share for all rows, or one for each field"),
        (("--keep", "0.01"), "keep: 0.01 of intermediate_size = 24 is less than one row"),
        (("--keep", "hidden_size=0.5"), "keep: hidden_size is no number of rows"),
        (("--keep", "0.5", "--by", "age"), "--by age: is not known; allowed: order, magnitude, activation"),
        (("--keep", "0.5", "--by", "use"), "--by use: looks at what rows do on a text; name one by --text"),
        (("--keep", "0.5", "--curve"), "--curve: there is no text to measure on"),
        (("--keep", "0.5", "--text", "short.txt"), "--text short.txt: is shorter than 5 windows of 64 tokens"),
        (("--keep", "0.5", "--text", "none.txt"), "--text none.txt: no such file or folder"),
        (("--keep", "0.5", "--sequence-length", "65"), "--sequence-length 65: is more than the model's"),
        (("--keep", "0.5", "--device", "tpu"), "--device = 'tpu'"),
    ],
)
def test_a_mistake_gets_one_line_and_leaves_nothing(
    words: tuple[str, ...],
    message: str,
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("short " * 20)
    before = sorted(tmp_path.rglob("*"))
    assert run("shrink", "llama", "out", *words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("tokenformer: ") and captured.err.count("\n") == 1 and message in captured.err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_taken_place_and_a_checkpoint_that_cannot_be_cut_are_refused(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken.curve.png").touch()
    (tmp_path / "some.txt").write_text("of this and that " * 200)
    model, _ = load_checkpoint(llama)
    grown = grow(model.float(), "masked", {"intermediate_size": 60}, options={"ramp_steps": 5}).model
    save_checkpoint("masked", grown, ByteTokenizer())
    save_checkpoint("narrow", model_of("llama", torch.float32), ByteTokenizer())  # of 61 tokens
    before = sorted(tmp_path.rglob("*"))
    for words, message in (
        (("llama", "llama"), "llama already exists"),
        (("llama", "llama/inside"), "lies inside llama"),
        (("llama", "taken", "--curve", "--text", "some.txt"), "taken.curve.png already exists"),
        (("masked", "out"), "masked/carried.json: the checkpoint is amid a growth"),
        (("narrow", "out", "--text", "some.txt"), "narrow: its tokenizer makes the token 116 of the text"),
        (("nowhere", "out"), "nowhere: no such checkpoint"),
    ):
        assert run("shrink", *words, "--keep", "0.5") == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
    assert run("shrink", "llama", "taken", "--keep", "0.5") == 0  # the control: without a curve there is room


# --- the page ---


def test_the_commands_of_the_page_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], shared: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    page = (DOCS / "shrink.md").read_text(encoding="utf-8")
    commands = re.findall(r"^    tokenformer (.*?)(?:\s+#.*)?$", page, re.M)
    assert len(commands) >= 5
    (tmp_path / "prose.txt").write_text(corpus(shared).read_text()[:20_000])
    small = (
        f"data.source={corpus(shared)} data.valid_fraction=0.1 data.valid_tokens=512 data.sequence_length=16 "
        "data.batch_size=2 model.hidden_size=16 model.num_hidden_layers=1 model.num_attention_heads=2 train.threads=1 "
        "model.qkv_tokens=32 model.proj_tokens=32 model.ffn_tokens=64 train.warmup_steps=1 train.steps=6 growth=[]"
    )
    for command in commands:
        words = shlex.split(f"{command} {small}" if command.startswith("train") else command)
        assert run(*words) == 0, (command, capsys.readouterr().err)
    assert (tmp_path / "runs" / "half.curve.png").exists()
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", page, re.M | re.S))
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["small"].config.ffn_tokens < names["model"].config.ffn_tokens
    with wide():
        assert gradients_of(model_of("llama")) and batch()  # nothing the page does stays behind
