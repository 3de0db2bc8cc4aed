"""What a recipe comes to, worked out before anything is trained: phases, growth steps, FLOPs and tokens.

Steps are counted from 0; "step s" on a boundary means that s steps are done. A growth at step s happens on
that boundary, before the step of index s. A model of one size takes the same FLOPs in every step, so the
whole run is a short list of phases and every total is a sum of whole numbers.

A growth that waits for a slope of the loss is planned for the latest share that it may wait for, and what comes after
it is planned anew, once, when it has happened: a plan is a function of the recipe and the growth steps known so far.
"""

import bisect
import dataclasses
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from .flops import low_rank_training_flops, training_flops
from .growth.lowrank import Ranks, matrices, settled_ranks
from .growth.lowrank_growth import next_ranks
from .growth.operators import options_of, steps_of, takers, target_sizes
from .growth.plan import Plan as Change
from .growth.tensors import TensorMaps
from .growth.weights import trained_layers
from .models import build_config
from .models.axes import size_of, table_of
from .nested import mean_share, require_nested, without_rows
from .recipe import GrowthSection, Recipe
from .schedule import Window, expand, window_of
from .start import Start, start_config, start_of


@dataclass(frozen=True)
class Phase:
    """Steps first_step <= s < end_step, all trained at one size."""

    first_step: int
    end_step: int
    sizes: dict[str, int]  # the axes that growth has changed by now, as fields of the configuration
    flops_per_step: int


@dataclass(frozen=True)
class Event:
    """One growth of the run: a [[growth]], or one of several that it stands for."""

    name: str  # growth.0, or growth.0 (2 of 3)
    section: GrowthSection
    flops: int = 0  # of the growth itself, where its maps are learned
    afresh: bool = False  # the optimizer starts afresh, as it was asked to or as the operator does


@dataclass(frozen=True)
class Plan:
    phases: tuple[Phase, ...]
    tokens_per_step: int
    events: tuple[Event, ...]  # event i lies between phases i and i + 1
    budget_flops: int  # what shares of the FLOPs are shares of
    window: Window | None = None  # of the slope that the next growth waits for

    @property
    def steps(self) -> int:
        return self.phases[-1].end_step

    @property
    def flops(self) -> int:
        """FLOPs of the whole run, its smaller sizes and growths included; what led to its start comes on top."""
        return self.flops_at(self.steps)

    @property
    def tokens(self) -> int:
        return self.steps * self.tokens_per_step

    @property
    def growth_steps(self) -> list[int]:
        return [phase.first_step for phase in self.phases[1:]]

    def flops_at(self, step: int, grown: int | None = None) -> int:
        """FLOPs of the first `step` steps and of the first `grown` growths; by default of those up to that boundary."""
        done = sum(first <= step for first in self.growth_steps) if grown is None else grown
        steps = sum(max(0, min(step, p.end_step) - p.first_step) * p.flops_per_step for p in self.phases)
        return steps + sum(event.flops for event in self.events[:done])

    def progress(self, step: int) -> float:
        """The share of the run's FLOPs that its first `step` steps take, and the growths up to there."""
        return self.flops_at(step) / self.flops

    def step_at(self, share: float) -> int:
        """The first boundary at or past that share of the run's FLOPs."""
        wanted = math.ceil(Fraction(str(share)) * self.flops)
        return bisect.bisect_left(range(self.steps), wanted, key=lambda step: self.flops_at(step))


