"""The arms of a race: those that the recipe names, and the controls that a race with a [race] table always has.

docs/fairness.md, rules 7 to 11, says why each of them is there.
"""

import dataclasses
from dataclasses import dataclass, field, replace
from typing import Any

from ..checkpoint import find_checkpoint
from ..flops import count_parameters, parameters
from ..growth.lowrank import Ranks, factorise, settled_ranks
from ..models import build_model
from ..plan import chooses_experts, model_config, phase_configs
from ..recipe import RaceSection, Recipe, arm_recipe, is_another_model, recipe_from_dict, recipe_to_dict
from ..start import Start, start_of

WEIGHTS_SEED = 10_000  # added to the seed of a copy's weights
NOT_SIZES = ("architectures", "dtype", "torch_dtype", "model_type", "transformers_version", "_name_or_path")


@dataclass(frozen=True)
class Arm:
    """One row of a race. `recipe` is its run of the largest budget with the first seed, its rate not yet tuned.

    role: arm, scratch, small, dropped, size or copy. `of`: the arm that a control stands beside; a dropped arm and a
    copy take its learning rate. `controls`: scratch, small, dropped -> the arm that is that of this one, which arms of
    the same sizes share.
    """

    name: str
    description: str
    role: str
    of: str | None
    recipe: Recipe
    controls: dict[str, str] = field(default_factory=dict)

    @property
    def tuned_as(self) -> str:
        return self.of if self.role in ("dropped", "copy") and self.of else self.name

    @property
    def grows(self) -> bool:
        return bool(self.recipe.growth)


def arms_of(recipe: Recipe, vocab_size: int, checkpoints: dict[str, str] | None = None) -> list[Arm]:
    """The recipe's arms, then the controls that none of them is already. ValueError where a recipe cannot be raced.

    `checkpoints`: those that arms started from when the race was begun, by their names.
    """
    race, known = recipe.race, checkpoints or {}
    arms = [Arm(each.name, each.description, "arm", None, arm_recipe(recipe, each)) for each in recipe.arms]
    for i, arm in enumerate(arms):
        if arm.recipe.model.checkpoint and race is not None and len(race.budgets) > 1:
            raise ValueError(f"arm {arm.name}: starts from model.checkpoint, whose cost no smaller budget holds; "
                             "set race.budgets = [1.0]")
        arms[i] = replace(arm, recipe=settled(arm.recipe, arm.name, known.get(arm.name)))
    if race is None:
        return arms
    for arm in arms:
        if arm.recipe.model.checkpoint:
            require_cost(arm, race)
        try:
            ends(arm.recipe, vocab_size)
        except ValueError as error:
            raise ValueError(f"arm {arm.name}: {error}") from None
    growing = [arm for arm in arms if arm.grows]
    if race.controls:
        for arm in growing:
            if arm.recipe.model.checkpoint:
                raise ValueError(f"arm {arm.name}: starts from model.checkpoint, so its controls cannot be made; "
                                 "write them as arms and set race.controls = false")
            target, small = target_of(arm, vocab_size), ungrown(arm.recipe, vocab_size)
            words = "the grown size from the first step"
            arm.controls["scratch"] = add(arms, "scratch", arm, target, words, vocab_size)
            words = "the size before growth, trained longer"
            arm.controls["small"] = add(arms, "small", arm, small, words, vocab_size)
        dropping = next((arm for arm in growing if keeps_moments(arm.recipe, vocab_size)), None)
        if dropping:
            words = "growth with the optimizer's state thrown away"
            drops = dropped(dropping.recipe)
            dropping.controls["dropped"] = add(arms, "dropped", dropping, drops, words, vocab_size)
        fresh = [arm for arm in arms if not arm.recipe.model.checkpoint]
        base = arm_named(arms, growing[0].controls["small"], "race.sizes") if growing else (fresh or arms)[0]
        if race.sizes and base.recipe.model.checkpoint:
            raise ValueError("race.sizes: has no effect where every arm starts from model.checkpoint")
        for number, fields in enumerate(race.sizes, start=1):
            key = f"race.sizes.{number - 1}"
            sized = changed_model(base.recipe, fields, key, vocab_size)
            same = next((a for a in arms if a.role != "arm" and same_run(a.recipe, sized, vocab_size)), None)
            if same:
                raise ValueError(f"{key}: is the model of {same.name} ({same.description}), which is there already")
            add(arms, f"size-{number}", base, sized, "another size from scratch", vocab_size, "size")
    elif race.sizes:
        raise ValueError("race.sizes: has no effect with race.controls = false")
    scratch = next((arm.name for arm in arms if arm.role == "scratch"), arms[0].name)
    reference = arm_named(arms, race.reference or scratch, "race.reference")
    if reference.recipe.model.checkpoint:
        raise ValueError(f"race.reference: {reference.name!r} starts from model.checkpoint, so a copy of it would show "
                         "no noise; name an arm that starts afresh")
    for name in race.cosine:
        arm_named(arms, name, "race.cosine")
    copy = replace(reference.recipe, name=f"{recipe.name}/copy")
    words = f"{reference.name} again with other initial weights: what lies between them is noise"
    return [*arms, Arm(free_name(arms, "copy", reference.name), words, "copy", reference.name, copy)]


