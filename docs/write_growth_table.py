"""Writes the tables of docs/growth.md: every operator on every architecture, measured. Seconds.

    python docs/write_growth_table.py            # rewrite the section between the markers
    python docs/write_growth_table.py --check    # exit 1 if it is not what would be written

Each cell is two growths of a tiny model in float64, by a whole multiple and by none (tests/architectures.py).
"""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from architectures import SAME, fields_of, logits_of, model_of, sizes_of, untrained  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import PreTrainedModel  # noqa: E402

from tokenformer.growth import OPERATORS, grow  # noqa: E402
from tokenformer.models.axes import table_of  # noqa: E402

PAGE = ROOT / "docs" / "growth.md"
BEGIN, END = "<!-- written by docs/write_growth_table.py -->\n", "<!-- end of what is written -->\n"
COLUMNS = {
    "Llama": "llama",
    "Mistral": "mistral",
    "Qwen2": "qwen2",
    "Qwen3": "qwen3",
    "GPT-2": "gpt2",
    "Mixtral": "mixtral",
    "Mamba-2": "mamba2",
    "nGPT": "ngpt",
    "TokenFormer": "tokenformer",
    "· RMSNorm": "tokenformer rms",
    "· linear": "tokenformer linear",
    "· softmax": "tokenformer softmax",
    "· SiLU": "tokenformer silu",
}
LEGEND = """
Each cell is two growths of a tiny model in float64, by a whole multiple and by none, norms, rotary positions and
routers in float64 too, which transformers works in float32. `exact`: the logits of both are at most 1e-10 from the
old ones. `multiples`: so for whole multiples (of `rotated_keys`: for enough new rows), and
refused for other sizes. `together`: exact with
all widths at once, refused alone. `~0.4`: the logits move by that part of the largest of them; of two numbers the first
is for a whole multiple. `no`: refused. Small numbers are the reasons, below. Empty: no such thing to grow. TokenFormer
is as published (LayerNorm, tied head), then with RMSNorm and gated feed-forward, with linear attention projections and
RMSNorm, with a softmax over its tokens, and with SiLU without a norm.
LiGO's numbers are those of its maps before they have learned anything.
"""


class Notes:
    """Reasons of refusals, each told once, by number."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def mark(self, error: str) -> str:
        reason = re.sub(r"^(to|operator)[.\w]*: ", "", error)
        reason = re.sub(
            r"^\w+ cannot grow this exactly: |; [\w, ]+ can$|; no other operator can$", "", reason
        )
        reason = re.sub(r"^(\w+): (.*); \w+: \2$", r"\1: \2", reason)  # of several axes the first
        reason = re.sub(r"^\d+ is not a multiple of (the model's )?\d+", "the size is no whole multiple", reason)
        few = "fewer new rows than old ones, and than these are wide"
        reason = re.sub(r"^\d+ is too small; rotated_keys.*", few, reason)
        reason = re.sub(r": \w+=\d+.*|; for tile, nearest.*|^\d+; ", "", reason)
        return f" <sup>{self.numbers.setdefault(reason, len(self.numbers) + 1)}</sup>"

    def lines(self) -> list[str]:
        return [f"{number}. {reason}" for reason, number in self.numbers.items()]


def page_section() -> str:
    notes = Notes()
    tables = [line for field in fields() for line in table(field, notes)]
    return "\n".join(["", *operators(), LEGEND, *tables, "### Reasons of refusals", "", *notes.lines(), ""])


def operators() -> list[str]:
    """What each operator declares."""
    rows = [f"| `{o.name}` | {o.promise} | {'yes' if o.symmetric else ''} | {o.source} |" for o in OPERATORS.values()]
    return ["| operator | promise | copies stay equal without noise | source |", "|---|---|---|---|", *rows]


def fields() -> list[str]:
    """Everything that some operator grows in some architecture, as most of them call it; layers last."""
    named = [SAME.get(field, field) for name in COLUMNS.values() for field in fields_of(name)]
    return sorted(dict.fromkeys(named), key=lambda field: field == "num_hidden_layers")


def table(field: str, notes: Notes) -> list[str]:
    """One field: the operators that grow it by the architectures that have it."""
    own = {label: own_field(name, field) for label, name in COLUMNS.items()}
    labels = [label for label, name in own.items() if name]
    axes = {table_of(model_of(COLUMNS[label]).config).grows.get(own[label]) for label in labels} - {None}
    axes = axes or {"layers"}
    rows = []
    for operator in [each for each in OPERATORS if set(OPERATORS[each].axes) & axes]:
        cells = [cell(operator, COLUMNS[label], own[label], notes) for label in labels]
        rows.append(f"| `{operator}` | {' | '.join(cells)} |")
    if not rows:
        return []
    return [f"### {field}", "", f"| | {' | '.join(labels)} |", f"|---|{'---|' * len(labels)}", *rows, ""]


def own_field(name: str, field: str) -> str | None:
    """What the architecture calls the field; None if it has none, nor says why it does not grow."""
    known = table_of(model_of(name).config)
    own = known.names.get(field, field)
    return own if own in (*known.grows, *known.refuses, "num_hidden_layers") else None


def cell(operator: str, name: str, field: str, notes: Notes) -> str:
    model = model_of(name, layers=1) if operator == "jump" else model_of(name)
    known = table_of(model.config)
    if field in known.refuses:
        return f"no{notes.mark(known.refuses[field])}"
    if field not in OPERATORS[operator].fields(known):
        return ""
    (whole, why), (other, why_other) = (change(operator, model, {field: size}) for size in sizes_of(name, field))
    if whole is None:  # a refusal may say what it would do
        sizes = {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", why)}
        together = bool(sizes) and change(operator, model, sizes)[0] is not None
        return f"{'together' if together else 'no'}{notes.mark(why)}"
    if OPERATORS[operator].exact:
        assert max(whole, other or 0.0) <= 1e-10, (operator, name, field, whole, other)
        return "exact" if other is not None else f"multiples{notes.mark(why_other)}"
    words = dict.fromkeys(f"~{size:.1g}" if size > 1e-10 else "0" for size in (whole, other) if size is not None)
    return ", ".join(words) + (notes.mark(why_other) if other is None else "")


def change(operator: str, model: PreTrainedModel, to: dict[str, int]) -> tuple[float | None, str]:
    """How far the logits move, over the largest of them; or None and why the growth is refused."""
    try:
        grown = grow(model, operator, to, options=untrained(operator)).model
    except ValueError as error:
        return None, str(error)
    logits = old_logits(model)
    return ((logits_of(grown) - logits).abs().max() / logits.abs().max()).item(), ""


@cache
def old_logits(model: PreTrainedModel) -> Tensor:
    return logits_of(model)


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    made = before + BEGIN + page_section() + END + after
    if "--check" in sys.argv[1:]:
        sys.exit(0 if made == page else "docs/growth.md is not current; run python docs/write_growth_table.py")
    PAGE.write_text(made, encoding="utf-8")
