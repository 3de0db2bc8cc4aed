"""Numbers and text as a reader wants to see them, and the tick marks of an axis."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable

PREFIXES = {1e24: "Y", 1e21: "Z", 1e18: "E", 1e15: "P", 1e12: "T", 1e9: "G", 1e6: "M", 1e3: "k", 1.0: ""}
MISSING = "–"


def printable(text: str) -> str:
    """A model's text for a terminal: control characters, which it would obey, become U+FFFD; newlines and tabs stay.

    So do halves of surrogate pairs, which no encoding can write.
    """
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") else "\ufffd" for c in text)


def prefix(value: float) -> tuple[float, str]:
    """The SI factor and its letter that write `value` with one to three digits before the point."""
    for factor, letter in PREFIXES.items():
        if abs(value) >= factor * 0.9995:
            return factor, letter
    return 1.0, ""


def digits(value: float, significant: int = 3) -> str:
    """`value` with that many significant digits, trailing zeros kept: 1.20, 12.0, 120."""
    if value == 0:
        return "0"
    before = int(f"{value:.{significant - 1}e}".split("e")[1]) + 1  # after rounding: 99.96 has three
    return f"{value:.{max(0, significant - before)}f}"


def flops_text(value: float | None) -> str:
    if value is None:
        return MISSING
    factor, letter = prefix(value)
    return f"{digits(value / factor)} {letter}FLOP"


def low_to_high(values: list[float], text: Callable[[float], str]) -> str:
    """ "3.2 to 47.6", or one of them where both read alike."""
    low, high = text(min(values)), text(max(values))
    return low if low == high else f"{low} to {high}"


def count_text(value: float | None) -> str:
    """A number of parameters or tokens: 9,216 in full, then 412 k, 1.23 M."""
    if value is None:
        return MISSING
    if abs(value) < 10_000:
        return f"{value:,.0f}"
    factor, letter = prefix(value)
    return f"{digits(value / factor)} {letter}"


def seconds_text(value: float | None) -> str:
    if value is None:
        return MISSING
    if value < 100:
        return f"{digits(value)} s"
    if value < 7200:
        return f"{int(value // 60)} min {int(value % 60):02d} s"
    return f"{int(value // 3600)} h {int(value % 3600 // 60):02d} min"


def bits_text(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3f}"


def gap_text(value: float) -> str:
    """A difference in bits per byte without its sign: three decimals, four where three would hide it."""
    size = abs(value)
    if size == 0 or size >= 0.0005:
        return f"{size:.3f}"
    return f"{size:.4f}" if size >= 0.00005 else "<0.0001"


def signed(value: float) -> str:
    """A difference with its sign: +0.012, −0.0003; what is closer to 0 than is shown, as <+0.0001 or >−0.0001."""
    sign, size = "−" if value < 0 else "+", gap_text(value)
    return f"{sign}{size}" if size[0] != "<" else f"{'>' if value < 0 else '<'}{sign}{size[1:]}"


def small_text(value: float | None) -> str:
    """A rounding-sized number such as the change of the logits: 2.4e-7."""
    if value is None:
        return "not measured"
    if value == 0:
        return "0"
    if 1e-2 <= abs(value) < 1e3:
        return digits(value, 2)
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def linear_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Multiples of 1, 2, 2.5 or 5 times a power of ten within [low, high], about `wanted` of them."""
    raw = (high - low) / max(wanted, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = min((m * power for m in (1, 2, 2.5, 5, 10)), key=lambda s: abs((high - low) / s - wanted))
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 in each decade where few decades are shown, the decades alone where many are."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if math.log10(high / low) <= 2.2 else (1,)
    return [m * 10.0**d for d in decades for m in steps if low * 0.999 <= m * 10.0**d <= high * 1.001]


def tick_texts(ticks: list[float]) -> list[str]:
    """The ticks with as many decimals as the finest needs, the same for all; on a log axis each its own."""
    gaps = {round(b - a, 12) for a, b in zip(ticks, ticks[1:], strict=False)}
    if len(gaps) > 1 and max(gaps) > 1.5 * min(gaps):
        return [f"{t:.10f}".rstrip("0").rstrip(".") if t < 1 else f"{t:,.0f}" for t in ticks]
    decimals = next((d for d in range(8) if all(abs(round(t, d) - t) < 1e-9 for t in ticks)), 8)
    return [f"{t:,.{decimals}f}" for t in ticks]
