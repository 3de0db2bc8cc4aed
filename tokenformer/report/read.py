"""Run and race folders -> one plain dict with every number of the page (what report.json holds).

Files: RACE/race.json names the arms; each arm, like a single run, is a folder with recipe.json,
environment.json, data.json, metrics.jsonl and, once it ended, result.json.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

AXIS_KEYS = ("step", "flops", "tokens", "seconds")
CURVES = {"train": ("loss", "learning_rate", "grad_norm"), "eval": ("loss", "bits_per_byte")}
FINISHED_KEYS = ("step", "bits_per_byte", "flops", "tokens", "seconds", "epochs", "unique_tokens")
GROWTH_KEYS = (
    "operator",
    "from",
    "to",
    "promise",
    "max_logit_change",
    "parameters_before",
    "parameters_after",
)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. ValueError, naming the file, where it is missing, broken or no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; is {path.parent} a run folder?") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:  # also UnicodeDecodeError
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def finite(value: Any) -> Any:
    """`value` with every NaN and infinity, at any depth, as None: strict JSON has no word for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return value


def number(line: dict[str, Any], key: str, where: str) -> float:
    value = line.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where}: {key} must be a number, found {value!r}")
    return value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl as the run stands now.

    A last line without its end is what a kill leaves and is dropped; any other broken line raises ValueError.
    A resumed run goes back to its last checkpoint and writes some steps again: the later lines count.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; the run has written no metrics") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    rows = text.split("\n")
    kept: list[dict[str, Any]] = []
    for index, row in enumerate(rows, start=1):
        if not row.strip():
            continue
        where = f"{path} line {index}"
        try:
            line = json.loads(row)
        except ValueError:
            if index == len(rows):  # no newline after it: cut off while being written
                break
            raise ValueError(f"{where}: not JSON: {row[:60]!r}") from None
        if not isinstance(line, dict) or line.get("kind") not in ("train", "eval", "growth"):
            raise ValueError(f"{where}: kind must be train, eval or growth: {row[:60]!r}")
        for key in AXIS_KEYS:
            number(line, key, where)
        for key in GROWTH_KEYS if line["kind"] == "growth" else ():
            if key not in line:
                raise ValueError(f"{where}: a growth without {key}")
        if kept and line["step"] < kept[-1]["step"]:
            kept = [old for old in kept if old["step"] < line["step"]]
        grown = sum(old["kind"] == "growth" for old in kept)  # an evaluation before and one after it are two
        line["_key"] = [line["kind"], line["step"], line.get("to", grown)]
        kept = [old for old in kept if old["_key"] != line["_key"]] + [line]
    for line in kept:
        del line["_key"]
    return kept


def curves_of(lines: list[dict[str, Any]]) -> dict[str, dict[str, list[float | None]]]:
    """{"train" | "eval": {quantity: one value per line}}; None where a value is absent or not finite."""
    return {
        kind: {
            key: [finite(line.get(key)) for line in lines if line["kind"] == kind] for key in AXIS_KEYS + keys
        }
        for kind, keys in CURVES.items()
    }


def read_run(folder: Path, name: str | None = None, description: str = "") -> dict[str, Any]:
    """One run as an arm of the report. Without result.json it is unfinished and its last metrics stand in."""
    recipe = read_json(folder / "recipe.json")
    lines = read_metrics(folder / "metrics.jsonl")
    result_path = folder / "result.json"
    result = read_json(result_path) if result_path.exists() else {"status": "unfinished"}
    status = result.get("status")
    if status not in ("finished", "stopped", "failed", "unfinished"):
        raise ValueError(f"{result_path}: status must be finished, stopped or failed, found {status!r}")
    for key in FINISHED_KEYS if status == "finished" else ():
        if not math.isfinite(number(result, key, str(result_path))):
            raise ValueError(f"{result_path}: {key} of a finished run must be finite, found {result[key]}")
    if status == "finished" and (not lines or lines[-1]["step"] != result["step"]):
        ends = f"ends at step {lines[-1]['step']}" if lines else "is empty"
        raise ValueError(f"{folder / 'metrics.jsonl'}: {ends}, and the run took {result['step']}: cut short")
    curves = curves_of(lines)
    last: dict[str, Any] = lines[-1] if lines else {}
    train, model = recipe.get("train") or {}, recipe.get("model") or {}

    def ended(key: str) -> Any:
        return result[key] if result.get(key) is not None else last.get(key)

    def evaluated(key: str) -> Any:
        measured = [value for value in curves["eval"][key] if value is not None]
        return result[key] if result.get(key) is not None else measured[-1] if measured else None

    arm = {
        "name": name or result.get("name") or recipe.get("name") or folder.name,
        "description": description or recipe.get("description") or "",
        "status": status,
        "error": result.get("error"),
        "step": ended("step") or 0,
        "steps": result.get("steps") or train.get("steps"),
        "architecture": model.get("architecture", "tokenformer"),
        "shape": shape_of(model),
        "parameters": result.get("parameters") or {},
        "learning_rate": train.get("learning_rate"),
        "bits_per_byte": evaluated("bits_per_byte"),
        "loss": evaluated("loss"),
        "flops": ended("flops"),
        "flops_budget": train.get("flops"),
        "flops_per_token": result.get("flops_per_token"),
        "tokens": ended("tokens"),
        "unique_tokens": result.get("unique_tokens"),
        "epochs": result.get("epochs"),
        "reads_again": bool(result.get("reads_again")),
        "seconds": ended("seconds"),
        "peak_memory_bytes": result.get("peak_memory_bytes"),
        "growth": [
            {k: line[k] for k in (*AXIS_KEYS, *GROWTH_KEYS, "growth_flops", "trigger", "slope") if k in line}
            for line in lines
            if line["kind"] == "growth"
        ],
        "sample": result.get("sample"),
        "checkpoint": result.get("checkpoint"),
        "curves": curves,
        "recipe": recipe,
        "environment": read_json(folder / "environment.json"),
        "data": read_json(folder / "data.json"),
    }
    return finite(arm)


