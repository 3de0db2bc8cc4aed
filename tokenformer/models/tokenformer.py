"""TokenFormer as a transformers model (arXiv 2410.23168): every projection is a Pattention over parameter tokens.

    x = x + proj(attention(q(norm x), k(norm x), v(norm x)));   x = x + feed_forward(norm x)

Five independent Pattentions a block. As published: LayerNorm without parameters inside the blocks and with weight and
bias at the end, rotary positions on the first quarter of each head (NeoX form), tied head, one Pattention as the whole
feed-forward. The configuration also offers what Llama does: RMSNorm, any rotary share, grouped queries, a gated
feed-forward, linear attention projections.

Legend: B batch, T positions, C hidden size, H heads, D head size, P parameter tokens.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, slice_logits_to_keep
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding
from transformers.models.llama.modeling_llama import eager_attention_forward
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ..pattention import THETAS, Pattention, default_scale, side_by_side

# Released sizes: (layers, hidden size, heads); qkv and proj tokens = hidden size, ffn tokens = four times that.
PRESETS = {"150m": (12, 768, 12), "450m": (24, 1024, 16), "900m": (32, 1280, 16), "1.5b": (40, 1536, 16)}

# The preset "modern": choices, no sizes. Its parameter tokens are the feed-forward's; attention projects linearly, and
# rotary positions turn whole heads. Embedding and linear projections start at 0.4 / sqrt(hidden_size). From the trials
# in LOG.md.
MODERN = {"theta": "relu2", "attention_projections": "linear", "norm": "rmsnorm", "initialization": "residual"}

# E[theta(s)²] for scores s ~ N(0, 1) of many rows under the scale of a new layer.
SECOND_MOMENTS = {"l2_norm_gelu": 0.4252, "gelu_l2_norm": 1.0, "softmax": math.e}
SECOND_MOMENTS |= {"gelu": 0.4252, "silu": 0.3558, "relu2": 1.5}


@strict
class TokenFormerConfig(PreTrainedConfig):
    """Sizes and choices of a TokenFormer.

    qkv_tokens, proj_tokens, ffn_tokens: parameter tokens of each query/key/value, output and feed-forward Pattention
    (default C, C, 4C). qkv_scale, proj_scale, ffn_scale: their stored scales; None takes the published scale of that
    many tokens, once, after which the number is part of the configuration and survives growth. Linear attention
    projections hold no tokens: qkv and proj then have no effect, and `build_config` refuses them.
    initialization: "published", keys N(0, initializer_range²) and values N(0, (2 / (L sqrt(C)))²) for L layers;
    "unit", keys of unit length and values such that each Pattention's output starts with unit variance, divided by 2L
    where it enters the residual stream; or "residual", the same but for what enters the residual stream, which starts
    with the spread of the embedding there, initializer_range.
    norm: "layernorm" or "rmsnorm" · feed_forward: "pattention" or "gated" · attention_projections: "pattention" or
    "linear" · rope_parameters: as in transformers; partial_rotary_factor is the rotary share of a head.
    Raises ValueError on values that do not fit together.
    """

    model_type = "tokenformer"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 50304
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    qkv_tokens: int | None = None
    proj_tokens: int | None = None
    ffn_tokens: int | None = None
    qkv_scale: float | None = None
    proj_scale: float | None = None
    ffn_scale: float | None = None
    theta: str = "l2_norm_gelu"
    pattention_eps: float = 1e-6
    norm: str = "layernorm"
    norm_eps: float = 1e-5
    feed_forward: str = "pattention"
    attention_projections: str = "pattention"
    rope_parameters: dict | None = None
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    initialization: str = "published"
    attention_dropout: float = 0.0
    tie_word_embeddings: bool = True
    use_cache: bool = True
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            heads = max(1, self.num_attention_heads)
            if self.hidden_size % heads:
                raise ValueError(f"hidden_size: {self.hidden_size} is not a multiple of num_attention_heads {heads}")
            self.head_dim = self.hidden_size // heads
        for kind, usual in (("qkv", self.hidden_size), ("proj", self.hidden_size), ("ffn", 4 * self.hidden_size)):
            tokens, scale = f"{kind}_tokens", f"{kind}_scale"
            if getattr(self, tokens) is None:
                setattr(self, tokens, usual)
            if getattr(self, scale) is None:
                setattr(self, scale, default_scale(self.theta, max(1, getattr(self, tokens))))
        rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
        self.rope_parameters = rope | (self.rope_parameters or {})
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Checked by transformers when the configuration is made."""
        choices = {
            "theta": THETAS,
            "norm": ("layernorm", "rmsnorm"),
            "feed_forward": ("pattention", "gated"),
            "attention_projections": ("pattention", "linear"),
            "initialization": ("published", "unit", "residual"),
        }
        for key, allowed in choices.items():
            if getattr(self, key) not in allowed:
                raise ValueError(f"{key}: {getattr(self, key)!r} is not known; allowed: {', '.join(allowed)}")
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        for key in (*sizes, "head_dim", "qkv_tokens", "proj_tokens", "ffn_tokens", "max_position_embeddings"):
            if getattr(self, key) < (0 if key == "num_hidden_layers" else 1):
                raise ValueError(f"{key}: {getattr(self, key)} is too small")
        for key in ("qkv_scale", "proj_scale", "ffn_scale"):
            if not 0 < getattr(self, key) < math.inf:
                raise ValueError(f"{key}: {getattr(self, key)} is not a scale; allowed: a finite number above 0")
        for key in ("pattention_eps", "norm_eps", "initializer_range"):
            if not 0 <= getattr(self, key) < math.inf:
                raise ValueError(f"{key}: {getattr(self, key)} is out of range; allowed: a finite number, 0 or more")
        if not 0 <= self.attention_dropout < 1:
            raise ValueError(f"attention_dropout: {self.attention_dropout} is out of range; allowed: 0 up to below 1")
        assert self.head_dim is not None and self.num_key_value_heads is not None and self.rope_parameters is not None
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads: {self.num_key_value_heads} does not divide num_attention_heads "
                f"{self.num_attention_heads}"
            )
        factor = self.rope_parameters["partial_rotary_factor"]
        if not isinstance(factor, (int, float)) or not 0 <= factor <= 1:
            raise ValueError(f"rope_parameters.partial_rotary_factor: {factor!r} is no share; allowed: 0 to 1")
        if int(self.head_dim * factor) % 2:
            raise ValueError(
                f"rope_parameters.partial_rotary_factor: {factor} of head_dim "
                f"{self.head_dim} is an odd number of dimensions; rotary positions turn pairs"
            )

    @classmethod
    def preset(cls, name: str, **changes: Any) -> TokenFormerConfig:
        """A released size, 150m, 450m, 900m or 1.5b, or "modern", which is choices without sizes (see MODERN).

        Keyword arguments change fields of it, and those of rope_parameters one by one.
        """
        if name not in (*PRESETS, "modern"):
            raise ValueError(f"model.preset: {name!r} is not known; allowed: {', '.join(PRESETS)}, modern")
        if name == "modern":
            width = max(1, changes.get("hidden_size", cls.hidden_size))
            rope = {"partial_rotary_factor": 1.0} | (changes.get("rope_parameters") or {})
            return cls(**({"initializer_range": 0.4 / math.sqrt(width)} | MODERN | changes | {"rope_parameters": rope}))
        layers, hidden, heads = PRESETS[name]
        sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads}
        return cls(**(sizes | changes))


