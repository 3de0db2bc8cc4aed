"""A checkpoint on the disk made smaller: ranked, cut, measured before and after, written anew. The old one stays.

    OUT/                  an ordinary checkpoint: weights, configuration, tokenizer, moments if there were any, lineage
    OUT.curve.json, .png  beside it, where asked for: bits per byte against size, over several shares of the same rows
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import checkpoint as files
from . import runs
from .curve import write_curve
from .data import eval_windows, held_out_name, load_tokenizer, prepare, text_windows
from .evaluate import evaluate, require_vocabulary
from .grow_checkpoint.write import copy_others
from .optim import AdamW, named_state, parameter_groups
from .rows import RULES, RULES_OF_TEXT, ranking
from .shrink import Keep, cut, kept_sizes

CALIBRATION_TOKENS = 100_000  # at most so many are ranked on
HELD_OUT = 5  # one window in so many of a text that is for both is not ranked on, but measured on
BATCH = 8  # windows that pass through the model at a time
CURVE = (1.0, 0.75, 0.5, 0.25, 0.125, 0.0625, 0.03125)


@dataclass(frozen=True)
class Text:
    """calibration: token ids (W, T + 1) to rank rows on; held_out: ids and bytes (W, T + 1) to measure on."""

    calibration: Tensor | None = None
    held_out: tuple[Tensor, Tensor] | None = None
    source: str = ""  # of what is held out

    @property
    def windows(self) -> list[Tensor]:
        ranked = [] if self.calibration is None else [self.calibration]
        return ranked if self.held_out is None else [*ranked, self.held_out[0]]

    @property
    def batches(self) -> list[Tensor]:
        return [] if self.calibration is None else list(self.calibration.split(BATCH))


@files.quiet()
def shrink_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    keep: Keep,
    by: str,
    section: Any,
    text: Sequence[str] = (),
    curve: bool = False,
    device: torch.device | str = "cpu",
    say: Callable[[str], None] = print,
) -> Path:
    """Cut rows of the model in `checkpoint` (a folder, or a run's newest) as `shrink` does, into the new folder `out`.

    section: a [data] whose held-out text is measured on. Where that names no source, or one that is not to be had, the
    last fifth of `text` is, and the rest is what rows are ranked on; else all of it is that. Moments, if the checkpoint
    has them, keep to their rows; position and random states of its run are left behind; its cost is in the lineage,
    which gets one entry.
    Raises ValueError as `shrink` and `load_checkpoint` do, for a place that is taken, or a text that is too short;
    nothing half written is left.
    """
    out, folder = Path(out), files.find_checkpoint(checkpoint)
    require_possible(folder, out, keep, by, text, curve)
    texts = text_of(section, text, say)
    if curve and texts.held_out is None:
        raise ValueError("--curve: there is no text to measure on; name one by --text")
    require_vocabulary(texts.windows, files.load_config(folder), folder)
    model, lineage = files.load_checkpoint(folder)
    model.to(device)
    optimizer = None
    if (folder / files.OPTIMIZER).exists():
        optimizer = AdamW(parameter_groups(model, weight_decay=0.1))
        files.load_moments(folder, model, optimizer)

    ranked = ranking(model, by, texts.batches)
    small = cut(model, kept_sizes(model.config, keep), ranked, optimizer)
    moments = {} if optimizer is None else named_state(small.optimizer, small.model)
    files.require_room(out, files.bytes_of([*small.model.parameters(), *moments.values()]))
    tokens = 0 if texts.calibration is None else texts.calibration[:, 1:].numel()
    event = {
        **small.event,
        "options": {"keep": keep, "by": by},
        "moments": "none stored" if optimizer is None else "kept",
        "calibration_tokens": tokens if by in RULES_OF_TEXT else 0,
        "ancestor": files.ancestry(folder),
    }
    if "trained_parameters" in (lineage or [{}])[-1]:
        event["trained_parameters"] = lineage[-1]["trained_parameters"]
    if texts.held_out is not None:
        event["measured"] = {
            "text": texts.source,
            "before": evaluate(model, texts.held_out, BATCH, device),
            "after": evaluate(small.model, texts.held_out, BATCH, device),
        }
    points = measured_curve(model, keep, by, ranked, texts, device, say) if curve else []
    with files.written_whole(out) as temporary:
        small.model.save_pretrained(temporary)
        if optimizer is not None:
            files.save_tensors(moments, temporary / files.OPTIMIZER)
        copy_others(folder, temporary)
        runs.write_json(temporary / files.LINEAGE, [*lineage, event])
        if curve:  # last in here, so that there is a checkpoint with its curve, or neither
            write_points(out, {"checkpoint": str(folder), "by": by, "text": texts.source, "points": points})
    for line in words(event):
        say(line)
    if curve:
        say(f"curve: {', '.join(map(str, curve_paths(out)))}")
    say(f"written: {out}")
    return out


def require_possible(folder: Path, out: Path, keep: Keep, by: str, text: Sequence[str], curve: bool) -> None:
    """ValueError, before any work, for what is asked wrongly, or a place that is taken."""
    if by not in RULES:
        raise ValueError(f"--by {by}: is not known; allowed: {', '.join(RULES)}")
    if by in RULES_OF_TEXT and not text:
        raise ValueError(f"--by {by}: looks at what rows do on a text; name one by --text")
    files.require_nothing_carried(folder)
    kept_sizes(files.load_config(folder), keep)
    files.require_free(out, folder)
    for path in curve_paths(out) if curve else ():
        if path.exists():
            raise ValueError(f"{path} already exists; choose another place")


def text_of(section: Any, paths: Sequence[str], say: Callable[[str], None]) -> Text:
    """Windows to rank on and to measure on, of the section's sequence_length."""
    length, tokens = section.sequence_length, None
    if paths:
        parts = text_windows(paths, load_tokenizer(section.tokenizer), length)
        tokens, sizes = parts[0]
        if len(tokens) < HELD_OUT or tokens.shape[1] <= length:
            raise ValueError(
                f"--text {' '.join(paths)}: is shorter than {HELD_OUT} windows of {length} tokens; take more text, or "
                "a smaller --sequence-length"
            )
    most = max(1, CALIBRATION_TOKENS // length)
    if section.source:
        try:
            held_out = eval_windows(prepare(section, 0, progress=say), length)
            return Text(None if tokens is None else tokens[:most], held_out, held_out_name(section))
        except ValueError as error:  # a checkpoint outlives the text that it was trained on
            say(f"the held-out text of the checkpoint is not to be had: {error}")
    if tokens is None:
        return Text()
    first = len(tokens) - len(tokens) // HELD_OUT
    source = f"last fifth of {' '.join(paths)}"
    return Text(tokens[:first][:most], (tokens[first:][:most], sizes[first:][:most]), source)


def measured_curve(
    model: Any,
    keep: Keep,
    by: str,
    ranked: Mapping[str, Tensor],
    texts: Text,
    device: torch.device | str,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Size and held-out loss at the shares of CURVE that leave a row, and at `keep` where it is one number."""
    assert texts.held_out is not None
    fields = list(keep) if isinstance(keep, Mapping) else None
    shares = {*CURVE, *(() if isinstance(keep, Mapping) else (keep,))}
    points, told = [], time.monotonic()
    for share in sorted(shares, reverse=True):
        try:
            sizes = {} if share == 1 else kept_sizes(model.config, dict.fromkeys(fields, share) if fields else share)
        except ValueError:  # less than one row, or as many as there are
            continue
        small = cut(model, sizes, ranked).model if sizes else model
        numbers = evaluate(small, texts.held_out, BATCH, device)
        parameters = sum(p.numel() for p in small.parameters())
        points.append({"keep": share, "parameters": parameters, "rows": sizes, **numbers})
        if time.monotonic() - told > 5:
            told = time.monotonic()
            say(f"keep {share:g}: {numbers['bits_per_byte']:.4f} bits per byte")
    return points


def curve_paths(out: Path) -> tuple[Path, Path]:
    return out.with_name(f"{out.name}.curve.json"), out.with_name(f"{out.name}.curve.png")


def write_points(out: Path, curve: dict[str, Any]) -> None:
    dots = [(p["parameters"], p["bits_per_byte"], f"{p['keep']:g}") for p in curve["points"]]
    x_label = "parameters; at each point, the share of the rows that is kept"
    write_curve(curve_paths(out)[0], curve, {curve["by"]: dots}, x_label, f"rows kept by {curve['by']}")


def words(event: Mapping[str, Any]) -> list[str]:
    """What was cut, and what it cost."""
    sizes = ", ".join(f"{name} {old} -> {event['to'][name]}" for name, old in event["from"].items())
    lines = [f"{sizes}, {event['parameters_before']:,} -> {event['parameters_after']:,} parameters"]
    if event["scales"]:
        lines[0] += "; " + ", ".join(f"{name} {scale:.6g}" for name, scale in event["scales"].items())
    if event["moments"] == "kept":
        lines.append("the optimizer's moments keep to their rows")
    if "measured" not in event:
        return [*lines, "the loss is not measured: the checkpoint names no text; --text PATH does"]
    before, after = event["measured"]["before"], event["measured"]["after"]
    return [
        *lines,
        f"loss {before['loss']:.4f} -> {after['loss']:.4f} nats per token, {before['bits_per_byte']:.4f} -> "
        f"{after['bits_per_byte']:.4f} bits per byte ({before['tokens']:,} tokens: {event['measured']['text']})",
    ]
