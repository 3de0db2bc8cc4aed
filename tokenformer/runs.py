"""The run folder: everything that one training run says about itself, and nothing else knows its file names.

    RUN/recipe.json          the resolved recipe, in full         RUN/metrics.jsonl   one JSON object a line
    RUN/environment.json     hardware, versions, commit, command  RUN/checkpoints/    step-00000100/, ...
    RUN/data.json            what the corpus was                  RUN/result.json     how it ended
    RUN/start.json           the checkpoint that the run goes on from, if any, and what that had cost and seen

`step` and `steps` are this run's own. `flops`, `tokens` and `seconds`, of training, include the ancestors wherever
they are written. `unique_tokens` and `epochs` are of this run's own text, what data.skip_tokens passes over included.

Whole files are written beside their place and renamed into it, so a killed process never leaves half a file
under its real name. Only metrics.jsonl is appended to; a checkpoint stores how many of its lines belong to
it, and a resumed run drops the lines that came later.
"""

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from .environment import environment
from .recipe import recipe_from_dict, recipe_to_dict

RECIPE = "recipe.json"
ENVIRONMENT = "environment.json"
DATA = "data.json"
START = "start.json"
METRICS = "metrics.jsonl"
RESULT = "result.json"
CHECKPOINTS = "checkpoints"
TENSORBOARD = "tensorboard"
RACE = "race.json"
ARMS = "arms"
LOCK = ".lock"
STEP_FOLDER = re.compile(r"step-(\d{8,})")
LOCK_SECONDS = 60.0
# What a checkpoint had cost and seen, in trainer.json, start.json and the lineage.
COST: dict[str, Any] = {"flops": int, "tokens": int, "seconds": int | float, "streams": list}

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
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):  # which names the temporary file, or none
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def read_json(path: str | Path) -> Any:
    """The content of a JSON file; ValueError with one line when it is missing or is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from None


def read_object(path: str | Path, kinds: dict[str, Any]) -> dict[str, Any]:
    """The JSON object in a file; ValueError unless it has a value of the given type under each of these keys."""
    return require_object(read_json(path), kinds, str(path))


def require_object(value: Any, kinds: dict[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: must be a JSON object, and is {str(value)[:40]}")
    for key, kind in kinds.items():
        if not isinstance(value.get(key), kind):
            found = str(value[key])[:40] if key in value else "missing"
            raise ValueError(f"{where}: {key} must be of type {getattr(kind, '__name__', kind)}, and is {found}")
    return value


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


def finished_result(folder: Path) -> dict[str, Any] | None:
    """result.json of a run that took all its steps; None of another."""
    if not (folder / RESULT).exists():
        return None
    result = read_object(folder / RESULT, {"status": str})
    if result["status"] != "finished":
        return None
    return require_object(result, {"bits_per_byte": float, "step": int}, str(folder / RESULT))


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
        before = read_object(stored, {"recipe": dict})["recipe"] if kind == "race" else read_object(stored, {})
        require_same_recipe(folder, before, recipe)
    elif folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; a {kind} is a folder")
    elif folder.exists() and any(not is_begun(path.name) for path in folder.iterdir()):
        raise ValueError(f"{folder} holds files but no {kind}; choose a new or an empty folder")


def is_begun(name: str) -> bool:
    """Whether a run that was killed before it wrote recipe.json leaves a file of that name."""
    return name.startswith(".") or name in (ENVIRONMENT, DATA, START)


def open_run(
    folder: Path, recipe: dict[str, Any], data: dict[str, Any], start: dict[str, Any] | None = None
) -> None:
    """Remove what a killed process left half written; write environment.json, data.json, start.json, recipe.json.

    ValueError, and nothing is touched, where the run was begun on another text.
    """
    if (folder / RECIPE).exists() and (folder / DATA).exists():
        require_same_texts(folder, texts_of(read_object(folder / DATA, {})), texts_of(data))
    remove_unfinished(folder)
    record_environment(folder)
    write_json(folder / DATA, data)
    if not (folder / RECIPE).exists():
        if start:
            write_json(folder / START, start)
        # Last: with it, the folder holds a run.
        write_json(folder / RECIPE, json.loads(json.dumps(recipe)))


def record_environment(folder: Path) -> None:
    """Write environment.json, or add this start to its list `resumed` when the run was started before."""
    path = folder / ENVIRONMENT
    if path.exists():
        stored = read_object(path, {})
        stored.setdefault("resumed", []).append(environment())
        write_json(path, stored)
    else:
        write_json(path, environment())


def require_same_recipe(folder: Path, stored: dict[str, Any], recipe: dict[str, Any]) -> None:
    difference = first_difference(in_full(stored), in_full(recipe))
    if difference:
        key, old, new = difference
        raise ValueError(f"{folder} was begun with another recipe: {key} is {old!r} there and {new!r} here")


def texts_of(data: dict[str, Any]) -> dict[str, str]:
    """The SHA-256 of the tokens that data.json speaks of, trained on and held out; fewer in one of an older version."""
    files, names = data.get("token_files") or {}, {"the training text": "train.bin", "the held-out text": "valid.bin"}
    return {name: files[file]["sha256"] for name, file in names.items() if file in files}


def require_same_texts(folder: Path, stored: dict[str, str], texts: dict[str, str]) -> None:
    for name, sha256 in texts.items():
        before = stored.get(name, sha256)
        if before != sha256:
            raise ValueError(
                f"{folder} was begun with another text: {name} had SHA-256 {before[:12]}… then and has {sha256[:12]}… "
                "now; put it back, or begin in another folder"
            )


def in_full(recipe: dict[str, Any]) -> dict[str, Any]:
    """As JSON has it, with the defaults of keys that came after it was written; as it is where it is no recipe now."""
    with contextlib.suppress(ValueError):
        recipe = recipe_to_dict(recipe_from_dict(recipe, RECIPE))
    return json.loads(json.dumps(recipe))


def remove_unfinished(folder: Path) -> None:
    """Remove the hidden temporary files and folders that a killed process left in a run folder."""
    for place in (folder, folder / CHECKPOINTS):
        for path in place.glob(".*.tmp-*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def missing(folder: str | Path) -> list[Path]:
    """Of a folder and those above it, the ones that do not exist, deepest first."""
    return [path for path in (Path(folder), *Path(folder).parents) if not path.exists()]


def remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


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
    made = missing(folder)
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        file = open(Path(folder) / LOCK, "w")  # noqa: SIM115 (held open for as long as the lock is held)
    except OSError as error:
        remove_empty(made)
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
                (Path(folder) / LOCK).unlink()
                remove_empty(made)


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


def prune_checkpoints(run: str | Path, keep: int, kept_steps: Collection[int] = ()) -> None:
    """Remove all but the newest `keep` checkpoints and those of `kept_steps`; each is renamed first, so that none is
    ever half of one."""
    kept = {checkpoint_folder(run, step) for step in kept_steps}
    for path in checkpoints(run)[:-keep]:
        if path in kept:
            continue
        doomed = path.with_name(f".{path.name}.tmp-{os.getpid()}")
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