class ParameterTokens(Pattention):
    """A Pattention whose scale lives in the model's configuration instead of the state dict."""

    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state


def initial_stds(config: TokenFormerConfig, kind: str) -> tuple[float, float]:
    """Standard deviations of new key rows and new value rows in the tables of `kind` (qkv, proj or ffn).

    Unless as published, scores are about N(0, 1), so a sum over P rows has P m times a value's variance,
    m = E[theta(s)²].
    """
    layers = max(1, config.num_hidden_layers)
    if config.initialization == "published":
        return config.initializer_range, 2 / (layers * math.sqrt(config.hidden_size))
    value_std = 1 / math.sqrt(SECOND_MOMENTS[config.theta] * max(1, getattr(config, f"{kind}_tokens")))
    into_residual = config.initializer_range if config.initialization == "residual" else 1 / math.sqrt(2 * layers)
    return config.hidden_size**-0.5, value_std if kind == "qkv" else value_std * into_residual


def _projection(config: TokenFormerConfig, kind: str, in_features: int, out_features: int) -> nn.Module:
    """A query/key/value ("qkv"), output ("proj") or feed-forward ("ffn") layer, as the configuration wants it."""
    if kind != "ffn" and config.attention_projections == "linear":
        return nn.Linear(in_features, out_features, bias=False)
    return ParameterTokens(
        in_features,
        out_features,
        getattr(config, f"{kind}_tokens"),
        theta=config.theta,
        scale=getattr(config, f"{kind}_scale"),
        eps=config.pattention_eps,
        gated=kind == "ffn" and config.feed_forward == "gated",
        **dict(zip(("key_std", "value_std"), initial_stds(config, kind), strict=True)),
    )


class PlainLayerNorm(nn.LayerNorm):
    """LayerNorm without parameters. A CPU's kernel is vectorised only with them: ones and zeros halve its time."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.shape[-2] == 1:  # one position, in generation: making them costs more
            return super().forward(x)
        width = x.shape[-1]
        return F.layer_norm(x, (width,), x.new_ones(width), x.new_zeros(width), self.eps)


def _norm(config: TokenFormerConfig, parameters: bool) -> nn.Module:
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
    if not parameters:
        return PlainLayerNorm(config.hidden_size, eps=config.norm_eps, elementwise_affine=False)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps)


class TokenFormerRotaryEmbedding(GPTNeoXRotaryEmbedding):
    """transformers' rotary tables, worked in float64 for a float64 model so that it can be held against formulas."""

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        if x.dtype != torch.float64 or self.rope_type != "default":
            return super().forward(x, position_ids)
        dims = 2 * self.inv_freq.shape[0]
        exponents = torch.arange(0, dims, 2, dtype=torch.float64, device=x.device) / dims
        angles = position_ids[..., None].double() * self.config.rope_parameters["rope_theta"] ** -exponents
        angles = torch.cat((angles, angles), dim=-1)  # (B, T, dims)
        return angles.cos(), angles.sin()


