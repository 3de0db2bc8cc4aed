"""The folders of a full race -> its arms with every trial and run.

RACE/arms/NAME/tune/lr-0.004/     a trial
RACE/arms/NAME/seed-0/            a run of the whole budget, with final.json where there is a final text
RACE/arms/NAME/seed-0_at-0.25/    its branch that is decayed by that share of the budget
RACE/arms/NAME/seed-0_cosine/     its check on a cosine schedule
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..read import finite, names_of, number, read_json, read_run

ROLES = ("arm", "scratch", "small", "dropped", "size", "copy")
RACE_KEYS = ("learning_rates", "budgets", "seeds")  # lists of at least one number
SAME_SHARE = 1e-6
RUN_KEYS = (
    "status",
    "error",
    "step",
    "steps",
    "learning_rate",
    "bits_per_byte",
    "flops",
    "flops_budget",
    "tokens",
    "unique_tokens",
    "epochs",
    "reads_again",
    "seconds",
    "parameters",
    "peak_memory_bytes",
    "growth",
    "data",
    "environment",
)


def is_full_race(folder: Path) -> bool:
    """Whether the race is one by the rules: its race.json has a "race" table."""
    return (folder / "race.json").exists() and bool(read_json(folder / "race.json").get("race"))


def read_full_race(folder: Path) -> dict[str, Any]:
    """Everything that the folders hold, nothing judged. Raises ValueError, one line, on a broken piece."""
    path = folder / "race.json"
    stored = read_json(path)
    race, entries = stored["race"], stored.get("arms")
    if not isinstance(race, dict):
        raise ValueError(f"{path}: race must be an object, found {race!r}")
    for key in RACE_KEYS:
        if not isinstance(race.get(key), list) or not race[key]:
            raise ValueError(f"{path}: race.{key} must be a list of at least one number, found {race.get(key)!r}")
    number(race, "flops", f"{path} race")
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: arms must be a list of at least one arm")
    race = {**race, "budgets": sorted(race["budgets"])}
    race.setdefault("tune_flops", race.get("tune_fraction", 0) * race["flops"])
    arms = [read_arm(folder, entry, race, f"{path}: arms[{i}]") for i, entry in enumerate(entries)]
    names = names_of(arms, path)
    if not race.get("reference"):
        race["reference"] = next((arm["name"] for arm in arms if arm["role"] == "scratch"), names[0])
    if race["reference"] not in names:
        raise ValueError(f"{path}: race.reference is {race['reference']!r}, which is no arm: {', '.join(names)}")
    started = [run for arm in arms for run in (*arm["trials"], *arm["runs"]) if run["status"] != "not started"]
    if not started:
        raise ValueError(f"{folder}: no run of this race has started; there is nothing to report")
    environment = stored.get("environment") or started[0]["environment"]
    report = {
        "kind": "race",
        "name": stored.get("name") or folder.name,
        "description": stored.get("description") or "",
        "command": stored.get("command") or environment.get("command"),
        "environment": environment,
        "race": race,
        "checks": stored.get("checks") or {},
        "noise": None,
        "arms": arms,
    }
    return finite(report)


def read_arm(folder: Path, entry: Any, race: dict[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(entry, dict) or not entry.get("name") or not entry.get("folder"):
        raise ValueError(f"{where} needs a name and a folder, found {entry!r}")
    role = entry.get("role", "arm")
    if role not in ROLES:
        raise ValueError(f"{where}: role must be one of {', '.join(ROLES)}, found {role!r}")
    place, runs = folder / entry["folder"], []
    for seed in race["seeds"]:
        for share in race["budgets"]:
            runs.append(read_piece(run_folder(place, seed, share, race["budgets"]), seed=seed, share=share))
        if runs[-1]["status"] == "failed":  # nothing will branch off it
            missing = [run for run in runs if run["seed"] == seed and run["status"] == "not started"]
            for run in missing:
                run |= {"status": "failed", "error": runs[-1]["error"]}
    cosine = [
        read_piece(place / f"seed-{seed}_cosine", seed=seed, share=race["budgets"][-1])
        for seed in race["seeds"]
        if is_started(place / f"seed-{seed}_cosine")
    ]
    began = sorted((run for run in runs if run["status"] != "not started"), key=lambda run: -run["share"])
    first = run_folder(place, began[0]["seed"], began[0]["share"], race["budgets"]) if began else None
    return {
        "name": str(entry["name"]),
        "description": entry.get("description") or "",
        "role": role,
        "of": entry.get("of"),
        "controls": entry.get("controls") or {},
        "architecture": entry.get("architecture") or "",
        "grows": bool(entry.get("grows")),
        "parameters": entry.get("parameters") or {},
        "parameters_end": entry.get("parameters_end") or entry.get("parameters") or {},
        "recipe": read_json(first / "recipe.json") if first else {},
        "config": entry.get("config") or {},
        "learning_rate": began[0]["learning_rate"] if began else None,
        "trials": read_trials(place / "tune"),
        "runs": runs,
        "cosine": cosine,
        "data": began[0]["data"] if began else {},
    }


def run_folder(place: Path, seed: int, share: float, budgets: list[float]) -> Path:
    """seed-S for the whole budget, else the seed-S_at-SHARE whose share is that number, however it is spelt."""
    if share == budgets[-1]:
        return place / f"seed-{seed}"
    for found in sorted(place.glob(f"seed-{seed}_at-*")):
        try:
            if abs(float(found.name.partition("_at-")[2]) - share) < SAME_SHARE:
                return found
        except ValueError:
            continue
    return place / f"seed-{seed}_at-{share:g}"


def is_started(folder: Path) -> bool:
    """Whether there is something to read: a run that is just beginning has not written all its files yet."""
    files = ("recipe.json", "environment.json", "data.json", "metrics.jsonl")
    return (folder / "result.json").exists() or all((folder / name).exists() for name in files)


def read_trials(tune: Path) -> list[dict[str, Any]]:
    trials = []
    for found in filter(is_started, tune.glob("lr-*")):
        recipe = read_json(found / "recipe.json")
        number(recipe.get("train") or {}, "learning_rate", f"{found / 'recipe.json'} train")
        trials.append(read_piece(found))
    keys: tuple[str, ...] = ("status", "error", "learning_rate", "bits_per_byte", "flops", "epochs")
    keys += ("reads_again", "data", "environment")
    return sorted(({key: run[key] for key in keys} for run in trials), key=lambda trial: trial["learning_rate"])


def read_piece(folder: Path, **labels: Any) -> dict[str, Any]:
    """One run of an arm: what it came to, its growths, and its held-out loss on the way."""
    if not is_started(folder):
        empty: dict[str, Any] = {**dict.fromkeys(RUN_KEYS), "growth": [], "step": 0}
        empty |= {"parameters": {}, "data": {}, "environment": {}, "final_bits_per_byte": None, "final_sha256": None}
        empty["final_stretches"] = None
        return {**labels, **empty, "status": "not started", "curve": None}
    run = read_run(folder)
    if run["status"] == "failed" and not read_json(folder / "result.json").get("diverged", True):
        run["status"] = "stopped"  # by a full disk, say: it will be resumed
    curve = {key: run["curves"]["eval"][key] for key in ("step", "flops", "seconds", "tokens", "bits_per_byte")}
    path = folder / "final.json"
    stored = read_json(path) if path.exists() else {}
    final = number(stored, "bits_per_byte", str(path)) if path.exists() else None
    tested = {"final_bits_per_byte": final, "final_sha256": stored.get("text_sha256")}
    tested["final_stretches"] = stored.get("stretches")
    return {**labels, **{key: run[key] for key in RUN_KEYS}, **tested, "curve": curve}
