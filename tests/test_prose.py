"""The documentation is written in short sentences: none of more than 30 words, fewer than 18 on the average of a page."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "docs"))
import prose

PAGES = {path.relative_to(prose.ROOT).as_posix(): path for path in prose.pages()}


@pytest.mark.parametrize("page", sorted(PAGES))
def test_sentences_are_short(page):
    found = prose.read(PAGES[page])
    long = [sentence for sentence in found.sentences if prose.words(sentence) > 30]
    assert not long, f"{page} has sentences of more than 30 words"
    assert found.mean < 18, f"{page} has {found.mean:.1f} words a sentence"
    assert found.longest_paragraph <= 80, f"{page} has a paragraph of {found.longest_paragraph} words"


def test_sentences_are_told_apart():
    text = """# A heading that does not count

First one, e.g. with `code.here` and a [link](x.md). Second one!

| a | table |
|---|---|

- an item. Its second sentence
  goes on.
- another

Then:

    indented code. Not prose.

```python
# fenced. Not prose.
```
"""
    found = [prose.sentences(paragraph) for paragraph in prose.paragraphs(text)]
    assert found == [
        ["First one, e.g. with code and a link.", "Second one!"],
        ["an item.", "Its second sentence goes on."],
        ["another"],
        ["Then:"],
    ]
    assert prose.words("× 1.5 – three words") == 3
