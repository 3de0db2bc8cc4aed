"""The report: what it says is what the run folders hold, and what a reader must be warned of is said."""

import html
import json
import math
import random
import re
import sys

import pytest
from tiny_races import ENVIRONMENT

from tokenformer.report import read_report, write_report
from tokenformer.report.charts import QUIET, Series, label_places, spread
from tokenformer.report.units import count_text, flops_text, linear_ticks, log_ticks, seconds_text, tick_texts
from tokenformer.report.verdict import NO_RULES

DATA = {
    "source": "embedded",
    "tokenizer": "bytes",
    "vocab_size": 256,
    "documents": 1490,
    "duplicates_dropped": 17,
    "train_tokens": 19_500_321,
    "valid_tokens": 100_000,
    "bytes": 19_600_321,
    "sha256": "ab" * 32,
    "files": ["abc.py", "ast.py"],
}
GROWTH = {"to": {"ffn_tokens": 512}, "at_fraction": 0.3, "operator": "zero_keys", "moments": "keep"}


def write_run(
    folder,
    name="grown",
    final=2.345,
    steps=700,
    flops=1.2e13,
    seconds=72.0,
    growths=((0.3, 256, 512),),
    every=50,
    architecture="tokenformer",
    parameters=(412_000, 720_000),
    finished=True,
    seed=0,
    **result_changes,
):
    """A plausible run: bits per byte fall like a power of the FLOPs to `final`, growth events on the way."""
    noise, lines, tokens_a_step = random.Random(seed), [], 8 * 256
    size = parameters[0] if growths else parameters[1]
    upto = steps if finished else steps // 2

    def at(step):
        share = step / steps
        return {
            "step": step,
            "flops": flops * share,
            "tokens": step * tokens_a_step,
            "seconds": seconds * share,
        }

    def bits(step):
        return final + (8.0 - final) * (1 - step / steps) * (1 + step / 12) ** -0.75

    events = {round(share * steps / 10) * 10: (before, after) for share, before, after in growths}
    for step in range(0, upto + 1, 10):
        loss = bits(step) * math.log(2)
        if step:
            rate = 2e-3 * min(1.0, step / 30, (1.1 - step / steps) / 0.3)
            noisy = loss + noise.gauss(0, 0.06)
            lines.append(
                {"kind": "train", "loss": noisy, "learning_rate": rate, "grad_norm": 0.8, **at(step)}
            )
        if step % every == 0 or step == steps:
            lines.append({"kind": "eval", "loss": loss, "bits_per_byte": bits(step), **at(step)})
        if step in events:
            before, after = events[step]
            grown = round(size * after / before * 0.87)
            lines.append(
                {
                    "kind": "growth",
                    "operator": "zero_keys",
                    "from": {"ffn_tokens": before},
                    "to": {"ffn_tokens": after},
                    "promise": "exact",
                    "max_logit_change": 2.4e-7,
                    "parameters_before": size,
                    "parameters_after": grown,
                    **at(step),
                }
            )
            size = grown
    model = {
        "architecture": architecture,
        "preset": None,
        "fields": {"hidden_size": 128, "num_hidden_layers": 4},
    }
    if architecture == "tokenformer":
        model["fields"]["ffn_tokens"] = 256 if growths else 512
    recipe = {
        "name": name,
        "description": "",
        "model": model,
        "data": {
            "source": "embedded",
            "tokenizer": "bytes",
            "sequence_length": 256,
            "batch_size": 8,
            "repeat": False,
        },
        "train": {
            "steps": None,
            "flops": flops,
            "learning_rate": 0.002,
            "schedule": "wsd",
            "dtype": "float32",
        },
        "growth": [GROWTH] * len(growths),
        "arms": [],
    }
    result = {
        "name": name,
        "status": "finished",
        "step": steps,
        "steps": steps,
        "bits_per_byte": final,
        "loss": final * math.log(2),
        "flops": flops,
        "tokens": steps * tokens_a_step,
        "unique_tokens": steps * tokens_a_step,
        "epochs": round(steps * tokens_a_step / 19_500_321, 4),
        "seconds": seconds,
        "parameters": {"total": size, "embedding": 32_768, "other": size - 32_768},
        "flops_per_token": 6 * size,
        "growth": [line for line in lines if line["kind"] == "growth"],
        "sample": {
            "prompt": "def read(",
            "text": 'self, path):\n    """Return the <b>bytes</b> & more."""\n    '
            "return self._open(path, 'rb').read()\n\n\ndef close(self):\n    if self.file is not None:",
        },
        "checkpoint": "checkpoints/step-00000700",
        **result_changes,
    }
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for file, value in (("recipe", recipe), ("environment", ENVIRONMENT), ("data", DATA)):
        (folder / f"{file}.json").write_text(json.dumps(value))
    if finished:
        (folder / "result.json").write_text(json.dumps(result))
    return folder