def settled(recipe: Recipe, name: str, checkpoint: str | None) -> Recipe:
    """model.checkpoint as one that does not change while a race runs, as the newest of a run folder may."""
    place = recipe.model.checkpoint
    if not place:
        return recipe
    try:
        found = checkpoint or str(find_checkpoint(place))
    except ValueError as error:
        raise ValueError(f"arm {name}: model.checkpoint: {error}") from None
    return replace(recipe, model=replace(recipe.model, checkpoint=found))


def require_cost(arm: Arm, race: RaceSection) -> None:
    """ValueError unless what led to the checkpoint that an arm starts from is known, and less than a trial may cost."""
    key, budget = f"arm {arm.name}: model.checkpoint", arm.recipe.train.flops or 0
    where = f"{key} = {arm.recipe.model.checkpoint!r}:"
    try:
        cost = start_of(arm.recipe).flops
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    if not cost:
        raise ValueError(f"{where} what it cost to train is not known; a race takes checkpoints of runs, or what "
                         "tokenformer grow made of them")
    if cost >= budget * race.tune_fraction:
        raise ValueError(f"{where} has cost {cost:.3g} FLOPs, and a trial of its rate has {race.tune_fraction:g} of "
                         f"the budget of {budget:.3g}, that included; take a larger race.tune_fraction or budget")


def arm_named(arms: list[Arm], name: str, key: str) -> Arm:
    for arm in arms:
        if arm.name == name:
            return arm
    raise ValueError(f"{key}: {name!r} is no arm; there are {', '.join(arm.name for arm in arms)}")


def add(
    arms: list[Arm], name: str, of: Arm, recipe: Recipe, description: str, vocab_size: int, role: str = ""
) -> str:
    """Append a control; an arm that is trained just so already takes its role instead. Returns the name of either."""
    for i, arm in enumerate(arms):
        if same_run(arm.recipe, recipe, vocab_size):
            if arm.role == "arm":
                arms[i] = replace(arm, role=role or name, of=of.name)
            return arm.name
    name = free_name(arms, name, of.name)
    full = recipe.name.rpartition("/")[0] + "/" + name
    arms.append(Arm(name, description, role or name.split("-")[0], of.name, replace(recipe, name=full)))
    return name


def free_name(arms: list[Arm], name: str, of: str) -> str:
    taken = {arm.name for arm in arms}
    numbered = (f"{name}-{number}" for number in range(2, len(taken) + 3))
    return next(n for n in (name, f"{name}-{of}", f"{name}-of-{of}", *numbered) if n not in taken)


def same_run(a: Recipe, b: Recipe, vocab_size: int) -> bool:
    """Whether both train the same model in the same way, however their fields are written."""

    def course(recipe: Recipe) -> list[Any]:
        model = recipe.model
        return [model.rank, model.rank_start, model.checkpoint, recipe.data, recipe.train, recipe.growth]

    def start(recipe: Recipe) -> dict[str, Any]:
        return model_config(recipe, vocab_size, start_of(recipe)).to_dict()

    return course(a) == course(b) and start(a) == start(b)


# --- the recipes of controls ---


def ungrown(recipe: Recipe, vocab_size: int) -> Recipe:
    """Without growth; where that alone would have brought experts, there are none to keep in balance."""
    small = replace(recipe, growth=[])
    if small.train.expert_balance == "none" or chooses_experts(model_config(small, vocab_size, start_of(small))):
        return small
    return replace(small, train=replace(small.train, expert_balance="none"))


