"""The statistics of a race, against numbers worked by hand, scipy's tests and simulated truth."""

import math

import numpy as np
import pytest
from scipy import stats

from tokenformer import statistics as st

RNG_SEED = 20


def drawn(rng, means, seeds=3, s=0.01, seed_effect=0.05):
    """y = arm + seed + rest with a known rest."""
    shift = rng.normal(0, seed_effect, seeds)
    return {arm: {j: mean + shift[j] + rng.normal(0, s) for j in range(seeds)} for arm, mean in means.items()}


# --- the two-way table ---


def test_a_group_that_scatters_more_is_found_and_equal_ones_seldom_are():
    rng, groups = np.random.default_rng(RNG_SEED), {f"{g}{i}": g for g in "abc" for i in range(4)}
    found = [st.unequal_scatter(drawn(rng, dict.fromkeys(groups, 2.0)), groups) for _ in range(1000)]
    assert sum(each is not None for each in found) < 40  # of 1000, of which it is meant to name 10
    table = drawn(rng, dict.fromkeys(groups, 2.0)) | drawn(rng, {"b0": 2.0, "b1": 2.0, "b2": 2.0, "b3": 2.0}, s=0.1)
    name, s, rest = st.unequal_scatter(table, groups)
    assert name == "b" and 0.05 < s < 0.2 and rest < 0.03
    assert st.unequal_scatter(table, dict.fromkeys(groups, "a")) is None  # one group has none beside it


def test_arms_of_one_start_do_not_make_another_group_scatter_more():
    rng = np.random.default_rng(RNG_SEED)
    groups = {**{f"a{i}": "a" for i in range(8)}, **{f"b{i}": "b" for i in range(4)}}
    starts = {arm: group if group == "a" else arm for arm, group in groups.items()}
    named = {True: 0, False: 0}
    for _ in range(400):
        start = rng.normal(0, 0.0173, 3)  # of variance v_g = 3 v, which arms of a share, and each of b has its own
        table = {arm: {j: 2.0 + start[j] + rng.normal(0, 0.01) for j in range(3)} for arm in groups if arm[0] == "a"}
        table |= {arm: {j: 2.0 + rng.normal(0, 0.02) for j in range(3)} for arm in groups if arm[0] == "b"}
        for told in named:
            named[told] += st.unequal_scatter(table, groups, starts if told else None) is not None
    assert named[True] < 20 < named[False]  # of 400; the control: without the starts it is far too often


def test_arms_of_one_start_that_scatter_more_about_it_than_others_about_theirs_are_found_and_equal_ones_seldom():
    rng, found = np.random.default_rng(RNG_SEED), {0.01: 0, 0.1: 0}
    groups = {f"{g}{i}": g for g in "ab" for i in range(4)}
    for s in found:
        for _ in range(400):
            start = {g: rng.normal(0, 0.05, 3) for g in "ab"}
            rest = {"a": 0.01, "b": s}
            table = {arm: {j: start[g][j] + rng.normal(0, rest[g]) for j in range(3)} for arm, g in groups.items()}
            told = st.unequal_scatter(table, groups, groups, within=True)
            found[s] += told is not None and told[0] == "b"
            assert st.unequal_scatter(table, groups, groups) is None  # one arm of each start leaves too little
    assert found[0.01] < 12 and found[0.1] > 380  # of 400


# Worked by hand. Arm means 2, 3, 5; seed means 2, 10/3, 14/3; grand mean 10/3; the rests are then
# 1/3 0 -1/3 | -2/3 0 2/3 | 1/3 0 -1/3, their squares sum to 12/9, over (3 - 1)(3 - 1) degrees of freedom: 1/3.
HAND = {"a": {0: 1.0, 1: 2.0, 2: 3.0}, "b": {0: 1.0, 1: 3.0, 2: 5.0}, "c": {0: 4.0, 1: 5.0, 2: 6.0}}


def test_the_pooled_spread_is_that_of_the_two_way_table_worked_by_hand():
    spread = st.spread_of(HAND)
    assert spread.df == 4 and spread.s == pytest.approx(math.sqrt(1 / 3))
    d = st.difference(HAND, "a", "c", spread)
    assert d.value == pytest.approx(-3) and d.seeds == [0, 1, 2]
    assert d.high - d.low == pytest.approx(2 * 2.7764451 * math.sqrt(1 / 3) * math.sqrt(2 / 3))  # t(4) of tables
    assert d.word == "better" and st.difference(HAND, "c", "a", spread).word == "worse"
    assert st.difference(HAND, "a", "b", spread).word == "not told apart"
    ungrouped = np.std([y for row in HAND.values() for y in row.values()], ddof=1)
    assert spread.s < ungrouped  # the control: without arms and seeds taken out it would be another number


