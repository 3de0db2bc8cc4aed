"""Where something ran: the machine, the versions, the commit and the command, for environment.json and races.

And `say`, by which a process tells a line to whoever reads it.
"""

import contextlib
import datetime
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any


def say(line: str) -> None:
    """Print at once. When the reader has gone (`tokenformer train ... | head`) fall silent: the work goes on."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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


def peak_memory_bytes() -> int | None:
    """The most memory that this process has had. On Linux its ru_maxrss would be its parent's, if that had more: a
    process keeps it over exec.
    """
    with contextlib.suppress(OSError):
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
        if found:
            return int(found[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows does not say
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
