"""nGPT: the paper's formulas (arXiv 2410.01131), its stored constants, and unit vectors through real training."""

import dataclasses
import math
import sys

import pytest
import torch
from tiny_runs import tiny as tiny_recipe
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache

from tokenformer import checkpoint, runs
from tokenformer.models import NGPTConfig, NGPTForCausalLM, build_config, build_model
from tokenformer.models.ngpt import normalise_matrices
from tokenformer.recipe import ModelSection
from tokenformer.train import train

SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
OPTIONS = {"whole": {}, "grouped": {"num_key_value_heads": 2}, "other head size": {"head_dim": 6}}
STORED = {
    "alpha_init": 0.07,
    "alpha_scale": 0.11,
    "qk_scale": 0.6,
    "uv_scale": 0.9,
    "uv_factor": 5.1,
    "logits_scale": 0.06,
    "attention_scale": 3.3,
}
PAPER = {
    "alpha_init": 0.05,
    "alpha_scale": 32**-0.5,
    "qk_scale": 32**-0.5,
    "uv_scale": 1.0,
    "uv_factor": 32**0.5,
    "logits_scale": 32**-0.5,
    "attention_scale": 8**0.5,
}


def tiny(**fields):
    """A model whose scales are no longer what they were at the start, so that each of them shows."""
    model = build_model(build_config("ngpt", fields=SIZES | fields), seed=0).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.mul_(1 + torch.rand(p.shape, generator=generator, dtype=p.dtype))
    return model


@pytest.fixture
def ids():
    return torch.randint(1, 61, (2, 19), generator=torch.Generator().manual_seed(0))


def paper_logits(w, ids, heads, groups, size, constants):
    """The paper's model from its formulas, queries and keys both scaled as its authors do."""
    c = constants

    def unit(x):
        return x / x.square().sum(-1, keepdim=True).sqrt()

    def rotate(x):  # pair i with i + D/2, angle position * 10000^(-2i/D)
        half = size // 2
        angle = torch.arange(x.shape[-2]).double()[:, None] * 10000.0 ** (-torch.arange(half).double() * 2 / size)
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def split(x, count):
        return x.view(batch, time, count, size).transpose(1, 2)

    h = w["model.embed_tokens.weight"][ids]
    batch, time, _ = h.shape
    for i in range(2):
        layer = {name.removeprefix(f"model.layers.{i}."): p for name, p in w.items()}
        q, k, v = (h @ layer[f"self_attn.{p}_proj.weight"].T for p in "qkv")
        q = unit(rotate(split(q, heads)))
        k, v = (split(t, groups).repeat_interleave(heads // groups, 1) for t in (k, v))
        k = unit(rotate(k))
        s_qk = (layer["self_attn.s_qk"] / c["qk_scale"]).view(heads, 1, size)
        scores = (s_qk * q) @ (s_qk * k).transpose(-1, -2) * c["attention_scale"]
        scores = scores.masked_fill(torch.ones(time, time).triu(1).bool(), float("-inf"))
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, time, heads * size)
        step = layer["attention_alpha"] * c["alpha_init"] / c["alpha_scale"]
        h = unit(h + step * (unit(mixed @ layer["self_attn.o_proj.weight"].T) - h))
        u = h @ layer["mlp.up_proj.weight"].T * layer["mlp.s_u"] / c["uv_scale"] * c["uv_factor"]
        v = h @ layer["mlp.gate_proj.weight"].T * layer["mlp.s_v"] / c["uv_scale"] * c["uv_factor"]
        step = layer["mlp_alpha"] * c["alpha_init"] / c["alpha_scale"]
        h = unit(h + step * (unit(u * v / (1 + torch.exp(-v)) @ layer["mlp.down_proj.weight"].T) - h))
    return h @ w["lm_head.weight"].T * w["s_z"] / c["logits_scale"]


@pytest.mark.parametrize("constants", [{}, STORED], ids=["the paper's", "others"])
@pytest.mark.parametrize("option", OPTIONS)
def test_logits_equal_the_papers_formulas_in_float64(option, constants, ids):
    model = tiny(**OPTIONS[option], **constants)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    groups, size = OPTIONS[option].get("num_key_value_heads", 4), OPTIONS[option].get("head_dim", 8)
    known = PAPER | {"attention_scale": size**0.5} | constants
    expected = paper_logits(weights, ids, 4, groups, size, known)
    assert (model(ids).logits - expected).abs().max() < 1e-10
    for name, value in known.items():  # the control: every constant and every parameter shows in the reference
        changed = paper_logits(weights, ids, 4, groups, size, known | {name: value * 1.1})
        assert (changed - expected).abs().max() > 1e-5, name
    for name, p in weights.items():
        moved = weights | {name: p + 0.1 * torch.randn(p.shape, dtype=p.dtype)}
        assert (paper_logits(moved, ids, 4, groups, size, known) - expected).abs().max() > 1e-5, name


@pytest.mark.parametrize("option", OPTIONS)
def test_cached_steps_padding_and_reloading_leave_the_logits(option, ids, tmp_path):
    model = tiny(**OPTIONS[option], **STORED)
    logits = model(ids).logits
    cache, steps = DynamicCache(config=model.config), []
    for t in range(ids.shape[1]):
        steps.append(model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits)
    assert (torch.cat(steps, 1) - logits).abs().max() < 1e-10

    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
    mask = (torch.arange(22) >= 3).long().expand(2, -1)
    positions = (torch.arange(22) - 3).clamp(min=0).expand(2, -1)
    again = model(padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
    assert (again - logits).abs().max() < 1e-10
    again = model(padded, position_ids=positions).logits[:, 3:]
    assert (again - logits).abs().max() > 1e-6  # the control: without the mask padding is read

    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1.5)  # reading a checkpoint must not put this back to unit length
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert {name: getattr(again.config, name) for name in STORED} == STORED


def test_greedy_generation_is_the_same_with_and_without_cache_and_padding(ids):
    model = tiny(num_key_value_heads=2)
    settings = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    cached = model.generate(ids, use_cache=True, **settings)
    assert cached.shape == (2, 39) and torch.equal(cached, model.generate(ids, use_cache=False, **settings))
    padded, mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1), (torch.arange(22) >= 3).long()
    left = model.generate(padded, attention_mask=mask.expand(2, -1), pad_token_id=0, **settings)
    assert torch.equal(left[:, 3:], cached)
    assert not torch.equal(model.generate(padded, pad_token_id=7, **settings)[:, 3:], cached)  # the control: no mask


