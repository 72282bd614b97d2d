"""How long are the sentences of the documentation? Words a sentence, the longest sentence and paragraph, page by page.

python docs/prose.py            # a table of every page
python docs/prose.py --long 30  # and every sentence of more than 30 words
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
_FENCED = re.compile(r"^( *)(```|~~~).*?^\1\2[^\n]*$", re.DOTALL | re.MULTILINE)
_MARKUP = [
    (_FENCED, ""),
    (re.compile(r"<!--.*?-->", re.DOTALL), ""),
    (re.compile(r"\$\$.*?\$\$", re.DOTALL), ""),
    (re.compile(r"`[^`]+`"), "code"),
    (re.compile(r"!\[[^\]]*\]\([^)]*\)"), ""),
    (re.compile(r"\[([^\]]*)\]\([^)]*\)"), r"\1"),
    (re.compile(r"\*\*|__"), ""),
]
_APART = re.compile(r"^\s*(#|\||:::|!!!|\?\?\?|</?\w|---|\s*$)")  # headings, tables, admonitions, HTML, empty lines
_ITEM = re.compile(r"^\s*([-*]|\d+\.)\s+")
_END = re.compile(r"(?<=[.!?])[*)\"'”’]*\s+(?=[\"'“(*]*[A-Z0-9`~×ληαδΔ]|code\b)")
_WORD = re.compile(r"\w")


@dataclass(frozen=True)
class Prose:
    """The sentences and paragraphs of one page."""

    page: str
    sentences: list[str]
    paragraphs: list[str]

    @property
    def mean(self) -> float:
        """Words a sentence; 0 for a page without one."""
        return sum(map(words, self.sentences)) / max(1, len(self.sentences))

    @property
    def longest(self) -> int:
        """Words of the longest sentence."""
        return max(map(words, self.sentences), default=0)

    @property
    def longest_paragraph(self) -> int:
        """Words of the longest paragraph or list item."""
        return max(map(words, self.paragraphs), default=0)


def words(text: str) -> int:
    """What stands between spaces and holds a letter or a digit; inline code is one word."""
    return sum(1 for word in text.split() if _WORD.search(word))


def paragraphs(markdown: str) -> list[str]:
    """Paragraphs and list items, without code, tables and headings."""
    for pattern, replacement in _MARKUP:
        markdown = pattern.sub(replacement, markdown)
    found: list[list[str]] = [[]]
    code = False  # an indented block, which begins behind an empty line at the margin's depth
    in_list = False
    for line in markdown.splitlines():
        if line.strip() and not line.startswith(" "):
            in_list = bool(_ITEM.match(line))
        code = line.startswith("    ") and not in_list and (code or not found[-1])
        if code or _APART.match(line):
            found.append([])
        elif _ITEM.match(line):
            found.append([_ITEM.sub("", line)])
        else:
            found[-1].append(line.strip())
    return [" ".join(lines) for lines in found if lines]


def sentences(paragraph: str) -> list[str]:
    """Where a full stop is followed by what begins a sentence."""
    return [sentence for sentence in _END.split(paragraph) if words(sentence)]


def read(page: Path) -> Prose:
    """The prose of one page."""
    found = paragraphs(page.read_text("utf-8"))
    return Prose(page.name, [sentence for paragraph in found for sentence in sentences(paragraph)], found)


def pages() -> list[Path]:
    """Every page that a reader meets: the README, the changelog and the site; experiments are logged as they came."""
    top = sorted(ROOT.glob("*.md"))
    return top + [path for path in sorted((ROOT / "docs").rglob("*.md")) if path.name != "LOG.md"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--long", type=int, help="show every sentence of more words")
    limit = parser.parse_args().long
    print("| page | sentences | words a sentence | longest sentence | longest paragraph |\n|---|---|---|---|---|")
    for page in pages():
        prose = read(page)
        name = page.relative_to(ROOT)
        print(f"| {name} | {len(prose.sentences)} | {prose.mean:.1f} | {prose.longest} | {prose.longest_paragraph} |")
    for page in pages() if limit is not None else []:
        for sentence in read(page).sentences:
            if words(sentence) > (limit or 0):
                print(f"\n{page.relative_to(ROOT)}, {words(sentence)} words: {sentence}")


if __name__ == "__main__":
    main()
