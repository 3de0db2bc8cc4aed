"""`tokenformer grow`: a checkpoint grown on the disk, measured, written whole or not at all."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tokenformer import checkpoint
from tokenformer.checkpoint import load_checkpoint, save_checkpoint
from tokenformer.cli import main
from tokenformer.data import ByteTokenizer
from tokenformer.grow_checkpoint import measure, prepare, write
from tokenformer.grow_checkpoint.shards import Size
from tokenformer.growth import OPERATORS, duplicated_share, grow, largest_logit_change, live_share
from tokenformer.growth.weights import FreshLayers
from tokenformer.models import build_config, build_model
from tokenformer.optim import AdamW, parameter_groups

FIELDS = {"vocab_size": 256, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_tokens": 30}


@pytest.fixture
def small(tmp_path):
    model = build_model(build_config("tokenformer", fields=FIELDS), seed=0)
    optimizer = AdamW(parameter_groups(model, 0.1), lr=1e-2)
    ids = torch.randint(256, (2, 9))
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    return save_checkpoint(tmp_path / "small", model, ByteTokenizer(), optimizer, lineage=[{"operator": "earlier"}])


def test_weights_moments_tokenizer_and_lineage_are_written(small, tmp_path, capsys):
    before = {path.name: path.read_bytes() for path in small.iterdir()}
    assert main(["grow", str(small), str(tmp_path / "grown"), "--to", "ffn=45,qkv=20", "--to", "proj=17"]) == 0
    said = capsys.readouterr().out
    assert "ffn_tokens 30 -> 45" in said and "promise: exact" in said and "logits moved by at most" in said
    (old, _), (new, lineage) = load_checkpoint(small), load_checkpoint(tmp_path / "grown")
    assert largest_logit_change(old, new, torch.randint(256, (2, 9))) < 1e-5
    assert [event["operator"] for event in lineage] == ["earlier", "zero_keys"]
    assert lineage[-1]["to"] == {"ffn_tokens": 45, "qkv_tokens": 20, "proj_tokens": 17}
    assert lineage[-1]["live_at_once"]["key"] == 1.0
    moments = [load_file(folder / checkpoint.OPTIMIZER) for folder in (small, tmp_path / "grown")]
    name = "exp_avg.model.layers.0.mlp.key"
    assert torch.equal(moments[1][name][:30], moments[0][name]) and (moments[1][name][30:] == 0).all()
    assert (tmp_path / "grown" / "tokenizer.json").read_bytes() == before["tokenizer.json"]
    assert {path.name: path.read_bytes() for path in small.iterdir()} == before


def spoil_weights(folder):
    tensors = load_file(folder / checkpoint.WEIGHTS)
    tensors["model.layers.0.mlp.key"][3, 3] = float("nan")
    save_file(tensors, folder / checkpoint.WEIGHTS, metadata={"format": "pt"})


def cut_short(folder):
    path = folder / checkpoint.WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def wrong_shape(folder):
    config = json.loads((folder / "config.json").read_text()) | {"ffn_tokens": 31}
    (folder / "config.json").write_text(json.dumps(config))


def cut_moments(folder):
    path = folder / checkpoint.OPTIMIZER
    path.write_bytes(path.read_bytes()[:50])


@pytest.mark.parametrize(
    ("spoil", "arguments", "message"),
    [
        (None, ["--to", "ffn=29"], "to.ffn: 29 is smaller than the model's 30"),
        (None, ["--to", "ffn=50", "--operator", "tile"], "50 is not a multiple of the model's 30"),
        (None, ["--to", "fn=50"], "to.fn: tokenformer has no such axis"),
        (None, ["--to", "ffn=a"], "write FIELD=SIZE"),
        (None, ["--to", "ffn=999999999999"], "not enough memory"),
        (spoil_weights, ["--to", "ffn=45"], "model.layers.0.mlp.key holds NaN"),
        (cut_short, ["--to", "ffn=45"], "truncated or not a safetensors file"),
        (wrong_shape, ["--to", "ffn=45"], "has shape"),
        (cut_moments, ["--to", "ffn=45"], "optimizer.safetensors: truncated"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(spoil, arguments, message, small, tmp_path, capsys):
    if spoil:
        spoil(small)
    assert main(["grow", str(small), str(tmp_path / "grown"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_a_full_disk_leaves_nothing(small, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "flush_to_disk", full)
    assert main(["grow", str(small), str(tmp_path / "grown"), "--to", "ffn=45"]) == 2
    assert "no space left on the disk" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_a_place_inside_the_source_is_refused(small, tmp_path, capsys):
    assert main(["grow", str(small), str(small / "grown"), "--to", "ffn=45"]) == 2
    assert "lies inside" in capsys.readouterr().err and not (small / "grown").exists()
    assert main(["grow", str(small), str(tmp_path / "small-grown"), "--to", "ffn=45"]) == 0  # the control


def test_an_existing_place_is_refused(small, tmp_path, capsys):
    (tmp_path / "grown").mkdir()
    assert main(["grow", str(small), str(tmp_path / "grown"), "--to", "ffn=45"]) == 2
    assert "already exists" in capsys.readouterr().err and not list((tmp_path / "grown").iterdir())


# --- checkpoints of any supported architecture, tensor by tensor ---

ODD = {"vocab_size": 1003, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6}
GQA = ODD | {"intermediate_size": 44, "num_key_value_heads": 2}
MODELS = {
    "llama": ("llama", GQA | {"attention_bias": True, "mlp_bias": True}),
    "llama_tied": ("llama", GQA | {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", GQA),
    "qwen3": ("qwen3", GQA | {"head_dim": 10, "tie_word_embeddings": True}),
    "gpt2": ("gpt2", ODD | {"n_inner": 44}),
    "mixtral": ("mixtral", GQA | {"num_local_experts": 4}),
}
WIDTHS = {"hidden_size": 96, "intermediate_size": 88}
HEADS = {"num_key_value_heads": 4}
DEPTH = {"num_hidden_layers": 4}
GROUPS = {"num_attention_heads": 12}
# Every exact operator, with all that it grows; sizes that divide nothing where it takes any.
GROWTHS = {
    "zero": [{"hidden_size": 72, "intermediate_size": 61, "num_hidden_layers": 3} | HEADS, {"num_attention_heads": 8}],
    "net2wider": [WIDTHS | {"intermediate_size": 61} | HEADS, GROUPS],
    "fpi": [WIDTHS | {"intermediate_size": 61} | HEADS],
    "lemon": [{"hidden_size": 72, "intermediate_size": 61} | HEADS | DEPTH, GROUPS],
    "hyperclone": [WIDTHS | HEADS],
    "staged": [WIDTHS | HEADS],
    "identity_blocks": [{"num_hidden_layers": 5}],
    "llama_pro": [DEPTH],
    "hyperclone+llama_pro": [WIDTHS | DEPTH],
}
EXPERTS = {
    "llama_tied": [(operator, {"num_local_experts": 4}) for operator in ("upcycle", "virtual_groups")],
    "mixtral": [("scale_experts", {"num_local_experts": 8})],
}
SHORT = {"hidden_size": "n_embd", "intermediate_size": "n_inner"}  # GPT-2's; its heads follow the width


def growths(name):
    for operator, targets in GROWTHS.items():
        for to in targets:
            if name == "gpt2":
                to = {SHORT.get(field, field): size for field, size in to.items() if "heads" not in field}
                if operator == "zero":
                    to.pop("n_embd", None)  # no zeros under LayerNorm
            if to:
                yield operator, to
    yield from EXPERTS.get(name, [])


def test_no_exact_operator_that_can_grow_a_file_is_left_out():
    done = {part for name in MODELS for operator, _ in growths(name) for part in operator.split("+")}
    others = {"zero_keys", "zero_values", "rotated_keys", "tile"}  # parameter tokens
    assert done == {name for name, each in OPERATORS.items() if each.exact and not each.carried} - others


def random_model(name, dtype=torch.float64):
    architecture, fields = MODELS[name]
    model = build_model(build_config(architecture, fields=fields), seed=0).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():  # nothing at its initial value: gains and biases too
            p.add_(torch.randn(p.shape, generator=generator, dtype=torch.float64).mul_(0.05).to(dtype))
    return model


def save(model, folder, **settings):
    with checkpoint.quiet():
        model.save_pretrained(folder, **settings)


def stored(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def grow_line(old, new, operator, to, *more):
    words = [word for field, size in to.items() for word in ("--to", f"{field}={size}")]
    return main(["grow", str(old), str(new), "--operator", operator, *words, *more])


# Run by an interpreter without this package. Norms, rotary tables and the router's softmax compute in float32 whatever
# the weights are, so for float64 its names stand for float64 there.
COMPARE = """
import json, sys
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging
logging.disable_progress_bar()

