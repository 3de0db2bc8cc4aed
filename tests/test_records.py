"""Records can be held against a race that was made again."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

RECORDS = Path(__file__).resolve().parent.parent / "records"


@pytest.fixture(scope="module")
def compare() -> Any:
    specification = importlib.util.spec_from_file_location("compare", RECORDS / "compare.py")
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def report(path: Path, bits: float, seeds: int = 2) -> str:
    runs = [
        {"seed": seed, "share": 1.0, "bits_per_byte": bits + seed, "final_bits_per_byte": None, "flops": 10}
        for seed in range(seeds)
    ]
    trials = [{"learning_rate": 0.01, "bits_per_byte": 3.0, "flops": 1}]
    path.write_text(json.dumps({"arms": [{"name": "a", "trials": trials, "runs": runs}]}))
    return str(path)


def test_a_race_that_was_made_again_is_compared_digit_by_digit(compare: Any, tmp_path: Path, capsys: Any) -> None:
    first, again = report(tmp_path / "1.json", 2.0), report(tmp_path / "2.json", 2.0, seeds=3)
    assert compare.main(first, again) == 0
    assert "3 runs in both, of 3 and 4; 3 the same to the digit" in capsys.readouterr().out
    assert compare.main(first, report(tmp_path / "3.json", 2.0 + 1e-15)) == 1
    assert "a seed 0 at 1: (2.0, None, 10) and (2.000000000000001, None, 10)" in capsys.readouterr().out


def test_every_record_says_what_it_is() -> None:
    folders = [path for path in RECORDS.iterdir() if path.is_dir() and not path.name.startswith("_")]
    assert folders
    for folder in folders:
        assert (folder / "README.md").exists(), folder.name
        assert sum(path.stat().st_size for path in folder.iterdir()) < 8e6, f"{folder.name} holds more than small files"
