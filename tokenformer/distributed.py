"""The few things that training on several ranks needs. Without torchrun every function here does nothing.

`torchrun --nproc-per-node N -m tokenformer.cli train ...` starts N processes with RANK, LOCAL_RANK and
WORLD_SIZE in their environment; they meet over gloo on CPUs and over NCCL on GPUs.
"""

import datetime
import gc
import os
import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

WAIT = datetime.timedelta(hours=2)  # the others wait while rank 0 reads the corpus, which may be long


@dataclass(frozen=True)
class Ranks:
    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def main(self) -> bool:
        """Rank 0, the only one that writes and speaks."""
        return self.rank == 0


def start(device: str) -> tuple[Ranks, torch.device]:
    """Join the ranks that torchrun started, if it did, and choose this process's device (`train.device`)."""
    ranks = ranks_here()
    chosen = choose_device(device, ranks)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if ranks.world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=WAIT)
    return ranks, chosen


def ranks_here() -> Ranks:
    """What torchrun's environment says; ValueError where it says half of it."""
    world = os.environ.get("WORLD_SIZE", "1")
    if world == "1":
        return Ranks()
    rank, local = os.environ.get("RANK", ""), os.environ.get("LOCAL_RANK", "0")
    whole = all(number.isdecimal() for number in (world, rank, local)) and int(rank) < int(world)
    if not whole or "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        raise ValueError(
            f"WORLD_SIZE = {world!r} in the environment, and RANK = {rank!r}, LOCAL_RANK, MASTER_ADDR or MASTER_PORT "
            "does not go with it: start with torchrun, or unset WORLD_SIZE"
        )
    return Ranks(int(rank), int(world), int(local))


def choose_device(device: str, ranks: Ranks, key: str = "train.device") -> torch.device:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device):
        raise ValueError(f"{key} = {device!r}: allowed are auto, cpu, cuda, cuda:N and mps")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = device.partition(":")[0]
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{key} = {device!r}: this machine, or this PyTorch, has no CUDA device")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"{key} = {device!r}: this machine, or this PyTorch, has no MPS device")
    if kind != "cuda":
        return torch.device(device)
    chosen = torch.device(f"cuda:{ranks.local}" if device == "cuda" else device)
    if (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"{key} = {str(chosen)!r}: there are {torch.cuda.device_count()} CUDA devices")
    return chosen


def stop(ranks: Ranks) -> None:
    if ranks.world > 1 and dist.is_initialized():
        dist.destroy_process_group()


def let_go(error: BaseException, ranks: Ranks) -> None:
    """Free what the frames of an error hold, before `stop`.

    They would keep the data-parallel model, and with it the group, until after the peers are gone: freed then, gloo
    waits for them for ever.
    """
    if ranks.world > 1:
        for each in (error, error.__cause__, error.__context__):
            traceback.clear_frames(each.__traceback__ if each else None)
        gc.collect()


def sums(values: list[float], ranks: Ranks, device: torch.device) -> list[float]:
    """Each value summed over the ranks, in float64."""
    if ranks.world == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def from_main(value: Any, ranks: Ranks) -> Any:
    """Rank 0's value, on every rank."""
    if ranks.world == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gathered(value: Any, ranks: Ranks) -> list[Any]:
    """Every rank's value in order of rank, on every rank."""
    if ranks.world == 1:
        return [value]
    values: list[Any] = [None] * ranks.world
    dist.all_gather_object(values, value)
    return values


class Refused(ValueError):
    """What another rank's ValueError says; that rank prints it, so this one is `silent`."""

    silent = True


def together(work: Callable[[], Any], ranks: Ranks) -> Any:
    """`work()` on every rank, each with its own answer; where it fails on any, all raise the same ValueError."""
    if ranks.world == 1:
        return work()
    answer, failed = None, None
    try:
        answer = work()
    except (ValueError, OSError) as error:
        failed = error
    said = gathered(None if failed is None else str(failed), ranks)
    first = next((rank for rank, line in enumerate(said) if line is not None), None)
    if first is None:
        return answer
    if failed is not None and first == ranks.rank:
        raise failed
    raise Refused(said[first])


def on_main(work: Callable[[], Any], ranks: Ranks) -> Any:
    """What `work` answers on rank 0, which alone runs it, on every rank; its ValueError too."""
    return from_main(together(work if ranks.main else lambda: None, ranks), ranks)


def data_parallel(model: torch.nn.Module, ranks: Ranks, device: torch.device) -> torch.nn.Module:
    """The model with gradients averaged over the ranks; DDP must be made anew after a growth."""
    if ranks.world == 1:
        return model
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
