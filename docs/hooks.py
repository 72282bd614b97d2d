"""What mkdocs does beside its own work: take in the pages made from the code, and keep links to code as names."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

sys.path.append(str(Path(__file__).parent))
import generate

_OUTSIDE = re.compile(
    r"(?<!!)\[([^\]]+)\]\((?:\.\./)+(?:src|configs|benchmarks|examples|tests|\.github|[A-Z]+\b)[^)]*\)"
)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages made from the code."""
    for path, content in generate.pages().items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, **about: Any) -> str:
    """Links to files of the repository lead somewhere there, and nowhere on the site."""
    return _OUTSIDE.sub(r"\1", markdown)
