"""What a race has yet to run, read off the files of what it has run: so it goes on from anywhere.

A race without a [race] table is one run per arm. With one (docs/fairness.md, rules 12 to 18):

    ARM/tune/lr-0.004        trials of the learning rate, short and fully decayed
    ARM/seed-0               a headline run of the largest budget
    ARM/seed-0_at-0.25       its branch: from its checkpoint where the decay to a quarter of the budget begins
    ARM/seed-0_cosine        the check on another schedule
"""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

from .. import runs
from ..checkpoint import ancestry
from ..plan import Plan, plan, ramp_steps, warm_up_after
from ..recipe import AFRESH, DataSection, GrowthSection, RaceSection, Recipe
from ..start import Start
from .arms import Arm, ungrown, with_seed

FINAL = "final.json"  # what a headline run reaches on race.final_text


@dataclass(frozen=True)
class Job:
    """One run of a race. `name` is its folder below RACE/arms; `flops` is what it costs itself."""

    name: str
    recipe: Recipe
    flops: int
    final_text: tuple[str, int] | None = None  # a file, and the most tokens of it
    sample: bool = False  # whether it ends with a sample of text, which the page of a tuned race does not show


@dataclass
class Race:
    """A race at work: its recipe, where it lies, its arms; plans are worked out once."""

    recipe: Recipe
    folder: Path
    arms: list[Arm]
    vocab_size: int
    plans: dict[str, Plan] = field(default_factory=dict)

    @property
    def section(self) -> RaceSection:
        assert self.recipe.race is not None
        return self.recipe.race

    @property
    def final_text(self) -> tuple[str, int] | None:
        return (self.section.final_text, self.section.final_tokens) if self.section.final_text else None

    def place(self, name: str) -> Path:
        return self.folder / runs.ARMS / name

    def plan(self, arm: Arm, recipe: Recipe, which: str = "") -> Plan:
        """The plan of one of the arm's runs, which all seeds and rates share."""
        key = f"{arm.name} {recipe.train.flops} {recipe.train.schedule} {which}"
        if key not in self.plans:
            self.plans[key] = plan(recipe, self.vocab_size, None if recipe.model.checkpoint else Start())
        return self.plans[key]


def bits_of(place: Path, final: bool = False) -> float | None:
    """Bits per byte of a job that has ended, infinite if it diverged; None of one that is still to be run."""
    if not (place / runs.RESULT).exists():
        return None
    result = runs.read_object(place / runs.RESULT, {"status": str})
    if result["status"] == "failed" and result.get("diverged"):
        return math.inf
    if result["status"] != "finished" or final and not (place / FINAL).exists():
        return None
    return float(runs.require_object(result, {"bits_per_byte": int | float}, str(place / runs.RESULT))["bits_per_byte"])


def todo(race: Race) -> list[Job]:
    """The jobs that can be started now, in the order in which they should be; some may be running already."""
    if race.recipe.race is None:
        jobs = [Job(arm.name, arm.recipe, race.plan(arm, arm.recipe).flops, sample=True) for arm in race.arms]
        return [job for job in jobs if not runs.finished_result(race.place(job.name))]
    rates, waiting = grid(race)
    return waiting or headline_jobs(race, rates)


# --- tuning ---


def trial(race: Race, arm: Arm, rate: float) -> Job:
    section, train = race.section, arm.recipe.train
    assert train.flops is not None
    train = replace(train, flops=train.flops * section.tune_fraction, learning_rate=rate)
    recipe = with_seed(replace(arm.recipe, train=train), section.tune_seed)
    recipe = replace(recipe, growth=after_warm_up(race, arm, recipe))
    name = f"{arm.name}/tune/lr-{rate:g}"
    return Job(name, replace(recipe, name=f"{race.recipe.name}/{name}"), race.plan(arm, recipe).flops)


