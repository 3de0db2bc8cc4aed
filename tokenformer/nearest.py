"""What a misspelt word may have meant."""

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str], kind: str = "name") -> str:
    """ "; nearest valid name: ffn or ffn_tokens", three at most, the nearest first; nothing where none is near."""
    found = difflib.get_close_matches(word, list(known), n=3, cutoff=0.5)
    return f"; nearest valid {kind}: {' or '.join(found)}" if found else ""
