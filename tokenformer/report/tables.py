"""The tables of the page: arms, growths, samples, recipes, data, and what it takes to make it all again."""

from __future__ import annotations

from typing import Any

from .markup import e, name_of, pairs, shown, table
from .read import shape_of
from .units import MISSING, bits_text, count_text, flops_text, seconds_text, signed, small_text
from .verdict import by_rank, flatten


def difference(arm: dict[str, Any]) -> str:
    if arm["difference_to_best"] is None:
        return MISSING
    if arm["against_best"] == "best":
        return "lowest"
    if arm["against_best"] == "not told apart":
        return f'{e(signed(arm["difference_to_best"]))} <span class="tag quiet">not told apart</span>'
    return e(signed(arm["difference_to_best"]))


def linear_attention(arm: dict[str, Any]) -> bool | None:
    """Whether a TokenFormer's attention projects linearly; None of what is no TokenFormer, or not known."""
    config, model = arm.get("config") or {}, arm["recipe"].get("model") or {}  # where there is no config: the recipe
    if arm["architecture"] != "tokenformer" or not config and (not model or model.get("checkpoint")):
        return None
    usual = "linear" if model.get("preset") == "modern" else "pattention"
    return {"attention_projections": usual, **shape_of(model), **config}["attention_projections"] == "linear"


def architecture_html(arm: dict[str, Any]) -> str:
    """The architecture, and of a TokenFormer which of its parts are parameter tokens."""
    places: dict[bool | None, str] = {True: "the feed-forward only", False: "feed-forward and attention"}
    place = places.get(linear_attention(arm))
    about = f'<span class="about">parameter tokens in {place}</span>' if place else ""
    return e(arm["architecture"] or MISSING) + about


def arms_table(report: dict[str, Any]) -> str:
    head = [
        report["kind"].replace("race", "arm"),
        "bits per byte",
        "to the best",
        "architecture",
        "parameters",
        "embedding",
        "other",
        "tokens seen",
        "unique tokens",
        "epochs",
        "FLOPs",
        "time",
        "learning rate",
    ]
    rows = []
    for arm in by_rank(report["arms"]):
        p, rate = arm["parameters"], arm["learning_rate"]
        status = "" if arm["status"] == "finished" else f' <span class="tag warn">{e(arm["status"])}</span>'
        about = f'<span class="about">{e(arm["description"])}</span>' if report["kind"] == "race" else ""
        rows.append(
            [
                name_of(report, arm) + status + about,
                f"<b>{bits_text(arm['bits_per_byte'])}</b>",
                difference(arm),
                architecture_html(arm),
                *(count_text(p.get(k)) for k in ("total", "embedding", "other")),
                count_text(arm["tokens"]),
                count_text(arm["unique_tokens"]),
                epochs_html(arm),
                flops_text(arm["flops"]),
                seconds_text(arm["seconds"]),
                MISSING if rate is None else f"{rate:g}",
            ]
        )
    keep = [i for i in range(len(head)) if i != 2 or report["kind"] == "race"]
    flush = tuple(at for at, i in enumerate(keep) if i not in (0, 3))
    return table([head[i] for i in keep], [[row[i] for i in keep] for row in rows], "arms", flush)


def epochs_html(arm: dict[str, Any]) -> str:
    """How often the training text was seen; in red where more than once."""
    epochs = arm["epochs"]
    if epochs is None:
        return MISSING
    return f'<span class="bad">{epochs:.2f}</span>' if epochs > 1 + 1e-9 else f"{epochs:.2f}"


def growth_table(report: dict[str, Any]) -> str:
    rows = []
    for arm in report["arms"]:
        for event in arm["growth"]:
            axes = "<br>".join(
                f"{e(k)} {e(event['from'].get(k, '?'))} → {e(v)}" for k, v in event["to"].items()
            )
            sizes = f"{count_text(event['parameters_before'])} → {count_text(event['parameters_after'])}"
            waited = f"<br>slope {event['slope']:.4f}" if "slope" in event else ""
            rows.append(
                [
                    name_of(report, arm),
                    f"{event['step']:,}{waited}",
                    e(event["operator"]),
                    e(event["promise"]),
                    axes,
                    sizes,
                    flops_text(event["flops"]),
                    small_text(event["max_logit_change"]),
                    flops_text(event.get("growth_flops", 0)),
                ]
            )
    if not rows:
        return ""
    head = [
        "arm",
        "step",
        "operator",
        "promise",
        "axes",
        "parameters",
        "at FLOPs",
        "largest change of a logit",
        "FLOPs of the growth itself",
    ]
    if not any(event.get("growth_flops") for arm in report["arms"] for event in arm["growth"]):
        head, rows = head[:-1], [row[:-1] for row in rows]
    return "<h2>Growth</h2>" + table(head, rows, "", (1, 5, 6, 7, 8))