def after_warm_up(race: Race, arm: Arm, recipe: Recipe) -> list[GrowthSection]:
    """A trial's growths (rule 12): its first, where the shorter run would bring it in the warm-up, right after that.

    The warm-up is as many steps as in the run that is tuned for: it is there for the rate's sake.
    """
    if not recipe.growth or recipe.growth[0].learning_rate in AFRESH:
        return recipe.growth
    first, *later = recipe.growth
    written, warm_up = race.plan(arm, recipe, "as written"), recipe.train.warmup_steps
    if written.growth_steps[0] >= warm_up:  # one that waits for a slope is planned for the latest
        return recipe.growth
    share = rounded((warm_up - 0.5) * written.phases[0].flops_per_step / written.flops)
    ends = [1 - recipe.train.decay_fraction, first.until_fraction]
    ends += [event.at_fraction or event.at_latest_fraction for event in later]
    end = min(end for end in ends if end)
    if share >= end or first.at_fraction is None:
        raise ValueError(
            f"race.tune_fraction: {race.section.tune_fraction:g}: a trial's warm-up, {warm_up} steps, lasts until "
            f"{share:.3g} of its FLOPs, and its growth must come after it and before {end:g}; take a larger share"
        )
    return [replace(first, at_fraction=share), *later]


def grid(race: Race) -> tuple[list[float], list[Job]]:
    """The grid as far as the trials so far have extended it, and its trials that have no result yet.

    All arms' trials end before the grid grows, and it grows for all: every arm has as many.
    """
    section = race.section
    rates = list(section.learning_rates)
    factor = rates[1] / rates[0]
    tuned = [arm for arm in race.arms if arm.tuned_as == arm.name]
    left = section.most_extensions
    while True:
        jobs = [trial(race, arm, rate) for rate in rates for arm in tuned]
        waiting = [job for job in jobs if bits_of(race.place(job.name)) is None]
        if waiting or not left:
            return rates, waiting
        best = {best_rate(race, arm, rates) for arm in tuned}
        lower = [rounded(rates[0] / factor)] if rates[0] in best else []
        higher = [rounded(rates[-1] * factor)] if rates[-1] in best else []
        if not lower and not higher:
            return rates, []
        rates, left = [*lower, *rates, *higher], left - 1


def rounded(rate: float) -> float:
    """Six digits, so that a rate has one name however it was reached."""
    return float(f"{rate:.6g}")


def best_rate(race: Race, arm: Arm, rates: list[float]) -> float:
    """The rate of the lowest bits per byte among the arm's trials; of equal ones the lower rate."""
    found = [(bits_of(race.place(trial(race, arm, rate).name)), rate) for rate in rates]
    return min((bits, rate) for bits, rate in found if bits is not None)[1]


# --- headline runs ---


def headline_jobs(race: Race, rates: list[float]) -> list[Job]:
    """Of each seed every arm's run and, as soon as it has ended, its branches; the cosine checks last."""
    section, by_name = race.section, {arm.name: arm for arm in race.arms}
    tuned = {arm.name: by_name[arm.tuned_as].tuned_as for arm in race.arms}  # of a copy of dropped, dropped's own arm
    chosen = {name: best_rate(race, by_name[other], rates) for name, other in tuned.items()}
    jobs: list[Job] = []
    for seed in section.seeds:
        branches, trunks = [], []
        for arm in race.arms:
            trunk = headline(race, arm, seed, chosen[arm.name])
            bits = bits_of(race.place(trunk.name), bool(section.final_text))
            if bits is None:
                trunks.append(trunk)
            elif math.isfinite(bits):
                final = bool(section.final_text)
                left = (s for s in section.budgets[:-1] if bits_of(race.place(branch_name(trunk, s)), final) is None)
                branches += [branch(race, arm, trunk, share) for share in left]
        jobs += branches + trunks
    for name in section.cosine:
        jobs.append(cosine(race, headline(race, by_name[name], section.seeds[0], chosen[name])))
    return [job for job in jobs if bits_of(race.place(job.name), bool(job.final_text)) is None]


