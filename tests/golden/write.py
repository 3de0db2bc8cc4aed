"""Twenty training steps of small models, with a growth at the tenth: the losses that a refactor must leave alone.

Run this file to write losses.json anew, and say in LOG.md why they changed.
"""

import json
from pathlib import Path

import torch

from tokenformer.growth import grow
from tokenformer.models import build_config, build_model
from tokenformer.optim import AdamW, learning_rate, parameter_groups
from tokenformer.recipe import TrainSection

FILE = Path(__file__).with_name("losses.json")
SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = {"qkv_tokens": 24, "proj_tokens": 20, "ffn_tokens": 60}
MODERN = {"norm": "rmsnorm", "feed_forward": "gated", "initialization": "unit", "num_key_value_heads": 2}
CASES = {
    "published block, zero keys": (TOKENS, "zero_keys", {"ffn": 90, "qkv": 31}),
    "published block, tile": (TOKENS, "tile", {"ffn": 120, "qkv": 48}),
    "published block, published growth": (TOKENS, "published", {"ffn": 90, "qkv": 31}),
    "modern block, zero keys": (TOKENS | MODERN, "zero_keys", {"ffn": 90, "qkv": 31}),
    "gelu first, tile": (TOKENS | {"theta": "gelu_l2_norm"}, "tile", {"ffn": 120}),
    "softmax, tile": (TOKENS | {"theta": "softmax"}, "tile", {"ffn": 120}),
}


def losses(fields: dict, operator: str, to: dict[str, int]) -> list[float]:
    """Loss in nats before each of twenty steps on a fixed sequence of numbers that can be learned."""
    section = TrainSection(steps=20, learning_rate=1e-2, warmup_steps=4)
    model = build_model(build_config("tokenformer", fields=SIZES | fields), seed=0)
    optimizer = AdamW(parameter_groups(model, section.weight_decay), lr=section.learning_rate)
    found = []
    for step in range(20):
        if step == 10:
            grown = grow(model, operator, to, optimizer=optimizer, seed=0)
            model, optimizer = grown.model, grown.optimizer
        start = torch.arange(8)[:, None] * 7 + step * 3
        ids = (start + torch.arange(33)[None, :] * 5) ** 2 % 61
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(section, step / 20, step)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(round(loss.item(), 6))
    return found


if __name__ == "__main__":
    FILE.write_text(json.dumps({name: losses(*case) for name, case in CASES.items()}, indent=1) + "\n")
