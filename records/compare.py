"""Was a record re-made to the same digits?    python records/compare.py records/NAME/report.json again/report.json

Compares every trial, headline run and cosine check that both reports hold; exit code 1 when any differs or none is
shared.
"""

import json
import sys
from pathlib import Path
from typing import Any

# What a run came to: of a race, of a model that was cut, of a memory.
FIGURES = ("bits_per_byte", "final_bits_per_byte", "cut", "age", "bits", "flops")


def results(path: Path) -> dict[str, dict[str, Any]]:
    """The figures of every run, by arm, seed and budget, or learning rate."""
    found: dict[str, dict[str, Any]] = {}
    report = json.loads(path.read_text(encoding="utf-8"))
    arms = report["arms"]
    for name, arm in arms.items() if isinstance(arms, dict) else ((arm["name"], arm) for arm in arms):
        for trial in arm.get("trials", []):
            found[f"{name} trial {trial.get('learning_rate') or trial['rate']:g}"] = trial
        for run in arm.get("runs", [{**arm, "seed": 0}]):
            found[f"{name} seed {run['seed']} at {run.get('share', 1):g}"] = run
    for check in report.get("cosine") or []:
        found[f"{check['arm']} seed {check['seed']}, cosine"] = {"bits_per_byte": check["cosine"]}
    figures = {name: {key: run[key] for key in FIGURES if run.get(key) is not None} for name, run in found.items()}
    return {name: values for name, values in figures.items() if "bits_per_byte" in values or "bits" in values}


def main(first: str, second: str) -> int:
    one, other = results(Path(first)), results(Path(second))
    shared = sorted(one.keys() & other.keys())
    apart = [name for name in shared if one[name] != other[name]]
    for name in apart:
        print(f"{name}: {one[name]} and {other[name]}")
    same = len(shared) - len(apart)
    print(f"{len(shared)} runs in both, of {len(one)} and {len(other)}; {same} the same to the digit")
    return 1 if apart or not shared else 0


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
