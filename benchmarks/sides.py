"""The sides of the benchmarks: this TokenFormer, the published formulation, transformers' Llama and GPT-2.

All have the same layers, width, heads, vocabulary and tied head. The feed-forward sizes of Llama and GPT-2
are solved so that their parameters other than embeddings agree with TokenFormer's within 1 %.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rounds import Check
from torch import Tensor, nn

from tokenformer.flops import count_parameters, parameters
from tokenformer.models import TokenFormerConfig, build_config, build_model
from tokenformer.pattention import Pattention
from tokenformer.recipe import arm_recipe, load_recipe

SIDES = ("ours", "published", "llama", "gpt2")
TOLERATED = 0.01  # by which parameters other than embeddings may differ


@dataclass
class Size:
    """One model size and the batch it is trained with."""

    name: str
    config: Any
    sequences: int
    length: int
    threads: int = 0  # of a CPU; 0 is torch's own number

    def describe(self) -> str:
        c = self.config
        return (
            f"{self.name}: {c.num_hidden_layers} layers of {c.hidden_size}, {c.num_attention_heads} heads, "
            f"vocabulary {c.vocab_size}, {c.norm}, {c.attention_projections} projections, {c.feed_forward} "
            f"feed-forward, parameter tokens {c.qkv_tokens} qkv, {c.proj_tokens} proj, {c.ffn_tokens} ffn"
        )


def parse_size(text: str, sequences: int | None = None, length: int | None = None) -> Size:
    """`quickstart` (grown size, batch and threads of that recipe) or LAYERSxWIDTH, such as 12x768.

    A LAYERSxWIDTH model is the published block: heads of 64, C parameter tokens, 4C in the feed-forward.
    Below a width of 512 it reads bytes, 8 x 256 a step; from there on a vocabulary of 50304, 2 x 256 a
    step. Raises ValueError on anything else.
    """
    if text == "quickstart":
        recipe = load_recipe("quickstart")
        arms = [recipe, *(arm_recipe(recipe, arm) for arm in recipe.arms)]
        recipe = next((arm for arm in arms if arm.growth), recipe)
        fields = {"vocab_size": 256, **recipe.model.fields}
        for growth in recipe.growth:  # at once: the published form derives its scales
            fields |= {f"{axis.removesuffix('_tokens')}_tokens": size for axis, size in growth.to.items()}
        config = build_config(recipe.model.architecture, recipe.model.preset, fields)
        sequences, length = sequences or recipe.data.batch_size, length or recipe.data.sequence_length
        return Size(text, config, sequences, length, recipe.train.threads)
    layers, x, width = text.partition("x")
    if not (x and layers.isdigit() and width.isdigit() and int(layers) and int(width)):
        raise ValueError(f"--size: {text!r}; allowed: quickstart, or LAYERSxWIDTH such as 12x768")
    bytes_only = int(width) < 512
    config = TokenFormerConfig(
        vocab_size=256 if bytes_only else 50304,
        hidden_size=int(width),
        num_hidden_layers=int(layers),
        num_attention_heads=max(1, int(width) // 64),
    )
    return Size(text, config, sequences or (8 if bytes_only else 2), length or 256)


class PublishedPattention(nn.Module):
    """Pattention as its authors' code computes it, operation by operation: l2_norm_gelu, without an epsilon.

    The scores are multiplied in place by a mask of ones, one row a sequence: that code holds its activations
    as (T, B, C) and sizes the mask by the last two axes. Its product with a scale of 1 is left out. `up` is
    not part of it: it is our gate, in the same plain manner.
    """

    def __init__(self, key: nn.Parameter, value: nn.Parameter, up: nn.Parameter | None = None) -> None:
        super().__init__()
        self.key, self.value, self.up = key, value, up

    def forward(self, x: Tensor) -> Tensor:
        scores = x @ self.key.transpose(-2, -1)  # (B, T, P)
        scores *= torch.ones(x.shape[0], 1, self.key.shape[0], dtype=scores.dtype, device=x.device)
        scores = scores / torch.norm(scores, p=2, dim=-1, keepdim=True) * math.sqrt(scores.shape[-1])
        weights = F.gelu(scores)
        if self.up is not None:
            weights = weights * (x @ self.up.transpose(-2, -1))
        return weights @ self.value


def published(model: nn.Module) -> nn.Module:
    """A copy of a TokenFormer in which every Pattention is the published form on the same weights."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Pattention):
                setattr(module, name, PublishedPattention(child.key, child.value, child.up))
    return model


