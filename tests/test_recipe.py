"""Recipes: read, overridden, checked, written in full."""

import dataclasses
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tokenformer.recipe import (
    DataSection,
    GrowthSection,
    Recipe,
    TrainSection,
    arm_recipe,
    load_recipe,
    recipe_from_dict,
    recipe_reference,
    recipe_to_dict,
    recipe_to_toml,
    shipped_recipes,
)

RUN = """
[model]
hidden_size = 32
[train]
steps = 20
[[growth]]
at_step = 10
to = { ffn_tokens = 128 }
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(RUN)
    return path


def race() -> dict[str, Any]:
    return {
        "name": "race",
        "model": {"hidden_size": 32, "ffn_tokens": 64},
        "train": {"flops": 1e9, "learning_rate": 1e-3},
        "growth": [{"at_fraction": 0.5, "to": {"ffn_tokens": 128}}],
        "arm": [
            {"name": "grown"},
            {"name": "scratch", "model": {"ffn_tokens": 128}, "growth": []},
            {"name": "llama", "model": {"architecture": "llama", "intermediate_size": 64}, "growth": []},
            {"name": "steps", "train": {"steps": 7}, "growth": []},
        ],
    }


def test_the_shipped_recipes_are_found_and_valid() -> None:
    assert {"quickstart", "tiny", "gpu_150m"} <= set(shipped_recipes())
    for name in shipped_recipes():
        recipe = load_recipe(name)
        assert recipe.name == name and recipe.description


def test_what_is_not_said_has_its_default(run: Path) -> None:
    recipe = load_recipe(run)
    assert recipe.name == "run"
    assert recipe.model.architecture == "tokenformer" and recipe.model.fields == {"hidden_size": 32}
    assert recipe.train.learning_rate == 2e-3 and recipe.data.source == "embedded"
    assert recipe.growth == [GrowthSection(to={"ffn_tokens": 128}, at_step=10)]


@pytest.mark.parametrize("name", ["quickstart", "tiny", "gpu_150m"])
def test_a_recipe_written_in_full_reads_back_the_same(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert recipe_from_dict(json.loads(json.dumps(recipe_to_dict(recipe))), "here") == recipe
    (tmp_path / "recipe.json").write_text(json.dumps(recipe_to_dict(recipe)))
    assert load_recipe(tmp_path / "recipe.json") == recipe
    (tmp_path / "recipe.toml").write_text(recipe_to_toml(recipe))
    assert load_recipe(tmp_path / "recipe.toml") == recipe
    assert load_recipe(name, ["train.seed=1"]) != recipe  # the comparison can fail


def test_the_reference_names_every_key_and_is_toml() -> None:
    text = recipe_reference()
    for name, section in (("data", DataSection), ("train", TrainSection), ("growth", GrowthSection)):
        lines = text.split(f"[{name}]")[1].split("\n[")[0].splitlines()[1:]
        keys = [line.removeprefix("# ").split(" =")[0] for line in lines if line]
        assert sorted(keys) == sorted(field.name for field in dataclasses.fields(section))
    assert tomllib.loads(text.split("\n[[arm]]")[0])["train"]["learning_rate"] == 2e-3
    examples = [line.split(" =")[0] for line in text.splitlines() if "# no default" in line]
    assert examples == ["to", "at_fraction", "learning_rates"]


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("train.seed=3", lambda r: r.train.seed, 3),
        ("train.learning_rate=1", lambda r: r.train.learning_rate, 1.0),
        ("train.compile=true", lambda r: r.train.compile, True),
        ("train.schedule=cosine", lambda r: r.train.schedule, "cosine"),
        ('train.schedule="cosine"', lambda r: r.train.schedule, "cosine"),
        ("data.source=a/b c.txt", lambda r: r.data.source, "a/b c.txt"),
        ("data.source=hf:roneneldan/TinyStories", lambda r: r.data.source, "hf:roneneldan/TinyStories"),
        ('data.document_separator="\\n\\n"', lambda r: r.data.document_separator, "\n\n"),
        ("model.rope_theta=500.0", lambda r: r.model.fields["rope_theta"], 500.0),
        ("model.architecture=llama", lambda r: r.model.architecture, "llama"),
        ("growth.0.to.ffn_tokens=256", lambda r: r.growth[0].to, {"ffn_tokens": 256}),
        ("growth.0.to={ qkv_tokens = 64 }", lambda r: r.growth[0].to, {"qkv_tokens": 64}),
        ("growth=[]", lambda r: r.growth, []),
        ("name=x=y", lambda r: r.name, "x=y"),
    ],
)
def test_an_override_changes_its_key_alone(run: Path, override: str, read: Any, value: Any) -> None:
    plain, changed = load_recipe(run), load_recipe(run, [override])
    assert read(changed) == value
    assert type(read(changed)) is type(value)
    assert changed != plain


def test_a_value_cannot_smuggle_in_a_second_key(run: Path) -> None:
    assert load_recipe(run, ["data.source=1\nname='x'"]).data.source == "1\nname='x'"


def test_one_of_a_pair_replaces_the_other(run: Path) -> None:
    recipe = load_recipe(run, ["train.flops=1e9", "growth.0.at_fraction=0.3"])
    assert (recipe.train.steps, recipe.train.flops) == (None, 1e9)
    assert (recipe.growth[0].at_step, recipe.growth[0].at_fraction) == (None, 0.3)
    with pytest.raises(ValueError, match="steps and flops are .from the command line"):
        load_recipe(run, ["train.flops=1e9", "train.steps=5"])
    slope = ["growth.0.at_slope=-0.05", "growth.0.at_latest_fraction=0.6", "growth.0.slope_window=0.2"]
    [event] = load_recipe(run, slope).growth
    assert (event.at_step, event.at_slope, event.at_latest_fraction, event.slope_window) == (None, -0.05, 0.6, 0.2)
    run.write_text(recipe_to_toml(load_recipe(run, slope)))
    assert load_recipe(run, ["growth.0.at_fraction=0.3"]).growth[0] == recipe.growth[0]


def test_an_arm_is_the_race_with_its_own_tables_merged_in() -> None:
    recipe = recipe_from_dict(race(), "here")
    grown, scratch, llama, steps = (arm_recipe(recipe, arm) for arm in recipe.arms)
    assert grown.name == "race/grown" and grown.arms == [] and grown.growth == recipe.growth
    assert scratch.model.fields == {"hidden_size": 32, "ffn_tokens": 128} and scratch.growth == []
    assert llama.model.fields == {"intermediate_size": 64}  # another architecture starts from nothing
    assert (steps.train.steps, steps.train.flops) == (7, None)
    assert scratch.train == recipe.train and recipe.model.fields["ffn_tokens"] == 64


def test_an_arm_is_overridden_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "race.json").write_text(json.dumps(race()))
    recipe = load_recipe(tmp_path / "race.json", ["arm.scratch.model.ffn_tokens=96", "arm.0.train.seed=5"])
    assert arm_recipe(recipe, recipe.arms[1]).model.fields["ffn_tokens"] == 96
    assert arm_recipe(recipe, recipe.arms[0]).train.seed == 5


def test_what_the_command_line_sets_for_all_arms_is_used_by_one_at_least(tmp_path: Path) -> None:
    grid = {"learning_rates": [1e-3, 2e-3, 4e-3]}
    llama, tall = {"architecture": "llama", "num_hidden_layers": 1}, {"num_hidden_layers": 3}
    grown = [{"at_fraction": 0.2, "to": {"ffn_tokens": 8}}]
    arms = [{"name": "a", "model": llama, "train": {"weight_decay": 0.0}, "growth": grown}]
    arms.append({"name": "b", "model": tall, "growth": grown})
    table = {"model": {"hidden_size": 8}, "train": {"flops": 1e9}, "race": grid, "arm": arms, "growth": grown}
    (tmp_path / "race.json").write_text(json.dumps(table))
    fine = ("model.hidden_size=16", "train.weight_decay=0.2", "arm.a.model.num_hidden_layers=2", "data.batch_size=4")
    for setting in fine:
        load_recipe(tmp_path / "race.json", [setting])
    for key, message in {
        "model.num_hidden_layers": "has no effect: every arm has its own, such as arm.a.model.num_hidden_layers",
        "train.learning_rate": "has no effect beside race.learning_rates",
        "train.seed": "has no effect beside race.seeds",
        "growth.0.at_fraction": "has no effect: every arm has its own, such as arm.a.growth.0.at_fraction",
    }.items():
        with pytest.raises(ValueError, match=f"^{key}: {message}.*from the command line"):
            load_recipe(tmp_path / "race.json", [f"{key}={0.3 if 'fraction' in key else 2}"])


def test_reading_a_table_does_not_alter_it() -> None:
    table = race()
    recipe = recipe_from_dict(table, "here")
    arm_recipe(recipe, recipe.arms[1])
    assert table == race() and recipe == recipe_from_dict(race(), "here")



def growth(*events: str) -> str:
    """An override that puts these events in place of the recipe's."""
    return f"growth=[{', '.join('{to={a=1}, ' + event + '}' for event in events)}]"


