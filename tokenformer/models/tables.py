"""The tables of named axes (axes.py says how they are read), one per architecture. Adding one is adding data here."""

from __future__ import annotations

from dataclasses import replace

from .axes import Table

_LAYER = "model.layers.*"


def _under(prefix: str, rows: dict[str, str]) -> dict[str, str]:
    return {f"{prefix}.{name}": dims for name, dims in rows.items()}


# A query head lies inside its key-value group, so q and o have the groups' axis outside the group's.
_ATTENTION = {
    "input_layernorm.weight": "hidden=",
    "post_attention_layernorm.weight": "hidden=",
    "self_attn.q_proj.weight": "kv_heads> group> head_dim>, hidden<",
    "self_attn.q_proj.bias": "kv_heads> group> head_dim>",
    "self_attn.k_proj.weight": "kv_heads> head_dim>, hidden<",
    "self_attn.k_proj.bias": "kv_heads> head_dim>",
    "self_attn.v_proj.weight": "kv_heads> value_dim>, hidden<",
    "self_attn.v_proj.bias": "kv_heads> value_dim>",
    "self_attn.o_proj.weight": "hidden>, kv_heads< group< value_dim<",
    "self_attn.o_proj.bias": "hidden>",
    "self_attn.q_norm.weight": "head_dim=",
    "self_attn.k_norm.weight": "head_dim=",
}
_FEED_FORWARD = {
    "mlp.gate_proj.weight": "ffn>, hidden<",
    "mlp.gate_proj.bias": "ffn>",
    "mlp.up_proj.weight": "ffn>, hidden<",
    "mlp.up_proj.bias": "ffn>",
    "mlp.down_proj.weight": "hidden>, ffn<",
    "mlp.down_proj.bias": "hidden>",
}
_ENDS = {
    "model.embed_tokens.weight": "vocab, hidden>",
    "lm_head.weight": "vocab, hidden<",
    "model.norm.weight": "hidden@",
}
_HEAD_DIM = "head_dim or hidden_size / num_attention_heads"
_SIZES = {
    "hidden": "hidden_size",
    "ffn": "intermediate_size",
    "kv_heads": "num_key_value_heads",
    "group": "num_attention_heads / num_key_value_heads",
    "head_dim": _HEAD_DIM,
    "value_dim": _HEAD_DIM,
    "vocab": "vocab_size",
}
_GROWS = {
    "hidden_size": "hidden",
    "intermediate_size": "ffn",
    "num_attention_heads": "group",
    "num_key_value_heads": "kv_heads",
}
_ROPE = {
    "head_dim": "rotary positions turn the whole of a head, and another head_dim turns by other frequencies; "
    "num_attention_heads can grow"
}
_HEADS_FOLLOW = {"num_attention_heads": ("num_key_value_heads", "num_key_value_heads * group")}

# A dense feed-forward is a mixture of one; with more experts the model is a Mixtral (growth/experts.py).
_DENSE_SIZES = _SIZES | {"mixture": "1"}
_DENSE_GROWS = _GROWS | {"num_local_experts": "mixture"}

LLAMA = Table(
    parameters=_ENDS | _under(_LAYER, _ATTENTION | _FEED_FORWARD),
    sizes=_DENSE_SIZES,
    grows=_DENSE_GROWS,
    norms={"hidden": "rms"},
    pins={"head_dim": _HEAD_DIM},
    follows=_HEADS_FOLLOW,
    refuses=_ROPE,
    rows=("ffn",),
)

QWEN2 = replace(
    LLAMA,
    sizes=_SIZES,
    grows=_GROWS,
    refuses=_ROPE | {"num_local_experts": "a Mixtral has no biases on queries, keys and values, and Qwen2 has"},
)

# The norms of queries and keys share the epsilon of the others.
QWEN3 = Table(
    parameters=LLAMA.parameters,
    sizes=_SIZES,
    grows=_GROWS,
    norms={"hidden": "rms", "head_dim": "rms"},
    pins={"head_dim": _HEAD_DIM},
    follows=_HEADS_FOLLOW,
    refuses=_ROPE | {"num_local_experts": "a Mixtral has no norms of queries and keys, and Qwen3 has"},
    rows=("ffn",),
)

MIXTRAL = Table(
    parameters=_ENDS
    | _under(
        _LAYER,
        _ATTENTION
        | {
            "mlp.gate.weight": "experts#, hidden<",
            "mlp.experts.gate_up_proj": "experts#, ffn> | ffn>, hidden<",
            "mlp.experts.down_proj": "experts#, hidden>, ffn<",
        },
    ),
    sizes=_SIZES | {"experts": "num_local_experts"},
    grows=_GROWS | {"num_local_experts": "experts"},
    norms={"hidden": "rms"},
    pins={"head_dim": _HEAD_DIM},
    follows=_HEADS_FOLLOW,
    refuses=_ROPE,
)