def logits(folder, dtype):
    config = AutoConfig.from_pretrained(folder)
    config._experts_implementation = "eager"
    model, info = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], (folder, info)
    assert model.dtype == dtype
    ids = torch.randint(1003, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(ids).logits

pairs, changes = json.load(open(sys.argv[1])), {}
for name in ("float32", "float64"):
    dtype = getattr(torch, name)
    if name == "float64":
        torch.float32, torch.float, torch.Tensor.float = torch.float64, torch.float64, torch.Tensor.double
    old = {folder: logits(folder, dtype) for folder in {pair[0] for pair in pairs}}
    for before, after in pairs:
        changes.setdefault(after, {})[name] = (old[before] - logits(after, dtype)).abs().max().item()
assert not any(name.split(".")[0] == "tokenformer" for name in sys.modules)
json.dump(changes, open(sys.argv[2], "w"))
"""


def test_transformers_alone_finds_the_same_function_after_every_exact_operator(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(checkpoint, "flush_to_disk", lambda folder: None)
    pairs = []
    for name in MODELS:
        old = tmp_path / name
        save(random_model(name), old)
        for i, (operator, to) in enumerate(growths(name)):
            new = tmp_path / f"{name} {operator} {i}"
            assert grow_line(old, new, operator, to, "--measure", "none") == 0, capsys.readouterr().err
            pairs.append((str(old), str(new)))
    spoilt = tmp_path / "spoilt"  # the control: one entry of a matrix, a millionth larger
    shutil.copytree(pairs[0][1], spoilt)
    tensors = load_file(spoilt / checkpoint.WEIGHTS)
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] += 1e-6
    save_file(tensors, spoilt / checkpoint.WEIGHTS, metadata={"format": "pt"})
    (tmp_path / "pairs.json").write_text(json.dumps([*pairs, (pairs[0][0], str(spoilt))]))
    done = subprocess.run(
        [sys.executable, "-c", COMPARE, "pairs.json", "changes.json"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    changes = json.loads((tmp_path / "changes.json").read_text())
    assert changes.pop(str(spoilt))["float64"] > 1e-10
    assert len(changes) == len(pairs) >= 6 * len(GROWTHS)
    for folder, change in changes.items():
        assert change["float64"] <= 1e-10 and change["float32"] <= 1e-4, (folder, change)


@pytest.mark.parametrize(
    ("name", "operator", "to"),
    [
        ("llama", "zero", {"hidden_size": 72, "num_attention_heads": 8, "num_hidden_layers": 3}),
        ("llama_tied", "net2wider+identity_blocks", {"hidden_size": 96, "num_hidden_layers": 5}),
        ("gpt2", "aki+stack", {"n_embd": 64, "num_hidden_layers": 4}),
        ("mixtral", "zero", {"hidden_size": 72, "intermediate_size": 61, "num_hidden_layers": 3}),
        ("qwen3", "shrink_pad_perturb+jump", {"hidden_size": 60, "num_hidden_layers": 3}),
    ],
)
def test_tensor_by_tensor_is_what_growth_in_memory_is_bit_for_bit(name, operator, to, tmp_path, capsys):
    model = random_model(name, torch.float32)
    if "jump" in operator:
        model = build_model(build_config("qwen3", fields=MODELS[name][1] | {"num_hidden_layers": 1}))
    save(model, tmp_path / "old")
    assert grow_line(tmp_path / "old", tmp_path / "new", operator, to, "--seed", "3", "--measure", "none") == 0
    assert "tensor by tensor" in capsys.readouterr().out
    grown = grow(model, operator, to, seed=3).model
    save(grown, tmp_path / "expected")  # as transformers names it, Mixtral's experts in parts
    expected, found = stored(tmp_path / "expected"), stored(tmp_path / "new")
    assert found.keys() == expected.keys()
    assert (name == "mixtral") == (found.keys() != dict(grown.named_parameters()).keys())
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    save(grow(model, "lemon" if name == "gpt2" else operator, to, seed=4).model, tmp_path / "other")  # the control
    assert any(not torch.equal(tensor, expected[key]) for key, tensor in stored(tmp_path / "other").items())


def test_what_training_carries_is_not_done_to_a_file(tmp_path, capsys):
    save(random_model("mixtral", torch.float32), tmp_path / "old")
    options = ["--option", "router=retrain", "--option", "router_steps=5"]
    for operator, more, message in (
        ("masked", ["--option", "ramp_steps=5"], "operator: masked needs training, which carries it"),
        ("duplicate_experts", options, "router: 'retrain' needs training, which carries it"),
    ):
        assert grow_line(tmp_path / "old", tmp_path / "new", operator, {"num_local_experts": 8}, *more) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_shards_in_and_out_hold_what_one_file_does(tmp_path):
    model = random_model("llama", torch.float32)
    save(model, tmp_path / "one")
    save(model, tmp_path / "many", max_shard_size="60KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    to = {"hidden_size": 96, "num_hidden_layers": 3}
    assert grow_line(tmp_path / "one", tmp_path / "grown", "zero", to) == 0
    assert grow_line(tmp_path / "many", tmp_path / "shards", "zero", to, "--shard-gigabytes", "0.0001") == 0
    files = sorted(path.name for path in (tmp_path / "shards").glob("*.safetensors"))
    assert files == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))] and len(files) > 3
    assert not (tmp_path / "shards" / checkpoint.WEIGHTS).exists()
    index = json.loads((tmp_path / "shards" / checkpoint.WEIGHTS_INDEX).read_text())
    one, many = stored(tmp_path / "grown"), stored(tmp_path / "shards")
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in one.values())
    assert set(index["weight_map"]) == set(one) == set(many) and set(index["weight_map"].values()) == set(files)
    assert all(torch.equal(many[name], one[name]) for name in one)
    for file in files:  # none too large, but for one tensor that is
        held = load_file(tmp_path / "shards" / file)
        assert len(held) == 1 or sum(t.nbytes for t in held.values()) <= 100_000
    assert largest_logit_change(model, load_checkpoint(tmp_path / "shards")[0], torch.randint(1003, (2, 9))) < 1e-5


def test_bfloat16_stays_so_and_is_rounded_once(tmp_path, capsys):
    model = random_model("llama", torch.bfloat16)
    with torch.no_grad():
        model.lm_head.weight.data = model.lm_head.weight.data.float()  # files may hold more than one dtype
    save(model, tmp_path / "old")
    to = {"hidden_size": 72, "intermediate_size": 61, "num_hidden_layers": 3}
    assert grow_line(tmp_path / "old", tmp_path / "new", "lemon", to) == 0
    said = capsys.readouterr().out
    found = stored(tmp_path / "new")
    exact = dict(grow(model.float(), "lemon", to).model.named_parameters())
    dtypes = {name: torch.float32 if name == "lm_head.weight" else torch.bfloat16 for name in found}
    assert all(torch.equal(found[name], exact[name].to(dtypes[name])) for name in exact)
    errors = [(found[n].double() - p.double()).abs() / p.double().abs().clamp(min=1e-300) for n, p in exact.items()]
    event = json.loads((tmp_path / "new" / checkpoint.LINEAGE).read_text())[-1]
    assert 0 < event["largest_rounding"] <= max(e.max().item() for e in errors) * 1.0001 <= 2**-8
    assert f"rounded by at most {event['largest_rounding']:.1e}" in said
    assert "in bfloat16, float32, tensor by tensor" in said and "logits moved by at most" in said
    assert json.loads((tmp_path / "new" / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_lies_beside_the_weights_comes_along(tmp_path):
    save(random_model("llama_tied", torch.float32), tmp_path / "old")
    ByteTokenizer().save(tmp_path / "old")
    (tmp_path / "old" / "chat_template.jinja").write_text("{{ x }}")
    (tmp_path / "old" / "pytorch_model.bin").write_bytes(b"pickled")
    assert grow_line(tmp_path / "old", tmp_path / "new", "fpi", {"hidden_size": 96}) == 0
    names = {path.name for path in (tmp_path / "new").iterdir()}
    kept = {path.name for path in (tmp_path / "old").iterdir()} - {"pytorch_model.bin"}
    assert names == kept | {checkpoint.LINEAGE}
    same = kept - {"config.json", checkpoint.WEIGHTS}
    assert all((tmp_path / "new" / n).read_bytes() == (tmp_path / "old" / n).read_bytes() for n in same)
    assert len(same) >= 3


def test_what_is_measured_on_the_files_is_what_growth_in_memory_measures(tmp_path):
    model = random_model("llama", torch.float32)
    save(model, tmp_path / "old")
    operator, to = "hyperclone+identity_blocks", {"hidden_size": 96, "num_hidden_layers": 3}
    assert grow_line(tmp_path / "old", tmp_path / "new", operator, to, "--option", "noise=0.1") == 0
    event = json.loads((tmp_path / "new" / checkpoint.LINEAGE).read_text())[-1]
    growth = grow(model, operator, to, options={"noise": 0.1})
    ids = torch.randint(1003, measure.PROBE, generator=torch.Generator().manual_seed(0))
    assert event["live_at_once"] == live_share(growth, ids)
    assert event["duplicated_rows"] == duplicated_share(growth.model, growth.copies)
    assert event["max_logit_change"] == pytest.approx(largest_logit_change(model, growth.model, ids), abs=1e-6)
    without_copies = grow(model, "zero", to)  # the control
    assert duplicated_share(without_copies.model, without_copies.copies) == 0 < event["duplicated_rows"]


def test_as_much_is_measured_as_the_memory_bound_allows():
    def chosen(gigabytes, largest):
        sizes = {"a": Size((int(largest * 5e8),), torch.bfloat16)}
        return measure.affordable(SimpleNamespace(sizes=sizes, bytes=gigabytes * 1e9))

    assert chosen(1, 0.9) == "full"  # where the interpreter itself weighs more
    assert chosen(5, 0.2) == "full" and chosen(5, 0.3) == "logits"
    assert chosen(60, 0.1) == "logits" and chosen(65, 0.1) == "none"


def test_the_memory_of_a_new_layer_is_let_go_of(tmp_path):
    model = random_model("llama", torch.float32)
    save(model, tmp_path / "old")
    prepared = prepare(tmp_path / "old", "identity_blocks", {"num_hidden_layers": 4})
    fresh = FreshLayers(prepared.maps[0], seed=0)
    first = fresh.parameter("model.layers.1.mlp.up_proj.weight")
    assert first.std() > 0 and not torch.equal(first, fresh.parameter("model.layers.3.mlp.up_proj.weight"))
    assert all(p.is_meta for p in fresh.skeleton.parameters())


# --- names on the disk that are not the model's ---


def rename(folder, change):
    tensors = {change(name): tensor for name, tensor in load_file(folder / checkpoint.WEIGHTS).items()}
    save_file(tensors, folder / checkpoint.WEIGHTS, metadata={"format": "pt"})


def test_a_tied_head_that_is_stored_too_is_no_obstacle_unless_it_differs(tmp_path, capsys):
    folder = tmp_path / "old"
    save(random_model("llama_tied", torch.float32), folder)
    tensors = load_file(folder / checkpoint.WEIGHTS)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / checkpoint.WEIGHTS, metadata={"format": "pt"})
    assert grow_line(folder, tmp_path / "new", "zero", {"hidden_size": 96}) == 0
    assert "tensor by tensor" in capsys.readouterr().out and "lm_head.weight" not in stored(tmp_path / "new")
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, folder / checkpoint.WEIGHTS, metadata={"format": "pt"})
    assert grow_line(folder, tmp_path / "newer", "zero", {"hidden_size": 96}) == 2
    assert "lm_head.weight is not model.embed_tokens.weight" in capsys.readouterr().err


def test_names_that_are_not_the_models_grow_in_memory_and_that_is_said(tmp_path, capsys):
    model = random_model("gpt2", torch.float32)
    save(model, tmp_path / "old")  # as its checkpoint on the hub, which was saved without the head
    rename(tmp_path / "old", lambda key: key.removeprefix("transformer."))
    to = {"num_hidden_layers": 3}
    assert grow_line(tmp_path / "old", tmp_path / "new", "identity_blocks", to, "--shard-gigabytes", "0.0002") == 0
    assert "in memory: its files name tensors otherwise" in capsys.readouterr().out
    assert (tmp_path / "new" / checkpoint.WEIGHTS_INDEX).exists()
    assert largest_logit_change(model, load_checkpoint(tmp_path / "new")[0], torch.randint(1003, (2, 9))) < 1e-5


def pickled(folder):
    (folder / checkpoint.WEIGHTS).rename(folder / "pytorch_model.bin")


def other_architecture(folder):
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "bert"}
    (folder / "config.json").write_text(json.dumps(config))


def another_layer(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": config["num_hidden_layers"] + 1}))


def quantised(folder):
    tensors = load_file(folder / checkpoint.WEIGHTS)
    tensors["model.norm.weight"] = torch.ones(48, dtype=torch.int8)
    save_file(tensors, folder / checkpoint.WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "arguments", "message"),
    [
        (pickled, [], "pickled weights are not read"),
        (other_architecture, [], "model_type 'bert' cannot grow; known: tokenformer, llama"),
        (quantised, [], "model.norm.weight is stored as I8"),
        (None, ["--to", "hidden_sise=96"], "nearest valid name: hidden_size"),
        (None, ["--operator", "lemno"], "'lemno' is not known; nearest valid name: lemon"),
        (None, ["--operator", "net2wider", "--option", "nose=0.1"], "no such option; nearest valid name: noise"),
        (None, ["--operator", "net2wider", "--option", "noise=much"], "noise: 'much' is of the wrong type"),
        (None, ["--operator", "net2wider", "--option", "noise"], "--option noise: write NAME=VALUE"),
        (None, ["--to", "head_dim=16"], "rotary positions turn the whole of a head"),
        (None, ["--operator", "net2wider", "--option", "noise=NaN"], "noise: nan is no finite number"),
        (None, ["--operator", "lemon+zero"], "operator: zero has nothing to grow; lemon takes hidden_size"),
        (None, ["--to", "hidden_size=48"], "to: hidden_size = 48 is the size that the model already has"),
        (another_layer, [], "model.layers.2.input_layernorm.weight is in none of its files"),
        (None, ["--shard-gigabytes", "0"], "--shard-gigabytes 0.0: must be more than 0"),
    ],
)
def test_a_mistake_with_any_architecture_is_one_line(spoil, arguments, message, tmp_path, capsys):
    save(random_model("llama", torch.float32), tmp_path / "old")
    if spoil:
        spoil(tmp_path / "old")
    words = arguments if "--to" in arguments else [*arguments, "--to", "hidden_size=96"]
    assert main(["grow", str(tmp_path / "old"), str(tmp_path / "new"), *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


# --- plans ---


def test_a_dry_run_says_the_plan_and_writes_nothing(tmp_path, capsys):
    save(random_model("llama", torch.float32), tmp_path / "old")
    to = ["--to", "hidden_size=96", "--to", "num_key_value_heads=4"]
    assert main(["grow", str(tmp_path / "old"), "--dry-run", *to]) == 0
    said = capsys.readouterr().out
    for words in ("by zero", "hidden_size 48 -> 96", "num_attention_heads 6 -> 12, which follows", "promise: exact"):
        assert words in said
    grown = grow(random_model("llama", torch.float32), "zero", {"hidden_size": 96, "num_key_value_heads": 4}).model
    parameters = sum(p.numel() for p in grown.parameters())
    assert f"-> {parameters:,}" in said and f"{4 * parameters / 1e6:.1f} MB" in said
    assert "moments: none stored" in said and "FLOPs per token: " in said
    assert main(["grow", str(tmp_path / "old"), "--dry-run", "--operator", "stack", "--to", "num_hidden_layers=4"]) == 0
    said = capsys.readouterr().out
    assert "approximate, since" in said and "layers are repeated" in said and "identity_blocks, llama_pro" in said
    sparkling = ["--dry-run", str(tmp_path / "new"), "--operator", "sparkling", "--to", "hidden_size=96"]
    assert main(["grow", str(tmp_path / "old"), *sparkling]) == 0  # OUT may stand anywhere
    assert "approximate, though these sizes change nothing" in capsys.readouterr().out
    assert main(["grow", str(tmp_path / "old"), *to]) == 2
    assert "OUT: name the checkpoint to make" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_operators_are_listed_with_what_they_grow_and_promise(capsys):
    assert main(["operators"]) == 0
    said = capsys.readouterr().out
    for operator in OPERATORS.values():
        assert f"{operator.name}: {operator.promise} ({operator.source})" in said
    assert "options: noise=0.0" in said and "gpt2: n_embd, n_inner" in said
    assert main(["operators", "lemon"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("lemon: exact") and "the gain makes up for it" in said and "zero_keys" not in said
    assert main(["operators", "lemmon"]) == 2
    assert "nearest valid name: lemon" in capsys.readouterr().err


def test_options_and_a_frozen_growth_reach_the_checkpoint(tmp_path):
    save(random_model("llama", torch.float32), tmp_path / "old")
    line = ("--option", "freeze=true", "--measure", "logits")
    assert grow_line(tmp_path / "old", tmp_path / "new", "llama_pro", {"num_hidden_layers": 4}, *line) == 0
    event = json.loads((tmp_path / "new" / checkpoint.LINEAGE).read_text())[-1]
    model, to = random_model("llama", torch.float32), {"num_hidden_layers": 4}
    expected = grow(model, "llama_pro", to, options={"freeze": True})
    assert event["trained_parameters"] == expected.event["trained_parameters"]
    assert event["options"] == {"freeze": True} and event["max_logit_change"] < 1e-5 and "live_at_once" not in event
    for old, alive in (("old", True), ("new", False)):  # what is frozen gets no gradient, and is not said to
        assert grow_line(tmp_path / old, tmp_path / f"wider {old}", "zero", {"hidden_size": 96}) == 0
        event = json.loads((tmp_path / f"wider {old}" / checkpoint.LINEAGE).read_text())[-1]
        assert ("embed_tokens" in event["live_at_once"]) == alive and event["live_at_once"]["down_proj"] == 1


# --- failures in the middle ---


@pytest.fixture
def llama(tmp_path):
    save(random_model("llama", torch.float32), tmp_path / "old")
    return tmp_path / "old"


def at_the_tenth_tensor(monkeypatch, act):
    calls, rounding = [], write.largest_rounding

    def counted(*arguments):
        calls.append(1)
        if len(calls) == 10:
            act()
        return rounding(*arguments)

    monkeypatch.setattr(write, "largest_rounding", counted)


def test_a_termination_in_the_middle_leaves_nothing(llama, tmp_path, monkeypatch):
    handler = signal.getsignal(signal.SIGTERM)
    at_the_tenth_tensor(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as stopped:
        grow_line(llama, tmp_path / "new", "zero", {"hidden_size": 96})
    assert stopped.value.code == 128 + signal.SIGTERM and signal.getsignal(signal.SIGTERM) is handler
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_what_an_outright_kill_leaves_is_hidden_and_goes_with_the_next_growth(llama, tmp_path, monkeypatch):
    to = {"hidden_size": 96}
    with monkeypatch.context() as patched:
        at_the_tenth_tensor(patched, lambda: os.kill(os.getpid(), signal.SIGKILL))
        child = os.fork()
        if child == 0:
            grow_line(llama, tmp_path / "new", "zero", to)
            os._exit(0)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"old", f".new.tmp-{child}"}
    assert grow_line(llama, tmp_path / "new", "zero", to) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"old", "new"}


def test_a_disk_that_fills_up_leaves_nothing_and_a_small_one_is_not_begun(llama, tmp_path, capsys, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        assert grow_line(llama, disk / "new", "zero", {"hidden_size": 96}) == 2
        error = capsys.readouterr().err
        assert "no space left on the disk: " in error and "are free" in error and error.count("\n") == 1
        monkeypatch.setattr("tokenformer.grow_checkpoint.require_place", lambda out, prepared: None)
        assert grow_line(llama, disk / "new", "zero", {"hidden_size": 96}) == 2
        assert "cannot be written (no space left on the disk)" in capsys.readouterr().err
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# --- the hub ---


def test_a_name_on_the_hub_is_fetched_without_its_pickles(llama, tmp_path, capsys, monkeypatch):
    asked = []

    def snapshot_download(name, allow_patterns, local_files_only):
        asked.append((name, allow_patterns))
        return str(llama)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert grow_line("some/llama", "new", "zero", {"hidden_size": 96}) == 0
    assert {name for name, _ in asked} == {"some/llama"} and "model*.safetensors" not in asked[0][1]
    patterns = {pattern for _, each in asked for pattern in each}
    assert "model*.safetensors" in patterns and not any(p.endswith((".bin", ".pt", "*")) for p in patterns)
    asked.clear()
    other_architecture(llama)
    assert grow_line("some/bert", "newer", "zero", {"hidden_size": 96}) == 2
    assert len(asked) == 1 and "model_type 'bert' cannot grow" in capsys.readouterr().err  # no weights were fetched


def test_a_hub_that_cannot_be_reached_is_one_line_and_a_local_folder_is_never_asked_for(tmp_path, capsys, monkeypatch):
    def unreachable(name, timeout):
        raise ConnectionError("no network\nand a long story")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.model_info", unreachable)
    assert grow_line("some/llama", "new", "zero", {"hidden_size": 96}) == 2
    error = capsys.readouterr().err
    assert "some/llama: no such file or folder here, and not to be had from the hub (it cannot be reached: no" in error
    assert error.endswith("no network)\n") and error.count("\n") == 1
    (tmp_path / "runs").mkdir()
    assert grow_line("runs/llama", "new", "zero", {"hidden_size": 96}) == 2
    assert capsys.readouterr().err.endswith("runs/llama: no such checkpoint\n")
