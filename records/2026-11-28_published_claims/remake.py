"""Make this record's numbers and picture again, from the reports of the other records; trains nothing.

    python PATH/remake.py [OUT]        writes OUT/report.json and OUT/report.png, by default beside this file

A saving is the share of the training FLOPs that an arm's own size needs from scratch: at the whole budget to that
scratch's final loss, the small model's FLOPs counted, noise pooled over arms; at half of the budget to the grown
model's loss there, the small model taken as paid, as some papers do, each arm's own interval. Published shares are of
the papers' own setting, and of FLOPs, tokens or time, as the paper counts. Architectures are differences in bits per
byte at equal FLOPs to the rival that the claim names. Intervals are 95 %, of three paired seeds.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tokenformer.report.race.controls import pair_of

RECORDS = Path(__file__).resolve().parent.parent
LLAMA, AGAIN, REST = "2026-11-24_growth_llama", "2026-11-27_growth_fresh", "2026-11-28_growth_rest"
TOKENS, ROTATED, LONG = "2026-11-27_growth_tokens", "2026-11-28_growth_rotated", "2026-11-28_growth_tokens_long"
EXPERTS = "2026-11-29_growth_experts"
ARCHITECTURES, FRESH = "2026-11-26_architectures", "2026-11-27_fresh_seeds"

# What is claimed, where, its published share of scratch's cost (from, to; "up to" reaches from 1), the arms raced.
SAVINGS: list[tuple[str, str, tuple[float, float], list[tuple[str, str]]]] = [
    ("G_stack: 35 % saved", "2405.15319", (0.65, 0.65), [(LLAMA, "stack"), (AGAIN, "stack")]),
    ("MSG: 1.8 to 2.2 times as fast", "2305.02869", (1 / 2.2, 1 / 1.8), [(LLAMA, "masked"), (AGAIN, "masked")]),
    ("LEMON: 33 to 57 % saved", "2310.07999", (0.43, 0.67), [(LLAMA, "lemon")]),
    ("staged training: up to 22 % saved", "2203.06211", (0.78, 1), [(LLAMA, "staged")]),
    ("bert2BERT: 45 % saved", "2110.07143", (0.55, 0.55), [(LLAMA, "aki")]),
    ("LiGO: up to 50 % saved", "2303.00980", (0.5, 1), [(LLAMA, "ligo")]),
    ("HyperCloning: up to 4 times as fast", "2409.12903", (0.25, 1), [(LLAMA, "hyperclone")]),
    ("SPARKLING: up to 35 % saved", "2602.02472", (0.65, 1), [(LLAMA, "sparkling")]),
    ("MIDAS: up to 40 % faster", "2409.19044", (0.6, 1), [(REST, "midas"), (REST, "gradual_stack")]),
    ("one layer, then all at once: 80 % saved", "2511.04981", (0.2, 0.2), [(REST, "jump")]),
    ("ReLoRA: 9 to 40 % faster", "2307.05695", (0.6, 0.91), [(REST, "relora")]),
    ("expert upcycling: 32 % saved", "2604.19835", (0.68, 0.68), [(EXPERTS, "duplicate_experts")]),
    (
        "TokenFormer: a third of the cost",
        "2410.23168",
        (0.34, 0.34),
        [
            (TOKENS, "zero_values"),
            (AGAIN, "modern"),
            (LONG, "grown"),
            (TOKENS, "published_growth"),
            (ROTATED, "published_growth"),
            (ROTATED, "rotated_keys"),
        ],
    ),
]
SIZES = [
    (LLAMA, "small-identity_blocks"),
    (AGAIN, "small-stack"),
    (TOKENS, "size-2"),
    (REST, "size-1"),
    (LONG, "size-1"),
]
RIVALS: list[tuple[str, str, list[tuple[str, str, str]]]] = [
    (
        "TokenFormer is as good as a Transformer",
        "2410.23168",
        [
            (ARCHITECTURES, "published", "llama"),
            (FRESH, "published", "llama"),
            (FRESH, "published_wide_start", "llama"),
        ],
    ),
    (
        "parameter tokens in the feed-forward alone",
        "",
        [(ARCHITECTURES, "modern", "llama"), (FRESH, "modern", "llama"), (AGAIN, "scratch-modern", "scratch")],
    ),
    (
        "L2 norm and GELU beat softmax",
        "2410.23168",
        [(ARCHITECTURES, f"theta_{theta}", "theta_softmax") for theta in ("l2_norm_gelu", "gelu_l2_norm")],
    ),
    (
        "GLU beats GELU",
        "2002.05202",
        [(ARCHITECTURES, "gated", "modern"), (FRESH, "llama", "modern"), (AGAIN, "scratch", "scratch-modern")],
    ),
    ("squared ReLU beats GELU", "2109.08668", [(ARCHITECTURES, "theta_relu2", "modern")]),
    ("Mamba-2 is as good as Transformer++", "2405.21060", [(ARCHITECTURES, "mamba2", "llama")]),
    ("nGPT: 4 to 20 times as fast", "2410.01131", [(ARCHITECTURES, "ngpt", "llama")]),
    (
        "mixtures beat dense models",
        "2101.03961",
        [
            (ARCHITECTURES, "mixtral_auxiliary", "llama"),
            (EXPERTS, "scratch", "small-virtual_groups"),
            (EXPERTS, "scratch-duplicate_experts", "small-virtual_groups"),
        ],
    ),
    (
        "upcycled beats the dense trained longer",
        "2212.05055",
        [(EXPERTS, "upcycle", "small"), (EXPERTS, "virtual_groups", "small-virtual_groups")],
    ),
    (
        "balance without a loss beats the loss",
        "2408.15664",
        [(ARCHITECTURES, "mixtral_loss_free", "mixtral_auxiliary")],
    ),
]
SHARE = ("value", "side", "low", "high", "own_low", "own_high", "word")
BITS = ("value", "low", "high", "own_low", "own_high", "word")
BLUES = {0.5: "#1d4ed8", 0.15: "#7fa8ee"}  # by the share of the length that rates were tuned at
PAID, PUBLISHED = "#8a8a8a", "#b45309"


def picked(found: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: found[key] for key in keys}


def saving(report: dict[str, Any], arm: str) -> dict[str, Any]:
    """Of a grown arm: FLOPs to its own scratch's final loss; of one that grows once also, at half of the budget, the
    small model's taken as paid."""
    (own,) = [each for each in report["own_controls"] if (each["arm"], each["share"]) == (arm, 1.0)]
    (paid,) = [each for each in report["sunk"] if (each["arm"], each["share"]) == (arm, 0.5)]
    bits = picked(own["controls"]["scratch"]["pair"], BITS)
    once = len(report_arm(report, arm)["runs"][-1]["growth"]) == 1
    paid = {"value": paid["ratio"], **picked(paid, ("side", "low", "high"))} if once else None
    return {"share": picked(own["flops_to_scratch"], SHARE), "paid_at_half": paid, "bits_minus_scratch": bits}


