"""What the numbers of a race support: the arithmetic of docs/fairness.md, rules 10, 11 and 19 to 24.

A table is {arm: {seed: y}}, y a loss, and lower is better. A cell that is missing, of a run that failed or has not
ended, is not in it: its arm is then compared over the seeds that both arms have. All intervals are two-sided, 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.special import fdtrc, nctdtr, stdtrit

LEVEL = 0.95
LEAST_POINTS = 4  # of FLOPs, for a power law of three parameters
BOOTSTRAP_DRAWS = 1000
UNEQUAL = 0.01  # of races of equal scatter are said to be of unequal scatter
POWER = 0.8  # of a race with as many seeds as are needed
MOST_SEEDS = 1000  # that `seeds_needed` looks at
NO_RISE = 1e-4  # bits per byte; what rounding makes of an exact growth stays far below
ALPHAS = (0.01, 3.0)  # exponents that a power law is fitted with

Table = dict[str, dict[int, float]]
Curve = list[tuple[float, float]]  # (FLOPs, loss), one fully decayed result per budget


def student(df: float, level: float = LEVEL) -> float:
    """The two-sided point of Student's distribution: |t| is below it with probability `level`."""
    if df < 1:
        raise ValueError(f"df: {df} is too small; a t interval needs at least 1 degree of freedom")
    return float(stdtrit(df, 0.5 + level / 2))


# --- the table of arms and seeds: y = arm + seed + start x seed + rest (rule 20) ---


@dataclass(frozen=True)
class Spread:
    """Standard deviation of one run in a difference of two arms, and its degrees of freedom; None where those are 0.

    s, df: of arms that start from different models. s_same, df_same: of arms that a seed gives the same initial
    weights, as `starts` (arm -> what its weights start as) says; what these do to a run is then common to both.
    """

    s: float | None
    df: float
    s_same: float | None = None
    df_same: float = 0
    starts: dict[str, Hashable] = field(default_factory=dict)

    def same_start(self, arm: str, other: str) -> bool:
        return arm in self.starts and self.starts[arm] == self.starts.get(other)

    def half_width(self, n: int, same_start: bool = False) -> float | None:
        """Of the interval of a difference of two arms over n seeds: t s sqrt(2 / n)."""
        s, df = (self.s_same, self.df_same) if same_start else (self.s, self.df)
        return None if s is None or n < 1 else student(df) * s * math.sqrt(2 / n)


def spread_of(table: Table, starts: dict[str, Hashable] | None = None) -> Spread:
    """Least squares of y = arm + seed + rest, where `starts` is None and each arm stands for itself.

    Arms of one start share an effect of start and seed beside it, of variance v_g, over the rest's v. The rest is what
    least squares of y = arm + start x seed leaves; what that leaves less than arm + seed alone has the expected mean
    square v + k v_g, from which v_g follows (Henderson's third method). Then s^2 = v + v_g with Satterthwaite's degrees
    of freedom, and s_same^2 = v. Where v_g comes out below zero, s is that of y = arm + seed + rest.
    """
    starts = starts or {}
    once = distinct(table, starts)
    cells = [(arm, seed, y) for arm, row in once.items() for seed, y in row.items()]
    if not cells:
        return Spread(None, 0, starts=starts)
    y = np.array([y for _, _, y in cells])
    y = y - y.mean()  # no more than rounding may be left of a table without rest
    by_arm = one_hot([arm for arm, _, _ in cells])
    by_seed = one_hot([seed for _, seed, _ in cells])
    by_start = one_hot([(starts.get(arm, (arm,)), seed) for arm, seed, _ in cells])
    additive, same = residual_maker(by_arm, by_seed), residual_maker(by_arm, by_start)
    df, df_same = (round(float(np.trace(left))) for left in (additive, same))
    square, square_same = float(y @ additive @ y), float(y @ same @ y)
    v = square_same / df_same if df_same else None
    s_same, df_starts = None if v is None else math.sqrt(v), df - df_same
    if not df_starts:
        return Spread(None, 0, s_same, df_same, starts)
    mean_square = max(square - square_same, 0.0) / df_starts
    k = float(np.trace(by_start.T @ additive @ by_start)) / df_starts
    if v is None:
        return Spread(math.sqrt(mean_square), df_starts, starts=starts)
    if mean_square <= v:
        return Spread(math.sqrt(square / df), df, s_same, df_same, starts)
    parts = [(mean_square / k, df_starts), (v * (1 - 1 / k), df_same)]
    total = sum(part for part, _ in parts)
    df_total = max(total**2 / sum(p**2 / d for p, d in parts), 1.0)  # less where many cells are missing, and k < 1
    return Spread(math.sqrt(total), df_total, s_same, df_same, starts)