def test_two_arms_give_the_paired_t_test():
    rng = np.random.default_rng(RNG_SEED)
    table = drawn(rng, {"a": 2.0, "b": 2.02}, seeds=5)
    a, b = ([table[arm][j] for j in range(5)] for arm in "ab")
    reference = stats.ttest_rel(a, b).confidence_interval(0.95)
    d = st.difference(table, "a", "b", st.spread_of(table))
    assert (d.low, d.high) == pytest.approx(tuple(reference)) == (d.own_low, d.own_high)
    unpaired = stats.ttest_ind(a, b).confidence_interval(0.95)
    assert unpaired.high - unpaired.low > 2 * (d.high - d.low)  # the control: pairs matter here


def test_the_own_interval_is_scipys_whatever_the_other_arms_are():
    d = st.difference(HAND, "a", "b", st.spread_of(HAND))
    reference = stats.ttest_rel([1, 2, 3], [1, 3, 5]).confidence_interval(0.95)
    assert (d.own_low, d.own_high) == pytest.approx(tuple(reference))
    assert (d.low, d.high) != pytest.approx(tuple(reference))


def test_a_missing_cell_is_left_out_of_both_arms_and_costs_a_degree_of_freedom():
    table = {arm: dict(row) for arm, row in HAND.items()}
    del table["c"][2]
    spread = st.spread_of(table)
    # By hand, as Yates (1933) has it: with (3 * 9 + 3 * 8 - 24) / 4 = 6.75 in the gap, which leaves no rest there, the
    # full table's squares sum to 156/144, and the gap takes one degree of freedom.
    assert spread.s == pytest.approx(math.sqrt(156 / 144 / 3))
    assert spread.df == 3
    d = st.difference(table, "a", "c", spread)
    assert d.seeds == [0, 1] and d.value == pytest.approx(-3)
    assert d.high - d.value == pytest.approx(st.student(3) * spread.s * math.sqrt(2 / 2))
    assert st.difference(table, "a", "b", spread).seeds == [0, 1, 2]
    # A constant added to arms and seeds changes no rest, missing cells or not.
    moved = {arm: {j: y + 10 * j + len(arm) for j, y in row.items()} for arm, row in table.items()}
    assert st.spread_of(moved).s == pytest.approx(spread.s)


@pytest.mark.parametrize(
    "table",
    [{}, {"a": {}}, {"a": {0: 1.0}}, {"a": {0: 1.0, 1: 2.0}}, {"a": {0: 1.0}, "b": {1: 2.0}}, {"a": {}, "b": {0: 1.0}}],
)
def test_too_little_gives_no_interval_and_no_crash(table):
    spread = st.spread_of(table)
    assert spread == st.Spread(None, 0)
    for d in st.differences(table, spread):
        assert (d.low, d.high) == (None, None) and d.word in ("not compared", "not told apart")
        assert (d.word == "not compared") == (d.seeds == [])


def test_a_table_with_many_holes_has_an_interval_all_the_same():
    """A starts' share of the mean square below 1 left less than one degree of freedom, which has no interval."""
    random, found = np.random.default_rng(0), []
    starts = {"a": "g2", "b": "g1", "c": "g2", "d": "g2"}
    seeds = {"a": (1, 2), "b": (0, 1), "c": (1, 2), "d": (0, 2)}
    for _ in range(300):
        effect = random.normal(size=(3, 3))
        table = {
            arm: {seed: effect[int(starts[arm][1]), seed] + 0.3 * random.normal() for seed in row}
            for arm, row in seeds.items()
        }
        spread = st.spread_of(table, starts)
        found.append(spread.df)
        st.differences(table, spread)
    assert min(found) == 1.0 < max(found)


