"""Memories: exact at their start and when off, alive, on a frozen base; saved alone; merged to an ordinary model."""

import copy
import functools
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import MODELS, batch, model_of, wide
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from tokenformer import AdamW, add_parameter_tokens, cli, grow, save_checkpoint
from tokenformer.adapters import (
    Memory,
    adapt,
    load_parameter_tokens,
    lora_rank,
    memories_of,
    memory_of,
    merge_parameter_tokens,
    rank_rows,
)
from tokenformer.adapters.training import read_text, settings
from tokenformer.checkpoint import ancestry, load_checkpoint
from tokenformer.data import ByteTokenizer
from tokenformer.flops import training_flops
from tokenformer.models import build_config, build_model
from tokenformer.models.tables import TABLES
from tokenformer.optim import parameter_groups
from tokenformer.runs import read_json, write_json

DOCS = Path(__file__).resolve().parent.parent / "docs"
IDS = batch()[0].clamp(min=1)
KINDS = {
    "rows": {"kind": "rows"},
    "pattention": {"kind": "pattention"},
    "beside attention": {"kind": "pattention", "where": "attention"},
}
# All that have a feed-forward; what has none, or cannot start exactly, is refused below.
CASES = [
    (name, kind)
    for name, (architecture, _) in MODELS.items()
    for kind in KINDS
    if architecture != "mamba2" and not (kind == "rows" and name in ("ngpt", "tokenformer softmax"))
]
ROWS = [name for name, kind in CASES if kind == "rows"]
ONE_EACH = ("llama tied", "mistral", "qwen2", "qwen3", "gpt2", "mixtral", "tokenformer", "tokenformer linear")


