"""Timing in turn: every side once a round, the order turning with the rounds, ratios formed inside a round.

What disturbs a machine for longer than a round then disturbs both halves of a ratio alike.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

Check = tuple[str, bool]  # what was compared, and whether it came out right


def interleave(
    sides: dict[str, Callable[[], Any]],
    rounds: int,
    fill: float = 0.0,
    warm: int = 2,
    device: str = "cpu",
    clock: str = "wall",
) -> dict[str, list[float]]:
    """Seconds that one call of each side takes, one number a round, after `warm` calls that are not timed.

    A side is called as often a round as takes `fill` seconds. `clock` is "wall", or "cpu" for this process's
    CPU time.
    """
    now = time.process_time if clock == "cpu" else time.perf_counter

    def seconds(run: Callable[[], Any], times: int) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        start = now()
        for _ in range(times):
            run()
        if device == "cuda":
            torch.cuda.synchronize()
        return (now() - start) / times

    repeats = {}
    for name, run in sides.items():
        for _ in range(warm):  # first calls allocate, and compile
            run()
        repeats[name] = max(1, round(fill / seconds(run, 1))) if fill else 1
    found: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for i in range(rounds):
        turn = i % len(names)
        for name in names[turn:] + names[:turn]:
            found[name].append(seconds(sides[name], repeats[name]))
    return found


def ratio(above: list[float], below: list[float]) -> str:
    """Median and range of above / below over the rounds."""
    each = [a / b for a, b in zip(above, below, strict=True)]
    return f"{statistics.median(each):.3f} ({min(each):.2f} - {max(each):.2f})"


def all_right(checks: list[Check], title: str) -> bool:
    """Print the correctness check; False, with a line on stderr, when any of it is red."""
    print(f"\n-- correctness, {title}")
    for line, right in checks:
        print(f"   {'ok ' if right else 'RED'} {line}", flush=True)
    right = all(right for _, right in checks)
    if not right:
        print("the correctness check is red: no table", file=sys.stderr)
    return right


def surroundings(device: str, clock: str) -> str:
    """Version, machine and load: what a figure cannot be read without."""
    cpu = f"{platform.machine()}, {torch.get_num_threads()} threads"
    where = torch.cuda.get_device_name() if device == "cuda" else cpu
    load = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    return f"torch {torch.__version__}, {where}, {load} at the start, {clock} clock"
