"""Run folders that earlier code made open, show, report, go on, roll back and export with this code (`old_runs.py`)."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from old_runs import FACTS, FOLDER, MODEL, MORE, deployed, expected, outcome, surroundings
from sphere_edit import SphereEditError
from sphere_edit.editor import Editor
from sphere_edit.progress import Quiet
from test_cli import run

RUNS = ("frugal", "interrupted", "alphaedit", "prune")
FINISHED = tuple(name for name in RUNS if name != "interrupted")


@pytest.fixture
def copied(tmp_path):
    """Copies an old run to where it may change; its model is where the tests keep it."""

    def copy(name: str) -> Path:
        folder = shutil.copytree(FOLDER / name, tmp_path / name)
        config = json.loads((folder / "config.json").read_text())
        config["model"]["source"] = str(MODEL)
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return copy


def entries(folder: Path, event: str) -> list[dict[str, Any]]:
    """Lines of a journal as the file has them, whatever reads them elsewhere."""
    lines = (folder / "journal.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["event"] == event]


def here(name: str) -> bool:
    """Whether last bits come out here as where the run was made."""
    return expected(name)["surroundings"] == surroundings()


def check_outcome(editor: Editor, name: str, when: str) -> None:
    """A run that went on, against what the old code made of it: to the last bit on the same machine, nearly elsewhere."""
    ours, theirs = outcome(editor), expected(name)[when]
    if here(name):
        assert ours["deployed"] == theirs["deployed"]
        assert {key: ours["edited"][key] for key in theirs["edited"]} == theirs["edited"]
    assert (ours["head"], ours["retained"]) == (theirs["head"], theirs["retained"])
    assert ours["norms"] == pytest.approx(theirs["norms"], rel=1e-3)
    assert ours["edited"]["perplexity"] == pytest.approx(theirs["edited"]["perplexity"], rel=1e-2)


@pytest.mark.parametrize("name", RUNS)
def test_it_opens_with_the_weights_it_ended_with(tmp_path, name):
    folder = shutil.copytree(FOLDER / name, tmp_path / "run")
    with pytest.raises(SphereEditError, match="/a/folder/that/is/gone"):
        Editor.open(folder, Quiet())
    with closing(Editor.open(folder, Quiet(), model=MODEL)) as editor:
        head = editor.run.history.head
        recorded = {matrix: report["sha256"] for matrix, report in entries(folder, "batch")[-1]["matrices"].items()}
        assert {matrix: editor.weights.digest(matrix) for matrix in editor.weights.names} == recorded
        if name != "prune" or here(name):  # PRUNE deploys something else, through a singular value decomposition
            assert deployed(editor) == expected(name)["after"][str(head)]
        assert (deployed(editor) == recorded) == (name != "prune")


@pytest.mark.parametrize("name", RUNS)
def test_it_rolls_back_to_every_batch_bit_for_bit(copied, name):
    folder = copied(name)
    kept = {int(path.stem[-4:]) for path in (folder / "checkpoints").iterdir()}
    with closing(Editor.open(folder, Quiet())) as editor:
        head = editor.run.history.head
        for batch in reversed(range(head)):
            if not (here(name) or batch in kept or batch == 0):
                continue  # it is replayed, by a machine that may round otherwise
            editor.rollback(batch)
            assert editor.run.history.head == batch
            if batch == 0 or name != "prune" or here(name):
                assert deployed(editor) == expected(name)["after"][str(batch)]
        assert editor.run.history.head == 0
    assert len(entries(folder, "batch")) == len(entries(FOLDER / name, "batch")), "the journal only grows"


def test_an_interrupted_one_is_resumed(copied):
    folder = copied("interrupted")
    assert (folder / "updates" / "batch-0002.safetensors").is_file(), "written, and not committed"
    assert len(entries(folder, "batch")) == 1
    assert "interrupted, 7 facts waiting" in run("show", folder)
    with closing(Editor.open(folder, Quiet())) as editor:
        assert editor.run.history.pending == [4, 5, 6, 7, 8, 9, 10]
        with pytest.raises(SphereEditError, match="7 facts waiting"):
            editor.edit(MORE)
        metrics = editor.resume()
        check_outcome(editor, "interrupted", "resumed")
    assert metrics["facts"] == len(FACTS) - 1, "one of them superseded"
    assert [entry["forgotten"] != [] for entry in entries(folder, "look back")] == [True]
    assert [len(entry["facts"]) for entry in entries(folder, "batch")][:4] == [4, 4, 3, 0]
    assert sum("repair" in entry for entry in entries(folder, "batch")) == 1
    assert "finished" in run("show", folder)


@pytest.mark.parametrize("name", FINISHED)
def test_a_finished_one_takes_more_facts(copied, name):
    folder = copied(name)
    with closing(Editor.open(folder, Quiet())) as editor:
        superseded = len(editor.run.history.superseded)
        editor.edit(MORE)
        check_outcome(editor, name, "continued")
        assert len(editor.run.history.superseded) == superseded + (name != "alphaedit"), (
            "which had taken that fact back"
        )


@pytest.mark.parametrize("name", FINISHED)
def test_a_fact_of_a_finished_one_is_taken_back(copied, name):
    """What was written for it is told apart though the run kept no columns; the removal rolls back to the weights it had."""
    folder = copied(name)
    with closing(Editor.open(folder, Quiet())) as editor:
        head, before = editor.run.history.head, outcome(editor)
        editor.remove("Bruno")
        record = editor.run.history.batches[head]
        assert (record.removed, record.written_back) == ([3], [])
        editor.rollback(head)
        assert outcome(editor)["deployed"] == before["deployed"]


class _Cells(HTMLParser):
    """The text of a page's table cells, row by row."""

    def __init__(self, text: str):
        super().__init__()
        self.rows: list[list[str]] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        self.inside = tag in ("td", "th") or (self.inside and tag not in ("tr", "table"))
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.inside and self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


