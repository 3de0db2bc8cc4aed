"""Held-out loss in nats per token and in bits per byte of text, which models with other tokenizers share; and the
tasks of the evaluation harness (lm-eval, the extra `eval`)."""

import importlib.metadata
import importlib.util
import logging
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import distributed
from .distributed import Ranks

BOOTSTRAPS = 1000  # draws for the standard error of what has no formula for it, such as a perplexity
PROMPT_BYTES, SAMPLE_BYTES, SAMPLE_TEMPERATURE, SAMPLE_SEED = 32, 200, 0.8, 0


def evaluate(
    model: nn.Module,
    windows: tuple[Tensor, Tensor],
    batch_size: int = 8,
    device: torch.device | str = "cpu",
    dtype: str = "float32",
    ranks: Ranks | None = None,
) -> dict[str, float]:
    """The model's loss on evaluation windows, each token predicted from those before it in its window.

    `windows` are token ids (W, T + 1) and the bytes that each stands for (W, T + 1), as data.eval_windows
    gives them. Returns loss (nats per predicted token), bits_per_byte (total nats over total bytes of the
    predicted tokens, in bits; the marks between documents are predicted too and have no bytes), tokens and
    bytes. Several ranks each take a share of the windows. The model's mode and the random states are left as
    they were.
    """
    tokens, sizes = windows
    ranks = ranks or Ranks()
    device = torch.device(device)
    was_training = model.training
    model.eval()
    nats = 0.0
    try:
        with torch.inference_mode(), autocast(device, dtype):
            for batch in tokens[ranks.rank :: ranks.world].split(batch_size):
                nats += cross_entropy(model, batch.to(device), reduction="none").cpu().double().sum().item()
    finally:
        model.train(was_training)
    [nats] = distributed.sums([nats], ranks, device)
    predicted, size = tokens[:, 1:].numel(), int(sizes[:, 1:].sum())
    return {
        "loss": nats / predicted,
        "bits_per_byte": nats / math.log(2) / size,
        "tokens": predicted,
        "bytes": size,
    }


def require_vocabulary(windows: Iterable[Tensor], config: Any, checkpoint: str | Path) -> None:
    """ValueError if token ids that the checkpoint's tokenizer has made are none of its model's."""
    largest = max((int(tokens.max()) for tokens in windows), default=0)
    if largest >= config.vocab_size:
        tokenizer = f"{checkpoint}: its tokenizer makes the token {largest} of the text"
        raise ValueError(f"{tokenizer}, and the model's vocab_size is {config.vocab_size}")


def evaluate_parts(
    model: nn.Module,
    parts: Sequence[tuple[Tensor, Tensor]],
    batch_size: int = 8,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """What `evaluate` measures, over parts whose windows differ in length, as data.text_windows gives them."""
    nats, count, size = 0.0, 0, 0
    for tokens, text_bytes in parts:
        # The bytes are summed here: a part may be a single end mark, which stands for none.
        measured = evaluate(model, (tokens, torch.ones_like(text_bytes)), batch_size, device)
        nats += measured["loss"] * measured["tokens"]
        count += int(measured["tokens"])
        size += int(text_bytes[:, 1:].sum())
    return {"loss": nats / count, "bits_per_byte": nats / math.log(2) / size, "tokens": count, "bytes": size}


def cross_entropy(model: nn.Module, windows: Tensor, reduction: str = "mean") -> Tensor:
    """Next-token loss in nats, in float32, of windows (B, T + 1): the first T tokens predict the last T."""
    return next_token_loss(model(input_ids=windows[:, :-1], use_cache=False).logits, windows, reduction)


def next_token_loss(logits: Tensor, windows: Tensor, reduction: str = "mean") -> Tensor:
    """The same of logits (B, T, V) that a model has given."""
    return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten(), reduction=reduction)


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """The context of train.dtype: bfloat16 matrix products over float32 weights, or nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


def sample_text(model: Any, tokenizer: Any, windows: tuple[Tensor, Tensor]) -> dict[str, str]:
    """About 200 bytes that the model writes after the first 32 of the held-out text, at a fixed seed."""
    tokens, sizes = windows
    prompt_tokens = int((sizes[0, 1:].cumsum(0) < PROMPT_BYTES).sum()) + 1
    prompt = tokens[:1, 1 : 1 + prompt_tokens].to(model.device)
    count = math.ceil(SAMPLE_BYTES * sizes[:, 1:].numel() / int(sizes[:, 1:].sum()))
    longest = getattr(model.config, "max_position_embeddings", None)
    count = min(count, longest - prompt.shape[1]) if longest else count
    text = ""
    if count > 0:
        was_training = model.training
        model.eval()
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(SAMPLE_SEED)
            written = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=True,
                temperature=SAMPLE_TEMPERATURE,
                top_k=0,
                max_new_tokens=count,
                min_new_tokens=count,
                pad_token_id=tokenizer.eos_token_id,
            )
        model.train(was_training)
        text = tokenizer.decode(written[0, prompt.shape[1] :].tolist())
    return {"prompt": tokenizer.decode(prompt[0].tolist()), "text": text}


# --- the evaluation harness ---


def require_harness() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("--tasks: needs the evaluation harness: pip install 'tokenformer[eval]'")


def find_tasks(names: Sequence[str], include_path: str | Path | None = None) -> Any:
    """The harness's manager of tasks, which knows each of `names`: those under `include_path`, and its own.

    Raises ValueError, with the nearest name, on a task that it does not know.
    """
    from lm_eval.tasks import TaskManager

    from .nearest import nearest

    if include_path is not None:
        if not Path(include_path).is_dir():
            raise ValueError(f"--include-path {include_path}: no such folder")
        manager = TaskManager(include_path=str(include_path), include_defaults=False)
        if set(names) <= set(manager.all_tasks):  # to list its own takes the harness seconds
            return manager
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    for name in names:
        if name not in manager.all_tasks:
            near = nearest(name, manager.all_tasks)
            raise ValueError(f"--tasks {name}: the harness has no such task{near} (lm_eval ls tasks lists them)")
    return manager


def evaluate_tasks(
    model: Any, tokenizer: Any, names: Sequence[str], manager: Any, batch_size: int = 8, limit: int | None = None
) -> dict[str, Any]:
    """What the harness measures on its tasks `names`, each at its own number of examples in the prompt.

    tokenizer: transformers'. Returns "harness" (its version), "batch_size", "limit", and "tasks": of each task, and
    of each group and its parts, the metrics by the harness's names, with "_stderr", "version" and "examples".
    Raises ValueError on a task whose file or data is wrong.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    lm = HFLM(pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=batch_size)
    options = {"limit": limit, "bootstrap_iters": BOOTSTRAPS, "log_samples": False}
    try:
        found = simple_evaluate(lm, tasks=list(names), task_manager=manager, **options)
    except (ValueError, OSError, RuntimeError):  # its own words for data that is not there; no memory
        raise
    except Exception as error:  # of as many classes as a task can be wrong in: its splits, templates, metrics
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(f"--tasks {','.join(names)}: the harness stopped at {why} (--debug shows where)") from error
    tasks = {}
    for name, metrics in {**found["results"], **found.get("groups", {})}.items():
        numbers = {k.removesuffix(",none"): v for k, v in metrics.items() if isinstance(v, int | float)}
        examples = numbers.pop("sample_len", None)
        tasks[name] = {"version": found["versions"].get(name), "examples": examples, **numbers}
    about = {"harness": f"lm_eval {importlib.metadata.version('lm_eval')}", "batch_size": batch_size, "limit": limit}
    return {**about, "tasks": tasks}