ARMS = {
    "grown": dict(final=2.345, description="256 entries, grown to 512 at 30 % of the FLOPs"),
    "large": dict(final=2.361, growths=(), steps=500, seconds=70.0, description="512 entries from scratch"),
    "small, longer": dict(
        final=2.402,
        growths=(),
        steps=900,
        parameters=(412_000, 412_000),
        seconds=81.0,
        description="256 entries, the same FLOPs",
    ),
    "llama": dict(
        final=2.338,
        growths=(),
        architecture="llama",
        parameters=(0, 731_000),
        seconds=58.0,
        steps=520,
        description="Llama-style Transformer of the grown size",
    ),
}


def write_race(folder, arms=None, noise=None, **changes):
    """A race folder with one run folder per arm; `arms` maps names to what differs from the defaults."""
    entries = []
    for index, (name, options) in enumerate((arms or ARMS).items()):
        options = dict(options)
        description = options.pop("description", "")
        place = f"arms/{index}"
        write_run(folder / place, name=name, seed=index, **options)
        entries.append({"name": name, "description": description, "folder": place})
    race = {
        "name": "quickstart",
        "description": "What does growing in mid-run buy, at the same total training FLOPs?",
        "recipe": {},
        "command": "tokenformer quickstart --folder runs/quickstart",
        "environment": ENVIRONMENT,
        "arms": entries,
        "noise": noise,
        **changes,
    }
    (folder / "race.json").write_text(json.dumps(race))
    return folder


def page_of(folder):
    return write_report(folder)["html"].read_text(encoding="utf-8")


def texts(report):
    found = [item["text"] for item in report["status_warnings"] + report["warnings"]]
    return [text for text in found if text != NO_RULES]


def reds(report):
    return [item["text"] for item in report["status_warnings"] + report["warnings"] if item["level"] == "bad"]


@pytest.fixture(scope="module")
def race(tmp_path_factory):
    folder = write_race(tmp_path_factory.mktemp("race") / "quickstart")
    write_report(folder)
    return folder


def test_every_number_of_the_folders_is_in_the_json(race):
    report = json.loads((race / "report.json").read_text())
    assert [arm["name"] for arm in report["arms"]] == list(ARMS), "arms keep the race's own order"
    for index, arm in enumerate(report["arms"]):
        place = race / "arms" / str(index)
        result = json.loads((place / "result.json").read_text())
        for key in (
            "bits_per_byte",
            "loss",
            "flops",
            "tokens",
            "unique_tokens",
            "epochs",
            "seconds",
            "parameters",
            "flops_per_token",
            "sample",
            "step",
            "steps",
            "status",
            "checkpoint",
        ):
            assert arm[key] == result[key], (arm["name"], key)
        for file in ("recipe", "environment", "data"):
            assert arm[file] == json.loads((place / f"{file}.json").read_text())
        lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
        for kind in ("train", "eval"):
            for key, values in arm["curves"][kind].items():
                assert values == [line[key] for line in lines if line["kind"] == kind], (kind, key)
        grown = [{k: v for k, v in line.items() if k != "kind"} for line in lines if line["kind"] == "growth"]
        assert arm["growth"] == grown
        best = min(options["final"] for options in ARMS.values())
        assert arm["difference_to_best"] == pytest.approx(arm["bits_per_byte"] - best, abs=1e-12)
    assert {arm["name"]: arm["rank"] for arm in report["arms"]} == {
        "llama": 1,
        "grown": 2,
        "large": 3,
        "small, longer": 4,
    }


