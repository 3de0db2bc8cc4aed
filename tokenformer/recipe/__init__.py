"""A recipe is a whole run, or a whole race, as one small TOML or JSON file.

It is read into the dataclasses of sections.py, changed by dotted overrides (`train.steps=2000`), checked
once, and from there on written in full beside whatever it made. `tokenformer recipe` prints every key.

This room imports nothing else of ours and nothing heavy.
"""

import copy
import dataclasses
import json
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .check import Where, build, check_value, describe
from .sections import (
    AFRESH,
    ALTERNATIVES,
    ArmSection,
    DataSection,
    GrowthSection,
    ModelSection,
    NoiseSection,
    RaceSection,
    Recipe,
    TrainSection,
)
from .write import recipe_reference, recipe_to_toml

__all__ = [
    "AFRESH",
    "ArmSection",
    "DataSection",
    "GrowthSection",
    "ModelSection",
    "NoiseSection",
    "RaceSection",
    "Recipe",
    "TrainSection",
    "arm_recipe",
    "is_another_model",
    "load_recipe",
    "recipe_from_dict",
    "recipe_reference",
    "recipe_to_dict",
    "recipe_to_toml",
    "shipped_recipes",
]

# What a race with [race] settles by a key of its own.
RACED = {
    "train.learning_rate": "race.learning_rates",
    "train.seed": "race.seeds",
    "data.seed": "race.seeds",
    "train.keep_at": "race.budgets",
}

# --- reading ---