GPT2 = Table(
    parameters={
        "transformer.wte.weight": "vocab, hidden>",
        "transformer.wpe.weight": "positions, hidden>",
        "lm_head.weight": "vocab, hidden<",
        "transformer.ln_f.weight": "hidden@",
        "transformer.ln_f.bias": "hidden+",
    }
    | _under(
        "transformer.h.*",
        {
            "ln_1.weight": "hidden=",
            "ln_1.bias": "hidden>",
            "ln_2.weight": "hidden=",
            "ln_2.bias": "hidden>",
            "attn.c_attn.weight": "hidden<, kv_heads> head_dim> | kv_heads> head_dim> | kv_heads> head_dim>",
            "attn.c_attn.bias": "kv_heads> head_dim> | kv_heads> head_dim> | kv_heads> head_dim>",
            "attn.c_proj.weight": "kv_heads< head_dim<, hidden>",
            "attn.c_proj.bias": "hidden>",
            "mlp.c_fc.weight": "hidden<, ffn>",
            "mlp.c_fc.bias": "ffn>",
            "mlp.c_proj.weight": "ffn<, hidden>",
            "mlp.c_proj.bias": "hidden>",
        },
    ),
    sizes={
        "hidden": "n_embd",
        "ffn": "n_inner or n_embd * 4",
        "kv_heads": "n_head",
        "head_dim": "n_embd / n_head",
        "vocab": "vocab_size",
        "positions": "n_positions",
    },
    grows={"n_embd": "hidden", "n_inner": "ffn"},
    norms={"hidden": "layer"},
    eps="layer_norm_epsilon",
    pins={"n_inner": "n_inner or n_embd * 4"},
    follows={"n_head": ("n_embd", "n_embd / head_dim")},
    names={"hidden_size": "n_embd", "intermediate_size": "n_inner", "num_attention_heads": "n_head"},
    refuses={
        "n_head": "GPT-2's heads share out its width, n_embd = n_head * head width; grow hidden_size, heads follow",
        "head_dim": "GPT-2's heads share out its width, n_embd = n_head * head width; LayerNorm allows no zeros in it",
    },
    closes=("attn.c_proj.weight", "attn.c_proj.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"),
    by_layer=("scale_attn_by_inverse_layer_idx",),
    layers="transformer.h",
    rows=("ffn",),
)

# Heads lie inside the groups that share B and C, and the gated norm runs over one group. C reads the state that B
# writes; the convolution passes over both, and silu(0) = 0 keeps a closed channel closed.
_MIXED = "groups> head_group> head_width> | groups> state> | groups> state<"
MAMBA2 = Table(
    parameters={
        "backbone.embeddings.weight": "vocab, hidden>",
        "lm_head.weight": "vocab, hidden<",
        "backbone.norm_f.weight": "hidden@",
    }
    | _under(
        "backbone.layers.*",
        {
            "norm.weight": "hidden=",
            "mixer.in_proj.weight": f"groups~ head_group~ head_width~ | {_MIXED} | groups~ head_group~, hidden<",
            "mixer.in_proj.bias": f"groups~ head_group~ head_width~ | {_MIXED} | groups~ head_group~",
            "mixer.conv1d.weight": "groups~ head_group~ head_width~ | groups~ state~ | groups~ state~, one, taps",
            "mixer.conv1d.bias": _MIXED,
            "mixer.dt_bias": "groups~ head_group~",
            "mixer.A_log": "groups~ head_group~",
            "mixer.D": "groups~ head_group~",
            "mixer.norm.weight": "groups~ head_group= head_width~",
            "mixer.out_proj.weight": "hidden>, groups< head_group< head_width<",
            "mixer.out_proj.bias": "hidden>",
        },
    ),
    sizes={
        "hidden": "hidden_size",
        "groups": "n_groups",
        "head_group": "num_heads / n_groups",
        "head_width": "head_dim",
        "state": "state_size",
        "vocab": "vocab_size",
        "taps": "conv_kernel",
        "one": "1",
    },
    grows={"hidden_size": "hidden", "num_heads": "head_group", "state_size": "state"},
    norms={"hidden": "rms", "head_group": "rms"},
    eps="layer_norm_epsilon",
    fixed_writers=("head_group",),
    pins={"time_step_rank": "time_step_rank"},
    follows={
        "expand": ("num_heads", "num_heads * head_dim / hidden_size"),
        "num_heads": ("hidden_size", "hidden_size * expand / head_dim"),
    },
    refuses={"head_dim": "Mamba-2's heads are its unit of growth: num_heads can grow"},
    layers="backbone.layers",
)

