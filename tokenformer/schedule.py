"""How much and when a run grows: the plain events that one [[growth]] stands for, and the slope of the loss.

A [[growth]] of several stages, or of one axis after the other, is the same as several that are written out. The slope
is that of a power law, loss ~ tokens^slope: a model that is used up shows one that is shallow (staged training,
arXiv 2203.06211, whose thresholds are -0.0575 for depth, -0.0475 for width and -0.03 for both).
"""

import dataclasses
import math
import statistics
from fractions import Fraction

from .recipe import GrowthSection

SEED_STRIDE = 10_000  # between the seeds of stages, more than between those of runs that are compared
BINS = 16  # mean losses that a slope is fitted to; so many numbers are in a checkpoint, however long the window


def expand(section: GrowthSection, present: dict[str, int], target: dict[str, int]) -> list[GrowthSection]:
    """The events of a [[growth]] in order of time, each with its own `to`, share of the FLOPs and seed.

    present, target: axis -> size, in full names. Stage k of n has the size p + (t - p) k / n, or p (t / p)^(k / n), as
    the nearest multiple of `multiple_of`; the last is t itself. With order = "one_by_one" each stage is one event per
    axis. The m events come at a + (u - a) j / (m - 1), from at_fraction to until_fraction. Raises ValueError, its
    first word the key, when rounding leaves a stage nothing to do or makes it shrink.
    """
    apart = section.order == "one_by_one"
    changes: list[dict[str, int]] = []
    now = present
    for k in range(1, section.stages + 1):
        sizes = {axis: stage_size(section, axis, present[axis], target[axis], k) for axis in target}
        stuck = [axis for axis, size in sizes.items() if size == now[axis]]
        wrong = [axis for axis, size in sizes.items() if size < now[axis]] or (
            stuck if apart or len(stuck) == len(sizes) else []
        )
        if wrong:
            raise ValueError(
                f"stages: stage {k} of {section.stages} would take {wrong[0]} from {now[wrong[0]]} to "
                f"{sizes[wrong[0]]} with multiple_of = {section.multiple_of}; each must be larger than the one before"
            )
        moved = {axis: size for axis, size in sizes.items() if axis not in stuck}
        changes += [{axis: size} for axis, size in moved.items()] if apart else [moved]
        now = sizes
    return [
        dataclasses.replace(
            section,
            to=to,
            at_fraction=share_of(section, j, len(changes)),
            seed=section.seed + SEED_STRIDE * j,  # the rows of a stage are those of no other
            stages=1,
            until_fraction=None,
            shape="linear",
            multiple_of=1,
            order="together",
        )
        for j, to in enumerate(changes)
    ]


def stage_size(section: GrowthSection, axis: str, present: int, target: int, k: int) -> int:
    """The size of an axis after stage k of `stages`."""
    if k == section.stages:
        return target
    if section.shape == "linear":
        size = present + Fraction((target - present) * k, section.stages)
    elif present == 0:
        raise ValueError(f"shape: 'exponential' has no factor that leads from {axis} = 0 to {target}; linear has steps")
    else:  # the rounding keeps a root that is a whole number whole
        size = Fraction(round(present * (target / present) ** (k / section.stages), 6))
    return math.floor(size / section.multiple_of + Fraction(1, 2)) * section.multiple_of


def share_of(section: GrowthSection, j: int, events: int) -> float | None:
    """The share of the FLOPs at which event j of so many comes; None where it is not shares that say when."""
    if section.at_fraction is None or events == 1:
        return section.at_fraction
    assert section.until_fraction is not None
    first, last = Fraction(str(section.at_fraction)), Fraction(str(section.until_fraction))
    return float(first + (last - first) * j / (events - 1))


# --- the slope of the loss ---


@dataclasses.dataclass(frozen=True)
class Window:
    """The training steps that a slope is fitted over, as bins of equal length: the newest `bins` full ones.

    Bins are counted from step `since`, from which on the model has its present size and its learning rate is warm: no
    bin mixes two sizes, and a loss that does not fall yet is not taken for one that no longer does.
    """

    since: int
    bin_steps: int
    bins: int


def window_of(steps: int, since: int) -> Window:
    """A window of about `steps` steps in at most BINS bins; two are the least that has a slope."""
    steps = max(2, steps)
    bin_steps = -(-steps // BINS)
    return Window(since, bin_steps, max(2, steps // bin_steps))


def add_loss(sums: list[float], loss: float, step: int, window: Window) -> None:
    """Count the training loss of the step of index `step` in: `sums` holds each bin's sum, the newest last."""
    if step < window.since:
        return
    if (step - window.since) % window.bin_steps:
        sums[-1] += loss
    else:
        sums.append(loss)
        del sums[: -window.bins]


def slope_at(sums: list[float], step: int, window: Window, tokens_before: int, tokens_per_step: int) -> float | None:
    """d log(loss) / d log(tokens seen), ancestors' `tokens_before` included, by least squares over the bins' means.

    None unless `step` ends a bin and the window is full.
    """
    if len(sums) < window.bins or (step - window.since) % window.bin_steps:
        return None
    first = step - window.bins * window.bin_steps
    # Tokens after each step of a bin, their mean.
    middles = [first + i * window.bin_steps + (window.bin_steps + 1) / 2 for i in range(window.bins)]
    tokens = [math.log(tokens_before + middle * tokens_per_step) for middle in middles]
    losses = [math.log(max(total / window.bin_steps, 1e-300)) for total in sums]
    return statistics.linear_regression(tokens, losses).slope
