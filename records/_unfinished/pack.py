"""What a stopped race has finished, without weights: python pack.py RACE_FOLDER NAME.tar.xz

A headline run whose branches are not all finished needs its checkpoints: it is left out, with its branches.
"""

import json
import sys
import tarfile
from pathlib import Path

SHARES = ("0.25", "0.5")  # race.budgets below the whole one, as folders are named


def finished(run: Path) -> bool:
    if not (run / "result.json").exists():
        return False
    result = json.loads((run / "result.json").read_text())
    return result["status"] == "finished" or bool(result.get("diverged"))


def complete(run: Path) -> bool:
    trunk = run.with_name(run.name.partition("_at-")[0])
    parts = [trunk, *(trunk.with_name(f"{trunk.name}_at-{share}") for share in SHARES)]
    alone = run.parent.name == "tune" or run.name.endswith("_cosine")
    return all(map(finished, [run] if alone else parts))


def main(race: str, out: str) -> None:
    folder = Path(race)
    kept = [run for pattern in ("tune/*", "seed-*") for run in folder.glob(f"arms/*/{pattern}") if complete(run)]
    files = [folder / "race.json"]
    for run in kept:
        inside = (path for path in run.rglob("*") if path.is_file() and path.name != ".lock")
        files += [path for path in inside if path.suffix != ".safetensors"]
    with tarfile.open(out, "w:xz") as tar:
        for path in sorted(files):
            tar.add(path, path.relative_to(folder.parent))
    print(f"{len(kept)} runs, {Path(out).stat().st_size:,} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