def load_recipe(path_or_name: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe in a .toml or .json file, or the shipped one of that name, changed by `key=value` overrides.

    Values are read as TOML; bare words are strings. ValueError in one line: the key, where it is from.
    """
    path = recipe_path(path_or_name)
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows editors begin with a mark
        table = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such recipe file") from None
    except (json.JSONDecodeError, tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not valid {path.suffix[1:].upper()}: {error}") from None
    if not isinstance(table, dict):
        raise ValueError(f"{path}: a recipe is a table of keys, not {describe(table)}")
    table.setdefault("name", path.stem)
    settings = [parse_override(text) for text in overrides]
    given = {dotted for dotted, _ in settings}
    if "model.checkpoint" in given:
        table["model"] = {}  # a checkpoint brings all of it
    for dotted, value in settings:
        override(table, dotted, value, given)
    recipe = resolve(table, lambda k: "the command line" if any(covers(d, k) for d in given) else str(path))
    for dotted in given:
        require_effect(recipe, dotted)
    return recipe


def recipe_path(path_or_name: str | Path) -> Path:
    """A path ending in .toml or .json as it is; any other text is the name of a shipped recipe."""
    path = Path(path_or_name)
    if path.suffix in (".toml", ".json"):
        return path
    shipped = shipped_recipes()
    if str(path_or_name) not in shipped:
        names = ", ".join(shipped)
        raise ValueError(f"{path_or_name}: neither a .toml or .json file nor a shipped recipe ({names})")
    return shipped[str(path_or_name)]


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of each recipe that came along: in the package when installed, beside it in a checkout."""
    here = Path(__file__).resolve().parent.parent
    folder = next((f for f in (here / "recipes", here.parent / "recipes") if f.is_dir()), here / "recipes")
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def recipe_from_dict(table: dict[str, Any], origin: str) -> Recipe:
    """The recipe that a nested table says (the inverse of `recipe_to_dict`); `origin` names it in errors."""
    return resolve(table, lambda _: origin)


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe in full, in the layout of the file; JSON can hold it, `recipe_from_dict` gives it back."""
    table: dict[str, Any] = {"name": recipe.name, "description": recipe.description}
    model = dataclasses.asdict(recipe.model)
    fields = model.pop("fields")
    table["model"] = {**model, **fields}
    table["data"] = dataclasses.asdict(recipe.data)
    table["train"] = dataclasses.asdict(recipe.train)
    table["growth"] = [dataclasses.asdict(event) for event in recipe.growth]
    table["arm"] = [
        {"name": arm.name, "description": arm.description, **copy.deepcopy(arm.overrides)}
        for arm in recipe.arms
    ]
    table["race"] = dataclasses.asdict(recipe.race) if recipe.race else None
    table["noise"] = dataclasses.asdict(recipe.noise) if recipe.noise else None
    return table


def arm_recipe(recipe: Recipe, arm: ArmSection) -> Recipe:
    """The run of one arm: the race's recipe with the arm's tables merged in key by key.

    An arm's `growth` replaces the whole list. An arm of another architecture, or one that starts from a checkpoint,
    has an empty [model] to begin with, since the fields of one model mean nothing to the next.
    """
    table = recipe_to_dict(recipe)
    table |= {"name": f"{recipe.name}/{arm.name}", "description": arm.description}
    table |= {"arm": [], "race": None, "noise": None}
    origin = f"arm {arm.name} of {recipe.name}"
    for section, values in copy.deepcopy(arm.overrides).items():
        if section == "growth":
            table["growth"] = values
            continue
        if not isinstance(values, dict):
            raise ValueError(f"{section}: must be a table, not {describe(values)} (from {origin})")
        if section == "model" and is_another_model(recipe, values):
            table["model"] = {}
        for name, value in values.items():
            for other in ALTERNATIVES.get(name, ()):
                if other not in values:
                    table[section].pop(other, None)
            table[section][name] = value
    return resolve(table, lambda _: origin)


# --- overrides ---


def parse_override(text: str) -> tuple[str, Any]:
    """`train.steps=2000` -> ("train.steps", 2000). What is not TOML is a string as it stands."""
    dotted, equals, raw = text.partition("=")
    dotted = dotted.strip()
    if not equals or not dotted or not all(dotted.split(".")):
        raise ValueError(f"{text!r}: an override is written key=value, such as train.steps=2000")
    try:
        parsed = tomllib.loads(f"value = {raw}")
    except tomllib.TOMLDecodeError:
        return dotted, raw.strip()
    return dotted, parsed["value"] if parsed.keys() == {"value"} else raw.strip()


def override(table: dict[str, Any], dotted: str, value: Any, given: Iterable[str] = ()) -> None:
    """Set one dotted key of a nested table in place; entries of a list go by number or by name.

    `given`: the dotted keys of all overrides; the alternatives of the key that are not among them are taken out.
    """
    *parents, last = dotted.split(".")
    node: Any = table
    for depth, name in enumerate([*parents, last]):
        final = depth == len(parents)
        if isinstance(node, list):
            position = list_position(node, name, dotted)
            if final:
                node[position] = value
            node = node[position]
        elif not isinstance(node, dict):
            raise ValueError(f"{dotted}: {'.'.join(parents[:depth])} is not a table (from the command line)")
        elif final:
            node[name] = value
            for other in ALTERNATIVES.get(name, ()):
                if ".".join([*parents, other]) not in given:
                    node.pop(other, None)
        else:
            node = node.setdefault(name, {})


def list_position(entries: list[Any], name: str, dotted: str) -> int:
    names = [entry.get("name") if isinstance(entry, dict) else None for entry in entries]
    if name in names:
        return names.index(name)
    if name.isdecimal() and int(name) < len(entries):
        return int(name)
    known = [str(n if n is not None else i) for i, n in enumerate(names)]
    raise ValueError(f"{dotted}: no entry {name}; there are {len(entries)}: {', '.join(known) or 'none'}")


def require_effect(recipe: Recipe, dotted: str) -> None:
    """ValueError where a key that the command line sets for all arms of a race is used by none of them."""
    section, *names = dotted.split(".")
    if recipe.race and dotted in RACED:
        raise ValueError(f"{dotted}: has no effect beside {RACED[dotted]} (from the command line)")
    if not recipe.arms or names == ["architecture"]:
        return
    if section == "growth":
        taken = all("growth" in arm.overrides for arm in recipe.arms)
    elif section in ("model", "train") and len(names) == 1:
        own, ways = [arm.overrides.get(section, {}) for arm in recipe.arms], {*names, *ALTERNATIVES.get(names[0], ())}
        taken = all(ways & each.keys() or (section == "model" and is_another_model(recipe, each)) for each in own)
    else:
        return
    if taken:
        example = f"arm.{recipe.arms[0].name}.{dotted}"
        raise ValueError(f"{dotted}: has no effect: every arm has its own, such as {example} (from the command line)")


def is_another_model(recipe: Recipe, values: dict[str, Any]) -> bool:
    """Whether an arm's [model] replaces the race's: of another architecture, or from a checkpoint."""
    return values.get("architecture") not in (None, recipe.model.architecture) or "checkpoint" in values


def covers(dotted: str, path: str) -> bool:
    """Whether an override of `dotted` is what put `path` (the same key, a parent or a child of it) there."""
    return dotted == path or dotted.startswith(path + ".") or path.startswith(dotted + ".")


# --- checking what keys must be true together ---


def resolve(table: dict[str, Any], where: Where) -> Recipe:
    """Every key known, of its type and in its range; then what keys must be true together."""
    recipe = build(Recipe, copy.deepcopy(table), "", where)

    exactly_one(recipe.train, ("steps", "flops"), "train", where)
    if recipe.data.batch_size % recipe.train.accumulation_steps:
        raise ValueError(
            f"train.accumulation_steps: {recipe.train.accumulation_steps} does not divide "
            f"data.batch_size = {recipe.data.batch_size} (from {where('train.accumulation_steps')})"
        )
    model = recipe.model
    if model.rank_start != "random" and model.rank is None:
        raise ValueError(f"model.rank_start: has no effect without model.rank (from {where('model.rank_start')})")
    given = [name for name in ("preset", "rank") if getattr(model, name)]
    if model.checkpoint is not None and (model.fields or given or model.architecture != "tokenformer"):
        others = ", ".join([*model.fields, *given]) or "architecture"
        raise ValueError(f"model.checkpoint: brings the whole model, so {others} has no effect beside it")
    check_growth(recipe, where)
    check_nested(recipe, where)
    check_race(recipe, where)
    names = [arm.name for arm in recipe.arms]
    for name in names:
        if [other.casefold() for other in names].count(name.casefold()) > 1:  # a folder each, on any disk
            raise ValueError(f"arm: two arms are named {name} (from {where('arm')})")
    for arm in recipe.arms:
        arm_recipe(recipe, arm)  # a mistake in the last arm is found before the first one has run
    return recipe


def check_race(recipe: Recipe, where: Where) -> None:
    """The grid is one, the budgets rise, the seeds are fresh, and the run is of a kind that can be branched.

    Rates and budgets name folders, with six digits.
    """
    race = recipe.race
    if race is None:
        return
    rates, budgets = ([float(f"{value:g}") for value in each] for each in (race.learning_rates, race.budgets))
    steps = [b / a for a, b in zip(rates, rates[1:], strict=False)]
    grid = len(steps) >= 2 and all(step > 1 and abs(step / steps[0] - 1) < 0.01 for step in steps)
    rising = all(a < b for a, b in zip(budgets, budgets[1:], strict=False)) and race.budgets[-1:] == [1.0]
    several = len(set(race.seeds)) == len(race.seeds) >= 2
    for name, fine, must in (
        ("learning_rates", grid, "be three or more that rise by a constant factor, in six digits"),
        ("budgets", rising, "rise, in six digits, and end at 1"),
        ("seeds", several, "be two or more, each once"),
        ("cosine", len(set(race.cosine)) == len(race.cosine), "name each arm once"),
        ("tune_seed", race.tune_seed not in race.seeds, "not be one of race.seeds: trials are no headline runs"),
    ):
        if not fine:
            raise ValueError(f"race.{name}: {getattr(race, name)}: must {must} (from {where(f'race.{name}')})")
    if recipe.train.flops is None:
        raise ValueError(f"race: needs train.flops, the largest budget (from {where('race')})")
    if recipe.train.schedule != "wsd":
        raise ValueError(
            f"train.schedule: {recipe.train.schedule!r} cannot be branched at several budgets; a race with [race] "
            f"takes 'wsd' (from {where('train.schedule')})"
        )
    for dotted, settles in RACED.items():
        table, _, name = dotted.partition(".")
        section = getattr(recipe, table)
        if getattr(section, name) != getattr(type(section)(), name):
            raise ValueError(f"{dotted}: has no effect beside {settles} (from {where(dotted)})")
    if recipe.noise:
        raise ValueError(f"noise: a race with [race] measures its own (from {where('noise')})")
    for arm in recipe.arms:
        settled = ("flops", "steps", "schedule", "seed", "keep_at", "learning_rate", "min_learning_rate_ratio")
        changed = [f"train.{key}" for key in settled if key in arm.overrides.get("train", {})]
        changed += ["data"] if "data" in arm.overrides else []
        if changed:
            raise ValueError(f"arm {arm.name}: {changed[0]} is the race's, the same for all (from {where('arm')})")
        own = arm_recipe(recipe, arm)
        decay = own.train.decay_fraction
        if not 0 < decay < 1:
            raise ValueError(
                f"arm {arm.name}: train.decay_fraction = {decay:g}: must be above 0 and below 1 in a race with [race], "
                f"whose runs all have a stable phase and a decay (from {where('arm')})"
            )
        begin = since = 0.0  # the schedule that runs: where in its course it began, and at which share of the FLOPs
        for i, event in enumerate(own.growth):
            latest = event.until_fraction or event.at_fraction or event.at_latest_fraction or 0.0
            if event.learning_rate not in AFRESH and latest > 1 - decay:
                raise ValueError(
                    f"arm {arm.name}: growth at {latest:g} of the FLOPs, and the decay begins at {1 - decay:g}: it "
                    f"belongs to the stable phase, or restarts the schedule (from {where('arm')})"
                )
            if event.seed:
                origin = where("arm")
                raise ValueError(f"arm {arm.name}: growth.{i}.seed: has no effect beside race.seeds (from {origin})")
            if event.at_step is not None:
                raise ValueError(
                    f"arm {arm.name}: growth.at_step = {event.at_step}: in a race with [race] growth comes at a share "
                    f"of the FLOPs, the same in shorter runs; use at_fraction (from {where('arm')})"
                )
            earliest = event.at_earliest_fraction if event.at_fraction is None else event.at_fraction
            stands = begin + (1 - begin) * ((earliest or 0.0) - since) / (1 - since)
            furthest = round(min(stands, 1 - decay), 9)
            if event.rewind_to is not None and event.rewind_to > furthest:
                raise ValueError(
                    f"arm {arm.name}: growth.{i}.rewind_to = {event.rewind_to:g}: must be at most {furthest:g}; in a "
                    f"race with [race] a rewind goes neither forward from where its schedule stands, {stands:g}, nor "
                    f"into the decay, which begins at {1 - decay:g} (from {where('arm')})"
                )
            if event.learning_rate in AFRESH:
                begin, since = event.rewind_to or 0.0, latest


def check_nested(recipe: Recipe, where: Where) -> None:
    train = recipe.train
    if train.nested == "none":
        if train.nested_smallest != TrainSection.nested_smallest:
            origin = where("train.nested_smallest")
            raise ValueError(f"train.nested_smallest: has no effect without train.nested (from {origin})")
        return
    waits = [f"growth.{i}.at_slope" for i, event in enumerate(recipe.growth) if event.at_slope is not None]
    meets = {
        "train.compile": (train.compile, "every size would be compiled anew"),
        "model.rank": (recipe.model.rank is not None, "low-rank factors have no rows of their own"),
        "".join(waits[:1]): (bool(waits), "the loss jumps with the size of each step"),
    }
    for key, (met, why) in meets.items():
        if met:
            raise ValueError(f"{key}: does not go with train.nested = {train.nested!r}: {why} (from {where(key)})")


def check_growth(recipe: Recipe, where: Where) -> None:
    for i, event in enumerate(recipe.growth):
        path = f"growth.{i}"
        exactly_one(event, ("at_step", "at_fraction", "at_slope"), path, where)
        if not event.to:
            raise ValueError(f"{path}.to: names nothing that grows (from {where(path)})")
        for axis, size in event.to.items():
            check_value(f"{path}.to.{axis}", size, int, {"low": 0 if axis == "rank" else 1}, where)
        if event.at_step and recipe.train.steps and event.at_step >= recipe.train.steps:
            raise ValueError(
                f"{path}.at_step: {event.at_step} is not before the end, train.steps = {recipe.train.steps} "
                f"(from {where(path)})"
            )
        check_effects(event, recipe.train.schedule, path, where)
        check_order(recipe.growth[:i], event, path, where)


def check_effects(event: GrowthSection, schedule: str, path: str, where: Where) -> None:
    """Every key that is set has an effect beside the others, and what another one needs is there."""
    slope, several = event.at_slope is not None, event.stages > 1 or event.order == "one_by_one"
    needs = {
        "at_earliest_fraction": (slope, "at_slope"),
        "at_latest_fraction": (slope, "at_slope"),
        "slope_window": (slope, "at_slope"),
        "until_fraction": (several, "stages or order = 'one_by_one'"),
        "shape": (event.stages > 1, "stages"),
        "multiple_of": (event.stages > 1, "stages"),
        "order": (len(event.to) > 1, "a second axis in `to`"),
        "rewind_to": (event.learning_rate == "rewind", "learning_rate = 'rewind'"),
    }
    for field in dataclasses.fields(event):
        met, need = needs.get(field.name, (True, ""))
        if not met and getattr(event, field.name) != field.default:
            raise ValueError(f"{path}.{field.name}: has no effect without {need} (from {where(path)})")
    required = {
        "at_latest_fraction": (slope, "at_slope: the share of the FLOPs at which it grows anyway"),
        "at_fraction": (several, "stages and order = 'one_by_one': when the first of them comes"),
        "until_fraction": (several, "stages and order = 'one_by_one': when the last of them comes"),
        "rewind_to": (event.learning_rate == "rewind", "learning_rate = 'rewind': the share that it goes back to"),
    }
    for name, (needed, why) in required.items():
        if needed and getattr(event, name) is None:
            raise ValueError(f"{path}.{name}: missing; needed by {why} (from {where(path)})")
    for name, after in (("until_fraction", "at_fraction"), ("at_latest_fraction", "at_earliest_fraction")):
        late, early = getattr(event, name), getattr(event, after)
        if late is not None and late <= early:
            raise ValueError(f"{path}.{name}: {late} is not after {after} = {early} (from {where(path)})")
    if event.learning_rate in AFRESH and schedule == "constant":
        raise ValueError(
            f"{path}.learning_rate: {event.learning_rate!r} has no effect with train.schedule = 'constant'; rewarm_all "
            f"has (from {where(path)})"
        )


def check_order(earlier: list[GrowthSection], event: GrowthSection, path: str, where: Where) -> None:
    """The event comes after those before it, however late they come, and a slope has the room to be seen."""
    before = earlier[-1] if earlier else None
    ends = (before.at_step, before.until_fraction or before.at_fraction or before.at_latest_fraction) if before else ()
    for names, end in zip((("at_step",), ("at_fraction", "at_latest_fraction")), ends, strict=False):
        for name in names:
            begin = getattr(event, name)
            if end is not None and begin is not None and begin <= end:
                origin = where(path)
                raise ValueError(f"{path}.{name}: {begin} is not after the one before it, {end} (from {origin})")
    if event.at_step is not None and any(each.at_slope is not None for each in earlier):
        raise ValueError(
            f"{path}.at_step: cannot come after at_slope, since how far the run is by then is not known; "
            f"use at_fraction (from {where(path)})"
        )
    if event.at_slope is not None and event.at_latest_fraction is not None:
        begin = (before.until_fraction or before.at_fraction or before.at_earliest_fraction) if before else 0.0
        if event.slope_window >= event.at_latest_fraction - begin:
            raise ValueError(
                f"{path}.slope_window: {event.slope_window} does not fit between {begin}, where this size begins, and "
                f"at_latest_fraction = {event.at_latest_fraction}, so at_slope has no effect (from {where(path)})"
            )


def exactly_one(section: Any, names: tuple[str, ...], path: str, where: Where) -> None:
    given = [name for name in names if getattr(section, name) is not None]
    if len(given) != 1:
        said = f"{' and '.join(given)} are" if given else "none is"
        allowed = f"{', '.join(names[:-1])} and {names[-1]}"
        raise ValueError(
            f"{path}: exactly one of {allowed} must be given; {said} (from {where(f'{path}.{names[0]}')})"
        )