def distinct(table: Table, starts: dict[str, Hashable]) -> Table:
    """Without the arms whose runs are, to the bit, those of another arm of their start, as before a growth: they are no
    second look at the noise."""
    rows = {(starts.get(arm, (arm,)), *sorted(row.items())): arm for arm, row in reversed(table.items())}
    return {arm: row for arm, row in table.items() if arm in rows.values()}


def unequal_scatter(
    table: Table, groups: dict[str, str], starts: dict[str, Hashable] | None = None, within: bool = False
) -> tuple[str, float, float] | None:
    """The group of arms that scatters more than the others, its s and theirs; None where chance may have it so.

    Of the rest of y = arm + seed, by an F test at 1 % for all groups together (Bonferroni). groups: arm -> its group.
    Arms of one start (see `spread_of`) are not independent of one another: the first of them is looked at. Or, with
    `within`, of what y = arm + start x seed leaves: how arms of one start scatter about it, all of them.
    """
    starts = starts or {}
    first = {starts.get(arm, (arm,)): arm for arm in reversed(table) if table[arm]}
    taken = distinct(table, starts) if within else first.values()
    cells = [(arm, seed, y) for arm, row in table.items() for seed, y in row.items() if arm in taken]
    names = dict.fromkeys(groups[arm] for arm, _, _ in cells)
    if len(names) < 2:
        return None
    beside = [(starts.get(arm, (arm,)) if within else None, seed) for arm, seed, _ in cells]
    left = residual_maker(one_hot([arm for arm, _, _ in cells]), one_hot(beside))
    y = np.array([y for _, _, y in cells])
    squares, freedom = (left @ (y - y.mean())) ** 2, np.diag(left)
    found = []
    for name in names:
        inside = np.array([groups[arm] == name for arm, _, _ in cells])
        (a, b), (df_a, df_b) = ((part[inside].sum(), part[~inside].sum()) for part in (squares, freedom))
        if min(df_a, df_b) > 1e-6 and b > 0:
            chance = fdtrc(df_a, df_b, (a / df_a) / (b / df_b))
            found.append((chance, name, math.sqrt(a / df_a), math.sqrt(b / df_b)))
    chance, name, s, rest = min(found, default=(1.0, "", 0.0, 0.0))
    return (name, s, rest) if chance < UNEQUAL / len(names) else None


def one_hot(labels: list[Any]) -> np.ndarray:
    columns = {label: j for j, label in enumerate(dict.fromkeys(labels))}
    return np.eye(len(columns))[[columns[label] for label in labels]]


def residual_maker(*designs: np.ndarray) -> np.ndarray:
    """I - U Uᵀ, U an orthonormal base of the columns of all designs: what least squares on them leaves of a vector."""
    u, sizes, _ = np.linalg.svd(np.concatenate(designs, axis=1), full_matrices=False)
    base = u[:, sizes > 1e-9 * sizes[0]]
    return np.eye(len(u)) - base @ base.T


