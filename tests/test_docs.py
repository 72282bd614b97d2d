"""What the documentation shows runs as written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def test_readme_example_runs_as_written(smollm2, tmp_path, monkeypatch, capsys):
    (example,) = blocks("README.md")
    assert len([line for line in example.splitlines() if line.strip()]) <= 5
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    assert "Vienna" in capsys.readouterr().out
    assert (tmp_path / "runs" / "readme" / "metrics.json").is_file()


def test_guide_examples_run_as_written(capsys):
    energies, solving = blocks("docs/guide.md")
    exec(energies, {})
    before, after = map(float, capsys.readouterr().out.split())
    assert before == pytest.approx(after, rel=0.01)
    assert before != after
    names: dict[str, Any] = {}
    exec(solving, names)
    assert capsys.readouterr().out == "torch.Size([64, 256])\n"
    assert not torch.equal(names["update"].dense(), torch.zeros(64, 256))
    assert "solve(" not in re.sub(r"```.*?```", "", (ROOT / "docs/guide.md").read_text(), flags=re.DOTALL), "not run"


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/guide.md",
        "docs/facts.md",
        "docs/evaluation.md",
        "docs/LOG.md",
        "docs/methods.md",
        "docs/performance.md",
        "docs/quality.md",
        "docs/results.md",
        "CHANGELOG.md",
    ],
)
def test_links_between_pages_lead_somewhere(page):
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text()):
        if not target.startswith("http"):
            assert (folder / target).exists(), f"{page} links to {target}"