def test_gradient_checkpointing_leaves_the_gradients(ids):
    model = tiny().train()
    gradients = torch.autograd.grad(model(ids, labels=ids, use_cache=False).loss, list(model.parameters()))
    model.activation_checkpointing_enable()
    again = torch.autograd.grad(model(ids, labels=ids, use_cache=False).loss, list(model.parameters()))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(gradients, again, strict=True))
    assert all(g.abs().max() > 0 for g in gradients)


def test_model_compiles_without_graph_breaks(ids):
    model = tiny()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert (compiled(ids, use_cache=False).logits - model(ids, use_cache=False).logits).abs().max() < 1e-10


def test_hidden_states_are_unit_vectors_in_bfloat16_too(ids):
    states = tiny()(ids, output_hidden_states=True).hidden_states
    assert len(states) == 3 and all((h.norm(dim=-1) - 1).abs().max() < 1e-6 for h in states)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model = tiny().float()
        rounded = model(ids, output_hidden_states=True)
    assert (rounded.hidden_states[-1].float().norm(dim=-1) - 1).abs().max() < 1e-2
    half = model.bfloat16()(ids).logits
    assert half.dtype == torch.bfloat16 and half.isfinite().all()


# --- what growth needs ---


def test_constants_are_the_papers_and_stay_when_sizes_change(tmp_path):
    config = NGPTConfig(**SIZES)
    assert {name: getattr(config, name) for name in PAPER} == pytest.approx(PAPER)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert {name: getattr(again, name) for name in PAPER} == {name: getattr(config, name) for name in PAPER}
    grown = NGPTConfig(**{**config.to_dict(), "hidden_size": 64, "head_dim": 16, "intermediate_size": 80})
    assert {name: getattr(grown, name) for name in PAPER} == {name: getattr(config, name) for name in PAPER}
    assert NGPTConfig(**SIZES | {"hidden_size": 64}).uv_factor == 8.0  # the control: a new configuration takes its own


def test_a_block_of_step_size_zero_is_the_identity_and_can_open(ids):
    model = tiny()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.attention_alpha.zero_()
            layer.mlp_alpha.zero_()
    hidden = model.model(ids).last_hidden_state
    start = model.model.embed_tokens.weight[ids]
    assert (hidden - start / start.norm(dim=-1, keepdim=True)).abs().max() < 1e-12
    model(ids, labels=ids).loss.backward()
    for layer in model.model.layers:
        assert (layer.attention_alpha.grad != 0).all() and (layer.mlp_alpha.grad != 0).all()
    closed = torch.zeros(3, requires_grad=True)
    closed.abs().sum().backward()
    assert (closed.grad == 0).all()  # the control: what the authors' |a| would have given


