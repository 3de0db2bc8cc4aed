"""The run folder: everything that one training run says about itself, and nothing else knows its file names.

    RUN/recipe.json          the resolved recipe, in full         RUN/metrics.jsonl   one JSON object a line
    RUN/environment.json     hardware, versions, commit, command  RUN/checkpoints/    step-00000100/, ...
    RUN/data.json            what the corpus was                  RUN/result.json     how it ended

Whole files are written beside their place and renamed into it, so a killed process never leaves half a file
under its real name. Only metrics.jsonl is appended to; a checkpoint stores how many of its lines belong to
it, and a resumed run drops the lines that came later.
"""

import contextlib
import datetime
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

RECIPE = "recipe.json"
ENVIRONMENT = "environment.json"
DATA = "data.json"
METRICS = "metrics.jsonl"
RESULT = "result.json"
CHECKPOINTS = "checkpoints"
TENSORBOARD = "tensorboard"
RACE = "race.json"
ARMS = "arms"
LOCK = ".lock"
STEP_FOLDER = re.compile(r"step-(\d{8,})")
LOCK_SECONDS = 60.0

Say = Callable[[str], None] | None  # who is told one line of progress at a time


# --- small files ---


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` to `path` as JSON, atomically: others see the old file or the new one, never a part."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=2, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def read_json(path: str | Path) -> Any:
    """The content of a JSON file; ValueError with one line when it is missing or is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from None


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """The lines of RUN/metrics.jsonl, oldest first. A last line that was cut off by a kill is left out."""
    path = Path(run) / METRICS
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    whole = lines[:-1]  # what follows the last newline is either nothing or a line that was never finished
    try:
        return [json.loads(line) for line in whole]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: a line is not JSON ({error})") from None


class Metrics:
    """Appends lines to RUN/metrics.jsonl and counts them, having dropped all but the first `keep_lines`."""

    def __init__(self, run: str | Path, keep_lines: int = 0):
        self.path = Path(run) / METRICS
        kept = self.path.read_bytes().split(b"\n")[:-1][:keep_lines] if self.path.exists() else []
        if len(kept) < keep_lines:
            raise ValueError(f"{self.path}: has {len(kept)} lines, and the checkpoint was saved with {keep_lines}")
        temporary = self.path.with_name(f".{METRICS}.tmp-{os.getpid()}")
        temporary.write_bytes(b"".join(line + b"\n" for line in kept))
        os.replace(temporary, self.path)
        self.lines = keep_lines
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)

    def write(self, line: dict[str, Any]) -> None:
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        self.lines += 1

    def sync(self) -> None:
        """Wait until all lines are on the disk: a checkpoint must not outlive the lines that belong to it."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        # After a full disk the unwritten rest of the buffer fails again here; the first error has been
        # reported.
        with contextlib.suppress(OSError):
            self.file.close()


# --- opening a run ---


def first_difference(old: Any, new: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """The first dotted key at which two nested JSON values differ, and both values; None if equal."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*new, *(name for name in old if name not in new)]:
            found = first_difference(old.get(name), new.get(name), f"{key}.{name}" if key else name)
            if found:
                return found
        return None
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            found = first_difference(a, b, f"{key}.{i}")
            if found:
                return found
        return None
    return None if old == new else (key, old, new)


def check_folder(folder: Path, recipe: dict[str, Any], resume: bool, kind: str = "run") -> None:
    """ValueError unless `folder` is free for `recipe` (from recipe_to_dict), or holds it and is resumed.

    A folder that holds files but no run (or race, by `kind`) is not free. Nothing is written.
    """
    stored = folder / {"run": RECIPE, "race": RACE}[kind]
    if stored.exists():
        if not resume:
            raise ValueError(f"{folder} already holds a {kind}; --resume continues it")
        before = read_json(stored)
        require_same_recipe(folder, before["recipe"] if kind == "race" else before, recipe)
    elif folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; a {kind} is a folder")
    elif folder.exists() and any(not is_begun(path.name) for path in folder.iterdir()):
        raise ValueError(f"{folder} holds files but no {kind}; choose a new or an empty folder")


def is_begun(name: str) -> bool:
    """Whether a run that was killed before it wrote recipe.json leaves a file of that name."""
    return name.startswith(".") or name in (ENVIRONMENT, DATA)


def open_run(folder: Path, recipe: dict[str, Any], data: dict[str, Any]) -> None:
    """Remove what a killed process left half written; write environment.json, data.json and recipe.json."""
    remove_unfinished(folder)
    record_environment(folder)
    write_json(folder / DATA, data)
    if not (folder / RECIPE).exists():  # last: with it, the folder holds a run
        write_json(folder / RECIPE, json.loads(json.dumps(recipe)))


def require_same_recipe(folder: Path, stored: dict[str, Any], recipe: dict[str, Any]) -> None:
    difference = first_difference(stored, json.loads(json.dumps(recipe)))
    if difference:
        key, old, new = difference
        raise ValueError(f"{folder} was begun with another recipe: {key} is {old!r} there and {new!r} here")


def remove_unfinished(folder: Path) -> None:
    """Remove the hidden temporary files and folders that a killed process left in a run folder."""
    for place in (folder, folder / CHECKPOINTS):
        for path in place.glob(".*.tmp-*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: str | Path, seconds: float = LOCK_SECONDS) -> Iterator[None]:
    """Hold the run folder for this process alone; the lock falls when the process ends, however it ends.

    A process told to stop may still be writing its checkpoint when the next one comes: wait that long for it.
    """
    try:
        import fcntl
    except ImportError:  # no such locks on Windows
        yield
        return
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        file = open(Path(folder) / LOCK, "w")  # noqa: SIM115 (held open for as long as the lock is held)
    except OSError as error:
        raise ValueError(f"{folder}: cannot be written ({error.strerror})") from None
    with file:
        deadline = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise ValueError(f"{folder} is in use by another process") from None
                time.sleep(0.1)
        try:
            yield
        finally:
            if [path.name for path in Path(folder).iterdir()] == [LOCK]:  # refused: leave nothing behind
                shutil.rmtree(folder)


# --- checkpoints of a run ---


def checkpoint_folder(run: str | Path, step: int) -> Path:
    return Path(run) / CHECKPOINTS / f"step-{step:08d}"


def checkpoints(run: str | Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first. A folder gets such a name only once it is complete."""
    found = []
    for path in (Path(run) / CHECKPOINTS).glob("step-*"):
        match = STEP_FOLDER.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match[1]), path))
    return [path for _, path in sorted(found)]


def prune_checkpoints(run: str | Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints; each is renamed first, so none is ever half of one."""
    for path in checkpoints(run)[:-keep]:
        doomed = path.with_name(f".{path.name}.tmp-{os.getpid()}")
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


# --- where it ran ---


def record_environment(folder: Path) -> None:
    """Write environment.json, or add this start to its list `resumed` when the run was started before."""
    path = folder / ENVIRONMENT
    if path.exists():
        stored = read_json(path)
        stored.setdefault("resumed", []).append(environment())
        write_json(path, stored)
    else:
        write_json(path, environment())


def environment() -> dict[str, Any]:
    """The machine, the versions, the source's commit and the command of this process, ready for JSON."""
    import torch

    commit, dirty = source_commit(Path(__file__).resolve().parent)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "memory_gb": memory_gb(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {name: version(name) for name in ("tokenformer", "torch", "transformers", "numpy")},
        "commit": commit,
        "dirty": dirty,
        "command": command(),
        "threads": torch.get_num_threads(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def command() -> str:
    """The command line of this process as a person would type it."""
    program = Path(sys.argv[0]).name
    if program in ("cli.py", "__main__.py"):
        program = "tokenformer"
    return shlex.join([program, *sys.argv[1:]])


def source_commit(package: Path) -> tuple[str | None, bool | None]:
    """Commit of the package's repository, and whether tracked files were changed; None outside one."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(package), *arguments], capture_output=True, text=True, timeout=20)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        if not git("ls-files", "__init__.py"):  # an installed package may lie inside somebody else's repository
            return None, None
        commit = git("rev-parse", "HEAD")
        return (commit, bool(git("status", "--porcelain", "--untracked-files=no"))) if commit else (None, None)
    except (OSError, subprocess.SubprocessError):
        return None, None


def usable_cores() -> int:
    """The cores that this process may use, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None