def headline(race: Race, arm: Arm, seed: int, rate: float) -> Job:
    """The run of the largest budget, with a checkpoint where each branch starts."""
    section, decay = race.section, arm.recipe.train.decay_fraction
    keep = [rounded(share * (1 - decay)) for share in section.budgets[:-1]]
    train = replace(arm.recipe.train, learning_rate=rate, keep_at=keep)
    recipe = replace(arm.recipe, train=train)
    recipe = with_seed(recipe, seed, arm.role)
    name = f"{arm.name}/seed-{seed}"
    flops = race.plan(arm, recipe).flops
    return Job(name, replace(recipe, name=f"{race.recipe.name}/{name}"), flops, race.final_text)


def branch(race: Race, arm: Arm, trunk: Job, share: float) -> Job:
    """From the trunk's checkpoint at (1 - decay) of the smaller budget, decaying all the way to that budget."""
    train, decay = trunk.recipe.train, trunk.recipe.train.decay_fraction
    assert train.flops is not None
    budget = train.flops * share
    planned = race.plan(arm, trunk.recipe)
    # A growth that waits for a slope moves the boundaries by less than a step, and costs what is not yet spent before.
    near = 2 * max(phase.flops_per_step for phase in planned.phases) + sum(event.flops for event in planned.events)
    begin = checkpoint_at(race.place(trunk.name), round(share * (1 - decay) * trunk.flops), near)
    seen, data = ancestry(begin), trunk.recipe.data
    recipe = replace(
        trunk.recipe,
        name=f"{trunk.recipe.name}_at-{share:g}",
        model=type(trunk.recipe.model)(checkpoint=str(begin.resolve())),
        data=replace(data, skip_tokens=skipped_tokens(data) + seen["tokens"]),
        train=replace(train, flops=budget, keep_at=[], warmup_steps=0, decay_fraction=1.0),
    )
    recipe = ungrown(recipe, race.vocab_size)
    return Job(branch_name(trunk, share), recipe, round(budget - seen["flops"]), trunk.final_text)