def test_page_shows_the_numbers_best_arm_first(race):
    page = (race / "report.html").read_text()
    table = page[page.index("<h2>Arms</h2>") : page.index("<h2>Growth</h2>")]
    assert re.findall(r"<b>(\d\.\d{3})</b>", table) == ["2.338", "2.345", "2.361", "2.402"]
    names = [html.unescape(name) for name in re.findall(r"</i><b>(.*?)</b>", table)]
    assert names == ["llama", "grown", "large", "small, longer"]
    assert "ffn_tokens 256 → 512" in page and "412 k → 717 k" in page and "2.4e-7" in page
    for text in (
        "tokenformer quickstart --folder runs/quickstart",
        "ab" * 32,
        ENVIRONMENT["commit"],
        "5.23.0",
        ENVIRONMENT["cpu"],
        "duplicates_dropped",
    ):
        assert text in page


def test_page_needs_no_network(race):
    page = (race / "report.html").read_text()
    assert not re.findall(r"""(?:src|href|action|data|poster)\s*=\s*["']?\s*(?:https?:)?//""", page)
    assert "http:" not in page and "https:" not in page and "@import" not in page
    assert re.findall(r"url\(([^)]*)", page) and all(
        u.startswith("#") for u in re.findall(r"url\(([^)]*)", page)
    )
    assert "default-src 'none'" in page
    assert (race / "report.png").read_bytes().startswith(b"\x89PNG") and sorted(
        path.name for path in race.iterdir() if path.is_file()
    ) == ["race.json", "report.html", "report.json", "report.png"]


def test_clip_paths_have_one_name_each(race):
    found = re.findall(r' id="([^"]+)"', (race / "report.html").read_text())
    assert len(found) == len(set(found))


def test_a_report_is_the_same_each_time(race, tmp_path):
    before = {kind: path.read_bytes() for kind, path in write_report(race).items()}
    assert {kind: path.read_bytes() for kind, path in write_report(race).items()} == before


def test_text_of_people_and_models_is_escaped(tmp_path):
    evil = '<script>alert(1)</script> & "quote" \''
    sample = {"prompt": "<i>", "text": "</pre><img src=x onerror=alert(2)>\x00\x1b\ud800 end"}
    write_race(
        tmp_path / "race",
        {evil: dict(ARMS["grown"], sample=sample), "b": dict(ARMS["large"])},
        name=evil,
        description=evil,
        command=f"tokenformer {evil}",
    )
    page = page_of(tmp_path / "race")
    assert page.count("<script") == 1 and "<img" not in page and "onerror=alert(2)&gt;" in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &quot;quote&quot; &#x27;" in page
    assert "\x00" not in page and "␀␛? end" in page


def test_answer_names_the_lowest_arm_and_what_noise_allows(tmp_path):
    def answer(noise, name):
        return " ".join(read_report(write_race(tmp_path / name, noise=noise))["answer"])

    unknown = answer(None, "a")
    assert "At equal training FLOPs (12.0 TFLOP, ancestors included) **llama** has the lowest" in unknown
    assert "2.338, 0.007 lower than **grown**; noise not measured" in unknown
    assert "**grown** is 0.007 higher than **llama**, 0.016 lower than **large**" in unknown
    small = answer({"standard_deviation_bits_per_byte": 0.001, "source": "three seeds"}, "b")
    assert "the gap is larger than the noise" in small and "not told apart" not in small
    large = answer({"standard_deviation_bits_per_byte": 0.01, "source": "three seeds"}, "c")
    assert "not told apart: the gap is within the noise" in large
    assert "not told apart from **llama**, not told apart from **large** and 0.057 lower" in large


