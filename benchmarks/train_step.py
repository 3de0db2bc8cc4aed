"""Time and memory of a training step: this TokenFormer, the published formulation, Llama and GPT-2, in turn.

    python benchmarks/train_step.py                                    the quickstart's grown size, eager
    python benchmarks/train_step.py --size 12x768 --compile            eager and compiled
    python benchmarks/train_step.py --size 12x768 --device cuda --dtype bfloat16 --sequences 16 --length 1024

A step is forward, loss, backward, clipping and fused AdamW. A round times every side and the bare matrix products of
its step (floor.py); a ratio is formed inside a round, and shown as median and range over the rounds. On a CPU all of
it runs twice: with the allocator as it is, and in a process with glibc told to keep its memory. The correctness check
comes first; when it is red, no table is printed and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from floor import matrix_products
from sides import SIDES, Size, build_sides, parse_size, same_function, same_function_in_float64, sizes_agree
from torch import Tensor, nn

# Fresh large blocks are otherwise mapped and returned at every step, and each page is faulted in again.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**36), "MALLOC_TOP_PAD_": str(2**26)}
ROUND_SECONDS = 0.4  # a side runs as many steps a round as fill this
TOLERANCE = {
    "float32": 1e-3,
    "bfloat16": 3e-2,
}  # ours adds an epsilon to the norm, which the published form lacks


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    args = _arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        size = parse_size(args.size, args.sequences, args.length)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    settings = {"as-is": ["as is"], "tuned": ["tuned"], "both": ["as is", "tuned"]}[args.allocator]
    if args.device == "cuda":
        settings = ["as is"]  # CUDA tensors do not come from malloc
    results: list[dict[str, Any]] = []
    for setting in settings:
        if setting == "tuned" and os.environ.get("MALLOC_MMAP_MAX_") != "0":
            found = _in_tuned_process(argv)
        else:
            found = _measure_all(size, setting, args)
        if found is None:
            return 1
        results += found
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1) + "\n")
    return 0


def _in_tuned_process(argv: list[str]) -> list[dict[str, Any]] | None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "results.json")
        command = [sys.executable, __file__, *argv, "--allocator", "tuned", "--json", str(file)]
        done = subprocess.run(command, env=os.environ | KEEP_MEMORY)
        return None if done.returncode else json.loads(file.read_text())


def _measure_all(size: Size, setting: str, args: argparse.Namespace) -> list[dict[str, Any]] | None:
    """Results of the eager run and, if asked for, the compiled one; None when a check was red."""
    print(f"\n== {size.describe()}\n   {_surroundings(setting, args)}", flush=True)
    results = []
    for mode in ["eager", "compiled"] if args.compile else ["eager"]:
        torch.manual_seed(0)
        torch._dynamo.reset()
        sides = build_sides(size, args.device)
        _break(sides, args.break_side)
        ids = torch.randint(size.config.vocab_size, (size.sequences, size.length), device=args.device)
        checks = sizes_agree(sides) + same_function_in_float64(size, args.device)
        running = {name: torch.compile(m) for name, m in sides.items()} if mode == "compiled" else sides
        with _precision(args):
            checks += same_function(
                running["ours"], running["published"], ids, TOLERANCE[args.dtype], args.dtype
            )
        print(f"\n-- {mode}: correctness")
        for line, right in checks:
            print(f"   {'ok ' if right else 'RED'} {line}")
        if not all(right for _, right in checks):
            print("the correctness check is red: no table", file=sys.stderr)
            return None
        result = {
            "size": size.name,
            "allocator": setting,
            "mode": mode,
            "dtype": args.dtype,
            "device": args.device,
        }
        result |= _measure(sides, running, ids, args)
        _print_table(result, mode, size)
        results.append(result)
    return results


def _measure(
    sides: dict[str, Any], running: dict[str, Any], ids: Tensor, args: argparse.Namespace
) -> dict[str, Any]:
    """Seconds per step of every side and floor, round by round, and the bytes kept for the backward pass."""
    saved = {name: _saved_bytes(running[name], ids, args) for name in SIDES}
    timed: dict[str, Callable[[], Any]] = {name: _training_step(running[name], ids, args) for name in SIDES}
    for name in SIDES[1:]:  # ours has the products of the published form, which makes them in one piece

        def training_pass(model: nn.Module = sides[name]) -> None:
            with _precision(args):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            model.zero_grad(set_to_none=True)

        timed[f"floor {name}"] = matrix_products(training_pass)
    repeats = {}
    for name, run in timed.items():
        _seconds(run, 2, args)
        repeats[name] = max(1, round(ROUND_SECONDS / _seconds(run, 1, args)))
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    names = list(timed)
    for i in range(args.rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            seconds[name].append(_seconds(timed[name], repeats[name], args) / repeats[name])
    seconds["floor ours"] = seconds["floor published"]
    return {"seconds": seconds, "saved_bytes": saved}


def _training_step(model: Any, ids: Tensor, args: argparse.Namespace) -> Callable[[], None]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> None:
        with _precision(args):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _saved_bytes(model: Any, ids: Tensor, args: argparse.Namespace) -> int:
    """Bytes of the distinct storages that the forward pass keeps for the backward pass, parameters not counted."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), _precision(args):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    del loss  # the graph, and with it every kept storage, lived until here
    return sum(kept.values())


