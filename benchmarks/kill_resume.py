"""Kill a run with a growth in its middle at random moments, resume it, and compare with a run that nobody killed.

    python benchmarks/kill_resume.py                    # ten kills, a few minutes on two cores
    python benchmarks/kill_resume.py --kills 50 --seed 1
    python benchmarks/kill_resume.py --recipe mine.toml train.steps=200    # another run: it should take some seconds

Each trial starts the command line's own `tokenformer train`, sends SIGKILL at a moment drawn evenly from the time
that the whole run takes, resumes it to the end, and compares weights, optimizer state and random states bit for bit,
and every line of metrics but for its seconds. The control, another seed, must differ. Exit code 1 if anything is red.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TINY = ["train.steps=300", "growth.0.at_step=150", "train.checkpoint_every=20", "train.evaluate_every=50"]
ALWAYS = ["train.threads=1", "train.device=cpu"]


def main() -> int:
    arguments = parse()
    draw = random.Random(arguments.seed)
    recipe = [arguments.recipe or "tiny", *ALWAYS, *([] if arguments.recipe else TINY), *arguments.overrides]
    with tempfile.TemporaryDirectory() as place:
        whole = Path(place) / "whole"
        finish(whole, recipe)
        control = Path(place) / "control"
        finish(control, [*recipe, "train.seed=1"])
        seconds = span(whole)
        print(f"not killed: {outcome(whole)}, {seconds:.1f} s from its first file to its result")
        bad = 0
        for trial in range(arguments.kills):
            run = Path(place) / f"killed-{trial}"
            moment, step = kill(run, recipe, draw, seconds)
            finish(run, recipe)
            same = contents(run) == contents(whole)
            bad += not same
            verdict = "same bits" if same else "DIFFERENT"
            print(f"kill {trial + 1}: after {moment:.2f} s, newest checkpoint {step}: {verdict}", flush=True)
        differs = contents(control) != contents(whole)
        print(
            f"control, another seed: {'different, as it must be' if differs else 'THE SAME: the comparison is blind'}"
        )
        print(f"{arguments.kills - bad} of {arguments.kills} killed runs ended with the same bits")
    return 1 if bad or not differs else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Kill and resume a growing run; compare the bits at its end."
    )
    parser.add_argument("--kills", type=int, default=10, help="trials (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (%(default)s)")
    parser.add_argument("--recipe", metavar="RECIPE", help="a recipe file or a shipped one (tiny, made longer)")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="changes of the recipe")
    return parser.parse_args()


def start(run: Path, recipe: list[str]) -> subprocess.Popen:
    """`tokenformer train` of a recipe and its overrides."""
    command = [sys.executable, "-m", "tokenformer", "train", *recipe, "--out", str(run), "--resume"]
    path = os.pathsep.join(
        filter(None, [str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH")])
    )
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": path})


def finish(run: Path, recipe: list[str]) -> None:
    if start(run, recipe).wait() != 0:
        raise SystemExit(f"{run.name} did not finish")


def kill(run: Path, recipe: list[str], draw: random.Random, seconds: float) -> tuple[float, str]:
    """Start a run and kill it; the moment, counted from its first file, and the newest checkpoint it then had.

    A run that had its result by then was not killed at work, and is made again.
    """
    while True:
        process, moment = start(run, recipe), draw.random() * seconds
        while not (run / "recipe.json").exists():
            if process.poll() is not None:
                raise SystemExit(f"{run.name} ended before it began")
            time.sleep(0.005)
        time.sleep(moment)
        process.kill()
        process.wait()
        if not (run / "result.json").exists():
            break
        print(f"  {moment:.2f} s were too long: it had ended, which does not count")
        shutil.rmtree(run)
    steps = sorted(path.name for path in run.glob("checkpoints/step-*"))
    return moment, steps[-1] if steps else "none"


def span(run: Path) -> float:
    return (run / "result.json").stat().st_mtime - (run / "recipe.json").stat().st_mtime


def outcome(run: Path) -> str:
    result = json.loads((run / "result.json").read_text())
    return f"{result['bits_per_byte']:.6f} bits per byte after {result['step']} steps"


def contents(run: Path) -> tuple[dict[str, bytes], list[dict]]:
    """What must be equal: the tensors of the last checkpoint as bytes, and the metrics without their times."""
    newest = sorted(run.glob("checkpoints/step-*"))[-1]
    tensors = {path.name: path.read_bytes() for path in newest.glob("*.safetensors")}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return tensors, [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


if __name__ == "__main__":
    sys.exit(main())
