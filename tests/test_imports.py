"""Imports point one way, the front door is light, and transformers knows TokenFormer in any order of imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tokenformer

PACKAGE = Path(tokenformer.__file__).parent

# Room -> the rooms it may import: pattention <- models <- growth <- optim, checkpoint <- train <- race, and what stands
# beside that line. A room is a module of the package or a folder; within a room imports are free.
ARROW: dict[str, set[str]] = {
    "pattention": set(),
    "nearest": set(),
    "hub": set(),
    "data": {"hub"},
    "flops": set(),
    "distributed": set(),
    "recipe": {"nearest"},
    "environment": set(),
    "random_states": set(),
    "runs": {"recipe", "environment"},
    "statistics": set(),
    "report": {"recipe", "runs", "statistics"},
    "evaluate": {"models", "data", "distributed", "nearest"},
    "models": {"pattention", "nearest"},
    "growth": {"pattention", "models", "flops", "nearest"},
    "optim": {"pattention", "models", "growth"},
    "checkpoint": {"pattention", "models", "growth", "optim", "runs", "random_states"},
    "event": {"growth"},
    "rows": {"pattention", "models", "evaluate"},
    "nested": {"pattention", "models", "rows"},
    "shrink": {"pattention", "models", "growth", "rows"},
    "curve": {"runs"},
    "sparse": {"pattention", "models", "growth", "rows"},
    "inspection": {"models", "growth", "rows", "sparse"},
    "inspect_checkpoint": {
        *("models", "growth", "rows", "sparse", "inspection", "checkpoint", "evaluate", "runs", "curve"),
    },
    "grow_checkpoint": {"hub", "models", "growth", "event", "optim", "checkpoint", "runs", "flops"},
    "start": {"models", "runs", "checkpoint", "data", "recipe"},
    "schedule": {"recipe"},
    "plan": {"models", "growth", "flops", "nested", "recipe", "schedule", "start"},
    "shrink_checkpoint": {
        *("models", "growth", "rows", "shrink", "optim", "checkpoint", "grow_checkpoint", "data", "distributed"),
        *("evaluate", "flops", "recipe", "runs", "curve"),
    },
}
LOOKED_AT = {"report", "shrink_checkpoint", "sparse", "inspection", "inspect_checkpoint", "curve"}  # not in training
ARROW["state"] = {*ARROW} - LOOKED_AT - {"grow_checkpoint"}
ARROW["step"] = {*ARROW} - LOOKED_AT
ARROW["train"] = {*ARROW} - LOOKED_AT
ARROW["adapters"] = {"pattention", "models", "growth", "flops", "optim", "checkpoint", "random_states", "runs", "data"}
ARROW["adapters"] |= {"nearest", "evaluate", "distributed", "recipe", "start", "grow_checkpoint"}
ARROW["race"] = {*ARROW}
ARROW["convert"] = {"hub", "pattention", "models", "checkpoint", "runs"}
FRONT = {"__init__", "__main__", "cli", "verbs"}  # the ways in may call every room, and no room calls them


def room_of(path: Path, package: Path) -> str:
    return path.relative_to(package).parts[0].removesuffix(".py")


def imported_rooms(path: Path, package: Path) -> set[str]:
    """Rooms of the package that a file imports, at its top or inside a function, absolutely or relatively."""
    found: set[str] = set()
    rooms = {room_of(each, package) for each in package.rglob("*.py")}
    here = ("tokenformer", *path.relative_to(package).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(here[: len(here) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            names = [".".join([*base, alias.name]) for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "tokenformer":
                found.add(parts[1] if len(parts) > 1 and parts[1] in rooms else "__init__")
    return found


def against_the_arrow(package: Path) -> list[str]:
    wrong = []
    for path in sorted(package.rglob("*.py")):
        room, name = room_of(path, package), path.relative_to(package)
        if room in FRONT:
            continue
        if room not in ARROW:
            wrong.append(f"{name}: a new room; give it a line in ARROW")
            continue
        for other in sorted(imported_rooms(path, package) - {room} - ARROW[room]):
            wrong.append(f"{name} imports {other}; {room} may import {', '.join(sorted(ARROW[room])) or 'nothing'}")
    return wrong


def test_imports_follow_the_arrow() -> None:
    assert against_the_arrow(PACKAGE) == []


def test_the_arrow_itself_has_no_circle() -> None:
    left = {room: set(others) for room, others in ARROW.items()}
    while left:
        free = {room for room, others in left.items() if not others & left.keys()}
        assert free, f"a circle among {sorted(left)}"
        left = {room: others for room, others in left.items() if room not in free}


@pytest.mark.parametrize(
    "line",
    [
        "from ..growth import grow",
        "from .. import growth",
        "from tokenformer.growth.engine import grow",
        "import tokenformer.growth",
        "def f():\n    from ..growth import grow",
        "from .. import cli",
        "from tokenformer import grow",
    ],
)
def test_an_import_against_the_arrow_is_found(tmp_path: Path, line: str) -> None:
    for room in ("growth", "models"):
        (tmp_path / room).mkdir()
        (tmp_path / room / "__init__.py").write_text("import torch\n")
    for room in ("cli", "__init__"):
        (tmp_path / f"{room}.py").write_text("")
    assert against_the_arrow(tmp_path) == []
    (tmp_path / "models" / "axes.py").write_text(line)
    assert len(against_the_arrow(tmp_path)) == 1


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


LOADED = "print(sorted({'torch', 'transformers', 'numpy', 'matplotlib', 'datasets'} & set(sys.modules)))"


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["recipe", "tiny"], ["train", "tiny"]])
def test_the_command_line_answers_without_heavy_imports(arguments: list[str]) -> None:
    code = f"""
