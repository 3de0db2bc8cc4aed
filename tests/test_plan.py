"""The plan: growth on the right boundary, whole steps within the budget, totals that add up, refusals up front."""

from pathlib import Path
from typing import Any

import pytest
from tiny_runs import tiny

from tokenformer.flops import training_flops
from tokenformer.plan import model_config, plan
from tokenformer.recipe import Recipe
from tokenformer.schedule import Window
from tokenformer.start import Start


@pytest.fixture
def recipe(tmp_path: Path) -> Any:
    return lambda **changes: tiny(tmp_path, **changes)


def costs(recipe: Recipe, *ffn_tokens: int) -> list[int]:
    config = model_config(recipe, 256)
    found = []
    for tokens in ffn_tokens:
        config.ffn_tokens = tokens
        found.append(training_flops(config, recipe.data.sequence_length, recipe.data.batch_size))
    return found


def test_a_run_of_steps_is_summed_phase_by_phase(recipe: Any) -> None:
    growth = [{"at_step": 6, "to": {"ffn_tokens": 32}}, {"at_step": 9, "to": {"ffn_tokens": 64, "qkv_tokens": 16}}]
    planned = plan(recipe(growth=growth))
    small, large = costs(recipe(), 16, 32)
    assert [(p.first_step, p.end_step) for p in planned.phases] == [(0, 6), (6, 9), (9, 12)]
    assert planned.phases[0].sizes == {} and planned.phases[1].sizes == {"ffn_tokens": 32}
    assert planned.phases[2].sizes == {"ffn_tokens": 64, "qkv_tokens": 16}
    assert planned.flops_at(0) == 0
    assert planned.flops_at(5) == 5 * small
    assert planned.flops_at(9) == 6 * small + 3 * large
    assert planned.flops == planned.flops_at(12) == planned.flops_at(9) + 3 * planned.phases[2].flops_per_step
    assert planned.steps == 12 and planned.tokens == 12 * 4 * 16
    assert planned.growth_steps == [6, 9]


def test_short_names_of_axes_mean_the_same(recipe: Any) -> None:
    assert plan(recipe(growth=[{"at_step": 6, "to": {"ffn": 32}}])) == plan(recipe())


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.3, 0.5, 0.77])
@pytest.mark.parametrize("budget_in_small_steps", [20.0, 33.7, 100.5])
def test_a_budget_gives_as_many_whole_steps_as_fit(recipe: Any, fraction: float, budget_in_small_steps: float) -> None:
    small, large = costs(recipe(), 16, 32)
    budget = budget_in_small_steps * small
    growth = [{"at_fraction": fraction, "to": {"ffn_tokens": 32}}]
    planned = plan(recipe(train={"steps": None, "flops": budget}, growth=growth))
    assert planned.flops <= budget < planned.flops + large
    [grown] = planned.growth_steps
    assert planned.flops_at(grown) >= fraction * budget > planned.flops_at(grown - 1)


@pytest.mark.parametrize("fractions", [[0.3], [0.5], [0.2, 0.6], [0.1, 0.11, 0.9]])
@pytest.mark.parametrize("steps", [37, 100, 999])
def test_a_fraction_of_a_run_of_steps_is_of_its_own_total(recipe: Any, fractions: list[float], steps: int) -> None:
    growth = [{"at_fraction": f, "to": {"ffn_tokens": 16 * 3 ** (i + 1)}} for i, f in enumerate(fractions)]
    planned = plan(recipe(train={"steps": steps}, growth=growth))
    assert planned.steps == steps
    for fraction, grown in zip(fractions, planned.growth_steps, strict=True):
        assert planned.flops_at(grown) >= fraction * planned.flops
        # One step earlier it would fall short, or be so close that moving it moves the total past it.
        largest = planned.phases[-1].flops_per_step
        assert planned.flops_at(grown - 1) < fraction * planned.flops + largest


SLOPE = {"at_slope": -0.05, "at_latest_fraction": 0.6, "slope_window": 0.2, "to": {"ffn_tokens": 32}}


def test_one_growth_of_several_stages_is_planned_as_so_many(recipe: Any) -> None:
    stages = {"at_fraction": 0.2, "until_fraction": 0.6, "stages": 3, "shape": "exponential", "to": {"ffn": 128}}
    written_out = [
        {"at_fraction": share, "to": {"ffn": size}} for share, size in ((0.2, 32), (0.4, 64), (0.6, 128))
    ]
    planned, plain = (plan(recipe(train={"steps": 100}, growth=growth)) for growth in ([stages], written_out))
    assert planned.phases == plain.phases and len(planned.phases) == 4
    assert [event.name for event in planned.events] == ["growth.0 (1 of 3)", "growth.0 (2 of 3)", "growth.0 (3 of 3)"]


def test_a_growth_that_waits_for_a_slope_is_planned_for_the_latest(recipe: Any) -> None:
    small, large = costs(recipe(), 16, 32)
    budget = 100 * small
    changes = {"train": {"steps": None, "flops": float(budget)}}
    planned = plan(recipe(**changes, growth=[SLOPE]))
    fixed = plan(recipe(**changes, growth=[{"at_fraction": 0.6, "to": {"ffn_tokens": 32}}]))
    assert planned.phases == fixed.phases and planned.growth_steps == [60]
    assert planned.window == Window(since=2, bin_steps=2, bins=10)  # a fifth of 100 steps, after 2 of warm-up
    assert fixed.window is None