def test_intervals_cover_a_known_difference_95_times_in_a_hundred():
    rng, hits, narrow, times = np.random.default_rng(RNG_SEED), 0, 0, 600
    for _ in range(times):
        table = drawn(rng, {"a": 2.0, "b": 2.03, "c": 2.1, "d": 2.0})
        d = st.difference(table, "a", "b", st.spread_of(table))
        hits += d.low <= -0.03 <= d.high
        half = (d.high - d.low) / 4
        narrow += abs(d.value + 0.03) <= half
    # Three standard errors of a share of 0.95 among 600 are 0.027.
    assert abs(hits / times - 0.95) < 0.027
    assert narrow / times < 0.90  # the control: half the width covers less


def test_coverage_holds_when_a_run_has_failed():
    rng, hits, times = np.random.default_rng(RNG_SEED), 0, 600
    for _ in range(times):
        table = drawn(rng, {"a": 2.0, "b": 2.03, "c": 2.1, "d": 2.0})
        del table["b"][1], table["d"][2]
        d = st.difference(table, "a", "b", st.spread_of(table))
        hits += d.low <= -0.03 <= d.high
    assert abs(hits / times - 0.95) < 0.027


# --- arms that start as one model ---

FAMILIES = {arm: int(arm[0]) for arm in ("0a", "0b", "0c", "0d", "0e", "1a", "1b", "1c", "2a", "2b", "3a", "4a")}


def drawn_in_families(rng, s, s_start, seeds=3):
    """y = seed + start x seed + rest: no arm differs from another."""
    start = rng.normal(0, s_start, (len(set(FAMILIES.values())), seeds))
    table = drawn(rng, dict.fromkeys(FAMILIES, 2.0), seeds, s)
    return {arm: {j: y + start[FAMILIES[arm], j] for j, y in row.items()} for arm, row in table.items()}


def test_a_shared_start_is_taken_out_as_in_a_nested_analysis_of_variance():
    rng, groups, m, n = np.random.default_rng(RNG_SEED), 4, 3, 5
    y = rng.normal(0, 1, (groups, m, n)) + 2 * rng.normal(0, 1, (groups, 1, n))
    table = {f"{g}{i}": dict(enumerate(y[g, i])) for g in range(groups) for i in range(m)}
    rest = y - y.mean(2, keepdims=True)  # of tables for balanced data: arms out, then seeds within each group
    within = float(((rest - rest.mean(1, keepdims=True)) ** 2).sum()) / (groups * (m - 1) * (n - 1))
    between = m * float(((rest.mean(1) - rest.mean((0, 1))) ** 2).sum()) / ((groups - 1) * (n - 1))
    spread = st.spread_of(table, {arm: arm[0] for arm in table})
    assert (spread.s_same, spread.df_same) == (pytest.approx(math.sqrt(within)), groups * (m - 1) * (n - 1))
    parts = {(groups - 1) * (n - 1): between / m, spread.df_same: within * (1 - 1 / m)}
    assert spread.s == pytest.approx(math.sqrt(sum(parts.values())))
    assert spread.df == pytest.approx(sum(parts.values()) ** 2 / sum(v**2 / df for df, v in parts.items()))
    apart, same = st.difference(table, "00", "10", spread), st.difference(table, "00", "01", spread)
    assert (apart.same_start, same.same_start) == (False, True) and apart.high - apart.low > same.high - same.low
    alone = st.spread_of(table)
    each = {arm: arm for arm in table}
    assert st.spread_of(table, each) == st.Spread(alone.s, alone.df, starts=each)
    one = st.spread_of(table, dict.fromkeys(table, "the same"))
    assert (one.s, one.s_same, one.df_same) == (None, pytest.approx(alone.s), alone.df)


def test_runs_that_are_the_same_to_the_bit_are_one_look_at_the_noise():
    rng = np.random.default_rng(RNG_SEED)
    table = {arm: dict(enumerate(rng.normal(0, 1, 3))) for arm in "abcd"}
    starts = {"a": 1, "b": 1, "c": 1, "d": 2}
    again = {**table, **{f"a{i}": dict(table["a"]) for i in range(4)}}  # before they grow
    same = st.spread_of(again, {**starts, **{f"a{i}": 1 for i in range(4)}})
    once = st.spread_of(table, starts)
    assert (same.s, same.df, same.s_same, same.df_same) == (once.s, once.df, once.s_same, once.df_same)
    apart = st.spread_of(again, {**starts, **{f"a{i}": 3 + i for i in range(4)}})
    assert apart.df > once.df  # the control: of other starts it is chance, and counts