def fresh(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return copy.deepcopy(model_of(name, dtype))


def logits(model: PreTrainedModel, grad: bool = False) -> Tensor:
    with torch.set_grad_enabled(grad):
        return model(input_ids=IDS, use_cache=False).logits.detach()


def both(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Logits without and with a graph: the two ways may sum in other orders."""
    return logits(model), logits(model, grad=True)


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(map(torch.equal, a, b))


def loss(model: PreTrainedModel) -> Tensor:
    return model(input_ids=IDS, labels=IDS, use_cache=False).loss


def trained(model: PreTrainedModel, memory: Memory, steps: int = 4) -> Memory:
    optimizer = torch.optim.AdamW(memory.parameters(), lr=1e-2)
    for _ in range(steps):
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    return memory


def state(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- exact, alive, off ---


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_memory_starts_exactly_and_alive_and_off_is_off(name: str, kind: str, tmp_path: Path) -> None:
    model = fresh(name)
    before, weights = both(model), state(model)
    memory = add_parameter_tokens(model, tokens=5, **KINDS[kind])
    assert same(both(model), before)
    loss(model).backward()
    for layer in memory.layers.values():
        assert any(p.grad is not None and p.grad.any() for p in layer.parameters())
    trained(model, memory)
    for p in memory.parameters():
        assert p.grad is None and torch.isfinite(p).all()
    after = both(model)
    assert (after[0] - before[0]).abs().max() > 1e-3  # the control: it does say something by now
    memory.on = False
    assert same(both(model), before) and not memory.on
    memory.on = True
    assert same(both(model), after)
    assert equal(state(model), weights)

    other = fresh(name)
    loaded = load_parameter_tokens(other, memory.save(tmp_path / "memory"))
    assert same(both(other), after)
    assert {k: v.tolist() for k, v in loaded.named_parameters().items()} == {
        k: v.tolist() for k, v in memory.named_parameters().items()
    }
    memory.remove()
    assert same(both(model), before) and not memories_of(model)


def test_an_architecture_that_is_added_by_its_table_takes_memories(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (DOCS / "new_architecture.md").read_text(encoding="utf-8")
    for registry in (TABLES, MODELS):
        monkeypatch.setitem(registry, "gpt_neox", None)
        del registry["gpt_neox"]  # and again when the test ends
    exec("\n".join(re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)), {})
    (line,) = re.findall(r'^    "gpt_neox": (.*),$', page, re.M)
    MODELS["gpt_neox"] = eval(line)
    model = fresh("gpt_neox")
    before = both(model)
    memory = add_parameter_tokens(model, tokens=5)
    assert same(both(model), before)
    trained(model, memory)
    assert (logits(merge_parameter_tokens(model)) - logits(model)).abs().max() < 1e-5
    assert (logits(model) - before[0]).abs().max() > 1e-3


def test_every_entry_is_alive_within_two_steps() -> None:
    for name in ROWS:
        model = fresh(name)
        memory = add_parameter_tokens(model, tokens=5)
        trained(model, memory, steps=2)
        loss(model).backward()
        for key, p in memory.named_parameters().items():
            assert p.grad is not None and (p.grad != 0).double().mean() > 0.9, (name, key)


def test_in_training_mode_dropout_draws_the_numbers_that_it_drew() -> None:
    model = fresh("gpt2").train()
    model.config.resid_pdrop = 0.3  # which rows are made by
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    torch.manual_seed(0)
    before = logits(model)
    add_parameter_tokens(model, tokens=5)
    torch.manual_seed(0)
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(model), before)  # the control: another draw differs


# --- frozen ---

OPTIMIZERS = {
    "tokenformer.AdamW": lambda model: AdamW(parameter_groups(model, 0.1), lr=1e-3),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1),
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, weight_decay=0.1),
    "Muon": lambda model: torch.optim.Muon([p for p in model.parameters() if p.ndim == 2], lr=1e-3, weight_decay=0.1),
}
FROZEN = [(name, "tokenformer.AdamW") for name in ONE_EACH]
FROZEN += [("tokenformer linear", optimizer) for optimizer in OPTIMIZERS if optimizer != "tokenformer.AdamW"]


@pytest.mark.parametrize(("name", "optimizer"), FROZEN)
def test_training_leaves_the_base_as_it_was_bit_for_bit(name: str, optimizer: str) -> None:
    """Of memories of every kind at once, even where the optimizer is given all parameters of the model to decay."""
    model = copy.deepcopy(model_of(name, torch.float32, layers=1))
    weights, before = state(model), logits(model)
    memories = [add_parameter_tokens(model, tokens=4, name=str(i), **each) for i, each in enumerate(KINDS.values())]
    parameters = {f"{each.name} {key}": p for each in memories for key, p in each.named_parameters().items()}
    start = {key: p.detach().clone() for key, p in parameters.items()}
    updates = OPTIMIZERS[optimizer](model)
    for _ in range(200 if optimizer == "tokenformer.AdamW" else 40):  # the one that adapt trains by
        model(input_ids=IDS[:1, :9], labels=IDS[:1, :9], use_cache=False).loss.backward()
        updates.step()
        updates.zero_grad()
    for key, p in parameters.items():
        assert not torch.equal(p, start[key]), key  # the control: these did train
    assert equal(state(model), weights)
    for memory in memories:
        memory.on = False
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("leak", ["decay", "momentum"])
def test_masked_gradients_would_not_keep_old_rows(leak: str) -> None:
    """The control: the grown model, its old rows' gradients set to zero, moves them by decay, or by momentum."""
    model = fresh("llama")
    width = model.config.intermediate_size
    grown = grow(model, "zero", to={"intermediate_size": width + 4}).model
    decay, momentum = (0.1, 0.0) if leak == "decay" else (0.0, 0.9)
    optimizer = torch.optim.SGD(grown.parameters(), lr=1e-2, weight_decay=decay, momentum=momentum)
    table = grown.model.layers[0].mlp.gate_proj.weight
    for step in range(2):
        loss(grown).backward()
        if step or leak == "decay":
            table.grad[:width] = 0
            old = table[:width].clone()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(table[:width], old)


# --- merged ---

# Dimension along which rows lie, by the end of a parameter's name; written by hand, not read off the tables.
ALONG = {
    "gate_proj.weight": 0, "up_proj.weight": 0, "down_proj.weight": 1, "gate_proj.bias": 0, "up_proj.bias": 0,
    "c_fc.weight": 1, "c_fc.bias": 0, "mlp.c_proj.weight": 0,
    "experts.down_proj": 2, "mlp.key": 0, "mlp.value": 0, "mlp.up": 0,
}  # fmt: skip


def joined(name: str, old: Tensor, *memories: Tensor) -> Tensor:
    if name.endswith("experts.gate_up_proj"):
        halves = [torch.cat(parts, dim=1) for parts in zip(*(t.chunk(2, dim=1) for t in (old, *memories)), strict=True)]
        return torch.cat(halves, dim=1)
    (dim,) = [dim for end, dim in ALONG.items() if name.endswith(end)]
    return torch.cat((old, *memories), dim=dim)


@pytest.mark.parametrize("name", ROWS)
def test_merged_rows_are_a_plain_model_with_a_larger_size(name: str) -> None:
    model = fresh(name, torch.float64)
    with wide():
        one = trained(model, add_parameter_tokens(model, tokens=3, name="one"))
        two = trained(model, add_parameter_tokens(model, tokens=5, name="two", seed=1))
        merged, expected = merge_parameter_tokens(model), logits(model)
        assert type(merged) is type(model) and not memories_of(merged)
        assert (logits(merged) - expected).abs().max() < 1e-10
        new = dict(merged.named_parameters())
        for key, p in one.named_parameters().items():
            old = model.get_parameter(key)
            assert torch.equal(new[key], joined(key, old, p, two.named_parameters()[key]))
        for key in new.keys() - one.named_parameters().keys():
            assert torch.equal(new[key], model.get_parameter(key)) and new[key].requires_grad
        tied = merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
        assert tied == model.config.tie_word_embeddings
        two.on = False
        alone = merge_parameter_tokens(model)
        assert (logits(alone) - logits(model)).abs().max() < 1e-10
        assert (logits(alone) - expected).abs().max() > 1e-3  # the control: the other memory counts
    if name in ("tokenformer", "tokenformer rms"):
        assert merged.config.ffn_tokens == 38 and merged.config.ffn_scale == model.config.ffn_scale


def test_a_memory_at_its_start_is_the_new_slots_of_an_exact_growth() -> None:
    for name, operator, field in (("llama", "zero", "intermediate_size"), ("gpt2", "zero", "intermediate_size")):
        model = fresh(name)
        add_parameter_tokens(model, tokens=5, seed=3)
        size = getattr(model.config, "intermediate_size", None) or 4 * model.config.hidden_size
        grown = grow(fresh(name), operator, to={field: size + 5}, seed=3).model
        assert equal(state(merge_parameter_tokens(model)), state(grown))


ALONE = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        save_file({"logits": model(**load_file(folder + "/ids.safetensors")).logits}, folder + "/logits.safetensors")
assert "tokenformer" not in sys.modules
"""


def test_a_merged_checkpoint_loads_in_transformers_alone(tmp_path: Path) -> None:
    expected, bases = {}, {}
    for name in ("llama tied", "qwen2", "qwen3", "gpt2", "mistral", "mixtral"):
        model = fresh(name)
        trained(model, add_parameter_tokens(model, tokens=4))
        folder = tmp_path / name.split()[0]
        bases[folder] = logits(fresh(name))
        merge_parameter_tokens(model).save_pretrained(folder)
        save_file({"input_ids": IDS}, folder / "ids.safetensors")
        expected[folder] = logits(model)
    command = [sys.executable, "-c", ALONE, *map(str, expected)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for folder, values in expected.items():
        found = load_file(folder / "logits.safetensors")["logits"]
        assert (found - values).abs().max() < 1e-5 * values.abs().max(), folder
        assert (found - bases[folder]).abs().max() > 1e-3  # the control: the memory counts


def test_only_rows_that_are_on_can_be_merged() -> None:
    model = fresh("qwen2")
    add_parameter_tokens(model, tokens=3, kind="pattention", name="beside")
    with pytest.raises(ValueError, match="'beside' is a pattention, .*only rows can be merged"):
        merge_parameter_tokens(model)
    memory_of(model, "beside").on = False
    with pytest.raises(ValueError, match="no memory is on, .*the model has: beside"):
        merge_parameter_tokens(model)


# --- several ---


@pytest.mark.parametrize("name", ["llama", "mixtral", "tokenformer", "tokenformer rms", "tokenformer gelu first"])
def test_memories_stack_and_are_switched_by_name(name: str) -> None:
    model = fresh(name)
    base = both(model)
    one = trained(model, add_parameter_tokens(model, tokens=3, name="one"))
    first = both(model)
    two = add_parameter_tokens(model, tokens=4, name="two", seed=1)
    three = add_parameter_tokens(model, tokens=2, name="three", kind="pattention")
    assert same(both(model), first)  # beside a trained one a new one starts exactly too
    trained(model, two)
    trained(model, three)
    assert list(memories_of(model)) == ["one", "two", "three"] and memory_of(model, "two") is two
    outputs = {}
    for on in ((), ("one",), ("two",), ("three",), ("one", "two"), ("one", "two", "three")):
        for memory in (one, two, three):
            memory.on = memory.name in on
        outputs[on] = both(model)
    assert same(outputs[()], base) and same(outputs[("one",)], first)
    values = [output[0] for output in outputs.values()]
    for i, a in enumerate(values):
        assert all((a - b).abs().max() > 1e-4 for b in values[:i])  # the control: each combination is another
    one.remove()
    with pytest.raises(ValueError, match="name: the memory 'one' was removed"):
        one.on = True
    two.on, three.on = True, False
    assert same(both(model), outputs[("two",)])


def test_a_second_memory_leaves_what_the_first_trains_as_it_was() -> None:
    model = fresh("qwen2")
    one = add_parameter_tokens(model, tokens=3, name="one")
    one.parameters()[0].requires_grad_(False)
    two = add_parameter_tokens(model, tokens=3, name="two")
    assert [p.requires_grad for p in one.parameters()] == [False] + [True] * (len(one.parameters()) - 1)
    assert all(p.requires_grad for p in two.parameters())


# --- an ordinary model all the while ---


@pytest.mark.parametrize("name", ["llama tied", "mixtral", "tokenformer"])
def test_the_model_is_saved_loaded_copied_and_generates_as_ever(name: str, tmp_path: Path) -> None:
    model = fresh(name)
    greedy: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    plain, weights, before = model.generate(IDS[:1], **greedy), state(model), logits(model)
    memory = trained(model, add_parameter_tokens(model, tokens=5), steps=12)
    assert state(model).keys() == weights.keys()
    model.save_pretrained(tmp_path / "base")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(logits(again), before)
    model.load_state_dict(weights)  # strict: a state dict of the base alone is whole
    assert not torch.equal(logits(model), before)

    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    memory_of(twin, "default").on = False
    assert torch.equal(logits(twin), before) and memory.on
    assert not torch.equal(logits(model), before)

    spoken = model.generate(IDS[:1], **greedy)  # by the cache, token by token
    ids = IDS[:1]
    for _ in range(6):
        with torch.no_grad():
            ids = torch.cat((ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(spoken, ids[:, : spoken.shape[1]])
    memory.on = False
    assert torch.equal(model.generate(IDS[:1], **greedy), plain)


@pytest.mark.parametrize("name", ["llama", "gpt2", "tokenformer"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(name: str, reentrant: bool) -> None:
    model = fresh(name).train()
    memory = add_parameter_tokens(model, tokens=5)
    loss(model).backward()
    plain = [p.grad.clone() for p in memory.parameters()]
    model.zero_grad()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:  # its graph begins at what enters a layer
        model.enable_input_require_grads()
    loss(model).backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(plain, memory.parameters(), strict=True))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "tokenformer"])
def test_in_bfloat16_the_base_stays_exact_and_the_rows_are_float32(name: str) -> None:
    model = fresh(name).to(torch.bfloat16)
    before = both(model)
    memory = add_parameter_tokens(model, tokens=5)
    assert same(both(model), before) and model.dtype == torch.bfloat16
    assert {p.dtype for p in memory.parameters()} == {torch.float32}
    trained(model, memory)
    assert not torch.equal(logits(model), before[0])
    merged = merge_parameter_tokens(model)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    memory.on = False
    assert same(both(model), before)


def test_what_is_compiled_hears_of_what_is_switched() -> None:
    model = fresh("qwen2").requires_grad_(False)
    module, x = model.model.layers[0].mlp, torch.randn(3, 48, generator=torch.Generator().manual_seed(0))
    around = torch.nn.Sequential(module)  # within which hooks are traced as well
    compiled: Any = torch.compile(around, backend="eager")  # traced, guarded and kept as by any other
    base = compiled(x)
    memory = add_parameter_tokens(model, tokens=5, kind="pattention")
    with torch.no_grad():
        memory.layers["model.layers.0.mlp"].value.normal_()
    expected = module(x)
    for on in (True, False, True):
        memory.on = on
        assert torch.equal(compiled(x), expected if on else base)
    memory.remove()
    assert torch.equal(compiled(x), base) and not torch.equal(expected, base)


def test_a_memory_trains_under_autocast() -> None:
    model = fresh("qwen2")
    memory = add_parameter_tokens(model, tokens=5)
    with torch.autocast("cpu", torch.bfloat16):
        loss(model).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in memory.parameters())


# --- which rows are used ---


def added_lengths(model: PreTrainedModel, memory: Memory, place: str) -> Tensor:
    """How long what each row adds is, from the module itself, called with all values of its memory but one row's zero:
    (positions, rows), of a mixture expert after expert."""
    module, inputs = model.get_submodule(place), list[Any]()
    with module.register_forward_hook(lambda module, given, output: inputs.extend(given)):
        logits(model)
    (values,) = [p for n, p in memory.layers[place].named_parameters() if re.search("down_proj|c_proj.weight|value", n)]
    kept, dim = values.detach().clone(), {2: values.shape.index(memory.tokens), 3: 2}[values.ndim]

    @torch.no_grad()
    def said(only: Tensor) -> Tensor:
        values.copy_(only)
        return module(*inputs).flatten(0, -2)

    silent, lengths = said(torch.zeros_like(kept)), []
    for expert in range(len(kept)) if kept.ndim == 3 else [slice(None)]:
        for row in range(memory.tokens):
            chosen = torch.zeros_like(kept)
            index = [expert, slice(None), row] if kept.ndim == 3 else [slice(None), row] if dim else [row]
            chosen[tuple(index)] = kept[tuple(index)]
            lengths.append((said(chosen) - silent).norm(dim=-1))
    said(kept)
    return torch.stack(lengths, dim=1)


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, "rows") for name in ("llama", "gpt2", "mixtral", "tokenformer", "tokenformer rms")]
    + [("qwen3", "pattention"), ("gpt2", "beside attention")],
)
def test_use_is_the_length_of_what_each_row_adds(name: str, kind: str) -> None:
    model = fresh(name)
    memory = add_parameter_tokens(model, tokens=3, **KINDS[kind])
    trained(model, memory)
    ranked = rank_rows(memory, IDS, batch_size=1)
    assert [use.strength for use in ranked] == sorted((use.strength for use in ranked), reverse=True)
    found = {(use.place, use.row): use for use in ranked}
    for place in memory.layers:
        lengths = added_lengths(model, memory, place)  # (positions, rows)
        more = (lengths > lengths.mean(1, keepdim=True)).double().mean(0)
        for row in range(lengths.shape[1]):
            use = found.pop((place, row))
            assert use.strength == pytest.approx(lengths[:, row].mean().item(), rel=1e-3, abs=1e-5)
            assert use.often == pytest.approx(more[row].item(), abs=0.03)
    assert not found
    memory.on = False
    with pytest.raises(ValueError, match="'default' is off"):
        rank_rows(memory, IDS)


# --- loaded onto the right base only ---


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = fresh("qwen2")
    memory = trained(model, add_parameter_tokens(model, tokens=4, name="notes"))
    return memory.save(tmp_path_factory.mktemp("saved") / "memory")


def other_weight() -> PreTrainedModel:
    model = fresh("qwen2")
    with torch.no_grad():
        weight = model.model.layers[1].mlp.up_proj.weight
        weight[3, 5] = torch.nextafter(weight[3, 5], weight.new_tensor(9.0))  # the least change that there is
    return model


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (functools.partial(fresh, "qwen3"), "made for another base: a qwen2, and this is a qwen3"),
        (functools.partial(fresh, "mistral"), "a qwen2, and this is a mistral"),
        (lambda: grow(fresh("qwen2"), "zero", to={"intermediate_size": 50}).model, "ffn is 44, and this model's 50"),
        (lambda: fresh("qwen2").bfloat16(), "in float32, and this one is in bfloat16; load the model in that dtype"),
        (other_weight, "its weights have SHA-256 [0-9a-f]{12}..., and this model's"),
    ],
)
def test_a_memory_is_refused_by_any_other_base(saved: Path, base: Any, message: str) -> None:
    model = base()
    before = both(model)
    with pytest.raises(ValueError, match=message) as told:
        load_parameter_tokens(model, saved)
    assert "\n" not in str(told.value) and str(saved) in str(told.value)
    assert same(both(model), before) and not memories_of(model)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(("field", "value"), [("ffn_scale", 9.0), ("theta", "silu")])
def test_the_scale_and_theta_of_a_base_are_its_own(field: str, value: Any, tmp_path: Path) -> None:
    model = fresh("tokenformer")
    memory = add_parameter_tokens(model, tokens=3, kind="pattention").save(tmp_path / "memory")
    config = copy.deepcopy(model.config)
    setattr(config, field, value)
    other = type(model)(config)
    other.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="made for another base: its weights have SHA-256"):
        load_parameter_tokens(other, memory)
    load_parameter_tokens(fresh("tokenformer"), memory)  # the control


def broken(folder: Path, case: str) -> None:
    about, tensors = read_json(folder / "memory.json"), load_file(folder / "memory.safetensors")
    key = next(iter(tensors))
    if case == "cut":
        whole = (folder / "memory.safetensors").read_bytes()
        (folder / "memory.safetensors").write_bytes(whole[:-9])
        return
    if case == "gone":
        (folder / "memory.json").unlink()
        return
    if case == "missing":
        del tensors[key]
    elif case == "extra":
        tensors["x"] = torch.zeros(1)
    elif case == "shape":
        tensors[key] = tensors[key][:1].clone()
    elif case == "nan":
        tensors[key] = tensors[key] * float("nan")
    elif case == "format":
        about["format"] = 2
    elif case == "kind":
        about["kind"] = "prompt"
    elif case == "tokens":
        about["tokens"] = -4
    elif case == "type":
        about["tokens"] = "4"
    elif case == "base":
        del about["base"]["sha256"]
    write_json(folder / "memory.json", about)
    save_file(tensors, folder / "memory.safetensors")


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("cut", "memory.safetensors: truncated or not a safetensors file"),
        ("gone", "memory.json: no such file; a memory is a folder with"),
        ("missing", "memory.safetensors: .* is missing"),
        ("extra", "x has no place in the memory that memory.json describes"),
        ("shape", "has shape .*, and memory.json asks for"),
        ("nan", "holds NaN or infinite values"),
        ("format", "format 2 is not known; allowed: 1"),
        ("kind", "memory.json: kind: 'prompt' is not known; allowed: rows, pattention"),
        ("tokens", "memory.json: tokens: -4 is no number of rows"),
        ("type", "tokens must be of type int"),
        ("base", "base: sha256 must be of type str, and is missing"),
    ],
)
def test_a_broken_memory_is_one_line_and_leaves_the_model(saved: Path, tmp_path: Path, case: str, message: str) -> None:
    folder = tmp_path / "memory"
    folder.mkdir()
    for file in saved.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    broken(folder, case)
    model = fresh("qwen2")
    before = both(model)
    with pytest.raises(ValueError, match=message) as told:
        load_parameter_tokens(model, folder)
    assert "\n" not in str(told.value)
    assert same(both(model), before) and not memories_of(model) and all(p.requires_grad for p in model.parameters())
    load_parameter_tokens(model, saved, name="again")  # the control: the whole one loads, under any name
    assert list(memories_of(model)) == ["again"]


def test_a_memory_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = add_parameter_tokens(fresh("qwen2"), tokens=3)
    (tmp_path / "taken").mkdir()
    with pytest.raises(ValueError, match="taken already exists"):
        memory.save(tmp_path / "taken")

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tokenformer.adapters.memory.save_tensors", full)
    with pytest.raises(ValueError, match="no space left on the disk"):
        memory.save(tmp_path / "memory")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


# --- refused ---


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("llama", {"tokens": 0}, "tokens: 0 is no number of rows; allowed: a whole number from 1 on"),
        ("llama", {"tokens": -3}, "tokens: -3 is no number"),
        ("llama", {"tokens": 2.5}, "tokens: 2.5 is no number"),
        ("llama", {"kind": "lora"}, "kind: 'lora' is not known; allowed: rows, pattention"),
        ("llama", {"where": "lm_head"}, "where: 'lm_head' is not known; allowed: feed_forward, attention"),
        ("llama", {"where": "attention"}, "where: 'rows' are rows of the feed-forward; beside attention stands"),
        ("llama", {"theta": "gelu"}, "theta: 'gelu' has no effect on rows"),
        ("llama", {"kind": "pattention", "theta": "relu"}, "theta: 'relu' is not known; allowed: l2_norm_gelu"),
        ("llama", {"name": "a.b"}, "name: 'a.b' cannot be one; allowed: letters, digits, _ and -"),
        ("llama", {"name": "keys"}, "name: 'keys' cannot be one"),
        ("ngpt", {}, "kind: 'rows' does not fit ngpt, whose rows are unit vectors"),
        ("mamba2", {}, "where: 'feed_forward' is not there in mamba2"),
        ("mamba2", {"kind": "pattention", "where": "attention"}, "where: 'attention' is not there in mamba2"),
        ("tokenformer softmax", {}, "cannot be added to theta=softmax exactly"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(name: str, settings: dict[str, Any], message: str) -> None:
    model = fresh(name)
    with pytest.raises(ValueError, match=message) as told:
        add_parameter_tokens(model, **{"tokens": 4, **settings})
    assert "\n" not in str(told.value) and not memories_of(model)
    assert all(p.requires_grad for p in model.parameters())


def test_rows_of_quantised_weights_are_refused() -> None:
    model = fresh("qwen2")
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(ValueError, match="kind: 'rows' extend weights that are not quantised"):
        add_parameter_tokens(model)


def test_a_base_amid_a_growth_is_refused(place: Path, capsys: Any) -> None:
    grown = grow(load_checkpoint("base")[0], "masked", {"intermediate_size": 60}, options={"ramp_steps": 5}).model
    with pytest.raises(ValueError, match="model: carries masked, which training has to finish"):
        add_parameter_tokens(grown, tokens=4)
    save_checkpoint("masked", grown, ByteTokenizer())
    assert cli.main(["adapt", "masked", "--text", "notes.txt", "--out", "memory", *SMALL]) == 2
    assert "masked/carried.json: the checkpoint is amid a growth" in capsys.readouterr().err
    assert not Path("memory").exists()


def test_names_are_taken_once_and_unknown_ones_are_told() -> None:
    model = fresh("qwen2")
    add_parameter_tokens(model, tokens=3, name="notes")
    with pytest.raises(ValueError, match="name: the model has a memory 'notes' already"):
        add_parameter_tokens(model, tokens=3, name="notes")
    with pytest.raises(ValueError, match="no memory 'note'; nearest valid name: notes; it has: notes"):
        memory_of(model, "note")
    with pytest.raises(ValueError, match="parameter_tokens.* is in no table of axes"):
        grow(model, "zero", to={"intermediate_size": 50})  # the memory would be lost
    with pytest.raises(ValueError, match="no feed-forward of a llama is found in this LlamaModel; give the model for"):
        add_parameter_tokens(fresh("llama").model)
    from transformers import BertConfig, BertLMHeadModel

    bert = BertLMHeadModel(BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(ValueError, match="model type 'bert' has no table of axes; known: tokenformer, llama"):
        add_parameter_tokens(bert)


# --- the verb and its page ---


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a base that has a tokenizer, and a text."""
    monkeypatch.setenv("TOKENFORMER_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    fields = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = build_config("llama", fields={**fields, "vocab_size": 256, "max_position_embeddings": 64})
    spent = {"flops": 10**9, "tokens": 1000, "seconds": 10.0, "streams": []}
    save_checkpoint("base", build_model(config), ByteTokenizer(), lineage=[{"operator": "zero", "ancestor": spent}])
    pages = [path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md"))]
    Path("notes.txt").write_text("\n\n".join(pages), encoding="utf-8")
    return tmp_path


SMALL = ["train.steps=6", "train.warmup_steps=0", "train.threads=1", "data.batch_size=2", "data.valid_tokens=640"]


def test_adapt_writes_a_memory_that_lowers_the_loss_and_a_merged_model(place: Path, capsys: Any) -> None:
    weights = (place / "base" / "model.safetensors").read_bytes()
    words = ["adapt", "base", "--text", "notes.txt", "--tokens", "8", "--out", "memory", "--merge", "merged"]
    for left_by_a_killed_one in (".memory.tmp-99999999", f".merged.tmp-{os.getpid()}"):
        Path(left_by_a_killed_one).mkdir()
    assert cli.main([*words, *SMALL, "train.learning_rate=0.01", "train.steps=20", "train.log_every=10"]) == 0
    told = capsys.readouterr().out
    before, after = (float(re.search(rf"{when}: ([\d.]+) bits per byte", told)[1]) for when in ("before", "after"))
    assert after < before - 0.01 and "384 parameters to train: rows, 8 tokens in each of 1 places" in told
    assert (place / "base" / "model.safetensors").read_bytes() == weights
    assert {path.name for path in place.iterdir()} == {"base", "cache", "memory", "merged", "notes.txt"}

    assert cli.main(["eval", "base", *["--memory", "memory"] * 2, "--text", "notes.txt"]) == 2
    assert "--memory memory: is named twice" in capsys.readouterr().err
    for verb in (["eval", "merged", "--text", "notes.txt"], ["generate", "merged", "--prompt", "a"]):  # another base
        assert cli.main([*verb, "--memory", "memory"]) == 2
        told = capsys.readouterr()
        assert told.out == "" and "the memory was made for another base" in told.err and told.err.count("\n") == 1
    scores = {}
    for name, more in (("base", []), ("base", ["--memory", "memory"]), ("merged", [])):
        assert cli.main(["eval", name, *more, "--text", "notes.txt", "--sequence-length", "64"]) == 0
        scores[name, bool(more)] = float(capsys.readouterr().out.split()[0])
    shutil.copytree("memory", "again")  # of the same name, as memories are that nobody named
    assert cli.main(["eval", "base", "--memory", "memory", "--memory", "again", "--text", "notes.txt"]) == 0
    assert scores["base", True] == pytest.approx(scores["merged", False], abs=2e-4)
    assert scores["base", True] < scores["base", False] - 0.01
    merged = AutoModelForCausalLM.from_pretrained("merged")
    assert type(merged).__name__ == "LlamaForCausalLM" and merged.config.intermediate_size == 40
    cost = ancestry(Path("merged"))  # that of its base, and of training
    assert cost["tokens"] == 1000 + 20 * 2 * 64 and cost["seconds"] > 10
    assert cost["flops"] == 10**9 + training_flops(merged.config, 64, 20 * 2)


def files_of(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_a_saved_memory_is_merged_as_adapt_itself_does_and_onto_its_base_alone(place: Path, capsys: Any) -> None:
    """As after a process that was stopped between the memory and the merged model."""
    train = ["adapt", "base", "--text", "notes.txt", *SMALL]
    assert cli.main([*train, "--tokens", "8", "--out", "m", "--merge", "a"]) == 0
    assert cli.main(["adapt", "base", "--memory", "m", "--merge", "b"]) == 0
    assert files_of("a") == files_of("b") and ancestry(Path("b"))["tokens"] == 1000 + 6 * 2 * 64
    assert cli.main([*train, "--tokens", "2", "--kind", "pattention", "--out", "beside"]) == 0
    about = read_json("m/memory.json")
    shutil.copytree("m", "unknown")
    write_json("unknown/memory.json", {key: value for key, value in about.items() if key != "cost"})
    shutil.copytree("m", "wrong")
    write_json("wrong/memory.json", about | {"cost": {"flops": 1}})
    capsys.readouterr()
    for words, message in (
        (["a", "--memory", "m", "--merge", "c"], "m/memory.json: the memory was made for another base"),
        (["base", "--memory", "beside", "--merge", "c"], "--memory beside: a memory of kind 'pattention' cannot be"),
        (["base", "--memory", "nowhere", "--merge", "c"], "nowhere/memory.json: no such file; a memory is a folder"),
        (["base", "--memory", "wrong", "--merge", "c"], "wrong/memory.json: cost: tokens must be of type int"),
        (["base", "--memory", "m", "--merge", "m/c"], "m/c lies inside m, which is not touched"),
        (["base", "--memory", "m", "--merge", "base/c"], "base/c lies inside base, which is not touched"),
        (["base", "--memory", "m", "--merge", "a"], "a already exists; choose another place"),
        (["base", "--memory", "m", "--merge", "c", "--tokens", "8"], "--tokens: has no effect with --memory"),
        (["base", "--memory", "m", "--merge", "c", "train.steps=5"], "train.steps=5: has no effect with --memory"),
        (["base", "--out", "c"], "--text: is not given; name a text file or folder to train on"),
        (["base", "--text", "notes.txt"], "--out: is not given; name the folder to make for the memory"),
    ):
        assert cli.main(["adapt", *words]) == 2
        told = capsys.readouterr()
        assert message in told.err and told.err.count("\n") == 1 and told.out == ""
    assert {path.name for path in place.iterdir()} == {"a", "b", "base", "beside", "cache", "m", "notes.txt"} | {
        "unknown", "wrong",
    }  # fmt: skip
    assert cli.main(["adapt", "base", "--memory", "unknown", "--merge", "c"]) == 0  # the control
    assert "unknown does not say what its training cost" in capsys.readouterr().out
    assert ancestry(Path("c"))["tokens"] == 1000


def test_the_examples_of_the_help_work(place: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        cli.main(["adapt", "--help"])
    examples = re.findall(r"^ +tokenformer (adapt runs/first .*)$", capsys.readouterr().out, re.M)
    assert len(examples) == 2
    shutil.copyfile(DOCS.parent / "README.md", "README.md")
    Path("runs").mkdir()
    shutil.move("base", "runs/first")
    for example in examples:
        assert cli.main([*shlex.split(example), *(SMALL if "--text" in example else [])]) == 0
    assert cli.main([*shlex.split(examples[1])]) == 2  # the control: it is there by now


def test_of_a_text_of_one_document_paragraphs_are_held_out_and_a_line_says_so(place: Path, capsys: Any) -> None:
    Path("short.txt").write_text("\n\n".join(f"{i} times {i} is {i * i}. " * 4 for i in range(40)))
    words = ["adapt", "base", "--tokens", "4", *SMALL]
    assert cli.main([*words, "--text", "short.txt", "--out", "one"]) == 0
    told = "text: too few documents to hold enough of them out, so each paragraph is one (data.document_separator)\n"
    said = capsys.readouterr().out
    assert said.count(told) == 1
    separated = [*words, "--text", "short.txt", "--out", "two", 'data.document_separator="\\n\\n"']
    assert cli.main(separated) == 0  # as if it had been asked for
    losses = re.findall(r"loss [\d.]+", said)
    assert losses == re.findall(r"loss [\d.]+", capsys.readouterr().out) and len(losses) == 3
    assert cli.main([*words, "--text", "notes.txt", "--out", "long"]) == 0  # the control
    assert "paragraph" not in capsys.readouterr().out
    Path("line.txt").write_text("a line and no paragraph\n" * 100)
    for text in (["line.txt"], ["short.txt", "data.valid_fraction=1e-9"]):
        assert cli.main([*words, "--out", "none", "--text", *text]) == 2
        assert "none of its 1 documents falls to the" in capsys.readouterr().err
    assert not Path("none").exists()
    # Two documents, of which the short one is held out: 2 % go by a hash of the text.
    tail = next(str(i) for i in range(1000) if hashlib.blake2b(str(i).encode(), digest_size=16).digest()[0] < 5)
    lines = "\n\n".join(f"{i:04} times {i:04} is {i * i:08}." for i in range(137))
    assert len(lines) > 4096 > len(lines) - 30  # the first blank line after so many characters cuts
    Path("tail.txt").write_text(f"{lines}\n\n{tail}")
    assert cli.main([*words, "--text", "tail.txt", "--out", "tail"]) == 0
    assert told in capsys.readouterr().out


def test_adapt_trains_as_a_plain_loop_does(place: Path) -> None:
    rate = ["train.learning_rate=0.01", "train.schedule=constant", "train.epsilon=0.1"]  # a gradient's size counts
    overrides = [*SMALL, *rate, "train.weight_decay=0.1", "data.batch_size=4", "train.accumulation_steps=2"]
    adapt("base", "memory", "notes.txt", overrides, say=None, tokens=4)
    recipe = settings(Path("base"), "notes.txt", overrides)
    model, _ = load_checkpoint("base")
    _, batches, _ = read_text(recipe, model)
    memory = add_parameter_tokens(model, tokens=4)
    train = recipe.train
    optimizer = torch.optim.AdamW(memory.parameters(), 0.01, (train.beta1, train.beta2), eps=0.1, weight_decay=0.1)
    start = {name: p.detach().clone() for name, p in memory.named_parameters().items()}
    for step in range(6):
        optimizer.zero_grad()
        model(input_ids=batches[step], labels=batches[step]).loss.backward()
        torch.nn.utils.clip_grad_norm_(memory.parameters(), train.clip_norm)
        optimizer.step()
    for name, tensor in load_file("memory/memory.safetensors").items():
        change = memory.named_parameters()[name] - start[name]
        assert change.abs().max() > 1e-4
        assert (tensor - start[name] - change).abs().max() < 1e-3 * change.abs().max()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--text", "nowhere"], "--text nowhere: no such file or folder"),
        (["--kind", "lora"], "kind: 'lora' is not known; allowed: rows, pattention"),
        (["--where", "head"], "where: 'head' is not known; allowed: feed_forward, attention"),
        (["--tokens", "0"], "tokens: 0 is no number of rows"),
        (["--seed", "-1"], "--seed -1: allowed is a whole number"),
        (["--out", "base"], "base already exists"),
        (["--out", "base/memory"], "base/memory lies inside base, which is not touched"),
        (["--merge", "memory"], "--merge memory: is the place of --out, or lies inside it; choose another"),
        (["--merge", "memory/merged"], "--merge memory/merged: is the place of --out, or lies inside it"),
        (["--memory", "memory"], "--memory memory: is merged and not trained on; name the model by --merge"),
        (["--memory", "m", "--merge", "o"], "--text: has no effect with --memory, which is merged and not trained on"),
        (["--kind", "pattention", "--merge", "merged"], "a memory of kind 'pattention' cannot be merged; rows can"),
        (["train.flops=1e9"], "train.flops: has no effect on adapt; allowed: data.sequence_length"),
        (["train.steps=0"], "train.steps"),
        (["data.sequence_length=65"], "is more than the model's max_position_embeddings = 64"),
        (["data.repeat=false", "train.steps=9999"], "9,999 steps ask for"),
        (["train.learning_rate=1e38", "train.clip_norm=0"], "1e+38: the loss is no longer finite at step"),
    ],
)
def test_a_mistake_at_adapt_is_one_line_and_leaves_nothing(place: Path, capsys: Any, words: Any, message: str) -> None:
    known = ["adapt", "base", "--text", "notes.txt", "--out", "memory", *SMALL]
    assert cli.main([*known, *words]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1
    assert {path.name for path in place.iterdir()} <= {"base", "cache", "notes.txt"}


def test_a_memory_trains_in_the_trainer_of_transformers(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model = fresh("qwen2")
    weights = state(model)
    memory = add_parameter_tokens(model, tokens=4)
    before = [p.detach().clone() for p in memory.parameters()]
    settings = TrainingArguments(tmp_path / "run", max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True)
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    trainer = Trainer(model, settings, train_dataset=rows)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert not any(map(torch.equal, before, memory.parameters())) and equal(state(model), weights)
    assert not [name for name in load_file(tmp_path / "saved" / "model.safetensors") if "parameter_tokens" in name]


def test_a_full_disk_is_told_before_the_training(place: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["adapt", "base", "--text", "notes.txt", "--tokens", "8", "--out", "memory", *SMALL]
    need = {"memory": 8 * 16 * 3 * 4, "merged": (2 * 256 * 16 + 4 * 16 * 16 + 3 * 16 * 40 + 3 * 16) * 4}  # bytes
    for name, more in (("memory", []), ("merged", ["--merge", "merged"])):
        free = shutil.disk_usage(place)._replace(free=need[name] - 1)
        with monkeypatch.context() as patch:
            patch.setattr("shutil.disk_usage", lambda path, free=free: free)
            assert cli.main([*words, *more]) == 2
        told = capsys.readouterr()
        assert f"{name}: cannot be written (no space left on the disk" in told.err
        assert "step" not in told.out
    assert {path.name for path in place.iterdir()} == {"base", "cache", "notes.txt"}
    with monkeypatch.context() as patch:  # the control
        free = shutil.disk_usage(place)._replace(free=need["memory"])
        patch.setattr("shutil.disk_usage", lambda path: free)
        assert cli.main(words) == 0


def test_an_adapt_that_is_stopped_leaves_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tokenformer.adapters.training.train_memory", stopped)
    assert cli.main(["adapt", "base", "--text", "notes.txt", "--out", "memory", "--merge", "merged", *SMALL]) == 130
    assert {path.name for path in place.iterdir()} == {"base", "cache", "notes.txt"}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning", "ignore::FutureWarning")
def test_the_page_on_added_memory_is_true(place: Path, capsys: Any) -> None:
    pytest.importorskip("peft")
    page = (DOCS / "adapt.md").read_text(encoding="utf-8")
    commands = re.findall(r"^    (tokenformer .*)$", page, re.M)
    assert len(commands) == 6
    for command in commands:
        words = shlex.split(command)[1:]
        training = words[0] == "adapt" and "--text" in words
        assert cli.main([*words, *(SMALL if training else [])]) == 0, capsys.readouterr().err
    assert cli.main(shlex.split(commands[0])[1:]) == 2  # the control: OUT is there by now
    capsys.readouterr()
    exec("\n".join(re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)), {})
    told = capsys.readouterr().out
    assert "['default', 'other']\nmodel.layers.0.mlp " in told


# --- beside LoRA ---


@pytest.mark.parametrize(
    ("name", "modules", "parameters"),
    [
        ("tokenformer", [], ["mlp.key", "mlp.value", "q_proj.key", "q_proj.value", "v_proj.value"]),
        ("tokenformer linear", ["q_proj", "v_proj", "o_proj"], ["mlp.key", "mlp.value"]),
        ("llama", ["gate_proj", "up_proj", "down_proj"], []),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning", "ignore::FutureWarning")
def test_lora_trains_as_many_parameters_at_the_rank_that_is_told(name, modules, parameters) -> None:
    peft = pytest.importorskip("peft")
    model = fresh(name)
    before = logits(model)
    memory = add_parameter_tokens(model, tokens=30)
    asked = sum(p.numel() for p in memory.parameters())
    memory.remove()
    rank, count = lora_rank(model, [*modules, *parameters], asked)
    config = peft.LoraConfig(r=rank, target_modules=modules, target_parameters=parameters)
    adapted = peft.get_peft_model(model, config)
    of_lora = [p for p in adapted.parameters() if p.requires_grad]
    assert sum(p.numel() for p in of_lora) == count and abs(count - asked) <= count / rank
    assert torch.equal(logits(adapted), before)
    optimizer = torch.optim.AdamW(of_lora, lr=1e-2)
    start = loss(adapted).item()
    for _ in range(5):
        loss(adapted).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss(adapted).item() < start
    after = logits(adapted)
    merged = adapted.merge_and_unload()
    assert (logits(merged) - after).abs().max() < 1e-5 and (after - before).abs().max() > 1e-3


def test_lora_rank_tells_of_a_target_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="targets: 'query' is the end of no matrix's name"):
        lora_rank(fresh("llama"), ["q_proj", "query"], 1000)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(verbosity)
