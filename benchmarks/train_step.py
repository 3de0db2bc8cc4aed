"""Time and memory of a training step: this TokenFormer, the published formulation, Llama and GPT-2, in turn.

    python benchmarks/train_step.py                              the quickstart's grown size, eager
    python benchmarks/train_step.py --size 12x768 --compile      eager, then compiled
    python benchmarks/train_step.py --size 12x768 --device cuda --dtype bfloat16 --sequences 16 --length 1024

A step is forward, loss, backward, clipping and fused AdamW. A round times every side and the bare matrix
products of its step (floor.py); a ratio is formed inside a round, and shown as median and range over rounds.
On a CPU all of it runs twice: with the allocator as it is, and with glibc told to keep its memory. The
correctness check comes first; when it is red, no table is printed and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from floor import matrix_products
from rounds import all_right, interleave, ratio, surroundings
from sides import SIDES, Size, build_sides, parse_size, same_function, same_function_in_float64, sizes_agree
from torch import Tensor, nn

# Large blocks are otherwise mapped and returned at every step, and each of their pages faulted in again.
KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**36),
    "MALLOC_TOP_PAD_": str(2**26),
}
TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}  # our epsilon, which the published form lacks, and rounding


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    args = arguments(argv)
    try:
        size = parse_size(args.size, args.sequences, args.length)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if args.threads or size.threads:
        torch.set_num_threads(args.threads or size.threads)
    settings = ["as-is", "tuned"] if args.allocator == "both" else [args.allocator]
    if args.device == "cuda":
        settings = ["as-is"]  # CUDA's tensors do not come from malloc
    results: list[dict[str, Any]] = []
    for setting in settings:
        kept = all(os.environ.get(name) == value for name, value in KEEP_MEMORY.items())
        apart = setting == "tuned" and not kept
        found = in_tuned_process(argv) if apart else measure_all(size, setting, args)
        if found is None:
            return 1
        results += found
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1) + "\n")
    return 0


def in_tuned_process(argv: list[str]) -> list[dict[str, Any]] | None:
    """The same command with the allocator set by the environment, which glibc reads at the start only."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "results.json")
        command = [sys.executable, __file__, *argv, "--allocator", "tuned", "--json", str(file)]
        done = subprocess.run(command, env=os.environ | KEEP_MEMORY)
        return None if done.returncode else json.loads(file.read_text())


def measure_all(size: Size, setting: str, args: argparse.Namespace) -> list[dict[str, Any]] | None:
    """Results of the eager and, if asked for, the compiled sides; None when a check was red."""
    print(f"\n== {size.describe()}, {size.sequences} x {size.length} tokens a step, {args.dtype}")
    print(f"   {surroundings(args.device, args.clock)}, allocator {setting}")
    results = []
    for mode in ["eager", "compiled"] if args.compile else ["eager"]:
        torch.manual_seed(0)
        sides = build_sides(size, args.device)
        if args.break_side:
            break_side(sides[args.break_side], args.break_side)
        ids = torch.randint(size.config.vocab_size, (size.sequences, size.length), device=args.device)
        checks = sizes_agree(sides) + same_function_in_float64(size, args.device)
        running = {name: torch.compile(side) for name, side in sides.items()} if mode == "compiled" else sides
        with precision(args):
            checks += same_function(
                running["ours"], running["published"], ids, TOLERANCE[args.dtype], f"{args.dtype}, {mode}"
            )
        if not all_right(checks, mode):
            return None
        shared = {"size": size.name, "mode": mode, "allocator": setting, "device": args.device}
        result = shared | {"dtype": args.dtype} | measure(sides, running, ids, args)
        print_table(result, size)
        results.append(result)
    return results


