"""Was a race re-made to the same digits?    python records/compare.py records/NAME/report.json runs/again/report.json

Compares every trial and every headline run that both reports hold; exit code 1 when any differs or none is shared.
"""

import json
import sys
from pathlib import Path
from typing import Any


def results(path: Path) -> dict[str, Any]:
    """What every run of a race came to, by arm, seed and budget, or learning rate; FLOPs included."""
    found: dict[str, Any] = {}
    for arm in json.loads(path.read_text(encoding="utf-8"))["arms"]:
        for trial in arm["trials"]:
            found[f"{arm['name']} trial {trial['learning_rate']:g}"] = (trial["bits_per_byte"], trial["flops"])
        for run in arm["runs"]:
            name = f"{arm['name']} seed {run['seed']} at {run['share']:g}"
            found[name] = (run["bits_per_byte"], run["final_bits_per_byte"], run["flops"])
    return {name: values for name, values in found.items() if values[0] is not None}


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
