"""Make this record again: the quickstart's race with three seeds, and what they say of noise and of growth.

    python records/2026-11-23_quickstart/remake.py --out runs/record      about four minutes a seed on two cores

A seed sets the initial weights, the order of the text and the new rows. Writes numbers.json, and the page of seed 0
with the measured noise, into this folder.
"""

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from tokenformer.report import write_report

HERE = Path(__file__).resolve().parent
SEEDS = (0, 1, 2)
STUDENT = 4.303  # two-sided 95 % point with two degrees of freedom


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the three races")
    out = parser.parse_args().out
    for seed in SEEDS:
        seeds = [f"train.seed={seed}", f"data.seed={seed}", f"arm.grown.growth.0.seed={seed}"] if seed else []
        command = [sys.executable, "-m", "tokenformer", "quickstart", "--out", str(out / f"seed{seed}"), "--resume"]
        subprocess.run([*command, *seeds], check=True)
    numbers = summary(out)
    (HERE / "numbers.json").write_text(json.dumps(numbers, indent=1) + "\n")
    race = out / "seed0" / "race.json"
    noise = {**numbers["noise"], "source": f"records/{HERE.name}"}
    race.write_text(json.dumps(json.loads(race.read_text()) | {"noise": noise}))
    for path in write_report(out / "seed0").values():
        shutil.copy(path, HERE)
    print(json.dumps(numbers, indent=1))


def summary(out: Path) -> dict:
    """Final bits per byte by arm and seed; the pooled deviation between seeds; paired differences from `grown`."""
    results = {
        arm: [json.loads((out / f"seed{s}" / "arms" / arm / "result.json").read_text()) for s in SEEDS]
        for arm in ("grown", "scratch", "small", "llama")
    }
    final = {arm: [r["bits_per_byte"] for r in found] for arm, found in results.items()}
    pooled = math.sqrt(statistics.mean(statistics.variance(values) for values in final.values()))
    paired = {}
    for arm, values in final.items():
        if arm != "grown":
            gaps = [g - v for g, v in zip(final["grown"], values, strict=True)]
            half = STUDENT * statistics.stdev(gaps) / math.sqrt(len(gaps))
            mean = statistics.mean(gaps)
            paired[f"grown - {arm}"] = {"mean": mean, "interval_95": [mean - half, mean + half]}
    return {
        "bits_per_byte": final,
        "mean": {arm: statistics.mean(values) for arm, values in final.items()},
        "seconds": {arm: [r["seconds"] for r in found] for arm, found in results.items()},
        "max_logit_change": [r["growth"][0]["max_logit_change"] for r in results["grown"]],
        "noise": {"standard_deviation_bits_per_byte": pooled, "runs": len(SEEDS)},
        "paired": paired,
    }


if __name__ == "__main__":
    main()
