"""Released checkpoints: the published formulas layer by layer, the same bits back, without the package, refusals."""

import filecmp
import json
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import released_format as released
import torch
import yaml
from safetensors.torch import load_file, save, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tokenformer import cli
from tokenformer.checkpoint import load_checkpoint, save_checkpoint
from tokenformer.convert import convert, settings_of
from tokenformer.models import build_config, build_model
from tokenformer.models.portable import CODE

VOCABULARY, LAYERS, HEADS = 300, 3, 2
BIN = "pytorch_model.bin"
QUERY = "sequential.2.attention.query.key_param_tokens"
ROOT = Path(__file__).resolve().parent.parent


def tiny(size: str = "150m", dtype: torch.dtype = torch.float16, slots: tuple[int, ...] | None = None) -> Any:
    """Tensors and settings of a released model with three layers and two heads of the released size."""
    layers, width, heads = released.scaled(size, LAYERS, HEADS)
    tokens = slots or (width, width, 4 * width)
    tensors = released.random_checkpoint(layers, width, VOCABULARY, tokens, dtype)  # type: ignore[arg-type]
    return tensors, released.neox_settings(layers, width, heads, tokens)  # type: ignore[arg-type]


def write(folder: Path, tensors: dict[str, Any], settings: dict[str, Any] | None) -> Path:
    released.write_bin(tensors, folder)
    if settings is not None:
        (folder / "config.yml").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One released folder for all, with a tokenizer, and what it converts to beside it."""
    folder = write(tmp_path_factory.mktemp("small") / "released", *tiny())
    released.write_tokenizer(folder / "tokenizer.json")
    convert(folder, folder.parent / "converted", say=lambda line: None)
    return folder


def layers_of(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """The embeddings, the hidden state after each layer, the logits."""
    states = [model.model.embed_tokens(ids)]
    hooks = [layer.register_forward_hook(lambda _, __, out: states.append(out)) for layer in model.model.layers]
    with torch.no_grad():
        logits = model(ids).logits
    for hook in hooks:
        hook.remove()
    return [state.detach() for state in (*states, logits)]


def largest_difference(states: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Over all layers, relative to the largest entry of each."""
    pairs = zip(states, expected, strict=True)
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in pairs)


def run(*words: Any) -> int:
    return cli.main([str(word) for word in words])


# --- the formulas ---


@pytest.mark.parametrize("size", released.SHAPES)
def test_every_layer_of_each_released_shape_is_that_of_the_published_formulas(size: str, tmp_path: Path) -> None:
    tensors, settings = tiny(size)
    convert(write(tmp_path / "in", tensors, settings), tmp_path / "out", say=lambda line: None)
    ids = torch.randint(VOCABULARY, (2, 21), generator=torch.Generator().manual_seed(0))
    expected = list(released.published_layers(tensors, ids, HEADS))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64)
    assert largest_difference(layers_of(model, ids), expected) < 1e-9
    for wrong in ({"heads": 2 * HEADS}, {"heads": HEADS, "rotary": 0.5}):  # the control: another model is another
        assert largest_difference(layers_of(model, ids), list(released.published_layers(tensors, ids, **wrong))) > 1e-5
    single = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert 1e-9 < largest_difference(layers_of(single, ids), expected) < 1e-5


@pytest.mark.parametrize("theta", released.THETAS)
def test_each_published_theta_is_read_from_the_configuration(theta: str, tmp_path: Path) -> None:
    tensors, settings = tiny(slots=(90, 70, 200))  # not those that the width would give
    convert(write(tmp_path / "in", tensors, settings | {"norm_activation_type": theta}), tmp_path / "out", say=str)
    ids = torch.arange(40).view(2, 20)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64)
    expected = {each: list(released.published_layers(tensors, ids, HEADS, theta=each)) for each in released.THETAS}
    states = layers_of(model, ids)
    assert {each: largest_difference(states, e) < 1e-9 for each, e in expected.items()} == {
        each: each == theta for each in released.THETAS
    }