def report_arm(report: dict[str, Any], name: str) -> dict[str, Any]:
    return next(arm for arm in report["arms"] if arm["name"] == name)


def size(report: dict[str, Any], arm: str) -> dict[str, Any]:
    """Of a size from scratch: its FLOPs to the reference's final loss."""
    return {"share": picked(report["reach"][-1]["ratios"][arm], SHARE), "paid_at_half": None}


def difference(report: dict[str, Any], arm: str, rival: str) -> dict[str, Any]:
    """arm - rival in bits per byte at the whole budget."""
    pair = pair_of(report["budgets"][-1], arm, rival)
    assert pair is not None, (arm, rival)
    return picked(pair, BITS)


def measure() -> dict[str, Any]:
    names = (LLAMA, AGAIN, REST, TOKENS, ROTATED, LONG, EXPERTS, ARCHITECTURES, FRESH)
    found = {name: json.loads((RECORDS / name / "report.json").read_text()) for name in names}

    def named(record: str, arm: str, **more: Any) -> dict[str, Any]:
        return {"record": record, "arm": arm, "tuned_at": found[record]["race"]["tune_fraction"], **more}

    savings = [
        {
            "claim": claim,
            "paper": paper,
            "published_share": share,
            "here": [named(record, arm, **saving(found[record], arm)) for record, arm in arms],
        }
        for claim, paper, share, arms in SAVINGS
    ]
    sizes = [named(record, arm, **size(found[record], arm)) for record, arm in SIZES]
    savings.append({"claim": "no growth: half the layers, from scratch", "published_share": None, "here": sizes})
    architectures = [
        {
            "claim": claim,
            "paper": paper,
            "here": [
                named(record, arm, rival=rival, bits=difference(found[record], arm, rival))
                for record, arm, rival in arms
            ],
        }
        for claim, paper, arms in RIVALS
    ]
    return {"savings": savings, "architectures": architectures}


