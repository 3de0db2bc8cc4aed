"""The run folder: whole files, metrics that can be cut back, and refusals before anything is written."""

import json
import os
from pathlib import Path

import pytest

from tokenformer import environment, runs


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    runs.write_json(path, {"step": 1})
    with pytest.raises(TypeError):
        runs.write_json(path, {"step": 2, "model": object()})
    assert runs.read_json(path) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_a_json_file_that_is_missing_or_cut_off_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="recipe.json: no such file"):
        runs.read_json(tmp_path / "recipe.json")
    (tmp_path / "recipe.json").write_text('{"name": ')
    with pytest.raises(ValueError, match="recipe.json: cannot be read as JSON"):
        runs.read_json(tmp_path / "recipe.json")


def test_metrics_keep_the_lines_of_the_checkpoint_and_drop_the_rest(tmp_path: Path) -> None:
    metrics = runs.Metrics(tmp_path)
    for step in range(5):
        metrics.write({"kind": "train", "step": step})
    metrics.close()
    with open(tmp_path / runs.METRICS, "a") as file:
        file.write('{"kind": "tra')  # what a kill leaves
    assert [line["step"] for line in runs.read_metrics(tmp_path)] == [0, 1, 2, 3, 4]
    metrics = runs.Metrics(tmp_path, keep_lines=3)
    metrics.write({"kind": "train", "step": 33})
    metrics.close()
    assert [line["step"] for line in runs.read_metrics(tmp_path)] == [0, 1, 2, 33]
    assert metrics.lines == 4
    with pytest.raises(ValueError, match="has 4 lines, and the checkpoint was saved with 9"):
        runs.Metrics(tmp_path, keep_lines=9)


@pytest.mark.parametrize(
    ("new", "key"),
    [
        ({"name": "a", "train": {"steps": 20, "seed": 0}, "growth": [{"to": {"ffn": 2}}]}, "train.steps"),
        ({"name": "a", "train": {"steps": 10, "seed": 0}, "growth": [{"to": {"ffn": 4}}]}, "growth.0.to.ffn"),
        ({"name": "a", "train": {"steps": 10}, "growth": [{"to": {"ffn": 2}}]}, "train.seed"),
        ({"name": "a", "train": {"steps": 10, "seed": 0}, "growth": []}, "growth"),
    ],
)
def test_the_first_difference_between_recipes_is_named_by_its_key(new: dict, key: str) -> None:
    old = {"name": "a", "train": {"steps": 10, "seed": 0}, "growth": [{"to": {"ffn": 2}}]}
    found = runs.first_difference(old, new)
    assert found is not None and found[0] == key
    assert runs.first_difference(old, json.loads(json.dumps(old))) is None


