"""What a headline run reaches on text that nothing of a run was chosen by (docs/fairness.md, rule 26)."""

import hashlib
import math
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import runs
from ..checkpoint import find_checkpoint, load_checkpoint, restore_carried
from ..data import cache_root, load_tokenizer, require_file, text_windows
from ..distributed import Ranks, choose_device
from ..evaluate import evaluate
from ..recipe import Recipe
from ..train import rows_at_once
from .jobs import FINAL

JUDGED = "judged.json"  # in the cache: final text -> the races that it has judged
STRETCHES = 20  # of the final text, alike in length, over which a difference is a sample of differences


def evaluate_final(recipe: Recipe, folder: Path, text: str, most_tokens: int) -> None:
    """Write RUN/final.json, unless it is there: what `judge` finds."""
    if not (folder / FINAL).exists():
        runs.remove_unfinished(folder)  # a kill while this was written, after which training has nothing to do
        runs.write_json(folder / FINAL, judge(recipe, folder, text, most_tokens))


def judge(recipe: Recipe, folder: Path, text: str, most_tokens: int) -> dict[str, Any]:
    """Bits per byte of a run's last checkpoint on the beginning of a text file, whole windows of at most so many
    tokens, and in its stretches."""
    device = choose_device(recipe.train.device, Ranks())
    newest = find_checkpoint(folder)
    model, _ = load_checkpoint(newest)
    restore_carried(newest, model)
    model, rows, measured = model.to(device), rows_at_once(recipe, Ranks()), []
    for part in zip(*(each.tensor_split(STRETCHES) for each in final_windows(recipe, text, most_tokens)), strict=True):
        if len(part[0]):
            measured.append(evaluate(model, part, rows, device, recipe.train.dtype))
    return {"text_sha256": sha256_of(text), **together(measured)}


def together(measured: list[dict[str, float]]) -> dict[str, Any]:
    """What `evaluate` finds of a text, from what it found of its stretches, and the bits per byte of these."""
    tokens, size = (sum(part[key] for part in measured) for key in ("tokens", "bytes"))
    nats = math.fsum(part["loss"] * part["tokens"] for part in measured)
    bits = [part["bits_per_byte"] for part in measured]
    return {
        "loss": nats / tokens,
        "bits_per_byte": nats / math.log(2) / size,
        "tokens": tokens,
        "bytes": size,
        "stretches": bits if len(bits) == STRETCHES else None,
    }


def sha256_of(text: str) -> str:
    return hashlib.sha256(Path(text).read_bytes()).hexdigest()


def judged(sha256: str | None) -> list[dict[str, str]]:
    """The races that a final text has judged on this machine, as far as is known: name, and when each began."""
    try:
        return list(runs.read_json(cache_root() / JUDGED).get(sha256 or "", []))
    except (OSError, ValueError):
        return []


def note_judged(folder: Path, sha256: str) -> None:
    """Keep that a final text has judged the race in a folder. ValueError where the cache cannot be written."""
    race, path = runs.read_json(folder / runs.RACE), cache_root() / JUDGED
    mine = {"race": str(race["name"]), "began": str(race["environment"]["started"])}
    with runs.locked(path.parent):
        if mine not in judged(sha256):
            known = runs.read_json(path) if path.exists() else {}
            runs.write_json(path, {**known, sha256: [*judged(sha256), mine]})


def require_another_text(recipe: Recipe, text: str) -> None:
    """ValueError where the text is no file, or the one that learning rates are tuned by, whatever its name."""
    held_out = recipe.data.valid_source
    require_file("race.final_text", text)
    if held_out is not None and Path(held_out).is_file() and sha256_of(held_out) == sha256_of(text):
        raise ValueError(
            f"race.final_text = {text!r}: is the same text as data.valid_source = {held_out!r}, which learning rates "
            "are tuned by; it must be another"
        )


def final_windows(recipe: Recipe, text: str, most_tokens: int) -> tuple[Tensor, Tensor]:
    """Token ids and bytes, (W, T + 1) each; ValueError where the text fills no window."""
    length = recipe.data.sequence_length
    try:
        tokens, sizes = text_windows([text], load_tokenizer(recipe.data.tokenizer), length)[0]
    except ValueError as error:
        raise ValueError(f"race.final_text: {str(error).removeprefix('--text ')}") from None
    count = min(len(tokens), most_tokens // length)
    if tokens.shape[1] != length + 1 or not count:
        raise ValueError(f"race.final_text = {text!r}: holds less than one window of {length} tokens")
    return tokens[:count], sizes[:count]
