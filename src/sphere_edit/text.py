"""Foreign text made harmless: what a fact, a model, a file's name or a run's config says is shown, and never acts.

Foreign is every word that this package did not write itself. It may hold markup of the terminal library, escape codes, marks that
turn the direction of writing, LaTeX, formulas of a spreadsheet, HTML or Markdown. There is one function for each place it goes to.
"""

from __future__ import annotations

import re
import unicodedata
from html import escape
from typing import Any

from rich.console import Console
from rich.text import Text

_TURNS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # direction of writing
_HIDDEN = frozenset({"Cc", "Cs", "Zl", "Zp"})  # control codes, halves of pairs, separators of lines and of paragraphs
_NAMES = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}
_FORMULA = tuple("=+-@\t\r\n＝＋－＠")
_LATEX = {
    **{sign: f"\\{sign}" for sign in "&%_#${}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "×": r"$\times$",
    "±": r"$\pm$",
    "η": r"$\eta$",
    "α": r"$\alpha$",
}
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def visible(text: str, keep: str = "") -> str:
    """``text`` with every character that would act instead of being seen written as its code, but for those in ``keep``.

    These are control codes (escape codes begin with one), marks that turn the direction of writing, and bytes of a file's name that
    are no UTF-8, which Python hands on as halves of pairs (surrogateescape).
    """
    return "".join(sign if sign in keep or not _acts(sign) else _code(sign) for sign in text)


def _acts(sign: str) -> bool:
    return not " " <= sign <= "~" and (sign in _TURNS or unicodedata.category(sign) in _HIDDEN)


def _code(sign: str) -> str:
    number = ord(sign)
    if 0xDC80 <= number <= 0xDCFF:  # a byte that was no UTF-8
        return f"\\x{number - 0xDC00:02x}"
    return _NAMES.get(sign) or (f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}")


def terminal(text: str, style: str = "") -> Text:
    """Foreign text for a terminal: one line, without markup, in a style of ours."""
    return Text(visible(text), style=style)


class Screen(Console):
    """A console on which strings are only seen: no markup, no emoji names, no colours guessed from content, no codes.

    That holds for what is printed and for titles and cells of tables. Style comes from ``style=`` and from `terminal`.
    """

    def __init__(self, **options: Any):
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """A string as it is shown; line breaks are ours and stay."""
        return super().render_str(visible(text, keep="\n"), **options)


def latex(text: str) -> str:
    """Foreign text within a line of LaTeX; the few symbols of our own labels become mathematics."""
    return "".join(_LATEX.get(sign, sign) for sign in visible(text))


def csv_cell(value: Any) -> Any:
    """A cell of a CSV file: text that a spreadsheet would take for a formula gets a quote before it; numbers stay numbers."""
    if not isinstance(value, str):
        return value
    formula = value.startswith(_FORMULA) or value.lstrip().startswith(_FORMULA)
    return f"'{visible(value)}" if formula and not _is_number(value) else visible(value)


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text) is not None


def label(text: str) -> str:
    r"""Foreign text on a figure: ``\$`` is matplotlib's plain dollar, and a name that begins with ``_`` is not left out of the legend."""
    shown = visible(text).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


_MARKS = re.compile(r"[\\`*\[\]|~$]|(?<!\w)_|_(?!\w)")  # within a word an underscore is itself


def markdown(text: str) -> str:
    """Foreign text within a line of Markdown or a cell of its tables: no HTML, heading, list, link, code or emphasis begins in it."""
    shown = "".join(_ENTITIES.get(sign, sign) for sign in re.sub(_MARKS, r"\\\g<0>", visible(text)))
    shown = re.sub(r"^(\s*)([#+=-]|\d+(?=[.)]))", _not_first, shown)
    return re.sub(r"(?i)(?<=[a-z]):(?=//)|(?<=www)\.", r"\\\g<0>", shown)  # bare addresses would become links


def _not_first(match: re.Match[str]) -> str:
    """What begins a heading, a list or a rule only as the first sign of a line."""
    space, first = match.groups()
    return f"{space}\\{first}" if not first.isdigit() else f"{space}&#{ord(first[0])};{first[1:]}"


def html(text: str) -> str:
    """Foreign text within HTML, or within a quoted attribute of it."""
    return escape(visible(text))


def code(text: str) -> str:
    """Foreign text as a code span of Markdown, fenced by more backticks than stand together in it."""
    shown = visible(text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    space = " " if len(fence) > 1 or shown[:1] == "`" else ""
    return f"{fence}{space}{shown}{space}{fence}" if shown else ""


def public_name(source: str) -> str:
    """What a model or a file is called in public: a hub's name whole, of a path on this machine the last component alone."""
    hub = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source)
    return source if hub else re.split(r"[\\/]", source.rstrip("\\/"))[-1] or source