@dataclass(frozen=True)
class Difference:
    """arm - other over the seeds both have: the pooled interval, which gives the word, and the pair's own. same_start:
    whether a seed gives both the same initial weights."""

    arm: str
    other: str
    seeds: list[int]
    value: float | None
    low: float | None
    high: float | None
    own_low: float | None
    own_high: float | None
    word: str
    same_start: bool


def difference(table: Table, arm: str, other: str, spread: Spread) -> Difference:
    """Rule 20. Without a common seed all numbers are None; without df, or with one seed, the intervals are."""
    seeds = sorted(table[arm].keys() & table[other].keys())
    apart = [table[arm][seed] - table[other][seed] for seed in seeds]
    value, own_low, own_high = own_interval(apart)
    same = spread.same_start(arm, other)
    half = spread.half_width(len(seeds), same)
    low, high = (None, None) if value is None or half is None else (value - half, value + half)
    word = "not compared" if value is None else verdict(low, high, ("better", "worse"))
    return Difference(arm, other, seeds, value, low, high, own_low, own_high, word, same)


def own_interval(values: Sequence[float]) -> tuple[float | None, float | None, float | None]:
    """Mean, and mean -+ t sd / sqrt(n) with n - 1 degrees of freedom."""
    n, (mean, sd) = len(values), mean_sd(values)
    if mean is None or sd is None:
        return mean, None, None
    half = student(n - 1) * sd / math.sqrt(n)
    return mean, mean - half, mean + half


