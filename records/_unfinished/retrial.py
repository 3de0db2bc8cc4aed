"""Some arms' trials made again by the rules as they are now: python retrial.py RECIPE REPORT OUT ARM...

In a folder with the record's texts. REPORT is the record's report.json, whose grid of rates is taken. Prints each arm's
trials, and the rate that it ran at beside the one that it would choose now.
"""

import json
import sys
from pathlib import Path

from tokenformer.race import race_of
from tokenformer.race.jobs import best_rate, bits_of, trial
from tokenformer.race.processes import run_jobs
from tokenformer.recipe import load_recipe


def main() -> None:
    if len(sys.argv) < 5:
        sys.exit(__doc__)
    recipe, report, out, *names = sys.argv[1:]
    written = json.loads(Path(report).read_text(encoding="utf-8"))
    rates = written["race"]["learning_rates"]
    race = race_of(load_recipe(recipe), Path(out))
    arms = [arm for arm in race.arms if arm.name in names]
    jobs = [trial(race, arm, rate) for rate in rates for arm in arms]
    Path(out).mkdir(exist_ok=True)
    run_jobs(lambda: [job for job in jobs if bits_of(race.place(job.name)) is None], Path(out), 2, print)
    for arm in arms:
        found = {rate: bits_of(race.place(trial(race, arm, rate).name)) for rate in rates}
        ran = next(each["learning_rate"] for each in written["arms"] if each["name"] == arm.name)
        print(arm.name, found, f"ran at {ran:g}, would choose {best_rate(race, arm, rates):g}")


if __name__ == "__main__":
    main()