def peer_config(architecture: str, config: Any) -> Any:
    """Llama or GPT-2 beside a TokenFormer's configuration, its feed-forward solved for equal parameters.

    A multiple of 8 where one is within half a percent: in bfloat16 a GPU's products of odd sizes are slow.
    """
    fields = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    if architecture == "llama":
        inner = "intermediate_size"
    else:
        inner = "n_inner"
        # GPT-2's own tanh GELU, in one kernel instead of eight; no dropout, as none of the others has any.
        fields |= {"activation_function": "gelu_pytorch_tanh"}
        fields |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

    def other(size: int) -> int:
        return parameters(build_config(architecture, None, fields | {inner: size}))["other"]

    each = other(2) - other(1)  # parameters are linear in the feed-forward's size
    wanted = parameters(config)["other"]
    exact = 1 + (wanted - other(1)) / each
    rounded = [max(1, multiple * round(exact / multiple)) for multiple in (8, 4, 2, 1)]
    near = [size for size in rounded if abs(other(size) / wanted - 1) <= TOLERATED / 2] or rounded[-1:]
    return build_config(architecture, None, fields | {inner: near[0]})


def build_sides(size: Size, device: str = "cpu") -> dict[str, Any]:
    """The models by name, in float32 and train mode; ours and published hold equal weights of their own."""
    ours = build_model(size.config)
    llama, gpt2 = (build_model(peer_config(name, size.config)) for name in ("llama", "gpt2"))
    gpt2.loss_type = "ForCausalLM"  # what transformers takes for GPT-2 anyway, after a warning
    sides = (ours, published(ours), llama, gpt2)
    return {name: model.to(device) for name, model in zip(SIDES, sides, strict=True)}


def sizes_agree(sides: dict[str, Any]) -> list[Check]:
    """Whether each side's parameters other than embeddings are within 1 % of ours."""
    checks, ours = [], count_parameters(sides["ours"])["other"]
    for name, model in sides.items():
        counted = count_parameters(model)["other"]
        inner = {"llama": "intermediate_size", "gpt2": "n_inner"}.get(name)
        solved = f", {inner} {getattr(model.config, inner)}" if inner else ""
        line = f"{name}: {counted:,} parameters other than embeddings, {counted / ours:.4f} of ours{solved}"
        checks.append((line, abs(counted / ours - 1) <= TOLERATED))
    return checks


def same_function(ours: Any, plain: Any, ids: Tensor, tolerance: float, what: str) -> list[Check]:
    """Whether logits and gradients of two models agree on one batch: |a - b| / |b|, gradients to ten times
    the tolerance, each parameter by itself."""

    def run(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad(set_to_none=True)
        out = model(input_ids=ids, labels=ids, use_cache=False)
        out.loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return out.logits.detach(), gradients

    (logits, gradients), (logits_plain, gradients_plain) = run(ours), run(plain)
    if gradients.keys() != gradients_plain.keys():
        return [(f"{what}: ours and published have gradients of different parameters", False)]
    logits_apart = float((logits - logits_plain).norm() / logits_plain.norm())
    apart = torch.stack([(gradients[name] - g).norm() / g.norm() for name, g in gradients_plain.items()])
    worst = float(apart.max())
    return [
        (f"{what}: ours and published, logits {logits_apart:.1e} apart (at most {tolerance:.0e})",
         logits_apart <= tolerance),
        (f"{what}: ours and published, gradients {worst:.1e} apart (at most {10 * tolerance:.0e})",
         worst <= 10 * tolerance),
    ]  # fmt: skip


def same_function_in_float64(size: Size, device: str) -> list[Check]:
    """The same in float64, at most 2 layers, our epsilon set to 0 as it is there: equal up to rounding."""
    config = copy.deepcopy(size.config)
    config.pattention_eps, config.num_hidden_layers = 0.0, min(2, config.num_hidden_layers)
    ours = build_model(config).double().to(device)
    ids = torch.randint(config.vocab_size, (2, 33), device=device)
    return same_function(ours, published(ours), ids, 1e-12, f"float64, {config.num_hidden_layers} layers")
