"""What each dimension of each parameter is: one table per architecture, read by the growth engine.

A row is a parameter's name, with * for the layer's number, and the axes of its dimensions. An axis that can grow
carries the name of the configuration field that holds its size.
"""

from __future__ import annotations

import re

from transformers import PreTrainedConfig

Axes = tuple[str, ...]


def tokenformer_axes(config: PreTrainedConfig) -> dict[str, Axes]:
    """TokenFormer in all its options; `queries` and `keys` are heads times head size."""
    layer = "model.layers.*"
    table: dict[str, Axes] = {
        "model.embed_tokens.weight": ("vocab_size", "hidden_size"),
        "lm_head.weight": ("vocab_size", "hidden_size"),
        "model.norm.weight": ("hidden_size",),
        "model.norm.bias": ("hidden_size",),
        f"{layer}.input_layernorm.weight": ("hidden_size",),
        f"{layer}.post_attention_layernorm.weight": ("hidden_size",),
    }
    places = (
        ("self_attn.q_proj", "qkv_tokens", "hidden_size", "queries"),
        ("self_attn.k_proj", "qkv_tokens", "hidden_size", "keys"),
        ("self_attn.v_proj", "qkv_tokens", "hidden_size", "keys"),
        ("self_attn.o_proj", "proj_tokens", "queries", "hidden_size"),
        ("mlp", "ffn_tokens", "hidden_size", "hidden_size"),
    )
    for place, tokens, reads, writes in places:
        table[f"{layer}.{place}.key"] = (tokens, reads)
        table[f"{layer}.{place}.up"] = (tokens, reads)
        table[f"{layer}.{place}.value"] = (tokens, writes)
        table[f"{layer}.{place}.weight"] = (writes, reads)
    return table


TABLES = {"tokenformer": tokenformer_axes}


def parameter_axes(config: PreTrainedConfig, name: str) -> Axes:
    """The axes of the parameter called `name`; ValueError if the architecture or the parameter is in no table."""
    if config.model_type not in TABLES:
        raise ValueError(f"model type {config.model_type!r} has no table of axes; known: {', '.join(TABLES)}")
    table = TABLES[config.model_type](config)
    pattern = re.sub(r"\.layers\.\d+\.", ".layers.*.", name)
    if pattern not in table:
        raise ValueError(f"parameter {name!r} is in no table of axes of {config.model_type}; it would not be grown")
    return table[pattern]
