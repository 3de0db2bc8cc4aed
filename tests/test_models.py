"""TokenFormer in transformers' form: the published block, sizes, cache, masks, saving, and errors."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache

import tokenformer  # noqa: F401  registers the Auto classes
from tokenformer.models import build_config, build_model
from tokenformer.models.tokenformer import (
    TokenFormerConfig,
    TokenFormerForCausalLM,
    _Rotary,
    rotary_factors,
    turn,
)
from tokenformer.pattention import THETAS

SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = {"qkv_tokens": 13, "proj_tokens": 7, "ffn_tokens": 33}
FULL_ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
OPTIONS = {
    "published": {},
    "modern": {"norm": "rmsnorm", "rope_parameters": FULL_ROTARY, "initialization": "unit"},
    "grouped": {"num_key_value_heads": 2, "head_dim": 16},
    "gated": {"feed_forward": "gated"},
    "linear": {"attention_projections": "linear", "qkv_tokens": None, "proj_tokens": None},
    "without positions": {"rope_parameters": FULL_ROTARY | {"partial_rotary_factor": 0}},
    "gelu first": {"theta": "gelu_l2_norm"},
    "softmax": {"theta": "softmax"},
    "relu2": {"theta": "relu2", "proj_scale": 0.7},
    "silu": {"theta": "silu"},
    "untied": {"tie_word_embeddings": False},
}
RELEASED = {"150m": 151_881_216, "450m": 454_166_528, "900m": 903_252_480, "1.5b": 1_587_219_456}


def tiny(**fields):
    return build_model(build_config("tokenformer", fields=SIZES | TOKENS | fields), seed=0).double().eval()


@pytest.fixture
def ids():
    return torch.randint(1, 61, (2, 19), generator=torch.Generator().manual_seed(0))


def published_logits(weights, ids, heads, layers):
    """The published model from its formulas, one position at a time where that is clearer."""

    def layer_norm(x, weight=1.0, bias=0.0):
        centred = x - x.mean(-1, keepdim=True)
        return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-5) * weight + bias

    def pattention(x, key, value):
        s = x @ key.T
        return F.gelu(s * math.sqrt(len(key)) / s.norm(dim=-1, keepdim=True)) @ value

    def rotate(x, dims):  # NeoX: pair i with i + dims/2, angle position * 10000^(-2i/dims)
        half = dims // 2
        angle = torch.arange(x.shape[-2]).double()[:, None] * 10000.0 ** (-torch.arange(half).double() * 2 / dims)
        a, b, rest = x[..., :half], x[..., half:dims], x[..., dims:]
        turned = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
        return torch.cat([*turned, rest], -1)

    x = weights["model.embed_tokens.weight"][ids]
    batch, time, width = x.shape
    size = width // heads
    for i in range(layers):

        def table(place, which, i=i):
            return weights[f"model.layers.{i}.{place}.{which}"]

        h = layer_norm(x)
        places = [f"self_attn.{p}_proj" for p in "qkv"]
        q, k, v = (pattention(h, table(place, "key"), table(place, "value")) for place in places)
        q, k, v = (t.view(batch, time, heads, size).transpose(1, 2) for t in (q, k, v))
        q, k = rotate(q, size // 4), rotate(k, size // 4)
        scores = q @ k.transpose(-1, -2) / math.sqrt(size)
        scores = scores.masked_fill(torch.ones(time, time).triu(1).bool(), float("-inf"))
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, time, width)
        x = x + pattention(mixed, table("self_attn.o_proj", "key"), table("self_attn.o_proj", "value"))
        x = x + pattention(layer_norm(x), table("mlp", "key"), table("mlp", "value"))
    x = layer_norm(x, weights["model.norm.weight"], weights["model.norm.bias"])
    return x @ weights["model.embed_tokens.weight"].T


def test_logits_equal_the_published_formulas_in_float64(ids):
    model = tiny(hidden_size=64, pattention_eps=0.0)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    expected = published_logits(weights, ids, heads=4, layers=2)
    assert (model(ids).logits - expected).abs().max() < 1e-10
    other = tiny(hidden_size=64, pattention_eps=0.0, rope_parameters=FULL_ROTARY)
    assert (other(ids).logits - expected).abs().max() > 1e-6  # the control: another rotary share is another model


@pytest.mark.parametrize("name", RELEASED)
def test_presets_have_the_released_parameter_counts(name):
    with torch.device("meta"):
        model = TokenFormerForCausalLM(TokenFormerConfig.preset(name))
    assert sum(p.numel() for p in model.parameters()) == RELEASED[name]


def test_published_initialisation_has_the_published_spread():
    model = build_model(build_config("tokenformer", fields=SIZES | {"ffn_tokens": 4000}), seed=0)
    table = model.model.layers[0].mlp
    assert table.key.std().item() == pytest.approx(0.02, rel=0.02)
    assert table.value.std().item() == pytest.approx(2 / (2 * math.sqrt(32)), rel=0.02)


def test_residual_initialisation_starts_what_enters_the_stream_as_wide_as_the_embedding():
    fields = SIZES | {"hidden_size": 256, "qkv_tokens": 300, "initializer_range": 0.07, "initialization": "residual"}
    block = build_model(build_config("tokenformer", fields=fields), seed=0).model.layers[0]
    x = F.layer_norm(torch.randn(512, 256), (256,))
    spread = {"q": block.self_attn.q_proj(x).std().item(), "ffn": block.mlp(x).std().item()}
    assert spread == {"q": pytest.approx(1.0, rel=0.1), "ffn": pytest.approx(0.07, rel=0.1)}
    assert block.self_attn.o_proj(x).std().item() == pytest.approx(0.07, rel=0.1)


def test_the_modern_preset_is_its_choices_spelled_out():
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    choices = {"theta": "gelu", "attention_projections": "linear", "norm": "rmsnorm", "initialization": "residual"}
    choices |= {"feed_forward": "pattention", "initializer_range": 0.05, "rope_parameters": FULL_ROTARY}
    preset = build_config("tokenformer", "modern", sizes | {"ffn_tokens": 33})
    assert preset.to_dict() == build_config("tokenformer", None, sizes | {"ffn_tokens": 33} | choices).to_dict()
    assert preset.to_dict() != build_config("tokenformer", None, sizes | {"ffn_tokens": 33}).to_dict()  # the control
    changed = build_config("tokenformer", "modern", sizes | {"theta": "silu", "rope_parameters": {"rope_theta": 500.0}})
    assert (changed.theta, changed.ffn_tokens, changed.norm) == ("silu", 256, "rmsnorm")
    assert changed.rope_parameters == FULL_ROTARY | {"rope_theta": 500.0}


@pytest.mark.parametrize("theta", THETAS)
def test_unit_initialisation_gives_outputs_of_unit_variance(theta):
    fields = SIZES | {"hidden_size": 256, "qkv_tokens": 300, "initialization": "unit", "theta": theta}
    model = build_model(build_config("tokenformer", fields=fields), seed=0)
    x = F.layer_norm(torch.randn(512, 256), (256,))
    assert model.model.layers[0].self_attn.q_proj(x).std().item() == pytest.approx(1.0, rel=0.1)
    assert model.model.layers[0].mlp(x).std().item() == pytest.approx(0.5, rel=0.1)  # 1 / sqrt(2 L), L = 2


@pytest.mark.parametrize("option", OPTIONS)
def test_cached_steps_padding_and_reloading_leave_the_logits(option, ids, tmp_path):
    model = tiny(**OPTIONS[option])
    logits = model(ids).logits
    cache, steps = DynamicCache(config=model.config), []
    for t in range(ids.shape[1]):
        steps.append(model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits)
    assert (torch.cat(steps, 1) - logits).abs().max() < 1e-10
    assert (model(ids[:, -1:]).logits - logits[:, -1:]).abs().max() > 1e-6  # the control: the cache is what is read

    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
    mask = (torch.arange(22) >= 3).long().expand(2, -1)
    assert (model(padded, attention_mask=mask).logits[:, 3:] - logits).abs().max() < 1e-10
    assert (model(padded).logits[:, 3:] - logits).abs().max() > 1e-6  # the control: without the mask padding is read

    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    assert (again(ids).logits - logits).abs().max() < 1e-12
    assert (tmp_path / "model.safetensors").exists() and again.config.ffn_scale == model.config.ffn_scale


@pytest.mark.parametrize("option", ["published", "grouped", "gated"])
def test_greedy_generation_is_the_same_with_and_without_cache(option, ids):
    model = tiny(**OPTIONS[option])
    settings = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    cached = model.generate(ids, use_cache=True, **settings)
    assert cached.shape == (2, 39) and torch.equal(cached, model.generate(ids, use_cache=False, **settings))


@pytest.mark.parametrize("rotary", [4, 8])
def test_rotary_gradients_are_those_of_the_turn(rotary):
    generator = torch.Generator().manual_seed(0)
    angles = torch.randn(1, 5, rotary // 2, generator=generator, dtype=torch.float64)
    angles = torch.cat([angles, angles], -1)
    factors = rotary_factors(angles.cos(), angles.sin(), heads=3, head_dim=8)
    x = torch.randn(2, 5, 3, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: _Rotary.apply(x, *factors), x)
    lengths = turn(x, *factors).square().sum() - x.square().sum()
    assert lengths.abs() < 1e-10  # positions turn, they do not stretch


def test_gradient_checkpointing_leaves_the_gradients(ids):
    model = tiny().train()
    gradients = torch.autograd.grad(model(ids, labels=ids, use_cache=False).loss, list(model.parameters()))
    model.activation_checkpointing_enable()
    calls = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    again = torch.autograd.grad(model(ids, labels=ids, use_cache=False).loss, list(model.parameters()))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(gradients, again, strict=True))
    assert len(calls) == 2  # it was computed again: without that, the gradients would be the same in any case


def test_model_compiles_without_graph_breaks(ids):
    model = tiny()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert (compiled(ids, use_cache=False).logits - model(ids, use_cache=False).logits).abs().max() < 1e-10


def test_labels_give_the_next_token_cross_entropy(ids):
    output = tiny()(ids, labels=ids)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_half_precision_copy_keeps_the_stored_scale(tmp_path):
    model = tiny(ffn_scale=7.123456789)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert again.model.layers[0].mlp.scale == 7.123456789
    assert again.config.ffn_scale != math.sqrt(33)


def test_auto_classes_know_tokenformer():
    config = AutoConfig.for_model("tokenformer", **SIZES)
    assert type(AutoModel.from_config(config)).__name__ == "TokenFormerModel"
    assert isinstance(AutoModelForCausalLM.from_config(config), TokenFormerForCausalLM)


def test_a_model_is_a_function_of_its_seed_and_leaves_the_random_state_alone():
    config = build_config("tokenformer", fields=SIZES)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    a, b, c = build_model(config, 0), build_model(config, 0), build_model(config, 1)
    assert torch.equal(torch.rand(2), expected)
    weights = [m.model.layers[0].mlp.key for m in (a, b, c)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("architecture", "preset", "fields", "message"),
    [
        ("tokenformr", None, {}, "'tokenformr' is not a model type; nearest valid name: tokenformer"),
        ("tokenformer", None, {"hiden_size": 3}, "model.hiden_size: .*nearest valid name: hidden_size"),
        ("tokenformer", None, {"norm": "x"}, "^model: norm: 'x' is not known; allowed: layernorm, rmsnorm$"),
        ("tokenformer", None, {"hidden_size": "a"}, "model.hidden_size: 'a' is of the wrong type"),
        ("tokenformer", None, {"num_key_value_heads": 5}, "num_key_value_heads: 5 does not divide"),
        ("tokenformer", None, {"theta": "relu"}, "theta: 'relu' is not known"),
        ("tokenformer", None, {"ffn_tokens": -4}, "ffn_tokens: -4 is too small"),
        ("tokenformer", None, {"ffn_tokens": 0}, "ffn_tokens: 0 is too small"),
        ("tokenformer", None, {"qkv_tokens": 0}, "qkv_tokens: 0 is too small"),
        ("tokenformer", None, {"num_key_value_heads": 0}, "num_key_value_heads: 0 is too small"),
        ("tokenformer", None, {"num_attention_heads": 0}, "num_attention_heads: 0 is too small"),
        ("tokenformer", None, {"head_dim": 0}, "head_dim: 0 is too small"),
        ("qwen2", None, {"max_window_layers": 0, "num_hidden_layers": -2}, "model.num_hidden_layers: -2 is too small"),
        ("gpt2", None, {"n_embd": 0}, "model.n_embd: 0 is too small; it must be at least 1"),
        ("gpt2", None, {"n_layer": -1}, "model.n_layer: -1 is too small; it must be at least 0"),
        ("llama", None, {"num_attention_heads": 0}, "model.num_attention_heads: 0 is too small"),
        ("llama", None, {"intermediate_size": 0}, "model.intermediate_size: 0 is too small"),
        (
            "tokenformer",
            None,
            {"hidden_size": 33, "num_attention_heads": 4},
            "hidden_size: 33 is not a multiple of num_attention_heads 4",
        ),
        ("tokenformer", None, {"pattention_eps": -1.0}, "pattention_eps: -1.0 is out of range"),
        ("tokenformer", None, {"norm_eps": -1.0}, "norm_eps: -1.0 is out of range"),
        ("tokenformer", None, {"norm_eps": float("nan")}, "norm_eps: nan is out of range"),
        ("tokenformer", None, {"initializer_range": -1.0}, "initializer_range: -1.0 is out of range"),
        ("tokenformer", None, {"attention_dropout": 1.5}, "attention_dropout: 1.5 is out of range"),
        ("tokenformer", None, {"ffn_scale": -3.0}, "ffn_scale: -3.0 is not a scale; allowed: a finite number above 0"),
        ("tokenformer", None, {"qkv_scale": 0.0}, "qkv_scale: 0.0 is not a scale"),
        (
            "tokenformer",
            None,
            {"theta": "relu", "qkv_scale": 2.0, "proj_scale": 2.0, "ffn_scale": 2.0},
            "theta: 'relu' is not known; allowed: l2_norm_gelu, gelu_l2_norm, softmax, gelu, silu, relu2",
        ),
        ("tokenformer", None, {"rope_parameters": {"partial_rotary_factor": 2.0}}, "partial_rotary_factor: 2.0 is no"),
        ("tokenformer", None, {"rope_parameters": {"partial_rotary_factor": "a"}}, "partial_rotary_factor: 'a' is no"),
        (
            "tokenformer",
            None,
            {"attention_projections": "linear", "qkv_tokens": 12},
            "^model.qkv_tokens: 12 has no effect beside attention_projections = 'linear'$",
        ),
        ("tokenformer", None, {"attention_projections": "linear", "proj_scale": 2.0}, "model.proj_scale: 2.0 has no"),
        ("tokenformer", "2b", {}, "model.preset: '2b' is not known; allowed: 150m"),
        ("tokenformer", "modern", {"qkv_tokens": 12}, "^model.qkv_tokens: 12 has no effect beside attention_proj"),
        ("tokenformer", "modern", {"hidden_size": 0}, "hidden_size: 0 is too small"),
        ("llama", "150m", {}, "model.preset: '150m' is for tokenformer"),
        ("llama", None, {"hidden_size": 30, "num_attention_heads": 4}, "^model: The hidden size .30. is not a mul"),
    ],
)
def test_bad_configurations_are_refused_in_one_line(architecture, preset, fields, message):
    with pytest.raises(ValueError, match=message) as error:
        build_config(architecture, preset, fields)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_size": 33, "num_attention_heads": 4, "head_dim": 8},
        {"pattention_eps": 0.0, "norm_eps": 0.0, "initializer_range": 0.0, "attention_dropout": 0.0},
        {"ffn_tokens": 1, "qkv_tokens": 1, "num_key_value_heads": 1, "ffn_scale": 0.5},
        {"attention_projections": "linear", "ffn_tokens": 12},
        {"rope_parameters": {"partial_rotary_factor": 1}},
    ],
)
def test_the_edges_of_what_is_allowed_are_allowed(fields, tmp_path):
    """The control of the refusals; and what was accepted once is read back, sizes without effect included."""
    config = build_config("tokenformer", fields=SIZES | fields)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert all(getattr(config, key) == getattr(again, key) for key in config.to_dict() if key.endswith(ENDINGS))


ENDINGS = ("_tokens", "_scale", "_heads", "_dim", "_eps", "_projections", "_size")


def test_special_tokens_beyond_the_vocabulary_are_none() -> None:
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2}
    small, whole = build_config("gpt2", fields={**sizes, "vocab_size": 256}), build_config("gpt2", fields=sizes)
    assert (small.bos_token_id, small.eos_token_id) == (None, None)
    assert (whole.bos_token_id, whole.eos_token_id) == (50256, 50256)  # the control
    asked = build_config("gpt2", fields={**sizes, "vocab_size": 256, "eos_token_id": 0})
    assert asked.eos_token_id == 0