def keeps_moments(recipe: Recipe, vocab_size: int) -> bool:
    """Whether no growth of the run starts the optimizer afresh, be it by `moments` or by its operator."""
    events, _ = phase_configs(recipe, vocab_size, Start())
    return not any(event.afresh for event in events)


def dropped(recipe: Recipe) -> Recipe:
    """Moments dropped at every growth. New rows have no warm-up of their own then: all of them warm up."""
    policies = {"rewarm_new": "rewarm_all"}
    events = [
        replace(event, moments="drop", learning_rate=policies.get(event.learning_rate, event.learning_rate))
        for event in recipe.growth
    ]
    return replace(recipe, growth=events)


def changed_model(recipe: Recipe, fields: dict[str, Any], key: str, vocab_size: int) -> Recipe:
    if "checkpoint" in fields:
        raise ValueError(f"{key}: names a checkpoint; it must be a size from scratch")
    table = recipe_to_dict(ungrown(recipe, vocab_size))
    table["model"] = fields if is_another_model(recipe, fields) else table["model"] | fields
    try:
        sized = recipe_from_dict(table, key)
        ends(sized, vocab_size)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    return sized


def target_of(arm: Arm, vocab_size: int) -> Recipe:
    """The run whose model has the sizes of the arm's last growth from its first step."""
    recipe = arm.recipe
    first, last, changed = ends(recipe, vocab_size)
    before, after = first.to_dict(), last.to_dict()
    model = dataclasses.asdict(recipe.model)
    if first.model_type == last.model_type:
        # Sizes are whole numbers, or lists of one entry per layer; an epsilon that growth has moved is no size.
        sizes_of = {key: value for key, value in after.items() if isinstance(value, int | list)}
        fields = recipe.model.fields | {key: value for key, value in sizes_of.items() if before.get(key) != value}
    else:  # dense to mixture: another architecture, of which all is said that is not its own default
        usual = type(last)().to_dict()
        fields = {key: value for key, value in after.items() if key not in NOT_SIZES and usual.get(key) != value}
    model |= {"architecture": last.model_type, "fields": fields}
    target = replace(recipe, model=type(recipe.model)(**model), growth=[])
    rank = factor_rank(recipe, changed)
    if rank is None or settled_ranks(last, Ranks("rank", rank)) is None:  # a rank that is whole is none
        return replace(target, model=replace(target.model, rank=None, rank_start="random"))
    return replace(target, model=replace(target.model, rank=rank))


def factor_rank(recipe: Recipe, changed: dict[str, int]) -> int | None:
    """The rank of the factors that a run's matrices are in the end; None where they are whole, as those of ReLoRA are,
    which has factors beside them."""
    rank, beside = recipe.model.rank, any(event.operator == "relora" for event in recipe.growth)
    return None if rank is None or beside else changed.get("rank", rank)


def ends(recipe: Recipe, vocab_size: int) -> tuple[Any, Any, dict[str, int]]:
    """The configurations before the first growth and after the last, and the sizes that growth has changed."""
    start = start_of(recipe)
    _, phases = phase_configs(recipe, vocab_size, start)
    return model_config(recipe, vocab_size, start), phases[-1][0], phases[-1][1]


def parameters_of(recipe: Recipe, vocab_size: int) -> tuple[dict[str, int], dict[str, int]]:
    """Counts at the start and at the end: total, active, embedding, other."""
    first, last, sizes = ends(recipe, vocab_size)
    return counted(first, recipe.model.rank), counted(last, factor_rank(recipe, sizes))


def counted(config: Any, rank: int | None) -> dict[str, int]:
    count = parameters(config)
    if rank and settled_ranks(config, Ranks("rank", rank), "model.rank") is not None:
        model = build_model(config, 0)
        factorise(model, rank)
        count = count_parameters(model)
    return {"active": count["total"], **count}


def with_seed(recipe: Recipe, seed: int, role: str = "arm") -> Recipe:
    """A seed decides the weights, those of a copy by a seed of their own, the order of the text and the new entries of
    each growth."""
    return replace(
        recipe,
        data=replace(recipe.data, seed=seed),
        train=replace(recipe.train, seed=seed + WEIGHTS_SEED if role == "copy" else seed),
        growth=[replace(event, seed=seed + 100 * i) for i, event in enumerate(recipe.growth)],
    )