def shape_of(model: dict[str, Any]) -> dict[str, Any]:
    """The fields of [model] that name a size or a choice, whether kept under `fields` or beside it."""
    outer = {k: v for k, v in model.items() if k not in ("architecture", "fields") and v is not None}
    return {**outer, **(model.get("fields") or {})}


def absent_arm(name: str, description: str) -> dict[str, Any]:
    """An arm of a race that has not started: a name and no numbers."""
    keys = (
        "error",
        "steps",
        "architecture",
        "learning_rate",
        "bits_per_byte",
        "loss",
        "flops",
        "flops_budget",
    )
    more = ("flops_per_token", "tokens", "unique_tokens", "epochs", "reads_again", "seconds", "sample", "checkpoint")
    empty = dict.fromkeys(keys + more)
    rest: dict[str, Any] = {"shape": {}, "parameters": {}, "growth": [], "curves": curves_of([]), "step": 0}
    files: dict[str, Any] = {"recipe": {}, "environment": {}, "data": {}}
    return {"name": name, "description": description, "status": "not started", **empty, **rest, **files}


def read_race(folder: Path) -> dict[str, Any]:
    """All arms of a race in its own order. An arm whose folder holds no metrics yet has not started."""
    race_path = folder / "race.json"
    race = read_json(race_path)
    entries = race.get("arms")
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{race_path}: arms must be a list of at least one arm")
    noise = race.get("noise")
    if noise is not None:
        deviation = number(noise, "standard_deviation_bits_per_byte", f"{race_path} noise")
        if not (math.isfinite(deviation) and deviation >= 0):
            raise ValueError(
                f"{race_path} noise: standard_deviation_bits_per_byte must be >= 0, found {deviation}"
            )
    arms = []
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict) or not entry.get("name") or not entry.get("folder"):
            raise ValueError(f"{race_path}: arms[{index}] needs a name and a folder, found {entry!r}")
        name, place = str(entry["name"]), folder / entry["folder"]
        description = entry.get("description") or ""
        started = (place / "metrics.jsonl").exists() or (place / "result.json").exists()
        arms.append(read_run(place, name, description) if started else absent_arm(name, description))
    names_of(arms, race_path)
    if all(arm["status"] == "not started" for arm in arms):
        raise ValueError(f"{folder}: no arm of this race has started; there is nothing to report")
    environment = race.get("environment") or next(a["environment"] for a in arms if a["environment"])
    return finite(
        {
            "kind": "race",
            "name": race.get("name") or folder.name,
            "description": race.get("description") or "",
            "command": race.get("command") or environment.get("command"),
            "environment": environment,
            "noise": noise,
            "arms": arms,
        }
    )


def names_of(arms: list[dict[str, Any]], path: Path) -> list[str]:
    """The arms' names; ValueError, naming race.json, where two have one."""
    names = [arm["name"] for arm in arms]
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: two arms have one name: {sorted(n for n in names if names.count(n) > 1)[0]}")
    return names


def read_folder(folder: Path) -> dict[str, Any]:
    """A race folder or a run folder; ValueError for anything else."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    if (folder / "race.json").exists():
        return read_race(folder)
    if not any((folder / name).exists() for name in ("recipe.json", "metrics.jsonl", "result.json")):
        raise ValueError(f"{folder}: neither a run (no recipe.json) nor a race (no race.json)")
    arm = read_run(folder)
    head = {"kind": "run", "name": arm["name"], "description": arm["description"], "noise": None}
    return {
        **head,
        "command": arm["environment"].get("command"),
        "environment": arm["environment"],
        "arms": [arm],
    }
