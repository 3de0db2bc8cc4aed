"""One run of a race's record made again, in minutes: python remake_run.py records/NAME/report.json ARM SEED OUT

In a folder with the record's texts, at a commit that the report names. Trains the arm at the rate that was chosen for
it, to the whole budget, and tests it on the final text. OUT/report.json is for compare.py, which says whether all
digits agree.
"""

import json
import sys
from pathlib import Path
from typing import Any

from tokenformer import runs
from tokenformer.race.arms import with_seed
from tokenformer.race.final import evaluate_final
from tokenformer.race.jobs import FINAL
from tokenformer.recipe import recipe_from_dict
from tokenformer.train import train


def main(report: str, name: str, seed: str, out: str) -> None:
    written: dict[str, Any] = json.loads(Path(report).read_text(encoding="utf-8"))
    arms = {arm["name"]: arm for arm in written["arms"]}
    if name not in arms:
        sys.exit(f"{name!r} is no arm of {report}: it has {', '.join(arms)}")
    arm, race = arms[name], written["race"]
    recipe = with_seed(recipe_from_dict(arm["recipe"], f"{report}: {name}"), int(seed), arm["role"])
    folder = Path(out, "run")
    result = train(recipe, folder, resume=True)
    run = {"seed": int(seed), "share": 1.0, "bits_per_byte": result["bits_per_byte"], "flops": result["flops"]}
    if race["final_text"]:
        evaluate_final(recipe, folder, race["final_text"], race["final_tokens"])
        run["final_bits_per_byte"] = runs.read_json(folder / FINAL)["bits_per_byte"]
    runs.write_json(Path(out, "report.json"), {"arms": [{"name": name, "trials": [], "runs": [run]}]})


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    main(*sys.argv[1:])
