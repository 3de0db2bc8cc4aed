"""Folders of full races, fabricated: the files that a race leaves, from a function that says how each run ended."""

import importlib.util
import json
import math
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

RECORDS = Path(__file__).resolve().parent.parent / "records"
ENVIRONMENT = {
    "python": "3.11.9",
    "platform": "Linux-6.1-x86_64",
    "cpu": "Some CPU @ 2.8 GHz",
    "cores": 2,
    "memory_gb": 7.6,
    "gpu": None,
    "versions": {"tokenformer": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "numpy": "2.3.1"},
    "commit": "0123456789abcdef0123456789abcdef01234567",
    "dirty": False,
    "command": "tokenformer race fair",
    "threads": 1,
    "started": "2030-01-01T12:00:00+00:00",
}
DATA = {"source": "prose", "tokenizer": "bytes", "train_tokens": 19_500_321, "valid_tokens": 9_999, "sha256": "ab" * 32}
CHECKS = {"overlap": 0.012, "lzma_bits_per_byte": 2.4, "final_overlap": None, "final_held_out_overlap": None}
FLOPS, STEPS, TOKENS_PER_STEP = 1.2e13, 1000, 2048
GREW_AT = 0.3  # of the whole budget

# What an arm is, beside its name: role, of, controls, whether it grows, parameters at start and end, more of its
# model.
OWN = {"scratch": "scratch", "small": "small"}
GROWS = {"role": "arm", "grows": True, "parameters": (412_000, 720_000), "controls": OWN}
ARMS: dict[str, dict[str, Any]] = {
    "grown": {**GROWS, "controls": {**OWN, "dropped": "dropped"}},
    "grown late": GROWS,
    "scratch": {"role": "scratch", "of": "grown", "parameters": (720_000, 720_000)},
    "small": {"role": "small", "of": "grown", "parameters": (412_000, 412_000)},
    "dropped": {"role": "dropped", "of": "grown", "grows": True, "parameters": (412_000, 720_000)},
    "size 560 k": {"role": "size", "of": "grown", "parameters": (560_000, 560_000)},
    "copy of scratch": {"role": "copy", "of": "scratch", "parameters": (720_000, 720_000)},
}
ASIDE = {"grown": 0.0, "grown late": 0.012, "scratch": 0.03, "small": 0.055, "dropped": 0.02, "size 560 k": 0.025}

Loss = Callable[[str, float, int, float], float | None]


def script_of_records(name: str) -> Any:
    """One of the scripts that stand beside the records, as a module."""
    specification = importlib.util.spec_from_file_location(name, RECORDS / f"{name}.py")
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def wobble(*key: Any) -> float:
    """A number from -1 to 1 that depends on the key alone."""
    return random.Random(repr(key)).uniform(-1, 1)