def skipped_tokens(data: DataSection) -> int:
    """What a run passes over: data.skip_tokens in whole windows."""
    return -(-data.skip_tokens // data.sequence_length) * data.sequence_length


def branch_name(trunk: Job, share: float) -> str:
    return f"{trunk.name}_at-{share:g}"


def require_warm(planned: Plan, recipe: Recipe) -> None:
    """ValueError where what rises after a growth, a learning rate or a mask, still does as the decay begins (rule 17),
    be it that of a schedule which has started anew (`learning_rate_at`)."""
    stable, since, begin = 1 - recipe.train.decay_fraction, 0.0, 0.0
    for event, grown in zip(planned.events, planned.growth_steps, strict=True):
        if event.section.learning_rate in AFRESH:
            since, begin = planned.progress(grown), event.section.rewind_to or 0.0
        decays_at = planned.step_at(rounded(since + (1 - since) * (stable - begin) / (1 - begin)))
        rises = max(warm_up_after(event), ramp_steps(event))
        if rises and grown + rises > decays_at:
            raise ValueError(
                f"{event.name}: its warm-up or ramp lasts until step {grown + rises} of {planned.steps}, and the decay "
                f"begins at {decays_at}; let it come earlier, or be shorter"
            )


def require_branches(race: Race, arm: Arm) -> int:
    """ValueError unless each smaller budget's branch begins in the stable phase and has a step to decay in. Returns the
    step that the longest ends at: one of the small model takes more than its trunk, where this grows a lot.

    A growth that waits for a slope is planned for the latest that it may come; its warm-up or ramp may lie anywhere
    between the earliest and the end of the latest. That no rewind brings the decay forward is seen to in the recipe.
    """
    planned, decay = race.plan(arm, arm.recipe), arm.recipe.train.decay_fraction
    assert arm.recipe.train.flops is not None
    require_warm(planned, arm.recipe)
    rising = [arm.recipe.train.warmup_steps]  # steps of warm-up, or of growing in, at the beginning of each phase
    rising += [max(warm_up_after(event), ramp_steps(event)) for event in planned.events]
    warm_ups = [arm.recipe.train.warmup_steps, *map(warm_up_after, planned.events)]
    for event, step, phase, steps in zip(planned.events, planned.growth_steps, planned.phases, warm_ups, strict=False):
        if step < phase.first_step + steps and event.section.learning_rate not in AFRESH:
            raise ValueError(
                f"{event.name}: comes at step {step}, and the warm-up before it lasts until "
                f"{phase.first_step + steps}: it belongs to the stable phase, or restarts the schedule"
            )
    longest = 0
    for share in race.section.budgets[:-1]:
        begin = rounded(share * (1 - decay))
        step = planned.step_at(begin)
        index = max(i for i, phase in enumerate(planned.phases) if phase.first_step < max(step, 1))
        phase = planned.phases[index]  # a growth on that boundary comes after the checkpoint
        where = f"race.budgets: {share:g}: its decay would begin at step {step}"
        if step < phase.first_step + rising[index]:
            what = f"the warm-up or ramp of {planned.events[index - 1].name}" if index else "the warm-up"
            raise ValueError(f"{where}, and {what} lasts until {phase.first_step + rising[index]}")
        for event, steps, grown in zip(planned.events, rising[1:], planned.growth_steps, strict=True):
            waits, earliest = event.section.at_slope is not None, event.section.at_earliest_fraction
            if waits and steps and begin > earliest and step < grown + steps:
                raise ValueError(
                    f"{where}, at {begin:g} of the FLOPs, and the warm-up or ramp of {event.name} may begin from "
                    f"{earliest:g} on and last until step {grown + steps}, as the slope has it"
                )
        steps = int((arm.recipe.train.flops * share - planned.flops_at(step, index)) // phase.flops_per_step)
        if steps < 1:
            raise ValueError(f"{where} and leave no room for a step; take a larger share, or more train.flops")
        longest = max(longest, step + steps)
    return longest


def checkpoint_at(run: Path, flops: int, near: int) -> Path:
    """The checkpoint of a run that had cost nearest to so many FLOPs; ValueError where none is as near as that."""

    def away(folder: Path) -> int:
        return abs(ancestry(folder)["flops"] - flops)

    found = min(runs.checkpoints(run), key=away, default=None)
    if found is None or away(found) > near:
        raise ValueError(
            f"{run / runs.CHECKPOINTS}: the checkpoint at {flops:.3g} FLOPs, where a branch begins, is not there any "
            f"more; put it back, or remove {run} to have it run again"
        )
    return found


def cosine(race: Race, trunk: Job) -> Job:
    train = replace(trunk.recipe.train, schedule="cosine", keep_at=[])
    recipe = replace(trunk.recipe, name=f"{trunk.recipe.name}_cosine", train=train)
    return replace(trunk, name=f"{trunk.name}_cosine", recipe=recipe)


# --- all of it ---


def jobs_of_arms(race: Race) -> dict[str, tuple[int, int]]:
    """How many runs each arm comes to, going by the grid as it stands, and their FLOPs."""
    if race.recipe.race is None:
        return {arm.name: (1, race.plan(arm, arm.recipe).flops) for arm in race.arms}
    section, found = race.section, {}
    rates, _ = grid(race)
    for arm in race.arms:
        run = headline(race, arm, section.seeds[0], section.learning_rates[0])
        decayed = sum(section.budgets[:-1]) * arm.recipe.train.decay_fraction
        cosines = arm.name in section.cosine
        count = len(section.seeds) * len(section.budgets) + cosines
        flops = run.flops * (len(section.seeds) * (1 + decayed) + cosines)
        if arm.tuned_as == arm.name:
            count += len(rates)
            flops += len(rates) * trial(race, arm, rates[0]).flops
        found[arm.name] = count, round(flops)
    return found


def all_jobs(of_arms: dict[str, tuple[int, int]]) -> tuple[int, int]:
    """How many runs all arms together come to, and their FLOPs."""
    counts, flops = zip(*of_arms.values(), strict=True)
    return sum(counts), sum(flops)
