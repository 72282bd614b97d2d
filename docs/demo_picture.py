"""Turn what the demo prints into docs/demo.svg:

COLUMNS=112 FORCE_COLOR=1 sphere-edit demo 2>&1 | python docs/demo_picture.py docs/demo.svg
"""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

_UP, _ERASE = "\x1b[1A", "\x1b[2K"
_CONTROL = re.compile(r"\x1b\[\?25[lh]|\x1b\[1A|\x1b\[2K")


def main(target: str) -> None:
    """Read ANSI text from standard input, echo it, and write the picture."""
    lines: list[str] = []
    for line in sys.stdin:
        print(line, end="", flush=True)
        if _UP in line:  # the bar above gives way to its summary
            lines.pop()
        lines.append(_CONTROL.sub("", line.split(_ERASE)[-1].rsplit("\r", 1)[-1]))
    console = Console(record=True, width=112, file=io.StringIO(), force_terminal=True)
    console.print(Text("$ make demo"))
    console.print(Text.from_ansi("".join(lines)))
    picture = console.export_svg(title="sphere-edit demo")
    # the font is named and not fetched: a page must not call out to show a picture
    Path(target).write_text(re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