def draw(numbers: dict[str, Any], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.6, 11.6), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    left = figure.add_axes((0.235, 0.125, 0.255, 0.775))
    right = figure.add_axes((0.775, 0.125, 0.215, 0.775))
    rows: list[tuple[str, bool]] = []
    for claim in numbers["savings"]:
        if claim["published_share"]:
            low, high = claim["published_share"]
            left.plot([low, high], [len(rows)] * 2, color=PUBLISHED, lw=2.5, solid_capstyle="butt")
            if low == high or high == 1:
                left.plot([low], [len(rows)], "D", color=PUBLISHED, ms=6)
        rows.append((claim["claim"], True))
        for here in claim["here"]:
            if here["paid_at_half"]:
                point(left, here["paid_at_half"], len(rows) + 0.22, PAID, hollow=True)
            point(left, here["share"], len(rows) - 0.12, BLUES[here["tuned_at"]])
            rows.append((f"{here['arm']}, {short(here['record'])}", False))
    left.axvline(1, color="#333333", lw=1)
    left.axvline(0.7, color="#333333", lw=0.8, ls=(0, (4, 3)))
    left.axvline(0.8, color=PAID, lw=0.8, ls=(0, (1, 2)))
    left.set_xlim(0.14, 1.35)
    label(left, rows, "share of scratch's FLOPs (left of 1: saved)")
    rows = []
    for claim in numbers["architectures"]:
        rows.append((claim["claim"], True))
        for here in claim["here"]:
            point(right, {**here["bits"], "side": ""}, len(rows), BLUES[here["tuned_at"]])
            rows.append((f"{here['arm']} − {here['rival']}, {short(here['record'])}", False))
    right.axvline(0, color="#333333", lw=1)
    label(right, rows, "bits per byte, difference (left of 0: better)")
    figure.text(0.012, 0.968, "Published claims at half a million parameters", size=16, weight="bold", color="#1a1a1a")
    for x, text in ((0.235, "What growing saves"), (0.775, "Architectures")):
        figure.text(x, 0.915, text, size=12, weight="bold", color="#333333")
    legend = [
        ("D", PUBLISHED, PUBLISHED, "published"),
        ("o", BLUES[0.5], BLUES[0.5], "here, rates tuned at half of the length; all FLOPs counted"),
        ("o", BLUES[0.15], BLUES[0.15], "the same, tuned at 15 %: too short"),
        ("o", PAID, "white", "the small model taken as paid, half of the budget"),
    ]
    for place, (mark, edge, face, text) in zip((0, 0.1, 0.46, 0.70), legend, strict=True):
        handle = left.plot([], [], mark, color=edge, mfc=face, ms=6)[0]
        where = {"loc": "lower left", "bbox_to_anchor": (place, 0.046), "frameon": False, "fontsize": 9}
        figure.legend([handle], [text], **where)
    note = (
        "95 % intervals of three paired seeds. An arrow: only a bound is known. Published: at the papers' own scale, in"
        " FLOPs, tokens or time; a line to 1 is “up to”. Dashed: this project's aim, 0.7.\nBlue: to the final loss of"
        " the arm's own size from scratch; grey: from the growth on, over what that needs to the grown model's loss;"
        " 0.8, dotted, where nothing is gained.\nGrown once, at a tenth of the budget; MIDAS by a layer at 0.1, 0.2 and"
        " 0.3, ReLoRA merged three times."
    )
    figure.text(0.012, 0.012, note, size=8.5, color="#666666", linespacing=1.4)
    figure.savefig(path, format="png", metadata={"Software": None})


def short(record: str) -> str:
    return record[11:].replace("_", " ")


def point(axes: Any, found: dict[str, Any], place: float, color: str, hollow: bool = False) -> None:
    """A value with its interval, or arrows from it where only a bound is known."""
    value = found["value"]
    for step in {"more than": (0.08,), "less than": (-0.08,), "unbounded": (0.08, -0.08)}.get(found["side"], ()):
        arrow = {"arrowstyle": "->", "color": color, "lw": 1.3}
        axes.annotate("", (value + step, place), (value, place), arrowprops=arrow)
    if not found["side"] and found["low"] is not None:
        axes.plot([found["low"], found["high"]], [place, place], color=color, lw=1.6)
    axes.plot([value], [place], "o", color=color, mfc="white" if hollow else color, ms=5)


def label(axes: Any, rows: list[tuple[str, bool]], text: str) -> None:
    axes.set_ylim(len(rows) - 0.3, -0.7)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=8.5)
    for place, (tick, (_, head)) in enumerate(zip(axes.get_yticklabels(), rows, strict=True)):
        tick.set(color="#1a1a1a" if head else "#666666", weight="bold" if head else "normal")
        if head and place:
            axes.axhline(place - 0.5, color="#e5e5e5", lw=0.8, zorder=0)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=9)
    axes.set_xlabel(text, fontsize=9.5)
    axes.spines[["top", "right", "left"]].set_visible(False)


def main(out: Path) -> None:
    numbers = measure()
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(numbers, indent=1) + "\n")
    draw(numbers, out / "report.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent)
