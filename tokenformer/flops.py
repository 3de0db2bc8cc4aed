"""One ruler for every model: parameters, and floating-point operations counted by matrix products.

A matrix of n entries costs 2n operations per token forward, and its two gradients as much again each; a frozen one has
no gradient of its own, and none goes through what lies below the lowest trained layer.
Attention among T tokens costs 4 T² H D a layer: the full square, as dense kernels and the usual accounting
have it. Mamba-2's chunked scan costs the matrix products of `_chunked_scan`. Element-wise work is not counted, nor
table look-ups (embedding, positions), nor what gradient checkpointing works a second time: the ruler is for what a
model is, not for how it was run.

The closed formulas agree to the unit with torch's FlopCounterMode (tests/test_flops.py).

Legend: T positions, C hidden size, H heads, D head size, P parameter tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Sizes:
    """What the formulas need of an architecture: entries of its matrices and vectors, and where they sit."""

    layers: int
    matrices: int  # entries of one layer's weight matrices, each met once by every token
    vectors: int  # entries of one layer's norms, biases and scales
    attention_width: int  # H * D, after grouped keys and values have been repeated
    final_vectors: int  # entries of the last norm, or of nGPT's scale of the logits
    head: int  # entries of the matrix that makes logits
    tied: bool  # that matrix is the embedding's
    tables: int  # entries of the look-up tables: token embedding, learned positions
    idle: int = 0  # entries of one layer's matrices that a token passes by: the experts that it is not sent to
    mixing: Callable[[int], int] = lambda length: 0  # operations of one layer among T positions, beside attention's
    taps: Callable[[int], int] = lambda length: 0  # those of them that are with weights, of a convolution
    first: int = 0  # entries of one layer's matrices that read its input with nothing trained, no gain, before them


def forward_flops(config: PreTrainedConfig, sequence_length: int) -> int:
    """Operations of one forward pass over one sequence, logits at every position included.

    Raises ValueError on an architecture without a formula or a length below 1.
    """
    if sequence_length < 1:
        raise ValueError(f"sequence_length: {sequence_length} is too small; it must be at least 1")
    sizes = _sizes(config)
    per_token = 2 * (sizes.layers * sizes.matrices + sizes.head)
    attention = 4 * sequence_length**2 * sizes.attention_width * sizes.layers
    return per_token * sequence_length + attention + sizes.layers * sizes.mixing(sequence_length)


def training_flops(
    config: PreTrainedConfig, sequence_length: int, sequences: int, trained: Sequence[bool] | None = None
) -> int:
    """Operations of forward and backward over `sequences` sequences: three times the forward pass.

    trained: for each layer, whether it is trained, all else being frozen (growth.weights.trained_layers); by default
    everything is. Without a trained layer there is no backward pass.
    """
    forward = forward_flops(config, sequence_length)
    if trained is None:
        return 3 * forward * sequences
    if True not in trained:
        return forward * sequences
    sizes, lowest = _sizes(config), list(trained).index(True)
    weights = 2 * sizes.matrices * sequence_length + sizes.taps(sequence_length)  # of one layer, and their gradients
    among = 4 * sequence_length**2 * sizes.attention_width + sizes.mixing(sequence_length) - sizes.taps(sequence_length)
    through = (sizes.layers - lowest) * (weights + 2 * among) + 2 * (sizes.head - sizes.first) * sequence_length
    return (forward + through + sum(trained) * weights) * sequences


def low_rank_training_flops(sides: list[tuple[int, int]], rank: int, additive: bool) -> int:
    """What factors of that rank add to `training_flops` per token, for matrices of these sides (m, n); below 0: save.

    B A x costs 2 r (m + n) forward, and three times that in training. Instead of W, where r < min(m, n); with
    `additive` beside a frozen W, which still costs its forward pass and the gradient that goes through it.
    """
    total = 0
    for m, n in sides:
        r = min(rank, m, n)
        if additive:
            total += 6 * r * (m + n) - 2 * m * n
        elif r < min(m, n):
            total += 6 * (r * (m + n) - m * n)
    return total


def parameters(config: PreTrainedConfig) -> dict[str, int]:
    """What `count_parameters` finds in a model of this configuration, without building it."""
    sizes = _sizes(config)
    embedding = sizes.tables + (0 if sizes.tied else sizes.head)
    other = sizes.layers * (sizes.matrices + sizes.idle + sizes.vectors) + sizes.final_vectors
    counts = {"total": embedding + other, "embedding": embedding, "other": other}
    return counts | ({"active": embedding + other - sizes.layers * sizes.idle} if _is_mixture(config) else {})


def count_parameters(model: PreTrainedModel) -> dict[str, int]:
    """Entries of a model's parameters: `embedding` (look-up tables, head), `other`, `total`; tied: once.

    Of a mixture of experts also `active`, those that one token meets.
    """
    from torch import nn

    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    head = model.get_output_embeddings()
    owned = {id(p): p for module in (*tables, head) if module is not None for p in module.parameters()}
    embedding = sum(p.numel() for p in owned.values())
    total = sum(p.numel() for p in model.parameters())
    counts = {"total": total, "embedding": embedding, "other": total - embedding}
    if _is_mixture(model.config):
        experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
        config = model.config
        counts["active"] = total - experts // config.num_local_experts * (
            config.num_local_experts - config.num_experts_per_tok
        )
    return counts


def _is_mixture(config: PreTrainedConfig) -> bool:
    return getattr(config, "num_local_experts", None) is not None


def _tokenformer(config: PreTrainedConfig) -> Sizes:
    width = config.hidden_size
    wide, narrow = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim

    def projection(fan_in: int, fan_out: int, tokens: int) -> int:
        return fan_in * fan_out if config.attention_projections == "linear" else tokens * (fan_in + fan_out)

    attention = projection(width, wide, config.qkv_tokens) + 2 * projection(width, narrow, config.qkv_tokens)
    attention += projection(wide, width, config.proj_tokens)
    feed_forward = config.ffn_tokens * width * (3 if config.feed_forward == "gated" else 2)
    rms = config.norm == "rmsnorm"
    read = wide + 2 * narrow if config.attention_projections == "linear" else 3 * config.qkv_tokens
    return Sizes(
        layers=config.num_hidden_layers,
        matrices=attention + feed_forward,
        first=0 if rms else width * read,
        vectors=2 * width if rms else 0,
        attention_width=wide,
        final_vectors=width if rms else 2 * width,
        head=config.vocab_size * width,
        tied=config.tie_word_embeddings,
        tables=config.vocab_size * width,
    )


def _llama(config: PreTrainedConfig) -> Sizes:
    """Llama, and with their own biases and norms Qwen2 and Qwen3."""
    width, inner = config.hidden_size, config.intermediate_size
    head_dim = getattr(config, "head_dim", None) or width // config.num_attention_heads
    wide, narrow = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    attention_biases = wide + 2 * narrow + width if getattr(config, "attention_bias", False) else 0
    feed_forward_biases = 2 * inner + width if getattr(config, "mlp_bias", False) else 0
    return Sizes(
        layers=config.num_hidden_layers,
        matrices=2 * width * (wide + narrow) + 3 * width * inner,
        vectors=2 * width + attention_biases + feed_forward_biases,
        attention_width=wide,
        final_vectors=width,
        head=config.vocab_size * width,
        tied=config.tie_word_embeddings,
        tables=config.vocab_size * width,
    )


def _qwen2(config: PreTrainedConfig) -> Sizes:
    sizes = _llama(config)  # with biases of queries, keys and values, and none of the output
    head_dim = sizes.attention_width // config.num_attention_heads
    return replace(sizes, vectors=sizes.vectors + sizes.attention_width + 2 * config.num_key_value_heads * head_dim)


def _qwen3(config: PreTrainedConfig) -> Sizes:
    sizes = _llama(config)
    return replace(sizes, vectors=sizes.vectors + 2 * config.head_dim)  # norms of queries and of keys


def _mixtral(config: PreTrainedConfig) -> Sizes:
    """Mistral too, which is the same without a router."""
    width = config.hidden_size
    head_dim = config.head_dim or width // config.num_attention_heads
    wide, narrow = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    expert, active, idle, router = 3 * width * config.intermediate_size, 1, 0, 0
    if _is_mixture(config):
        active, router = config.num_experts_per_tok, config.num_local_experts * width
        idle = config.num_local_experts - active
    return Sizes(
        layers=config.num_hidden_layers,
        matrices=2 * width * (wide + narrow) + router + active * expert,
        vectors=2 * width,
        attention_width=wide,
        final_vectors=width,
        head=config.vocab_size * width,
        tied=config.tie_word_embeddings,
        tables=config.vocab_size * width,
        idle=idle * expert,
    )


def _ngpt(config: PreTrainedConfig) -> Sizes:
    width, inner = config.hidden_size, config.intermediate_size
    wide, narrow = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return Sizes(
        layers=config.num_hidden_layers,
        matrices=2 * width * (wide + narrow) + 3 * width * inner,
        vectors=wide + 2 * inner + 2 * width,  # s_qk; s_u and s_v; two step sizes
        first=width * (wide + 2 * narrow),
        attention_width=wide,
        final_vectors=config.vocab_size,  # s_z
        head=config.vocab_size * width,
        tied=False,
        tables=config.vocab_size * width,
    )


def _gpt2(config: PreTrainedConfig) -> Sizes:
    width = config.hidden_size
    inner = 4 * width if config.n_inner is None else config.n_inner
    return Sizes(
        layers=config.num_hidden_layers,
        matrices=4 * width**2 + 2 * width * inner,
        vectors=4 * width + 4 * width + inner + width,  # two norms; biases of attention and of feed-forward
        attention_width=width,
        final_vectors=2 * width,
        head=config.vocab_size * width,
        tied=config.tie_word_embeddings,
        tables=(config.vocab_size + config.max_position_embeddings) * width,
    )


def _mamba2(config: PreTrainedConfig) -> Sizes:
    width, heads = config.hidden_size, config.num_heads
    inner = heads * config.head_dim
    channels = inner + 2 * config.n_groups * config.state_size  # x, B and C, which the convolution passes over
    projection_biases = inner + channels + heads + width if config.use_bias else 0
    convolution = channels * (config.conv_kernel + bool(config.use_conv_bias))
    return Sizes(
        layers=config.num_hidden_layers,
        matrices=width * (inner + channels + heads) + inner * width,
        vectors=width + inner + 3 * heads + convolution + projection_biases,  # two norms; A, D, bias of dt
        attention_width=0,
        final_vectors=width,
        head=config.vocab_size * width,
        tied=config.tie_word_embeddings,
        tables=config.vocab_size * width,
        mixing=lambda length: _chunked_scan(config, channels, length),
        taps=lambda length: _convolution(config, channels, length),
    )


def _chunked_scan(config: PreTrainedConfig, channels: int, length: int) -> int:
    """One layer of Mamba-2 (arXiv 2405.21060) in chunks of Q = chunk_size, K = ceil(T / Q) of them, padding included.

    With state size N: among a chunk's positions C Bᵀ, 2 K Q² N H, and its product with x, 2 K Q² D H; a chunk's own
    state and the output of the state before it, 2 K Q N D H each; states passed on among the chunks and the first,
    2 (K + 1)² N D H. The convolution of k taps comes to 2 k (T + k - 1) a channel, its padding included.
    """
    chunk, heads, width, state = config.chunk_size, config.num_heads, config.head_dim, config.state_size
    chunks = -(-length // chunk)
    inside = 2 * chunks * chunk**2 * (state + width) * heads
    states = (4 * chunks * chunk + 2 * (chunks + 1) ** 2) * state * width * heads
    return inside + states + _convolution(config, channels, length)


def _convolution(config: PreTrainedConfig, channels: int, length: int) -> int:
    return 2 * config.conv_kernel * (length + config.conv_kernel - 1) * channels


ARCHITECTURES: dict[str, Callable[[PreTrainedConfig], Sizes]] = {
    "tokenformer": _tokenformer,
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "mistral": _mixtral,
    "mixtral": _mixtral,
    "ngpt": _ngpt,
    "gpt2": _gpt2,
    "mamba2": _mamba2,
}


def _sizes(config: PreTrainedConfig) -> Sizes:
    if config.model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"model.architecture: no FLOPs formula for {config.model_type!r}; known: {known}")
    return ARCHITECTURES[config.model_type](config)