import sys, contextlib, io
from tokenformer.cli import main
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
    main({arguments!r})
{LOADED}"""
    assert python(code) == "[]\n"


def test_the_check_for_heavy_imports_can_fail() -> None:
    assert python(f"import sys, numpy\n{LOADED}") == "['numpy']\n"


KNOWN = """
from transformers import AutoConfig, AutoModelForCausalLM
config = AutoConfig.for_model("tokenformer", hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
    qkv_tokens=8, proj_tokens=8, ffn_tokens=8, vocab_size=16)
print(type(AutoModelForCausalLM.from_config(config)).__name__)
"""


@pytest.mark.parametrize(
    "first",
    [
        "import tokenformer, sys; assert 'torch' not in sys.modules",
        "from transformers import AutoModelForCausalLM\nimport tokenformer",
        "from tokenformer.models import TokenFormerConfig",
    ],
    ids=["tokenformer first", "transformers first", "models first"],
)
def test_the_auto_classes_know_tokenformer_in_any_order(first: str) -> None:
    assert python(first + KNOWN) == "TokenFormerForCausalLM\n"


def test_without_the_hook_transformers_would_not_know_tokenformer() -> None:
    asked = """
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
print("tokenformer" in CONFIG_MAPPING)"""
    unhooked = """
import sys, tokenformer
sys.meta_path.remove(next(finder for finder in sys.meta_path if type(finder).__module__ == "tokenformer"))"""
    assert python(f"import tokenformer{asked}") == "True\n"
    assert python(unhooked + asked) == "False\n"


def test_every_public_name_is_there_and_stays_what_it_is() -> None:
    import tokenformer.evaluate
    import tokenformer.train  # sets the module on the package, where the function of that name belongs

    for name in tokenformer.__all__:
        assert getattr(tokenformer, name) is not None
        assert name in dir(tokenformer)
    assert callable(tokenformer.train) and callable(tokenformer.evaluate)
    with pytest.raises(AttributeError, match="no attribute 'grwo'"):
        tokenformer.grwo  # noqa: B018
