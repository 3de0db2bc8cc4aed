"""Records can be held against a race that was made again."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tiny_races import RECORDS, script_of_records


@pytest.fixture(scope="module")
def compare() -> Any:
    return script_of_records("compare")


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
    assert "a seed 0 at 1: {'bits_per_byte': 2.0, 'flops': 10} and" in capsys.readouterr().out


def test_every_record_of_many_runs_can_be_held_against_another(compare: Any, tmp_path: Path, capsys: Any) -> None:
    reports = [path for path in RECORDS.glob("2*/report.json") if '"trials"' in path.read_text()]
    assert len(reports) > 2
    for path in reports:
        assert compare.main(str(path), str(path)) == 0
        runs, other = capsys.readouterr().out.split()[0], tmp_path / path.parent.name
        assert int(runs) > 10, path
        other.write_text(re.sub(r'("(?:final_bits_per_byte|240|python_final)": 2)\.', r"\1.0", path.read_text()))
        assert compare.main(str(path), str(other)) == 1  # the control: another digit, and it is told
        capsys.readouterr()


def test_published_claims_stand_as_the_other_records_measured(monkeypatch: Any) -> None:
    claims = RECORDS / "2026-11-28_published_claims"
    remake = script_of_records(f"{claims.name}/remake")
    measured = json.loads((claims / "report.json").read_text())
    assert json.loads(json.dumps(remake.measure())) == measured
    first = remake.SAVINGS[0]
    monkeypatch.setattr(remake, "SAVINGS", [(*first[:3], first[3][::-1]), *remake.SAVINGS[1:]])
    assert json.loads(json.dumps(remake.measure())) != measured  # the control: records change places


def test_every_record_says_what_it_is() -> None:
    folders = [path for path in RECORDS.iterdir() if path.is_dir() and not path.name.startswith("_")]
    assert folders
    for folder in folders:
        assert (folder / "README.md").exists(), folder.name
        assert sum(path.stat().st_size for path in folder.iterdir()) < 8e6, f"{folder.name} holds more than small files"