def samples(report: dict[str, Any]) -> str:
    cards = []
    for arm in by_rank(report["arms"]):
        sample = arm["sample"] or {}
        if sample.get("text"):
            prompt, text = str(sample.get("prompt") or ""), str(sample["text"])
            text = text.removeprefix(prompt)
            cards.append(
                f'<div class="card"><h3>{name_of(report, arm)}</h3>'
                f'<pre><span class="prompt">{e(prompt)}</span>{e(text)}</pre></div>'
            )
    note = '<p class="small">The underlined prompt was given; what follows was generated.</p>'
    return f'<h2>Samples</h2>{note}<div class="cards">{"".join(cards)}</div>' if cards else ""


def differing_table(
    report: dict[str, Any], arms: list[dict[str, Any]], flat: list[dict[str, Any]], keys: list[str]
) -> str:
    """A row per key that differs, a column per arm; `flat` are the arms' recipes, flattened."""
    rows = [[f"<code>{e(k)}</code>", *(e(shown(f.get(k))) for f in flat)] for k in keys]
    return table(["key", *(name_of(report, arm) for arm in arms)], rows, "diff")


def recipes(report: dict[str, Any]) -> str:
    arms = [arm for arm in by_rank(report["arms"]) if arm["recipe"]]
    flat, keys = [flatten(arm["recipe"]) for arm in arms], report["differing_keys"]
    out = ["<h2>Recipes</h2>"]
    if keys:
        out.append('<p class="small">What differs between the arms; everything else is the same.</p>')
        out.append(differing_table(report, arms, flat, keys))
    for arm, values in zip(arms, flat, strict=True):
        out.append(
            f"<details><summary>Full recipe of {name_of(report, arm)}</summary>"
            f"{pairs(values, keys)}</details>"
        )
    return "".join(out)


def data_texts(report: dict[str, Any]) -> str:
    """The text behind the numbers; said once where all arms read the same."""
    arms = [arm for arm in report["arms"] if arm["data"]]
    same = all(arm["data"] == arms[0]["data"] for arm in arms)
    out = ["<h2>Data</h2>"]
    for arm in arms[:1] if same else arms:
        out.append(("" if same else f"<h3>{name_of(report, arm)}</h3>") + pairs(flatten(arm["data"])))
    return "".join(out)


def data_section(report: dict[str, Any]) -> str:
    arms = [arm for arm in report["arms"] if arm["data"]]
    rows = [
        [name_of(report, arm), exact(arm["tokens"]), exact(arm["unique_tokens"]), epochs_html(arm)]
        for arm in by_rank(arms)
    ]
    return data_texts(report) + table(["arm", "tokens seen", "unique tokens", "epochs"], rows, "", (1, 2, 3))


def exact(value: float | None) -> str:
    return MISSING if value is None else f"{value:,.0f}"


def provenance(report: dict[str, Any]) -> str:
    resumed = report["environment"].get("resumed") or []
    environment = {k: v for k, v in report["environment"].items() if k not in ("command", "resumed")}
    environment = flatten(environment) | ({"resumed": [r.get("started") for r in resumed]} if resumed else {})
    flagged = {"dirty": "uncommitted changes"} if report["environment"].get("dirty") else {}
    command = report["command"] or "not recorded"
    button = '<button type="button" hidden>copy</button>'
    shell = f'<div class="command"><pre><code>{e(command)}</code></pre>{button}</div>'
    return (
        "<h2>Make it again</h2>"
        + shell
        + "<h2>Hardware, versions, commit</h2>"
        + pairs(environment, [], flagged)
    )
