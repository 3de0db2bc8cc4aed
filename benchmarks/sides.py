"""The sides of the benchmarks: this TokenFormer, the published formulation, and transformers' Llama and GPT-2.

All have the same layers, width, heads, vocabulary and tied head. The feed-forward sizes of Llama and GPT-2 are solved
so that their parameters other than embeddings agree with TokenFormer's within 1 %.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenformer.flops import count_parameters, parameters
from tokenformer.models import TokenFormerConfig, build_config, build_model
from tokenformer.pattention import Pattention, default_scale
from tokenformer.plan import phase_configs
from tokenformer.recipe import arm_recipe, load_recipe

SIDES = ("ours", "published", "llama", "gpt2")


@dataclass
class Size:
    """One model size and the batch it is measured with."""

    name: str
    config: TokenFormerConfig
    sequences: int
    length: int

    def describe(self) -> str:
        c = self.config
        return (
            f"{self.name}: {c.num_hidden_layers} layers, width {c.hidden_size}, {c.num_attention_heads} heads, {c.norm}, "
            f"{c.attention_projections} projections, {c.feed_forward} feed-forward, parameter tokens qkv {c.qkv_tokens} "
            f"proj {c.proj_tokens} ffn {c.ffn_tokens}, vocabulary {c.vocab_size}, batch {self.sequences} x {self.length}"
        )


def parse_size(
    text: str, sequences: int | None = None, length: int | None = None, vocabulary: int | None = None
) -> Size:
    """`quickstart` (the grown size and the batch of recipes/quickstart.toml) or LAYERSxWIDTH, such as 12x768.

    A LAYERSxWIDTH model has heads of 64 and the published numbers of parameter tokens; below a width of 512 it reads
    bytes in 8 sequences of 256, from there on a vocabulary of 50304 in 2 of 256. Raises ValueError on anything else.
    """
    if text == "quickstart":
        recipe = load_recipe("quickstart")
        grown = [recipe, *(arm_recipe(recipe, arm) for arm in recipe.arms)]
        recipe = next((one for one in grown if one.growth), recipe)
        config = phase_configs(recipe, vocabulary or 256)[-1][0]
        for kind in (
            "qkv",
            "proj",
            "ffn",
        ):  # growth keeps the first scale; the published form knows only its own
            setattr(config, f"{kind}_scale", default_scale(config.theta, getattr(config, f"{kind}_tokens")))
        return Size(text, config, sequences or recipe.data.batch_size, length or recipe.data.sequence_length)
    layers, x, width = text.partition("x")
    if not (x and layers.isdigit() and width.isdigit() and int(layers) and int(width)):
        raise ValueError(f"--size: {text!r}; allowed: quickstart, or LAYERSxWIDTH such as 12x768")
    small = int(width) < 512
    config = TokenFormerConfig(
        vocab_size=vocabulary or (256 if small else 50304),
        hidden_size=int(width),
        num_hidden_layers=int(layers),
        num_attention_heads=max(1, int(width) // 64),
        eos_token_id=None,
    )
    return Size(text, config, sequences or (8 if small else 2), length or 256)


class PublishedPattention(nn.Module):
    """Pattention as its authors' code computes it, operation by operation (default theta, no epsilon; `up`: our gate).

    The scores are multiplied in place by a mask of ones, one row per sequence: that code holds its activations as
    (T, B, C) and sizes the mask by the last two axes. Its multiplication by a scale of 1 is left out here.
    """

    def __init__(self, key: nn.Parameter, value: nn.Parameter, up: nn.Parameter | None = None) -> None:
        super().__init__()
        self.key, self.value, self.up = key, value, up

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[0], 1, self.key.shape[0], dtype=x.dtype, device=x.device)
        scores = x @ self.key.transpose(-2, -1)
        scores *= mask.to(scores.dtype)
        scores = scores / torch.norm(scores, p=2, dim=-1, keepdim=True) * math.sqrt(scores.shape[-1])
        weights = F.gelu(scores)
        if self.up is not None:
            weights = weights * (x @ self.up.transpose(-2, -1))
        return weights @ self.value


def published(model: nn.Module) -> nn.Module:
    """A copy of a TokenFormer in which every Pattention is the published formulation on the same weights."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Pattention):
                setattr(module, name, PublishedPattention(child.key, child.value, child.up))
    return model


