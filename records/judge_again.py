"""The runs of a race that has ended, judged on another text: python judge_again.py RACE TEXT OUT.json

RACE is the folder of a race with its checkpoints, TEXT a file that its runs have not read. Its headline runs of the
whole budget are evaluated on the text and compared by the race's rules (docs/fairness.md, 20 and 21); RACE stays as it
is.
"""

import sys
from pathlib import Path
from typing import Any

from tokenformer import runs
from tokenformer.race.final import judge, note_judged, sha256_of
from tokenformer.recipe import recipe_from_dict
from tokenformer.report.race.numbers import budget_of
from tokenformer.report.race.read import read_full_race


def main(race: str, text: str, out: str) -> None:
    report = read_full_race(Path(race))
    report["race"]["final_text"], share = text, report["race"]["budgets"][-1]
    found: dict[str, Any] = {}
    for arm in report["arms"]:
        for run in (run for run in arm["runs"] if run["share"] == share and run["status"] == "finished"):
            folder = Path(race, runs.ARMS, arm["name"], f"seed-{run['seed']}")
            recipe = recipe_from_dict(runs.read_json(folder / runs.RECIPE), str(folder))
            found = judge(recipe, folder, text, 10**9)
            run |= {"final_bits_per_byte": found["bits_per_byte"], "final_stretches": found["stretches"]}
            print(f"{folder}: {found['bits_per_byte']:.4f}", flush=True)
    budget = budget_of(report, share)
    said = {key: found[key] for key in ("text_sha256", "tokens", "bytes")} | {"s": budget["s"], "df": budget["df"]}
    said["arms"] = {cell["arm"]: {"mean": cell["mean"], "seeds": cell["values"]} for cell in budget["arms"]}
    for arm in report["arms"]:
        each = [run["final_stretches"] for run in arm["runs"] if run["share"] == share and run["final_stretches"]]
        said["arms"][arm["name"]]["stretches"] = [sum(bits) / len(bits) for bits in zip(*each, strict=True)]
    runs.write_json(Path(out), {**said, "pairs": budget["pairs"]})
    note_judged(Path(race), sha256_of(text))


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
