"""Generation, by `model.generate`: with and without the key-value cache, and against the other sides with it.

    python benchmarks/decode.py                          the quickstart's grown size and 4x256
    python benchmarks/decode.py --size 12x768            minutes: without a cache, the work is quadratic
    python benchmarks/decode.py --size 12x768 --device cuda

Greedy, one sequence, from a prompt of --prompt tokens up to --tokens in all. A round times every side once.
The correctness check comes first: ours writes the same tokens with the cache and without, and the same as
the published formulation; when it is red, no table is printed and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rounds import Check, all_right, interleave, ratio, surroundings
from sides import SIDES, Size, build_sides, parse_size, sizes_agree
from torch import Tensor

THREADS = torch.get_num_threads()


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(sys.argv[1:] if argv is None else argv)
    try:
        sizes = [parse_size(text) for text in args.size]
        if not 0 < args.prompt < args.tokens:
            raise ValueError(f"--prompt: {args.prompt}; allowed: 1 to {args.tokens - 1}, below --tokens")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    results = []
    for size in sizes:
        found = measure(size, args)
        if found is None:
            return 1
        results.append(found)
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1) + "\n")
    return 0


def measure(size: Size, args: argparse.Namespace) -> dict[str, Any] | None:
    """Seconds a generation by side and round; None when the check was red."""
    torch.set_num_threads(args.threads or size.threads or THREADS)
    print(f"\n== {size.describe()}, {args.tokens} tokens")
    print(f"   {surroundings(args.device, args.clock)}")
    torch.manual_seed(0)
    sides = {name: model.eval() for name, model in build_sides(size, args.device).items()}
    prompt = torch.randint(size.config.vocab_size, (1, args.prompt), device=args.device)
    checks = sizes_agree(sides) + same_tokens(sides, prompt, args)
    if not all_right(checks, "float32"):
        return None
    timed: dict[str, Callable[[], Any]] = {
        name: lambda model=sides[name]: generate(model, prompt, args.tokens) for name in SIDES
    }
    timed["ours without cache"] = lambda: generate(sides["ours"], prompt, args.tokens, use_cache=False)
    seconds = interleave(timed, args.rounds, warm=0, device=args.device, clock=args.clock)
    print(f"\n-- medians of {args.rounds} rounds; time against ours with the cache (above 1: ours is faster)")
    for name, each in seconds.items():
        middle = statistics.median(each)
        written = (args.tokens - args.prompt) / middle
        print(f"   {name:<20} {written:>8.1f} tokens/s   {ratio(each, seconds['ours'])}", flush=True)
    return {"size": size.name, "tokens": args.tokens, "device": args.device, "seconds": seconds}


@torch.no_grad()
def generate(model: Any, prompt: Tensor, tokens: int, use_cache: bool = True) -> Tensor:
    """Greedy continuation of a prompt (1, T) to exactly `tokens` tokens in all."""
    model.generation_config.eos_token_id = None  # an end mark, should one come, must not end the timing
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_length=tokens,
        do_sample=False,
        use_cache=use_cache,
        pad_token_id=0,
    )


def same_tokens(sides: dict[str, Any], prompt: Tensor, args: argparse.Namespace) -> list[Check]:
    """Whether ours writes the same with the cache and without, and the same as the published formulation."""
    tokens = min(args.tokens, args.prompt + args.check_tokens)
    cached = generate(sides["ours"], prompt, tokens)
    if args.break_cache:
        cached = cached.flip(-1)
    checks = []
    for line, other in (
        ("ours without the cache", generate(sides["ours"], prompt, tokens, use_cache=False)),
        ("the published formulation", generate(sides["published"], prompt, tokens)),
    ):
        equal = int((cached == other).sum())
        checks.append((f"ours with the cache and {line}: {equal} of {tokens} tokens equal", equal == tokens))
    return checks


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    add = parser.add_argument
    add("--size", nargs="+", default=["quickstart", "4x256"], help="quickstart or LAYERSxWIDTH")
    add("--tokens", type=int, default=512, help="length of the text, the prompt included (default: 512)")
    add("--prompt", type=int, default=8, help="of which prompt (default: 8)")
    add("--check-tokens", type=int, default=64, help="tokens that the check has written (default: 64)")
    add("--rounds", type=int, default=5, help="rounds of the interleaved run (default: 5)")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--threads", type=int, default=0, help="CPU threads (default: the size's own, or torch's)")
    add("--clock", choices=["wall", "cpu"], default="wall", help="cpu: CPU time, on a machine that is shared")
    add("--json", metavar="FILE", help="write the seconds of every round")
    add("--break-cache", action="store_true", help="spoil the cached text: the check must turn red")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
