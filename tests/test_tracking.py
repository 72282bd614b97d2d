"""Loggers hear what the journal says, by their own packages in their offline modes; one that fails stops no run."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from conftest import fact_records
from families import save_tiny
from sphere_edit import Editor, SphereEditError
from sphere_edit.editor import opened
from sphere_edit.progress import Quiet
from sphere_edit.reporting import tracking
from sphere_edit.reporting.tracking import Tracker, numbers_of
from test_cli import run

pytestmark = pytest.mark.usefixtures("blank_figures")

SMALL = {
    "method": "memit",
    "batch_size": 2,
    "targets": {"steps": 3, "lr": 0.3},
    "moments": {"sampled_tokens": 256},
    "evaluation": {"every": 1, "generation": "off"},
    "templates": 0,
    "tokens_per_batch": 512,
}


class Told(Quiet):
    """Keeps what is said."""

    def __init__(self):
        self.lines: list[str] = []

    def say(self, text: str, style: str = "") -> None:
        self.lines.append(text)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("model"))


def edited(model: Path, folder: Path, *watchers) -> Editor:
    editor = Editor.from_pretrained(model, folder, reporter=Quiet(), **SMALL)
    editor.watchers.extend(watchers)
    editor.edit(fact_records(4))
    editor.close()
    return editor


def test_watchers_hear_every_line_of_the_journal(model, tmp_path):
    heard = []
    editor = edited(model, tmp_path / "run", lambda run, record: heard.append(record))
    assert heard == editor.run.records
    with opened(tmp_path / "run", Quiet()) as again:
        again.watchers.append(lambda run, record: heard.append(record))
        again.rollback(1)
        assert heard == again.run.records
        assert [record.event for record in heard[-1:]] != ["finished"]


def test_numbers_are_those_of_the_journal_and_of_no_fact(model, tmp_path):
    told = []
    editor = edited(model, tmp_path / "run", lambda run, record: told.append(numbers_of(record)))
    batches = [(batch, numbers) for batch, numbers in told if "batch/facts" in numbers]
    assert [batch for batch, _ in batches] == [1, 2]
    entry = next(one for one in editor.run.entries if one["event"] == "batch")
    ratios = [matrix["collateral_ratio"] for matrix in entry["matrices"].values()]
    assert batches[0][1]["batch/collateral_ratio"] == pytest.approx(sum(ratios))
    assert batches[0][1]["batch/seconds"] == pytest.approx(sum(entry["seconds"].values()))
    measured = {batch: numbers for batch, numbers in told if "eval/efficacy" in numbers}
    assert set(measured) == {0, 1, 2}
    assert measured[2]["eval/efficacy"] == pytest.approx(editor.metrics()["edited"]["efficacy"])
    assert measured[2]["eval/perplexity"] > 0
    assert all(isinstance(value, float) for _, numbers in told for value in numbers.values())


def test_a_logger_that_fails_stops_no_run(model, tmp_path, monkeypatch):
    closed = []

    def begin(run, settings):
        calls = []

        def log(numbers, batch):
            calls.append(batch)
            if len(calls) > 1:
                raise ConnectionError("the network is away")

        return log, lambda: closed.append(1)

    monkeypatch.setattr(tracking, "check_service", lambda service: None)
    monkeypatch.setitem(tracking._BEGIN, "wandb", begin)
    told = Told()
    tracker = Tracker("wandb", told)
    editor = edited(model, tmp_path / "run", tracker)
    tracker.close()
    assert editor.run.history.finished
    assert told.lines == ["wandb failed and is left out; the run goes on: the network is away"]
    assert closed == [1]


def test_a_logger_hears_settings_and_no_path(model, tmp_path, monkeypatch):
    heard = []

    def begin(run, settings):
        heard.append(dict(settings))
        return lambda numbers, batch: None, lambda: None

    monkeypatch.setattr(tracking, "check_service", lambda service: None)
    monkeypatch.setitem(tracking._BEGIN, "trackio", begin)
    edited(model, tmp_path / "run", Tracker("trackio", Quiet()))
    (settings,) = heard
    assert settings["method"] == "memit"
    assert settings["model"] == model.name
    assert str(model) not in str(settings)


def test_a_logger_whose_package_is_missing_is_told_before_any_work(model, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SphereEditError, match="pip install trackio"):
        run("edit", model, "demo", "-o", tmp_path / "run", "--log", "trackio")
    assert not (tmp_path / "run").exists()


def test_tensorboard_has_the_numbers(model, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tracker = Tracker("tensorboard", Quiet())
    editor = edited(model, tmp_path / "run", tracker)
    tracker.close()
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    found = {event.step: event.value for event in events.Scalars("eval/efficacy")}
    assert found[2] == pytest.approx(editor.metrics()["edited"]["efficacy"])
    assert [event.step for event in events.Scalars("batch/facts")] == [1, 2]
    with opened(tmp_path / "run", Quiet()) as again:  # what the logger wrote there disturbs nothing
        again.rollback(0)


def test_wandb_logs_offline(model, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    told = Told()
    tracker = Tracker("wandb", told)
    edited(model, tmp_path / "run", tracker)
    tracker.close()
    assert told.lines == []
    (log,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert log.stat().st_size > 0


def test_trackio_logs_locally(model, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    told = Told()
    tracker = Tracker("trackio", told)
    edited(model, tmp_path / "run", tracker)
    tracker.close()
    assert told.lines == []
    assert list((tmp_path / "trackio").glob("sphere-edit*"))
