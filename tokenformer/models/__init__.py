"""Every model is a transformers model; what transformers lacks is written here and registered with its Auto classes."""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from ..nearest import nearest
from .ngpt import NGPTConfig, NGPTForCausalLM, NGPTModel
from .tokenformer import MODERN, TokenFormerConfig, TokenFormerForCausalLM, TokenFormerModel

__all__ = [
    "NGPTConfig",
    "NGPTForCausalLM",
    "NGPTModel",
    "TokenFormerConfig",
    "TokenFormerForCausalLM",
    "TokenFormerModel",
    "build_config",
    "build_model",
    "fit_experts",
    "register",
]


def register() -> None:
    """Make the Auto classes know TokenFormer and nGPT; calling it again changes nothing."""
    AutoConfig.register("tokenformer", TokenFormerConfig, exist_ok=True)
    AutoModel.register(TokenFormerConfig, TokenFormerModel, exist_ok=True)
    AutoModelForCausalLM.register(TokenFormerConfig, TokenFormerForCausalLM, exist_ok=True)
    AutoConfig.register("ngpt", NGPTConfig, exist_ok=True)
    AutoModel.register(NGPTConfig, NGPTModel, exist_ok=True)
    AutoModelForCausalLM.register(NGPTConfig, NGPTForCausalLM, exist_ok=True)


register()

# Fields that say how many or how large: a whole number of these is one or more, of layers none or more.
DEPTHS = ("num_hidden_layers", "n_layer")
SIZES = re.compile(r"(num|n)_.+|(?!max_window|tie_).+_(size|dim|tokens|heads|layers|embeddings)")


def build_config(
    architecture: str, preset: str | None = None, fields: dict[str, Any] | None = None
) -> PreTrainedConfig:
    """The transformers configuration of `architecture` (a model type: tokenformer, ngpt, llama ...) with `fields` set.

    Special tokens that its default has beyond a smaller `vocab_size` are none.
    Raises ValueError on an unknown architecture, an unknown field (naming the nearest one), values that do
    not fit, or sizes that have no effect beside linear attention projections.
    """
    fields = dict(fields or {})
    if architecture not in CONFIG_MAPPING:
        near = nearest(architecture, CONFIG_MAPPING)
        raise ValueError(f"model.architecture: {architecture!r} is not a model type{near}")
    cls = CONFIG_MAPPING[architecture]
    default = cls()
    known = {name for name in dir(default) if not name.startswith("_")} | set(cls.attribute_map)
    for key, value in fields.items():
        if key not in known:
            raise ValueError(f"model.{key}: not a field of {cls.__name__}{nearest(key, known)}")
        usual = getattr(default, key)
        if isinstance(usual, (str, int, float)) and isinstance(value, str) != isinstance(usual, str):
            raise ValueError(f"model.{key}: {value!r} is of the wrong type; {cls.__name__} has {usual!r} there")
        least = 0 if key in DEPTHS else 1
        if SIZES.fullmatch(key) and type(value) is int and value < least:
            raise ValueError(f"model.{key}: {value} is too small; it must be at least {least}")
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        usual = getattr(default, key, None)
        if isinstance(usual, int) and usual >= (fields.get("vocab_size") or usual + 1):
            fields.setdefault(key, None)
    modern = MODERN if preset == "modern" else {}
    if cls is TokenFormerConfig and {**modern, **fields}.get("attention_projections") == "linear":
        for key in ("qkv_tokens", "proj_tokens", "qkv_scale", "proj_scale"):
            if fields.get(key) is not None:
                raise ValueError(f"model.{key}: {fields[key]} has no effect beside attention_projections = 'linear'")
    if preset is not None and cls is not TokenFormerConfig:
        raise ValueError(f"model.preset: {preset!r} is for tokenformer; {architecture} takes its sizes one by one")
    try:
        return TokenFormerConfig.preset(preset, **fields) if preset is not None else cls(**fields)
    except Exception as error:  # huggingface_hub's validation errors share no narrower class
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(reason if reason.startswith("model.") else f"model: {reason}") from error


def build_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A new causal language model in float32 and train mode, its weights a function of the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return fit_experts(model.train())


def fit_experts(model: PreTrainedModel) -> PreTrainedModel:
    """Let a mixture work its experts one by one where torch's grouped products cannot: they want rows of whole 16 bytes
    and no float64."""
    config, size = model.config, model.dtype.itemsize
    if getattr(config, "num_local_experts", None) is None:
        return model
    if size == 8 or config.hidden_size * size % 16 or config.intermediate_size * size % 16:
        model.set_experts_implementation("eager")
    return model

