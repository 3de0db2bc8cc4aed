"""The small parts of the page: escaped text, tables, an arm's name with its colour."""

from __future__ import annotations

import json
import re
from html import escape
from typing import Any

from .charts import colour_of, dashing, shade
from .units import MISSING

MOST_ENTRIES = 8
FITTING = 8  # columns that the width of the text has room for
# A byte model may emit any control character; all but tab and newline are shown as pictures of themselves.
CONTROL = {**{code: 0x2400 + code for code in range(32) if code not in (9, 10)}, 127: 0x2421}


def e(value: Any) -> str:
    """`value` as HTML text: escaped, control characters made visible, broken surrogates replaced."""
    text = str(value).translate(CONTROL).encode("utf-8", "replace").decode("utf-8")
    return escape(text, quote=True)


def prose(text: str) -> str:
    """Escaped, with **names** bold."""
    return re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", e(text))


def shown(value: Any) -> str:
    """A value of a recipe or an environment, as text; of a long list its beginning."""
    if value is None:
        return MISSING
    if isinstance(value, float) and abs(value) >= 1e7:
        return f"{value:.12g}"
    if isinstance(value, list) and len(value) > MOST_ENTRIES:
        return f"{shown(value[:MOST_ENTRIES])[:-1]}, … {len(value):,} in all]"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def table(head: list[str], rows: list[list[str]], classes: str = "", numbers: tuple[int, ...] = ()) -> str:
    """Cells are HTML already; the columns in `numbers` are set flush right. A hint is shown where not all fit."""

    def cell(tag: str, column: int, html: str) -> str:
        mark = ' class="n"' if column in numbers else ""
        scope = ' scope="col"' if tag == "th" else ""
        return f"<{tag}{mark}{scope}>{html}</{tag}>"

    top = "".join(cell("th", i, h) for i, h in enumerate(head))
    body = "".join(f"<tr>{''.join(cell('td', i, c) for i, c in enumerate(row))}</tr>" for row in rows)
    rows_html = f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody>"
    hint = f'<p class="small hint" hidden>Scrolls sideways: {len(head) - 1} columns.</p>'
    wide = " fit" if len(head) > FITTING else ""  # goes beyond the text, as far as the window does
    return f'{hint}<div class="scroll{wide}"><table class="{classes}">{rows_html}</table></div>'


def pairs(
    values: dict[str, Any], marked: list[str] | None = None, flagged: dict[str, str] | None = None
) -> str:
    """Two columns, key and value; `marked` keys differ between arms, `flagged` ones are warned of in red."""
    rows = []
    for key, value in values.items():
        style = (
            ' class="bad"' if key in (flagged or {}) else ' class="differs"' if key in (marked or []) else ""
        )
        note = f' <span class="why">{e(flagged[key])}</span>' if flagged and key in flagged else ""
        rows.append(f"<tr{style}><th scope=row>{e(key)}</th><td>{e(shown(value))}{note}</td></tr>")
    return f'<div class="scroll"><table class="pairs"><tbody>{"".join(rows)}</tbody></table></div>'


def name_of(report: dict[str, Any], arm: dict[str, Any]) -> str:
    if report["kind"] == "run":
        return f"<b>{e(arm['name'])}</b>"
    colour = colour_of(report, arm)
    dash = ("", " dashed", " dotted")[dashing(colour)]  # as the lines of the charts
    name = e(arm["name"]).replace("_", "_<wbr>")  # where a narrow column may break it
    return f'<i class="swatch f{shade(colour)}{dash}"></i><b>{name}</b>'
