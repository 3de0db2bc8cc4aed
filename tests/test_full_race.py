"""A race with a [race] table: its arms, controls, grid, branches and checks; the same when cut in pieces."""

import contextlib
import json
import math
import re
import shutil
import sys
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_races import plausible, script_of_records, write, write_run
from tiny_runs import corpus, tiny

from tokenformer import runs, verbs
from tokenformer.checkpoint import load_checkpoint
from tokenformer.data import cache_root, prepare
from tokenformer.evaluate import evaluate
from tokenformer.growth.operators import OPERATORS
from tokenformer.models import build_config, build_model
from tokenformer.plan import model_config
from tokenformer.race import (
    arm_entry,
    checkpoints_of,
    checks,
    jobs,
    note_final_text,
    open_race,
    plan_race,
    processes,
    race_of,
    require_all_feasible,
    require_warm_trial,
    run_race,
    settle_moved,
)
from tokenformer.race.arms import Arm, arms_of, keeps_moments, parameters_of, same_run, target_of, ungrown
from tokenformer.race.final import JUDGED, STRETCHES, final_windows, judged, require_another_text, sha256_of
from tokenformer.race.jobs import Race, best_rate, bits_of, grid, headline, todo, trial
from tokenformer.race.planned import plan_lines
from tokenformer.recipe import (
    Recipe,
    TrainSection,
    arm_recipe,
    load_recipe,
    recipe_from_dict,
    recipe_to_dict,
    shipped_recipes,
)
from tokenformer.report.race.controls import control_of
from tokenformer.report.race.numbers import starts_of
from tokenformer.start import Start
from tokenformer.state import save_state
from tokenformer.step import learning_rate_at
from tokenformer.step import train_step as step
from tokenformer.train import Diverged, Stopped, require_feasible, train

GROWN = {"name": "grown", "growth": [{"at_fraction": 0.2, "to": {"ffn_tokens": 32}}]}
SLOPE: dict[str, Any] = {
    "at_slope": -0.05, "at_earliest_fraction": 0.1, "at_latest_fraction": 0.5, "to": {"ffn_tokens": 32},
}
LLAMA: dict[str, Any] = {
    "name": "llama",
    "model": {"architecture": "llama", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
              "intermediate_size": 16, "tie_word_embeddings": True},
}
RACE: dict[str, Any] = {
    "learning_rates": [0.005, 0.01, 0.02], "tune_fraction": 0.3, "budgets": [0.5, 1.0], "seeds": [0, 1],
    "most_extensions": 1,
}


@pytest.fixture(scope="module", autouse=True)
def shared(tmp_path_factory: pytest.TempPathFactory) -> Any:
    place = tmp_path_factory.mktemp("shared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKENFORMER_CACHE", str(place / "cache"))
        patch.setattr(sys.modules["tokenformer.evaluate"], "SAMPLE_BYTES", 4)
        patch.setattr("os.fsync", lambda file: None)  # the sample and waiting for the disk are most of a tiny run
        yield place


def racing(folder: Path, *arms: dict[str, Any], race: dict[str, Any] | None = None, **train: Any) -> Recipe:
    train = {"steps": None, "flops": 9e7, "decay_fraction": 0.4, "learning_rate": TrainSection().learning_rate, **train}
    table = recipe_to_dict(tiny(folder, growth=[], train=train))
    table |= {"arm": list(arms or (GROWN,)), "race": {**RACE, **(race or {})}}
    return recipe_from_dict(table, "the test")


def alone(todo: Any, folder: Path, slots: int, tell: Any, progress: Any = None, piece: Any = None) -> None:
    """Stands for `run_jobs`: the jobs one after another in this process."""
    while waiting := todo():
        job = waiting[0]
        place = folder / runs.ARMS / job.name
        with contextlib.suppress(Diverged):
            train(job.recipe, place, resume=True, say=None, sample=job.sample)
            if job.final_text:
                processes.evaluate_final(job.recipe, place, *job.final_text)


# --- arms and controls ---


def test_the_controls_are_always_there(shared: Path) -> None:
    race = {"sizes": [{"ffn_tokens": 8}], "cosine": ["scratch"]}
    arms = {arm.name: arm for arm in arms_of(racing(shared, GROWN, LLAMA, race=race), 256)}
    roles = {name: (arm.role, arm.of) for name, arm in arms.items()}
    assert roles == {
        "grown": ("arm", None), "llama": ("arm", None), "scratch": ("scratch", "grown"), "small": ("small", "grown"),
        "dropped": ("dropped", "grown"), "size-1": ("size", "small"), "copy": ("copy", "scratch"),
    }
    tokens = {name: arm.recipe.model.fields.get("ffn_tokens") for name, arm in arms.items()}
    assert tokens == {"grown": 16, "llama": None, "scratch": 32, "small": 16, "dropped": 16, "size-1": 8, "copy": 32}
    assert [event.moments for event in arms["dropped"].recipe.growth] == ["drop"]
    assert not arms["scratch"].grows and arms["copy"].tuned_as == "scratch" and arms["dropped"].tuned_as == "grown"


