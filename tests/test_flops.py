"""The closed formulas of flops.py against torch's own counter and against real models."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tokenformer.flops import ARCHITECTURES, count_parameters, forward_flops, parameters, training_flops
from tokenformer.models import TokenFormerConfig, build_config, build_model
from tokenformer.models.tables import TABLES

ODD = {"vocab_size": 53, "hidden_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4}
TOKENS = {"qkv_tokens": 7, "proj_tokens": 31, "ffn_tokens": 65}
GATED = {"feed_forward": "gated"}
INNER = {"intermediate_size": 61}
STATE_SPACE = {"vocab_size": 53, "hidden_size": 40, "num_hidden_layers": 3, "pad_token_id": 0}
STATE_SPACE |= {"num_heads": 10, "head_dim": 8, "n_groups": 2, "state_size": 6, "conv_kernel": 3}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "tokenformer": ("tokenformer", ODD | TOKENS),
    "tokenformer-default-tokens": ("tokenformer", ODD),
    "tokenformer-one-token": ("tokenformer", ODD | {"qkv_tokens": 1, "proj_tokens": 1, "ffn_tokens": 1}),
    "tokenformer-no-layers": ("tokenformer", ODD | {"num_hidden_layers": 0}),
    "tokenformer-grouped": ("tokenformer", ODD | TOKENS | {"num_key_value_heads": 2, "head_dim": 16}),
    "tokenformer-gated": ("tokenformer", ODD | TOKENS | GATED),
    "tokenformer-linear": (
        "tokenformer",
        ODD | {"ffn_tokens": 65, "attention_projections": "linear", "num_key_value_heads": 1, "head_dim": 8},
    ),
    "tokenformer-modern": (
        "tokenformer",
        ODD
        | {"ffn_tokens": 65}
        | GATED
        | {"attention_projections": "linear", "norm": "rmsnorm", "tie_word_embeddings": False},
    ),
    "tokenformer-gelu-first": ("tokenformer", ODD | TOKENS | {"theta": "gelu_l2_norm"}),
    "tokenformer-softmax": ("tokenformer", ODD | TOKENS | {"theta": "softmax"}),
    "tokenformer-relu2": ("tokenformer", ODD | TOKENS | {"theta": "relu2"}),
    "tokenformer-silu-gated": ("tokenformer", ODD | TOKENS | GATED | {"theta": "silu"}),
    "llama": ("llama", ODD | INNER | {"tie_word_embeddings": True}),
    "llama-grouped-biased": (
        "llama",
        ODD | INNER | {"num_key_value_heads": 2, "head_dim": 10, "attention_bias": True, "mlp_bias": True},
    ),
    "mistral": ("mistral", ODD | INNER | {"num_key_value_heads": 2}),
    "mixtral": ("mixtral", ODD | INNER | {"num_local_experts": 5, "num_experts_per_tok": 3, "num_key_value_heads": 2}),
    "mixtral-one-expert": (
        "mixtral",
        ODD | INNER | {"num_local_experts": 1, "num_experts_per_tok": 1, "num_key_value_heads": 4},
    ),
    "ngpt": ("ngpt", ODD | INNER),
    "ngpt-grouped": ("ngpt", ODD | INNER | {"num_key_value_heads": 2, "head_dim": 16}),
    "gpt2": ("gpt2", ODD | {"n_positions": 40, "n_inner": 67}),
    "gpt2-default-untied": ("gpt2", ODD | {"n_positions": 40, "tie_word_embeddings": False}),
    "qwen2": ("qwen2", ODD | INNER | {"num_key_value_heads": 2}),
    "qwen3": ("qwen3", ODD | INNER | {"num_key_value_heads": 2, "head_dim": 10}),
    "qwen3-biased": ("qwen3", ODD | INNER | {"num_key_value_heads": 2, "attention_bias": True}),
    "mamba2": ("mamba2", STATE_SPACE | {"chunk_size": 8}),
    "mamba2-one-chunk": ("mamba2", STATE_SPACE | {"chunk_size": 64, "use_bias": True, "use_conv_bias": False}),
}
each_model = pytest.mark.parametrize("name", CASES)


def _counter() -> FlopCounterMode:
    """torch's counter, told of addmm_ (how the fast Pattention adds up its gradients), which it overlooks, and that the
    gradients of a convolution by groups cost what it costs itself, each: it counts that of the taps as without groups.
    """

    def addmm_in_place(total: Any, a: Any, b: Any, **_: Any) -> int:
        return 2 * int(a[0]) * int(a[1]) * int(b[1])

    def convolution_backward(gradient: Any, entries: Any, taps: Any, *more: Any, **__: Any) -> int:
        needed = more[-1]  # of entries, of taps, of the bias
        return 2 * sum(needed[:2]) * math.prod(gradient) * math.prod(taps[1:])

    own = {torch.ops.aten.addmm_: addmm_in_place, torch.ops.aten.convolution_backward: convolution_backward}
    return FlopCounterMode(display=False, custom_mapping=own)


def _make(name: str) -> Any:
    architecture, fields = CASES[name]
    config = build_config(architecture, None, fields)
    config._attn_implementation = "eager"  # torch's counter is blind to the fused attention of a CPU
    config._experts_implementation = "eager"  # and to grouped matrix products
    return config, build_model(config).eval()


@each_model
@pytest.mark.parametrize("sequences, length", [(1, 13), (3, 37)])
def test_flops_equal_torchs_own_count(name: str, sequences: int, length: int) -> None:
    config, model = _make(name)
    ids = torch.randint(config.vocab_size, (sequences, length))
    with _counter() as counter, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    assert counter.get_total_flops() == sequences * forward_flops(config, length)

    with _counter() as counter:
        model(input_ids=ids, use_cache=False).logits.square().sum().backward()
    assert counter.get_total_flops() == training_flops(config, length, sequences)


@each_model
def test_parameter_formula_equals_the_built_model(name: str) -> None:
    config, model = _make(name)
    found = count_parameters(model)
    assert parameters(config) == found
    assert found["total"] == sum(p.numel() for p in model.parameters()) == found["embedding"] + found["other"]
    untied = 1 if config.tie_word_embeddings else 2
    positions = config.n_positions if config.model_type == "gpt2" else 0
    assert found["embedding"] == (untied * config.vocab_size + positions) * config.hidden_size


SIZES = ["qkv_tokens", "proj_tokens", "ffn_tokens", "vocab_size", "num_hidden_layers"]


@pytest.mark.parametrize("change", SIZES)
def test_one_more_of_anything_is_seen(change: str) -> None:
    """The control: an overlooked size would agree with the counter only where it did not vary."""
    config = build_config("tokenformer", None, ODD | TOKENS)
    larger = build_config("tokenformer", None, ODD | TOKENS | {change: getattr(config, change) + 1})
    assert forward_flops(larger, 13) > forward_flops(config, 13)
    assert parameters(larger)["total"] > parameters(config)["total"]


@pytest.mark.parametrize(
    "preset, total, inside_blocks",
    [
        ("150m", 151_881_216, 113_246_208),
        ("450m", 454_166_528, 402_653_184),
        ("900m", 903_252_480, 838_860_800),
        ("1.5b", 1_587_219_456, 1_509_949_440),
    ],
)
def test_presets_have_the_published_sizes(preset: str, total: int, inside_blocks: int) -> None:
    config = TokenFormerConfig.preset(preset)
    counted = parameters(config)
    assert counted["total"] == total
    assert counted["other"] == inside_blocks + 2 * config.hidden_size


def test_training_costs_three_times_forward() -> None:
    config = build_config("llama", None, CASES["llama"][1])
    assert training_flops(config, 11, 5) == 3 * 5 * forward_flops(config, 11)


@pytest.mark.parametrize("change", ["state_size", "chunk_size", "conv_kernel", "num_heads"])
def test_one_more_of_anything_is_seen_in_a_state_space_model(change: str) -> None:
    fields = STATE_SPACE | {"n_groups": 1, "hidden_size": 44, "num_heads": 11, "chunk_size": 8}
    larger = fields | {change: fields[change] + 1} | ({"hidden_size": 48} if change == "num_heads" else {})
    small, large = (build_config("mamba2", None, each) for each in (fields, larger))
    assert forward_flops(large, 24) != forward_flops(small, 24)


def test_what_can_grow_has_a_formula() -> None:
    assert set(TABLES) <= set(ARCHITECTURES)


def test_unknown_architecture_and_length_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="model.architecture: no FLOPs formula for 'mamba'; .*tokenformer"):
        forward_flops(build_config("mamba"), 8)
    with pytest.raises(ValueError, match="sequence_length: 0"):
        forward_flops(build_config("tokenformer", None, ODD), 0)


FREEZABLE = [name for name in CASES if name not in ("tokenformer-no-layers", "mixtral-one-expert")]


@pytest.mark.parametrize("trained", [(1,), (0,), (1, 2), ()])
@pytest.mark.parametrize("name", FREEZABLE)
def test_frozen_layers_cost_what_torch_counts(name: str, trained: tuple[int, ...]) -> None:
    config, model = _make(name)
    layers = [trained.count(i) > 0 for i in range(3)]
    for key, p in model.named_parameters():
        p.requires_grad_(any(f".{i}." in key for i in trained))
    ids = torch.randint(config.vocab_size, (2, 13))
    with _counter() as counter:
        loss = model(input_ids=ids, use_cache=False).logits.square().sum()
        if trained:
            loss.backward()
    assert counter.get_total_flops() == training_flops(config, 13, 2, layers)
    assert training_flops(config, 13, 2, layers) < training_flops(config, 13, 2)  # the control: as if all were trained