def plan(
    recipe: Recipe, vocab_size: int = 256, start: Start | None = None, grown_at: Sequence[int] = ()
) -> Plan:
    """The phases of a recipe: growth placed on step boundaries, and as many whole steps as the budget allows.

    `at_fraction` is a share of this run's FLOPs: of those that train.flops leaves after the checkpoint that it starts
    from (`start`, looked up if not given), or that train.steps come to. The growth falls on the first boundary at or
    past it.

    `grown_at`: the steps of the growths that have happened. One that waits for a slope and has not is taken to come at
    the latest, which makes the longest run of a budget; train.steps then come to more FLOPs when it comes early, and
    the shares still ahead are shares of those.

    Raises ValueError when a growth falls outside the run, names an unknown axis or shrinks one, and when the budget is
    less than one step.
    """
    start = start or start_of(recipe)
    ancestors = start.flops
    events, configs = phase_configs(recipe, vocab_size, start)
    length, batch = recipe.data.sequence_length, recipe.data.batch_size
    costs = [step_flops(recipe, c, trained) + saved * length * batch for c, _, saved, trained in configs]
    growths = [event.flops for event in events]
    known = settled(events, grown_at)
    if recipe.train.flops is not None:
        budget = int(recipe.train.flops) - ancestors
        boundaries = growth_boundaries(events, costs, budget, known)
        left = budget - spent(boundaries, costs, growths)
        steps = (boundaries[-1] if boundaries else 0) + max(0, left) // costs[-1]
        if steps < 1:
            after = f" after the {ancestors:.3g} that model.checkpoint has cost" if ancestors else ""
            raise ValueError(
                f"train.flops = {recipe.train.flops:g} is less than one step, {costs[0]:.3g} FLOPs{after}; take more"
            )
        if steps > sys.maxsize:
            raise ValueError(f"train.flops = {recipe.train.flops:g} comes to more than {sys.maxsize} steps; take fewer")
        said = f"train.flops = {recipe.train.flops:g} ({steps} steps)"
    else:
        assert recipe.train.steps is not None
        steps = recipe.train.steps
        boundaries = boundaries_of_steps(events, costs, steps, known)
        budget = spent([*boundaries, steps], costs, growths)
        said = f"train.steps = {steps}"
    for event, before, step in zip(events, [0, *boundaries], boundaries, strict=False):
        if not before < step < steps:
            between = f"after step {before} and before the end, {said}"
            paid = f", and it costs {event.flops:.3g} FLOPs itself" if event.flops else ""
            raise ValueError(f"{event.name} would come at step {step}; it must come {between}{paid}")
    require_ramps(events, boundaries, steps, start)
    require_warm_up(recipe, events, boundaries, steps)
    require_balance(recipe, events, [config for config, *_ in configs], start)
    require_nothing_beside_nested(recipe, events, start)
    require_room(events, costs, budget)
    edges = [0, *boundaries, steps]
    stretches = zip(edges, edges[1:], configs, costs, strict=False)
    phases = (Phase(first, end, sizes, cost) for first, end, (_, sizes, *_), cost in stretches)
    window, done = None, len(grown_at)
    if done < len(events) and events[done].section.at_slope is not None:
        share = Fraction(str(events[done].section.slope_window)) * budget
        since = grown_at[-1] + rewarm_steps(events[done - 1]) if grown_at else recipe.train.warmup_steps
        window = window_of(int(share / costs[done]), since)
    return Plan(tuple(phases), length * batch, tuple(events), budget, window)


def step_flops(recipe: Recipe, config: Any, trained: Sequence[bool] | None) -> int:
    """FLOPs of one step. Where it trains a prefix of the rows, the mean over the shares: FLOPs rise linearly with rows,
    and what whole numbers of rows are rounded by cancels but for a part of one row.
    """
    section = recipe.train
    sizes = recipe.data.sequence_length, recipe.data.batch_size
    whole = training_flops(config, *sizes, trained)
    if section.nested == "none":
        return whole
    require_nested(config, section.nested_smallest)
    share = mean_share(section.nested, section.nested_smallest)
    empty = training_flops(without_rows(config), *sizes, trained)
    return empty + round(share * (whole - empty))


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


PhaseConfig = tuple[Any, dict[str, int], int, tuple[bool, ...] | None]