def plausible(arm: str, rate: float, seed: int, budget: float, s: float = 0.004) -> float:
    """Bits per byte: a power law of the budget, the arm's own distance, the seed's, the rate's, and some rest."""
    away = ASIDE.get(arm.removeprefix("copy of "), 0.0)
    tuned = 0.05 * math.log2(rate / 0.004) ** 2
    seed_effect = 0.015 * wobble(seed)
    return 2.0 + 0.35 * budget**-0.3 + away + tuned + seed_effect + 1.7 * s * wobble(arm, seed, budget, rate)


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_run(
    place: Path,
    name: str,
    arm: dict[str, Any],
    rate: float,
    seed: int,
    share: float,
    final: float | None,
    **changes: Any,
) -> None:
    """A run decayed by `share` of the budget; its folder's name says where it starts from. None: it diverged."""
    steps, branch = round(STEPS * share), "_at-" in place.name
    start = round(steps * 0.8) if branch else 0
    grew = round(STEPS * GREW_AT) if "tune" not in place.parts else round(steps * GREW_AT)
    sizes = arm["parameters"]
    lines: list[dict[str, Any]] = []

    def at(step: int) -> dict[str, Any]:
        return {
            "step": step - start,
            "flops": FLOPS * step / STEPS,
            "tokens": step * TOKENS_PER_STEP,
            "seconds": 200.0 * step / STEPS,
        }

    def evaluation(step: int, bits: float) -> None:
        lines.append({"kind": "eval", "loss": bits * math.log(2), "bits_per_byte": bits, **at(step)})

    end = 2.9 if final is None else final
    for step in [*range(start, steps, 20), steps]:
        bits = end + (8.0 - end) * (1 - step / steps) * (1 + step / 12) ** -0.75
        if step > start:
            lines.append(
                {"kind": "train", "loss": bits * math.log(2), "learning_rate": rate, "grad_norm": 0.8, **at(step)}
            )
        if step % 40 == 0 or step == steps or step == grew:
            evaluation(step, bits)
        if arm.get("grows") and step == grew and step > start:
            growth = {
                "operator": "zero_keys",
                "from": {"ffn_tokens": 256},
                "to": {"ffn_tokens": 512},
                "promise": "exact",
            }
            size = {"parameters_before": sizes[0], "parameters_after": sizes[1], "max_logit_change": 2.4e-7}
            lines.append({"kind": "growth", **growth, **size, "growth_flops": 1e9, **at(step)})
            evaluation(step, bits)
            lines[-1]["bits_per_byte"] = bits + arm.get("rise", 0.0)
    grown = arm.get("grows") and steps >= grew
    total = sizes[1] if grown or not arm.get("grows") else sizes[0]
    result = {
        "status": "failed" if final is None else "finished",
        "error": "the loss is nan" if final is None else None,
        "step": steps - start,
        "steps": steps - start,
        "bits_per_byte": final,
        "loss": None if final is None else final * math.log(2),
        "flops": FLOPS * steps / STEPS,
        "tokens": steps * TOKENS_PER_STEP,
        "unique_tokens": steps * TOKENS_PER_STEP,
        "epochs": 0.1,
        "seconds": 200.0 * steps / STEPS * (0.8 + total / 2e6),
        "parameters": {"total": total, "active": total, "embedding": 32_768, "other": total - 32_768},
        "peak_memory_bytes": 600_000_000 + total * 16,
        **changes,
    }
    rows, target = (size // 1_000 for size in sizes)
    model = {"architecture": arm.get("architecture", "tokenformer"), "hidden_size": 128, "ffn_tokens": rows}
    event = {"to": {"ffn_tokens": target}, "at_fraction": GREW_AT, "operator": arm.get("operator", "zero_keys")}
    recipe = {
        "name": name,
        "description": "",
        "model": {**model, **arm.get("model", {})},
        "data": {"source": "prose", "tokenizer": "bytes", "sequence_length": 256, "batch_size": 8, "seed": seed},
        "train": {"flops": FLOPS * share, "learning_rate": rate, "schedule": "wsd", "weight_decay": 0.1},
        "growth": [event] if arm.get("grows") else [],
    }
    recipe["train"]["seed"] = seed + 10_000 * (arm["role"] == "copy")
    if place.name.endswith("_cosine"):
        recipe["train"]["schedule"] = "cosine"
    for file, value in (("recipe", recipe), ("environment", ENVIRONMENT), ("data", DATA), ("result", result)):
        write(place / f"{file}.json", value)
    (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_full_race(
    folder: Path,
    arms: dict[str, dict[str, Any]] | None = None,
    loss: Loss = plausible,
    rates: Iterable[float] = (0.002, 0.004, 0.008),
    budgets: Iterable[float] = (0.25, 0.5, 1.0),
    seeds: Iterable[int] = (0, 1, 2),
    reference: str | None = "scratch",
    cosine: Iterable[str] = (),
    final: Loss | None = None,
    checks: dict[str, Any] | None = None,
    skip: Callable[[str, int, float], bool] = lambda arm, seed, budget: False,
    changed: Callable[[str, int, float], dict[str, Any]] = lambda arm, seed, budget: {},
    **race: Any,
) -> Path:
    """A race folder in which `loss(arm, rate, seed, share)` is how each run ended: None, diverged; inf, infinite.

    `final` is the same on the final text. `skip` leaves headline runs out; `changed` gives keys of their result.json.
    """
    arms, rates, budgets, seeds = arms or ARMS, list(rates), list(budgets), list(seeds)
    entries = []
    for name, arm in arms.items():
        place = folder / "arms" / name
        start, end = (
            {"total": p, "active": p, "embedding": 32_768, "other": p - 32_768} for p in arm["parameters"]
        )
        entries.append(
            {
                "name": name,
                "description": arm.get("description", f"what {name} is"),
                "role": arm["role"],
                "of": arm.get("of"),
                "controls": arm.get("controls", {}),
                "folder": f"arms/{name}",
                "architecture": arm.get("architecture", "tokenformer"),
                "config": arm.get("config", {}),
                "grows": bool(arm.get("grows")),
                "parameters": start,
                "parameters_end": end,
            }
        )
        trials = {rate: loss(name, rate, 1000, 0.2) for rate in rates}
        best = arm.get("rate") or min(rates, key=lambda rate: math.inf if trials[rate] is None else trials[rate])
        if arm["role"] not in ("copy", "dropped"):
            for rate, ended in trials.items():
                write_run(place / "tune" / f"lr-{rate:g}", name, arm, rate, 1000, 0.2, ended)
        for seed in seeds:
            for share in budgets:
                if skip(name, seed, share):
                    continue
                run = place / (f"seed-{seed}" if share == max(budgets) else f"seed-{seed}_at-{share:g}")
                write_run(
                    run, name, arm, best, seed, share, loss(name, best, seed, share), **changed(name, seed, share)
                )
                tested = final(name, best, seed, share) if final else None
                if tested is not None:
                    write(run / "final.json", {"bits_per_byte": tested, "text_sha256": "ef" * 32, "tokens": 50_000})
        if name in cosine:
            ended = loss(name, best, seeds[0], max(budgets))
            write_run(
                place / f"seed-{seeds[0]}_cosine", name, arm, best, seeds[0], max(budgets), ended and ended + 0.01
            )
    about = {
        "learning_rates": rates,
        "tune_fraction": 0.2,
        "tune_flops": 0.2 * FLOPS,
        "budgets": budgets,
        "flops": FLOPS,
        "seeds": seeds,
        "reference": reference,
        "final_text": "final.txt" if final else None,
        "cosine": list(cosine),
    }
    head = {"name": "fair", "description": "Does growth pay?", "recipe": {}, "command": "tokenformer race fair"}
    rest = {"environment": ENVIRONMENT, "noise": None, "race": about, "checks": {**CHECKS, **(checks or {})}}
    write(folder / "race.json", {**head, **rest, "arms": entries, **race})
    return folder
