"""nGPT, the normalised transformer (arXiv 2410.01131), as a transformers model: everything lives on a unit sphere.

    h = N(h + a_A (N(attention(h)) - h));   h = N(h + a_M (N(mlp(h)) - h));   N(x) = x / |x|

No norm layers and no biases: rows that read h, and columns that write into it, are unit vectors along C, kept so after
every optimizer step by `normalise_matrices`. Queries and keys are unit vectors per head, after rotary positions, times
s_qk; mlp(h) = down(s_u f up(h) * silu(s_v f gate(h))) with f = sqrt(C); logits are times s_z.

Two departures from the authors' code. Their step sizes are |a|, whose gradient at exactly 0 is 0, so that a block that
starts closed would never open: here a is the signed parameter, alive at 0, and the same model wherever a > 0. Their
s_qk multiplies queries and keys: here its square multiplies the queries, which gives the same products and lets queries
that share a key have scales of their own.

As in their code s_qk comes after the rotary positions and scales the two halves of a turned pair apart, so absolute
positions count: text that is padded on its left needs `position_ids` from 0, which `generate` gives by itself.

Legend: B batch, T positions, C hidden size, H heads, D head size, F intermediate size, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from .tokenformer import TokenFormerForCausalLM, TokenFormerModel, TokenFormerRotaryEmbedding, _Rotary, turn

CONSTANTS = ("alpha_init", "alpha_scale", "qk_scale", "uv_scale", "uv_factor", "logits_scale", "attention_scale")


@strict
class NGPTConfig(PreTrainedConfig):
    """Sizes and constants of an nGPT.

    Every constant that the paper takes from the width is a number of the configuration: None takes the paper's value
    for the present sizes, once, after which it is stored and survives growth.

    alpha_init: the step sizes a_A and a_M at the start · alpha_scale, qk_scale, uv_scale, logits_scale: what the
    parameters of a, s_qk, s_u and s_v, s_z hold at the start (default 1/sqrt(C); uv_scale 1). The effective value is
    the parameter times alpha_init / alpha_scale, 1 / qk_scale and so on, so a scale sets how fast Adam moves it.
    uv_factor: f, default sqrt(C) · attention_scale: what the softmax's scores are multiplied by, default sqrt(D) ·
    norm_eps: N(x) = x / max(|x|, norm_eps), so that N(0) = 0.

    The paper trains without weight decay and without warm-up; both are the recipe's to say. The head is not tied.
    Raises ValueError on values that do not fit together.
    """

    model_type = "ngpt"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 50304
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    alpha_init: float = 0.05
    alpha_scale: float | None = None
    qk_scale: float | None = None
    uv_scale: float = 1.0
    uv_factor: float | None = None
    logits_scale: float | None = None
    attention_scale: float | None = None
    norm_eps: float = 1e-6
    rope_parameters: dict | None = None
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    use_cache: bool = True
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        heads, width = max(1, self.num_attention_heads), max(1, self.hidden_size)
        if self.head_dim is None:
            if self.hidden_size % heads:
                raise ValueError(f"hidden_size: {self.hidden_size} is not a multiple of num_attention_heads {heads}")
            self.head_dim = self.hidden_size // heads
        usual = {
            "num_key_value_heads": self.num_attention_heads,
            "intermediate_size": 4 * width,
            "alpha_scale": width**-0.5,
            "qk_scale": width**-0.5,
            "uv_factor": width**0.5,
            "logits_scale": width**-0.5,
            "attention_scale": max(1, self.head_dim) ** 0.5,
        }
        for key, value in usual.items():
            if getattr(self, key) is None:
                setattr(self, key, value)
        rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
        self.rope_parameters = rope | (self.rope_parameters or {})
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Checked by transformers when the configuration is made."""
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        for key in (*sizes, "head_dim", "intermediate_size", "max_position_embeddings"):
            if getattr(self, key) < (0 if key == "num_hidden_layers" else 1):
                raise ValueError(f"{key}: {getattr(self, key)} is too small")
        for key in (*CONSTANTS, "norm_eps"):
            if not 0 < getattr(self, key) < math.inf:
                raise ValueError(f"{key}: {getattr(self, key)} is out of range; allowed: a finite number above 0")
        assert self.head_dim is not None and self.num_key_value_heads is not None and self.rope_parameters is not None
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads: {self.num_key_value_heads} does not divide num_attention_heads "
                f"{self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim: {self.head_dim} is odd; rotary positions turn pairs")
        factor = self.rope_parameters["partial_rotary_factor"]
        if factor != 1:
            raise ValueError(f"rope_parameters.partial_rotary_factor: {factor!r}; nGPT turns whole heads, allowed: 1")
        if self.tie_word_embeddings:
            raise ValueError("tie_word_embeddings: true is not offered; nGPT's head is its own, allowed: false")


def unit(x: Tensor, eps: float, dim: int = -1) -> Tensor:
    """N(x) = x / max(|x|, eps) along `dim`, worked in float32 or wider; zero stays zero."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.normalize(wide, dim=dim, eps=eps).to(x.dtype)


class Writer(nn.Linear):
    """A linear map into the hidden state: its columns are the unit vectors along C, where a reader's rows are."""


def _unit_matrix(module: nn.Linear | nn.Embedding, eps: float) -> Tensor:
    return unit(module.weight, eps, dim=0 if isinstance(module, Writer) else 1)