@pytest.mark.parametrize("grown", [1, 17, 42, 59])
def test_what_is_left_of_a_budget_is_planned_anew_after_an_early_growth(recipe: Any, grown: int) -> None:
    small, large, largest = costs(recipe(), 16, 32, 64)
    budget = 100 * small
    growth = [SLOPE, {"at_fraction": 0.8, "to": {"ffn_tokens": 64}}]
    changed = recipe(train={"steps": None, "flops": float(budget)}, growth=growth)
    planned = plan(changed, grown_at=[grown])
    assert planned.growth_steps[0] == grown and planned.window is None
    assert planned.flops <= budget < planned.flops + largest
    second = planned.growth_steps[1]
    assert planned.flops_at(second) >= 0.8 * budget > planned.flops_at(second - 1)
    assert planned.flops_at(second) == grown * small + (second - grown) * large
    assert planned.steps <= plan(changed).steps  # which the text is enough for
    assert plan(changed, grown_at=[grown, second]) == planned


@pytest.mark.parametrize("grown", [1, 17, 42, 59])
def test_a_run_of_steps_is_planned_anew_as_well(recipe: Any, grown: int) -> None:
    growth = [SLOPE, {"at_fraction": 0.8, "to": {"ffn_tokens": 64}}]
    changed = recipe(train={"steps": 100}, growth=growth)
    planned, before = plan(changed, grown_at=[grown]), plan(changed)
    assert planned.steps == 100 and planned.flops > before.flops
    second = planned.growth_steps[1]
    assert grown < second <= before.growth_steps[1]
    assert planned.flops_at(second) >= 0.8 * planned.flops > planned.flops_at(second - 2)


def test_growths_that_follow_from_the_recipe_leave_the_plan_as_it_is(recipe: Any) -> None:
    growth = [{"at_fraction": f, "to": {"ffn_tokens": 16 * 3 ** (i + 1)}} for i, f in enumerate((0.1, 0.11, 0.9))]
    for steps in (37, 100, 999):
        changed = recipe(train={"steps": steps}, growth=growth)
        planned = plan(changed)
        for done in range(4):
            assert plan(changed, grown_at=planned.growth_steps[:done]) == planned


@pytest.mark.parametrize(("policy", "since"), [("keep", 10), ("rewarm_new", 10), ("rewarm_all", 17), ("restart", 17)])
def test_the_window_of_a_later_slope_starts_where_the_model_has_grown_and_is_warm(
    recipe: Any, policy: str, since: int
) -> None:
    first = {"at_step": 10, "to": {"ffn_tokens": 32}, "learning_rate": policy, "rewarm_steps": 7}
    changed = recipe(train={"steps": 100}, growth=[first, {**SLOPE, "to": {"ffn_tokens": 64}}])
    assert plan(changed).window is None
    window = plan(changed, grown_at=[10]).window
    assert window and window.since == since