def test_every_setting_that_shapes_do_not_tell_is_read_matters_and_goes_back(tmp_path: Path) -> None:
    tensors, settings = tiny(slots=(90, 70, 200))
    settings |= {"rotary_pct": 0.5, "rotary_emb_base": 500.0, "layernorm_epsilon": 0.01, "max_position_embeddings": 512}
    convert(write(tmp_path / "in", tensors, settings), tmp_path / "out", say=lambda line: None)
    ids = torch.arange(40).view(2, 20)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64)
    states, words = layers_of(model, ids), {"rotary": 0.5, "base": 500.0, "eps": 0.01}
    assert largest_difference(states, list(released.published_layers(tensors, ids, HEADS, **words))) < 1e-9
    for each in words:  # the control: with the usual value of any one of them it is another model
        usual = {key: value for key, value in words.items() if key != each}
        assert largest_difference(states, list(released.published_layers(tensors, ids, HEADS, **usual))) > 1e-5
    assert model.config.max_position_embeddings == 512
    convert(tmp_path / "out", tmp_path / "back", say=lambda line: None)
    back = yaml.safe_load((tmp_path / "back" / "config.yml").read_text())
    told = settings.keys() - {"tokenizer-type", "seq_length"}
    assert {key: back[key] for key in told} == {key: settings[key] for key in told}


def test_a_row_of_zeros_gives_zero_where_the_published_norm_gives_nan(tmp_path: Path) -> None:
    tensors, settings = tiny()
    tensors["sequential.0.word_embeddings.weight"][7] = 0  # as padding rows may be: its scores are all zero
    convert(write(tmp_path / "in", tensors, settings), tmp_path / "out", say=lambda line: None)
    assert all(bool(x.isnan().any()) for x in list(released.published_layers(tensors, torch.tensor([[7]]), HEADS))[1:])
    for dtype in (torch.float16, torch.float32, torch.float64):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype)
        assert all(bool(x.isfinite().all()) for x in layers_of(model, torch.tensor([[7]])))