def test_a_folder_is_refused_unless_it_is_free_or_resumed_with_its_own_recipe(tmp_path: Path) -> None:
    run, recipe = tmp_path / "run", {"name": "a", "train": {"steps": 10}}
    runs.check_folder(run, recipe, resume=False)
    assert not run.exists()
    run.mkdir()
    runs.open_run(run, recipe, {"source": "text"})
    with pytest.raises(ValueError, match="already holds a run; --resume continues it"):
        runs.check_folder(run, recipe, resume=False)
    runs.check_folder(run, recipe, resume=True)
    with pytest.raises(ValueError, match="train.steps is 10 there and 11 here"):
        runs.check_folder(run, {"name": "a", "train": {"steps": 11}}, resume=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds files but no run"):
        runs.check_folder(tmp_path / "other", recipe, resume=True)
    with pytest.raises(ValueError, match="is a file"):
        runs.check_folder(tmp_path / "other" / "thesis.txt", recipe, resume=False)


@pytest.mark.parametrize(
    ("kind", "file", "content", "message"),
    [
        ("race", "race.json", "{}", "race.json: recipe must be of type dict, and is missing"),
        ("race", "race.json", "[]", "race.json: must be a JSON object"),
        ("run", "recipe.json", "[]", "recipe.json: must be a JSON object"),
        ("run", "recipe.json", '{"na', "recipe.json: cannot be read as JSON"),
    ],
)
def test_a_damaged_folder_is_named_and_not_gone_on_with(
    tmp_path: Path, kind: str, file: str, content: str, message: str
) -> None:
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        runs.check_folder(tmp_path, {"name": "a"}, resume=True, kind=kind)
    (tmp_path / file).write_text(json.dumps({"recipe": {"name": "a"}} if kind == "race" else {"name": "a"}))
    runs.check_folder(tmp_path, {"name": "a"}, resume=True, kind=kind)  # the control


def test_opening_a_run_removes_what_a_kill_left_and_keeps_the_checkpoints(tmp_path: Path) -> None:
    whole = runs.checkpoint_folder(tmp_path, 10)
    half = whole.with_name(f".{whole.name}.tmp-123")
    for folder in (whole, half):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    (tmp_path / ".result.json.tmp-123").write_text("{")
    assert runs.checkpoints(tmp_path) == [whole]
    runs.open_run(tmp_path, {"name": "a"}, {})
    assert not half.exists() and not (tmp_path / ".result.json.tmp-123").exists()
    assert runs.checkpoints(tmp_path) == [whole]


def test_checkpoints_are_ordered_by_step_and_pruned_from_the_oldest(tmp_path: Path) -> None:
    for step in (100_000_000, 5, 40):
        runs.checkpoint_folder(tmp_path, step).mkdir(parents=True)
    (tmp_path / runs.CHECKPOINTS / "step-7-copy").mkdir()
    assert [path.name for path in runs.checkpoints(tmp_path)] == ["step-00000005", "step-00000040", "step-100000000"]
    runs.prune_checkpoints(tmp_path, keep=1)
    assert [path.name for path in runs.checkpoints(tmp_path)] == ["step-100000000"]


def test_only_one_process_at_a_time_holds_a_run(tmp_path: Path) -> None:
    with runs.locked(tmp_path / "run"):
        with pytest.raises(ValueError, match="in use by another process"), runs.locked(tmp_path / "run", seconds=0):
            pass
        (tmp_path / "run" / "recipe.json").write_text("{}")
    with runs.locked(tmp_path / "run", seconds=0):
        pass
    assert (tmp_path / "run" / "recipe.json").exists()


def test_a_refused_run_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such corpus"), runs.locked(tmp_path / "run"):
        raise ValueError("no such corpus")
    assert not (tmp_path / "run").exists()


def test_a_refused_run_leaves_folders_that_it_did_not_make(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for folder in (tmp_path / "mine", tmp_path / "mine" / "a" / "b"):
        with pytest.raises(ValueError, match="no such corpus"), runs.locked(folder):
            raise ValueError("no such corpus")
        assert list(tmp_path.rglob("*")) == [tmp_path / "mine"]


def test_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        runs.open_run(tmp_path, {"name": "a"}, {})
    assert caught.value.filename == str(tmp_path / runs.ENVIRONMENT)


def test_the_environment_says_where_a_run_ran_and_a_resume_is_added(tmp_path: Path) -> None:
    runs.record_environment(tmp_path)
    runs.record_environment(tmp_path)
    stored = runs.read_json(tmp_path / runs.ENVIRONMENT)
    assert set(stored) >= {"python", "platform", "cpu", "cores", "memory_gb", "gpu", "versions", "commit", "dirty"}
    assert set(stored) >= {"command", "threads", "started"}
    assert stored["versions"]["torch"] and stored["versions"]["transformers"]
    assert len(stored["resumed"]) == 1
    assert 1 <= stored["cores"] <= (os.cpu_count() or 1)


def test_a_package_outside_a_repository_has_no_commit(tmp_path: Path) -> None:
    (tmp_path / "__init__.py").write_text("")
    assert environment.source_commit(tmp_path) == (None, None)