def peer_config(architecture: str, config: TokenFormerConfig) -> Any:
    """Llama or GPT-2 of the same layers, width, heads and vocabulary, its feed-forward solved for equal parameters."""
    shared = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if architecture == "llama":
        inner, more = "intermediate_size", {"max_position_embeddings": config.max_position_embeddings}
    else:
        # The same tanh GELU as GPT-2's default, in one kernel instead of eight; no dropout, as the others have none.
        inner, more = "n_inner", {"n_positions": config.max_position_embeddings}
        more |= {
            "activation_function": "gelu_pytorch_tanh",
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        }

    def other(size: int) -> int:
        return parameters(build_config(architecture, None, shared | more | {inner: size}))["other"]

    each = other(2) - other(1)  # parameters are linear in the feed-forward size
    solved = max(1, round((parameters(config)["other"] - other(1)) / each) + 1)
    return build_config(architecture, None, shared | more | {inner: solved})


def build_sides(size: Size, device: str = "cpu", names: tuple[str, ...] = SIDES) -> dict[str, Any]:
    """The models by name, in float32 and train mode; ours and published hold equal weights of their own."""
    ours = build_model(size.config)
    made = {"ours": ours, "published": published(ours)}
    for architecture in ("llama", "gpt2"):
        if architecture in names:
            made[architecture] = build_model(peer_config(architecture, size.config))
            made[
                architecture
            ].loss_type = "ForCausalLM"  # what transformers takes for GPT-2 anyway, after a warning
    return {name: made[name].to(device) for name in names}


def sizes_agree(sides: dict[str, Any]) -> list[tuple[str, bool]]:
    """Lines on parameters, and whether each side's other than embeddings are within 1 % of ours."""
    lines, ours = [], count_parameters(sides["ours"])["other"]  # type: ignore[arg-type]
    for name, model in sides.items():
        counted = count_parameters(model)  # type: ignore[arg-type]
        config: Any = model.config
        inner = {"llama": "intermediate_size", "gpt2": "n_inner"}.get(name)
        solved = f", {inner} {getattr(config, inner)}" if inner else ""
        text = f"{name}: {counted['other']:,} parameters other than embeddings ({counted['other'] / ours:.4f} of ours)"
        lines.append((text + solved, abs(counted["other"] / ours - 1) <= 0.01))
    return lines


def same_function(
    ours: nn.Module, plain: nn.Module, ids: Tensor, tolerance: float, what: str
) -> list[tuple[str, bool]]:
    """Lines on logits and gradients of two models on one batch, and whether |a - b| / |b| is small."""

    def run(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad(set_to_none=True)
        out = model(input_ids=ids, labels=ids, use_cache=False)
        out.loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return out.logits.detach(), gradients

    (logits, gradients), (logits_plain, gradients_plain) = run(ours), run(plain)
    logits_off = float((logits - logits_plain).norm() / logits_plain.norm())
    if gradients.keys() != gradients_plain.keys():
        return [(f"{what}: gradients of different parameters", False)]
    apart = [(gradients[name] - g).norm() / g.norm() for name, g in gradients_plain.items()]
    worst = float(torch.stack(apart).max())
    return [
        (
            f"{what}: logits of ours and published differ by {logits_off:.1e} (at most {tolerance:.0e})",
            logits_off <= tolerance,
        ),
        (
            f"{what}: gradients, worst parameter, by {worst:.1e} (at most {10 * tolerance:.0e})",
            worst <= 10 * tolerance,
        ),
    ]


def same_function_in_float64(size: Size, device: str) -> list[tuple[str, bool]]:
    """The two formulations without our epsilon, in float64 and with few layers: equal up to rounding."""
    config = copy.deepcopy(size.config)
    config.pattention_eps, config.num_hidden_layers = 0.0, min(2, config.num_hidden_layers)
    ours = build_model(config).double().to(device)
    ids = torch.randint(config.vocab_size, (2, 33), device=device)
    return same_function(ours, published(ours), ids, 1e-12, f"float64, {config.num_hidden_layers} layers")