def phase_configs(recipe: Recipe, vocab_size: int, start: Start) -> tuple[list[Event], list[PhaseConfig]]:
    """The growths one by one; in each phase the configuration, changed sizes, FLOPs per token of factors, and which
    layers are trained if an earlier growth has frozen some (training_flops).

    An operator that refuses does so here.
    """
    config, length, batch = model_config(recipe, vocab_size, start), recipe.data.sequence_length, recipe.data.batch_size
    ranks = first_ranks(recipe, config, start)
    events: list[Event] = []
    trained = first_trained(config, start)
    phases: list[PhaseConfig] = [(config, {}, flops_of(config, ranks), None if ranks else trained)]
    changes: list[Change]
    flops: list[int]
    for i, section in enumerate(recipe.growth):
        try:
            if section.operator in ("rank", "relora"):
                if section.stages > 1:
                    raise ValueError(f"stages: {section.stages}; {section.operator} has one, write the others out")
                ranks = next_ranks(config, ranks, section.operator, section.to, section.options)
                parts, changes, flops = [section], [], [0]
                # Factors are counted as if all were trained: they are in frozen layers as well.
                sizes = phases[-1][1] | section.to
                phases.append((config, sizes, flops_of(config, ranks), None if ranks else trained))
            elif ranks is not None:
                raise ValueError(
                    f"operator: {section.operator} cannot grow a model with factors of rank {ranks.rank}; first grow "
                    "its rank until it is whole, or merge it by relora to rank 0"
                )
            else:
                target = target_sizes(config, section.to)
                parts = expand(section, {axis: size_of(config, axis) for axis in target}, target)
                changes, flops = [], []
                for k, part in enumerate(parts):
                    if len(parts) > 1:  # a part may have nothing to grow for some operator of a mixture
                        part = parts[k] = dataclasses.replace(part, operator=takers(config, part.operator, part.to))
                    steps = steps_of(config, part.operator, part.to, part.seed, part.options)
                    changes += [change for *_, change in steps]
                    flops.append(sum(each.cost(before, change, length, batch) for each, before, change in steps))
                    for _, before, change in steps:
                        if change.frozen or trained is not None:
                            earlier = trained or (True,) * before.num_hidden_layers
                            trained = trained_layers(TensorMaps(before, change), earlier)
                    config = changes[-1].config
                    phases.append((config, phases[-1][1] | part.to, 0, trained))
        except ValueError as error:
            options = {*section.options, *(key for each in section.operator.split("+") for key in options_of(each))}
            inside = "options." if str(error).partition(":")[0] in options else ""
            raise ValueError(f"growth.{i}.{inside}{error}") from None
        afresh = section.moments == "drop" or any(change.drops_moments for change in changes)
        if afresh and section.learning_rate == "rewarm_new":
            raise ValueError(
                f"growth.{i}.learning_rate = 'rewarm_new' has no effect where the optimizer starts afresh "
                f"(moments = {section.moments!r}, operator = {section.operator!r}); rewarm_all has"
            )
        if section.learning_rate == "rewarm_new" and not all(change.adds_entries for change in changes):
            raise ValueError(
                f"growth.{i}.learning_rate = 'rewarm_new' has no effect with operator = {section.operator!r}, whose "
                "rows are copies with the age of the old ones; rewarm_all has"
            )
        for j, (part, cost) in enumerate(zip(parts, flops, strict=True), start=1):
            name = f"growth.{i}" + (f" ({j} of {len(parts)})" if len(parts) > 1 else "")
            events.append(Event(name, part, cost, afresh))
    return events, phases


def first_ranks(recipe: Recipe, config: Any, start: Start) -> Ranks | None:
    """The low-rank factors that the run begins with: those of its checkpoint, or model.rank."""
    carried = start.carried or {}
    if "rank" in carried:
        return Ranks(carried["kind"], carried["rank"])
    if recipe.model.rank is None:
        return None
    ranks = settled_ranks(config, Ranks("rank", recipe.model.rank), "model.rank")
    if ranks is None:
        rank = recipe.model.rank
        raise ValueError(f"model.rank: {rank} is no less than the smaller side of every matrix; leave it out")
    return ranks


def first_trained(config: Any, start: Start) -> tuple[bool, ...] | None:
    """Which layers of the checkpoint are trained; None if nothing is frozen."""
    if start.trained_parameters is None:
        return None
    layers = table_of(config).layers
    names = [f"{layers}.{i}." for i in range(config.num_hidden_layers)]
    return tuple(any(parameter.startswith(name) for parameter in start.trained_parameters) for name in names)


def flops_of(config: Any, ranks: Ranks | None) -> int:
    return low_rank_training_flops(matrices(config), ranks.rank, ranks.kind == "relora") if ranks else 0


