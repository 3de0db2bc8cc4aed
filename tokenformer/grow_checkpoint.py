"""Growth of a checkpoint on the disk: read, grow, measure, write a new one. The old one is not touched."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import checkpoint as files
from . import runs
from .event import change_text, grow_measured, sizes_text
from .optim import AdamW, parameter_groups

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
    if out.exists() or out.is_symlink():
        raise ValueError(f"{out} already exists; choose another place for the checkpoint")
    if out.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{out} lies inside {folder}, which is not touched; choose a place outside")
    if out.resolve().parent.name == runs.CHECKPOINTS and (out.resolve().parent.parent / runs.RECIPE).exists():
        raise ValueError(f"{out} would be taken for a checkpoint of the run around it; choose a place outside")
    model, lineage = files.load_checkpoint(folder)
    optimizer = None
    if (folder / files.OPTIMIZER).exists():
        optimizer = AdamW(parameter_groups(model, weight_decay=0.1))
        files.load_moments(folder, model, optimizer)
    ids = torch.randint(model.config.vocab_size, PROBE, generator=torch.Generator().manual_seed(0))
    growth = grow_measured(model, operator, to, ids, optimizer, seed, moments)
    event = {**growth.event, "ancestor": files.ancestry(folder)}
    say(f"{operator}: {sizes_text(event)}")
    say(f"promise: {growth.promise}" + (f" ({event['note']})" if event["note"] else ""))
    shares = ", ".join(f"{table} {share:.0%}" for table, share in event["live_at_once"].items())
    say(f"measured: {change_text(event)}; new entries that get gradient at once: {shares}")
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
