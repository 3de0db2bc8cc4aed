"""The page of a full race, on fabricated folders of known truth: what it says is so, and what spoils it is red."""

import html
import json
import math
import re
import shutil
import statistics
from typing import Any

import pytest
from scipy import stats
from tiny_races import ARMS, FLOPS, GROWS, plausible, write, write_full_race

from tokenformer.report import read_report, write_report
from tokenformer.report.charts import QUIET
from tokenformer.report.markup import name_of
from tokenformer.report.race.controls import own_controls, pair_of
from tokenformer.report.race.doubts import nearest, put_in_words, unequal_noise
from tokenformer.report.race.numbers import calculate, spread_of_held_out
from tokenformer.report.race.page import page, png_texts, top_charts
from tokenformer.report.race.verdicts import ratio_cell
from tokenformer.report.race.words import best_arm, conclusion, further, of_another_kind, ratio_text
from tokenformer.report.units import flops_text, signed
from tokenformer.report.verdict import flatten
from tokenformer.runs import remove_unfinished
from tokenformer.statistics import spread_of

BUDGETS, SEEDS = (0.25, 0.5, 1.0), (0, 1, 2)


@pytest.fixture(scope="module")
def race(tmp_path_factory):
    folder = write_full_race(tmp_path_factory.mktemp("race") / "fair", cosine=("scratch", "grown"))
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def report(race):
    return json.loads((race / "report.json").read_text())


def page_of(report):
    return page(report, top_charts(report))


def reds(report):
    return [n["text"] for n in report["status_warnings"] + report["warnings"] if n["level"] == "bad"]


def ambers(report):
    return [n["text"] for n in report["status_warnings"] + report["warnings"] if n["level"] == "warn"]


def pair(report, a, b, share=1.0):
    budget = next(b for b in report["budgets"] if b["share"] == share)
    return next(p for p in budget["pairs"] if {p["arm"], p["other"]} == {a, b})


def cell(report, arm, share=1.0):
    budget = next(b for b in report["budgets"] if b["share"] == share)
    return next(c for c in budget["arms"] if c["arm"] == arm)


def cells_of(page, title):
    """The table under a heading, row by row, as text."""
    body = page.split(f">{title}", 1)[1].split("<tbody>", 1)[1].split("</tbody>", 1)[0]
    rows = [re.findall("<td[^>]*>(.*?)</td>", row) for row in body.split("<tr>")[1:]]
    return [[html.unescape(re.sub("<[^>]*>", "", cell)) for cell in row] for row in rows]


# --- arithmetic ---


def test_means_and_deviations_are_those_of_the_fabricated_runs(report):
    for name in ARMS:
        for share in BUDGETS:
            y = [plausible(name, 0.004, seed, share) for seed in SEEDS]
            found = cell(report, name, share)
            assert found["values"] == y and found["flops"] == FLOPS * share
            assert (found["mean"], found["sd"]) == pytest.approx((sum(y) / 3, stats.tstd(y)))
    assert cell(report, "small")["tokens_per_parameter"] == pytest.approx(1000 * 2048 / 412_000)
    assert cell(report, "grown")["parameters"] == 720_000 and cell(report, "grown", 0.25)["parameters"] == 412_000


def test_the_pooled_interval_is_that_of_the_table_of_arms_that_start_alike(report):
    alike = ("grown", "grown late", "small", "dropped")  # whose smaller model is one, at each seed
    y = {name: [plausible(name, 0.004, seed, 1.0) for seed in SEEDS] for name in alike}
    grand = sum(map(sum, y.values())) / (3 * len(y))
    seed_means = [sum(row[j] for row in y.values()) / len(y) for j in SEEDS]
    squares = sum((row[j] - sum(row) / 3 - seed_means[j] + grand) ** 2 for row in y.values() for j in SEEDS)
    df = (len(y) - 1) * 2
    half = stats.t.ppf(0.975, df) * math.sqrt(squares / df) * math.sqrt(2 / 3)
    p = pair(report, "grown", "small")
    assert p["value"] == pytest.approx(sum(y["grown"]) / 3 - sum(y["small"]) / 3)
    assert p["high"] - p["value"] == pytest.approx(half) and p["value"] - p["low"] == pytest.approx(half)
    own = stats.ttest_rel(y["grown"], y["small"]).confidence_interval(0.95)
    assert (p["own_low"], p["own_high"]) == pytest.approx(tuple(own))
    table = {name: {seed: plausible(name, 0.004, seed, 1.0) for seed in SEEDS} for name in ARMS}
    starts = {name: "small" if name in alike else name for name in ARMS}  # a copy is a start of its own
    spread = spread_of(table, starts)
    other = pair(report, "grown", "scratch")
    assert (p["same_start"], other["same_start"]) == (True, False)
    assert other["high"] - other["value"] == pytest.approx(spread.half_width(3)) != pytest.approx(half)
    last = report["budgets"][-1]
    assert (last["s"], last["s_same"]) == pytest.approx((spread.s, math.sqrt(squares / df)))
    assert len(last["pairs"]) == 21 and last["expected_false_alarms"] == pytest.approx(21 * 0.05)


def test_the_page_shows_the_numbers_of_the_json(race, report):
    page = html.unescape((race / "report.html").read_text())
    p = pair(report, "grown", "scratch")
    half = (p["high"] - p["low"]) / 2
    assert f"<b>−{abs(p['value']):.3f} ±{half:.3f}</b>" in page and f"<b>+{abs(p['value']):.3f} ±{half:.3f}</b>" in page
    for name in ARMS:
        found = cell(report, name)
        assert f"<b>{found['mean']:.3f} ± {found['sd']:.3f}</b>" in page
    for name in ("grown", "scratch", "small"):
        for rate in (0.002, 0.004, 0.008):
            assert f"{plausible(name, rate, 1000, 0.2):.3f}" in page
    assert page.count("✓") == sum(arm["role"] not in ("copy", "dropped") for arm in ARMS.values())
    ratio = report["reach"][1]["ratios"]["grown"]
    assert f"{ratio['value']:.2f} [{ratio['low']:.2f} to {ratio['high']:.2f}]" in page
    told = report["budgets"][-1]["told_apart"]
    chance = f"21 pairs compared, {told} told apart; chance alone would tell about 1.1 apart"  # 21 * 0.05
    for text in ("tokenformer race fair", "ab" * 32, "0123456789abcdef", "LZMA on the held-out text", chance):
        assert text in page
    assert {row[0]: row[-1] for row in cells_of(page, "Cosine check")} == dict.fromkeys(("grown", "scratch"), "+0.010")
    assert not any(f" {bad}" in re.sub("<[^>]*>", " ", page) for bad in ("nan ", "None ", "inf "))


def test_parameters_memory_and_seconds_stand_beside_flops(race, report):
    page = (race / "report.html").read_text()
    found = {row[0].removesuffix("what grown is"): row[4:] for row in cells_of(page, "Arms")}["grown"]
    memory = f"{(600_000_000 + 720_000 * 16) / 2**20:,.0f} MiB"
    assert found[1:4] == ["412 k → 720 k", "32.8 k", "379 k → 687 k"] and "All parameters are active." in page
    assert found[5:] == ["2.05 M", "2.8", "1.00 GFLOP", memory, "3 min 52 s"]  # 200 s * (0.8 + 720 k / 2 M)
    mixture = json.loads(json.dumps(report))
    mixture["arms"][0]["parameters_end"]["active"] = 500_000
    page = page_of(mixture)
    assert "All parameters are active." not in page and cells_of(page, "Arms")[0][6] == "412 k → 500 k"


def test_the_answer_comes_first_in_two_sentences_with_every_control(race, report):
    first, second = report["answer"]
    assert first == (
        "At 12.0 TFLOP, ancestors included, over 3 seeds: of 2 growing arms all are **better** than **scratch**; "
        "all are **better** than their small size trained longer."
    )
    bits = f"{cell(report, 'grown')['mean']:.3f} bits per byte on held-out text"
    assert second.startswith(f"The best of them, **grown** ({bits}), is **better** than **scratch**")
    for name in ("scratch", "small", "dropped", "size 560 k"):
        assert f"**{name}**" in second
    p = pair(report, "grown", "scratch")
    near, far = sorted((abs(p["low"]), abs(p["high"])))
    assert f"by {abs(p['value']):.3f} [{near:.3f} to {far:.3f}]" in second
    assert "times the FLOPs of **scratch** to its loss: **faster**." in second and second.count("**scratch**") == 2
    page = (race / "report.html").read_text()
    assert page.index('class="answer"') < page.index("<h2>") and "red notes" not in first


