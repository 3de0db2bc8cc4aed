"""What a headline run reaches on text that nothing of a run was chosen by (docs/fairness.md, rule 26)."""

import hashlib
from pathlib import Path

from torch import Tensor

from .. import runs
from ..checkpoint import find_checkpoint, load_checkpoint, restore_carried
from ..data import load_tokenizer, require_file, text_windows
from ..distributed import Ranks, choose_device
from ..evaluate import evaluate
from ..recipe import Recipe
from ..train import rows_at_once
from .jobs import FINAL


def evaluate_final(recipe: Recipe, folder: Path, text: str, most_tokens: int) -> None:
    """Write RUN/final.json, unless it is there: bits per byte of the run's last checkpoint on the beginning of a text
    file, whole windows of at most so many tokens."""
    if (folder / FINAL).exists():
        return
    runs.remove_unfinished(folder)  # a kill while this was written, after which training has nothing to do
    device = choose_device(recipe.train.device, Ranks())
    newest = find_checkpoint(folder)
    model, _ = load_checkpoint(newest)
    restore_carried(newest, model)
    windows = final_windows(recipe, text, most_tokens)
    rows = rows_at_once(recipe, Ranks())
    measured = evaluate(model.to(device), windows, rows, device, recipe.train.dtype)
    runs.write_json(folder / FINAL, {"text_sha256": sha256_of(text), **measured})


def sha256_of(text: str) -> str:
    return hashlib.sha256(Path(text).read_bytes()).hexdigest()


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
