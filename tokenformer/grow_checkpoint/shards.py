"""Safetensors files read and written one tensor at a time, so that a model larger than the memory passes through it.

A file is 8 bytes with the length of a header, the header as JSON (name -> dtype, shape, place), and the tensors' bytes.
Shards and their index are named as transformers names them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
MAX_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Size:
    """What a tensor takes in a file, before it is there."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Stored(Size):
    """A tensor in a file."""

    file: Path


def stored_tensors(files: Iterable[Path]) -> dict[str, Stored]:
    """Every tensor of the files, by its name; ValueError where a file is cut short, or holds quantised weights."""
    found: dict[str, Stored] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
                kinds = {name: (tuple(each.get_shape()), each.get_dtype()) for name, each in slices.items()}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: truncated or not a safetensors file ({error})") from None
        for name, (shape, dtype) in kinds.items():
            if dtype not in DTYPES:
                raise ValueError(f"{file}: {name} is stored as {dtype}; growth takes {', '.join(DTYPES)}")
            found[name] = Stored(shape, DTYPES[dtype], file)
    return found


def read_tensor(name: str, stored: Stored) -> Tensor:
    """A copy in memory; the file is let go of. ValueError where it holds NaN or infinite values."""
    with safe_open(stored.file, framework="pt") as tensors:
        tensor = tensors.get_tensor(name).clone()
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{stored.file}: {name} holds NaN or infinite values")
    return tensor


def write_shards(
    folder: Path, sizes: Mapping[str, Size], tensors: Iterable[tuple[str, Tensor]], max_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write `tensors`, which come one by one, as model.safetensors, or as shards of at most `max_bytes` and an index.

    `sizes` has every tensor that will come, in any order; each is converted to the dtype there.
    """
    shards = _shards(sizes, max_bytes)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    places: dict[str, tuple[Path, int]] = {}
    for file, shard in zip(names, shards, strict=True):
        offsets = _write_header(folder / file, {name: sizes[name] for name in shard})
        places |= {name: (folder / file, offset) for name, offset in offsets.items()}
    for name, tensor in tensors:
        size, (file_path, offset) = sizes[name], places.pop(name)
        assert tuple(tensor.shape) == size.shape, f"{name}: {tuple(tensor.shape)} came, {size.shape} was foreseen"
        with open(file_path, "r+b") as opened:
            opened.seek(offset)
            opened.write(tensor.to(size.dtype).contiguous().reshape(-1).view(torch.uint8).numpy().data)
    assert not places, f"{', '.join(places)} did not come"
    if len(shards) > 1:
        total = {
            "total_parameters": sum(math.prod(size.shape) for size in sizes.values()),
            "total_size": sum(size.bytes for size in sizes.values()),
        }
        where = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": total, "weight_map": dict(sorted(where.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(sizes: Mapping[str, Size], max_bytes: int) -> list[list[str]]:
    """Names in their order, in groups of at most `max_bytes`; a tensor that is larger has a group of its own."""
    shards: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if shards[-1] and held + size.bytes > max_bytes:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size.bytes
    return shards


def _write_header(path: Path, sizes: Mapping[str, Size]) -> dict[str, int]:
    """Begin a file; returns where each tensor's bytes go. Wide dtypes come first, so that each tensor is aligned."""
    words = {dtype: word for word, dtype in DTYPES.items()}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets, end = {}, 0
    for name in sorted(sizes, key=lambda each: -sizes[each].dtype.itemsize):
        size = sizes[name]
        offsets[name] = end
        header[name] = {
            "dtype": words[size.dtype],
            "shape": list(size.shape),
            "data_offsets": [end, end + size.bytes],
        }
        end += size.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    return {name: 8 + len(text) + offset for name, offset in offsets.items()}