def test_whether_growing_paid_is_said_first_in_a_few_words(race, report, tmp_path):
    told = put_in_words({**report, "race": {**report["race"], "tune_fraction": 0.5}})["conclusion"]
    assert told == (
        "Growing paid here: at equal FLOPs the best of 2 grown models, grown, is better than scratch, small and "
        "size 560 k."
    )
    short = report["conclusion"]
    assert short.startswith("That growing pays is not shown here: ") and short.endswith("were tuned on short runs.")
    page = (race / "report.html").read_text()
    assert page.index(report["conclusion"]) < page.index('class="answer"')
    for at_edge in ("grown", "scratch", "size 560 k"):
        arms = [{**arm, "edge": "highest" if arm["name"] == at_edge else ""} for arm in report["arms"]]
        told = conclusion({**report, "arms": arms}, True)
        assert told.startswith("That growing pays is not shown here: ")
        assert told.endswith(f", but the best learning rate of {at_edge} lies at an edge of the grid.")
    arms = [{**arm, "edge": "highest" if arm["name"] == "grown late" else ""} for arm in report["arms"]]  # the control
    assert conclusion({**report, "arms": arms}, True).startswith("Growing paid here: ")
    beyond = json.loads(json.dumps(report))
    beyond["budgets"][-1]["compute_optimal"][0]["edge"] = "largest"
    assert conclusion(beyond, True).endswith(
        ", but size 560 k is the largest of 3 sizes of its kind, so that a better one may lie beyond."
    )
    beyond["budgets"][-1]["compute_optimal"] = []
    beyond["own_controls"] = own_controls(beyond, beyond["budgets"][-1])
    assert conclusion(beyond, True) == ""  # no size is known that growing could be held against

    def moved(name, **by):
        loss = lambda arm, *at: plausible(arm, *at) + by.get(arm.replace(" ", "_"), 0.0)  # noqa: E731
        return read_report(write_full_race(tmp_path / name, loss=loss))["conclusion"]

    beaten = moved("beaten", size_560_k=-0.5)
    assert beaten.startswith("Growing did not pay here: at equal FLOPs size 560 k (the best of 3 sizes from scratch)")
    level = moved("level", grown=cell(report, "scratch")["mean"] - cell(report, "grown")["mean"], grown_late=0.5)
    assert level.startswith("That growing pays is not shown here: ") and "scratch" in level
    late = moved("late", grown=0.5, grown_late=cell(report, "scratch")["mean"] - cell(report, "grown late")["mean"])
    assert "the best of 2 grown models, grown late, is" in late  # the best of them, whichever it is
    for lacking in ((lambda arm, seed, share: (arm, seed) == ("small", 2)), (lambda arm, seed, share: share == 1.0)):
        folder = write_full_race(tmp_path / f"lacks{id(lacking)}", skip=lacking)
        assert read_report(folder)["conclusion"] == ""  # the race has not ended
    arms = {n: {**ARMS[n], "role": "arm"} for n in ("scratch", "small")}  # the control: nothing grows
    assert read_report(write_full_race(tmp_path / "none", arms=arms, reference="scratch"))["conclusion"] == ""


def test_every_arm_stands_against_the_reference_on_one_axis(race, report):
    page = (race / "report.html").read_text()
    order = [page.index(text) for text in ('<dl class="tiles">', "<h2>Against scratch at 12.0 TFLOP", ">Results at")]
    assert order == sorted(order)
    rows = page.split("<h2>Against scratch")[1].split("</ol>")[0].split("<li")[1:]
    assert len(rows) == len(ARMS)
    ends = {}
    for row in rows:
        name = re.search("<b>(.*?)</b>", row).group(1)
        ends[name] = float(re.search('class="dot [^"]*" style="left:([0-9.]+)%', row).group(1))
        if name != "scratch":
            p, text = pair(report, name, "scratch"), html.unescape(re.sub("<[^>]*>", "", row.split('"gap"')[1]))
            value = p["value"] if p["arm"] == name else -p["value"]
            assert f"{signed(value)} ±{(p['high'] - p['low']) / 2:.3f}" in text
            bar = re.search('class="bar [^"]*" style="left:([0-9.]+)%;width:([0-9.]+)%', row)
            assert float(bar.group(1)) < ends[name] < float(bar.group(1)) + float(bar.group(2))
    assert list(ends.values()) == sorted(ends.values()) and ends["grown"] < ends["scratch"] < ends["small"]
    zero = float(re.search('class="zero" style="left:([0-9.]+)%', rows[0]).group(1))
    assert zero == ends["scratch"] and "beyond" not in page.split("<h2>Against scratch")[1].split("<h2>")[0]


def test_an_arm_that_is_far_behind_does_not_press_the_others_into_one_line(tmp_path, report):
    folder = write_full_race(tmp_path / "race", loss=lambda arm, *at: plausible(arm, *at) + 2 * (arm == "grown late"))
    told, page = read_report(folder), (write_report(folder)["html"]).read_text()
    rows = page.split("<h2>Against scratch")[1].split("</ol>")[0].split("<li")[1:]
    assert ['class="beyond' in row for row in rows] == [False] * 6 + [True] and "An arrow: further off" in page
    assert "beyond left" not in rows[-1]
    ahead = write_full_race(tmp_path / "ahead", loss=lambda arm, *at: plausible(arm, *at) - 1.5 * (arm == "grown late"))
    best = page_of(read_report(ahead)).split("<h2>Against scratch")[1].split("</ol>")[0].split("<li")[1]
    assert "<b>grown late</b>" in best and 'class="beyond left' in best  # the arrow points to where it is
    top = top_charts(told)[0].shared_y[1]
    assert max(cell(told, "scratch", share)["mean"] for share in BUDGETS) < top < 4 and "runs out of the top" in page
    assert top_charts(report)[0].shared_y[1] == pytest.approx(top, abs=0.2)  # the control: there nothing is far behind