def ramp_steps(event: Event) -> int:
    """The training steps that carry a growth: a mask, a bias, a router that is trained alone."""
    return max(event.section.options.get(key, 0) for key in ("ramp_steps", "router_steps"))


def require_ramps(events: list[Event], boundaries: list[int], steps: int, start: Start) -> None:
    """ValueError unless training has done with carrying a growth, or the checkpoint's, before the next and the end."""
    carried = start.carried if start.carried and "ramp_steps" in start.carried else {"ramp_steps": 0, "steps": 0}
    names = ["model.checkpoint", *(event.name for event in events)]
    ramps = [carried["ramp_steps"] - carried["steps"], *map(ramp_steps, events)]
    for name, begin, ramp, end in zip(names, [0, *boundaries], ramps, [*boundaries, steps], strict=True):
        if begin + ramp > end:
            what = "the next growth" if end < steps else "the end"
            raise ValueError(f"{name}: training would carry it until step {begin + ramp}; {what} comes at step {end}")


def require_warm_up(recipe: Recipe, events: list[Event], boundaries: list[int], steps: int) -> None:
    """ValueError where a warm-up is longer than what is left of the run."""
    warm = [("train.warmup_steps", recipe.train.warmup_steps)]
    for event in events:
        warm.append((f"{event.name}.rewarm_steps", warm_up_after(event)))
    for (key, count), begin in zip(warm, [0, *boundaries], strict=True):
        if count > steps - begin:
            raise ValueError(f"{key} = {count} is more than what the run has left: steps {begin} to {steps}")


def require_balance(recipe: Recipe, events: list[Event], configs: list[Any], start: Start) -> None:
    """ValueError where train.expert_balance, or what goes with it, would have no effect or meet another growth."""
    way, mixtures = recipe.train.expert_balance, [config for config in configs if chooses_experts(config)]
    carried = start.carried["kind"] if start.carried else None
    if carried == "loss_free" and way != "loss_free":
        raise ValueError(
            f"train.expert_balance = {way!r}: a bias keeps the experts of model.checkpoint in balance, and "
            "'loss_free' goes on with it"
        )
    for key in ("router_aux_loss_coef", "output_router_logits"):
        if way != "auxiliary" and key in recipe.model.fields:
            raise ValueError(
                f"model.{key} = {recipe.model.fields[key]} has no effect with train.expert_balance = {way!r}; the loss "
                "over it is that of 'auxiliary'"
            )
    if way == "none":
        return
    if not mixtures:
        raise ValueError(f"train.expert_balance = {way!r} has no effect: the model never has experts to choose from")
    if way == "auxiliary":
        for config in mixtures:
            if config.router_aux_loss_coef <= 0:
                raise ValueError(
                    f"model.router_aux_loss_coef = {config.router_aux_loss_coef}: must be above 0 with "
                    "train.expert_balance = 'auxiliary'"
                )
        return
    others = [("model.rank", recipe.model.rank is not None), ("model.checkpoint", carried not in (None, "loss_free"))]
    others = [(name, there and chooses_experts(configs[0])) for name, there in others]
    for event, before in zip(events, configs, strict=False):
        carries = ramp_steps(event) or event.section.operator in ("rank", "relora")
        others.append((event.name, bool(carries) and chooses_experts(before)))
    for name, meets in others:
        if meets:
            raise ValueError(
                f"train.expert_balance = 'loss_free' is carried by training, as {name} is, and a model carries one "
                "thing at a time"
            )


def require_nothing_beside_nested(recipe: Recipe, events: list[Event], start: Start) -> None:
    """ValueError where rows would be other than those of an ordinary model, by a growth that training carries."""
    carried = [("model.checkpoint", start.carried is not None)]
    carried += [(each.name, bool(ramp_steps(each)) or each.section.operator in ("rank", "relora")) for each in events]
    for name, meets in carried:
        if meets and recipe.train.nested != "none":
            raise ValueError(
                f"train.nested = {recipe.train.nested!r}: {name} is a growth that training carries, and rows are not "
                "those of an ordinary model until it is done"
            )