def test_noise_of_another_budget_judges_no_gap(tmp_path):
    """The arms have 12 TFLOP each; the control is noise that was measured there, to within whole steps."""
    large = {"standard_deviation_bits_per_byte": 0.01, "source": "three seeds"}
    here = read_report(write_race(tmp_path / "here", noise={**large, "flops": 12.05e12}))
    assert "not told apart: the gap is within the noise" in here["answer"][0] and here["noise_threshold_bits_per_byte"]
    folder = write_race(tmp_path / "elsewhere", noise={**large, "flops": 3.42e12})
    elsewhere = read_report(folder)
    assert "; noise not measured at this budget, only at 3.42 TFLOP, so a small gap may be" in elsewhere["answer"][0]
    assert elsewhere["noise_threshold_bits_per_byte"] is None and "told apart" not in " ".join(elsewhere["answer"])
    [tile] = [tile for tile in elsewhere["headline"] if tile["label"] == "noise of a gap"]
    assert (tile["text"], tile["note"]) == ("not measured", "only at 3.42 TFLOP; three seeds")
    page = page_of(folder)
    assert "Noise: not measured at this budget, only at 3.42 TFLOP." in page and "The band is what" not in page


def test_the_quickstart_s_noise_is_of_its_own_budget():
    from tokenformer.recipe import load_recipe

    recipe = load_recipe("quickstart")
    assert recipe.noise.flops == recipe.train.flops


def test_few_repeats_widen_the_noise(tmp_path):
    deviation = {"standard_deviation_bits_per_byte": 0.002}
    known = read_report(write_race(tmp_path / "a", noise=deviation))["noise_threshold_bits_per_byte"]
    three = read_report(write_race(tmp_path / "b", noise={**deviation, "runs": 3}))
    assert known == pytest.approx(2 * math.sqrt(2) * 0.002)
    assert three["noise_threshold_bits_per_byte"] == pytest.approx(4.302653 * math.sqrt(2) * 0.002)  # t(2)


def test_an_arm_and_its_copy_are_level(tmp_path):
    report = read_report(write_race(tmp_path / "race", {"a": ARMS["large"], "b": ARMS["large"]}))
    assert "level with **b**" in report["answer"][0] and report["arms"][1]["difference_to_best"] == 0


@pytest.mark.parametrize(
    ("change", "flag", "control"),
    [
        ({"epochs": 2.0}, "saw its training text 2.00 times", {"epochs": 1.0}),
        ({"reads_again": True}, "may have read text that its ancestor had read", {"reads_again": False}),
        ({"bits_per_byte": 0.49}, "implausible", {"bits_per_byte": 0.51}),
        ({"bits_per_byte": 0.0}, "implausible", {"bits_per_byte": 0.5}),
        ({"status": "failed", "error": "loss is nan"}, "failed at step 700 of 700: loss is nan", {}),
    ],
)
def test_what_cannot_be_trusted_is_flagged_in_red(tmp_path, change, flag, control):
    bad = read_report(write_run(tmp_path / "bad", **change))
    assert [text for text in reds(bad) if flag in text]
    assert ("failed" if "status" in change else "Read the red notes first") in bad["answer"][0]
    page = page_of(tmp_path / "bad")
    assert 'class="note bad"' in page and html.escape(flag) in page
    fine = read_report(write_run(tmp_path / "fine", **control))
    assert texts(fine) == [] and "red notes" not in fine["answer"][0]
    page = page_of(tmp_path / "fine")
    assert 'class="note bad"' not in page and 'class="bad"' not in page


