"""What a stopped race has finished, without weights or paths of this machine: python pack.py RACE_FOLDER NAME.tar.xz

A headline run whose branches are not all finished needs its checkpoints: it is left out, with its branches.
"""

import io
import sys
import tarfile
from pathlib import Path

from tokenformer import runs
from tokenformer.race.jobs import bits_of


def complete(run: Path, budgets: list[float]) -> bool:
    if run.parent.name == "tune":
        return bits_of(run) is not None
    trunk = run.with_name(run.name.partition("_at-")[0])
    parts = [trunk, *(trunk.with_name(f"{trunk.name}_at-{share:g}") for share in budgets[:-1])]
    return all(bits_of(part, final=True) is not None for part in ([run] if run.name.endswith("_cosine") else parts))


def main(race: str, out: str) -> None:
    folder = Path(race)
    budgets = runs.read_json(folder / "race.json")["race"]["budgets"]
    found = [run for pattern in ("tune/*", "seed-*") for run in folder.glob(f"arms/*/{pattern}")]
    kept = [run for run in found if complete(run, budgets)]
    files = [folder / "race.json"]
    for run in kept:
        inside = (path for path in run.rglob("*") if path.is_file() and path.name != ".lock")
        files += [path for path in inside if path.suffix != ".safetensors"]
    with tarfile.open(out, "w:xz") as tar:
        for path in sorted(files):
            content = path.read_bytes().replace(f"{folder.parent.resolve()}/".encode(), b"")
            entry = tar.gettarinfo(path, str(path.relative_to(folder.parent)))
            entry.size, entry.uname, entry.gname = len(content), "", ""
            tar.addfile(entry, io.BytesIO(content))
    print(f"{len(kept)} runs, {Path(out).stat().st_size:,} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