def test_a_start_that_does_nothing_leaves_the_pooled_spread():
    rest = np.array([[1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, 1.0]])  # the groups' means: no rest at all
    table = {arm: dict(enumerate(row)) for arm, row in zip("abcd", rest.tolist(), strict=True)}
    spread, plain = st.spread_of(table, {"a": 1, "b": 1, "c": 2, "d": 2}), st.spread_of(table)
    assert (spread.s, spread.df) == (pytest.approx(plain.s), plain.df) and spread.s < spread.s_same


@pytest.mark.parametrize("missing", [False, True])
def test_intervals_cover_where_arms_share_the_start_of_a_seed(missing):
    rng, times = np.random.default_rng(RNG_SEED), 500
    hits = dict.fromkeys(("apart", "same", "apart, starts not known", "same, starts not known"), 0)
    for _ in range(times):
        table = drawn_in_families(rng, s=0.0085, s_start=0.012)
        if missing:
            del table["0b"][1], table["3a"][0]
        for known, spread in (("", st.spread_of(table, FAMILIES)), (", starts not known", st.spread_of(table))):
            hits["apart" + known] += st.difference(table, "0a", "4a", spread).word == "not told apart"
            hits["same" + known] += st.difference(table, "0a", "0c", spread).word == "not told apart"
    share = {what: count / times for what, count in hits.items()}
    assert abs(share["apart"] - 0.95) < 0.03 and abs(share["same"] - 0.95) < 0.03
    # The control: pooled over all arms alike, intervals between starts are too short, and within one too long.
    assert share["apart, starts not known"] < 0.92 and share["same, starts not known"] > 0.98


def test_a_copy_is_not_told_apart_and_a_handicap_is_found():
    rng, words, times = np.random.default_rng(RNG_SEED), [], 400
    for _ in range(times):
        table = drawn(rng, {"reference": 2.0, "copy": 2.0, "handicapped": 2.05, "other": 1.9})
        spread = st.spread_of(table)
        words.append([st.difference(table, arm, "reference", spread).word for arm in ("copy", "handicapped")])
    copies, handicaps = zip(*words, strict=True)
    assert abs(copies.count("not told apart") / times - 0.95) < 0.033
    assert handicaps.count("worse") / times > 0.95 and handicaps.count("better") == 0


def test_the_noise_of_a_copy_is_the_standard_deviation_of_one_run():
    assert st.copy_noise(HAND, "a", "b") | {"s": None} == {
        "copy": "a",
        "original": "b",
        "seeds": [0, 1, 2],
        "differences": [0.0, -1.0, -2.0],
        "s": None,
    }
    assert st.copy_noise(HAND, "a", "b")["s"] == pytest.approx(math.sqrt((0 + 1 + 4) / 3 / 2))
    table = drawn(np.random.default_rng(RNG_SEED), {"a": 2.0, "b": 2.0}, seeds=4000)
    assert st.copy_noise(table, "a", "b")["s"] == pytest.approx(0.01, rel=0.05)
    assert st.copy_noise({"a": {}, "b": {0: 1.0}}, "a", "b")["s"] is None


def test_false_alarms_are_counted_as_chance_would_have_them():
    assert st.false_alarms(45) == pytest.approx(2.25)
    rng, alarms, times = np.random.default_rng(RNG_SEED), 0, 300
    for _ in range(times):
        table = drawn(rng, dict.fromkeys("abcde", 2.0))
        alarms += sum(d.word != "not told apart" for d in st.differences(table, st.spread_of(table)))
    assert alarms / times == pytest.approx(st.false_alarms(10), rel=0.3)


def test_so_many_seeds_would_settle_it_four_times_in_five():
    n = st.seeds_needed(0.012, 0.01, df=5)
    rng, found = np.random.default_rng(RNG_SEED), {}
    for seeds in (n - 2, n):
        words = []
        for _ in range(600):
            table = drawn(rng, {"a": 2.0, "b": 2.012, "c": 2.1, "d": 2.0, "e": 2.0, "f": 2.0}, seeds=seeds)
            words.append(st.difference(table, "a", "b", st.spread_of(table)).word)
        found[seeds] = words.count("better") / 600
    assert found[n - 2] < 0.8 < found[n] < 0.9
    assert st.seeds_needed(-0.012, 0.01, df=5) == n and st.seeds_needed(0.02, 0.01, df=5) < n
    assert st.seeds_needed(0.0, 0.01, df=5) is None
    assert st.seeds_needed(0.012, 0.01, df=0.5) > n  # half a degree of freedom a seed, as of a table full of gaps


