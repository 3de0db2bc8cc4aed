"""A TokenFormer in the authors' released format, with random weights, and its published formulas in float64.

Written from the paper (arXiv 2410.23168) and the names of the released files alone: nothing here knows the package.

    python tests/released_format.py OUT --size 150m                 # OUT/pytorch_model.bin, OUT/config.yml, a tokenizer
    python tests/released_format.py OUT --size 150m --layers 2 --heads 2 --vocabulary 512        # the same, smaller
    python tests/released_format.py OUT --deepspeed                 # a file a layer, as DeepSpeed's pipeline saves it
"""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

# Layers, width, heads of the four released models; their tokens are the width, four times that in the feed-forward.
SHAPES = {"150m": (12, 768, 12), "450m": (24, 1024, 16), "900m": (32, 1280, 16), "1.5b": (40, 1536, 16)}
VOCABULARY = 50304
THETAS = ("l2_norm_gelu", "gelu_l2_norm", "softmax")


def scaled(size: str, layers: int | None = None, heads: int | None = None) -> tuple[int, int, int]:
    """Layers, width and heads of a released model, with fewer layers, and fewer heads of the same size."""
    usual_layers, width, usual_heads = SHAPES[size]
    heads = heads or usual_heads
    return layers or usual_layers, heads * (width // usual_heads), heads


def random_checkpoint(
    layers: int, width: int, vocabulary: int, tokens: tuple[int, int, int], dtype: torch.dtype, seed: int = 0
) -> dict[str, Tensor]:
    """`tokens`: parameter tokens of the query/key/value, output and feed-forward layers."""
    draw = torch.Generator().manual_seed(seed)

    def table(rows: int, std: float) -> Tensor:
        return (torch.randn(rows, width, generator=draw) * std).to(dtype)

    value_std = 2 / (layers * math.sqrt(width))
    tensors = {"sequential.0.word_embeddings.weight": table(vocabulary, 0.02)}
    for i in range(2, layers + 2):
        places = {f"attention.{name}": tokens[0] for name in ("query", "key", "value")}
        for place, rows in {**places, "attention.proj": tokens[1], "mlp": tokens[2]}.items():
            tensors[f"sequential.{i}.{place}.key_param_tokens"] = table(rows, 0.02)
            tensors[f"sequential.{i}.{place}.value_param_tokens"] = table(rows, value_std)
    for part, centre in (("weight", 1.0), ("bias", 0.0)):
        tensors[f"sequential.{layers + 3}.norm.{part}"] = (centre + 0.1 * torch.randn(width, generator=draw)).to(dtype)
    return tensors


def neox_settings(layers: int, width: int, heads: int, tokens: tuple[int, int, int], theta: str = THETAS[0]) -> dict:
    """What the authors' .yml files say of a model."""
    sizes = {"num_layers": layers, "hidden_size": width, "num_attention_heads": heads}
    slots = {"qkv_slot_num": tokens[0], "proj_slot_num": tokens[1], "ffn_slot_num": tokens[2]}
    rest = {"seq_length": 2048, "max_position_embeddings": 2048, "pos_emb": "rotary", "rotary_pct": 0.25}
    norms = {"no_weight_tying": False, "norm": "layernorm_nonparam", "final_norm": "layernorm", "gpt_j_residual": False}
    return {**sizes, **slots, **rest, **norms, "norm_activation_type": theta, "tokenizer-type": "HFTokenizer"}


def write_bin(tensors: dict[str, Tensor], folder: Path) -> Path:
    folder.mkdir(parents=True)
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def write_deepspeed(tensors: dict[str, Tensor], folder: Path, settings: dict) -> Path:
    """checkpoints/latest, checkpoints/global_step1000/{layer files, configs}; each layer's names lack their prefix."""
    step = folder / "global_step1000"
    (step / "configs").mkdir(parents=True)
    (folder / "latest").write_text("global_step1000")
    for i in sorted({int(name.split(".")[1]) for name in tensors}):
        layer = {name.split(".", 2)[2]: t for name, t in tensors.items() if name.startswith(f"sequential.{i}.")}
        torch.save(layer, step / f"layer_{i:02d}-model_00-model_states.pt")
    (step / "configs" / "model.yml").write_text(json.dumps(settings))
    return folder


def write_tokenizer(path: Path) -> None:
    """A tokenizer.json of bytes with GPT-NeoX-20B's end mark, and nothing beside it, as the authors have it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {"<|endoftext|>": 0} | {symbol: i for i, symbol in enumerate(alphabet, start=1)}
    tokenizer = Tokenizer(models.BPE(ids, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path))


# --- the published formulas ---


def layer_norm(x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.special.erf(x / math.sqrt(2))) / 2


def pattention(x: Tensor, keys: Tensor, values: Tensor, theta: str) -> Tensor:
    """theta(x K^T) V with the scale sqrt(n) of n tokens; for softmax, the l1 norm of exp, the scale is n."""
    scores, n = x @ keys.double().T, len(keys)
    if theta == "l2_norm_gelu":
        weights = gelu(scores / scores.norm(dim=-1, keepdim=True) * math.sqrt(n))
    elif theta == "gelu_l2_norm":
        weights = gelu(scores) / gelu(scores).norm(dim=-1, keepdim=True) * math.sqrt(n)
    else:
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True) * n
    return weights @ values.double()


def turned(x: Tensor, dims: int, base: float) -> Tensor:
    """Rotary positions on the first `dims` of each head of x (B, H, T, D): i with i + dims/2."""
    half = dims // 2
    speed = base ** (-2 * torch.arange(half, dtype=torch.float64) / dims)
    angle = torch.arange(x.shape[-2], dtype=torch.float64)[:, None] * speed
    a, b, rest = x[..., :half], x[..., half:dims], x[..., dims:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), rest], dim=-1)


def published_layers(
    tensors: dict[str, Tensor],
    ids: Tensor,
    heads: int,
    rotary: float = 0.25,
    theta: str = THETAS[0],
    base: float = 10000.0,
    eps: float = 1e-5,
) -> Iterator[Tensor]:
    """In float64: the embeddings of ids (B, T), the hidden state after each layer, and last the logits."""
    embedding = tensors["sequential.0.word_embeddings.weight"].double()
    last = max(int(name.split(".")[1]) for name in tensors)
    x = embedding[ids]
    yield x
    batch, length, width = x.shape
    size = width // heads
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    for i in range(2, last - 1):

        def layer(place: str, x: Tensor, i: int = i) -> Tensor:
            name = f"sequential.{i}.{place}"
            tables = tensors[f"{name}.key_param_tokens"], tensors[f"{name}.value_param_tokens"]
            return pattention(x, *tables, theta)

        h = layer_norm(x, eps)
        q, k, v = (layer(f"attention.{name}", h) for name in ("query", "key", "value"))
        q, k, v = (t.view(batch, length, heads, size).transpose(1, 2) for t in (q, k, v))
        q, k = (turned(t, int(size * rotary), base) for t in (q, k))
        scores = (q @ k.transpose(-1, -2) / math.sqrt(size)).masked_fill(future, -math.inf)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width)
        x = x + layer("attention.proj", mixed)
        x = x + layer("mlp", layer_norm(x, eps))
        yield x
    weight, bias = (tensors[f"sequential.{last}.norm.{part}"].double() for part in ("weight", "bias"))
    yield (layer_norm(x, eps) * weight + bias) @ embedding.T


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=SHAPES, default="150m")
    parser.add_argument("--layers", type=int, help="fewer than the released model has")
    parser.add_argument("--heads", type=int, help="fewer, each of the released size, so the width is less")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--theta", choices=THETAS, default=THETAS[0])
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16")
    parser.add_argument("--deepspeed", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    words = parser.parse_args()
    layers, width, heads = scaled(words.size, words.layers, words.heads)
    tokens = (width, width, 4 * width)
    dtype = getattr(torch, words.dtype)
    tensors = random_checkpoint(layers, width, words.vocabulary, tokens, dtype, words.seed)
    settings = neox_settings(layers, width, heads, tokens, words.theta)
    if words.deepspeed:
        write_deepspeed(tensors, words.out, settings)
    else:
        write_bin(tensors, words.out)
        (words.out / "config.yml").write_text(json.dumps(settings, indent=2))
        write_tokenizer(words.out / "tokenizer.json")
    print(f"{words.out}: {sum(t.numel() for t in tensors.values()):,} parameters")


if __name__ == "__main__":
    main()