def test_a_fraction_that_falls_on_a_boundary_is_that_boundary(recipe: Any) -> None:
    same_size = {"sequence_length": 16, "batch_size": 1}
    small, large = costs(recipe(data=same_size), 16, 32)
    # s steps small and n - s large: s is the share f of the whole when f = s a / (s a + (n - s) b)
    steps, grown = 50, 20
    total = grown * small + (steps - grown) * large
    growth = [{"at_fraction": float(f"{grown * small / total - 1e-9:.12f}"), "to": {"ffn_tokens": 32}}]
    assert plan(recipe(data=same_size, train={"steps": steps}, growth=growth)).growth_steps == [grown]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"steps": None, "flops": 10.0}, "growth": []}, "train.flops = 10 is less than one step"),
        ({"train": {"steps": None, "flops": 1e40}, "growth": []}, r"train.flops = 1e\+40 comes to more than .* steps"),
        ({"train": {"steps": None, "flops": 4e6}}, r"growth.0 would come at step 6; it must come after step 0 and"),
        ({"growth": [{"at_step": 6, "to": {"fnn": 32}}]}, "growth.0.to.fnn"),
        ({"growth": [{"at_step": 6, "to": {"hidden_size": 32}, "operator": "masked"}]}, "growth.0.options.ramp_steps"),
        (
            {"growth": [{"at_step": 6, "to": {"ffn": 32}, "options": {"share": 1}}]},
            "growth.0.options.share: zero_keys has no such option",
        ),
        ({"growth": [{"at_step": 6, "to": {"ffn_tokens": 8}}]}, "growth.0.to.ffn_tokens: 8 is smaller"),
        ({"growth": [{"at_step": 6, "to": {"ffn_tokens": 24}, "operator": "tile"}]}, "24 is not a multiple"),
        ({"growth": [{"at_step": 6, "to": {"ffn_tokens": 32}}], "model": {"theta": "softmax"}}, "softmax"),
        (
            {"growth": [{"at_step": 5, "to": {"ffn": 32}}, {"at_fraction": 0.01, "to": {"ffn": 64}}]},
            "growth.1 would come at step 5; it must come after step 5",
        ),
        (
            {"growth": [{"at_step": 6, "to": {"ffn": 32}, "moments": "drop", "learning_rate": "rewarm_new"}]},
            "rewarm_new' has no effect",
        ),
        (
            {"growth": [{"at_step": 6, "to": {"ffn": 32}, "operator": "tile", "learning_rate": "rewarm_new"}]},
            "rewarm_new' has no effect with operator = 'tile'",
        ),
        (
            {"growth": [{"at_fraction": 0.4, "until_fraction": 0.5, "stages": 5, "to": {"ffn": 64}}]},
            r"growth.0 \(2 of 5\) would come at step 6; it must come after step 6",
        ),
        (
            {"growth": [{"at_fraction": 0.1, "until_fraction": 0.9, "stages": 3, "to": {"ffn": 18}}]},
            "growth.0.stages: stage 2 of 3 would take ffn_tokens from 17 to 17",
        ),
        (
            {"growth": [SLOPE, {"at_fraction": 0.7, "to": {"ffn": 64}}]},
            "growth.0 may come as late as 0.6 of the FLOPs, and less than two steps lie between that and 0.7",
        ),
        ({"growth": [SLOPE | {"at_latest_fraction": 0.9}]}, "growth.0 may come as late as 0.9 .* two steps .* and 1,"),
        ({"train": {"warmup_steps": 13}}, "train.warmup_steps = 13 is more than what the run has left: steps 0 to 12"),
        (
            {"growth": [{"at_step": 6, "to": {"ffn": 32}, "learning_rate": "rewarm_all", "rewarm_steps": 7}]},
            "growth.0.rewarm_steps = 7 is more than what the run has left: steps 6 to 12",
        ),
        ({"model": {"vocab_size": 100}}, "model.vocab_size = 100 is less than the tokenizer's 256"),
        ({"model": {"max_position_embeddings": 8}}, "data.sequence_length = 16 is more than"),
        ({"model": {"hiden_size": 8}}, "hidden_size"),
        (
            {"model": {"architecture": "llama", "hidden_size": 8}, "growth": [{"at_step": 6, "to": {"ffn": 32}}]},
            "growth.0",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line_before_training(recipe: Any, changes: Any, message: str) -> None:
    plan(recipe())  # the control
    if changes.get("model", {}).get("architecture"):
        changed = recipe()
        changed.model.architecture, changed.model.fields = "llama", {"hidden_size": 8, "num_attention_heads": 2}
    else:
        changed = recipe(**changes)
    with pytest.raises(ValueError, match=message) as caught:
        plan(changed)
    assert "\n" not in str(caught.value)


def test_operators_that_add_rows_or_warm_up_all_are_planned(recipe: Any) -> None:
    for operator, policy in (("zero_keys", "rewarm_new"), ("tile", "rewarm_all"), ("tile", "keep")):
        growth = [{"at_step": 6, "to": {"ffn": 32}, "operator": operator, "learning_rate": policy, "rewarm_steps": 6}]
        assert plan(recipe(growth=growth)).growth_steps == [6]


def test_a_model_that_cannot_grow_can_be_planned_without_growth(recipe: Any) -> None:
    changed = recipe(growth=[])
    changed.model.architecture = "llama"
    changed.model.fields = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16}
    assert plan(changed).steps == 12


def test_frozen_layers_are_counted_as_such_through_later_growth_and_from_a_checkpoint(recipe: Any) -> None:
    pro = {"at_step": 3, "operator": "llama_pro", "to": {"num_hidden_layers": 2}, "options": {"freeze": True}}
    wider = {"at_step": 6, "operator": "zero_keys", "to": {"ffn": 32}}
    deeper = {"at_step": 9, "operator": "stack", "to": {"num_hidden_layers": 4}}
    changed = recipe(growth=[pro, wider, deeper])
    config, expected = model_config(changed, 256), []
    for layers, tokens, trained in (
        (1, 16, None),
        (2, 16, [False, True]),
        (2, 32, [False, True]),
        (4, 32, [False, True, False, True]),
    ):
        config.num_hidden_layers, config.ffn_tokens = layers, tokens
        expected.append(training_flops(config, 16, 4, trained))
    found = [phase.flops_per_step for phase in plan(changed).phases]
    assert found == expected
    pro["options"] = {}  # the control
    assert plan(recipe(growth=[pro, wider, deeper])).phases[1].flops_per_step > found[1]

    config.num_hidden_layers, config.ffn_tokens = 2, 16
    names = ["model.layers.1.mlp.key", "model.layers.1.mlp.value"]
    onward = recipe(growth=[])
    onward.model.checkpoint = "somewhere"
    for trained_parameters, layers in ((names, [False, True]), (None, None)):
        start = Start("somewhere", config.to_dict(), trained_parameters=trained_parameters)
        assert plan(onward, start=start).phases[0].flops_per_step == training_flops(config, 16, 4, layers)