def change_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_broken_promise_of_exactness_is_flagged(tmp_path):
    for dtype, moved, flagged in (
        ("float32", 3e-3, True),
        ("float32", 2e-4, True),
        ("float32", 9e-5, False),
        ("bfloat16", 2e-4, True),  # measured in float32 there too
        ("bfloat16", 9e-5, False),
    ):
        folder = write_run(tmp_path / f"{dtype} {moved}")
        recipe = json.loads((folder / "recipe.json").read_text())
        change_json(folder / "recipe.json", train={**recipe.get("train", {}), "dtype": dtype})
        metrics = folder / "metrics.jsonl"
        metrics.write_text(
            metrics.read_text().replace('"max_logit_change": 2.4e-07', f'"max_logit_change": {moved}')
        )
        assert any("promises to be exact" in text for text in reds(read_report(folder))) == flagged


def test_a_race_without_the_rules_says_so_and_a_run_does_not(tmp_path):
    for folder, said in ((write_race(tmp_path / "race"), 1), (write_run(tmp_path / "run"), 0)):
        assert [note["text"] for note in read_report(folder)["warnings"]].count(NO_RULES) == said


def test_arms_that_are_not_comparable_are_said_to_be_so(tmp_path):
    folder = write_race(tmp_path / "race", {**ARMS, "large": dict(ARMS["large"], flops=1.3e13)})
    report = read_report(folder)
    assert (
        "12.0 TFLOP to 13.0 TFLOP" in " ".join(texts(report)) and "not at equal FLOPs" in report["answer"][0]
    )
    change_json(folder / "arms/1/data.json", sha256="cd" * 32)
    change_json(folder / "arms/2/data.json", token_files={"valid.bin": {"sha256": "ef" * 32}})
    change_json(folder / "arms/1/environment.json", cores=64)
    change_json(folder / "race.json", environment={**ENVIRONMENT, "dirty": True})
    report = read_report(folder)
    assert any("same token stream" in text for text in reds(report))
    assert any("same held-out text" in text for text in reds(report))
    assert any("what differs: cores (2 in 3, 64 in 1)" in text for text in texts(report))
    assert any("uncommitted changes" in text for text in texts(report))
    close = write_race(tmp_path / "close", {**ARMS, "large": dict(ARMS["large"], flops=1.2e13 * 1.005)})
    assert texts(read_report(close)) == []


def test_unfinished_arms_are_stated_first_and_not_ranked(tmp_path):
    arms = {
        **ARMS,
        "large": dict(ARMS["large"], finished=False),
        "llama": dict(ARMS["llama"], status="stopped"),
    }
    folder = write_race(tmp_path / "race", arms)
    for file in (folder / "arms/2").iterdir():
        file.unlink()
    report = read_report(folder)
    assert [arm["rank"] for arm in report["arms"]] == [1, None, None, None]
    assert report["answer"] == ["No answer yet: 1 of 4 arms have finished."]
    assert "**large** has not finished: it stands at step 250, 50% of its FLOPs." in texts(report)
    assert "**small, longer** has not started." in texts(report)
    assert "**llama** was stopped at step 520 of 520." in texts(report)
    page = page_of(folder)
    assert page.index("has not finished") < page.index('class="answer"') < page.index("<h2>")


def test_one_run_has_a_page_and_an_unfinished_one_says_so(tmp_path):
    page = page_of(write_run(tmp_path / "run"))
    assert "reaches 2.345 bits per byte on held-out text after 12.0 TFLOP of training" in page
    assert "It grew at step 210, from 412 k to 717 k parameters" in page and "<figure" in page
    folder = write_run(tmp_path / "half", finished=False)
    page = page_of(folder)
    assert "has not finished: it stands at step 350" in page and "so far reaches" in page
    report = read_report(folder)
    assert report["arms"][0]["bits_per_byte"] == report["arms"][0]["curves"]["eval"]["bits_per_byte"][-1]


def test_differences_of_recipes_are_marked_and_the_whole_is_there(race):
    report, page = read_report(race), (race / "report.html").read_text()
    assert set(report["differing_keys"]) == {
        "model.architecture",
        "model.fields.ffn_tokens",
        "growth.0.to.ffn_tokens",
        "growth.0.at_fraction",
        "growth.0.operator",
        "growth.0.moments",
    }
    assert page.count("<th scope=row>train.learning_rate</th>") == len(ARMS)
    assert '<tr class="differs"><th scope=row>model.architecture</th>' in page
    assert '<tr class="differs"><th scope=row>train.learning_rate</th>' not in page


