"""Grow a 1-billion-parameter Llama-shaped checkpoint in bfloat16 on the disk, and hold its peak memory to a bound.

    python benchmarks/grow_large.py                     # minutes on two cores; 8 GB of disk
    python benchmarks/grow_large.py --scale 0.1 --out numbers.json

A random checkpoint is written tensor by tensor; `tokenformer grow` makes hidden size and feed-forward half wider and
the model a quarter deeper, by `zero`, in a process of its own whose memory is sampled. Then transformers loads both
folders and the logits are compared; the control, the grown model with what must be zero not zero, has to differ. Exit
code 1 where the peak is above 1.3 times the size of what was written, or a check is red.

VmHWM is the peak that the kernel keeps of the process: its own memory (RssAnon) and the pages of files that it has
mapped and touched (RssFile), such as the weights that it measures on. Each of the two has its own largest sample.
"""

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tokenformer.environment import environment
from tokenformer.grow_checkpoint.shards import Size, write_shards

BOUND = 1.3
ABOUT = ("command", "commit", "dirty", "versions", "python", "cores", "memory_gb")  # of where it ran
CONTROL = 5  # times as far as the grown model, the spoilt one must be
LAYERS, HIDDEN, FFN, VOCABULARY = 20, 2048, 5632, 32000  # 1.01e9 parameters


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    ran = {key: value for key, value in environment().items() if key in ABOUT}
    with tempfile.TemporaryDirectory(dir=arguments.place) as place:
        old, new = Path(place) / "old", Path(place) / "new"
        config = write_random(old, arguments.scale)
        to = {"hidden_size": config.hidden_size * 3 // 2, "intermediate_size": config.intermediate_size * 3 // 2}
        to["num_hidden_layers"] = config.num_hidden_layers * 5 // 4
        words = [word for field, size in to.items() for word in ("--to", f"{field}={size}")]
        command = ["grow", str(old), str(new), "--operator", "zero", *words, "--measure", arguments.measure]
        print("$ tokenformer " + " ".join(command).replace(f"{place}/", ""), flush=True)
        numbers = sampled([sys.executable, "-m", "tokenformer", *command])
        if not new.exists():
            return 1
        numbers["input_bytes"], numbers["output_bytes"] = size_of(old), size_of(new)
        numbers["peak_over_output"] = round(numbers["VmHWM"] / numbers["output_bytes"], 3)
        numbers |= compared(old, new, config)
        event = json.loads((new / "lineage.json").read_text(encoding="utf-8"))[-1]
        numbers["environment"] = ran
        numbers["event"] = {key: value for key, value in event.items() if key != "ancestor"}
    print(json.dumps(numbers, indent=2))
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(numbers, indent=2) + "\n")
    exact = numbers["logit_change"] < numbers["control_logit_change"] / CONTROL
    within = numbers["peak_over_output"] <= BOUND
    print(f"peak {numbers['peak_over_output']} of the output's size: {'within' if within else 'ABOVE'} {BOUND}")
    print(f"logits: {'the same function' if exact else 'NOT THE SAME, or the control is blind'}")
    return 0 if exact and within else 1


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Grow a large random checkpoint; hold the peak memory to a bound.")
    parser.add_argument("--scale", type=float, default=1.0, help="of hidden size and feed-forward (%(default)s)")
    parser.add_argument("--measure", default="auto", help="as of tokenformer grow (%(default)s)")
    parser.add_argument("--place", help="a folder on a disk with room (the system's temporary one)")
    parser.add_argument("--out", help="write the numbers here as well")
    return parser.parse_args(argv)


def write_random(folder: Path, scale: float) -> LlamaConfig:
    """A Llama whose weights are random, gains too, never held in memory as a whole."""
    hidden, ffn = (int(size * scale) // 64 * 64 for size in (HIDDEN, FFN))
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=LAYERS,
        num_attention_heads=hidden // 64,
        num_key_value_heads=4 if hidden // 64 % 4 == 0 else 1,
        head_dim=64,
        dtype=torch.bfloat16,
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    sizes = {name: Size(tuple(p.shape), torch.bfloat16) for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, size in sizes.items():
            drawn = torch.randn(size.shape, generator=generator)
            yield name, 0.02 * drawn if len(size.shape) > 1 else 1 + 0.2 * drawn

    folder.mkdir()
    write_shards(folder, sizes, tensors())
    config.save_pretrained(folder)
    return config


def sampled(command: list[str]) -> dict[str, Any]:
    """Run a command to its end; the largest samples of its memory in bytes, and its seconds."""
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    largest: dict[str, float] = {}

    def sample() -> None:
        while process.poll() is None:
            try:
                text = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                return
            for key, kilobytes in re.findall(r"^(VmHWM|VmRSS|RssAnon|RssFile):\s+(\d+) kB", text, re.M):
                largest[key] = max(largest.get(key, 0), int(kilobytes) * 1024)
            time.sleep(0.02)

    watcher = threading.Thread(target=sample)
    watcher.start()
    assert process.stdout is not None
    for line in process.stdout:
        print(f"{time.monotonic() - began:7.1f} s  {line.rstrip()}", flush=True)
    process.wait()
    watcher.join()
    largest["ru_maxrss"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {**largest, "seconds": round(time.monotonic() - began, 1), "threads": torch.get_num_threads()}


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@torch.no_grad()
def compared(old: Path, new: Path, config: LlamaConfig) -> dict[str, float]:
    """Largest difference of logits between the two folders, by transformers alone, and that of a spoilt one."""
    ids = torch.randint(config.vocab_size, (1, 48), generator=torch.Generator().manual_seed(1))
    before = AutoModelForCausalLM.from_pretrained(old)(input_ids=ids).logits.double()
    model = AutoModelForCausalLM.from_pretrained(new)
    assert model.dtype == torch.bfloat16
    after = model(input_ids=ids).logits.double()
    for layer in model.model.layers:
        down = layer.mlp.down_proj.weight
        down.data = down.clone()
        down.data[: config.hidden_size, config.intermediate_size :].normal_(std=0.02)
    spoilt = model(input_ids=ids).logits.double()
    return {
        "largest_logit": before.abs().max().item(),
        "logit_change": (before - after).abs().max().item(),
        "control_logit_change": (before - spoilt).abs().max().item(),
    }


if __name__ == "__main__":
    sys.exit(main())
