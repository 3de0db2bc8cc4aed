"""What one [[growth]] stands for, against lists worked out by hand; the slope of a loss, against a known power law."""

import dataclasses
import math
import random
from typing import Any

import pytest

from tokenformer.recipe import GrowthSection
from tokenformer.schedule import BINS, Window, add_loss, expand, slope_at, window_of


def growth(to: dict[str, int], **settings: Any) -> GrowthSection:
    return GrowthSection(to=to, **{"at_fraction": 0.2, "until_fraction": 0.6, **settings})


def listed(section: GrowthSection, **present: int) -> list[tuple[float | None, dict[str, int]]]:
    return [(event.at_fraction, event.to) for event in expand(section, present, section.to)]


def test_equal_steps_from_the_present_size_to_the_target() -> None:
    section = growth({"ffn_tokens": 100}, stages=3)
    expected = [(0.2, {"ffn_tokens": 40}), (0.4, {"ffn_tokens": 70}), (0.6, {"ffn_tokens": 100})]
    assert listed(section, ffn_tokens=10) == expected


def test_equal_factors_from_the_present_size_to_the_target() -> None:
    section = growth({"ffn_tokens": 128}, stages=3, shape="exponential")
    expected = [(0.2, {"ffn_tokens": 32}), (0.4, {"ffn_tokens": 64}), (0.6, {"ffn_tokens": 128})]
    assert listed(section, ffn_tokens=16) == expected
    # 10 * 2^(1/2) = 14.14
    assert listed(growth({"a": 20}, stages=2, shape="exponential"), a=10) == [(0.2, {"a": 14}), (0.6, {"a": 20})]


def test_stages_are_rounded_to_the_nearest_multiple_and_the_last_is_exact() -> None:
    section = growth({"ffn_tokens": 100}, stages=3, multiple_of=16)
    # 40 = 2.5 * 16, and a half goes up; 70 = 4.375 * 16
    assert [to["ffn_tokens"] for _, to in listed(section, ffn_tokens=10)] == [48, 64, 100]


def test_several_axes_together_or_one_by_one_in_the_order_written() -> None:
    together = growth({"ffn_tokens": 30, "qkv_tokens": 16}, stages=2)
    assert listed(together, ffn_tokens=10, qkv_tokens=8) == [
        (0.2, {"ffn_tokens": 20, "qkv_tokens": 12}),
        (0.6, {"ffn_tokens": 30, "qkv_tokens": 16}),
    ]
    apart = growth({"qkv_tokens": 16, "ffn_tokens": 30}, order="one_by_one")
    assert listed(apart, ffn_tokens=10, qkv_tokens=8) == [(0.2, {"qkv_tokens": 16}), (0.6, {"ffn_tokens": 30})]
    both = dataclasses.replace(together, order="one_by_one", at_fraction=0.1, until_fraction=0.7)
    assert listed(both, ffn_tokens=10, qkv_tokens=8) == [
        (0.1, {"ffn_tokens": 20}),
        (0.3, {"qkv_tokens": 12}),
        (0.5, {"ffn_tokens": 30}),
        (0.7, {"qkv_tokens": 16}),
    ]


def test_an_axis_that_rounding_leaves_where_it_is_is_not_in_that_stage() -> None:
    section = growth({"layers": 3, "ffn_tokens": 40}, stages=3)
    changes = [to for _, to in listed(section, layers=2, ffn_tokens=10)]
    assert changes == [{"ffn_tokens": 20}, {"layers": 3, "ffn_tokens": 30}, {"ffn_tokens": 40}]


def test_a_plain_event_stays_what_it_is_and_stages_have_rows_of_their_own() -> None:
    plain = GrowthSection(to={"ffn": 32}, at_step=5, seed=7)
    assert expand(plain, {"ffn_tokens": 16}, {"ffn_tokens": 32}) == [
        dataclasses.replace(plain, to={"ffn_tokens": 32})
    ]
    events = expand(growth({"a": 30}, stages=2, seed=7, rewarm_steps=9), {"a": 10}, {"a": 30})
    assert [event.seed for event in events] == [7, 10_007]
    runs = [expand(growth({"a": 90}, stages=4, seed=seed), {"a": 10}, {"a": 90}) for seed in range(3)]
    assert len({event.seed for events in runs for event in events}) == 12  # no rows of another seed's
    assert all(event.stages == 1 and event.until_fraction is None and event.rewarm_steps == 9 for event in events)