@torch.no_grad()
def normalise_matrices(model: NGPTPreTrainedModel) -> None:
    """Make the embedding, the head and all projections unit vectors along C again, in place."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.copy_(_unit_matrix(module, model.config.norm_eps))


class NGPTAttention(nn.Module):
    """Causal attention of unit queries over unit keys."""

    def __init__(self, config: NGPTConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.head_dim and config.num_key_value_heads and config.qk_scale  # the configuration sets them
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.attention_scale
        self.qk_factor = 1 / config.qk_scale
        self.is_causal = True
        wide, narrow = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, wide, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, narrow, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, narrow, bias=False)
        self.o_proj = Writer(wide, config.hidden_size, bias=False)
        self.s_qk = nn.Parameter(torch.empty(wide))

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor, int],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        batch_and_time = hidden_states.shape[:-1]
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (layer(hidden_states).view(*batch_and_time, -1, self.head_dim) for layer in projections)
        rotate = turn if torch.compiler.is_compiling() else _Rotary.apply
        q, k = (unit(rotate(t, *position_embeddings), self.config.norm_eps) for t in (q, k))
        q = q * (self.s_qk * self.qk_factor).square().view(-1, self.head_dim)
        q, k, v = (t.to(v.dtype).transpose(1, 2) for t in (q, k, v))  # (B, H, T, D)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        mixed, weights = attend(self, q, k, v, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return self.o_proj(mixed.reshape(*batch_and_time, -1)), weights


class NGPTMLP(nn.Module):
    """down(s_u f up(h) * silu(s_v f gate(h))); a unit whose s_u is 0 is closed, with a gradient to open it."""

    def __init__(self, config: NGPTConfig) -> None:
        super().__init__()
        assert config.intermediate_size and config.uv_factor
        self.factor = config.uv_factor / config.uv_scale
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Writer(config.intermediate_size, config.hidden_size, bias=False)
        self.s_u = nn.Parameter(torch.empty(config.intermediate_size))
        self.s_v = nn.Parameter(torch.empty(config.intermediate_size))

    def forward(self, hidden_states: Tensor) -> Tensor:
        u = self.up_proj(hidden_states) * (self.s_u * self.factor)
        v = self.gate_proj(hidden_states) * (self.s_v * self.factor)
        return self.down_proj(u * F.silu(v))


class NGPTDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: NGPTConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.alpha_scale
        self.eps, self.alpha_factor = config.norm_eps, config.alpha_init / config.alpha_scale
        self.self_attn = NGPTAttention(config, layer_idx)
        self.mlp = NGPTMLP(config)
        self.attention_alpha = nn.Parameter(torch.empty(config.hidden_size))
        self.mlp_alpha = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        attended, _ = self.self_attn(hidden_states, **kwargs)
        hidden_states = self._towards(hidden_states, attended, self.attention_alpha)
        return self._towards(hidden_states, self.mlp(hidden_states), self.mlp_alpha)

    def _towards(self, h: Tensor, output: Tensor, alpha: Tensor) -> Tensor:
        """N(h + a (N(output) - h)), the step from h towards a block's output."""
        return unit(h + alpha * self.alpha_factor * (unit(output, self.eps) - h), self.eps)


class NGPTPreTrainedModel(PreTrainedModel):
    config: NGPTConfig
    config_class = NGPTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["NGPTDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": NGPTDecoderLayer, "attentions": NGPTAttention}

    def after_step(self) -> None:
        """Called by the training loop after each optimizer step: the matrices' vectors are of unit length again."""
        normalise_matrices(self)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        config = self.config
        starts = {"s_qk": config.qk_scale, "s_u": config.uv_scale, "s_v": config.uv_scale, "s_z": config.logits_scale}
        starts |= {"attention_alpha": config.alpha_scale, "mlp_alpha": config.alpha_scale}
        if isinstance(module, (nn.Linear, nn.Embedding)):
            init.normal_(module.weight)  # of unit length, entries have the paper's deviation 1 / sqrt(C)
            init.copy_(module.weight, _unit_matrix(module, config.norm_eps))
        else:
            super()._init_weights(module)
        for name, p in module.named_parameters(recurse=False):
            if name in starts:
                init.constant_(p, starts[name])


class NGPTModel(NGPTPreTrainedModel):
    """Embedding and blocks: (B, T) token ids to (B, T, C) of unit length."""

    forward = TokenFormerModel.forward  # embedding, cache, mask, rotary tables, layers, norm

    def __init__(self, config: NGPTConfig) -> None:
        super().__init__(config)
        # Without a padding_idx, whose row would be zero.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(NGPTDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.Identity()  # the last block has normalised
        self.rotary_emb = TokenFormerRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()


class NGPTForCausalLM(NGPTPreTrainedModel, GenerationMixin):
    """NGPTModel with a language-model head of its own, its logits times s_z (V)."""

    forward = TokenFormerForCausalLM.forward  # model, `logits`, loss

    def __init__(self, config: NGPTConfig) -> None:
        super().__init__(config)
        assert config.logits_scale
        self.logits_factor = 1 / config.logits_scale
        self.model = NGPTModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.s_z = nn.Parameter(torch.empty(config.vocab_size))
        self.post_init()

    def logits(self, hidden_states: Tensor) -> Tensor:
        return self.lm_head(hidden_states) * (self.s_z * self.logits_factor)