def chooses_experts(config: Any) -> bool:
    """Whether each token goes to some of several experts."""
    return (getattr(config, "num_local_experts", 0) or 0) > (getattr(config, "num_experts_per_tok", 0) or 0)


def warm_up_after(event: Event) -> int:
    """Steps after a growth in which a learning rate rises, be it of the new entries alone."""
    return 0 if event.section.learning_rate == "keep" else event.section.rewarm_steps


def rewarm_steps(event: Event) -> int:
    """Steps after a growth in which the learning rate of the whole model, or a mask, rises."""
    warm = 0 if event.section.learning_rate == "rewarm_new" else warm_up_after(event)
    return max(warm, ramp_steps(event))


def settled(events: list[Event], grown_at: Sequence[int]) -> list[int]:
    """The steps of past growths, up to the last that a slope may have set off; the others follow from the recipe."""
    waited = [i for i in range(len(grown_at)) if events[i].section.at_slope is not None]
    return list(grown_at[: waited[-1] + 1]) if waited else []


def share_of_flops(section: GrowthSection) -> Fraction:
    """When a growth comes at the latest. 0.3 is meant as three tenths, not as the nearest float."""
    return Fraction(str(section.at_latest_fraction if section.at_fraction is None else section.at_fraction))


def growth_boundaries(events: list[Event], costs: list[int], total_flops: int, known: list[int]) -> list[int]:
    """The step of each growth if the run takes `total_flops`: known, as given, or the first at or past its share."""
    boundaries = list(known)
    for event, cost in list(zip(events, costs, strict=False))[len(known) :]:
        if event.section.at_step is not None:
            boundaries.append(event.section.at_step)
            continue
        paid = spent(boundaries, costs, [each.flops for each in events])
        missing = share_of_flops(event.section) * total_flops - paid
        boundaries.append((boundaries[-1] if boundaries else 0) + max(0, -(-missing // cost)))
    return boundaries


def spent(boundaries: list[int], costs: list[int], growths: list[int]) -> int:
    """FLOPs from the start to the last boundary, a growth there included: each stretch at its own cost per step."""
    steps = sum((b - a) * cost for a, b, cost in zip([0, *boundaries], boundaries, costs, strict=False))
    return steps + sum(growths[: len(boundaries)])


def boundaries_of_steps(events: list[Event], costs: list[int], steps: int, known: list[int]) -> list[int]:
    """Growth steps of a run of `steps` steps, whose total FLOPs depend on where the growth falls.

    The later the growth, the smaller the total. So assume a total, place the growth, and compare with the
    total that this gives: bisection finds where the two meet. They are whole steps, so the meeting point may
    lie between two placements; then the later one is taken, the first at which every growth is at or past its
    share.
    """

    def place(assumed: int) -> tuple[list[int], int]:
        boundaries = growth_boundaries(events, costs, assumed, known)
        inside = [min(boundary, steps) for boundary in boundaries]
        return boundaries, spent([*inside, steps], costs, growths)

    growths = [event.flops for event in events]
    low, high = 0, steps * max(costs) + sum(growths)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if place(middle)[1] >= middle else (low, middle - 1)
    boundaries, total = place(low)
    return boundaries if total == low else place(low + 1)[0]


def require_room(events: list[Event], costs: list[int], budget: int) -> None:
    """ValueError unless a growth that may come early leaves those after it, and the end, a step of their own.

    A growth lies less than one step past its share, wherever those before it fell, and the next takes a step more.
    """
    first = next((i for i, event in enumerate(events) if event.section.at_slope is not None), len(events))
    shares = [share_of_flops(event.section) for event in events[first:]] + [Fraction(1)]
    for i, (share, following) in enumerate(zip(shares, shares[1:], strict=False), start=first):
        if (following - share) * budget < costs[i] + events[i].flops + costs[i + 1]:
            needs = "two steps and what it costs itself" if events[i].flops else "two steps"
            raise ValueError(
                f"{events[i].name} may come as late as {float(share):g} of the FLOPs, and less than {needs} lie "
                f"between that and {float(following):g}, where the next growth or the end is"
            )