def test_a_unit_closed_by_s_u_adds_nothing_and_can_open(ids):
    model = tiny()
    mlp = model.model.layers[0].mlp
    with torch.no_grad():
        mlp.s_u[-5:] = 0
        before = model(ids).logits
        for matrix in (mlp.up_proj.weight[-5:], mlp.gate_proj.weight[-5:], mlp.down_proj.weight[:, -5:]):
            matrix.copy_(torch.randn(matrix.shape))
        assert (model(ids).logits - before).abs().max() < 1e-12
    model(ids, labels=ids).loss.backward()
    assert (mlp.s_u.grad[-5:] != 0).all()


def test_an_output_of_zero_gives_no_nan(ids):
    model = tiny()
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[1].self_attn.q_proj.weight.zero_()
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())


# --- unit vectors ---


def lengths(model):
    """By name: of the rows of what reads the hidden state, of the columns of what writes into it."""
    named = {name: p.detach() for name, p in model.named_parameters() if p.ndim == 2}
    assert len(named) == 2 + 7 * model.config.num_hidden_layers
    return {name: p.norm(dim=0 if "o_proj" in name or "down_proj" in name else 1) for name, p in named.items()}


def furthest_from_one(model):
    found = lengths(model)
    width = model.config.hidden_size
    entries = {name: p.numel() for name, p in model.named_parameters() if p.ndim == 2}
    assert all(found[name].numel() * width == count for name, count in entries.items())  # all vectors are along C
    return max((length - 1).abs().max().item() for length in found.values())


def test_a_new_model_has_unit_vectors_of_the_papers_spread():
    model = build_model(build_config("ngpt", fields=SIZES | {"hidden_size": 128, "num_key_value_heads": 1}), seed=0)
    assert furthest_from_one(model) < 1e-6
    for name, p in model.named_parameters():
        if p.ndim == 2:
            assert p.std().item() == pytest.approx(128**-0.5, rel=0.05), name
    assert model.model.layers[0].mlp_alpha.unique().item() == pytest.approx(128**-0.5)


def test_normalising_keeps_directions_and_leaves_vectors_of_unit_length_alone():
    model = tiny()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    normalise_matrices(model)
    assert all((p - before[name]).abs().max() < 1e-6 for name, p in model.named_parameters())
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    assert furthest_from_one(model) > 1
    model.after_step()
    for name, p in model.named_parameters():
        expected = before[name] * (3 if p.ndim == 1 else 1)
        assert (p - expected).abs().max() < 1e-6, name


@pytest.mark.parametrize("kept", [True, False], ids=["as it is", "the control: without after_step"])
def test_real_training_keeps_every_vector_of_unit_length(kept, tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENFORMER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys.modules["tokenformer.evaluate"], "SAMPLE_BYTES", 4)
    if not kept:
        monkeypatch.setattr(NGPTForCausalLM, "after_step", lambda self: None)
    recipe = tiny_recipe(tmp_path, growth=[], train={"weight_decay": 0.0, "warmup_steps": 0})
    fields = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    recipe = dataclasses.replace(recipe, model=ModelSection(architecture="ngpt", fields=fields))
    train(recipe, tmp_path / "run", say=None)
    losses = [line["loss"] for line in runs.read_metrics(tmp_path / "run") if line["kind"] == "eval"]
    assert losses[-1] < losses[0] < math.log(256) * 1.2
    model, _ = checkpoint.load_checkpoint(runs.checkpoints(tmp_path / "run")[-1])
    assert isinstance(model, NGPTForCausalLM)
    assert (furthest_from_one(model) < 1e-6) == kept
    if not kept:
        assert furthest_from_one(model) > 1e-3


# --- configurations ---


def test_auto_classes_know_ngpt():
    config = AutoConfig.for_model("ngpt", **SIZES)
    assert type(AutoModel.from_config(config)).__name__ == "NGPTModel"
    assert isinstance(AutoModelForCausalLM.from_config(config), NGPTForCausalLM)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alpha_init": 0.0}, "alpha_init: 0.0 is out of range; allowed: a finite number above 0"),
        ({"logits_scale": float("inf")}, "logits_scale: inf is out of range"),
        ({"norm_eps": 0.0}, "norm_eps: 0.0 is out of range"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings: true is not offered"),
        ({"head_dim": 7}, "head_dim: 7 is odd"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: 3 does not divide num_attention_heads 4"),
        ({"intermediate_size": 0}, "intermediate_size: 0 is too small"),
        ({"num_attention_heads": 0}, "num_attention_heads: 0 is too small"),
        ({"hidden_size": 0}, "hidden_size: 0 is too small"),
        ({"hidden_size": 33}, "hidden_size: 33 is not a multiple of num_attention_heads 4"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor: 0.5; nGPT turns whole heads"),
    ],
)
def test_bad_configurations_are_refused_in_one_line(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        build_config("ngpt", None, SIZES | fields)
    assert "\n" not in str(error.value)