@pytest.mark.parametrize("name", FINISHED)
def test_it_is_shown_and_reported_as_it_was_measured(copied, name):
    folder = copied(name)
    metrics = json.loads((folder / "metrics.json").read_text())
    shown = run("show", folder)
    batches = [entry["batch"] for entry in entries(folder, "batch")][-1]
    assert f"{batches} batches" in shown
    for when in ("unedited", "edited"):
        assert f"{metrics[when]['perplexity']:.2f}" in shown
    page = folder / "report.html"
    run("report", folder, "-o", page, "--figures", folder / "figures")
    cells = {cell.strip() for row in _Cells(page.read_text()).rows for cell in row}
    assert f"{metrics['edited']['perplexity']:.2f}" in cells
    for fact in metrics["per_fact"]:
        assert any(fact["prompt"].split("{}")[-1].strip() in cell for cell in cells)
    assert list((folder / "figures").glob("*.svg"))


@pytest.mark.parametrize("name", FINISHED)
def test_it_is_exported_as_the_model_that_was_evaluated(copied, name, tmp_path):
    run("export", copied(name), "-o", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    original = AutoModelForCausalLM.from_pretrained(MODEL)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, original.state_dict()[key])}
    matrices = expected(name)["continued"]["norms"]
    assert changed == {f"{matrix}.weight" for matrix in matrices}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| Efficacy |" in card


def test_a_run_of_before_is_measured_again_to_the_same_numbers(copied):
    folder = copied("frugal")
    recorded = json.loads((folder / "metrics.json").read_text())
    with closing(Editor.open(folder, Quiet())) as editor:
        found = editor.evaluate([FACTS[0], *FACTS[2:]]).summary()
    for when in ("unedited", "edited"):
        for metric in ("efficacy", "specificity", "efficacy_strict"):
            assert found[when][metric] == pytest.approx(recorded[when][metric], abs=1e-6), (when, metric)
