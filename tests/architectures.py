"""Tiny awkward models of every architecture and option that growth is tested on, and what it is measured with.

Six query heads on two key-value heads, a vocabulary of 61, sizes that nothing divides, tied and untied heads, biases;
weights moved away from their initial values, so that no gain is one and no bias zero.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tokenformer.growth import OPERATORS
from tokenformer.models import build_config, build_model
from tokenformer.models.axes import size_of, table_of

ATTENTION = {"num_attention_heads": 6, "num_key_value_heads": 2}
DECODER = ATTENTION | {"hidden_size": 48, "intermediate_size": 44}
TOKENS = {"qkv_tokens": 12, "proj_tokens": 7, "ffn_tokens": 30}
TOKENFORMER = ATTENTION | TOKENS | {"hidden_size": 48}
LINEAR = {"ffn_tokens": 30, "norm": "rmsnorm", "attention_projections": "linear", "hidden_size": 48}
# Llama wants a width that its heads divide, for six, eight, nine and twelve of them.
LLAMA = DECODER | {"hidden_size": 72, "attention_bias": True, "mlp_bias": True}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
MAMBA = {"hidden_size": 32, "num_heads": 8, "head_dim": 8, "n_groups": 2, "state_size": 6, "chunk_size": 8}

MODELS: dict[str, tuple[str, dict]] = {
    "llama": ("llama", LLAMA),
    "llama tied": ("llama", LLAMA | {"tie_word_embeddings": True, "attention_bias": False, "vocab_size": 1003}),
    "mistral": ("mistral", DECODER | {"sliding_window": 7}),
    "qwen2": ("qwen2", DECODER),
    "qwen3": ("qwen3", DECODER | {"head_dim": 10}),
    "gpt2": ("gpt2", NO_DROPOUT | {"hidden_size": 48, "num_attention_heads": 6, "n_positions": 40}),
    "mixtral": ("mixtral", DECODER | {"num_local_experts": 4}),
    "mamba2": ("mamba2", MAMBA),
    "mamba2 tied": ("mamba2", MAMBA | {"n_groups": 1, "use_conv_bias": False, "tie_word_embeddings": True}),
    "ngpt": ("ngpt", DECODER),
    "tokenformer": ("tokenformer", TOKENFORMER),
    "tokenformer rms": (
        "tokenformer",
        TOKENFORMER | {"norm": "rmsnorm", "feed_forward": "gated", "initialization": "unit"},
    ),
    "tokenformer linear": ("tokenformer", ATTENTION | LINEAR),
    "tokenformer gelu first": ("tokenformer", TOKENFORMER | {"theta": "gelu_l2_norm", "tie_word_embeddings": False}),
    "tokenformer softmax": ("tokenformer", TOKENFORMER | {"theta": "softmax"}),
    "tokenformer silu": ("tokenformer", TOKENFORMER | {"theta": "silu", "ffn_scale": 1.3, "initialization": "unit"}),
}

# Larger sizes: a whole multiple and none, for a field of each architecture's configuration; else twice and one more.
SIZES = {
    "hidden_size": lambda old: (2 * old, old * 3 // 2),
    "intermediate_size": lambda old: (2 * old, old + 17),
    "num_attention_heads": lambda old: (2 * old, 8),
    "num_key_value_heads": lambda old: (2 * old, 3),
    "num_heads": lambda old: (2 * old, old * 3 // 2),
    "head_dim": lambda old: (2 * old, old * 3 // 2),
    "num_local_experts": lambda old: (4, 6) if old == 1 else (2 * old, old * 3 // 2),
}
SAME = {"n_embd": "hidden_size", "n_inner": "intermediate_size"}


@cache
def model_of(name: str, dtype: torch.dtype = torch.float64, layers: int = 2) -> PreTrainedModel:
    """The tiny model, made once a process; nobody may alter it (growth does not)."""
    architecture, fields = MODELS[name]
    common = {"vocab_size": 61, "num_hidden_layers": layers, "pad_token_id": 0}
    config = build_config(architecture, fields=common | fields)
    if architecture == "mixtral":
        config._experts_implementation = "eager"  # the grouped product has no float64
    model = build_model(config, seed=0).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1 and architecture != "ngpt":
                p.mul_(3)
            std = p.std().item() if p.numel() > 1 else 0.0
            p.add_(torch.randn(p.shape, generator=generator) * 0.1 * (std or 1.0))
    if hasattr(model, "after_step"):
        model.after_step()
    return model.to(dtype).eval()


def sizes_of(name: str, field: str) -> tuple[int, int]:
    """A larger size of the field that is a whole multiple, and one that is none."""
    old = size_of(model_of(name).config, field)
    return SIZES.get(SAME.get(field, field), lambda old: (2 * old, old + 1))(old)


def fields_of(name: str) -> list[str]:
    return [*table_of(model_of(name).config).grows, "num_hidden_layers"]


def untrained(operator: str) -> dict[str, int]:
    """Options by which an operator that needs training does without; tests/test_ligo.py and test_carried.py train."""
    return {key: value for key, value in (("steps", 0), ("ramp_steps", 1)) if key in OPERATORS[operator].options}


def layer_norm(name: str) -> bool:
    """Whether the model's residual stream is read through a LayerNorm, by its modules, not by the tables."""
    model = model_of(name)
    return model.config.to_dict().get("norm") == "layernorm" or any(
        isinstance(module, torch.nn.LayerNorm) for module in model.modules()
    )


@contextlib.contextmanager
def wide() -> Iterator[None]:
    """float64 where transformers' models say float32: norms, rotary positions, the router's softmax."""
    kept = (torch.float32, torch.float, torch.Tensor.float)
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double
    try:
        yield
    finally:
        torch.float32, torch.float, torch.Tensor.float = kept


def batch() -> tuple[Tensor, Tensor]:
    """Tokens (2, 17) and their attention mask; the second text is padded on its left."""
    ids = torch.randint(1, 61, (2, 17), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[1, :5] = mask[1, :5] = 0
    return ids, mask


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> Tensor:
    """Logits on the batch at every position that is no padding."""
    ids, mask = batch()
    training = model.training
    model.eval()
    with wide():
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    model.train(training)
    return logits[mask.bool()]


def gradients_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """Gradients of the loss on the batch, by the parameter's name; the model's own are left empty."""
    ids, mask = batch()
    with wide():
        loss = model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


def train(model: PreTrainedModel, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        gradients = gradients_of(model)
        for name, p in model.named_parameters():
            p.grad = gradients.get(name)
        optimizer.step()
        if hasattr(model, "after_step"):
            model.after_step()