MISTAKES = [
    (
        "train.learning_rat=1",
        "train.learning_rat: unknown key in the command line; nearest valid key: learning_rate",
    ),
    ("trian.steps=5", "trian: unknown key in the command line; nearest valid key: train"),
    ("zzz=5", "zzz: unknown key in the command line; `tokenformer recipe` lists the valid ones"),
    ("train.lr=1", "train.lr: unknown key in the command line; `tokenformer recipe` lists the valid ones"),
    ("data.valid=1", "data.valid: unknown key in the command line; nearest valid key: valid_tokens or valid_source or"),
    ("arms=[]", "arms: unknown key in the command line; nearest valid key: arm"),
    ("train.steps=0", "train.steps: 0 is not allowed; it must be at least 1"),
    ("train.steps=2e3", "train.steps: must be a whole number, not 2000.0"),
    ("train.steps=many", 'train.steps: must be a whole number, not "many"'),
    ("train.steps=true", "train.steps: must be a whole number, not true"),
    ("train.compile=1", "train.compile: must be true or false, not 1"),
    ("train.learning_rate=nan", "train.learning_rate: NaN is not allowed; it must be finite"),
    ("train.learning_rate=1" + "0" * 400, "it must be finite"),
    ("train.learning_rate=0", "train.learning_rate: 0.0 is not allowed; it must be above 0"),
    ("train.beta2=1.0", "train.beta2: 1.0 is not allowed; it must be at least 0 and below 1"),
    ("train.schedule=cosin", "it must be one of wsd, cosine, constant; nearest valid value: cosine"),
    ("train.dtype=float16", "it must be one of float32, bfloat16"),
    ("train.device=gpu", "train.device:"),
    ("data.valid_fraction=1", "data.valid_fraction: 1.0 is not allowed; it must be above 0 and below 1"),
    ("data.source=", 'data.source: "" is not allowed; it must not be empty'),
    ("train.accumulation_steps=3", "train.accumulation_steps: 3 does not divide data.batch_size = 8"),
    ("growth.0.operator=Magic!", "it must"),
    ("growth.0.at_fraction=1.0", "it must be above 0 and below 1"),
    ("growth.0.at_step=20", "growth.0.at_step: 20 is not before the end, train.steps = 20"),
    ("growth.0.to={}", "growth.0.to: names nothing that grows"),
    ("growth.0.to.ffn_tokens=-4", "growth.0.to.ffn_tokens: -4 is not allowed; it must be at least 1"),
    ("growth.1.seed=1", "growth.1.seed: no entry 1; there are 1: 0"),
    ("growth=[{at_step=3}]", "growth.0.to: missing in the command line"),
    ("growth=[{to={a=1}}]", "growth.0: exactly one of at_step, at_fraction and at_slope must be given; none is"),
    (
        "growth=[{to={a=1},at_step=5},{to={a=2},at_step=5}]",
        "growth.1.at_step: 5 is not after the one before it, 5",
    ),
    ("growth=3", "growth: must be a list of tables, not 3"),
    (growth("at_slope=-0.05"), "growth.0.at_latest_fraction: missing; needed by at_slope"),
    (growth("at_slope=0.05, at_latest_fraction=0.5"), "growth.0.at_slope: 0.05 is not allowed; it must be below 0"),
    (
        growth("at_slope=-1, at_earliest_fraction=0.5, at_latest_fraction=0.4"),
        "growth.0.at_latest_fraction: 0.4 is not after at_earliest_fraction = 0.5",
    ),
    (
        growth("at_slope=-1, at_latest_fraction=0.4, slope_window=0.4"),
        "growth.0.slope_window: 0.4 does not fit between 0.0, where this size begins, and at_latest_fraction = 0.4",
    ),
    (growth("at_step=3, at_latest_fraction=0.4"), "growth.0.at_latest_fraction: has no effect without at_slope"),
    (growth("at_step=3, at_earliest_fraction=0.4"), "growth.0.at_earliest_fraction: has no effect without at_slope"),
    (growth("at_step=3, slope_window=0.4"), "growth.0.slope_window: has no effect without at_slope"),
    (growth("at_slope=-1, at_latest_fraction=0.4", "at_step=9"), "growth.1.at_step: cannot come after at_slope"),
    (
        growth("at_slope=-1, at_latest_fraction=0.4", "at_fraction=0.4"),
        "growth.1.at_fraction: 0.4 is not after the one before it, 0.4",
    ),
    (
        growth("at_fraction=0.1, stages=2, until_fraction=0.5", "at_slope=-1, at_latest_fraction=0.5"),
        "growth.1.at_latest_fraction: 0.5 is not after the one before it, 0.5",
    ),
    (
        growth("at_fraction=0.3, stages=2, until_fraction=0.5", "at_slope=-1, at_latest_fraction=0.6"),
        "growth.1.slope_window: 0.1 does not fit between 0.5",
    ),
    (growth("at_step=3, stages=2"), "growth.0.at_fraction: missing; needed by stages"),
    (growth("at_fraction=0.3, stages=2"), "growth.0.until_fraction: missing; needed by stages"),
    (
        growth("at_fraction=0.3, stages=2, until_fraction=0.3"),
        "growth.0.until_fraction: 0.3 is not after at_fraction = 0.3",
    ),
    (growth("at_fraction=0.3, until_fraction=0.4"), "growth.0.until_fraction: has no effect without stages"),
    (growth("at_step=3, shape='exponential'"), "growth.0.shape: has no effect without stages"),
    (growth("at_step=3, multiple_of=8"), "growth.0.multiple_of: has no effect without stages"),
    (growth("at_step=3, order='one_by_one'"), "growth.0.order: has no effect without a second axis in `to`"),
    (growth("at_step=3, rewind_to=0.2"), "growth.0.rewind_to: has no effect without learning_rate = 'rewind'"),
    (growth("at_step=3, learning_rate='rewind'"), "growth.0.rewind_to: missing; needed by learning_rate = 'rewind'"),
    ("model=3", "model: must be a table, not 3"),
    ("model.hidden_size=2020-01-01", "model.hidden_size: 2020-01-01 is not allowed here"),
    ("arm=[{name='a', growth=[{at_fraction=nan}]}]", "arm.0.growth.0.at_fraction: NaN is not allowed here"),
    ("arm=[{name='a', model={x=[{y=inf}]}}]", "arm.0.model.x.0.y: Infinity is not allowed here"),
    (f"arm=[{{name='{'a' * 101}'}}]", 'a" is not allowed; it must be at most 100 of a-z, A-Z, 0-9,'),
    (growth("at_step=3, operator='Zero Keys'"), 'it must be the name of an operator, or several joined by +'),
    ("train.steps.x=1", "train.steps.x: train.steps is not a table"),
    ("steps", "'steps': an override is written key=value, such as train.steps=2000"),
    ("train..steps=1", "an override is written key=value"),
    ("arm=[{name='a/b'}]", 'arm.0.name: "a/b" is not allowed'),
    ("arm=[{name='a'},{name='a'}]", "arm: two arms are named a"),
    ("arm=[{name='a'},{name='A'}]", "arm: two arms are named a"),
    ("arm=[{name='a', train={stps=1}}]", "train.stps: unknown key in arm a of run; nearest valid key: steps"),
    ("arm=[{name='a', overrides={}}]", "arm.0.overrides: unknown key"),
]


