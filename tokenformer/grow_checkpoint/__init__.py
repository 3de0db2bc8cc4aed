"""Growth of a checkpoint on the disk: planned, grown, measured, written anew. The old one is not touched.

Weights pass through one tensor at a time (shards.py): the memory that growth needs does not depend on the number of
layers. Where that cannot be, the whole model grows in memory, and the reason is said.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import checkpoint as files
from .. import runs
from ..models.portable import keep_portable
from .measure import MEASURES, measured
from .plan import prepare
from .shards import MAX_SHARD_BYTES
from .words import measured_lines, plan_lines
from .write import copy_others, require_place, write_in_memory, write_streamed

__all__ = ["grow_checkpoint", "plan_lines", "prepare"]


@files.quiet()
def grow_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    operator: str,
    to: dict[str, int],
    moments: str = "keep",
    seed: int = 0,
    say: Callable[[str], None] = print,
    options: dict[str, Any] | None = None,
    measure: str = "auto",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Grow the model in `checkpoint` (a folder, a run's newest, or a name on the hub) into the new folder `out`.

    operator, to, moments, seed, options: as in `grow`.

    Each weight keeps the dtype that it is stored in. Moments, if the checkpoint has them, grow with the weights; the
    lineage gets one entry. What the growth did is measured on random tokens, said, and written down: with `measure`
    "full" logits, gradients and copies; "logits" those alone; "none" nothing; "auto" what the size allows.
    Raises ValueError as `load_checkpoint`, `grow` and `save_checkpoint` do; nothing half written is left.
    """
    out = Path(out)
    if measure not in MEASURES:
        raise ValueError(f"measure: {measure!r} is not known; allowed: {', '.join(MEASURES)}")
    prepared = prepare(checkpoint, operator, to, moments, seed, options)
    require_place(out, prepared)
    for line in plan_lines(prepared):
        say(line)
    with files.written_whole(out) as temporary:
        rounding = write_in_memory(prepared, temporary, moments, max_shard_bytes)
        if not prepared.in_memory:
            rounding = write_streamed(prepared, temporary, max_shard_bytes, say)
        copy_others(prepared.folder, temporary)
        keep_portable(prepared.new.config, temporary)
        event = {**prepared.event, "ancestor": files.ancestry(prepared.folder), **rounding}
        event |= measured(prepared, temporary, measure)
        runs.write_json(temporary / files.LINEAGE, [*prepared.lineage, event])
    for line in measured_lines(event):
        say(line)
    say(f"written: {out}, {files.gigabytes(prepared.bytes)} of weights")
    return out
