"""What pyproject.toml asks of other packages, and the file that lets its lower ends be tested."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_oldest_versions_are_those_that_pyproject_allows():
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    wanted = re.search(r"^dependencies = \[\n(.*?)^\]", project, re.DOTALL | re.MULTILINE).group(1)
    wanted += re.search(r"^export = (.*)$", project, re.MULTILINE).group(1)
    lowest = dict(re.findall(r'"([\w-]+)>=([\d.]+)', wanted))
    assert lowest.pop("torch"), "which the file leaves out"
    pinned = dict(
        re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "constraints-oldest.txt").read_text("utf-8"), re.MULTILINE)
    )
    assert pinned.keys() == lowest.keys()
    for name, version in pinned.items():
        assert _numbers(version) == _numbers(lowest[name]), name


def _numbers(version: str) -> list[int]:
    """``5.20`` and ``5.20.0`` are the same."""
    parts = [int(part) for part in version.split(".")]
    while parts and parts[-1] == 0:
        parts.pop()
    return parts
