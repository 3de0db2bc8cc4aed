"""What is checked before a race (docs/fairness.md, rules 4, 5, 26): leaks between texts, and models that look ahead."""

import lzma
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ..data import Corpus
from ..models import build_model

STRETCH_BYTES = 64
BLOCK_TOKENS = 2**22
TABLE_BITS = 22  # of the first, quick look whether a hash can be among those sought
REFUSED_OVERLAP = 0.5
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd: 2^64 divided by the golden ratio


def hashes(data: np.ndarray) -> np.ndarray:
    """A hash of every STRETCH_BYTES bytes on end, (N,) uint8 -> (N - 63,) uint64: sum of b[i + j] m^(63 - j)."""
    h, power, width = data.astype(np.uint64), MULTIPLIER, 1
    with np.errstate(over="ignore"):
        while width < STRETCH_BYTES:  # of two halves that are known, each step makes one of twice the width
            h = h[:-width] * power + h[width:]
            power, width = power * power, 2 * width
    return h


def overlap(held_out: np.ndarray, training: Iterator[np.ndarray]) -> float:
    """The share of the held-out bytes' stretches, cut one after another, that occur anywhere in the training bytes."""
    count = len(held_out) // STRETCH_BYTES
    if not count:
        return 0.0
    sought, weights = np.unique(hashes(held_out)[::STRETCH_BYTES][:count], return_counts=True)
    shift = np.uint64(64 - TABLE_BITS)
    possible = np.zeros(2**TABLE_BITS, bool)
    possible[sought >> shift] = True
    found = np.zeros(len(sought), bool)
    for block in training:
        if len(block) < STRETCH_BYTES:
            continue
        some = hashes(block)
        some = some[possible[some >> shift]]
        places = np.searchsorted(sought, some)
        places[places == len(sought)] = 0
        found[places[sought[places] == some]] = True
    return float(weights[found].sum() / count)


def text_blocks(corpus: Corpus, tokens: np.ndarray) -> Iterator[np.ndarray]:
    """The text that tokens stand for, as bytes, in blocks that overlap by more than a stretch."""
    for start in range(0, len(tokens), BLOCK_TOKENS):
        part = tokens[start : start + BLOCK_TOKENS + STRETCH_BYTES]
        if corpus.tokenizer.vocab_size == 256:
            yield np.asarray(part, np.uint8)
        else:
            yield np.frombuffer(corpus.tokenizer.decode(part.tolist()).encode(), np.uint8)


def check_texts(corpus: Corpus, final: np.ndarray | None) -> dict[str, Any]:
    """Overlap of the held-out and the final text with the training text and with one another, and LZMA's rate.

    Of one another: the larger share, since the shorter may lie in the longer. ValueError where one is above a half.
    """
    held_out = np.concatenate(list(text_blocks(corpus, corpus.valid)))
    found: dict[str, Any] = {"overlap": overlap(held_out, text_blocks(corpus, corpus.train))}
    found |= {"final_overlap": None, "final_held_out_overlap": None}
    if final is not None:
        text = np.concatenate(list(text_blocks(corpus, final)))
        found["final_overlap"] = overlap(text, text_blocks(corpus, corpus.train))
        found["final_held_out_overlap"] = max(overlap(text, iter([held_out])), overlap(held_out, iter([text])))
    for key, what, there, so in (
        ("overlap", "the held-out text", "the training text", "measure memory"),
        ("final_overlap", "race.final_text", "the training text", "measure memory"),
        ("final_held_out_overlap", "race.final_text", "the held-out text, or of that in it", "judge by what it tunes"),
    ):
        if (found[key] or 0) > REFUSED_OVERLAP:
            raise ValueError(
                f"{what}: {found[key]:.0%} of its stretches of {STRETCH_BYTES} bytes occur in {there}; "
                f"above {REFUSED_OVERLAP:.0%} a race would {so}"
            )
    compressed = len(lzma.compress(held_out.tobytes(), preset=9))
    return found | {"lzma_bits_per_byte": 8 * compressed / len(held_out)}


def require_causal(config: Any, name: str, length: int = 32) -> None:
    """ValueError if a model's logits at a position change with tokens after it, in texts of `length` tokens."""
    length = max(2, length)  # one that sees and one that is seen
    model = build_model(config, 0).eval()
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(config.vocab_size, (2, length), generator=generator)
    second = first.clone()
    second[:, length // 2 :] = (second[:, length // 2 :] + 1) % config.vocab_size
    with torch.inference_mode():
        a, b = (model(input_ids=ids, use_cache=False).logits[:, : length // 2].float() for ids in (first, second))
    moved = float((a - b).abs().max())
    if not moved <= 1e-4 * max(1.0, float(a.abs().max())):  # nor NaN
        raise ValueError(f"arm {name}: its model sees the tokens that it should predict: logits moved by {moved:.3g}")
