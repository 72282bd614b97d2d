"""The seam: what stands between a prompt and its answer, seen from both sides where the record does not say."""

from __future__ import annotations

import re
import unicodedata

_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "FULLWIDTH", "IDEOGRAPHIC")
_QUOTES = "\"'`“”‘’«»"
_ASKING = "?!:;…"  # after these an answer begins anew, whatever sign it begins with
_ELISION = re.compile(r"(?:\b(?:[cdjlmnst]|qu|un)|(?:de|a|ne|su|da)ll)['’]$", re.IGNORECASE)  # l', qu', dell'
_CONTRACTION = re.compile(r"['’](?:s|t|re|ll|ve|d|m)\b", re.IGNORECASE)
_IDENTIFIER = re.compile(r"[a-z_]\w*(?:[.(\[].*)?", re.DOTALL)  # merge, merge(a, b), random.rand
_ABBREVIATION = re.compile(
    r"(?:\w\.)+|[A-Z]\.|(?:.*\W)?(?:mrs?|ms|dr|st|prof|vs|etc|no|nr|vol|fig|approx|ca|jr|sr|inc|ltd|co|corp)\.", re.I
)


def unspaced(char: str) -> bool:
    """Whether a character belongs to a script that is written without spaces (Chinese, Japanese, Thai, …)."""
    return unicodedata.name(char, "").startswith(_UNSPACED)


def separator_between(prompt: str, answer: str) -> str:
    """One space or nothing: what a writer would put between ``prompt`` and ``answer``.

    Nothing where either side has white space at the seam, where the prompt ends in something that opens (a bracket, an opening quote, ``$``, the
    dot of ``np.``), where the answer begins with something that closes, and inside scripts without spaces.
    """
    if not prompt or not answer or prompt[-1].isspace() or answer[0].isspace():
        return ""
    if _within_unspaced(prompt, answer) or _opens(prompt, answer) or _closes(prompt, answer):
        return ""
    return " "


def joined(target: str) -> str:
    """The target as it followed a prompt in runs begun before a fact kept its separator: the target's first letter alone decided."""
    letter = next((char for char in target if char.isalnum()), target[0])
    return target if target[0].isspace() or unspaced(letter) else " " + target


def word_places(text: str, word: str) -> list[int]:
    """Where ``word`` stands in ``text`` as a word or as words: not within a longer one. Scripts without spaces have no such edges."""
    places, at = [], text.find(word)
    while at >= 0:
        end = at + len(word)
        inside = (at > 0 and _one_word(text[at - 1], text[at])) or (
            end < len(text) and _one_word(text[end - 1], text[end])
        )
        if not inside:
            places.append(at)
        at = text.find(word, at + 1 if inside else end)
    return places


def _one_word(left: str, right: str) -> bool:
    return all(
        (char.isalnum() or char == "_" or unicodedata.combining(char)) and not unspaced(char) for char in (left, right)
    )


def _within_unspaced(prompt: str, answer: str) -> bool:
    letters = [unspaced(char) for char in prompt if char.isalpha()]
    behind = unspaced(prompt[-1]) or bool(letters and letters[-1])
    ahead = next((unspaced(char) for char in answer if char.isalpha()), True)
    return behind and (ahead or 2 * sum(letters) > len(letters))


def _opens(prompt: str, answer: str) -> bool:
    """Whether the prompt ends in something that its answer is written directly after."""
    last, before = prompt[-1], prompt[-2:-1]
    free = (
        not before or before.isspace() or unicodedata.category(before) == "Ps"
    )  # nothing is attached to the last sign
    if unicodedata.category(last) == "Ps":
        return True
    if last in _QUOTES or last in "#@":
        return free or (last in "'’" and _ELISION.search(prompt) is not None)
    if unicodedata.category(last) == "Sc":
        return not prompt[:-1].rstrip()[-1:].isdigit()
    if last == ".":
        return _is_code(prompt.split()[-1], answer)
    return last in "/\\_" or (last in "-‐=" and not free) or prompt.endswith(("::", "->"))


def _is_code(word: str, answer: str) -> bool:
    """Whether the dot at the end of ``word`` is that of code (``np.``) rather than of a sentence or an abbreviation."""
    if _ABBREVIATION.fullmatch(word) and not re.fullmatch(r"[a-z]\.", word):
        return False
    ends = word[-2:-1]
    return (ends.isalpha() or ends in ("_", ")", "]") or not word[:-1].isdigit()) and _IDENTIFIER.fullmatch(
        answer
    ) is not None


def _closes(prompt: str, answer: str) -> bool:
    """Whether the answer begins with something that is written directly after the prompt."""
    first, following = answer[0], answer[1:2]
    if prompt.rstrip(_QUOTES)[-1:] in _ASKING or not prompt.rstrip(_QUOTES):
        return False
    if first == '"':
        return prompt.count('"') % 2 == 1
    if first in "'’":
        return _CONTRACTION.match(answer) is not None
    if first == ".":
        return not (following.isupper() or following.isdigit())
    if first == "-":
        return following.isalpha()
    return first in ",;:!?%…" or unicodedata.category(first) in ("Pe", "Pf")