class _Rotary(torch.autograd.Function):
    """Rotary positions (arXiv 2104.09864) of x (B, T, H, D), NeoX form; its gradient is turned back by the same angles.

    Whole rows of heads are handled at once: an operation on the few dimensions of one head is mostly its own overhead.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, rotary: int) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(cos, sin)
        ctx.rotary = rotary
        return turn(x, cos, sin, rotary)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return turn(dy, cos, -sin, ctx.rotary), None, None, None


def turn(x: Tensor, cos: Tensor, sin: Tensor, rotary: int) -> Tensor:
    """x (B, T, H, D), the first `rotary` of each D turned by the factors (B, T, >= H D) of `rotary_factors`."""
    width, half = x.shape[-2] * x.shape[-1], rotary // 2  # keys may have fewer heads than queries
    partner = torch.cat((x[..., half:rotary], x[..., :half], x[..., rotary:]), dim=-1).flatten(-2)
    return partner.mul_(sin[..., :width]).addcmul_(x.flatten(-2), cos[..., :width]).view(x.shape)


def rotary_factors(cos: Tensor, sin: Tensor, heads: int, head_dim: int) -> tuple[Tensor, Tensor, int]:
    """transformers' tables (B, T, R) as factors (B, T, H D) of a row of heads, the sine signed; and R <= D."""
    rotary = cos.shape[-1]
    half, still = rotary // 2, head_dim - rotary
    sin = F.pad(torch.cat((-sin[..., :half], sin[..., half:]), dim=-1), (0, still))
    return F.pad(cos, (0, still), value=1.0).repeat(1, 1, heads), sin.repeat(1, 1, heads), rotary


class TokenFormerAttention(nn.Module):
    """Causal attention among tokens; its four projections are attention to parameter tokens."""

    def __init__(self, config: TokenFormerConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.head_dim is not None and config.num_key_value_heads is not None  # the configuration sets them
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        wide, narrow = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = _projection(config, "qkv", config.hidden_size, wide)
        self.k_proj = _projection(config, "qkv", config.hidden_size, narrow)
        self.v_proj = _projection(config, "qkv", config.hidden_size, narrow)
        self.o_proj = _projection(config, "proj", wide, config.hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor, int],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        batch_and_time = hidden_states.shape[:-1]
        projected = side_by_side((self.q_proj, self.k_proj, self.v_proj), hidden_states)
        q, k, v = (t.view(*batch_and_time, -1, self.head_dim) for t in projected)
        rotate = turn if torch.compiler.is_compiling() else _Rotary.apply
        q, k = (rotate(t, *position_embeddings) for t in (q, k))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, D)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.config.attention_dropout if self.training else 0.0
        mixed, weights = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.o_proj(mixed.reshape(*batch_and_time, -1)), weights


class TokenFormerDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: TokenFormerConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = TokenFormerAttention(config, layer_idx)
        self.mlp = _projection(config, "ffn", config.hidden_size, config.hidden_size)
        self.input_layernorm = _norm(config, parameters=False)
        self.post_attention_layernorm = _norm(config, parameters=False)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class TokenFormerPreTrainedModel(PreTrainedModel):
    config: TokenFormerConfig
    config_class = TokenFormerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TokenFormerDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": TokenFormerDecoderLayer, "attentions": TokenFormerAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Pattention):
            init.normal_(module.key, std=module.key_std)
            init.normal_(module.value, std=module.value_std)
            if module.up is not None:
                init.normal_(module.up, std=module.key_std)
        else:
            super()._init_weights(module)


class TokenFormerModel(TokenFormerPreTrainedModel):
    """Embedding, blocks, final norm: (B, T) token ids to (B, T, C)."""

    def __init__(self, config: TokenFormerConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(TokenFormerDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = _norm(config, parameters=True)
        self.rotary_emb = TokenFormerRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen).unsqueeze(0)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        hidden_states = inputs_embeds
        cos, sin = self.rotary_emb(hidden_states, position_ids=position_ids)
        assert self.config.head_dim is not None
        position_embeddings = rotary_factors(cos, sin, self.config.num_attention_heads, self.config.head_dim)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class TokenFormerForCausalLM(TokenFormerPreTrainedModel, GenerationMixin):
    """TokenFormerModel with a language-model head, tied to the embedding unless the configuration says otherwise."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: TokenFormerConfig) -> None:
        super().__init__(config)
        self.model = TokenFormerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def logits(self, hidden_states: Tensor) -> Tensor:
        return self.lm_head(hidden_states)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, vocab_size); with `labels` (B, T) also the mean next-token cross-entropy in nats."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.logits(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