def test_students_points_are_those_of_tables():
    assert [round(st.student(df), 2) for df in (1, 2, 3, 9)] == [12.71, 4.30, 3.18, 2.26]
    assert st.student(2, 0.9) < st.student(2)
    with pytest.raises(ValueError, match="df: 0 is too small"):
        st.student(0)


# --- FLOPs to reach a loss ---


def test_flops_to_reach_a_loss_lie_on_straight_lines_over_log_flops():
    curve = [(1e12, 3.0), (4e12, 2.0), (16e12, 1.5)]
    assert st.flops_to_reach(curve, 2.5) == (pytest.approx(2e12), "")  # halfway in the logarithm, not 2.5e12
    assert st.flops_to_reach(list(reversed(curve)), 1.75) == (pytest.approx(8e12), "")
    assert st.flops_to_reach(curve, 3.0) == (1e12, "")
    assert st.flops_to_reach(curve, 3.1) == (1e12, "less than")
    assert st.flops_to_reach(curve, 1.4) == (16e12, "more than")
    assert st.flops_to_reach([(1e12, 3.0), (2e12, 2.0), (4e12, 2.2), (8e12, 1.0)], 2.1)[0] < 2e12  # the first time
    with pytest.raises(ValueError, match="empty"):
        st.flops_to_reach([], 2.0)


def law(flops):
    return 1.0 + 0.5 * (flops / 1e12) ** -0.3


def race_of_laws(rng, speeds, s=0.0, budgets=(0.25e12, 0.5e12, 1e12), seeds=3):
    """Arms that get `speed` times as far with the same FLOPs: they need 1 / speed of the reference's."""
    shift = rng.normal(0, 0.02, seeds)
    return {
        arm: {
            j: [(c, law(c * speed) + shift[j] + (rng.normal(0, s) if s else 0.0)) for c in budgets]
            for j in range(seeds)
        }
        for arm, speed in speeds.items()
    }


def ratios(curves, index):
    targets = {seed: curve[index] for seed, curve in curves["reference"].items()}
    table = {arm: {seed: curve[index][1] for seed, curve in rows.items()} for arm, rows in curves.items()}
    spread = st.spread_of(table)
    losses = {arm: st.difference(table, arm, "reference", spread) for arm in curves if arm != "reference"}
    return st.flops_ratios({a: c for a, c in curves.items() if a != "reference"}, targets, losses)


def test_a_known_saving_of_flops_is_found_with_its_interval():
    rng = np.random.default_rng(RNG_SEED)
    speeds = {"reference": 1.0, "grown": 1 / 0.7, "slow": 0.8, "slower": 0.7}
    exact = ratios(race_of_laws(rng, speeds), 1)
    assert exact["grown"].value == pytest.approx(0.7, rel=0.02) and exact["grown"].side == ""
    assert exact["slow"].value == pytest.approx(1 / 0.8, rel=0.02)
    noisy = ratios(race_of_laws(rng, speeds, s=0.001), 1)
    assert noisy["grown"].low < noisy["grown"].value < noisy["grown"].high < 1 < noisy["slow"].low
    assert (noisy["grown"].word, noisy["slow"].word) == ("faster", "slower")


def test_the_interval_of_a_ratio_covers_the_truth():
    rng, hits, copies, times = np.random.default_rng(RNG_SEED), 0, 0, 300
    speeds = {"reference": 1.0, "copy": 1.0, "fast": 1.25, "slow": 0.8, "other": 0.9}
    truth = ratios(race_of_laws(rng, speeds), 1)["fast"].value  # straight lines bend it by a percent
    for _ in range(times):
        found = ratios(race_of_laws(rng, speeds, s=0.003), 1)
        hits += found["fast"].low <= truth <= found["fast"].high
        copies += found["copy"].word == "not told apart"
    assert abs(hits / times - 0.95) < 0.04 and abs(copies / times - 0.95) < 0.04