def test_an_arm_that_is_a_control_already_is_not_run_twice(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = {"name": "mine", "model": {"ffn_tokens": 32, "head_dim": 4}}  # as what follows from the other fields
    arms = {arm.name: arm.role for arm in arms_of(racing(shared, GROWN, mine), 256)}
    assert arms == {"grown": "arm", "mine": "scratch", "small": "small", "dropped": "dropped", "copy": "copy"}
    dropping = {**GROWN, "name": "mine", "growth": [{**GROWN["growth"][0], "moments": "drop"}]}
    assert {a.name: a.tuned_as for a in arms_of(racing(shared, GROWN, dropping), 256)}["mine"] == "grown"
    monkeypatch.setattr("tokenformer.race.planned.seconds_per_flop", lambda *arguments: 1e-9)
    said = "not tuned, but run at the rates of the arms that they are controls of: mine"
    assert said in plan_race(racing(shared, GROWN, dropping)) and said not in plan_race(racing(shared, GROWN))
    two = [GROWN, {"name": "late", "growth": [{"at_fraction": 0.5, "to": {"ffn_tokens": 32}}]}]
    names = [arm.name for arm in arms_of(racing(shared, *two), 256)]
    assert names == ["grown", "late", "scratch", "small", "dropped", "copy"]
    other = [GROWN, {"name": "wide", "growth": [{"at_fraction": 0.5, "to": {"ffn_tokens": 64}}]}]
    names = [arm.name for arm in arms_of(racing(shared, *other), 256)]
    assert names == ["grown", "wide", "scratch", "small", "scratch-wide", "dropped", "copy"]


def test_dropped_stands_beside_an_arm_whose_operator_keeps_moments(shared: Path) -> None:
    def controls(*operators: str) -> dict[str, str | None]:
        sizes = {**LLAMA["model"], "num_key_value_heads": 2}
        grown = [{"at_fraction": 0.5, "to": {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 4}}]
        each = [{"name": o, "model": sizes, "growth": [{**grown[0], "operator": o}]} for o in operators]
        return {arm.role: arm.of for arm in arms_of(racing(shared, *each), 256)}

    for drops in ("ligo", "shrink_pad_perturb"):
        assert controls(drops, "zero")["dropped"] == "zero"
        assert "dropped" not in controls(drops)  # it would be the twin of its arm
    assert controls("zero", "ligo")["dropped"] == "zero"


SHIPPED = {name: path for name, path in shipped_recipes().items() if name.endswith(("_cpu", "_gpu"))}
DROPPED = {"architectures": None, "fresh_seeds": None, "growth_experts": "upcycle", "growth_fresh": "zero",
           "growth_llama": "zero", "growth_rest": "fpi", "growth_rotated": "rotated_keys", "growth_steps": "early",
           "growth_tokens": "zero_keys", "growth_tokens_gpu": "zero_values", "growth_tokens_long": "grown",
           "mirror": "modern", "rivals_fresh": None, "schedules": "early"}


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_race_can_be_branched_and_drops_the_moments_of_the_arm_that_it_did(name: str) -> None:
    recipe = load_recipe(name)
    race = Race(recipe, Path(), [Arm(arm.name, "", "arm", None, arm_recipe(recipe, arm)) for arm in recipe.arms], 256)
    for arm in race.arms:
        jobs.require_branches(race, arm)
        require_warm_trial(race, arm)
    keeping = (arm.name for arm in race.arms if arm.grows and keeps_moments(arm.recipe, 256))
    assert next(keeping, None) == DROPPED.get(name, DROPPED[name[:-4]])


def test_every_operator_is_an_arm_of_a_shipped_race_on_the_cpu() -> None:
    def raced(names: set[str]) -> set[str]:
        arms = [arm.overrides for name in names for arm in load_recipe(name).arms]
        events = [event for overrides in arms for event in overrides.get("growth", [])]
        return {operator for event in events for operator in event["operator"].split("+")}

    on_the_cpu = {name for name in SHIPPED if name.endswith("_cpu")}
    assert raced(on_the_cpu) == set(OPERATORS)
    assert {"relora", "upcycle", "midas"} <= set(OPERATORS) - raced(
        on_the_cpu - {"growth_rest_cpu", "growth_experts_cpu"}
    )  # the control


def test_depth_arms_of_growth_rest_take_their_layers_from_different_places() -> None:
    def layers(operator: str, old: int, new: int) -> list[int]:
        config = build_config("llama", None, {"num_hidden_layers": old})
        plan = OPERATORS[operator].plan(config, {"num_hidden_layers": new})
        return [layer.source for layer in plan.layers or ()]

    assert layers("gradual_stack", 2, 3) == [0, 1, 1] and layers("gradual_stack", 3, 4) == [0, 1, 2, 2]
    assert layers("midas", 2, 3) == [0, 0, 1] and layers("midas", 3, 4) == [0, 1, 1, 2]
    # The control, and why the recipe has no other sizes: all from two layers to four, and midas from three, are alike.
    assert all(layers(each, 2, 4) == [0, 1, 0, 1] for each in ("stack", "gradual_stack", "midas", "solar"))
    assert layers("solar", 3, 4) == layers("midas", 3, 4)


@pytest.mark.parametrize("name", SHIPPED)
def test_no_arm_of_a_shipped_race_trains_with_dropout_that_its_library_has_by_default(name: str) -> None:
    recipe = load_recipe(name)
    for arm in recipe.arms:
        config = model_config(arm_recipe(recipe, arm), 256, Start()).to_dict()
        found = {key: value for key, value in config.items() if "drop" in key and not key.startswith("summary_")}
        assert not any(found.values()), (arm.name, found)


def test_transformers_gpt2_has_dropout_by_default() -> None:  # the control: a recipe has to say that there is none
    assert build_config("gpt2", None, {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 256}).resid_pdrop == 0.1


@pytest.mark.parametrize(
    ("architecture", "fields", "event", "expected"),
    [
        ("llama", {"intermediate_size": 16}, {"operator": "zero", "to": {"hidden_size": 16, "num_attention_heads": 4,
         "num_key_value_heads": 4}}, {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 16}),
        ("llama", {"intermediate_size": 16}, {"operator": "stack", "to": {"num_hidden_layers": 2}},
         {"num_hidden_layers": 2}),
        ("llama", {"intermediate_size": 16}, {"operator": "upcycle", "to": {"num_local_experts": 4}},
         {"num_local_experts": 4, "num_experts_per_tok": 2}),
        ("llama", {"intermediate_size": 16, "rank": 2}, {"operator": "rank", "to": {"rank": 4}}, {}),
    ],
)
def test_scratch_is_of_the_size_that_the_arm_ends_with(
    shared: Path, architecture: str, fields: Any, event: Any, expected: Any
) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = {"architecture": architecture, **sizes, **fields}
    arm = {"name": "grown", "model": model, "growth": [{"at_fraction": 0.5, **event}]}
    race = race_of(racing(shared, arm), Path())
    arms = {arm.name: arm for arm in race.arms}
    scratch = arms["scratch"].recipe
    config = build_config(scratch.model.architecture, None, {"vocab_size": 256, **scratch.model.fields})
    assert {key: getattr(config, key) for key in expected} == expected
    assert scratch.model.rank == (4 if "rank" in fields else None)
    assert race.plan(arms["scratch"], scratch).phases[-1].flops_per_step == (
        race.plan(arms["grown"], arms["grown"].recipe).phases[-1].flops_per_step
    )


def test_relora_ends_with_whole_matrices_so_that_scratch_is_its_small_model_too(shared: Path) -> None:
    def arms(model: dict[str, Any], operator: str) -> dict[str, Arm]:
        event = {"at_fraction": 0.5, "operator": operator, "to": {"rank": 4}}
        return {arm.name: arm for arm in arms_of(racing(shared, {"name": "r", "model": model, "growth": [event]}), 256)}

    beside = arms(LLAMA["model"], "relora")
    assert list(beside) == ["r", "scratch", "dropped", "copy"] and beside["scratch"].recipe.model.rank is None
    assert parameters_of(beside["r"].recipe, 256)[1] == parameters_of(beside["scratch"].recipe, 256)[0]
    factorised = arms({**LLAMA["model"], "rank": 2}, "rank")  # the control: matrices that are factors alone
    assert list(factorised) == ["r", "scratch", "small", "dropped", "copy"]
    assert factorised["scratch"].recipe.model.rank == 4


def test_the_page_finds_for_each_arm_the_controls_that_the_race_gave_it(shared: Path) -> None:
    def growing(name: str, model: dict[str, Any], **event: Any) -> dict[str, Any]:
        return {"name": name, "model": model, "growth": [{"at_fraction": 0.2, **event}]}

    gelu = {"theta": "gelu"}
    experts = {"operator": "upcycle", "to": {"num_local_experts": 2}}
    each = [
        growing("grown", {}, to={"ffn_tokens": 32}), growing("late", {}, to={"ffn_tokens": 32}, moments="drop"),
        growing("theta", gelu, to={"ffn_tokens": 32}), growing("theta-late", gelu, to={"ffn_tokens": 32},
        moments="drop"), growing("next", {"ffn_tokens": 32}, to={"ffn_tokens": 64}),
        growing("moe", LLAMA["model"], **experts), growing("moe-late", LLAMA["model"], moments="drop", **experts),
        growing("groups", {**LLAMA["model"], "intermediate_size": 32}, **{**experts, "operator": "virtual_groups"}),
    ]
    race = race_of(racing(shared, *each), Path())
    told = {"arms": [arm_entry(race, arm) for arm in race.arms]}
    for i, arm in enumerate(race.arms[: len(each)]):
        for role, recipe in (("scratch", target_of(arm, 256)), ("small", ungrown(arm.recipe, 256))):
            made = [other.name for other in race.arms[:-1] if not other.grows and same_run(other.recipe, recipe, 256)]
            found = control_of(told, told["arms"][i], role)
            assert [found and found["name"]] == made, (arm.name, role)
    entries = {entry["name"]: entry for entry in told["arms"]}
    assert control_of(told, entries["late"], "dropped") is None  # the control: it is made once
    assert control_of(told, entries["grown"], "dropped") is entries["late"]
    assert control_of(told, entries["late"], "scratch") is entries["scratch"]
    assert len({other.name for other in race.arms if other.role == "scratch"}) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"race": {"learning_rates": [0.01, 0.02]}}, "race.learning_rates: .*three or more"),
        ({"race": {"learning_rates": [0.01, 0.02, 0.03]}}, "race.learning_rates: .*constant factor"),
        # Their folders would have one name.
        ({"race": {"learning_rates": [0.01, 0.01000001, 0.01000002]}}, "race.learning_rates: .*in six digits"),
        ({"race": {"budgets": [0.5, 0.50000001, 1.0]}}, "race.budgets: .*in six digits"),
        ({"race": {"budgets": [0.99999999, 1.0]}}, "race.budgets: .*in six digits"),
        ({"race": {"budgets": [0.5]}}, "race.budgets: .*end at 1"),
        ({"race": {"seeds": [0]}}, "race.seeds: .*two or more"),
        ({"race": {"seeds": [0, 1000]}}, "race.tune_seed: .*no headline runs"),
        ({"race": {"reference": "nobody"}}, "race.reference: 'nobody' is no arm; there are grown"),
        ({"race": {"cosine": ["nobody"]}}, "race.cosine: 'nobody' is no arm"),
        ({"race": {"cosine": ["scratch", "scratch"]}}, "race.cosine: .*name each arm once"),
        ({"race": {"final_text": ""}}, "race.final_text: .*not be empty"),
        ({"race": {"reference": ""}}, "race.reference: .*not be empty"),
        ({"race": {"controls": False, "sizes": [{}]}}, "race.sizes: has no effect"),
        ({"schedule": "cosine"}, "train.schedule: 'cosine' cannot be branched"),
    ],
)
def test_a_race_that_cannot_be_fair_is_refused(shared: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        arms_of(racing(shared, **changes), 256)


def test_a_growth_that_cannot_be_is_refused_by_the_name_of_its_arm(shared: Path) -> None:
    with pytest.raises(ValueError, match="arm bad: growth.0.to.ffn_tokens: 8 is smaller"):
        arms_of(racing(shared, GROWN, {"name": "bad", "growth": [{"at_fraction": 0.2, "to": {"ffn_tokens": 8}}]}), 256)


def test_a_control_finds_a_name_whatever_arms_are_called(shared: Path) -> None:
    sizes = {"copy": 16, "copy-copy": 24, "copy-of-copy": 32}
    arms = [{"name": name, "model": {"ffn_tokens": size}} for name, size in sizes.items()]
    assert [arm.name for arm in arms_of(racing(shared, *arms), 256)] == [*sizes, "copy-2"]


@pytest.mark.parametrize(
    ("arm", "changes", "message"),
    [
        ({}, {"race": {"budgets": [0.01, 1.0]}}, "arm bad: race.budgets: 0.01: .* the warm-up lasts until 2"),
        ({}, {"race": {"budgets": [0.02, 1.0]}, "warmup_steps": 0}, "arm bad: race.budgets: 0.02: .*no room for"),
        ({"model": LLAMA["model"], "growth": [{"at_fraction": 0.25, "operator": "masked",
         "to": {"intermediate_size": 32}, "options": {"ramp_steps": 9}}]}, {},
         "arm bad: race.budgets: 0.5: .*the warm-up or ramp of growth.0 lasts until"),
        ({"growth": [{**GROWN["growth"][0], "at_fraction": 0.25, "learning_rate": "rewarm_all", "rewarm_steps": 5}]},
         {}, "arm bad: race.budgets: 0.5: .*the warm-up or ramp of growth.0 lasts until"),
        ({"growth": [{**SLOPE, "learning_rate": "rewarm_all", "rewarm_steps": 2}]}, {},
         "arm bad: race.budgets: 0.5: .*, at 0.3 of the FLOPs, .*warm-up or ramp of growth.0 may begin from 0.1 on"),
        ({"model": LLAMA["model"], "growth": [{**SLOPE, "operator": "masked", "to": {"intermediate_size": 32},
         "options": {"ramp_steps": 2}}]}, {}, "arm bad: race.budgets: 0.5: .*warm-up or ramp of growth.0 may begin"),
        ({"growth": [{**GROWN["growth"][0], "at_fraction": 0.999}]}, {"decay_fraction": 0.0005}, "arm bad: growth.0"),
        ({}, {"race": {"final_text": "nowhere.txt"}}, "race.final_text.*nowhere.txt': no such file in "),
        # Of a small model that grows a lot, the branch reads more than the trunk; here no control reads as much.
        ({"growth": [{"at_fraction": 0.31, "to": {"ffn_tokens": 4096}}]}, {"flops": 8e9, "race": {"controls": False}},
         "arm bad: 3,390 steps ask for 216,960 training tokens.*data.repeat = true"),
        # A trial would have text enough.
        ({}, {"flops": 1e10, "race": {"tune_fraction": 0.01}}, "arm bad: .*data.repeat = true"),
    ],
)
def test_what_would_end_a_race_in_its_middle_is_refused_before(
    shared: Path, arm: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plan_race(racing(shared, {"name": "bad", **arm}, **changes))


def test_arms_read_one_streamed_text_though_they_need_more_or_less_of_it(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokenformer.data.cache.BLOCK", 4000)  # of text that is read at a time
    texts = corpus(shared).read_text(encoding="utf-8").split("\f")
    rows = [{"text": text} for text in texts]
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *args, **options: iter(rows)))
    arms: tuple[dict[str, Any], ...] = {"name": "large", "model": {"ffn_tokens": 256}}, {"name": "small"}
    table = recipe_to_dict(racing(shared, *arms, flops=9e8))
    table["data"]["source"] = "hf:tiny"
    race = race_of(recipe_from_dict(table, "the test"), Path())

    def streams() -> list[str]:
        first = [headline(race, arm, 0, 0.01) for arm in race.arms]
        return [require_feasible(job.recipe, race.place(job.name), None)[1].info["sha256"] for job in first]

    assert len(set(streams())) > 1  # the control
    whole = require_all_feasible(race, None)
    assert set(streams()) == {whole.info["sha256"]} and whole.info["documents"] < len(texts)


@pytest.mark.parametrize(
    "event",
    [
        {**SLOPE, "learning_rate": "keep"},
        {**SLOPE, "learning_rate": "rewarm_all", "rewarm_steps": 2, "at_earliest_fraction": 0.3},
        {**SLOPE, "learning_rate": "rewarm_all", "rewarm_steps": 2, "at_latest_fraction": 0.25, "slope_window": 0.05},
    ],
)
def test_a_branch_certainly_outside_the_warm_up_of_a_growth_that_waits_is_allowed(shared: Path, event: Any) -> None:
    race = race_of(racing(shared, {"name": "grown", "growth": [event]}), Path())
    jobs.require_branches(race, race.arms[0])


@pytest.mark.parametrize(
    ("growth", "message"),
    [
        # At 0.3, where the branch begins, its trunk would stand at 0.55 + 0.45 (0.3 - 0.2) / 0.8 = 0.61 of its course.
        ([{"at_fraction": 0.2, "rewind_to": 0.55}], r"growth.0.rewind_to = 0.55: must be at most 0.2; .* 0.6 \(from"),
        ([{"at_fraction": 0.2, "rewind_to": 0.5}, {"at_fraction": 0.59, "to": {"ffn_tokens": 64}}], "growth.0.rewind"),
        ([{"at_fraction": 0.8, "rewind_to": 0.7}], "growth.0.rewind_to = 0.7: must be at most 0.6"),
        ([{**SLOPE, "rewind_to": 0.2}], "growth.0.rewind_to = 0.2: must be at most 0.1"),
    ],
)
def test_a_rewind_may_not_bring_the_decay_forward(shared: Path, growth: list[Any], message: str) -> None:
    def grown(**changes: Any) -> Recipe:
        first = {**GROWN["growth"][0], **growth[0], "learning_rate": "rewind", "rewarm_steps": 1, **changes}
        if "at_slope" in first:
            del first["at_fraction"]
        return racing(shared, {"name": "bad", "growth": [first, *growth[1:]]})

    with pytest.raises(ValueError, match=f"arm bad: {message}"):
        grown()
    fine = grown(rewind_to=0.1)
    race = race_of(fine, Path())
    planned = race.plan(race.arms[0], race.arms[0].recipe)
    first, peak = planned.growth_steps[0], fine.train.learning_rate
    stable = [learning_rate_at(race.arms[0].recipe, planned, s) for s in range(2, planned.step_at(0.6)) if s != first]
    assert min(stable) == pytest.approx(peak)  # what a branch and a later growth find before the decay's usual place


def test_a_second_rewind_is_held_against_where_the_first_left_the_schedule(shared: Path) -> None:
    def grown(to: float) -> Recipe:
        first = {**GROWN["growth"][0], "at_fraction": 0.2, "learning_rate": "rewind", "rewind_to": 0.1}
        second = {**first, "at_fraction": 0.5, "rewind_to": to, "to": {"ffn_tokens": 64}}
        return racing(shared, {"name": "bad", "growth": [first, second]})

    # At 0.5 the schedule stands at 0.1 + 0.9 (0.5 - 0.2) / 0.8 = 0.4375 of its course.
    with pytest.raises(ValueError, match=r"arm bad: growth.1.rewind_to = 0.45: must be at most 0.4375; "):
        grown(0.45)
    grown(0.4375)


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ({"train": {"decay_fraction": 0.0}}, "arm bad: train.decay_fraction = 0: must be above 0 and below 1"),
        ({"train": {"decay_fraction": 1.0}}, "arm bad: train.decay_fraction = 1: must be above 0 and below 1"),
        ({"growth": [{"at_fraction": 0.61, "to": {"ffn_tokens": 32}}]}, "arm bad: growth at 0.61 .* decay begins at"),
        ({"train": {"learning_rate": 1.0}}, "arm bad: train.learning_rate is the race's"),
        ({"train": {"flops": 1e9}}, "arm bad: train.flops is the race's"),
        ({"data": {"repeat": True}}, "arm bad: data is the race's"),
        ({"growth": [{"at_step": 3, "to": {"ffn_tokens": 32}}]}, "arm bad: growth.at_step = 3.*use at_fraction"),
        ({"train": {"min_learning_rate_ratio": 1.0}}, "arm bad: train.min_learning_rate_ratio is the race's"),
        ({"growth": [{**GROWN["growth"][0], "seed": 7}]}, "arm bad: growth.0.seed: has no effect beside race.seeds"),
    ],
)
def test_an_arm_may_not_bend_what_all_share(shared: Path, arm: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        racing(shared, {"name": "bad", **arm})
    racing(shared, GROWN)


@pytest.mark.parametrize(
    ("train", "data", "message"),
    [
        ({"learning_rate": 0.5}, {}, "train.learning_rate: has no effect beside race.learning_rates"),
        ({"seed": 9}, {}, "train.seed: has no effect beside race.seeds"),
        ({"keep_at": [0.5]}, {}, "train.keep_at: has no effect beside race.budgets"),
        ({}, {"seed": 9}, "data.seed: has no effect beside race.seeds"),
    ],
)
def test_what_the_race_settles_is_not_written_beside_it(shared: Path, train: Any, data: Any, message: str) -> None:
    table = recipe_to_dict(racing(shared))
    table["train"] |= train
    table["data"] |= data
    with pytest.raises(ValueError, match=f"{message} \\(from the test\\)"):
        recipe_from_dict(table, "the test")
    recipe_from_dict({**table, "race": None}, "the test")  # the control: without [race] it has one


def test_a_warm_up_after_a_growth_ends_before_the_decay_begins_in_a_run_and_in_its_trials(shared: Path) -> None:
    def raced(at: float, steps: int) -> Race:
        event = {**GROWN["growth"][0], "at_fraction": at, "learning_rate": "rewarm_all", "rewarm_steps": steps}
        return race_of(racing(shared, {"name": "grown", "growth": [event]}, race={"budgets": [1.0]}), Path())

    race = raced(0.4, 1)
    planned = race.plan(race.arms[0], race.arms[0].recipe)
    room = planned.step_at(0.6) - planned.growth_steps[0]
    tuned = trial(race, race.arms[0], 0.01).recipe
    shorter = race.plan(race.arms[0], tuned)
    room_of_trial = shorter.step_at(0.6) - shorter.growth_steps[0]
    assert 1 < room_of_trial < room
    require_all_feasible(raced(0.4, room_of_trial), None)
    with pytest.raises(ValueError, match=r"arm grown: race.tune_fraction: 0.3: in a trial .*growth.0: its warm-up"):
        require_all_feasible(raced(0.4, room_of_trial + 1), None)
    race = raced(0.4, room)
    jobs.require_branches(race, race.arms[0])
    race = raced(0.4, room + 1)
    with pytest.raises(ValueError, match="growth.0: its warm-up or ramp lasts until step .*let it come earlier"):
        jobs.require_branches(race, race.arms[0])

    def require_warm(at: float, policy: dict[str, Any]) -> None:
        event = {**GROWN["growth"][0], "at_fraction": at, **policy}
        own = race_of(racing(shared, {"name": "grown", "growth": [event]}, race={"budgets": [1.0]}), Path())
        jobs.require_warm(own.plan(own.arms[0], own.arms[0].recipe), own.arms[0].recipe)

    require_warm(0.6, {"learning_rate": "keep", "rewarm_steps": 10**6})  # as late as may be, where nothing rises
    for r, policy in ((0.0, {"learning_rate": "restart"}), (0.3, {"learning_rate": "rewind", "rewind_to": 0.3})):
        # The schedule that begins anew at 0.4 decays from 0.4 + 0.6 (0.6 - r) / (1 - r) on.
        longest = planned.step_at(0.4 + 0.6 * (0.6 - r) / (1 - r)) - planned.growth_steps[0]
        require_warm(0.4, {**policy, "rewarm_steps": longest})
        with pytest.raises(ValueError, match="the decay begins at"):
            require_warm(0.4, {**policy, "rewarm_steps": longest + 1})
    # With one twice as long the run would decay before it has been at its peak again.
    race = raced(0.4, 2 * room)
    recipe = race.arms[0].recipe
    planned = race.plan(race.arms[0], recipe)
    after = range(planned.growth_steps[0], planned.steps)
    assert max(learning_rate_at(recipe, planned, step) for step in after) < recipe.train.learning_rate


def test_a_control_without_experts_has_none_to_keep_in_balance(shared: Path) -> None:
    sizes = {**LLAMA["model"], "num_key_value_heads": 2}
    growth = [{"at_fraction": 0.2, "operator": "upcycle", "to": {"num_local_experts": 4}}]
    arm = {"name": "grown", "model": sizes, "growth": growth, "train": {"expert_balance": "loss_free"}}
    ways = {arm.role: arm.recipe.train.expert_balance for arm in race_of(racing(shared, arm), Path()).arms}
    assert ways == {r: "none" if r == "small" else "loss_free" for r in ("arm", "scratch", "small", "dropped", "copy")}


def test_a_size_that_makes_no_model_and_a_start_that_has_no_smaller_budget_are_refused(shared: Path) -> None:
    with pytest.raises(ValueError, match="race.sizes.0: model.nonsense: not a field"):
        arms_of(racing(shared, race={"sizes": [{"nonsense": 1}]}), 256)
    for size, there in ({}, "small"), ({"ffn_tokens": 32}, "scratch"):
        with pytest.raises(ValueError, match=f"race.sizes.0: is the model of {there} .*which is there already"):
            arms_of(racing(shared, race={"sizes": [size]}), 256)
    with pytest.raises(ValueError, match="race.sizes.0: names a checkpoint"):
        arms_of(racing(shared, race={"sizes": [{"checkpoint": "somewhere"}]}), 256)
    with pytest.raises(ValueError, match=r"arm old: starts from model.checkpoint.*set race.budgets = \[1.0\]"):
        arms_of(racing(shared, {"name": "old", "model": {"checkpoint": "somewhere"}}), 256)


def test_an_arm_may_start_from_a_checkpoint_whose_cost_is_known(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    other = tmp_path / "other.txt"  # what it has read in another order than a seed of the race would be refused
    other.write_text("\f".join(f"document {i} about {i * i} " * 30 for i in range(60)))
    train(tiny(shared, growth=[], train={"steps": 2}, data={"source": str(other)}), folder, say=None)
    known = runs.checkpoints(folder)[-1]
    arms = [GROWN, {"name": "old", "model": {"checkpoint": str(known)}}]
    monkeypatch.setattr("tokenformer.race.run_jobs", alone)
    once = {"budgets": [1.0], "most_extensions": 0}
    run_race(racing(shared, *arms, race=once, flops=2e7), tmp_path / "race", say=None)
    told = {arm["name"]: arm for arm in runs.read_json(tmp_path / "race" / "report.json")["arms"]}
    spent = {name: [run["flops"] for run in arm["runs"]] for name, arm in told.items()}
    assert spent["old"] == pytest.approx([2e7] * 2, rel=0.1) and spent["scratch"] == pytest.approx([2e7] * 2, rel=0.1)
    own = told["old"]["runs"][0]["curve"]["flops"][0]
    assert own == runs.read_json(known / "trainer.json")["flops"] > 0  # its ancestor's are in it
    moved = {"name": "old", "model": {"checkpoint": str(folder)}}  # the newest of a run, which may go on
    begun = race_of(racing(shared, GROWN, moved, race=once, flops=2e7), tmp_path / "moved")
    begun.folder.mkdir()
    open_race(begun, require_all_feasible(begun, None))
    later = runs.checkpoint_folder(folder, 9)
    shutil.copytree(known, later)
    recipe = racing(shared, GROWN, moved, race=once, flops=2e7)
    for place, found in (("moved", known), ("afresh", later)):
        again = race_of(recipe, tmp_path / place, checkpoints_of(tmp_path / place, recipe))
        assert {a.recipe.model.checkpoint for a in again.arms if a.name == "old"} == {str(found)}
    written = runs.read_json(tmp_path / "moved" / runs.RACE)
    del written["checkpoints"]  # as older versions wrote it: its runs were begun with the arm's as it stands there
    runs.write_json(tmp_path / "moved" / runs.RACE, written)
    assert checkpoints_of(tmp_path / "moved", recipe) == {"old": str(folder)}
    with pytest.raises(ValueError, match="race.reference: 'old' starts from model.checkpoint"):
        arms_of(racing(shared, *arms, race={"budgets": [1.0], "reference": "old"}), 256)
    with pytest.raises(ValueError, match="has cost .* FLOPs, and a trial of its rate has 0.001 of the budget of 2e"):
        arms_of(racing(shared, *arms, race={"budgets": [1.0], "tune_fraction": 0.001}, flops=2e7), 256)
    for extra in ("trainer.json", "moments.safetensors", "rng.safetensors"):
        (known / extra).unlink(missing_ok=True)
    with pytest.raises(ValueError, match="arm old: model.checkpoint = .*: what it cost to train is not known"):
        arms_of(racing(shared, *arms, race={"budgets": [1.0]}), 256)


# --- what is run, and in what order ---


def pretend(race: Race, name: str, bits: float) -> None:
    """A run that has ended, with a checkpoint at every fiftieth of its FLOPs."""
    place = race.place(name)
    place.mkdir(parents=True)
    status = {"status": "finished", "bits_per_byte": bits} if math.isfinite(bits) else {"status": "failed"}
    (place / runs.RESULT).write_text(json.dumps({**status, "diverged": not math.isfinite(bits), "step": 1, "flops": 1}))
    for i in range(50) if "seed" in name else []:
        folder = runs.checkpoint_folder(place, i)
        folder.mkdir(parents=True)
        cost = {"flops": int(9e7 * i / 50), "tokens": 64 * i, "seconds": 0.0, "streams": []}
        (folder / "trainer.json").write_text(json.dumps(cost))


def test_the_grid_grows_for_every_arm_where_one_lies_at_its_edge(shared: Path, tmp_path: Path) -> None:
    race = race_of(racing(shared, GROWN, LLAMA), tmp_path)
    best = {"grown": 0.01, "llama": 0.02, "scratch": 0.01, "small": 0.01}
    rates, waiting = grid(race)
    assert rates == [0.005, 0.01, 0.02] and len(waiting) == 3 * 4  # neither dropped nor copy is tuned
    for job in waiting:
        arm, _, rate = job.name.partition("/tune/lr-")
        pretend(race, job.name, 2 + abs(math.log(float(rate) / best[arm])) if rate != "0.005" else math.inf)
    rates, waiting = grid(race)
    assert rates == [0.005, 0.01, 0.02, 0.04]
    assert sorted(job.name for job in waiting) == sorted(f"{arm}/tune/lr-0.04" for arm in best)
    for job in waiting:
        pretend(race, job.name, 1.0 if job.name.startswith("llama") else 9.0)
    assert grid(race) == ([0.005, 0.01, 0.02, 0.04], [])  # most_extensions = 1, though llama is at the edge again
    chosen = {arm.name: best_rate(race, arm, grid(race)[0]) for arm in race.arms if arm.tuned_as == arm.name}
    assert chosen == {"grown": 0.01, "llama": 0.04, "scratch": 0.01, "small": 0.01}

    first = [job for job in todo(race) if "seed-0" in job.name]
    assert [job.name for job in first] == [f"{arm.name}/seed-0" for arm in race.arms]
    rate = {job.name: job.recipe.train.learning_rate for job in first}
    assert rate["dropped/seed-0"] == rate["grown/seed-0"] == 0.01 and rate["llama/seed-0"] == 0.04
    pretend(race, "grown/seed-0", 1.9)
    pretend(race, "small/seed-0", math.inf)
    names = [job.name for job in todo(race)]
    assert names[0] == "grown/seed-0_at-0.5" and "small/seed-0" not in names
    assert not any(name.startswith("small/seed-0_") for name in names)  # it diverged: there is nothing to branch from

    for folder in runs.checkpoints(race.place("grown/seed-0"))[:-2]:
        shutil.rmtree(folder)
    with pytest.raises(ValueError, match="is not there any more; put it back, or remove .*seed-0"):
        todo(race)
    pretend(race, "grown/seed-0_at-0.5", 2.0)  # one that has ended needs none
    assert names[1:] == [job.name for job in todo(race)]
    (race.place("grown/seed-0_at-0.5") / runs.RESULT).write_text('{"status": "finished"}')
    with pytest.raises(ValueError, match="seed-0_at-0.5/result.json: bits_per_byte must be .* missing"):
        todo(race)


def test_a_copy_of_the_dropped_arm_takes_the_rate_that_this_one_takes(shared: Path, tmp_path: Path) -> None:
    race = race_of(racing(shared, race={"reference": "dropped"}), tmp_path)
    for job in grid(race)[1]:
        best = 0.01 if job.name.startswith("grown") else 0.005
        pretend(race, job.name, 2.0 if job.name.endswith(f"{best}") else 3.0)
    for job in grid(race)[1]:
        pretend(race, job.name, 3.0)
    rates = {job.name: job.recipe.train.learning_rate for job in todo(race) if "seed-0" in job.name}
    assert rates["copy/seed-0"] == rates["dropped/seed-0"] == rates["grown/seed-0"] == 0.01 != rates["small/seed-0"]


def test_a_tie_or_an_end_within_the_grid_does_not_extend_it(shared: Path, tmp_path: Path) -> None:
    race = race_of(racing(shared), tmp_path)
    for job in grid(race)[1]:
        pretend(race, job.name, 2.0 if job.name.endswith("0.01") else 3.0)
    assert grid(race) == ([0.005, 0.01, 0.02], [])


def test_runs_of_one_seed_share_text_and_differ_between_seeds_and_copies(shared: Path, tmp_path: Path) -> None:
    race = race_of(racing(shared), tmp_path)
    arms = {arm.name: arm for arm in race.arms}

    def seeds(name: str, seed: int) -> tuple[int, int]:
        recipe = headline(race, arms[name], seed, 0.01).recipe
        return recipe.data.seed, recipe.train.seed

    assert seeds("grown", 0) == seeds("scratch", 0) == (0, 0) and seeds("grown", 1) == (1, 1)
    assert seeds("copy", 1)[0] == 1 and seeds("copy", 1)[1] != 1
    assert headline(race, arms["grown"], 1, 0.01).recipe.growth[0].seed == 1
    tuned = trial(race, arms["grown"], 0.01).recipe
    assert tuned.data.seed == tuned.train.seed == 1000 and tuned.train.flops == pytest.approx(0.3 * 9e7)
    assert tuned.growth[0].at_fraction == 0.2


def test_arms_of_another_theta_draw_the_same_weights_up_to_a_factor_of_each_table(shared: Path, tmp_path: Path) -> None:
    def drawn(seed: int, **fields: Any) -> dict[str, torch.Tensor]:
        arm = {"name": "arm", "model": {"initialization": "residual", **fields}}
        config = model_config(race_of(racing(shared, arm), tmp_path).arms[0].recipe, 256, Start())
        return {name: p.detach() for name, p in build_model(config, seed).named_parameters()}

    def proportional(one: torch.Tensor, other: torch.Tensor) -> bool:
        return bool(torch.allclose(one * other.norm() / one.norm(), other, rtol=1e-4, atol=1e-7))

    gelu, silu, control = drawn(0, theta="gelu"), drawn(0, theta="silu"), drawn(1, theta="silu")
    scaled = {name for name in gelu if not torch.equal(gelu[name], silu[name])}
    assert scaled and all(name.endswith("value") for name in scaled)
    assert all(proportional(gelu[name], silu[name]) for name in scaled)
    assert not any(proportional(gelu[name], control[name]) for name in scaled)


def test_a_trial_does_not_grow_in_its_warm_up(shared: Path, tmp_path: Path) -> None:
    def first(race: Race) -> tuple[int, int]:
        arm = race.arms[0]
        whole, short = headline(race, arm, 0, 0.01).recipe, trial(race, arm, 0.01).recipe
        return race.plan(arm, whole).growth_steps[0], race.plan(arm, short).growth_steps[0]

    plain, warmed = (race_of(racing(shared, warmup_steps=n), tmp_path / str(n)) for n in (0, 12))
    assert first(plain)[1] < 12 <= first(plain)[0]  # the control: the warm-up is longer than that share of a trial
    assert first(warmed) == (first(plain)[0], 12)
    events = (trial(warmed, warmed.arms[0], rate).recipe.growth for rate in (0.005, 0.02))
    assert len({event.at_fraction for [event] in events}) == 1  # at one place for all rates
    restarts = {"name": "grown", "growth": [{**GROWN["growth"][0], "learning_rate": "restart", "rewarm_steps": 2}]}
    anew = race_of(racing(shared, restarts, warmup_steps=12), tmp_path / "anew")
    assert trial(anew, anew.arms[0], 0.01).recipe.growth[0].at_fraction == 0.2
    steps = first(plain)[0]
    with pytest.raises(ValueError, match=f"arm grown: growth.0: comes at step {steps}, and the warm-up before it"):
        run_race(racing(shared, warmup_steps=steps + 1, race={"tune_fraction": 0.9}), tmp_path / "late")
    with pytest.raises(ValueError, match="race.tune_fraction: 0.2: a trial's warm-up, 12 steps, lasts until"):
        run_race(racing(shared, warmup_steps=12, race={"tune_fraction": 0.2}), tmp_path / "short")


def test_a_branch_ends_as_the_run_that_was_meant_for_its_budget(shared: Path, tmp_path: Path) -> None:
    race = race_of(racing(shared, evaluate_every=1000), tmp_path)
    arm = race.arms[0]
    trunk = headline(race, arm, 0, 0.01)
    train(trunk.recipe, race.place(trunk.name), say=None)
    job = jobs.branch(race, arm, trunk, 0.5)
    branched = train(job.recipe, race.place(job.name), say=None)
    whole = replace(trunk.recipe.train, flops=4.5e7, keep_at=[])
    growth = [replace(event, at_fraction=0.4) for event in trunk.recipe.growth]
    single = train(replace(trunk.recipe, train=whole, growth=growth), tmp_path / "single", say=None)
    assert branched["flops"] == single["flops"] and branched["tokens"] == single["tokens"]
    gap = abs(branched["bits_per_byte"] - single["bits_per_byte"])
    undecayed = replace(whole, schedule="constant")
    flat = train(replace(trunk.recipe, train=undecayed, growth=growth), tmp_path / "flat", say=None)
    assert gap < 0.2 * abs(flat["bits_per_byte"] - single["bits_per_byte"])
    begun = runs.read_json(race.place(job.name) / runs.START)
    assert begun["flops"] >= 0.3 * trunk.flops and len(branched["growth"]) == 1


MAMBA2 = {"architecture": "mamba2", "hidden_size": 8, "num_hidden_layers": 1, "num_heads": 2, "head_dim": 8,
          "state_size": 4, "n_groups": 1, "expand": 2, "chunk_size": 8}
MIXTRAL = {**LLAMA["model"], "architecture": "mixtral", "num_key_value_heads": 2, "num_local_experts": 4,
           "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    ("model", "growth", "settings"),
    [
        (MAMBA2, [], {}),  # whose config.json holds an infinity, which is no JSON
        (MIXTRAL, [], {"expert_balance": "loss_free"}),
        ({**LLAMA["model"], "rank": 2}, [{"at_fraction": 0.2, "operator": "rank", "to": {"rank": 4}}], {}),
        # Before its growth there are no experts to keep in balance.
        ({**LLAMA["model"], "num_key_value_heads": 2}, [{"at_fraction": 0.5, "operator": "upcycle",
         "to": {"num_local_experts": 4}}], {"expert_balance": "auxiliary"}),
    ],
)
def test_a_branch_starts_from_what_its_trunk_is_and_reads_on_where_that_was(
    shared: Path, tmp_path: Path, model: dict[str, Any], growth: list[Any], settings: dict[str, Any]
) -> None:
    arm = {"name": "arm", "model": model, "growth": growth, "train": settings}
    table = recipe_to_dict(racing(shared, arm, race={"controls": False}, evaluate_every=1, flops=3e7))
    table["data"]["skip_tokens"] = 40  # two and a half windows, of which three are passed over
    race = race_of(recipe_from_dict(table, "the test"), tmp_path)
    trunk = headline(race, race.arms[0], 0, 0.01)
    train(trunk.recipe, race.place(trunk.name), say=None)
    job = jobs.branch(race, race.arms[0], trunk, 0.5)
    begun = runs.read_json(Path(job.recipe.model.checkpoint or "") / "trainer.json")
    ended = train(job.recipe, race.place(job.name), say=None)
    first = next(line for line in runs.read_metrics(race.place(job.name)) if line["kind"] == "eval")
    assert first["flops"] == begun["flops"] and ended["flops"] <= 1.5e7
    way = [line for line in runs.read_metrics(race.place(trunk.name)) if line["kind"] == "eval"]
    there = next(line for line in way if line["step"] == begun["step"])
    assert first["bits_per_byte"] == pytest.approx(there["bits_per_byte"], abs=1e-9) != way[0]["bits_per_byte"]
    before, after = (require_feasible(each.recipe, race.place(each.name), None)[2] for each in (trunk, job))
    assert torch.equal(after[0], before[begun["step"]]) and not torch.equal(after[0], before[begun["step"] + 1])


# --- the whole ---


def test_a_race_in_pieces_ends_as_one_that_was_not_cut(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokenformer.race.run_jobs", alone)
    (tmp_path / "final.txt").write_text("abcdef " * 200)
    race = {"final_text": str(tmp_path / "final.txt"), "final_tokens": 400, "most_extensions": 0}
    recipe = racing(shared, race=race, evaluate_every=1000, log_every=1000, flops=2.5e7)
    page = run_race(recipe, tmp_path / "whole")
    assert page.exists()
    written = runs.read_json(tmp_path / "whole" / runs.RACE)
    assert {arm["role"] for arm in written["arms"]} == {"arm", "scratch", "small", "dropped", "copy"}
    assert written["arms"][0]["parameters"]["total"] < written["arms"][0]["parameters_end"]["total"]
    assert written["race"]["flops"] == 2.5e7 and written["checks"]["lzma_bits_per_byte"] > 0.5
    results = sorted((tmp_path / "whole").rglob(runs.RESULT))
    assert len(results) == 3 * 3 + 5 * 2 * 2  # trials of three arms, two seeds and two budgets of five
    headline_runs = [path for path in results if "seed" in path.parent.name]
    assert all((path.parent / jobs.FINAL).exists() == (path in headline_runs) for path in results)  # of no trial
    assert not any("sample" in runs.read_json(path) for path in results)  # test_train has the control

    def ended(folder: Path, job: jobs.Job) -> bool:
        return bits_of(folder / "arms" / job.name, bool(job.final_text)) is not None

    def interrupted(todo: Any, *rest: Any) -> None:
        for _ in range(7):
            job = todo()[0]
            alone(lambda job=job: [] if ended(tmp_path / "cut", job) else [job], *rest)
        raise Stopped("time is over", 15)

    monkeypatch.setattr("tokenformer.race.run_jobs", interrupted)
    with pytest.raises(Stopped):
        run_race(recipe, tmp_path / "cut")
    monkeypatch.setattr("tokenformer.race.run_jobs", alone)
    run_race(recipe, tmp_path / "cut", resume=True)
    for path in results:
        again = tmp_path / "cut" / path.relative_to(tmp_path / "whole")
        assert runs.read_json(again)["bits_per_byte"] == runs.read_json(path)["bits_per_byte"]

    left = [tmp_path / "whole" / ".report.tmp-x", headline_runs[-1].parent / ".final.json.tmp-1"]  # by a kill
    left[0].mkdir(), left[1].touch()
    tested = headline_runs[-1].parent / jobs.FINAL
    before = tested.read_bytes()
    tested.unlink()
    run_race(recipe, tmp_path / "whole", resume=True)
    assert tested.read_bytes() == before and not any(path.exists() for path in left)
    told, model = runs.read_json(tested), load_checkpoint(runs.checkpoints(tested.parent)[-1])[0]
    at_once = evaluate(model, final_windows(recipe, race["final_text"], 400))  # 25 windows, in 20 stretches
    assert {key: told[key] for key in at_once} == pytest.approx(at_once, rel=1e-6) and at_once["tokens"] == 400
    each = told["stretches"]
    assert len(each) == STRETCHES and min(each) < told["bits_per_byte"] < max(each)

    other, out = str(tmp_path / "other.txt"), tmp_path / "other.json"
    Path(other).write_text("fedcba " * 200)
    script_of_records("judge_again").main(str(tmp_path / "whole"), other, str(out))
    again, copy = runs.read_json(out), tmp_path / "whole" / runs.ARMS / "copy" / "seed-1"
    model = load_checkpoint(runs.checkpoints(copy)[-1])[0]
    bits = evaluate(model, final_windows(recipe, other, 10**9))["bits_per_byte"]
    mine, on_first = again["arms"]["copy"]["seeds"][1], runs.read_json(copy / jobs.FINAL)["bits_per_byte"]
    assert mine == pytest.approx(bits, rel=1e-6) and abs(mine - on_first) > 1e-3
    assert again["arms"].keys() == {arm.name for arm in arms_of(recipe, 256)} and "text_low" in again["pairs"][0]

    report, compare = tmp_path / "whole" / "report.json", script_of_records("compare").main
    remake = script_of_records("remake_run").main
    for name in ("grown", "copy"):  # one run from its record alone
        remake(str(report), name, "1", str(tmp_path / name))
        assert compare(str(report), str(tmp_path / name / "report.json")) == 0
    changed = runs.read_json(report)
    changed["arms"][0]["recipe"]["train"]["weight_decay"] = 0.2  # the control
    (tmp_path / "changed.json").write_text(json.dumps(changed))
    remake(str(tmp_path / "changed.json"), "grown", "1", str(tmp_path / "other"))
    assert compare(str(report), str(tmp_path / "other" / "report.json")) == 1
    with pytest.raises(SystemExit, match="'nope' is no arm of"):
        remake(str(report), "nope", "1", str(tmp_path / "nope"))


def test_a_real_race_tells_a_handicap_and_no_copy_apart_and_flags_text_that_was_seen_again(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokenformer.race.run_jobs", alone)
    often: dict[str, Any] = {"evaluate_every": 1000, "log_every": 1000, "checkpoint_every": 1000}
    race: dict[str, Any] = {
        "learning_rates": [0.01, 0.02, 0.04], "tune_fraction": 0.5, "budgets": [1.0], "most_extensions": 0,
    }

    def reported(recipe: Recipe, folder: str) -> tuple[dict[str, Any], str, list[str]]:
        page = run_race(recipe, tmp_path / folder).read_text(encoding="utf-8")
        report = runs.read_json(tmp_path / folder / "report.json")
        return report, page, [note["text"] for note in report["warnings"] if note["level"] == "bad"]

    handicapped = {"name": "handicapped", "train": {"weight_decay": 20.0}}  # pulls every weight to nothing
    arms, three = ({"name": "plain"}, handicapped), {**race, "seeds": [0, 1, 2]}
    report, page, red = reported(racing(shared, *arms, race=three, flops=6e7, **often), "race")
    pairs = {(pair["arm"], pair["other"]): pair for pair in report["budgets"][-1]["pairs"]}
    assert pairs["plain", "copy"]["word"] == "not told apart" and red == []
    assert pairs["plain", "handicapped"]["word"] == "better" and pairs["handicapped", "copy"]["word"] == "worse"
    assert pairs["plain", "handicapped"]["high"] < -0.5 < pairs["plain", "copy"]["low"]  # far from the border
    assert "is **better** than **handicapped** by" in report["answer"][0]
    noise = page.split("<h2>Noise</h2>")[1].split("<h2>")[0]
    assert "not told apart" in noise and "better" not in noise and "worse" not in noise

    short = tmp_path / "short.txt"
    short.write_text("\f".join(f"document {i} about {i * i} " * 8 for i in range(4)))
    again = recipe_to_dict(racing(shared, {"name": "plain"}, race={**race, "seeds": [0, 1]}, flops=2e7, **often))
    again["data"] |= {"source": str(short), "repeat": True, "valid_fraction": 0.25, "valid_tokens": 64}
    _, page, red = reported(recipe_from_dict(again, "the test"), "again")
    for name in ("plain", "copy"):
        assert any(text.startswith(f"**{name}** saw its training text ") for text in red), red
    assert "saw its training text" in page


def ends_at_once(fails: str) -> Any:
    """Stands for `run_jobs`: writes what runs leave; the one of that name diverges."""

    def run_jobs(todo: Any, folder: Path, *rest: Any) -> None:
        while waiting := todo():
            job = waiting[0]
            name, _, run = job.name.partition("/")
            place, arm = folder / runs.ARMS / job.name, {"role": "arm", "parameters": (1000, 1000)}
            ended = {"status": "failed", "error": "step 7: the loss is nan", "diverged": True}
            changes = ended if job.name == fails else {}
            bits = None if changes else plausible(name, job.recipe.train.learning_rate, job.recipe.data.seed, 1.0)
            write_run(place, name, arm, job.recipe.train.learning_rate, job.recipe.data.seed, 0.5, bits, **changes)
            if job.final_text:
                write(place / jobs.FINAL, {"bits_per_byte": 2.0, "text_sha256": "ef" * 32})
            checkpoint = runs.checkpoint_folder(place, 1)
            checkpoint.mkdir(parents=True)
            cost = {"flops": 27_000_000, "tokens": 64, "seconds": 0.0, "streams": []}
            (checkpoint / "trainer.json").write_text(json.dumps(cost))

    return run_jobs


def test_an_arm_that_failed_is_reported_as_failed_and_the_race_goes_on(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = racing(shared)
    for folder, fails, told in (("bad", "grown/seed-1", True), ("fine", "nobody", False)):
        monkeypatch.setattr("tokenformer.race.run_jobs", ends_at_once(fails))
        run_race(recipe, tmp_path / folder)
        report = runs.read_json(tmp_path / folder / "report.json")
        grown = next(arm for arm in report["arms"] if arm["name"] == "grown")
        assert [run["status"] for run in grown["runs"]].count("failed") == (2 if told else 0)  # with its branch
        page = (tmp_path / folder / "report.html").read_text(encoding="utf-8")
        assert ("<b>grown</b> failed (seed 1" in page) is told and ("the loss is nan" in page) is told
        assert (tmp_path / folder / runs.ARMS / "small/seed-1_at-0.5").exists()
        assert (tmp_path / folder / runs.ARMS / "grown/seed-1_at-0.5").exists() is not told


def test_a_race_goes_on_with_its_own_recipe_alone(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*arguments: Any) -> None:
        raise Stopped("time is over", 15)

    monkeypatch.setattr("tokenformer.race.run_jobs", stopped)
    with pytest.raises(Stopped):
        run_race(racing(shared), tmp_path / "race")
    late = {**GROWN, "growth": [{"at_fraction": 0.3, "to": {"ffn_tokens": 32}}]}
    for other, message in (
        (racing(shared, race={"seeds": [0, 2]}), "race.seeds.1 is 1 there and 2 here"),
        (racing(shared, late), "arm.0.growth.0.at_fraction is 0.2 there and 0.3 here"),
        (racing(shared, GROWN, LLAMA), "arm is .* there and .*llama.* here"),
        (racing(shared, warmup_steps=3), "train.warmup_steps is 2 there and 3 here"),
    ):
        with pytest.raises(ValueError, match=f"was begun with another recipe: {message}"):
            run_race(other, tmp_path / "race", resume=True)
    with pytest.raises(ValueError, match="already holds a race; --resume continues it"):
        run_race(racing(shared), tmp_path / "race")
    with pytest.raises(Stopped):  # the control: its own recipe is gone on with
        run_race(racing(shared), tmp_path / "race", resume=True)
    written = runs.read_json(tmp_path / "race" / runs.RACE)
    del written["recipe"]["train"]["keep_checkpoints"]  # as of a version that had no such key
    runs.write_json(tmp_path / "race" / runs.RACE, written)
    with pytest.raises(Stopped):
        run_race(racing(shared), tmp_path / "race", resume=True)
    with pytest.raises(ValueError, match="train.keep_checkpoints is 2 there and 3 here"):
        run_race(racing(shared, keep_checkpoints=3), tmp_path / "race", resume=True)


def test_a_held_out_text_that_is_trained_on_is_refused_before_anything_runs(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def holding_out(name: str, documents: list[str]) -> Recipe:
        (tmp_path / name).write_text("\f".join(documents))
        table = recipe_to_dict(racing(shared))
        table["data"] |= {"valid_source": str(tmp_path / name), "valid_tokens": 4096}
        return recipe_from_dict(table, "the test")

    monkeypatch.setattr("tokenformer.race.run_jobs", lambda *arguments: pytest.fail("it ran"))
    trained_on = corpus(shared).read_text().split("\f")[:8]
    taken = holding_out("taken.txt", [f"{text} with another end" for text in trained_on])  # no document of the corpus
    with pytest.raises(ValueError, match="the held-out text: .* of its stretches .* occur in the training text"):
        run_race(taken, tmp_path / "race")
    assert not (tmp_path / "race" / runs.RACE).exists()
    own = holding_out("own.txt", [text[::-1] for text in trained_on])
    assert checks.check_texts(prepare(own.data, 0), None)["overlap"] == 0


@pytest.mark.parametrize("steps_before", [0, 4])
def test_a_branch_that_was_begun_goes_on_where_the_race_has_been_moved_to(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps_before: int
) -> None:
    recipe = racing(shared, race={"controls": False}, evaluate_every=1000, checkpoint_every=1000, flops=5e7)
    race = race_of(recipe, tmp_path / "here")
    trunk = headline(race, race.arms[0], 0, 0.01)
    train(trunk.recipe, race.place(trunk.name), say=None)

    def killed(run: Any, state: Any, *rest: Any) -> Any:
        if state.step == steps_before:
            raise KeyboardInterrupt
        taken = step(run, state, *rest)
        if state.step == steps_before:
            save_state(run, state)
        return taken

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sys.modules["tokenformer.train"], "train_step", killed)
        job = jobs.branch(race, race.arms[0], trunk, 0.5)
        train(job.recipe, race.place(job.name), say=None)
    (tmp_path / "here").rename(tmp_path / "there")
    moved = race_of(recipe, tmp_path / "there")
    job = jobs.branch(moved, moved.arms[0], trunk, 0.5)
    with pytest.raises(ValueError, match="was begun with another recipe: model.checkpoint"):
        train(job.recipe, moved.place(job.name), resume=True, say=None)
    settle_moved(moved)
    assert train(job.recipe, moved.place(job.name), resume=True, say=None)["status"] == "finished"


def test_a_race_stops_after_its_minutes_and_says_how_to_go_on(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "RUN_PROGRAM", "import sys, time; sys.stdin.readline(); time.sleep(60)")
    job = jobs.Job("slow", racing(shared), 1)
    ten = processes.Piece(10, time.monotonic() - 539.5)  # nine and a half seconds short of its last minute
    with pytest.raises(Stopped, match="stopped within 10 minutes.*--resume continues") as caught:
        processes.run_jobs(lambda: [job], tmp_path, 1, lambda line: None, None, ten)
    assert caught.value.exit_code == 75 and time.monotonic() < ten.ends_at
    late = processes.Piece(10, time.monotonic() - 541)
    with pytest.raises(ValueError, match="--minutes 10: used up before a run could be started"):
        processes.run_jobs(lambda: [job], tmp_path, 1, lambda line: None, None, late)
    processes.run_jobs(lambda: [], tmp_path, 1, lambda line: None, None, late)  # nothing is left to do: the report is


def test_a_piece_keeps_time_for_stopping_within_its_minutes() -> None:
    assert [(piece.stops_at, piece.ends_at) for piece in (processes.Piece(10, 5.0), processes.Piece(1, 0.0))] == [
        (5 + 540, 5 + 600), (54, 60)
    ]
    assert processes.Piece(100, 0.0).stops_at == 6000 - 60


def test_a_run_that_does_not_stop_is_killed_when_its_piece_ends(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deaf = "import signal, sys, time; signal.signal(15, signal.SIG_IGN); sys.stdin.readline(); time.sleep(60)"
    monkeypatch.setattr(processes, "RUN_PROGRAM", deaf)
    began = time.monotonic()
    with pytest.raises(Stopped):
        job = jobs.Job("deaf", racing(shared), 1)
        processes.run_jobs(lambda: [job], tmp_path, 1, lambda line: None, None, processes.Piece(0.05, began))
    assert 2.7 <= time.monotonic() - began < processes.GRACE_SECONDS / 4


def test_the_minutes_of_a_race_count_from_its_beginning(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces: list[Any] = []
    monkeypatch.setattr("tokenformer.race.run_jobs", lambda *arguments: pieces.append(arguments[-1]))
    monkeypatch.setattr("tokenformer.race.write_report", lambda folder: {"json": folder / "race.json", "html": folder})
    monkeypatch.setattr("tokenformer.race.summary", lambda report: [])
    clock = iter([100.0])
    monkeypatch.setattr("tokenformer.race.time.monotonic", lambda: next(clock, 900.0))  # what comes after takes long
    run_race(racing(shared), tmp_path / "own", minutes=10)
    run_race(racing(shared), tmp_path / "given", minutes=10, began=40.0)
    run_race(racing(shared), tmp_path / "none")
    assert pieces == [processes.Piece(10, 100.0), processes.Piece(10, 40.0), None]


def test_the_verb_counts_the_minutes_from_its_own_start(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}

    def reading(*arguments: Any) -> Any:
        told["loaded"] = time.monotonic()
        return type("Recipe", (), {"name": "slow", "arms": [], "race": None})

    monkeypatch.setattr("tokenformer.recipe.load_recipe", reading)
    monkeypatch.setattr("tokenformer.race.run_race", lambda *arguments: told.update(minutes=arguments[-2:]))
    before = time.monotonic()
    verbs.race(Namespace(recipe="slow", overrides=[], minutes=10, plan=False, out="x", resume=True, jobs=1))
    assert told["minutes"][0] == 10 and before <= told["minutes"][1] <= told["loaded"]


def test_a_name_that_leads_elsewhere_is_no_folder_to_race_in(shared: Path) -> None:
    for name in ("..", "../elsewhere", "/tmp/elsewhere", "a/b"):
        given = Namespace(recipe="tiny", overrides=[f"name={name}"], minutes=None, plan=False, out=None)
        with pytest.raises(ValueError, match=f"name: '{name}' is no name of a folder in runs/; give --out .from tiny"):
            verbs.race(given)


def test_a_run_is_as_far_as_the_furthest_that_it_has_told(shared: Path) -> None:
    child = processes.Child(jobs.Job("published/seed-0", tiny(shared), 100), None, None)  # type: ignore[arg-type]
    shares = []
    for line in (
        "step 3/6 · 50% of the FLOPs · loss 2.3", "step 3/6: 3.1000 bits per byte held out",
        "step 4/6 · 70% of the FLOPs · loss 2.2", "resumed from step-00000003", "step 3/6 · 50% of the FLOPs",
    ):
        child.hear(line)
        shares.append(child.share_done)
    assert shares == [0.5, 0.5, 0.7, 0.7, 0.7] and child.last_line.startswith("step 3/6")
    progress = processes.Progress(lambda: (1, 100))
    told = progress.line({"published/seed-0": child}, 420.0)
    assert told == "0 of 1 runs · about 3 min left · now published/seed-0 70%"


def test_the_time_left_is_told_by_what_this_session_did(shared: Path) -> None:
    child = processes.Child(jobs.Job("published/seed-0", tiny(shared), 100), None, None)  # type: ignore[arg-type]
    progress = processes.Progress(lambda: (1, 100))
    for line in ("resumed from step-00000004", "step 4/6 · 70% of the FLOPs · loss 2.2"):
        child.hear(line)
        assert "left" not in progress.line({"published/seed-0": child}, 60.0)  # the 70 % took none of these seconds
    child.hear("step 5/6 · 80% of the FLOPs · loss 2.1")
    assert "about 4 min left" in progress.line({"published/seed-0": child}, 120.0)


def test_a_run_that_leaves_no_result_is_not_run_for_ever(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "RUN_PROGRAM", "import sys; sys.stdin.readline(); print('no room'); sys.exit(3)")
    progress = processes.Progress(lambda: (1, 1))
    with pytest.raises(ValueError, match="arm lost ended without a result: no room"):
        processes.run_jobs(lambda: [jobs.Job("lost", racing(shared), 1)], tmp_path, 1, lambda line: None, progress)


def test_a_plan_says_what_a_race_comes_to_and_trains_nothing(shared: Path, tmp_path: Path) -> None:
    lines = plan_race(racing(shared), 1)
    assert lines[0].split()[:4] == ["arm", "role", "architecture", "parameters"]
    grown = next(line for line in lines if line.startswith("grown")).split()
    assert grown[3] < grown[4] and grown[-1].endswith("%")
    assert any("29 runs" in line for line in lines)  # 3 arms x 3 rates + 5 arms x 2 seeds x 2 budgets
    assert not list(tmp_path.iterdir())


def test_a_size_may_be_of_another_architecture_than_the_first_growing_arm(shared: Path) -> None:
    llama = {"name": "llama", "model": LLAMA["model"], "growth": [{"at_fraction": 0.2, "operator": "zero",
             "to": {"intermediate_size": 32}}]}
    sizes = [{"ffn_tokens": 8}, {**LLAMA["model"], "intermediate_size": 24}]
    arms = {arm.name: arm for arm in arms_of(racing(shared, GROWN, llama, race={"sizes": sizes}), 256)}
    assert arms["size-1"].recipe.model.architecture == "tokenformer"
    first = {"name": "first", "model": LLAMA["model"]}  # the small model of the second growing arm, not of the first
    arms_first = arms_of(racing(shared, first, GROWN, llama, race={"sizes": sizes[:1]}), 256)
    assert next(arm for arm in arms_first if arm.role == "size").recipe.model.architecture == "tokenformer"
    assert arms["size-2"].recipe.model.architecture == "llama" and arms["size-2"].of == "small"
    fields = arms["size-2"].recipe.model.fields
    assert fields["intermediate_size"] == 24 and "ffn_tokens" not in fields


def test_a_plan_says_what_is_beside_what_and_how_much_text_is_read(shared: Path, tmp_path: Path) -> None:
    final = tmp_path / "final.txt"
    final.write_text("".join(f"{i} is a number of its own, {i * i}\n" for i in range(300)))
    race = {"final_text": str(final), "cosine": ["grown"]}
    said = "\n".join(plan_race(racing(shared, {**GROWN, "train": {"weight_decay": 0.0}}, race=race), 1))
    assert "controls: scratch of grown, small of grown, dropped of grown, copy of scratch\ncosine runs: grown" in said
    assert "training text: " in said and "the longest run reads" in said
    assert "held-out text: " in said and "fewer than" not in said and "arms do not share" not in said
    assert "final text: " in said and "0.0% is shared with the held-out text" in said
    final.write_bytes(corpus(shared).read_bytes()[:20_000])
    with pytest.raises(ValueError, match="race.final_text: .* of its stretches .* occur in the training text"):
        plan_race(racing(shared, race=race), 1)
    apart = {"name": "apart", "train": {"weight_decay": 0.0}}
    recipe = racing(shared, GROWN, apart)
    recipe = replace(recipe, data=replace(recipe.data, valid_tokens=10**6))
    said = "\n".join(plan_race(recipe, 1))
    assert "arms do not share: train.weight_decay" in said and "fewer than data.valid_tokens = 1,000,000" in said


def test_arms_are_of_one_start_though_one_recipe_says_what_another_leaves_to_follow(shared: Path) -> None:
    relora = {"name": "relora", "model": LLAMA["model"], "growth": [{"at_fraction": 0.2, "operator": "relora",
              "to": {"rank": 2}}]}
    head = {"name": "head", "model": {**LLAMA["model"], "head_dim": 4}}  # which is 8 / 2
    other = {"name": "other", "model": {**LLAMA["model"], "head_dim": 2}}
    silent = {"name": "silent", "model": {**LLAMA["model"], "hidden_act": "gelu"}}  # decides on no weight
    race = race_of(racing(shared, relora, head, other, silent, race={"controls": False}), shared)
    arms = [{**arm_entry(race, arm), "recipe": recipe_to_dict(arm.recipe)} for arm in race.arms]
    starts = starts_of({"arms": arms})
    assert starts["relora"] == starts["head"] == starts["silent"] != starts["other"]
    assert len(set(starts_of({"arms": arms[::-1]}).values())) == len(set(starts.values())) == 2
    begun = []
    for place in ("here", "there"):
        recipe = {**arms[0]["recipe"], "model": {**arms[0]["recipe"]["model"], "checkpoint": place}}
        begun.append({**arms[0], "name": place, "recipe": recipe})
    assert len(set(starts_of({"arms": [*arms, *begun]}).values())) == 4  # a checkpoint is a start of its own
    for arm in arms:
        arm.pop("config")
    assert starts_of({"arms": arms})["relora"] != starts_of({"arms": arms})["head"]  # the control: by recipes alone


def test_a_plan_says_the_flops_of_all_runs_of_each_arm_and_their_sum(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokenformer.race.planned.seconds_per_flop", lambda *arguments: 1e-9)
    recipe = racing(shared, race={"cosine": ["small"], "most_extensions": 0})
    race, ran = race_of(recipe, tmp_path), {}

    def noting() -> list[jobs.Job]:
        ran.update({job.name: job.flops for job in todo(race)})
        return todo(race)

    ends_at_once("nobody")(noting, tmp_path)
    assert len(ran) == 3 * 3 + 5 * 2 * 2 + 1
    grids: list[Race] = []
    monkeypatch.setattr(jobs, "grid", lambda race: grids.append(race) or grid(race))
    lines = plan_race(recipe, 1)
    assert len(grids) == 1

    def flops_in(line: str) -> float:
        value, factor = re.findall(r"([\d.]+) ([MG])FLOP", line)[-1]
        return float(value) * {"M": 1e6, "G": 1e9}[factor]

    planned = {arm.name: flops_in(lines[1 + i]) for i, arm in enumerate(race.arms)}
    for name, flops in planned.items():
        own = {job: cost for job, cost in ran.items() if job.startswith(f"{name}/")}
        assert flops == pytest.approx(sum(own.values()), rel=0.01)
        without = {job: cost for job, cost in own.items() if "tune" not in job}  # the control
        assert (flops == pytest.approx(sum(without.values()), rel=0.01)) is (name in ("dropped", "copy"))
    assert flops_in(lines[-1]) == pytest.approx(sum(planned.values()), rel=0.01)


def test_the_widest_plan_of_a_shipped_race_fits_into_120_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenformer.race.planned.seconds_per_flop", lambda *arguments: 1e-9)
    lines = plan_lines(race_of(load_recipe("growth_tokens_gpu"), Path()), 2)
    rows = lines[: lines.index("")]
    assert len(rows) > 10 and 100 < max(map(len, rows)) <= 120


# --- checks ---


def test_overlap_counts_the_stretches_that_were_trained_on() -> None:
    generator = np.random.default_rng(0)
    training = generator.integers(0, 256, 100_000, dtype=np.uint8)
    fresh = generator.integers(0, 256, 64 * 30, dtype=np.uint8)
    taken = training[777 : 777 + 64 * 10]  # at no multiple of anything
    blocks = [training[:60_000], training[60_000 - 64 :]]
    assert checks.overlap(np.concatenate([fresh, taken]), iter(blocks)) == pytest.approx(0.25)
    assert checks.overlap(fresh, iter(blocks)) == 0
    nearly = taken.copy()
    nearly[::64] ^= 1  # one bit of every stretch
    assert checks.overlap(nearly, iter(blocks)) == 0
    naive = sum(taken[i : i + 64].tobytes() in training.tobytes() for i in range(0, len(taken), 64))
    assert naive == 10


def test_text_that_was_trained_on_is_refused_as_held_out(shared: Path) -> None:
    corpus = prepare(racing(shared).data, 0)
    found = checks.check_texts(corpus, None)
    assert found["overlap"] < 0.05 and found["final_overlap"] is None is found["final_held_out_overlap"]
    with pytest.raises(ValueError, match="race.final_text: 100% of its stretches .* occur in the training text"):
        checks.check_texts(corpus, np.asarray(corpus.train[:2048]))
    with pytest.raises(ValueError, match="the held-out text: 100% of its stretches .* occur in the training text"):
        checks.check_texts(replace(corpus, valid=corpus.train[:2048]), None)


def test_a_final_text_that_was_tuned_by_is_refused(shared: Path) -> None:
    corpus, generator = prepare(racing(shared).data, 0), np.random.default_rng(0)
    corpus = replace(corpus, valid=generator.integers(0, 256, 64 * 32, dtype=np.uint16))

    def final(taken: int, fresh: int) -> np.ndarray:
        return np.concatenate([corpus.valid[: 64 * taken], generator.integers(0, 256, 64 * fresh, dtype=np.uint16)])

    assert checks.check_texts(corpus, final(0, 64))["final_held_out_overlap"] == 0
    assert checks.check_texts(corpus, final(16, 64))["final_held_out_overlap"] == 0.5  # half of the held-out text
    assert checks.check_texts(corpus, final(3, 3))["final_held_out_overlap"] == 0.5  # half of the final text
    for taken, fresh, share in ((32, 0, "100%"), (20, 300, "62%"), (4, 3, "57%")):
        with pytest.raises(ValueError, match=f"race.final_text: {share} of its stretches .* in the held-out text"):
            checks.check_texts(corpus, final(taken, fresh))


def test_a_race_says_which_races_its_final_text_has_judged_before(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokenformer.race.run_jobs", ends_at_once("nothing"))
    for name in ("final.txt", "other.txt"):
        (tmp_path / name).write_text(f"{name} " * 400)

    def raced(folder: str, text: str, say: Any = None) -> tuple[list[str], str]:
        recipe = replace(racing(shared, race={"final_text": str(tmp_path / text)}), name=folder)
        page = run_race(recipe, tmp_path / folder, say=say).read_text(encoding="utf-8")
        return runs.read_json(tmp_path / folder / runs.RACE)["race"]["judged_before"], page

    first = raced("first", "final.txt")
    assert first[0] == [] and "had judged races" not in first[1] and "kept since" in first[1]
    again, page = raced("second", "final.txt")
    said = "The final text had judged races on this machine before this one began (first)"
    assert again == ["first"] and said in page
    assert raced("third", "other.txt")[0] == []  # the control
    kept, lines = cache_root() / JUDGED, list[str]()
    kept.write_text("[broken")  # which keeps no race from its end
    assert raced("fourth", "final.txt", lines.append)[0] == [] and any("cannot be kept" in line for line in lines)
    kept.unlink()
    race = runs.read_json(tmp_path / "first" / runs.RACE)
    del race["texts"]  # as older versions wrote it
    runs.write_json(tmp_path / "first" / runs.RACE, race)
    recipe = replace(racing(shared, race={"final_text": str(tmp_path / "final.txt")}), name="first")
    note_final_text(race_of(recipe, tmp_path / "first"), lines.append)
    assert list(runs.read_json(kept)) == [sha256_of(str(tmp_path / "final.txt"))]


def test_that_a_final_text_has_judged_is_kept_when_the_next_run_begins(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, kept = tmp_path / "final.txt", list[list[str]]()
    text.write_text("final " * 400)
    run_to_the_end = ends_at_once("nothing")

    def one_run(todo: Any, folder: Path, *rest: Any) -> None:
        def known() -> list[str]:
            todo()  # as after each run; a race that is killed now has noted it
            return [entry["race"] for entry in judged(sha256_of(str(text)))]

        kept.append(known())  # the control: nothing has been judged yet
        run_to_the_end(todo, folder, *rest)
        kept.append(known())

    monkeypatch.setattr("tokenformer.race.run_jobs", one_run)
    run_race(racing(shared, race={"final_text": str(text)}), tmp_path / "race", say=None)
    assert kept == [[], ["tiny"]]


def test_a_final_text_that_is_the_held_out_text_is_refused_before_anything_runs(shared: Path, tmp_path: Path) -> None:
    held_out, final = tmp_path / "held_out.txt", tmp_path / "final.txt"
    held_out.write_text("abcdef " * 200)
    final.write_bytes(held_out.read_bytes())
    table = recipe_to_dict(racing(shared, race={"final_text": str(final)}))
    table["data"]["valid_source"] = str(held_out)
    recipe = recipe_from_dict(table, "the test")
    with pytest.raises(ValueError, match="race.final_text = .*final.txt': is the same text as data.valid_source"):
        run_race(recipe, tmp_path / "race")
    with pytest.raises(ValueError, match="must be one text file"):
        require_another_text(recipe, str(tmp_path))
    final.write_text("abcdef " * 201)
    require_another_text(recipe, str(final))


def test_a_race_does_not_go_on_with_another_text(shared: Path, tmp_path: Path) -> None:
    text, final = shutil.copy(corpus(shared), tmp_path / "corpus.txt"), tmp_path / "final.txt"
    final.write_text("abcdef " * 200)
    table = recipe_to_dict(racing(shared, race={"final_text": str(final)}))
    table["data"]["source"] = str(text)
    recipe = recipe_from_dict(table, "the test")
    (tmp_path / "race").mkdir()

    def opened() -> bytes:
        open_race(race_of(recipe, tmp_path / "race"), prepare(recipe.data, 0))
        return (tmp_path / "race" / runs.RACE).read_bytes()

    begun = opened()
    for path, name in ((final, "race.final_text"), (Path(text), "the (training|held-out) text")):
        content = path.read_bytes()
        path.write_bytes(content + b" and more")
        with pytest.raises(ValueError, match=f"race was begun with another text: {name} had SHA-256 .*; put it back"):
            opened()
        path.write_bytes(content)
        assert opened() == begun


class PeekingFar(torch.nn.Module):
    """Sees the token that is 40 places on, where the text is that long."""

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        logits = torch.nn.functional.one_hot(input_ids, 256).float()
        logits[:, :-40] += torch.nn.functional.one_hot(input_ids[:, 40:], 256)
        return type("Output", (), {"logits": logits})


class Peeking(torch.nn.Module):
    """Says at every position which token comes next."""

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        logits = torch.nn.functional.one_hot(input_ids.roll(-1, 1), 256).float()
        return type("Output", (), {"logits": logits})


def test_a_model_that_looks_ahead_is_refused(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {key: value for key, value in LLAMA["model"].items() if key != "architecture"}
    config = build_config("llama", None, {"vocab_size": 256, **fields})
    checks.require_causal(config, "llama")
    checks.require_causal(config, "llama", 1)  # of the shortest windows that a recipe may have
    monkeypatch.setattr(checks, "build_model", lambda config, seed: Peeking())
    with pytest.raises(ValueError, match="arm cheat: its model sees the tokens that it should predict"):
        checks.require_causal(config, "cheat")
    with pytest.raises(ValueError, match="arm grown: its model sees the tokens"):
        plan_race(racing(shared))
    monkeypatch.setattr(checks, "build_model", lambda config, seed: PeekingFar())
    checks.require_causal(config, "far", 32)
    asked: list[int] = []
    monkeypatch.setattr("tokenformer.race.require_causal", lambda config, name, length: asked.append(length))
    table = recipe_to_dict(racing(shared, flops=9e8))
    table["data"]["sequence_length"] = 64
    require_all_feasible(race_of(recipe_from_dict(table, "the test"), Path()), None)
    assert set(asked) == {64}  # the whole window, as what lies beyond 32 may be seen as well
    with pytest.raises(ValueError, match="arm far: its model sees the tokens"):
        checks.require_causal(config, "far", 128)
