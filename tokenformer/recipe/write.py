"""A recipe, or what a recipe may say, as commented TOML."""

import dataclasses
import json
import re
from typing import Any

from .sections import (
    ArmSection,
    DataSection,
    GrowthSection,
    ModelSection,
    NoiseSection,
    RaceSection,
    Recipe,
    TrainSection,
)


def recipe_to_toml(recipe: Recipe) -> str:
    """The recipe in full as TOML, each key with its line of explanation; `load_recipe` reads it back."""
    lines = [f"{name} = {toml(getattr(recipe, name))}" for name in ("name", "description")]
    for section in ("model", "data", "train"):
        lines += ["", f"[{section}]", *section_lines(getattr(recipe, section))]
    for event in recipe.growth:
        lines += ["", "[[growth]]", *section_lines(event)]
    if recipe.race:
        lines += ["", "[race]", *section_lines(recipe.race)]
    if recipe.noise:
        lines += ["", "[noise]", *section_lines(recipe.noise)]
    for arm in recipe.arms:
        lines += [
            "",
            "[[arm]]",
            *(f"{name} = {toml(getattr(arm, name))}" for name in ("name", "description")),
        ]
        for section, value in arm.overrides.items():
            lines.append(f"{section} = {toml(value)}")
    return "\n".join(lines) + "\n"


def recipe_reference() -> str:
    """Every key that a recipe may have, with its default and its explanation, in TOML's form."""
    about = {field.name: field.metadata["doc"] for field in dataclasses.fields(Recipe)}
    lines = [f"{'# ' + name + ' =':<36} # {about[name]}" for name in ("name", "description")]
    for name, section in (("model", ModelSection()), ("data", DataSection()), ("train", TrainSection())):
        lines += ["", f"[{name}]  # {about[name]}", *section_lines(section)]
        if name == "model":
            lines.append(f"{'# ...':<36} # {dataclasses.fields(section)[-1].metadata['doc']}")
    event = GrowthSection(to={"ffn_tokens": 512}, at_fraction=0.4)
    lines += ["", f"[[growth]]  # {about['growth']}", *section_lines(event, ("to", "at_fraction"))]
    lines += ["", f"[[arm]]  # {about['arms']}"]
    lines += [
        f"{'# ...' if 'rest' in f.metadata else f.name + ' =':<36} # {f.metadata['doc']}"
        for f in dataclasses.fields(ArmSection)
    ]
    race = RaceSection(learning_rates=[0.002, 0.004, 0.008])
    lines += ["", f"[race]  # {about['race']}", *section_lines(race, ("learning_rates",))]
    lines += ["", f"[noise]  # {about['noise']}"]
    lines += [f"{f.name + ' =':<36} # {f.metadata['doc']}" for f in dataclasses.fields(NoiseSection)]
    return "\n".join(lines) + "\n"


def section_lines(section: Any, examples: tuple[str, ...] = ()) -> list[str]:
    """A line for each key; `examples` names those whose value is none that is taken without being said."""
    lines = []
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if field.name == "fields":
            lines += [
                f"{toml_key(name)} = {toml(inner)}" for name, inner in value.items() if inner is not None
            ]
        else:  # TOML has no null: a key that is not set is shown as a comment
            setting = f"# {field.name} =" if value is None else f"{field.name} = {toml(value)}"
            example = "no default; such as this: " if field.name in examples else ""
            lines.append(f"{setting:<36} # {example}{field.metadata['doc']}")
    return lines


def toml(value: Any) -> str:
    if isinstance(value, dict):
        return (
            "{ " + ", ".join(f"{toml_key(k)} = {toml(v)}" for k, v in value.items() if v is not None) + " }"
        )
    if isinstance(value, list):
        return "[" + ", ".join(toml(v) for v in value) + "]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def toml_key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else toml(name)
