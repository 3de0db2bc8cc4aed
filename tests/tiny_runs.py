"""Tiny training runs for the tests of the loop, and child processes that start in milliseconds.

Importing torch and transformers takes seconds, so children are forked from one server that has imported them once.
"""

import contextlib
import multiprocessing
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tokenformer import runs, train  # noqa: F401 (loads the modules that in_child changes)
from tokenformer.recipe import Recipe, recipe_from_dict

TIMEOUT = 90.0  # of a child; nothing here takes a tenth of it


def corpus(folder: Path) -> Path:
    """About 200 kB of text in a word order that can be learned, each document another."""
    place = folder / "corpus.txt"
    if not place.exists():
        draw = random.Random(0)
        words = ["".join(draw.choice("abcdefgh") for _ in range(draw.randint(2, 6))) for _ in range(60)]
        documents = (" ".join(draw.choice(words) for _ in range(150)) for _ in range(300))
        place.write_text("\f".join(documents))
    return place


def tiny(folder: Path, **changes: Any) -> Recipe:
    """12 steps of a TokenFormer of 4k parameters that grows at step 6; `changes` are sections merged key by key."""
    table: dict[str, Any] = {
        "name": "tiny",
        "model": {
            "hidden_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "rope_parameters": {"partial_rotary_factor": 0.5},
            "qkv_tokens": 8,
            "proj_tokens": 8,
            "ffn_tokens": 16,
        },
        "data": {
            "source": str(corpus(folder)),
            "sequence_length": 16,
            "batch_size": 4,
            "valid_fraction": 0.1,
            "valid_tokens": 256,
        },
        "train": {
            "steps": 12,
            "learning_rate": 0.01,
            "warmup_steps": 2,
            "evaluate_every": 5,
            "log_every": 3,
            "checkpoint_every": 4,
            "threads": 1,
            "device": "cpu",
        },
        "growth": [{"at_step": 6, "to": {"ffn_tokens": 32}}],
    }
    for section, values in changes.items():
        table[section] = {**table[section], **values} if isinstance(table.get(section), dict) else values
    return recipe_from_dict(table, "the test")


def weights(run: Path) -> dict[str, torch.Tensor]:
    """All tensors of a run's newest checkpoint, moments and random states included."""
    newest = runs.checkpoints(run)[-1]
    return {f"{p.name}:{k}": t for p in sorted(newest.glob("*.safetensors")) for k, t in load_file(p).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def losses(run: Path) -> list[tuple[Any, ...]]:
    """Every line of a run's metrics without its time."""
    lines = runs.read_metrics(run)
    return [tuple((k, str(v)) for k, v in line.items() if k != "seconds") for line in lines]


# --- child processes ---


def start_child(work: Callable[..., None], *arguments: Any, **environment: str) -> Any:
    """A process that runs `work(*arguments)` with these environment variables; its exit code says how it ended."""
    root = str(Path(__file__).resolve().parent.parent)
    if root not in os.environ.get("PYTHONPATH", "").split(os.pathsep):  # for the server, which starts on first use
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tokenformer.train", "tokenformer.cli"])
    cache = {"TOKENFORMER_CACHE": os.environ["TOKENFORMER_CACHE"]}
    child = context.Process(target=in_child, args=(work, arguments, {**cache, **environment}))
    child.start()
    return child


def in_child(work: Callable[..., None], arguments: tuple[Any, ...], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    sys.modules["tokenformer.evaluate"].SAMPLE_BYTES = 4  # type: ignore[attr-defined]
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which the server ignores
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (lives as long as the process)
    work(*arguments)


def ended(child: Any) -> int:
    """Wait for a child, not for ever; its exit code."""
    child.join(TIMEOUT)
    if child.exitcode is None:
        with contextlib.suppress(OSError):
            child.kill()
        raise TimeoutError("the child process hangs")
    return child.exitcode