def test_a_line_cut_off_by_a_kill_is_dropped_and_only_that(tmp_path):
    folder = write_run(tmp_path / "run", finished=False)
    metrics, whole = folder / "metrics.jsonl", read_report(folder)["arms"][0]["curves"]
    text = metrics.read_text()
    metrics.write_text(text + '{"kind": "train", "step": 36')
    assert read_report(folder)["arms"][0]["curves"] == whole
    metrics.write_text('{"kind": "tr\n' + text)
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 1: not JSON"):
        read_report(folder)


def test_metrics_of_a_finished_run_that_end_early_are_refused(tmp_path):
    folder = write_run(tmp_path / "run")
    metrics = folder / "metrics.jsonl"
    read_report(folder)  # the control
    for kept, said in ((5, "ends at step"), (0, "is empty")):
        metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:kept]))
        with pytest.raises(ValueError, match=rf"metrics\.jsonl: {said}.*the run took .*cut short"):
            read_report(folder)


def test_steps_written_again_after_a_resume_count_once(tmp_path):
    folder = write_run(tmp_path / "run")
    metrics, whole = folder / "metrics.jsonl", read_report(folder)["arms"][0]
    lines = metrics.read_text().splitlines(keepends=True)
    again = lines[:40] + lines[30:]  # killed after line 40, resumed from a checkpoint after line 30
    again[35] = again[35].replace('"loss": ', '"loss": 9')
    metrics.write_text("".join(again))
    arm = read_report(folder)["arms"][0]
    assert arm["curves"] == whole["curves"] and arm["growth"] == whole["growth"]


def test_a_loss_that_is_not_finite_leaves_a_page_and_strict_json(tmp_path):
    folder = write_run(tmp_path / "run", status="failed", bits_per_byte=None, loss=float("nan"))
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(
            '{"kind": "train", "step": 710, "loss": NaN, "flops": 1.3e13, "tokens": 9, "seconds": 80}\n'
        )
    paths = write_report(folder)
    report = json.loads(
        paths["json"].read_text(), parse_constant=lambda text: pytest.fail(f"{text} in the JSON")
    )
    assert report["arms"][0]["curves"]["train"]["loss"][-1] is None and "nan" not in paths["html"].read_text()


