"""Bits per byte: total surprise over total bytes, whatever the batch size; and a sample that can be made again."""

import math
from typing import Any

import pytest
import torch

from tokenformer.data import ByteTokenizer
from tokenformer.evaluate import cross_entropy, evaluate, sample_text
from tokenformer.models import TokenFormerConfig, build_model

T, W = 8, 5


@pytest.fixture(scope="module")
def model() -> Any:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
    rope = {"rope_parameters": {"partial_rotary_factor": 0.5}}
    config = TokenFormerConfig(vocab_size=256, **sizes, **rope, qkv_tokens=4, proj_tokens=4, ffn_tokens=8)
    return build_model(config, seed=0)


@pytest.fixture(scope="module")
def windows() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 128, (W, T + 1), generator=generator)
    sizes = torch.randint(0, 4, (W, T + 1), generator=generator)
    return tokens, sizes


@torch.no_grad()
def test_bits_per_byte_is_the_surprise_of_each_token_over_the_bytes(model: Any, windows: Any) -> None:
    tokens, sizes = windows
    nats = 0.0
    for row in tokens:  # the reference: one token at a time, each from all before it in its window
        for t in range(1, T + 1):
            logits = model(row[None, :t]).logits[0, -1].double()
            nats -= float(logits.log_softmax(-1)[row[t]])
    measured = evaluate(model, windows)
    assert measured["tokens"] == W * T
    assert measured["bytes"] == int(sizes[:, 1:].sum())
    assert measured["loss"] == pytest.approx(nats / (W * T), rel=1e-5)
    assert measured["bits_per_byte"] == pytest.approx(nats / math.log(2) / int(sizes[:, 1:].sum()), rel=1e-5)
    wrong = evaluate(model, (tokens.roll(1, 1), sizes))
    assert wrong["loss"] != pytest.approx(nats / (W * T), rel=1e-5)


def test_an_untrained_model_needs_about_eight_bits_for_a_byte(model: Any, windows: Any) -> None:
    measured = evaluate(model, (windows[0], torch.ones(W, T + 1, dtype=torch.long)))
    assert measured["bits_per_byte"] == pytest.approx(8, abs=0.2)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_the_batch_size_does_not_matter(model: Any, windows: Any, batch_size: int) -> None:
    one, other = evaluate(model, windows, batch_size=5), evaluate(model, windows, batch_size)
    assert other["loss"] == pytest.approx(one["loss"], rel=1e-6)


def test_evaluation_leaves_the_model_and_the_random_states_as_they_were(model: Any, windows: Any) -> None:
    model.train()
    before = torch.get_rng_state()
    evaluate(model, windows)
    sample_text(model, ByteTokenizer(), (windows[0], torch.ones_like(windows[0])))
    assert model.training
    assert torch.equal(before, torch.get_rng_state())


def test_bfloat16_is_close_and_is_not_float32(model: Any, windows: Any) -> None:
    full, half = evaluate(model, windows), evaluate(model, windows, dtype="bfloat16")
    assert half["loss"] == pytest.approx(full["loss"], rel=1e-2)
    assert half["loss"] != full["loss"]


def test_the_loss_of_a_batch_is_that_of_transformers(model: Any, windows: Any) -> None:
    tokens = windows[0]
    assert cross_entropy(model, tokens).item() == pytest.approx(model(tokens, labels=tokens).loss.item(), rel=1e-6)


def test_a_sample_is_the_same_each_time_and_fits_the_positions_of_the_model(model: Any) -> None:
    tokens = torch.randint(97, 123, (2, 41), generator=torch.Generator().manual_seed(0))
    windows = tokens, torch.ones_like(tokens)
    first, second = (sample_text(model, ByteTokenizer(), windows) for _ in range(2))
    assert first == second
    assert first["prompt"] == bytes(tokens[0, 1:33].tolist()).decode()
    assert 0 < len(first["text"].encode("utf-8", "replace")) and first["text"]
    other = sample_text(model, ByteTokenizer(), (tokens.flip(0), windows[1]))
    assert other != first