def test_nothing_is_extrapolated():
    rng = np.random.default_rng(RNG_SEED)
    curves = race_of_laws(rng, {"reference": 1.0, "fast": 3.0, "slow": 1 / 3}, s=1e-4)
    last, first = ratios(curves, 2), ratios(curves, 0)
    assert (last["slow"].side, last["slow"].value) == ("more than", pytest.approx(1.0))
    assert last["slow"].low is None and last["slow"].word == "slower"
    assert (first["fast"].side, first["fast"].word) == ("less than", "faster")
    assert first["slow"].side == "" and first["slow"].value == pytest.approx(3.0, rel=0.02)
    assert last["fast"].side == "" and last["fast"].value == pytest.approx(1 / 3, rel=0.02)
    curves["slow"][0] = [(c, 0.1) for c, _ in curves["slow"][0]]  # one seed below all thresholds, the others above
    assert (ratios(curves, 2)["slow"].side, ratios(curves, 2)["slow"].low) == ("unbounded", None)
    del curves["slow"][0], curves["slow"][1], curves["slow"][2]
    assert ratios(curves, 1)["slow"] == st.Ratio([], None, "", None, None, None, None, "not compared")


# --- power law, recovery, size ---


def test_a_power_law_is_recovered_and_too_few_points_are_refused():
    rng = np.random.default_rng(RNG_SEED)
    budgets = (0.1e12, 0.25e12, 0.5e12, 1e12, 2e12)
    curves = {j: [(c, law(c) + rng.normal(0, 1e-4)) for c in budgets] for j in range(3)}
    fit = st.power_law(curves)
    assert isinstance(fit, st.PowerLaw)
    assert fit.E == pytest.approx(1.0, abs=0.02) and fit.alpha == pytest.approx(0.3, abs=0.02)
    assert fit.E + fit.A * 1e12**-fit.alpha == pytest.approx(1.5, abs=1e-3)
    for name, (low, high) in fit.intervals.items():
        assert low <= getattr(fit, name) <= high
    assert st.power_law(curves) == fit
    few = st.power_law({j: curve[:3] for j, curve in curves.items()})
    assert few == "a fit needs at least 4 budgets that all seeds have, after an arm's last growth"
    assert "at least 2" in st.power_law({0: curves[0]}) and "at least 4" in st.power_law({})


def test_a_rise_after_growth_and_the_flops_until_it_is_made_good():
    after = [(10.0, 2.1), (12.0, 2.3), (15.0, 2.05), (20.0, 1.9), (25.0, 1.8)]
    assert st.recovery(2.0, 10.0, after) == {"rise": pytest.approx(0.3), "flops": 10.0, "at_next": False}
    assert st.recovery(1.0, 10.0, after) == {"rise": pytest.approx(1.3), "flops": None, "at_next": False}
    assert st.recovery(2.3, 10.0, after) == {"rise": 0.0, "flops": 0.0, "at_next": False}
    assert st.recovery(2.0, 10.0, []) == {"rise": None, "flops": None, "at_next": False}


def test_a_rise_of_rounding_is_none_and_one_made_good_at_the_next_evaluation_is_a_bound():
    def after(rise):
        return st.recovery(2.0, 10.0, [(10.0, 2.0 + rise), (12.0, 1.9), (15.0, 1.8)])

    assert after(1e-9)["flops"] == 0 and after(0.99e-4)["flops"] == 0 and not after(1e-9)["at_next"]
    assert (after(1.01e-4)["flops"], after(1.01e-4)["at_next"]) == (2.0, True)  # the control: this one is a rise
    later = st.recovery(2.0, 10.0, [(10.0, 2.3), (12.0, 2.1), (15.0, 1.9)])
    assert (later["flops"], later["at_next"]) == (5.0, False)


def test_the_best_size_is_found_and_an_edge_is_said_to_be_one():
    sizes = {"small": (1e5, 2.2), "middle": (2e5, 2.0), "large": (4e5, 2.1)}
    assert st.compute_optimal(sizes)["arm"] == "middle" and st.compute_optimal(sizes)["edge"] == ""
    del sizes["small"]
    assert st.compute_optimal(sizes)["edge"] == "smallest"
    assert st.compute_optimal({"a": (1e5, 3.0), "b": (2e5, 2.0)})["edge"] == "largest"
    assert st.compute_optimal({"a": (1e5, 3.0)})["edge"] == "only" and st.compute_optimal({}) is None