def measure(
    sides: dict[str, Any], running: dict[str, Any], ids: Tensor, args: argparse.Namespace
) -> dict[str, Any]:
    """Seconds a step of every side and floor, round by round, and the bytes kept for the backward pass."""

    def loss_of(model: Any) -> Tensor:
        with precision(args):
            return model(input_ids=ids, labels=ids, use_cache=False).loss

    timed: dict[str, Callable[[], Any]] = {name: training_step(running[name], loss_of) for name in SIDES}
    for name in SIDES[1:]:  # ours has the products of the published form, which makes each in one piece
        timed[f"floor {name}"] = matrix_products(lambda name=name: loss_of(sides[name]).backward())
        sides[name].zero_grad(set_to_none=True)
    seconds = interleave(timed, args.rounds, args.fill, device=args.device, clock=args.clock)
    seconds["floor ours"] = seconds["floor published"]
    saved = {name: bytes_kept(running[name], loss_of) for name in SIDES}
    return {"seconds": seconds, "bytes_kept_for_backward": saved}


def training_step(model: Any, loss_of: Callable[[Any], Tensor]) -> Callable[[], None]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> None:
        loss_of(model).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def bytes_kept(model: Any, loss_of: Callable[[Any], Tensor]) -> int:
    """Bytes of the distinct storages that the forward pass keeps for the backward pass, parameters apart."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_of(model)
    del loss  # the graph, and with it every storage that was kept, lived until here
    return sum(kept.values())


def print_table(result: dict[str, Any], size: Size) -> None:
    seconds, saved = result["seconds"], result["bytes_kept_for_backward"]
    print(f"\n-- {result['mode']}, allocator {result['allocator']}: medians of {len(seconds['ours'])} rounds")
    print("                ms a step    tokens/s   floor, ms   step / floor           kept for backward, MiB")
    for name in SIDES:
        step, floor = (statistics.median(seconds[key]) for key in (name, f"floor {name}"))
        numbers = f"{step * 1e3:>10.2f}  {size.sequences * size.length / step:>10,.0f}  {floor * 1e3:>10.2f}"
        above = ratio(seconds[name], seconds[f"floor {name}"])
        print(f"   {name:<10}  {numbers}   {above:<20}  {saved[name] / 2**20:>8.1f}")
    print("   time against ours (above 1: ours is faster), and what ours keeps for backward against theirs")
    for name in SIDES[1:]:
        kept = f"ours / {name} kept {saved['ours'] / saved[name]:.2f}"
        print(f"   {name + ' / ours':<18} {ratio(seconds[name], seconds['ours']):<22} {kept}", flush=True)


def precision(args: argparse.Namespace) -> AbstractContextManager[Any]:
    return torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16")


def break_side(model: Any, name: str) -> None:
    """Make a side wrong, so that the check must turn red: values 1 % off, or a tenth more parameters."""
    if name in ("ours", "published"):
        with torch.no_grad():
            next(p for key, p in model.named_parameters() if key.endswith(".value")).mul_(1.01)
    else:
        model.register_parameter("spare", nn.Parameter(torch.zeros(model.num_parameters() // 10)))


def arguments(argv: list[str]) -> argparse.Namespace:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    add = parser.add_argument
    add("--size", default="quickstart", help="quickstart (default), or LAYERSxWIDTH such as 12x768")
    add("--sequences", type=int, help="sequences a step (default: the size's own)")
    add("--length", type=int, help="tokens a sequence (default: the size's own)")
    add("--rounds", type=int, default=9, help="rounds of the interleaved run (default: 9)")
    add("--fill", type=float, default=0.4, help="seconds a side runs in a round (default: 0.4)")
    add("--compile", action="store_true", help="measure all sides under torch.compile as well")
    add("--allocator", choices=["both", "as-is", "tuned"], default="both", help="default: both")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16 is autocast")
    add("--threads", type=int, default=0, help="CPU threads (default: the size's own, or torch's)")
    add("--clock", choices=["wall", "cpu"], default="wall", help="cpu: CPU time, on a machine that is shared")
    add("--json", metavar="FILE", help="write the seconds of every round and the bytes kept")
    add("--break", dest="break_side", choices=SIDES, help="make a side wrong: the check must turn red")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