@pytest.mark.parametrize(("override", "message"), MISTAKES)
def test_a_mistake_is_refused_in_one_line_that_names_the_key(run: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        load_recipe(run, [override])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_schedule_that_never_falls_cannot_start_again(run: Path) -> None:
    settings = [growth("at_step=3, learning_rate='restart'"), "train.schedule=cosine"]
    assert load_recipe(run, settings).growth[0].learning_rate == "restart"  # the control
    with pytest.raises(ValueError, match=r"growth.0.learning_rate: 'restart' has no effect .* rewarm_all has"):
        load_recipe(run, [settings[0], "train.schedule=constant"])


def test_a_mistake_in_a_file_names_the_file(run: Path) -> None:
    run.write_text(RUN.replace("steps", "stepz"))
    with pytest.raises(ValueError, match=r"train\.stepz: unknown key in .*run\.toml; nearest valid key: steps"):
        load_recipe(run)
    run.write_text(RUN.replace("steps = 20", ""))
    with pytest.raises(ValueError, match=r"exactly one of steps and flops .* none is \(from .*run\.toml\)"):
        load_recipe(run, ["train.seed=3"])


def test_the_mark_that_windows_editors_put_first_is_passed_over(run: Path) -> None:
    (run.parent / "marked").mkdir()
    for name, text in (("run.toml", RUN), ("run.json", json.dumps(recipe_to_dict(load_recipe(run))))):
        path = run.parent / "marked" / name
        path.write_text(text, encoding="utf-8-sig")
        assert path.read_bytes().startswith(b"\xef\xbb\xbf") and load_recipe(path) == load_recipe(run)


DAMAGE = {"cut": b"[train", "utf-16": b"\xff\xfe", "deep": b"[" * 100_000, "empty": b""}


@pytest.mark.parametrize("content", DAMAGE.values(), ids=DAMAGE)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, content: bytes) -> None:
    for name in ("broken.toml", "broken.json"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="broken" if content else "broken|train: exactly one"):
            load_recipe(tmp_path / name)
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ValueError, match="a recipe is a table of keys, not a list"):
        load_recipe(tmp_path / "list.json")


def test_a_recipe_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere.toml: no such recipe file"):
        load_recipe(tmp_path / "nowhere.toml")
    with pytest.raises(ValueError, match="quickstrat: neither .* nor a shipped recipe .*quickstart"):
        load_recipe("quickstrat")


def test_a_table_is_checked_like_a_file() -> None:
    with pytest.raises(
        ValueError, match=r"train: exactly one of steps and flops must be given; none is \(from here\)"
    ):
        recipe_from_dict({"name": "x", "train": {"steps": None}}, "here")
    with pytest.raises(ValueError, match="name: missing in here"):
        recipe_from_dict({"train": {"steps": 1}}, "here")
    assert isinstance(recipe_from_dict({"name": "x", "train": {"steps": 1}}, "here"), Recipe)