_TOKEN_ROWS = {
    "self_attn.q_proj": ("qkv_tokens", "hidden<", "kv_heads> group> head_dim>"),
    "self_attn.k_proj": ("qkv_tokens", "hidden<", "kv_heads> head_dim<"),
    "self_attn.v_proj": ("qkv_tokens", "hidden<", "kv_heads> value_dim>"),
    "self_attn.o_proj": ("proj_tokens", "kv_heads< group< value_dim<", "hidden>"),
    "mlp": ("ffn_tokens", "hidden<", "hidden>"),
}
# Of queries and keys, which meet in a product, the ones write a head's width and the others read it. Both are value
# rows: a parameter token's key is scale-free only up to its norm's epsilon.
TOKENFORMER = Table(
    parameters=_ENDS
    | {"model.norm.bias": "hidden+"}
    | _under(
        _LAYER,
        {f"{place}.key": f"{tokens}>, {reads}" for place, (tokens, reads, _) in _TOKEN_ROWS.items()}
        | {f"{place}.up": f"{tokens}~, {reads}" for place, (tokens, reads, _) in _TOKEN_ROWS.items()}
        | {f"{place}.value": f"{tokens}<, {writes}" for place, (tokens, _, writes) in _TOKEN_ROWS.items()}
        | {f"{place}.weight": f"{writes}, {reads}" for place, (_, reads, writes) in _TOKEN_ROWS.items()}
        | {"input_layernorm.weight": "hidden=", "post_attention_layernorm.weight": "hidden="},
    ),
    sizes={
        "hidden": "hidden_size",
        "kv_heads": "num_key_value_heads",
        "group": "num_attention_heads / num_key_value_heads",
        "head_dim": "head_dim",
        "value_dim": "head_dim",
        "qkv_tokens": "qkv_tokens",
        "proj_tokens": "proj_tokens",
        "ffn_tokens": "ffn_tokens",
        "vocab": "vocab_size",
    },
    grows={
        "qkv_tokens": "qkv_tokens",
        "proj_tokens": "proj_tokens",
        "ffn_tokens": "ffn_tokens",
        "hidden_size": "hidden",
        "num_attention_heads": "group",
        "num_key_value_heads": "kv_heads",
        "head_dim": "head_dim",
    },
    norms={"hidden": "norm"},
    eps="norm_eps",
    follows=_HEADS_FOLLOW,
    names={"ffn": "ffn_tokens", "qkv": "qkv_tokens", "proj": "proj_tokens"},
    closes=("self_attn.o_proj.value", "self_attn.o_proj.weight", "mlp.value"),
    gainless={"hidden": "layer"},
    rows=("qkv_tokens", "proj_tokens", "ffn_tokens"),
)

# Rows and columns along `hidden` are unit vectors, so nothing there can start at zero: channels are copied and divided
# by the root of the number of copies, and a feed-forward unit is closed by the gain s_u of its linear half.
_LOUD_HEADS = "columns of nGPT's output projection are unit vectors, so a new head cannot start silent"
NGPT = Table(
    parameters=_ENDS
    | {"s_z": "vocab"}
    | _under(
        _LAYER,
        _ATTENTION
        | {
            "attention_alpha": "hidden~",
            "mlp_alpha": "hidden~",
            "self_attn.s_qk": "kv_heads~ group~ head_dim~",
            "mlp.s_u": "ffn<",
            "mlp.s_v": "ffn~",
            "mlp.gate_proj.weight": "ffn>, hidden<",
            "mlp.up_proj.weight": "ffn>, hidden<",
            "mlp.down_proj.weight": "hidden>, ffn~",
        },
    ),
    sizes=_SIZES,
    grows={"hidden_size": "hidden", "intermediate_size": "ffn"},
    norms={"hidden": "rms"},
    eps="norm_eps",
    pins={"head_dim": _HEAD_DIM},
    refuses={
        "num_attention_heads": _LOUD_HEADS,
        "num_key_value_heads": _LOUD_HEADS,
        "head_dim": "nGPT's queries and keys are unit vectors turned as wholes by rotary positions",
    },
    closes=("attention_alpha", "mlp_alpha"),
    unit_norm=True,
)

TABLES = {
    "tokenformer": TOKENFORMER,
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "gpt2": GPT2,
    "mixtral": MIXTRAL,
    "mamba2": MAMBA2,
    "ngpt": NGPT,
}
