"""The notebooks and scripts of examples/ run: on a tiny model quickly, on SmolLM2 in the slow suite."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from conftest import fact_records
from families import save_tiny
from sphere_edit.editing.methods import METHODS

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
SETTINGS = {
    "batch_size": 2,
    "templates": 0,
    "targets": {"steps": 3},
    "moments": {"sampled_tokens": 256},
    "tokens_per_batch": 512,
    "evaluation": {"generation": "off"},
}

pytestmark = pytest.mark.usefixtures("blank_figures")


def cells(notebook: Path) -> list[str]:
    content = json.loads(notebook.read_text("utf-8"))
    assert all(not cell.get("outputs") for cell in content["cells"]), f"{notebook.name}: clear the outputs"
    return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == "code"]


def execute(notebook: Path, model: str) -> dict:
    names: dict = {"__name__": "__main__"}
    for number, source in enumerate(cells(notebook)):
        source = source.replace('MODEL = "smollm2"', f"MODEL = {model!r}")
        exec(compile(source, f"{notebook.name}, cell {number}", "exec"), names)
    return names


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture
def own_methods(monkeypatch):
    """What a notebook registers is gone after it."""
    for name in list(METHODS):
        monkeypatch.setitem(METHODS, name, METHODS[name])
    yield
    METHODS.pop("plain_ridge", None)


def test_there_are_notebooks():
    assert len(NOTEBOOKS) == 4


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(notebook, model, own_methods, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = execute(notebook, str(model))
    assert names["MODEL"] == str(model)
    assert capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run_on_smollm2(notebook, smollm2, own_methods, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    execute(notebook, "smollm2")
    said = capsys.readouterr().out
    assert "Vienna" in said or notebook.stem not in ("edit_and_look", "your_own_method")


@pytest.fixture
def shell(tmp_path, monkeypatch):
    """A shell in an empty folder whose ``sphere-edit`` and ``python`` are those of the tests."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    for name, arguments in {"sphere-edit": "-m sphere_edit", "python": ""}.items():
        (binaries / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
        (binaries / name).chmod(0o755)
    work = tmp_path / "work"
    work.mkdir()

    def run(script: str, *args: object, status: int = 0, **more: str) -> str:
        environment = {**os.environ, "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            ["bash", str(EXAMPLES / script), *map(str, args)],
            cwd=work, env={**environment, **more}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    return work, run


@pytest.mark.slow
def test_the_weekly_patch_ships_or_goes_back(model, shell):
    work, run = shell
    (work / "settings.yaml").write_text(yaml.safe_dump(SETTINGS))
    for week in (1, 2):
        records = fact_records(2, start=2 * (week - 1))
        (work / f"week{week}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    limits = {"STRICT": "0", "PERPLEXITY": "1e9"}
    options = ["--config", "settings.yaml", "--method", "memit"]
    assert "Shipped: out1" in run("weekly_patch.sh", model, "week1.jsonl", "patches", "out1", *options, **limits)
    assert (work / "out1" / "model.safetensors").is_file()
    said = run("weekly_patch.sh", model, "week2.jsonl", "patches", "out2", *options, status=4, STRICT="101")
    assert "the model goes back to batch 1" in said
    assert not (work / "out2").exists()
    journal = [json.loads(line) for line in (work / "patches" / "journal.jsonl").read_text().splitlines()]
    assert (journal[-1]["event"], journal[-1]["to"]) == ("rollback", 1)


@pytest.mark.slow
def test_the_papers_table_is_filled(model, shell):
    work, run = shell
    (work / "settings.yaml").write_text(yaml.safe_dump(SETTINGS))
    said = run("paper_table.sh", model, "demo", "6", "table", "memit", SETTINGS="settings.yaml")
    assert "memit" in said
    assert (work / "table" / "runs" / "table.tex").is_file()
    assert run("paper_table.sh", model, "demo", "6", "table", "memit", SETTINGS="settings.yaml") != ""
