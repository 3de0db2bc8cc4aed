"""Growth of a checkpoint on the disk: read, grow, measure, write a new one. The old one is not touched."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import checkpoint as files
from .growth import grow, largest_logit_change, live_share
from .optim import AdamW, load_named_state, parameter_groups

PROBE = (2, 64)  # sequences and tokens of the batch that a growth is measured on
NOT_TOKENIZER = ("config.json", "generation_config.json", files.TRAINER, files.LINEAGE)


def grow_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    operator: str,
    to: dict[str, int],
    moments: str = "keep",
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> Path:
    """Grow the model in `checkpoint` (a folder, or a run's newest) into the new folder `out`.

    Moments, if the checkpoint has them, grow with the weights; the lineage gets one entry. What the growth did to the
    logits and to the new rows is measured on random tokens, said, and written down. Raises ValueError as
    `load_checkpoint`, `grow` and `save_checkpoint` do; nothing half written is left.
    """
    folder, out = files.find_checkpoint(checkpoint), Path(out)
    if out.exists():
        raise ValueError(f"{out} already exists; choose another place for the checkpoint")
    model, lineage = files.load_checkpoint(folder)
    optimizer = None
    if (folder / files.OPTIMIZER).exists():
        optimizer = AdamW(parameter_groups(model, weight_decay=0.1))
        load_named_state(optimizer, model, files.read_tensors(folder / files.OPTIMIZER))
    growth = grow(model, operator, to, optimizer=optimizer, seed=seed, moments=moments)
    event = growth.event
    sizes = ", ".join(f"{axis} {old} -> {event['to'][axis]}" for axis, old in event["from"].items())
    say(f"{operator}: {sizes}; {event['parameters_before']:,} -> {event['parameters_after']:,} parameters")
    say(f"promise: {growth.promise}" + (f" ({event['note']})" if event["note"] else ""))
    ids = torch.randint(model.config.vocab_size, PROBE, generator=torch.Generator().manual_seed(0))
    moved, alive = largest_logit_change(model, growth.model, ids), live_share(growth, ids)
    shares = ", ".join(f"{table} {share:.0%}" for table, share in alive.items())
    say(f"measured: logits moved by at most {moved:.1e}; new entries that get gradient at once: {shares}")
    event |= {"max_logit_change": moved, "live_at_once": alive, "ancestor": files.ancestry(folder)}
    moved_state = "none stored" if optimizer is None else event["moments"]
    say(f"optimizer moments: {moved_state}")
    written = files.save_checkpoint(
        out, growth.model, tokenizer=_Tokenizer(folder), optimizer=growth.optimizer, lineage=[*lineage, event]
    )
    say(f"written: {written}")
    return written


class _Tokenizer:
    """The tokenizer's files of a checkpoint, copied as they are."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, target: Any) -> None:
        for pattern in ("*.json", "*.txt", "*.model", "*.jinja"):
            for file in self.folder.glob(pattern):
                weights = file.name.endswith(".index.json")
                if not weights and file.name not in NOT_TOKENIZER:
                    shutil.copy(file, target)