def test_a_page_is_drawn_anew_from_its_json_alone(race, tmp_path):
    alone = tmp_path / "alone"
    alone.mkdir()
    path = alone / "report.json"
    path.write_bytes((race / "report.json").read_bytes())
    write_report(path)
    for kind in ("html", "json", "png"):
        assert (alone / f"report.{kind}").read_bytes() == (race / f"report.{kind}").read_bytes()
    stored = json.loads(path.read_text())
    for run in next(arm for arm in stored["arms"] if arm["name"] == "grown")["runs"]:
        run["bits_per_byte"] += 0.5
    path.write_text(json.dumps(stored))
    write_report(path)
    assert "**grown late**" in json.loads(path.read_text())["answer"][0]  # numbers and words are worked out anew


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"kind": "run", "arms": []}, "not the report.json of a race by the rules"),
        ({"race": {"budgets": [1.0]}, "arms": [{"name": "a"}]}, "not a whole report.json, or one of another version"),
        ({"race": {"budgets": [1.0]}, "arms": [], "kind": "race"}, "not a whole report.json.*KeyError.'name'"),
    ],
)
def test_a_page_is_not_drawn_from_another_json(tmp_path, stored, message):
    write(tmp_path / "report.json", stored)
    with pytest.raises(ValueError, match=message) as error:
        write_report(tmp_path / "report.json")
    assert "\n" not in str(error.value) and [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_flops_to_a_loss_follow_from_the_arms_own_curves(report):
    # By hand, for one arm at the middle budget: a straight line over log FLOPs between its results.
    logs = []
    for seed in SEEDS:
        target = plausible("scratch", 0.004, seed, 0.5)
        curve = [(share, plausible("grown", 0.004, seed, share)) for share in BUDGETS]
        (c0, y0), (c1, y1) = (curve[:2]) if curve[1][1] <= target else curve[1:]
        logs.append(math.log(c0) + math.log(c1 / c0) * (y0 - target) / (y0 - y1) - math.log(0.5))
    found = report["reach"][1]["ratios"]["grown"]
    assert found["value"] == pytest.approx(math.exp(sum(logs) / 3)) and found["value"] < 1
    assert report["reach"][0]["ratios"]["grown"]["side"] == "less than"
    assert report["reach"][2]["ratios"]["small"]["side"] == "more than"


def test_sunk_costs_count_the_growth_and_what_came_after_it_alone(report):
    sunk = {(s["arm"], s["share"]): s for s in report["sunk"]}
    growing = 1e9  # the growth itself is paid for, what came before it is not
    assert sunk["grown", 1.0]["flops"] == pytest.approx(0.7 * FLOPS + growing, rel=1e-9)  # grew at 0.3
    assert sunk["grown", 0.5]["flops"] == pytest.approx(0.2 * FLOPS + growing, rel=1e-9)  # its trunk grew before
    assert ("grown", 0.25) not in sunk and ("scratch", 1.0) not in sunk  # not grown by then; never grown


def test_sunk_costs_are_over_the_flops_of_the_arms_own_scratch(report, many):
    sunk = {s["arm"]: s for s in many["sunk"] if s["share"] == 0.5}
    against = {name: found["against"] for name, found in sunk.items()}
    assert against == {**dict.fromkeys(sunk, "scratch"), "theta": "scratch-theta", "theta late": "scratch-theta"}
    assert [name for name, found in sunk.items() if not found["own_scratch"]] == ["next", "unmatched"]
    logs = []  # by hand, for one arm: its loss lies between the last two results of its scratch
    for seed, loss in zip(SEEDS, cell(many, "theta", 0.5)["values"], strict=True):
        high, low = (cell(many, "scratch-theta", share)["values"][seed] for share in (0.5, 1.0))
        assert high > loss > low
        logs.append(math.log((0.2 + 1e9 / FLOPS) / 0.5) - math.log(2) * (high - loss) / (high - low))
    assert sunk["theta"]["ratio"] == pytest.approx(math.exp(sum(logs) / 3))
    rows = cells_of(page := page_of(json.loads(json.dumps(many))), "Sunk-cost view")
    assert {row[0]: row[1] for row in rows} == against
    assert {len(row) for row in rows} == {2 + len({s["share"] for s in many["sunk"]})}
    assert f"{sunk['theta']['ratio']:.2f}" in next(row for row in rows if row[0] == "theta")[3]  # 1, 0.5, 0.25
    assert "over its scratch’s, else the reference’s, from its first step to the same loss" in page
    assert {s["against"] for s in report["sunk"]} == {"scratch"}
    assert "over its scratch’s from its first step to the same loss" in page_of(json.loads(json.dumps(report)))


def test_a_rise_after_growth_is_shown_with_what_made_it_good(tmp_path):
    arms = {**ARMS, "grown": {**ARMS["grown"], "rise": 0.25}}
    told = read_report(write_full_race(tmp_path / "race", arms=arms))
    events = {a["name"]: [v for r in a["runs"] for v in r["growth"]] for a in told["arms"]}
    assert [v["rise"] for v in events["grown"]] == pytest.approx([0.25] * 3)
    assert all(0 < v["recovery_flops"] <= 0.04 * FLOPS + 1 for v in events["grown"])
    assert [v["rise"] for v in events["grown late"]] == pytest.approx([0.0] * 3)
    rows = {row[0]: row[-2:] for row in cells_of(page_of(told), "Growths, and what they cost")}
    assert rows["grown"] == ["+0.250", f"by the next evaluation, ≤ {flops_text(0.02 * FLOPS)}"]
    assert rows["grown late"] == ["none", "none"]
    path = tmp_path / "race/arms/grown/seed-1/metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    after = next(i for i, line in enumerate(lines) if line["kind"] == "growth") + 1
    lines[after]["bits_per_byte"] += 0.3
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    told = read_report(tmp_path / "race")
    rows = {row[0]: row[-2:] for row in cells_of(page_of(told), "Growths, and what they cost")}
    assert rows["grown"][0] == "+0.350+0.250 to +0.550"


def test_the_compute_optimal_size_is_found_and_an_edge_is_said(report, tmp_path):
    assert [b["compute_optimal"][0]["arm"] for b in report["budgets"]] == ["size 560 k"] * 3
    assert all(b["compute_optimal"][0]["edge"] == "" for b in report["budgets"])
    arms = {name: arm for name, arm in ARMS.items() if name != "size 560 k"}
    folder = write_full_race(tmp_path / "race", arms=arms)
    told = read_report(folder)
    assert told["budgets"][-1]["compute_optimal"][0] | {"loss": 0} == {
        "architecture": "tokenformer",
        "arm": "scratch",
        "parameters": 720_000,
        "loss": 0,
        "sizes": 2,
        "edge": "largest",
        "of": ["scratch", "small"],
    }
    said = "is not bracketed: **scratch** is the largest of 2 sizes, and a larger one may be better still."
    assert [text.endswith(said) for text in told["changes"]].count(True) == 1
    assert "not bracketed: the largest of 2 sizes" in page_of(read_report(folder))


def test_an_arm_from_scratch_may_be_the_best_size_that_growing_is_held_against(tmp_path):
    """Or a recipe could leave its strongest rival out of rule 10 by writing it as an arm."""
    mine = {"role": "arm", "parameters": (560_000, 560_000)}
    config = {"vocab_size": 256, "theta": "gelu"}
    best = lambda arm, *at: plausible(arm, *at) - (0.5 if arm == "mine" else 0.0)  # noqa: E731
    for own, found in ((config, "mine"), ({**config, "theta": "softmax"}, "scratch")):  # of another kind: the control
        arms = {name: {**arm, "config": config} for name, arm in ARMS.items() if name != "size 560 k"}
        arms["mine"] = {**mine, "config": own}
        told = read_report(write_full_race(tmp_path / found, arms=arms, loss=best))
        assert [size["arm"] for size in told["budgets"][-1]["compute_optimal"]] == [found]
        aside = "; mine, another kind of model from scratch, is better than grown" in told["conclusion"]
        assert aside is (found != "mine") and "mine" in told["conclusion"]
        assert told["conclusion"].startswith("Growing did not pay here") is (found == "mine")


def test_an_arm_that_did_better_than_its_controls_is_named_where_its_best_size_is_bracketed(tmp_path):
    kind = {"theta": "softmax"}
    arms = {name: {**arm, "config": {}} for name, arm in ARMS.items() if name != "size 560 k"}
    sizes = {"theirs": ("scratch", 720_000), "their small": ("small", 412_000), "their size": ("size", 500_000)}
    for name, (role, size) in sizes.items():
        arms[name] = {"role": role, "of": "other", "parameters": (size, size), "config": kind}
    arms["other"] = {**GROWS, "config": kind, "controls": {"scratch": "theirs", "small": "their small"}}
    away = {"grown": 0.03, "grown late": 0.05, "dropped": 0.5}
    away |= {"other": 0.1, "theirs": 0.4, "their small": 0.5, "their size": 0.3}
    loss = lambda arm, *at: plausible(arm, *at) + away.get(arm, 0.0)  # noqa: E731
    told = read_report(write_full_race(tmp_path / "race", arms, loss, budgets=(1.0,), tune_fraction=0.5))
    said = conclusion(told, True)
    assert said.endswith("; other did better than its own controls.") and "grown" in said.split(";")[0]
    theirs = next(best for best in told["budgets"][-1]["compute_optimal"] if best["arm"] == "their size")
    theirs["edge"] = "smallest"  # the control: it may not be the best size
    assert "did better" not in conclusion(told, True)


def test_another_kind_of_model_is_none_that_differs_in_size_alone(tmp_path):
    arms = {**ARMS, "mine": {"role": "arm", "parameters": (500_000, 500_000)}}
    away = {"mine": -0.4, "size 560 k": -0.5}
    loss = lambda arm, *at: plausible(arm, *at) + away.get(arm, 0.0)  # noqa: E731
    for config, said in (({}, ""), ({"theta": "softmax"}, "mine"), ({"rank": 4}, "mine")):  # the controls: it is one
        arms["mine"] |= {"config": config, "model": {"rank": config.get("rank")}}
        told = read_report(write_full_race(tmp_path / f"race{len(str(config))}", arms, loss, budgets=(1.0,)))
        budget = told["budgets"][-1]
        assert pair_of(budget, "mine", "grown")["word"] == "better"
        assert of_another_kind(told, budget, best_arm(told, budget)) == said


def test_a_model_of_thin_factors_is_none_of_the_sizes(tmp_path):
    for model, sizes in (({}, 3), ({"rank": 4}, 2)):
        arms = {**ARMS, "size 560 k": {**ARMS["size 560 k"], "model": model}}
        told = read_report(write_full_race(tmp_path / f"race{sizes}", arms, budgets=(1.0,)))
        assert [best["sizes"] for best in told["budgets"][-1]["compute_optimal"]] == [sizes]


def test_what_was_trained_before_is_no_model_from_scratch(tmp_path):
    arms = {**ARMS, "mine": {"role": "arm", "parameters": (560_000, 560_000)}}
    best = lambda arm, *at: plausible(arm, *at) - (0.5 if arm == "mine" else 0.0)  # noqa: E731
    told = read_report(write_full_race(tmp_path / "race", arms=arms, loss=best))
    assert [size["arm"] for size in told["budgets"][-1]["compute_optimal"]] == ["mine"]  # the control
    next(arm for arm in told["arms"] if arm["name"] == "mine")["recipe"] = {"model": {"checkpoint": "somewhere"}}
    told = put_in_words(calculate(told))
    assert [size["arm"] for size in told["budgets"][-1]["compute_optimal"]] == ["size 560 k"]
    assert "mine" not in told["conclusion"]


def test_the_best_size_from_scratch_is_called_that_and_of_how_many(report, many, tmp_path):
    assert "**size 560 k** (the best of 3 sizes from scratch)" in report["answer"][1]
    for told, label in ((report, "the best of 3 sizes from scratch"), (many, "the best of 4 sizes from scratch")):
        page = page_of(json.loads(json.dumps(told)))
        assert label in page.split("Each growing arm against its own controls")[1].split("<tbody>")[0]
        assert [t["label"] for t in told["headline"]][1] == label.removeprefix("the ")
        assert "compute-optimal" not in page.replace("Compute-optimal size, found among", "")
        assert all(row[5].startswith("bracketed, of") for row in cells_of(page, "Compute-optimal size"))
    kinds = {"grown late": "llama", "small": "llama"}  # of one architecture three sizes, of the other one
    arms = {name: {**arm, "architecture": kinds.get(name, "tokenformer")} for name, arm in ARMS.items()}
    arms["grown late"] |= {"controls": {"small": "small"}}
    page = page_of(read_report(write_full_race(tmp_path / "two", arms, budgets=(1.0,))))
    head = page.split("Each growing arm against its own controls")[1].split("<tbody>")[0]
    assert "the best of the sizes from scratch" in head
    assert {row[1]: row[5] for row in cells_of(page, "Compute-optimal size")} == {
        "tokenformerscratch, size 560 k": "not bracketed: the smallest of 2 sizes",
        "llamasmall": "not bracketed: the only size",
    }


def test_sizes_are_compared_with_those_of_their_own_kind(tmp_path):
    kinds: dict[str, dict[str, Any]] = {"small": {"theta": "gelu"}, "size 560 k": {"theta": "gelu"}}

    def told(more: dict[str, Any]) -> list[list[str]]:
        arms = {
            name: {**arm, "config": {"ffn_tokens": 10, **kinds.get(name, {"theta": "softmax"}), **more}}
            for name, arm in ARMS.items()
        }
        report = read_report(write_full_race(tmp_path / str(len(more)), arms, budgets=(1.0,)))
        rows = {row["arm"]: row["controls"]["optimal"]["name"] for row in report["own_controls"]}
        assert rows["grown"] == "size 560 k"  # of its small model's kind
        return [best["of"] for best in report["budgets"][-1]["compute_optimal"]]

    assert told({}) == [["scratch"], ["small", "size 560 k"]]
    assert told({"theta": "gelu", "initializer_range": 0.05}) == [["scratch", "small", "size 560 k"]]  # the control


def test_a_difference_has_an_interval_over_stretches_of_the_final_text_too(tmp_path):
    folder = write_full_race(tmp_path / "race", final=lambda *at: plausible(*at) - 0.05)
    before = read_report(folder)
    assert not any("text_low" in p for p in before["budgets"][-1]["pairs"]) and "text −" not in page_of(before)
    for path in folder.rglob("final.json"):
        told = json.loads(path.read_text())
        tilt = 0.5 if "/grown/" in str(path) else 0.0  # better in some stretches, worse in others
        told["stretches"] = [told["bits_per_byte"] + 0.1 * k + tilt * (k % 2 - 0.5) for k in range(20)]
        path.write_text(json.dumps(told))
    report = read_report(folder)
    found = pair(report, "grown", "small")
    values = [found["value"] + 0.5 * (k % 2 - 0.5) * (1 if found["arm"] == "grown" else -1) for k in range(20)]
    half = stats.t.ppf(0.975, 19) * statistics.stdev(values) / math.sqrt(20)
    interval = found["value"] - half, found["value"] + half
    assert (found["text_low"], found["text_high"]) == pytest.approx(interval, abs=1e-9)
    assert found["word"] in ("better", "worse") and found["text_low"] < 0 < found["text_high"]
    turned = pair_of(report["budgets"][-1], found["other"], found["arm"])
    assert (turned["text_low"], turned["text_high"]) == (-found["text_high"], -found["text_low"])
    [said] = [text for text in report["changes"] if text.startswith("Another text: ")]
    assert "**grown** is not told apart from" in said and "**small** (" in said
    assert "of their mean over seeds in stretches of the text" in page_of(report)
    path = next(folder.glob("arms/scratch/seed-1/final.json"))
    path.write_text(json.dumps({**json.loads(path.read_text()), "stretches": None}))  # judged by an older version
    mixed = read_report(folder)
    assert "text_low" not in pair(mixed, "scratch", "small") and "text_low" in pair(mixed, "grown", "small")
    even = pair(report, "scratch", "small")  # the control: alike in every stretch
    assert even["text_low"] == pytest.approx(even["value"]) == pytest.approx(even["text_high"])


def test_a_power_law_is_of_one_model_be_there_results_from_before_a_growth(tmp_path):
    folder = write_full_race(tmp_path / "race", budgets=(0.25, 0.4, 0.6, 1.0))  # grown at 0.3
    laws = read_report(folder)["power_laws"]
    assert laws["grown"]["reason"].endswith("after an arm's last growth")
    assert laws["scratch"]["reason"] is None and laws["scratch"]["points"] == 4  # the control
    later = read_report(write_full_race(tmp_path / "later", budgets=(0.25, 0.35, 0.4, 0.6, 1.0)))["power_laws"]
    assert (later["grown"]["points"], later["scratch"]["points"]) == (4, 5)


def test_a_power_law_is_fitted_where_there_are_four_budgets(report, tmp_path):
    assert "at least 4" in report["power_laws"]["grown"]["reason"]
    folder = write_full_race(
        tmp_path / "race", budgets=(0.125, 0.25, 0.5, 1.0), loss=lambda *at: plausible(*at, s=0.0002)
    )
    told = read_report(folder)
    assert [threshold["share"] for threshold in told["reach"]] == [0.125, 0.5, 1.0]  # three of them (rule 22)
    law = told["power_laws"]["small"]
    assert law["reason"] is None and law["alpha"] == pytest.approx(0.3, abs=0.1)
    assert law["E"] == pytest.approx(2.055, abs=0.15)


# --- the controls of each arm ---

MANY = {
    **ARMS,
    "wide": {**GROWS, "parameters": (300_000, 720_000), "controls": {"scratch": "scratch", "small": "small-wide"}},
    "small-wide": {"role": "small", "of": "wide", "parameters": (300_000, 300_000)},
    "theta": {**GROWS, "model": {"theta": "gelu"}, "controls": {"scratch": "scratch-theta"}},
    "scratch-theta": {"role": "scratch", "of": "theta", "parameters": (720_000, 720_000), "model": {"theta": "gelu"}},
    "theta late": {**GROWS, "model": {"theta": "gelu"}, "controls": {"scratch": "scratch-theta"}},
    "next": {**GROWS, "parameters": (720_000, 900_000), "controls": {"small": "scratch"}},
    "unmatched": {**GROWS, "model": {"theta": "silu"}, "controls": {}},
}


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    away = {"grown late": -0.06, "wide": 0.01, "small-wide": 0.06, "scratch-theta": 0.04}
    return read_report(
        write_full_race(
            tmp_path_factory.mktemp("many") / "race", MANY, lambda arm, *at: plausible(arm, *at) + away.get(arm, 0.0)
        )
    )


def test_each_arm_stands_beside_the_controls_that_the_race_gave_it(many):
    found = {
        row["arm"]: {role: control["name"] for role, control in row["controls"].items() if role != "optimal"}
        for row in many["own_controls"]
    }
    assert found == {
        "grown": {"scratch": "scratch", "small": "small", "dropped": "dropped"},
        "grown late": {"scratch": "scratch", "small": "small"},
        "wide": {"scratch": "scratch", "small": "small-wide"},
        "theta": {"scratch": "scratch-theta"},
        "theta late": {"scratch": "scratch-theta"},
        "next": {"small": "scratch"},
        "unmatched": {},
    }
    assert list(found)[0] == "grown late" and "**grown late**" in many["answer"][1]  # best first, and it owns nothing
    for name in ("dropped", "small-wide", "scratch-theta"):
        assert f"**{name}**" not in many["answer"][1]
    assert many["answer"][0].endswith(
        "of 5 growing arms (2 more have no scratch) all are **better** than their own scratch; of 4 growing arms (3 "
        "more have no small size) all are **better** than their small size trained longer."
    )


def test_seeds_that_differ_between_growing_arms_are_said(tmp_path):
    folder = write_full_race(tmp_path / "race", MANY, skip=lambda arm, seed, budget: arm == "wide" and seed > 0)
    assert "included, over 1 to 3 seeds: of 5 growing arms" in read_report(folder)["answer"][0]
    alone = {**ARMS, "other": GROWS}
    alone = {name: arm for name, arm in alone.items() if arm["role"] not in ("scratch", "small", "dropped", "size")}
    told = read_report(write_full_race(tmp_path / "alone", alone, reference="grown"))
    assert "the best of 3 growing arms, **" in told["answer"][0]


def test_growth_that_arms_share_and_growth_that_one_alone_has_are_told_apart(many):
    told = json.loads(json.dumps(many))
    for arm in told["arms"]:
        arm["recipe"].pop("growth", None)
    growing = [arm for arm in told["arms"] if arm["grows"]]
    for arm in growing:
        arm["recipe"]["growth"] = [{"operator": "zero", "moments": "keep", "at_slope": None, "to": {arm["name"]: 9}}]
    growing[0]["recipe"]["growth"] += [{"moments": "drop", "to": {"layers": 9}}]
    told["arms"].sort(key=lambda arm: not arm["grows"])  # a growing arm is the first
    recipes = [arm["recipe"] for arm in told["arms"]]
    keys = {key for recipe in recipes for key in flatten(recipe) if key.startswith("growth.")}
    told["differing_keys"] = sorted(keys)
    section = html.unescape(page_of(told)).split("Every hyperparameter</h2>")[1]
    differs, _, rest = section.partition("What all arms that grow share: 2 keys")
    common, _, shared = rest.partition("What all arms share")
    assert "growth.1.moments" in differs and f"growth.0.to.{growing[0]['name']}" in differs
    assert "growth.0.moments" in common and "growth.0.operator" in common and "growth." not in differs.split("table")[0]
    assert "at_slope" not in section and "growth." not in shared.partition("<h2>")[0]


def test_a_mixture_that_grew_from_a_dense_model_has_its_scratch(tmp_path):
    mixture = {name: {**ARMS[name], "architecture": "mixtral"} for name in ("scratch", "copy of scratch")}
    arms = {**ARMS, **mixture, "other": {**GROWS, "model": {"theta": "gelu"}, "controls": {}}}
    folder = write_full_race(
        tmp_path / "race", arms, lambda arm, *at: plausible(arm, *at) + 0.05 * (arm == "other"), budgets=(1.0,)
    )
    told = read_report(folder)
    own = {row["arm"]: row["controls"] for row in told["own_controls"]}
    assert own["grown"]["scratch"]["name"] == own["grown late"]["scratch"]["name"] == "scratch"
    assert "scratch" not in own["other"] and "**scratch** (the target size from scratch)" in told["answer"][1]
    assert own["grown"]["optimal"]["name"] == "size 560 k"  # of both architectures


def test_own_controls_are_compared_by_the_pairs_and_flops_by_their_own_scratch(many):
    for row in many["own_controls"]:
        for control in row["controls"].values():
            found = pair(many, row["arm"], control["name"], row["share"])
            sign = 1 if found["arm"] == row["arm"] else -1
            assert control["pair"]["value"] == pytest.approx(sign * found["value"])
    assert sorted({row["share"] for row in many["own_controls"]}) == list(BUDGETS)
    ratios = {row["arm"]: row["flops_to_scratch"] for row in many["own_controls"] if row["share"] == 1.0}
    assert ratios["grown"] == many["reach"][-1]["ratios"]["grown"] and ratios["next"] is None
    curves = [cell(many, "scratch-theta")["values"], *(cell(many, "theta", share)["values"] for share in BUDGETS)]
    logs = []
    for target, *curve in zip(*curves, strict=True):
        logs.append(math.log(0.5) + math.log(2) * (curve[1] - target) / (curve[1] - curve[2]))
    assert ratios["theta"]["value"] == pytest.approx(math.exp(sum(logs) / 3)) and ratios["theta"]["side"] == ""
    assert many["reach"][-1]["ratios"]["theta"]["value"] != pytest.approx(ratios["theta"]["value"])  # the reference's
    rows = {row[0]: row for row in cells_of(page_of(json.loads(json.dumps(many))), "Each growing arm against its own")}
    late = next(row for name, row in rows.items() if name.startswith("grown late"))
    assert "from scratch" in late[1] and "from small" in late[2] and late[3] == "–" and "faster" in late[5]
    half, quarter = page_of(json.loads(json.dumps(many))).split("<summary>The same at ")[1:3]
    for share, part in ((0.5, half), (0.25, quarter)):
        table = part.partition("</table>")[0]
        assert signed(pair(many, "grown", "small", share)["value"]) in table and "from small-wide" in table


def test_gains_over_different_scratch_are_compared_seed_by_seed(many):
    gains = {(g["arm"], g["other"], g["share"]): g for g in many["gains"]}
    pairs = {frozenset((a, b)) for a in ("grown", "grown late", "wide") for b in ("theta", "theta late")}
    assert {frozenset(key[:2]) for key in gains} == pairs and len(gains) == 6 * len(BUDGETS)
    for budget in many["budgets"]:
        names = ("grown late", "scratch", "theta", "scratch-theta")
        four = (cell(many, name, budget["share"])["values"] for name in names)
        apart = [a - b - (c - d) for a, b, c, d in zip(*four, strict=True)]
        found = gains["grown late", "theta", budget["share"]]
        interval = stats.ttest_1samp(apart, 0).confidence_interval(0.95)
        assert (found["value"], found["own_low"], found["own_high"]) == pytest.approx((sum(apart) / 3, *interval))
        # Of a difference of two arms t s sqrt(2 / 3); of four runs t s sqrt(4 / 3).
        half = stats.t.ppf(0.975, budget["df"]) * budget["s"] * math.sqrt(4 / 3)
        assert (found["low"], found["high"]) == pytest.approx((found["value"] - half, found["value"] + half))
    assert gains["grown late", "theta", 1.0]["word"] == "better"
    apart = sum(gain["word"] != "not told apart" for gain in many["gains"] if gain["share"] == 1.0)
    said = many["answer"][1]
    assert said.count("stands better against its own scratch than") == 3 and 0 < apart < 6
    assert "**grown late** stands better against its own scratch than **theta late** and **theta** do;" in said
    assert said.endswith(f" than **wide** does ({apart} of 6 differences).")
    level = {**many, "gains": [{**gain, "word": "not told apart"} for gain in many["gains"]]}
    assert put_in_words({**level, "gains": []})["answer"] == many["answer"]  # they follow from the numbers
    assert further(level, level["budgets"][-1], level["arms"][0])[-1] == (
        "of 6 differences between what they gained over their own scratch none can be told from zero"
    )
    assert not [key for key in gains if set(key[:2]) == {"theta", "theta late"}]  # the control: they share scratch
    rows = cells_of(page_of(json.loads(json.dumps(many))), "Gain of growing over")
    assert len(rows) == 6 and rows[0][0].startswith("grown lateless scratch") and "better" in rows[0][2]
    assert all(len(row) == 2 + len(BUDGETS) for row in rows)


# --- how it reads ---


def test_the_columns_of_the_matrix_begin_with_the_reference_and_the_controls(race):
    page = (race / "report.html").read_text().split("<h2>Verdicts</h2>", 1)[1]
    head = re.findall("<b>(.*?)</b>", page.split("<thead>", 1)[1].split("</thead>", 1)[0])
    assert head[0] == "scratch" and set(head[-2:]) == {"grown", "grown late"} and len(head) == len(ARMS)
    rows = [row[0] for row in cells_of(page, "At 12.0 TFLOP")]
    assert rows[0].startswith("grown") and not rows[0].startswith("grown late")  # rows stay best first


def test_the_matrix_of_the_answer_lies_open(tmp_path):
    folder = write_full_race(tmp_path / "race", skip=lambda arm, seed, share: share == 1.0 and arm != "grown")
    section = page_of(read_report(folder)).split("<h2>Verdicts</h2>", 1)[1].split("<h2>", 1)[0]
    shown, *folded = section.split("<details>")
    assert "At 6.00 TFLOP" in shown and "Fewer than two arms" not in shown
    assert [re.findall("Verdicts at ([0-9.]+)", each) for each in folded] == [["12.0"], ["3.00"]]


def test_the_picture_says_first_whether_growing_paid(report):
    charts = top_charts(report)
    told, _ = png_texts(report, charts)
    assert told.startswith(report["conclusion"]) and len(told) <= 680 + 4
    long = {**report, "answer": ["x" * 600, "y" * 400]}
    assert png_texts(long, charts)[0] == report["conclusion"]
    assert png_texts({**long, "conclusion": ""}, charts)[0] == "x" * 600  # the control: nothing before it
    assert png_texts({**report, "conclusion": "", "answer": ["One.", "Two."]}, charts)[0] == "One. Two."


def test_what_decays_before_the_growth_is_tagged_in_matrix_and_flops(race):
    page = (race / "report.html").read_text()
    early = page.split("Verdicts at 3.00 TFLOP", 1)[1].split("</details>", 1)[0]
    assert early.count("before growth") == 6  # three arms that grow, as row and as column
    middle = page.split("Verdicts at 6.00 TFLOP", 1)[1].split("</details>", 1)[0]
    assert "before growth" not in middle
    rows = {row[0]: row for row in cells_of(page, "FLOPs to reach a loss")}
    assert "before growth" in rows["grown"][1] and "before growth" not in rows["grown"][2] + rows["small"][1]
    assert "by its loss at that budget" in rows["grown"][1] and "by its loss" not in rows["grown"][2]


def test_ratios_get_digits_where_a_bound_would_read_as_one():
    ratio = {"value": 0.92, "low": 0.84, "high": 0.9964, "side": ""}
    assert ratio_text(ratio) == "0.92 [0.84 to 0.996]"
    assert ratio_text(ratio | {"high": 0.99961}) == "0.92 [0.84 to 0.9996]"
    assert ratio_text(ratio | {"high": 0.99}) == "0.92 [0.84 to 0.99]"
    assert ratio_text(ratio | {"low": None, "high": None, "side": "more than"}) == "more than 0.92"
    assert [signed(x) for x in (0.0123, -0.0003, 0.0)] == ["+0.012", "−0.0003", "+0.000"]
    assert [signed(x) for x in (2e-9, -2e-9)] == ["<+0.0001", ">−0.0001"]


def test_arms_of_one_colour_have_swatches_like_their_lines():
    report = {"kind": "race", "arms": [{"name": str(i)} for i in range(21)]}
    looks = [re.search('class="swatch (.*?)"', name_of(report, arm)).group(1) for arm in report["arms"]]
    assert len(set(looks)) == 21 and [looks[i] for i in (0, 7, 14)] == ["f0", "f0 dashed", "f0 dotted"]


def test_of_many_arms_those_of_the_answer_are_in_colour_and_the_others_in_grey(many, report):
    drawn = {s.name: s for s in top_charts(many)[0].series}
    loud = {name for name, s in drawn.items() if s.colour < QUIET}
    best = next(row for row in many["own_controls"] if row["share"] == 1.0)  # the first of the page's answer
    spoken_of = {"scratch", best["arm"], *(control["name"] for control in best["controls"].values())}
    assert len(spoken_of) > 3 and spoken_of <= loud == set(many["foremost"])
    assert "theta late" in loud and "unmatched" not in loud  # better than its scratch; without one
    assert len(loud) <= 6 < len(drawn) - 2
    assert all(bool(s.low) == (name in loud) for name, s in drawn.items())
    layers = [s.name in loud for s in top_charts(many)[0].series]
    assert layers == sorted(layers)  # what is in colour lies above
    chips = page_of(json.loads(json.dumps(many))).split('class="legend many"')[1]
    chips = re.findall(r'<li data-arm="(\d+)" tabindex="0" role="button"><i class="swatch (\w+)', chips)
    assert [look for _, look in chips] == [f"f{i}" for i in range(len(loud))] + ["f7"] * (len(drawn) - len(loud))
    assert len({number for number, _ in chips}) == len(drawn)
    plain = page_of(json.loads(json.dumps(report))).split("<body>")[1]  # the control: colours for all
    assert report["foremost"] == [] and "legend many" not in plain and ' f7"' not in plain and ' s7"' not in plain


def test_an_architecture_that_scatters_more_than_the_others_is_said(report, tmp_path):
    arms = {name: {**arm, "architecture": "gpt2" if "late" in name else "llama"} for name, arm in ARMS.items()}
    arms |= {f"late {i}": {**arms["grown late"], "role": "arm"} for i in range(2)}

    def loss(s):
        return lambda arm, *at: plausible(arm, *at, s=s if "late" in arm else 0.004)

    told = read_report(write_full_race(tmp_path / "unequal", arms, loss(0.2)))
    [said] = [text for text in told["changes"] if text.startswith("Unequal noise")]
    assert said.startswith("Unequal noise: from seed to seed arms of **gpt2** scatter with s = 0.")
    equal = read_report(write_full_race(tmp_path / "equal", arms, loss(0.004)))
    assert not [text for text in equal["changes"] + report["changes"] if text.startswith("Unequal noise")]


def test_a_kind_of_one_architecture_that_scatters_more_about_its_starts_is_said(tmp_path):
    arms = ARMS | {f"late {i}": {**ARMS["grown late"], "role": "arm"} for i in range(3)}
    kinds = {name: "late" if "late" in name else "early" for name in arms}

    def said(folder, s, kinds):
        def loss(arm, *at):
            return plausible(arm, *at, s=s if "late" in arm else 0.004)

        told = read_report(write_full_race(tmp_path / folder, arms, loss))
        for arm in told["arms"]:
            same = {"norm": kinds[arm["name"]]}
            arm |= {"architecture": "tokenformer", "config": same, "recipe": {**arm["recipe"], "model": same}}
        return unequal_noise(told, told["budgets"][-1])

    [text] = said("unequal", 0.2, kinds)
    assert text.startswith("Unequal noise: from seed to seed models like **grown late** scatter about what they start")
    assert said("equal", 0.004, kinds) == said("one kind", 0.2, dict.fromkeys(arms, "any")) == []  # the controls


def test_an_interval_of_a_ratio_that_is_not_pooled_says_so():
    ratio = {"word": "faster", "value": 0.9, "low": 0.8, "high": 0.95, "own_low": 0.8, "own_high": 0.95, "side": ""}
    assert "<small>own seeds alone</small>" in ratio_cell(ratio)
    assert "<small>own 0.80 to 0.95</small>" in ratio_cell(ratio | {"low": 0.85})  # the control


def test_arms_of_one_start_are_said_to_differ_by_less_only_where_they_do(report):
    def said(s_same):
        budgets = [{**b, "s": 0.02, "s_same": 0.01} for b in report["budgets"][:-1]]
        last = {**report["budgets"][-1], "s": 0.02, "s_same": s_same}
        text = page_of({**report, "budgets": [*budgets, last]}).split("<h2>Noise</h2>")[1].split("</p>")[0]
        return text.split("and differ by less.")[1]

    assert said(0.03).startswith(" Not so at ") and said(0.03).count("TFLOP") == 1 and "the whole budget" in said(0.03)
    assert said(0.01) == said(None) == ""  # the control


def test_what_arms_set_apart_of_their_training_is_said(report, tmp_path):
    folder = write_full_race(tmp_path / "race")
    for path in (folder / "arms/small").rglob("recipe.json"):
        recipe = json.loads(path.read_text())
        write(path, recipe | {"train": recipe["train"] | {"weight_decay": 0.0}})
    [said] = [text for text in ambers(read_report(folder)) if "weight_decay" in text]
    assert said.startswith("The arms do not share train.weight_decay: 0.1, but 0.0 for **small**.")
    assert not any("do not share" in text for text in ambers(report))


def test_the_models_defaults_are_among_the_hyperparameters(tmp_path):
    folder = write_full_race(tmp_path / "race")
    stored = json.loads((folder / "race.json").read_text())
    for entry in stored["arms"]:
        entry["config"] = {"rope_theta": 10_000.0, "norm_eps": 1e-5 if entry["name"] == "small" else 1e-6}
    write(folder / "race.json", stored)
    page = page_of(read_report(folder)).split("<h2>Every hyperparameter", 1)[1]
    differs, shared = page.split("What all arms share", 1)
    assert "<code>config.norm_eps</code>" in differs and "config.norm_eps" not in shared
    assert "config.rope_theta" in shared and "config.rope_theta" not in differs


SIZES = {"qkv_tokens": 71, "proj_tokens": 72, "qkv_scale": 7.3, "proj_scale": 7.4, "ffn_tokens": 75}


def configured(folder, configs):
    """The page of a race whose arms have these configurations, the others none."""
    stored = json.loads((write_full_race(folder, budgets=(1.0,)) / "race.json").read_text())
    for entry in stored["arms"]:
        entry["config"] = configs.get(entry["name"], configs.get("", {}))
    write(folder / "race.json", stored)
    return page_of(read_report(folder)).split("<h2>Every hyperparameter", 1)[1]


def test_sizes_of_attention_tokens_are_hidden_where_attention_is_linear(tmp_path):
    linear, tokens = ({**SIZES, "attention_projections": kind} for kind in ("linear", "pattention"))
    every = configured(tmp_path / "linear", {"": linear})
    assert "config.ffn_tokens" in every and not any(f"config.{key}" in every for key in list(SIZES)[:4])
    control = configured(tmp_path / "tokens", {"": tokens})
    assert all(f"config.{key}" in control for key in SIZES)
    mixed = configured(tmp_path / "mixed", {"": tokens, "small": linear})
    rows = {row[0]: row[1:] for row in cells_of(mixed, "What differs")}
    assert rows["config.qkv_tokens"] == ["71", "71", "71", "–", "71", "71", "71"]  # small has none
    assert "config.ffn_tokens" in mixed.split("What all arms share", 1)[1]


def test_an_arm_that_is_a_tokenformer_says_where_its_parameter_tokens_are(tmp_path):
    arms = {
        **ARMS,
        "modern": {**GROWS, "model": {"preset": "modern"}},
        "modern with tokens": {**GROWS, "model": {"preset": "modern", "attention_projections": "pattention"}},
        "llama": {**GROWS, "architecture": "llama"},
        "resumed": {**GROWS, "model": {"checkpoint": "runs/first"}},
    }
    folder = write_full_race(tmp_path / "race", arms, budgets=(1.0,))
    stored = json.loads((folder / "race.json").read_text())
    for entry in stored["arms"]:
        entry["config"] = {"attention_projections": "linear"} if entry["name"] == "dropped" else {}
    write(folder / "race.json", stored)
    rows = cells_of(page_of(read_report(folder)), "Arms")
    found = {name: row[2] for name, row in zip(arms, rows, strict=True)}
    both, only = (f"tokenformerparameter tokens in {where}" for where in (
        "feed-forward and attention", "the feed-forward only"))
    assert found == {
        **dict.fromkeys(ARMS, both), "dropped": only, "modern": only, "modern with tokens": both, "llama": "llama",
        "resumed": "tokenformer",
    }


def test_arms_that_are_drawn_otherwise_do_not_count_as_one_start(tmp_path):
    arms = {**ARMS, "wider": {**ARMS["grown late"], "model": {"initializer_range": 0.05}}}
    told = read_report(write_full_race(tmp_path / "race", arms))
    assert pair(told, "grown", "small")["same_start"] and not pair(told, "wider", "small")["same_start"]


# --- self-tests: a copy, a handicap, and what spoils an answer ---


def test_a_copy_is_not_told_apart_and_a_handicap_is_found(report):
    for share in BUDGETS:
        assert pair(report, "scratch", "copy of scratch", share)["word"] == "not told apart"
    p = pair(report, "scratch", "small")
    assert {"scratch": "better", "small": "worse"}[p["arm"]] == p["word"]
    copy = [c for c in report["copies"] if c["share"] == 1.0][0]
    apart = [plausible("copy of scratch", 0.004, s, 1.0) - plausible("scratch", 0.004, s, 1.0) for s in SEEDS]
    assert copy["differences"] == pytest.approx(apart)
    assert copy["s"] == pytest.approx(math.sqrt(sum(d * d for d in apart) / 6))


def test_copies_of_copies_are_told_apart_about_as_often_as_chance_has_it(tmp_path):
    told = pairs = 0
    for i in range(12):
        arms = {f"a{i}": ARMS["grown"], **{f"b{i}{j}": ARMS["grown late"] for j in range(5)}}
        folder = write_full_race(
            tmp_path / str(i), arms=arms, reference=f"a{i}", budgets=(1.0,), rates=(0.004,), loss=plausible
        )
        last = read_report(folder)["budgets"][-1]
        told, pairs = told + last["told_apart"], pairs + len(last["pairs"])
    assert 0.01 < told / pairs < 0.10 and pairs == 180


@pytest.mark.parametrize(
    ("changes", "flag", "control"),
    [
        ({"changed": lambda a, s, b: {"epochs": 2.0} if a == "small" else {}}, "saw its training text 2.00 times", {}),
        (
            {"changed": lambda a, s, b: {"reads_again": True} if a == "small" else {}},
            "**small** may have read text that its ancestor had read",
            {"changed": lambda a, s, b: {"reads_again": False}},
        ),
        ({"checks": {"overlap": 0.06}}, "6% of the held-out text also occurs", {"checks": {"overlap": 0.05}}),
        (
            {"checks": {"final_overlap": 0.5}},
            "50% of the final text also occurs in the training text",
            {"checks": {"final_overlap": 0.01}},
        ),
        (
            {"checks": {"final_held_out_overlap": 0.06}},
            "6% of the final text also occurs in the held-out text",
            {"checks": {"final_held_out_overlap": 0.05}},
        ),
        (
            {"loss": lambda *at: plausible(*at) - 2.0},
            "less than a quarter of LZMA's 2.40",
            {"loss": lambda *at: plausible(*at) - 1.7},
        ),
        ({"loss": lambda *at: plausible(*at) - 1.99}, "is below 0.5, which is implausible", {}),
        (
            {"final": lambda *at: plausible(*at) - 1.99, "checks": {"lzma_bits_per_byte": 1.6}},
            "is below 0.5, which is implausible",
            {"final": lambda *at: plausible(*at) - 1.7, "checks": {"lzma_bits_per_byte": 1.6}},
        ),
        ({"seeds": (0, 1)}, "Fewer than 3 seeds: 2", {"seeds": (0, 1, 2)}),
        (
            {"changed": lambda a, s, b: {"flops": 1.05 * b * FLOPS} if a == "small" else {}},
            "did not spend equal FLOPs: 12.0 TFLOP to 12.6 TFLOP",
            {"changed": lambda a, s, b: {"flops": 1.005 * b * FLOPS} if a == "small" else {}},
        ),
        (
            {"loss": lambda a, r, s, b: None if (a, s, b) == ("small", 1, 1.0) else plausible(a, r, s, b)},
            "**small** failed (seed 1 at the whole budget: the loss is nan)",
            {},
        ),
        (
            {"arms": {**ARMS, "small": {**ARMS["small"], "rate": 0.002}}},
            "ran at a learning rate of 0.002, and the best of its trials is 0.004",
            {},
        ),
        (
            {"arms": {**ARMS, "dropped": {**ARMS["dropped"], "rate": 0.002}}},
            "ran at a learning rate of 0.002, and the rate of **grown** is 0.004",
            {},
        ),
    ],
)
def test_what_spoils_the_answer_is_red(tmp_path, changes, flag, control):
    folder = write_full_race(tmp_path / "bad", **changes)
    bad = read_report(folder)
    assert any(flag in text for text in reds(bad)), reds(bad)
    assert bad["answer"][0].startswith("**Read the red notes first.**") and bad["conclusion"] == ""
    page = html.unescape(page_of(bad))
    assert (
        'class="note bad"' in page
        and flag.replace("**small**", "<b>small</b>").replace("**grown**", "<b>grown</b>") in page
    )
    fine = read_report(write_full_race(tmp_path / "fine", **control))
    assert reds(fine) == [] and not fine["answer"][0].startswith("**Read")


@pytest.mark.parametrize("run", ["tune/lr-0.004", "seed-0_cosine"])
def test_trials_and_cosine_runs_are_held_to_the_same_rules(tmp_path, run):
    folder = write_full_race(tmp_path / "race", budgets=(1.0,), cosine=("scratch",))
    assert reds(read_report(folder)) == []
    path = folder / f"arms/scratch/{run}/result.json"
    stored = json.loads(path.read_text())
    for change, flag in (({"epochs": 3.0}, "text 3.00 times"), ({"bits_per_byte": 0.4}, "0.400 bits per byte is")):
        write(path, stored | change)
        assert any(text.startswith("**scratch**") and flag in text for text in reds(read_report(folder)))


@pytest.mark.parametrize("run", ["tune/lr-0.004", "seed-0_cosine", "seed-0"])
def test_a_run_of_another_commit_is_said_and_a_page_drawn_anew_keeps_it(tmp_path, run):
    folder = write_full_race(tmp_path / "race", budgets=(1.0,), cosine=("scratch",))
    assert not any("same environment" in text for text in ambers(read_report(folder)))
    path = folder / f"arms/scratch/{run}/environment.json"
    write(path, json.loads(path.read_text()) | {"commit": "89ab" * 10})
    paths = write_report(folder)
    [said] = [text for text in ambers(read_report(folder)) if "same environment" in text]
    assert said.endswith("what differs: commit (0123456789ab in 36, 89ab89ab89ab in 1).")
    first = paths["html"].read_bytes()
    assert said.encode() in first and "environment" not in json.loads(paths["json"].read_text())["arms"][0]["trials"][0]
    assert write_report(paths["json"])["html"].read_bytes() == first


def test_rates_tuned_on_short_runs_are_said(tmp_path):
    folder = write_full_race(tmp_path / "race", budgets=(1.0,))
    path, said = folder / "race.json", {}
    stored = json.loads(path.read_text())
    for share in (0.2, 0.5):
        write(path, {**stored, "race": {**stored["race"], "tune_fraction": share}})
        said[share] = [text for text in ambers(read_report(folder)) if "Learning rates were tuned on" in text]
    assert said[0.5] == [] and "on runs of 20 % of the length" in said[0.2][0]


def test_growing_without_controls_and_maps_learned_on_text_seen_before_are_said(tmp_path):
    arms = {"grown": {**ARMS["grown"], "operator": "ligo"}, "other": {"role": "arm", "parameters": (720_000,) * 2}}
    folder = write_full_race(tmp_path / "race", arms=arms, reference="other", budgets=(1.0,))
    path = folder / "race.json"
    stored = json.loads(path.read_text())
    said = {}
    for controls in (True, False):
        write(path, {**stored, "race": {**stored["race"], "controls": controls}})
        said[controls] = ambers(read_report(folder))
    assert any("race.controls = false: **grown** grew without" in text for text in said[False])
    assert not any("race.controls" in text for text in said[True])
    assert any(text.startswith("**grown** learned growth maps on batches already") for text in said[True])
    plain = write_full_race(tmp_path / "plain", budgets=(1.0,))
    assert not any("ligo" in text for text in ambers(read_report(plain)))


def test_runs_that_cannot_come_any_more_are_failed_and_so_is_tuning_that_only_diverged(tmp_path):
    def loss(arm, rate, seed, share):
        return None if arm == "small" and (share < 0.25 or seed == 2) else plausible(arm, rate, seed, share)

    def skip(arm, seed, share):  # what would branch off a run that failed
        return arm == "small" and seed == 2 and share < 1

    told = read_report(write_full_race(tmp_path / "race", loss=loss, skip=skip))
    small = next(arm for arm in told["arms"] if arm["name"] == "small")
    assert [run["status"] for run in small["runs"]].count("failed") == 3
    assert not any("not finished" in text for text in ambers(told))
    assert any("Every trial of **small** failed" in text for text in reds(told))
    result = tmp_path / "race/arms/small/seed-2/result.json"
    write(result, json.loads(result.read_text()) | {"diverged": False, "error": "No space left on device"})
    full = read_report(tmp_path / "race")  # a disk: it will be resumed, and what branches off it will come
    assert any("not finished" in text for text in ambers(full))
    assert not any("**small** failed" in text and "seed 2 at the whole" in text for text in reds(full))
    waiting = read_report(write_full_race(tmp_path / "waiting", skip=skip))  # the control: its trunk has not failed
    assert any("The race is not finished" in text for text in ambers(waiting)) and reds(waiting) == []


def test_two_final_texts_are_red_and_two_budgets_are_said(tmp_path):
    folder = write_full_race(tmp_path / "race", final=plausible)
    assert reds(read_report(folder)) == [] and not any("budgets" in text for text in ambers(read_report(folder)))
    path = folder / "arms/small/seed-1/final.json"
    write(path, json.loads(path.read_text()) | {"text_sha256": "cd" * 32})
    assert any("the same final text" in text for text in reds(read_report(folder)))
    two = write_full_race(tmp_path / "two", budgets=(0.5, 1.0))
    assert any("Fewer than 3 budgets: 2" in text for text in ambers(read_report(two)))


def test_streams_that_differ_are_red(tmp_path):
    folder = write_full_race(tmp_path / "race")
    path = folder / "arms/small/seed-1/data.json"
    write(path, json.loads(path.read_text()) | {"sha256": "cd" * 32})
    assert any("same token stream" in text for text in reds(read_report(folder)))
    folder = write_full_race(tmp_path / "held_out")
    path = folder / "arms/small/seed-1/data.json"
    write(path, json.loads(path.read_text()) | {"token_files": {"valid.bin": {"sha256": "cd" * 32}}})
    assert any("not evaluated on the same held-out text" in text for text in reds(read_report(folder)))
    folder = write_full_race(tmp_path / "order")
    path = folder / "arms/small/seed-0/recipe.json"
    stored = json.loads(path.read_text())
    write(path, {**stored, "data": {**stored["data"], "sequence_length": 128}})
    assert any("data.sequence_length differ" in text for text in reds(read_report(folder)))


def test_a_best_rate_at_the_edge_is_flagged_and_a_trial_that_diverged_is_not_the_best(tmp_path):
    def loss(arm, rate, seed, share):
        if arm == "small":
            return None if rate == 0.008 else plausible(arm, 0.004 if rate == 0.002 else 0.008, seed, share)
        return plausible(arm, rate, seed, share)

    folder = write_full_race(tmp_path / "race", loss=loss)
    told = read_report(folder)
    small = next(arm for arm in told["arms"] if arm["name"] == "small")
    assert (small["best_rate"], small["edge"], len(small["trials"])) == (0.002, "lowest", 3)
    assert any("edge of the grid for **small** (lowest)" in text for text in ambers(told)) and reds(told) == []
    assert any("lower learning rate may suit **small**" in text for text in told["changes"])
    page = page_of(read_report(folder))
    assert "diverged" in page and "at the lowest of the grid" in page
    assert not any("equally many trials" in text for text in ambers(told))
    shutil.rmtree(folder / "arms/small/tune/lr-0.008")
    assert any("equally many trials" in text for text in ambers(read_report(folder)))


# --- final text, races in progress, broken pieces ---


def test_runs_without_any_scatter_have_no_noise_that_would_hide_them():
    pair = {"arm": "a", "other": "b", "value": -0.1, "word": "better", "same_start": False}
    pair |= {"low": -0.1, "high": -0.1, "own_low": -0.1, "own_high": -0.1}
    assert nearest({"pairs": [pair], "s": 0.0, "df": 4}, "a", ["b"]) == []
    scattered = {"pairs": [pair | {"low": -0.15, "high": -0.05}], "s": 0.02, "df": 4}  # the control
    assert "2.00 times as much" in nearest(scattered, "a", ["b"])[0]


def test_verdicts_rest_on_the_final_text_where_it_was_given(tmp_path):
    def final(arm, rate, seed, share):  # turns the order of scratch and small about
        return plausible({"scratch": "small", "small": "scratch"}.get(arm, arm), rate, seed, share) + 0.1

    folder = write_full_race(tmp_path / "race", final=final)
    told = read_report(folder)
    assert all(b["measure"] == "final_bits_per_byte" for b in told["budgets"])
    assert "on the final text" in told["answer"][1]
    assert cell(told, "small")["mean"] < cell(told, "scratch")["mean"]
    assert cell(told, "small")["held_out_mean"] > cell(told, "scratch")["held_out_mean"]
    p = pair(told, "scratch", "small")
    assert {"scratch": "worse", "small": "better"}[p["arm"]] == p["word"]
    page = page_of(read_report(folder))
    assert f"held out {cell(told, 'small')['held_out_mean']:.3f}" in page
    (folder / "arms/small/seed-2/final.json").unlink()
    assert cell(read_report(folder), "small")["seeds"] == [0, 1]


def test_a_race_in_progress_has_a_page_that_says_so(tmp_path):
    def skip(arm, seed, share):  # two arms have begun; one of them lacks a seed of the largest budget
        return arm not in ("grown", "scratch") or (arm, seed, share) == ("grown", 2, 1.0)

    folder = write_full_race(tmp_path / "race", skip=skip)
    told = read_report(folder)
    assert any("17 of 63 headline runs have finished; 5 arms have no headline run yet" in t for t in ambers(told))
    assert reds(told) == [] and told["answer"][0].startswith("With arms missing: at 12.0 TFLOP")
    assert told["conclusion"] == ""
    assert pair(told, "grown", "scratch")["seeds"] == [0, 1]
    page = page_of(read_report(folder))
    assert "2 of 3 seeds" in page and "0 of 3 seeds" in page
    (folder / "arms/grown/seed-0/result.json").unlink()  # at work right now
    told = read_report(folder)
    assert pair(told, "grown", "scratch")["seeds"] == [1]
    assert pair(told, "grown", "scratch")["own_low"] is None
    (folder / "arms/grown/seed-0/data.json").unlink()  # just beginning: not all its files are there
    assert any("16 of 63" in t for t in ambers(read_report(folder)))
    (folder / "arms/grown/seed-1/data.json").unlink()  # the control: a finished run has to have them
    with pytest.raises(ValueError, match="data.json: no such file"):
        read_report(folder)


def test_how_many_arms_might_have_taken_another_rate_is_said_below_the_trials(tmp_path):
    final = lambda *at: plausible(*at, s=0.2)  # noqa: E731 - which no trial is judged by
    report = read_report(write_full_race(tmp_path / "race", final=final, final_text="final.txt"))
    spread = spread_of_held_out(report, 0.25)  # of the trials' length
    near = math.sqrt(2) * (spread.s_same or spread.s)
    assert near < 0.2 * report["budgets"][0]["s"]
    tuned = [arm for arm in report["arms"] if arm["trials"]]
    leads = []
    for arm in tuned:
        first, second = sorted(trial["bits_per_byte"] for trial in arm["trials"])[:2]
        leads.append(second - first)
    assert min(leads) > near  # trials of these arms are told apart by far
    said = f"of {len(tuned)} arms the best leads the next by less than {near:.3f}, one deviation of such"
    assert f"In none {said}" in page_of(report)
    found = json.loads(json.dumps(report))
    for trial in found["arms"][0]["trials"]:
        trial["bits_per_byte"] = 2.0 + {0.002: 0.0, 0.004: 1.1, 0.008: 0.9}[trial["learning_rate"]] * near
    assert f"In 1 {said}" in page_of(found) and "with another seed the next might have been taken" in page_of(found)


def test_a_race_that_only_has_trials_has_no_answer_yet(tmp_path):
    folder = write_full_race(tmp_path / "race", skip=lambda *at: True)
    told = read_report(folder)
    assert told["answer"] == ["No answer yet: 0 of 63 headline runs have finished."]
    page = page_of(read_report(folder))
    assert "Learning-rate trials" in page and "there is no result yet" in page


def test_a_race_without_growth_names_the_best_arm(tmp_path):
    arms = {
        n: {"role": "arm", "parameters": (720_000, 720_000), "architecture": n} for n in ("llama", "gpt2", "mamba2")
    }
    arms["copy of llama"] = {"role": "copy", "of": "llama", "parameters": (720_000, 720_000), "architecture": "llama"}
    away = {"gpt2": 0.05, "mamba2": 0.1}
    folder = write_full_race(
        tmp_path / "race", arms=arms, reference="llama", loss=lambda a, *at: plausible(a, *at) + away.get(a, 0.0)
    )
    told = read_report(folder)
    assert "the best arm, **llama**" in told["answer"][0] and "**better** than **gpt2** by" in told["answer"][0]
    assert told["answer"][1].startswith("Of 2 other arms all are **worse** than **llama**.")
    assert "Growths" not in page_of(read_report(folder))


@pytest.mark.parametrize(
    ("away", "said"),
    [
        ((0.1, 0.1, 0.1), "**llama** is the reference itself."),
        ((0.1, -0.2, -0.2), "FLOPs to the loss of **llama**: beyond the budgets on both sides."),
        ((None, None, None), "FLOPs to the loss of **llama**: not compared."),
        ((-0.2, -0.2, -0.2), "**gpt2** needs less than 1.00 times the FLOPs of **llama** to its loss: **faster**, by"),
    ],
)
def test_why_there_is_no_ratio_of_flops_is_said(tmp_path, away, said):
    sizes = {"parameters": (720_000, 720_000)}
    arms = {name: {"role": "arm", "architecture": name, **sizes} for name in ("llama", "gpt2")}

    def loss(arm, rate, seed, budget):
        return 2.0 + ((away[seed % 10] or -0.1) + 0.001 * (seed % 10) if arm == "gpt2" else 0.0)

    def skip(arm, seed, budget):  # so that the two have no seed in common
        return None in away and (arm == "gpt2") != (seed == 0)

    folder = write_full_race(tmp_path / "race", arms, loss, budgets=(1.0,), reference="llama", skip=skip)
    assert read_report(folder)["answer"][1].startswith(said)


def test_without_a_named_reference_it_is_the_target_size_from_scratch(tmp_path):
    folder = write_full_race(tmp_path / "race", reference=None)
    assert read_report(folder)["race"]["reference"] == "scratch"
    assert "the FLOPs of **scratch** to its loss" in read_report(folder)["answer"][1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"race": {"seeds": []}}, "race.budgets must be a list|race.learning_rates must be a list"),
        ({"race": [1]}, "race must be an object"),
        ({"arms": []}, "at least one arm"),
        (
            {"arms": [{"name": "a", "folder": "arms/small"}]},
            "race.reference is 'scratch', which is no arm: a",
        ),
        ({"arms": [{"name": "a"}]}, r"arms\[0\] needs a name and a folder"),
        ({"arms": [{"name": "a", "folder": "arms/grown", "role": "hero"}]}, "role must be one of arm, scratch"),
        ({"arms": [{"name": "scratch", "folder": "arms/nowhere"}]}, "no run of this race has started"),
        ({"arms": [{"name": "a", "folder": "arms/grown"}, {"name": "a", "folder": "arms/small"}]}, "two arms have one"),
    ],
)
def test_broken_pieces_give_one_line(tmp_path, change, message):
    folder = write_full_race(tmp_path / "race")
    path = folder / "race.json"
    write(path, json.loads(path.read_text()) | change)
    with pytest.raises(ValueError, match=message) as error:
        write_report(folder)
    assert "\n" not in str(error.value) and not list(folder.glob("report.*"))