@pytest.mark.parametrize(
    ("settings", "present", "target", "message"),
    [
        ({"stages": 3, "multiple_of": 8}, 8, 20, "stages: stage 2 of 3 would take a from 16 to 16 with multiple_of ="),
        ({"stages": 2, "multiple_of": 16}, 8, 12, "stages: stage 2 of 2 would take a from 16 to 12"),
        ({"stages": 9}, 8, 12, "stages: stage 1 of 9 would take a from 8 to 8"),
        ({"stages": 2, "shape": "exponential"}, 0, 8, "shape: 'exponential' has no factor that leads from a = 0 to 8"),
    ],
)
def test_stages_that_cannot_be_are_refused(settings: Any, present: int, target: int, message: str) -> None:
    expand(growth({"a": target}, stages=2), {"a": present}, {"a": target})  # the control
    with pytest.raises(ValueError) as caught:
        expand(growth({"a": target}, **settings), {"a": present}, {"a": target})
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_an_axis_that_does_not_grow_cannot_come_one_by_one() -> None:
    with pytest.raises(ValueError, match="would take b from 4 to 4"):
        expand(growth({"a": 8, "b": 4}, order="one_by_one"), {"a": 4, "b": 4}, {"a": 8, "b": 4})


# --- the slope ---


def slopes(loss: Any, window: Window, steps: int, before: int = 0, per_step: int = 64) -> dict[int, float]:
    """The slope at every boundary at which there is one."""
    sums: list[float] = []
    found = {}
    for step in range(steps):
        add_loss(sums, loss(before + (step + 1) * per_step), step, window)
        slope = slope_at(sums, step + 1, window, before, per_step)
        if slope is not None:
            found[step + 1] = slope
    assert len(sums) <= BINS
    return found


@pytest.mark.parametrize("exponent", [-0.5, -0.05, 0.02])
@pytest.mark.parametrize("before", [0, 100_000])
def test_a_power_law_has_its_own_exponent_as_slope(exponent: float, before: int) -> None:
    found = slopes(lambda tokens: 9.0 * tokens**exponent, window_of(100, since=20), 400, before)
    assert min(found) == 20 + 16 * 7 - 7 * 2  # 14 bins of 7 steps
    assert all(slope == pytest.approx(exponent, rel=0.01) for slope in found.values())


def test_the_tokens_of_ancestors_count() -> None:
    """The control: the same losses look shallower where fewer tokens are held to have led to them."""
    window = window_of(100, since=0)
    sums: list[float] = []
    for step in range(98):
        add_loss(sums, 9.0 * (100_000 + (step + 1) * 64) ** -0.1, step, window)
    assert slope_at(sums, 98, window, 100_000, 64) == pytest.approx(-0.1, rel=0.01)
    assert slope_at(sums, 98, window, 0, 64) == pytest.approx(0, abs=0.01)


def test_noise_is_averaged_over_the_window() -> None:
    draw = random.Random(0)
    noisy = lambda tokens: 9.0 * tokens**-0.1 * math.exp(draw.gauss(0, 0.02))  # noqa: E731
    found = slopes(noisy, window_of(600, since=0), 3000)
    late = [slope for step, slope in found.items() if step > 1000]
    assert sum(late) / len(late) == pytest.approx(-0.1, abs=0.01)
    assert max(abs(slope + 0.1) for slope in late) < 0.05


@pytest.mark.parametrize("steps", [1, 2, 3, 15, 16, 17, 31, 33, 100, 1000])
def test_a_window_has_few_bins_and_about_the_length_asked_for(steps: int) -> None:
    window = window_of(steps, since=0)
    assert 2 <= window.bins <= BINS
    assert 0 <= max(2, steps) - window.bins * window.bin_steps < window.bin_steps or window.bins == 2
    assert min(slopes(lambda tokens: tokens**-0.1, window, 1200)) == window.bins * window.bin_steps