def mean_sd(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation; None where there are too few values."""
    if not values:
        return None, None
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def verdict(low: float | None, high: float | None, words: tuple[str, str]) -> str:
    """Rule 21: the first word where all of the interval lies below zero, the second where all lies above."""
    if low is None or high is None or low <= 0 <= high:
        return "not told apart"
    return words[0] if high < 0 else words[1]


def differences(table: Table, spread: Spread) -> list[Difference]:
    """Every pair of arms once, in the table's order."""
    arms = list(table)
    return [difference(table, a, b, spread) for i, a in enumerate(arms) for b in arms[i + 1 :]]


def false_alarms(pairs: int, level: float = LEVEL) -> float:
    """Of so many pairs that do not differ, how many chance alone tells apart, on average."""
    return pairs * (1 - level)


def copy_noise(table: Table, copy: str, original: str) -> dict[str, Any]:
    """Rule 11. The true difference is zero, so s = sqrt(mean(d^2) / 2) is of one run, with as many df as seeds."""
    seeds = sorted(table[copy].keys() & table[original].keys())
    apart = [table[copy][seed] - table[original][seed] for seed in seeds]
    s = math.sqrt(sum(d * d for d in apart) / len(apart) / 2) if apart else None
    return {"copy": copy, "original": original, "seeds": seeds, "differences": apart, "s": s}


def seeds_needed(value: float, s: float, df: float) -> int | None:
    """The least number of seeds at which the interval of a true difference of `value` excludes zero four times in five.

    s: of one run. df: degrees of freedom that each seed beyond the first adds.
    """
    for n in range(2, MOST_SEEDS + 1):
        all_df = max(1.0, df * (n - 1))  # where cells are missing, a seed may add less than one
        if nctdtr(all_df, abs(value) / (s * math.sqrt(2 / n)), student(all_df)) <= 1 - POWER:
            return n
    return None


# --- FLOPs to reach a loss (rule 22) ---


def flops_to_reach(curve: Curve, loss: float) -> tuple[float, str]:
    """FLOPs at which straight lines over log FLOPs first come down to `loss`, and "".

    Nothing is extrapolated: the first budget and "less than", where already that lies below; the last and
    "more than", where none gets there. Raises ValueError on an empty curve.
    """
    if not curve:
        raise ValueError("curve: is empty; it needs at least one (FLOPs, loss)")
    points = sorted(curve)
    if points[0][1] <= loss:
        return points[0][0], "" if points[0][1] == loss else "less than"
    for (c0, y0), (c1, y1) in zip(points, points[1:], strict=False):
        if y1 <= loss:
            return math.exp(math.log(c0) + math.log(c1 / c0) * (y0 - loss) / (y0 - y1)), ""
    return points[-1][0], "more than"


@dataclass(frozen=True)
class Ratio:
    """FLOPs over the reference's FLOPs. `side` is "", or how the true ratio lies to `value`: "more than", "less than",
    or "unbounded" where seeds lie beyond either end."""

    seeds: list[int]
    value: float | None
    side: str
    low: float | None
    high: float | None
    own_low: float | None
    own_high: float | None
    word: str


def flops_ratios(
    curves: dict[str, dict[int, Curve]],
    targets: dict[int, tuple[float, float]],
    losses: dict[str, Difference],
    starts: dict[str, Hashable] | None = None,
) -> dict[str, Ratio]:
    """FLOPs of each arm to reach the reference's loss, over the reference's, as the mean of logarithms over seeds.

    targets: seed -> (FLOPs, loss) of the reference at one budget. The threshold of a seed is the reference's result of
    that seed, so that the reference itself is there at exactly those FLOPs and pairs stay pairs. losses: each arm's
    difference to the reference at that budget. The interval is pooled as in rule 20, on log ratios: what the reference
    adds is common to all arms of a seed, so their table leaves the s of one arm, and the interval is
    t s sqrt(2 / n) again. Where a seed lies outside the budgets there is no interval; the word is then that of the
    loss at the budget itself, because a lower loss there and fewer FLOPs to the reference's are the same event.
    """
    logs: Table = {}
    sides: dict[str, set[str]] = {}
    for arm, by_seed in curves.items():
        logs[arm], sides[arm] = {}, set()
        for seed in sorted(by_seed.keys() & targets.keys()):
            if by_seed[seed]:
                flops, side = flops_to_reach(by_seed[seed], targets[seed][1])
                logs[arm][seed] = math.log(flops / targets[seed][0])
                sides[arm].add(side)
    spread = spread_of({arm: row for arm, row in logs.items() if sides[arm] == {""}}, starts)
    return {arm: ratio_of(logs[arm], sides[arm], spread, losses[arm]) for arm in curves}


def ratio_of(logs: dict[int, float], sides: set[str], spread: Spread, loss: Difference) -> Ratio:
    seeds = sorted(logs)
    if not seeds:
        return Ratio([], None, "", None, None, None, None, "not compared")
    mean, own_low, own_high = own_interval([logs[seed] for seed in seeds])
    assert mean is not None
    outside = sides - {""}
    if outside:
        # Ends stand in for what lies beyond them. With both in one arm the mean is bounded on neither side.
        side = outside.pop() if len(outside) == 1 else "unbounded"
        word = {"better": "faster", "worse": "slower"}.get(loss.word, "not told apart")
        return Ratio(seeds, math.exp(mean), side, None, None, None, None, word)
    half = spread.half_width(len(seeds), loss.same_start)
    low, high = (own_low, own_high) if half is None else (mean - half, mean + half)
    a, b, c, d = (None if bound is None else math.exp(bound) for bound in (low, high, own_low, own_high))
    return Ratio(seeds, math.exp(mean), "", a, b, c, d, verdict(low, high, ("faster", "slower")))


# --- a power law (rule 23) ---


@dataclass(frozen=True)
class PowerLaw:
    """L = E + A C^-alpha, each with (low, high) of the bootstrap over seeds."""

    E: float
    A: float
    alpha: float
    intervals: dict[str, tuple[float, float]]
    points: int
    seeds: int


def power_law(curves: dict[int, Curve], seed: int = 0) -> PowerLaw | str:
    """Least squares on the means over seeds, E and A >= 0; a sentence where that cannot be.

    Seeds are drawn with replacement; few seeds make few different draws, and too short an interval.
    """
    shared = set.intersection(*({c for c, _ in curve} for curve in curves.values())) if curves else set()
    flops = sorted(shared)
    if len(flops) < LEAST_POINTS:
        return f"a fit needs at least {LEAST_POINTS} budgets that all seeds have, after an arm's last growth"
    if len(curves) < 2:
        return "a bootstrap over seeds needs at least 2 of them, and there is 1"
    x, losses = np.array(flops), np.array([[dict(curve)[c] for c in flops] for curve in curves.values()])
    draws = np.sort(np.random.default_rng(seed).integers(len(losses), size=(BOOTSTRAP_DRAWS, len(losses))))
    different, times = np.unique(draws, axis=0, return_counts=True)
    fits = np.repeat([fit_power_law(x, losses[draw].mean(0)) for draw in different], times, axis=0)
    low, high = np.quantile(fits, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    intervals = {name: (float(low[i]), float(high[i])) for i, name in enumerate(("E", "A", "alpha"))}
    return PowerLaw(*fit_power_law(x, losses.mean(0)), intervals, len(flops), len(losses))


def fit_power_law(flops: np.ndarray, losses: np.ndarray) -> tuple[float, float, float]:
    """(E, A, alpha): for each alpha the two others are a linear problem, so one number is searched for."""
    from scipy.optimize import minimize_scalar, nnls

    scale = math.exp(np.log(flops).mean())  # C^-alpha of raw FLOPs would be lost beside the column of ones

    def solved(log_alpha: float) -> tuple[np.ndarray, float]:
        return nnls(np.stack([np.ones_like(flops), (flops / scale) ** -math.exp(log_alpha)], axis=1), losses)

    grid = np.linspace(math.log(ALPHAS[0]), math.log(ALPHAS[1]), 40)
    at = min(range(len(grid)), key=lambda i: solved(float(grid[i]))[1])
    bounds = (grid[max(at - 1, 0)], grid[min(at + 1, len(grid) - 1)])
    best = minimize_scalar(lambda a: solved(a)[1], bounds=bounds, method="bounded", options={"xatol": 1e-9}).x
    (constant, slope), alpha = solved(best)[0], math.exp(best)
    return float(constant), float(slope * scale**alpha), alpha


# --- growth and size ---


def recovery(before: float, at_flops: float, after: Curve) -> dict[str, Any]:
    """Rule 24: how far the held-out loss rose above `before`, and the FLOPs until it was there again.

    after: the evaluations from right after the growth until the next one. The rise is that of their highest; 0 FLOPs
    where it is none, below NO_RISE; None FLOPs where `before` is not reached again after the highest. `at_next`: it
    was there again at the first evaluation that training led to, so the FLOPs are no more than a bound.
    """
    if not after:
        return {"rise": None, "flops": None, "at_next": False}
    top = max(range(len(after)), key=lambda i: after[i][1])
    rise = after[top][1] - before
    if rise < NO_RISE:
        return {"rise": rise, "flops": 0.0, "at_next": False}
    flops = next((c - at_flops for c, loss in after[top:] if loss <= before), None)
    trained = [c - at_flops for c, _ in after if c > at_flops]
    return {"rise": rise, "flops": flops, "at_next": bool(trained) and flops == trained[0]}


def compute_optimal(sizes: dict[str, tuple[float, float]]) -> dict[str, Any] | None:
    """Rule 10: of {arm: (parameters, mean loss)} the lowest, and whether some size on either side of it is worse."""
    if not sizes:
        return None
    arm = min(sizes, key=lambda name: sizes[name][1])
    parameters = sizes[arm][0]
    smaller = any(p < parameters for p, _ in sizes.values())
    larger = any(p > parameters for p, _ in sizes.values())
    edge = "" if smaller and larger else "smallest" if larger else "largest" if smaller else "only"
    distinct = len({p for p, _ in sizes.values()})
    return {"arm": arm, "parameters": parameters, "loss": sizes[arm][1], "sizes": distinct, "edge": edge}
