"""What a recipe comes to, worked out before anything is trained: phases, growth steps, FLOPs and tokens.

Steps are counted from 0; "step s" on a boundary means that s steps are done. A growth at step s happens on
that boundary, before the step of index s. A model of one size takes the same FLOPs in every step, so the
whole run is a short list of phases and every total is a sum of whole numbers.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from .flops import training_flops
from .growth.operators import steps_of, target_sizes
from .models import build_config
from .recipe import Recipe
from .start import Start, start_config, start_of


@dataclass(frozen=True)
class Phase:
    """Steps first_step <= s < end_step, all trained at one size."""

    first_step: int
    end_step: int
    sizes: dict[str, int]  # the axes that growth has changed by now, as fields of the configuration
    flops_per_step: int


@dataclass(frozen=True)
class Plan:
    phases: tuple[Phase, ...]
    tokens_per_step: int

    @property
    def steps(self) -> int:
        return self.phases[-1].end_step

    @property
    def flops(self) -> int:
        """Training FLOPs of the whole run, its smaller sizes included; what led to its start comes on top."""
        return self.flops_at(self.steps)

    @property
    def tokens(self) -> int:
        return self.steps * self.tokens_per_step

    @property
    def growth_steps(self) -> list[int]:
        return [phase.first_step for phase in self.phases[1:]]

    def flops_at(self, step: int) -> int:
        """Training FLOPs of the first `step` steps."""
        return sum(max(0, min(step, p.end_step) - p.first_step) * p.flops_per_step for p in self.phases)


def plan(recipe: Recipe, vocab_size: int = 256, start: Start | None = None) -> Plan:
    """The phases of a recipe: growth placed on step boundaries, and as many whole steps as the budget allows.

    `at_fraction` is a share of this run's FLOPs: of those that train.flops leaves after the checkpoint that it starts
    from (`start`, looked up if not given), or that train.steps come to. The growth falls on the first boundary at or
    past it. Raises ValueError when a growth falls outside the run, names an unknown axis
    or shrinks one, and when the budget is less than one step.
    """
    start = start or start_of(recipe)
    ancestors = start.flops
    configs = phase_configs(recipe, vocab_size, start)
    length, batch = recipe.data.sequence_length, recipe.data.batch_size
    costs = [training_flops(config, length, batch) for config, _ in configs]
    if recipe.train.flops is not None:
        budget = int(recipe.train.flops) - ancestors
        boundaries = growth_boundaries(recipe, costs, budget)
        left = budget - spent(boundaries, costs)
        steps = (boundaries[-1] if boundaries else 0) + max(0, left) // costs[-1]
        if steps < 1:
            after = f" after the {ancestors:.3g} that model.checkpoint has cost" if ancestors else ""
            raise ValueError(
                f"train.flops = {recipe.train.flops:g} is less than one step, {costs[0]:.3g} FLOPs{after}"
            )
        said = f"train.flops = {recipe.train.flops:g} ({steps} steps)"
    else:
        assert recipe.train.steps is not None
        steps = recipe.train.steps
        boundaries = boundaries_of_steps(recipe, costs, steps)
        said = f"train.steps = {steps}"
    for i, (before, step) in enumerate(zip([0, *boundaries], boundaries, strict=False)):
        if not before < step < steps:
            between = f"after step {before} and before the end, {said}"
            raise ValueError(f"growth.{i} would come at step {step}; it must come {between}")
    edges = [0, *boundaries, steps]
    stretches = zip(edges, edges[1:], configs, costs, strict=False)
    phases = (Phase(first, end, sizes, cost) for first, end, (_, sizes), cost in stretches)
    return Plan(tuple(phases), length * batch)


def model_config(recipe: Recipe, vocab_size: int, start: Start | None = None, **fields: Any) -> Any:
    """The transformers configuration of the model before any growth; `fields` are defaults of [model]."""
    section = recipe.model
    if section.checkpoint:
        config = start_config(start or start_of(recipe))
    else:
        settings = {"vocab_size": vocab_size, **fields, **section.fields}
        config = build_config(section.architecture, section.preset, settings)
    if config.vocab_size < vocab_size:
        raise ValueError(f"model.vocab_size = {config.vocab_size} is less than the tokenizer's {vocab_size}")
    longest = getattr(config, "max_position_embeddings", None)
    if longest and recipe.data.sequence_length > longest:
        raise ValueError(
            f"data.sequence_length = {recipe.data.sequence_length} is more than "
            f"model.max_position_embeddings = {longest}"
        )
    return config


def phase_configs(recipe: Recipe, vocab_size: int, start: Start) -> list[tuple[Any, dict[str, int]]]:
    """Configuration and changed sizes of each phase. An operator that refuses does so here, up front."""
    config = model_config(recipe, vocab_size, start)
    phases: list[tuple[Any, dict[str, int]]] = [(config, {})]
    for i, event in enumerate(recipe.growth):
        afresh = event.moments == "drop" or event.operator == "published"
        if afresh and event.learning_rate == "rewarm_new":
            raise ValueError(
                f"growth.{i}.learning_rate = 'rewarm_new' has no effect where the optimizer starts afresh "
                f"(moments = {event.moments!r}, operator = {event.operator!r}); rewarm_all has"
            )
        try:
            sizes = target_sizes(config, event.to)
            changes = [change for _, _, change in steps_of(config, event.operator, event.to, event.seed, event.options)]
        except ValueError as error:
            raise ValueError(f"growth.{i}.{error}") from None
        if event.learning_rate == "rewarm_new" and not any(change.adds_entries for change in changes):
            raise ValueError(
                f"growth.{i}.learning_rate = 'rewarm_new' has no effect with operator = {event.operator!r}, whose rows "
                "are copies with the age of the old ones; rewarm_all has"
            )
        config = changes[-1].config
        phases.append((config, phases[-1][1] | sizes))
    return phases


def growth_boundaries(recipe: Recipe, costs: list[int], total_flops: int) -> list[int]:
    """The step of each growth if the run takes `total_flops`: as given, or the first at or past its share."""
    boundaries: list[int] = []
    for event, cost in zip(recipe.growth, costs, strict=False):
        if event.at_step is not None:
            boundaries.append(event.at_step)
            continue
        share = Fraction(str(event.at_fraction)) * total_flops  # 0.3 is meant as three tenths, not as the nearest float
        missing = share - spent(boundaries, costs)
        boundaries.append((boundaries[-1] if boundaries else 0) + max(0, -(-missing // cost)))
    return boundaries


def spent(boundaries: list[int], costs: list[int]) -> int:
    """FLOPs from the start to the last boundary, each stretch at its own cost per step."""
    return sum((b - a) * cost for a, b, cost in zip([0, *boundaries], boundaries, costs, strict=False))


def boundaries_of_steps(recipe: Recipe, costs: list[int], steps: int) -> list[int]:
    """Growth steps of a run of `steps` steps, whose total FLOPs depend on where the growth falls.

    The later the growth, the smaller the total. So assume a total, place the growth, and compare with the
    total that this gives: bisection finds where the two meet. They are whole steps, so the meeting point may
    lie between two placements; then the later one is taken, the first at which every growth is at or past its
    share.
    """

    def place(assumed: int) -> tuple[list[int], int]:
        boundaries = growth_boundaries(recipe, costs, assumed)
        inside = [min(boundary, steps) for boundary in boundaries]
        return boundaries, spent([*inside, steps], costs)

    low, high = 0, steps * max(costs)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if place(middle)[1] >= middle else (low, middle - 1)
    boundaries, total = place(low)
    return boundaries if total == low else place(low + 1)[0]