def test_a_trial_without_a_rate_is_named(tmp_path):
    path = write_full_race(tmp_path / "race") / "arms/grown/tune/lr-0.004/recipe.json"
    write(path, {})
    with pytest.raises(ValueError, match="lr-0.004/recipe.json train: learning_rate must be a number, found None"):
        write_report(tmp_path / "race")


def test_what_a_kill_leaves_of_a_report_goes_when_the_race_goes_on(tmp_path, monkeypatch):
    folder, staging = write_full_race(tmp_path / "race"), []
    monkeypatch.setattr("tokenformer.report.png.write_png", lambda *at: staging.append(at[-1].parent) or at[-1].touch())
    write_report(folder)
    assert not staging[0].exists()
    staging[0].mkdir()
    remove_unfinished(folder)
    assert not staging[0].exists()


@pytest.mark.filterwarnings("error")
def test_a_name_may_hold_any_character(tmp_path):
    name = "costs $x_{$ and \\frac{$, \u6587\u5b57, \x01"
    assert write_report(write_full_race(tmp_path / "race", name=name))["png"].exists()


def test_the_page_needs_no_network_escapes_text_and_is_the_same_each_time(tmp_path):
    evil = "<script>alert(1)</script> & 'q'"
    arms = {**ARMS, "grown": {**ARMS["grown"], "description": evil, "architecture": evil}}
    folder = write_full_race(tmp_path / "race", arms=arms, name=evil, description=evil, command=evil)
    first = {kind: path.read_bytes() for kind, path in write_report(folder).items()}
    assert {kind: path.read_bytes() for kind, path in write_report(folder).items()} == first
    page = first["html"].decode()
    assert page.count("<script") == 1 and "http:" not in page and "https:" not in page and "default-src 'none'" in page
    assert first["png"].startswith(b"\x89PNG")
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_cosine_that_turns_a_verdict_about_is_said(report, tmp_path):
    assert [row["arm"] for row in report["cosine"]] == ["grown", "scratch"]
    assert not any("change places" in text for text in report["changes"])
    folder = write_full_race(tmp_path / "race", cosine=("scratch", "grown"))
    path = folder / "arms/grown/seed-0_cosine/result.json"
    write(path, json.loads(path.read_text()) | {"bits_per_byte": 3.0})
    assert any("**grown** and **scratch** change places" in text for text in read_report(folder)["changes"])


def test_a_near_miss_says_how_many_seeds_would_settle_it(tmp_path):
    told = read_report(write_full_race(tmp_path / "race", loss=lambda *at: plausible(*at, s=0.03)))
    texts = [text for text in told["changes"] if text.startswith("More seeds")]
    assert texts and all(re.search(r"(about \d+|more than 30) seeds would tell them apart", t) for t in texts)