def _seconds(run: Callable[[], Any], times: int, args: argparse.Namespace) -> float:
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    if args.device == "cuda":
        torch.cuda.synchronize()
    start = clock()
    for _ in range(times):
        run()
    if args.device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def _print_table(result: dict[str, Any], mode: str, size: Size) -> None:
    seconds, saved = result["seconds"], result["saved_bytes"]
    print(
        f"\n-- {mode}: allocator {result['allocator']}, {len(seconds['ours'])} rounds, median (lowest - highest)"
    )
    print(
        f"   {'':<10}{'ms a step':>10}  {'tokens/s':>10}  {'its floor, ms':>13}  {'step / floor':>20}  kept for backward"
    )
    for name in SIDES:
        middle, floor = statistics.median(seconds[name]), statistics.median(seconds[f"floor {name}"])
        print(
            f"   {name:<10}{middle * 1e3:>10.2f}  {size.sequences * size.length / middle:>10,.0f}  {floor * 1e3:>13.2f}  "
            f"{_ratio(seconds[name], seconds[f'floor {name}']):>20}  "
            f"{saved[name] / 2**20:>8.1f} MiB, {saved['ours'] / saved[name]:.2f} of it by ours"
        )
    for name in SIDES[1:]:
        print(f"   {name} / ours: {_ratio(seconds[name], seconds['ours'])}")
    sys.stdout.flush()


def _ratio(above: list[float], below: list[float]) -> str:
    each = [a / b for a, b in zip(above, below, strict=True)]
    return f"{statistics.median(each):.3f} ({min(each):.2f} - {max(each):.2f})"


def _precision(args: argparse.Namespace) -> AbstractContextManager[Any]:
    return torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16")


def _break(sides: dict[str, Any], name: str | None) -> None:
    """Make a side wrong on purpose, to see that the check turns red: values moved by 1 %, or too many parameters."""
    if name in ("ours", "published"):
        with torch.no_grad():
            next(p for n, p in sides[name].named_parameters() if n.endswith(".value")).mul_(1.01)
    elif name:
        sides[name].register_parameter("spare", nn.Parameter(torch.zeros(sides[name].num_parameters() // 10)))


def _surroundings(setting: str, args: argparse.Namespace) -> str:
    where = (
        torch.cuda.get_device_name()
        if args.device == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    load = f"load {os.getloadavg()[0]:.1f} of {os.cpu_count()} cores"
    return (
        f"torch {torch.__version__}, {where}, {load}, {args.dtype}, allocator {setting}, {args.clock} clock"
    )


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--size", default="quickstart", help="quickstart, or LAYERSxWIDTH (default: quickstart)"
    )
    parser.add_argument("--sequences", type=int, help="sequences a step (default: the size's own)")
    parser.add_argument("--length", type=int, help="tokens a sequence (default: the size's own)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of the interleaved run (default: 9)")
    parser.add_argument(
        "--compile", action="store_true", help="measure all sides under torch.compile as well"
    )
    parser.add_argument("--allocator", choices=["both", "as-is", "tuned"], default="both")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16: autocast"
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's own)")
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: this process's CPU time"
    )
    parser.add_argument("--json", metavar="FILE", help="write every round's seconds and the bytes kept")
    parser.add_argument(
        "--break", dest="break_side", choices=SIDES, help="make a side wrong: the check must turn red"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
