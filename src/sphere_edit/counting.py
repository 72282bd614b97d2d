"""Counts with their nouns, as every message, table and page forms them."""

from __future__ import annotations

_IRREGULAR = {"matrix": "matrices", "was": "were"}
_OFTEN = ("never", "once", "twice")


def counted(number: int, noun: str) -> str:
    """``1 fact``, ``2 facts``, ``1,050 facts``; of a phrase the last word is made plural."""
    return f"{number:,} {several(number, noun)}"


def every(number: int, noun: str) -> str:
    """``All 60 facts``; of one, ``1 fact``."""
    return f"{'' if number == 1 else 'All '}{counted(number, noun)}"


def several(number: int, word: str) -> str:
    """A noun, or one of the few verbs named above, as it stands with ``number``."""
    first, space, last = word.rpartition(" ")
    return word if number == 1 else f"{first}{space}{_plural(last)}"


def _plural(word: str) -> str:
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    return word + ("es" if word.endswith(("s", "x", "ch", "sh")) else "s")


def often(number: int) -> str:
    """``once``, ``twice``, ``3 times``."""
    return _OFTEN[number] if number < len(_OFTEN) else f"{number:,} times"
