"""What pyproject.toml asks of other packages, its extras, and the file that lets its lower ends be tested."""

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


def test_every_extra_that_is_named_exists_and_readme_tells_of_all():
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    section = re.search(r"^\[project\.optional-dependencies\]\n(.*?)^\[", project, re.DOTALL | re.MULTILINE).group(1)
    extras = set(re.findall(r"^([a-z]+) = ", section, re.MULTILINE))
    told = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "Makefile", "pyproject.toml")]
    told += [
        path
        for folder, names in (("docs", "*.md"), ("src", "*.py"), (".github", "*.yml"), ("examples", "*"))
        for path in (ROOT / folder).rglob(names)
        if path.is_file()
    ]
    named = {
        name: path.name
        for path in told
        for listed in re.findall(r"(?:sphere-edit|(?<![\w.])\.)\[([a-z,]+)\]", path.read_text("utf-8"))
        for name in listed.split(",")
    }
    assert {"ability", "bench", "export", "log", "studio"} <= named.keys(), "the errors name these"
    assert named.keys() <= extras, {name: file for name, file in named.items() if name not in extras}
    readme = re.findall(
        r"`([a-z]+)`", re.search(r"\| extra \|(.*?)\n\n", (ROOT / "README.md").read_text("utf-8"), re.DOTALL).group(1)
    )
    assert set(readme) == extras


def _numbers(version: str) -> list[int]:
    """``5.20`` and ``5.20.0`` are the same."""
    parts = [int(part) for part in version.split(".")]
    while parts and parts[-1] == 0:
        parts.pop()
    return parts