def test_missing_and_broken_pieces_give_one_line(tmp_path):
    def message(folder):
        with pytest.raises(ValueError) as error:
            write_report(folder)
        assert "\n" not in str(error.value)
        assert not list(folder.glob("report.*")) if folder.is_dir() else True
        return str(error.value)

    assert "no such folder" in message(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "neither a run" in message(tmp_path / "empty")
    for name in ("recipe.json", "environment.json", "data.json", "metrics.jsonl"):
        folder = write_run(tmp_path / f"without-{name}")
        (folder / name).unlink()
        assert name in message(folder)
    folder = write_run(tmp_path / "half-json")
    (folder / "result.json").write_text('{"status": "fin')
    assert "result.json: not JSON" in message(folder)
    folder = write_run(tmp_path / "no-number", bits_per_byte=None)
    assert "bits_per_byte must be a number" in message(folder)
    folder = write_run(tmp_path / "status", status="fine")
    assert "status must be" in message(folder)
    folder = write_race(tmp_path / "no-arms", arms={"a": {}})
    change_json(folder / "race.json", arms=[])
    assert "at least one arm" in message(folder)
    folder = write_race(tmp_path / "bad-noise", noise={"standard_deviation_bits_per_byte": -1})
    assert "must be >= 0" in message(folder)


def test_many_arms_and_growths_still_have_a_page(tmp_path):
    arms = {
        f"schedule {i}": dict(
            final=2.3 + i / 100, growths=((0.1 + i / 50, 128, 256), (0.4, 256, 512)), flops=3e15
        )
        for i in range(9)
    }
    page = page_of(write_race(tmp_path / "race", arms))
    assert page.count('<ol class="key">') == 1 and "stroke-dasharray" in page
    assert "0.010 to 0.080 lower than" not in page and "0.020 to 0.080 lower than 7 arms" in page


def test_importing_the_report_loads_no_heavy_library():
    import subprocess

    code = (
        "import sys, tokenformer.report.page; print([m for m in ('matplotlib', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_labels_are_spread_apart_in_order_and_within_bounds():
    placed = spread([5.0, 5.1, 5.2, 40.0], 10, 0, 60)
    assert placed == sorted(placed) and all(
        b - a >= 10 - 1e-9 for a, b in zip(placed, placed[1:], strict=False)
    )
    assert placed[0] >= 0 and placed[-1] <= 60 and placed[3] == 40.0
    assert spread([10.0, 30.0], 5, 0, 60) == [10.0, 30.0], "labels with room stay where they are"
    high = spread([58.0, 59.0, 60.0], 10, 0, 60)
    assert high == pytest.approx([40, 50, 60])


def test_a_grey_name_stands_where_no_other_line_ends_and_never_moves_one_in_colour():
    loud, grey, other = (Series(str(colour), colour, [], []) for colour in (0, QUIET, QUIET + 1))
    assert label_places([(loud, 20.0), (grey, 35.0), (other, 50.0)], 10, 0, 60) == [20, 35, 50]
    assert label_places([(loud, 20.0), (grey, 25.0), (other, 50.0)], 10, 0, 60) == [20, None, 50]
    assert label_places([(loud, 20.0), (grey, 45.0), (other, 50.0)], 10, 0, 60) == [20, None, None]
    moved = label_places([(loud, 20.0), (Series("1", 1, [], []), 25.0)], 10, 0, 60)  # the control: both in colour
    assert moved == [pytest.approx(17.5), pytest.approx(27.5)]


def test_ticks_are_round_and_within_the_axis():
    for low, high in ((0, 12), (2.3, 3.9), (0, 0.002), (0, 86_400), (0.31, 8.0)):
        ticks = linear_ticks(low, high)
        assert 3 <= len(ticks) <= 9 and low - 1e-9 <= ticks[0] and ticks[-1] <= high * (1 + 1e-9)
        assert len(set(tick_texts(ticks))) == len(ticks)
    assert tick_texts(linear_ticks(0, 12, 6)) == ["0", "2", "4", "6", "8", "10", "12"]
    assert tick_texts(log_ticks(0.08, 12)) == ["0.1", "0.2", "0.5", "1", "2", "5", "10"]
    assert tick_texts(log_ticks(1, 100_000)) == ["1", "10", "100", "1,000", "10,000", "100,000"]


def test_units_are_written_for_people():
    assert [flops_text(x) for x in (1.2e13, 3e15, 999.9e12, 0)] == [
        "12.0 TFLOP",
        "3.00 PFLOP",
        "1.00 PFLOP",
        "0 FLOP",
    ]
    assert [count_text(x) for x in (256, 9_216, 412_000, 1_430_000)] == ["256", "9,216", "412 k", "1.43 M"]
    assert [seconds_text(x) for x in (7.25, 72, 754, 12_000)] == [
        "7.25 s",
        "72.0 s",
        "12 min 34 s",
        "3 h 20 min",
    ]


def test_printable_text_keeps_every_character_but_those_that_a_terminal_obeys():
    from tokenformer.report.units import printable

    kept = "plain\n\ttext \u00a0\u3000語 \u200d\u200c🙂 é"
    assert printable(kept) == kept
    assert "".join(c for c in kept if c.isprintable()) != kept  # the control: Python's own word would drop some
    obeyed = "".join(map(chr, [*range(9), *range(11, 32), *range(127, 160), 0xD800, 0xDFFF]))
    assert printable(obeyed) == "\ufffd" * len(obeyed)