# --- bits ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_there_and_back_every_tensor_has_its_name_its_dtype_and_its_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors, settings = tiny("450m", dtype)
    convert(write(tmp_path / "in", tensors, settings), tmp_path / "out", say=lambda line: None)
    model, lineage = load_checkpoint(tmp_path / "out")
    assert model.dtype == dtype and lineage == []
    convert(tmp_path / "out", tmp_path / "back", say=lambda line: None)
    assert (tmp_path / "back" / BIN).read_bytes() == (tmp_path / "in" / BIN).read_bytes()
    again = torch.load(tmp_path / "back" / BIN, weights_only=True)
    assert list(again) == list(tensors) and {t.dtype for t in again.values()} == {dtype}
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
    convert(tmp_path / "back", tmp_path / "out2", say=lambda line: None)  # its config.yml says all that is needed
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "out2" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_tensors_of_several_dtypes_or_in_one_piece_of_memory_keep_their_bits(tmp_path: Path) -> None:
    tensors, settings = tiny()
    tensors[QUERY] = tensors[QUERY].float() + 2**-20
    assert not torch.equal(tensors[QUERY].half().float(), tensors[QUERY])  # so that rounding would be seen
    tensors[QUERY.replace(".2.", ".3.")] = tensors[QUERY.replace(".2.", ".4.")]
    lines: list[str] = []
    convert(write(tmp_path / "in", tensors, settings | {"num_layers": None}), tmp_path / "out", say=lines.append)
    assert lines[-1].endswith("in float16, float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(model.model.layers[0].self_attn.q_proj.key, tensors[QUERY])
    convert(tmp_path / "out", tmp_path / "back", say=lambda line: None)
    again = torch.load(tmp_path / "back" / BIN, weights_only=True)
    assert all(again[name].dtype == t.dtype and torch.equal(again[name], t) for name, t in tensors.items())


@pytest.mark.parametrize("place", ["run", "run/global_step1000"])
def test_a_deepspeed_folder_is_the_same_model(place: str, small: Path, tmp_path: Path) -> None:
    released.write_deepspeed(*tiny()[:1], tmp_path / "run", tiny()[1])
    (tmp_path / "run" / "global_step1000" / "mp_rank_00_model_states.pt").write_bytes(b"never opened")
    convert(tmp_path / place, tmp_path / "out", say=lambda line: None)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (small.parent / "converted" / name).read_bytes()


def test_the_file_alone_and_options_are_enough_where_nothing_lies_beside_it(small: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    shutil.copyfile(small / BIN, tmp_path / "in" / "weights.pt")
    lines: list[str] = []
    words: dict[str, Any] = {"heads": HEADS, "rotary": 0.25, "theta": "l2_norm_gelu"}
    words |= {"tokenizer": small / "tokenizer.json", "say": lines.append}
    convert(tmp_path / "in" / "weights.pt", tmp_path / "out", **words)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (small.parent / "converted" / name).read_bytes()
    assert "--heads: num_attention_heads 2" in lines and any(line.startswith("the default: ") for line in lines)


def test_the_tokenizer_beside_the_weights_comes_along_with_its_end_mark(small: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(small.parent / "converted")
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|endoftext|>", 0)
    assert tokenizer.decode(tokenizer("größer, als")["input_ids"]) == "größer, als"


@pytest.mark.parametrize("size", released.SHAPES)
def test_of_the_released_shapes_all_is_known_and_of_another_nothing_is_guessed(size: str, tmp_path: Path) -> None:
    layers, width, heads = released.SHAPES[size]
    sizes = {"num_layers": layers, "vocab_size": 50304, "hidden_size": width, "qkv_tokens": width}
    sizes |= {"proj_tokens": width, "ffn_tokens": 4 * width}
    settings, sources = settings_of(tmp_path, sizes, {})
    assert settings == {
        "num_attention_heads": heads,
        "rotary_pct": 0.25,
        "norm_activation_type": "l2_norm_gelu",
        "rotary_emb_base": 10000.0,
        "layernorm_epsilon": 1e-5,
        "max_position_embeddings": 2048,
    }
    assert any(line.startswith(f"the released {size}: ") for line in sources)
    for other in ({"ffn_tokens": 4 * width + 1}, {"num_layers": layers + 1}):
        with pytest.raises(ValueError, match="nothing tells num_attention_heads.* give it with --heads"):
            settings_of(tmp_path, sizes | other, {})


# --- without the package ---

WITHOUT = """
import json, sys
sys.modules["tokenformer"] = None                                # the control: what is not there cannot be imported
try:
    import tokenformer
except ImportError:
    pass
else:
    raise SystemExit("the package is there")
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

folder, again, portable = sys.argv[1:]
ids = torch.arange(1, 41).view(2, 20)
load = {"trust_remote_code": True, "dtype": torch.float64}
model = AutoModelForCausalLM.from_pretrained(folder, **load)
logits = model(ids).logits
out = {"logits": logits.tolist(), "class": type(model).__name__, "module": type(model).__module__}
out["greedy"] = model.generate(ids, max_new_tokens=4, do_sample=False).tolist()
out["eos"] = AutoTokenizer.from_pretrained(folder, trust_remote_code=True).eos_token_id
model.save_pretrained(again)                                     # it stays a folder that loads so

# What vLLM's transformers backend does: the base model by auto_map, made on no device, an attention function of its
# own, one row of tokens with their positions, what that function needs handed down to it.
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
seen = []

def attention(module, q, k, v, attention_mask, scaling=None, attention_instances=None, **kwargs):
    seen.append((attention_instances[module.layer_idx], attention_mask is None, list(q.shape)))
    causal = torch.full((1, 1, q.shape[2], q.shape[2]), float("-inf")).triu(1).to(q.dtype)
    mixed = (q @ k.transpose(-1, -2) * scaling + causal).softmax(-1) @ v
    return mixed[0].transpose(0, 1).flatten(1), None             # (tokens, heads * size), as vLLM's

ALL_ATTENTION_FUNCTIONS.register("served", attention)
config._attn_implementation = "served"
with torch.device("meta"):
    base = AutoModel.from_config(config, trust_remote_code=True)
out["base"], out["backend"] = type(base).__name__, base.is_backend_compatible()
base = AutoModel.from_pretrained(folder, config=config, **load)
row = {"input_ids": ids[:1], "position_ids": torch.arange(20)[None]}
states = base(**row, use_cache=False, attention_instances={i: f"layer {i}" for i in range(9)}, return_dict=False)[0]
out["served"] = (model.lm_head(states) - logits[:1]).abs().max().item()
out["seen"] = seen
other = AutoModelForCausalLM.from_pretrained(portable, trust_remote_code=True)
out["portable"] = sum(float(p.double().sum()) for p in other.parameters())
print(json.dumps(out))
"""


WITHOUT_IN_FULL = """
import sys
sys.modules["tokenformer"] = None
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

folder, place = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
with torch.no_grad():
    save_file({"logits": model(load_file(place + "/ids")["ids"]).logits}, place + "/logits")
"""


def python(code: str, *words: Any, place: Path) -> str:
    """What a fresh interpreter prints that has no part of this repository on its path."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_MODULES_CACHE": str(place)}
    command = [sys.executable, "-I", "-c", code, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=place)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_folders_load_without_the_package_and_as_vllm_s_backend_loads_them(small: Path, tmp_path: Path) -> None:
    folder = small.parent / "converted"
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 61}
    modern = build_model(build_config("tokenformer", "modern", sizes))  # no released form has room for this one
    save_checkpoint(tmp_path / "modern", modern, trainer={"step": 1})
    assert run("convert", tmp_path / "modern", tmp_path / "portable", "--to", "transformers") == 0
    assert not (tmp_path / "portable" / "trainer.json").exists()
    words = (folder, tmp_path / "again", tmp_path / "portable")
    out = json.loads(python(WITHOUT, *words, place=tmp_path).splitlines()[-1])
    assert out["portable"] == pytest.approx(sum(float(p.detach().double().sum()) for p in modern.parameters()))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    ids = torch.arange(1, 41).view(2, 20)
    assert (torch.tensor(out["logits"], dtype=torch.float64) - model(ids).logits).abs().max() < 1e-10
    assert out["class"] == "TokenFormerForCausalLM" and out["module"].startswith("transformers_modules.")
    assert out["greedy"] == model.generate(ids, max_new_tokens=4, do_sample=False).tolist() and out["eos"] == 0
    assert (out["base"], out["backend"]) == ("TokenFormerModel", True)
    assert out["served"] < 1e-10
    size = tiny()[1]["hidden_size"] // HEADS
    assert out["seen"] == [[f"layer {i}", True, [1, HEADS, 20, size]] for i in range(LAYERS)]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")  # by the package, from what was saved without it
    assert type(again).__module__ == "tokenformer.models.tokenformer" and again.dtype == torch.float64
    assert {*CODE} <= {path.name for path in (tmp_path / "again").iterdir()}


def test_the_code_in_the_folder_is_this_package_s_own(small: Path) -> None:
    import tokenformer.models.tokenformer as models
    import tokenformer.pattention as layer

    theirs = {name: (small.parent / "converted" / name).read_text() for name in CODE}
    assert theirs["pattention.py"] == Path(str(layer.__file__)).read_text()
    lines = zip(theirs[CODE[0]].splitlines(), Path(str(models.__file__)).read_text().splitlines(), strict=True)
    (changed,) = [(there, here) for there, here in lines if there != here]
    assert changed[0] == changed[1].replace("from ..", "from .")
    neighbour = re.compile(r"^ *(?:from|import) +(?:\.|tokenformer).*", re.M)
    assert {name: neighbour.findall(text) for name, text in theirs.items()} == {CODE[0]: [changed[0]], CODE[1]: []}


def test_what_is_saved_or_grown_from_such_a_folder_stays_such(small: Path, tmp_path: Path) -> None:
    folder = small.parent / "converted"
    model, _ = load_checkpoint(folder)
    save_checkpoint(tmp_path / "saved", model)
    assert run("grow", folder, tmp_path / "grown", "--to", "ffn=600", "--measure", "none") == 0
    for place in ("saved", "grown"):
        assert json.loads((tmp_path / place / "config.json").read_text())["auto_map"]
        assert all((tmp_path / place / name).read_text() == (folder / name).read_text() for name in CODE)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 61}
    save_checkpoint(tmp_path / "plain", build_model(build_config("tokenformer", fields=sizes)))  # the control
    assert not {*CODE} & {path.name for path in (tmp_path / "plain").iterdir()}


# --- the hub ---


def test_a_name_on_the_hub_is_fetched_and_converted(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def snapshot_download(name: str, allow_patterns: list[str], local_files_only: bool) -> str:
        asked.append((name, allow_patterns))
        return str(small)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert run("convert", "Haiyang-W/TokenFormer-150M", "out") == 0
    assert asked[0][0] == "Haiyang-W/TokenFormer-150M" and BIN in asked[0][1]
    assert not any(pattern.endswith((".py", "*")) for pattern in asked[0][1])
    assert Path("out/model.safetensors").read_bytes() == (small.parent / "converted/model.safetensors").read_bytes()
    (tmp_path / "here").mkdir()
    assert run("convert", "here/model", "new") == 2
    assert capsys.readouterr().err == "tokenformer: here/model: no such file or folder\n" and len(asked) == 1


# --- refusals ---


class Code:
    def __reduce__(self) -> Any:
        return os.system, ("touch it_ran",)


def change(name: str, value: Any) -> Any:
    def changed(tensors: dict[str, Any]) -> dict[str, Any]:
        rest = {key: tensor for key, tensor in tensors.items() if key != name}
        return rest if value is None else rest | {name: value}

    return changed


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (change("extra", Code()), "in/pytorch_model.bin: is not opened: its pickle refers to posix.system, and"),
        (change(QUERY, None), f"in: {QUERY} is missing"),
        (change("sequential.6.norm.bias", None), "in: sequential.6.norm.bias is missing"),
        (change("sequential.9.mlp.key_param_tokens", torch.zeros(2)), "is missing"),
        (change("sequential.7.final_linear.weight", torch.zeros(2)), "final_linear.weight is not part of a released"),
        (change("sequential.2.attention.rotary_emb.inv_freq", torch.zeros(2)), "inv_freq is not part of a released"),
        (change("sequential.3.attention.key.key_param_tokens", torch.zeros(5, 128)), "has shape [5, 128], and [128, "),
        (change("sequential.6.norm.bias", torch.zeros(1)), "6.norm.bias has shape [1], and [128] is expected"),
        (change(QUERY, torch.full((128, 128), torch.nan)), f"{QUERY} holds NaN or infinite values"),
        (change(QUERY, torch.zeros(128, 128, dtype=torch.int8)), f"{QUERY} is stored as torch.int8"),
        (change("sequential.2.attention.qkv_key_slot.weight", torch.zeros(2)), "no rotary positions, tanh GELU"),
        (change(QUERY, torch.zeros(128, 128).to_sparse()), f"{QUERY} is torch.sparse_coo on cpu; allowed: all its"),
        (change(QUERY, torch.zeros(128, 128, device="meta")), f"{QUERY} is torch.strided on meta; allowed: all its"),
        (change("n", 3), "'n' is a int, and is expected to be a named tensor"),
        (lambda tensors: list(tensors.values()), "holds a list, and is expected to hold tensors by their names"),
        (lambda tensors: {}, "sequential.0.word_embeddings.weight (and 2 more) is missing"),
    ],
)
def test_what_is_no_released_tokenformer_is_refused_by_name(
    changed: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tensors, settings = tiny()
    write(Path("in"), changed(tensors), settings)
    refused(("convert", "in", "out"), message, capsys, {"in"})


def refused(words: tuple[Any, ...], message: str, capsys: pytest.CaptureFixture[str], left: set[str]) -> None:
    assert run(*words) == 2
    error = capsys.readouterr().err
    assert error.startswith("tokenformer: ") and error.count("\n") == 1 and message in error, error
    assert {path.name for path in Path().iterdir()} == left


@pytest.mark.parametrize(
    ("settings", "words", "message"),
    [
        ({"num_attention_heads": 3}, (), "hidden_size: 128 is not a multiple of num_attention_heads 3"),
        ({"num_attention_heads": "two"}, (), "in/config.yml: num_attention_heads = 'two' is no whole number"),
        ({"num_attention_heads": 10**400}, (), "00 is no whole number above 0"),
        ({"rotary_emb_base": 0}, (), "in/config.yml: rotary_emb_base = 0 is no number above 0"),
        ({"num_attention_heads": None}, (), "in: nothing tells num_attention_heads: no configuration"),
        ({}, ("--heads", "4"), "in/config.yml: num_attention_heads = 2, and --heads says 4"),
        ({}, ("--theta", "gelu"), "--theta: norm_activation_type = 'gelu' is not known; allowed: l2_norm_gelu"),
        ({"rotary_pct": 1.5}, (), "partial_rotary_factor: 1.5 is no share"),
        ({"num_layers": 12}, (), "in/config.yml: num_layers = 12, and the tensors have 3"),
        ({"ffn_slot_num": 9}, (), "in/config.yml: ffn_slot_num = 9, and the tensors have 512"),
        ({"norm": "rmsnorm"}, (), "in/config.yml: norm = 'rmsnorm' is another model; the released one has"),
        ({"pos_emb": "none"}, (), "in/config.yml: pos_emb = 'none' is another model; the released one has 'rotary'"),
        ({}, ("--tokenizer", "in"), "--tokenizer in: cannot be loaded"),
        ({}, ("--tokenizer", "nosuch.json"), "--tokenizer nosuch.json: no such file or folder\n"),
        ({}, ("--tokenizer", "in/nosuch"), "--tokenizer in/nosuch: no such file or folder\n"),
        ({}, ("--tokenizer", "owner/name"), "owner/name: no such file or folder here, and not to be had from the hub"),
        ({"tokenizer": "large.json"}, (), "in/tokenizer.json: has ids up to 300, the model 300 rows"),
        ({}, ("--tokenizer", "in/large.json"), "--tokenizer in/large.json: has ids up to 300, the model 300 rows"),
        ({}, ("in/inside",), "in/inside lies inside in, which is not touched; choose a place outside"),
        ({}, ("--to", "released"), "in is in the released format already"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    settings: dict[str, Any],
    words: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    tensors, usual = tiny()
    write(Path("in"), tensors, usual | settings)
    large = Path("in", "tokenizer.json" if "tokenizer" in settings else "large.json")
    released.write_tokenizer(large)
    tokenizer = json.loads(large.read_text())
    tokenizer["model"]["vocab"]["beyond"] = VOCABULARY
    large.write_text(json.dumps(tokenizer))
    place = [] if words and "/" in words[0] else ["out"]
    refused(("convert", "in", *place, *words), message, capsys, {"in"})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("in/pytorch_model.bin", b"", "in/pytorch_model.bin: truncated or not a file of torch.save"),
        ("in/pytorch_model.bin", b"half", "in/pytorch_model.bin: truncated or not a file of torch.save"),
        ("in/layer_00-model_01-model_states.pt", None, "layer_00-model_01-model_states.pt: the model is split over"),
        ("in/layer_02-model_00-model_states.pt", None, "in: sequential.0.word_embeddings.weight (and 10 more) is"),
        ("in/_CHECKPOINT_METADATA", b"{}", "in: this is a checkpoint of the JAX/TPU code"),
        ("in/items/manifest.ocdbt", b"", "in: this is a checkpoint of the JAX/TPU code"),
        ("in/latest", b"global_step9", "in/latest: names 'global_step9', and no layer_*-model_*-model_states.pt lie"),
        ("in/readme.txt", b"", "in is not a checkpoint: it has no config.json"),
        ("in/config.json", b'{"model_type": "llama"}', "model_type 'llama'; only a TokenFormer is converted"),
        ("out/x", b"", "out already exists"),
    ],
)
def test_a_place_that_holds_something_else_is_refused(
    name: str,
    content: bytes | None,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    Path(name).parent.mkdir(exist_ok=True)
    if content is None:
        names = ("key_param_tokens", "value_param_tokens")
        torch.save({f"attention.query.{each}": torch.zeros(2, 2) for each in names}, name)
    else:
        Path(name).write_bytes(content)
    refused(("convert", "in", "out"), message, capsys, {"in", Path(name).parts[0]})


def test_layers_that_two_files_hold_are_refused(tmp_path: Path) -> None:
    step = released.write_deepspeed(*tiny()[:1], tmp_path / "run", tiny()[1]) / "global_step1000"
    shutil.copyfile(step / "layer_03-model_00-model_states.pt", step / "layer_003-model_00-model_states.pt")
    with pytest.raises(ValueError, match=r"sequential\.3\.attention\.\S+ is in another file of the folder as well"):
        convert(tmp_path / "run", tmp_path / "out")


def test_what_is_made_to_load_without_the_package_is_whole(small: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(small.parent / "converted", tmp_path / "in")
    weights = folder / "model.safetensors"
    whole, tensors = weights.read_bytes(), load_file(weights)
    for damaged, message in (
        (whole[:-9], "truncated"),
        (save(tensors | {"model.norm.bias": torch.full((128,), torch.nan)}), "model.norm.bias holds NaN"),
        (save(tensors | {"more": torch.zeros(2)}), "more has no place"),
    ):
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            convert(folder, tmp_path / "out", to="transformers")
    assert {path.name for path in tmp_path.iterdir()} == {"in"}


def test_a_cut_file_and_a_file_of_the_old_kind_are_told_apart(tmp_path: Path) -> None:
    tensors, settings = tiny()
    folder = write(tmp_path / "in", tensors, settings)
    whole = (folder / BIN).read_bytes()
    (folder / BIN).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="truncated"):
        convert(folder, tmp_path / "out")
    torch.save(tensors, folder / BIN, _use_new_zipfile_serialization=False)
    convert(folder, tmp_path / "out", say=lambda line: None)
    for protocol in (0, 4, 5):  # torch reads protocol 2 alone
        (folder / BIN).write_bytes(pickle.dumps({"x": Code()}, protocol))
        with pytest.raises(ValueError, match="is not opened: its pickle holds code, or is not of the kind that"):
            convert(folder, tmp_path / "other")
        for none in (b"\x00" + pickle.dumps({"x": Code()}, protocol), b"\x8e" + b"\x7f" * 8):  # the control: no pickle
            (folder / BIN).write_bytes(none)
            with pytest.raises(ValueError, match="truncated or not a file"):
                convert(folder, tmp_path / "other")
    for zipped in (True, False):
        torch.save({"x": Code()}, folder / BIN, pickle_protocol=4, _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match="is not opened: its pickle holds code"):
            convert(folder, tmp_path / "other")
    for code in (Code(), {"deep": [Code()]}):
        torch.save({"x": code}, folder / BIN, _use_new_zipfile_serialization=False)
        with pytest.raises(ValueError, match=r"refers to posix\.system"):
            convert(folder, tmp_path / "other")
    assert not (tmp_path / "other").exists() and not Path("it_ran").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ffn_scale": 3.0}, "ffn_scale = 3, and the released code takes 5.65685 of 32 tokens: growth kept the scale"),
        ({"theta": "silu", "ffn_scale": 1.0}, "theta = 'silu': the released format only knows l2_norm_gelu"),
        ({"norm": "rmsnorm"}, "norm = 'rmsnorm': the released format only knows 'layernorm'"),
        ({"feed_forward": "gated"}, "feed_forward = 'gated'"),
        ({"attention_projections": "linear"}, "attention_projections = 'linear'"),
        ({"num_key_value_heads": 1}, "num_key_value_heads = 1: the released format only knows 2"),
        ({"head_dim": 16}, "head_dim = 16"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings = False"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_type = 'linear': the released format has"),
    ],
)
def test_what_the_released_format_has_no_place_for_is_refused_on_the_way_back(
    fields: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 61, "ffn_tokens": 32}
    for folder, changes in (("good", {}), ("in", fields)):
        save_checkpoint(folder, build_model(build_config("tokenformer", fields=sizes | changes)))
    refused(("convert", "in", "out"), message, capsys, {"good", "in"})
    Path(f".out.tmp-{os.getpid()}").mkdir()  # by a process of the same number, killed outright
    assert run("convert", "good", "out") == 0  # the control
    assert "the released code has no pattention_eps, and the model was made with 1e-06" in capsys.readouterr().out
    shutil.rmtree("out")
    Path("good/carried.json").write_text('{"kind": "masked"}')
    for to in ("released", "transformers"):
        refused(("convert", "good", "out", "--to", to), "the checkpoint is amid a growth", capsys, {"good", "in"})
    refused(("convert", "good", "out", "--heads", "2"), "heads: 2 has no effect", capsys, {"good", "in"})


def test_a_full_disk_leaves_nothing(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for free, message in (
        ((0,), "out: cannot be written (no space left on the disk: 1.7 MB are to be written, 0.0 MB are"),
        ((10**9, 0), "cannot be written (no space left on the disk)"),  # full before the end
        ((10**9, 10**9), "cannot be written ("),
    ):
        told = iter(free)
        monkeypatch.setattr(shutil, "disk_usage", lambda place, told=told: SimpleNamespace(free=next(told)))
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # torch fails as where the disk ends: amid the file
        try:
            with pytest.raises(ValueError, match=re.escape(message)):
                convert(small.parent / "converted", tmp_path / "out")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=0))
    for place, to in ((small, None), (small.parent / "converted", "transformers")):  # what is not there is foreseen
        with pytest.raises(ValueError, match="no space left on the disk: .* MB are to be written, 0.0 MB are free"):
            convert(place, tmp_path / "out", to=to)
    assert list(tmp_path.iterdir()) == []


# --- in full ---


def test_the_150m_shape_in_full_agrees_layer_by_layer_and_goes_back_bit_for_bit(tmp_path: Path) -> None:
    layers, width, heads = released.SHAPES["150m"]
    tensors = released.random_checkpoint(layers, width, released.VOCABULARY, (width, width, 4 * width), torch.float16)
    released.write_bin(tensors, tmp_path / "in")
    lines: list[str] = []
    convert(tmp_path / "in", tmp_path / "out", say=lines.append)
    assert lines[-1].endswith("151,881,216 parameters in float16")
    ids = torch.randint(released.VOCABULARY, (1, 8), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64)
    expected = list(released.published_layers(tensors, ids, heads))
    assert largest_difference(layers_of(model, ids), expected) < 1e-9
    save_file({"ids": ids}, tmp_path / "ids")
    python(WITHOUT_IN_FULL, tmp_path / "out", tmp_path, place=tmp_path)
    logits = load_file(tmp_path / "logits")["logits"]
    assert 1e-9 < largest_difference([logits], expected[-1:]) < 1e-5  # what float32 allows, without the package
    convert(tmp_path / "out", tmp_path / "back", say=lambda line: None)
    assert filecmp.cmp(tmp_path / "back" / BIN, tmp_path / "in" / BIN, shallow=False)
