"""The files of a grown checkpoint: weights one tensor at a time, or, where that cannot be, the whole model at once."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from .. import checkpoint as files
from ..growth import freeze_as_grown, grow
from ..growth.weights import grown_reader
from ..optim import AdamW, named_state, parameter_groups
from .measure import NewEntries
from .names import parts_of, whole_of
from .plan import Prepared
from .shards import Size, read_tensor, write_shards

SECONDS_OF_SILENCE = 5.0
# Of a checkpoint's files these are written anew or belong to weights that are; all others are copied.
NOT_COPIED = (
    *("config.json", files.LINEAGE, files.TRAINER, ".*", "*.safetensors", "*.index.json"),
    *("*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx", "*.gguf"),
)


def require_place(out: Path, prepared: Prepared) -> None:
    files.require_free(out, prepared.folder)
    files.require_room(out, prepared.bytes)


def write_streamed(
    prepared: Prepared, folder: Path, max_shard_bytes: int, say: Callable[[str], None]
) -> dict[str, float]:
    """Weights through the plans one by one, and config.json; returns the rounding of the stored dtype, if it is half.

    That is the largest relative error among old entries: factors are applied in float32, and the product is rounded.
    """

    old, new = prepared.old, prepared.new

    def stored(name: str) -> Tensor:
        if not prepared.split:
            return read_tensor(name, prepared.stored[name])
        parts = parts_of(old, name, old.get_parameter(name))
        return whole_of(old, name, {part: read_tensor(part, prepared.stored[part]) for part in parts})

    read: Callable[[str], Tensor] = stored
    for maps in prepared.maps:
        read = grown_reader(read, maps, prepared.seed)
    fresh = NewEntries(prepared, copies=False)
    rounding = 0.0

    def tensors() -> Iterator[tuple[str, Tensor]]:
        nonlocal rounding
        done, told = 0, time.monotonic()
        for i, (name, size) in enumerate(prepared.sizes.items()):
            tensor = read(name)
            rounding = max(rounding, largest_rounding(tensor, size.dtype, fresh.get(name)))
            yield from parts_of(new, name, tensor).items() if prepared.split else [(name, tensor)]
            done += size.bytes
            if time.monotonic() - told > SECONDS_OF_SILENCE:
                told = time.monotonic()
                gone = f"{files.gigabytes(done)} of {files.gigabytes(prepared.bytes)}"
                say(f"{i + 1} of {len(prepared.sizes)} tensors, {gone}")

    sizes = prepared.sizes
    if prepared.split:
        wholes = {name: parts_of(new, name, p).items() for name, p in new.named_parameters()}
        sizes = {part: Size(tuple(t.shape), sizes[name].dtype) for name, parts in wholes.items() for part, t in parts}
    with torch.no_grad():
        write_shards(folder, sizes, tensors(), max_shard_bytes)
    config = new.config
    config.architectures = config.architectures or [type(new).__name__]
    config.save_pretrained(folder)
    half = {size.dtype for size in prepared.sizes.values()} & {torch.bfloat16, torch.float16}
    return {"largest_rounding": rounding} if half else {}


def largest_rounding(tensor: Tensor, dtype: torch.dtype, new: Tensor | None) -> float:
    """Largest |rounded - exact| / |exact| over the entries of `tensor` that are not `new`; some rows at a time."""
    if tensor.dtype == dtype or tensor.numel() == 0:
        return 0.0
    rows = max(1, 2**24 * len(tensor) // tensor.numel())
    masks = [None] * len(tensor) if new is None else new.expand_as(tensor).split(rows)
    largest = 0.0
    for part, mask in zip(tensor.split(rows), masks, strict=False):
        error = part.to(dtype).to(part).sub_(part).abs_()
        if mask is not None:
            error.masked_fill_(mask, 0)
        if bool(error.any()):
            largest = max(largest, error.div_(part.abs().clamp_(min=torch.finfo(part.dtype).tiny)).max().item())
    return largest


def write_in_memory(prepared: Prepared, folder: Path, moments: str, max_shard_bytes: int) -> dict[str, float]:
    """The whole model, and its optimizer's state if there is one, grown as `growth.grow` does."""
    if not prepared.in_memory:
        return {}
    model, _ = files.load_checkpoint(prepared.folder)
    freeze_as_grown(model, prepared.lineage)
    optimizer = None
    if (prepared.folder / files.OPTIMIZER).exists():
        optimizer = AdamW(parameter_groups(model, weight_decay=0.1))
        files.load_moments(prepared.folder, model, optimizer)
    event = prepared.event
    growth = grow(model, prepared.operator, event["to"], optimizer, prepared.seed, moments, event["options"])
    with files.quiet():
        growth.model.save_pretrained(folder, max_shard_size=max_shard_bytes)
    if optimizer is not None:
        files.save_tensors(named_state(growth.optimizer, growth.model), folder / files.OPTIMIZER)
    return {}


def copy_others(folder: Path, target: Path) -> None:
    """Tokenizer, generation settings and whatever else lies beside the weights, as it is."""
    for file in folder.iterdir():
        if file.is_file() and not any(file.match(pattern) for pattern in NOT_COPIED):
            shutil.copyfile(file, target / file.name)
