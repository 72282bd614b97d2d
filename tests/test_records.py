"""Records, the fold over them, and the weights of a run without its model."""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import closing

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import fact_records
from families import save_tiny
from sphere_edit import SphereEditError
from sphere_edit.editing.settings import make_settings
from sphere_edit.editor import Editor
from sphere_edit.progress import Quiet
from sphere_edit.reporting.series import Series
from sphere_edit.runs.folder import RunFolder
from sphere_edit.runs.history import History
from sphere_edit.runs.records import Batch, FactsAccepted, FinalRecheck, Finished, Rollback, parse_record
from sphere_edit.runs.weights import RunWeights

QUICK = {
    "batch_size": 2,
    "layers": [1, 2],
    "targets": {"steps": 3, "lr": 0.3},
    "moments": {"sampled_tokens": 256},
    "tokens_per_batch": 256,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("model"))


def batch(number: int, facts=(), rewritten=(), **more) -> Batch:
    targets = {"loss_before": None, "loss_after": None, "probability_after": None, "evaluations": []}
    kind = more.pop("kind", "edit" if facts else "rewrite")
    rechecked = list(more.pop("rechecked", ()))
    return Batch(
        number=number, kind=kind, facts=list(facts), superseded=[], rechecked=rechecked, rewritten=list(rewritten), targets=targets,
        matrices={}, seconds={}, **more,
    )  # fmt: skip


def accepted(count: int, session: int = 1) -> FactsAccepted:
    return FactsAccepted(session=session, count=count, sha256="", source="a file", protocol="own", left_out=[])


def test_lines_of_older_runs_are_told_apart_once_and_new_ones_say_their_kind():
    line = {
        "event": "batch", "batch": 1, "facts": [0], "superseded": [], "asked": [5], "again": [7], "targets": batch(1).targets,
        "matrices": {}, "seconds": {"a": 0.5}, "peak_memory": 3,
    }  # fmt: skip
    for more, kind in (({}, "edit"), ({"facts": []}, "rewrite")):
        record = parse_record(json.dumps({**line, **more}).encode(), "here")
        assert (record.kind, record.number, record.rechecked, record.rewritten) == (kind, 1, [5], [7])
        assert record.as_entry() == {**line, **more, "kind": kind}
    repair = {"steps": 1, "divergences": [0.5], "losses": [0.5]}
    assert parse_record(json.dumps({**line, "facts": [], "repair": repair}).encode(), "here").kind == "repair"


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        "1",
        '"batch"',
        "{}",
        '{"event": "no such"}',
        '{"event": "batch", "batch": 1}',
        '{"event": "rollback", "to": "x"}',
        "{",
    ],
)
def test_a_line_that_is_no_record_is_told_with_its_place(line):
    with pytest.raises(SphereEditError, match="the place is damaged"):
        parse_record(line.encode(), "the place")


def test_columns_belong_to_their_facts_whatever_their_number():
    written = batch(1, [4, 9], [2], columns=[1, 3, 2])
    assert written.members == [4, 9, 2]
    assert written.columns_of({9}, 6) == [1, 2, 3]
    assert written.columns_of({4, 2, 77}, 6) == [0, 4, 5]
    assert batch(1, [4, 9], [2]).columns_of({2}, 6) == [4, 5], "runs that kept no columns gave each fact as many"


def test_the_fold_of_a_journal_is_that_of_its_parts():
    records = [
        accepted(4),
        batch(1, [0, 1]),
        batch(2, [2, 3], [0], rechecked=[0]),
        FinalRecheck(after=2, rechecked=[0, 1], forgotten=[1], seconds={}),
    ]
    history = History.of(records)
    assert (history.head, history.forgotten, history.pending, history.due[0]) == (2, [1], [], 2)
    history.take(batch(3, rewritten=[1]))
    assert history.forgotten == []
    assert history.batch_of == {0: 1, 1: 1, 2: 2, 3: 2}
    assert (history.unrepaired, history.closing) == (4, True)
    history.take(batch(4, kind="repair"))
    assert history.unrepaired == 0
    history.take(Finished(after=4))
    history.take(Rollback(to=1))
    assert (history.head, history.withdrawn, history.finished, history.recheck_done) == (1, {2, 3}, True, False)
    assert History.of([]).closing is False


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=6), st.data())
def test_every_fact_is_edited_waiting_or_withdrawn(sizes, data):
    total = sum(sizes) + data.draw(st.integers(0, 3))
    history, first = History.of([accepted(total)]), 0
    for number, size in enumerate(sizes, 1):
        history.take(batch(number, range(first, first + size)))
        first += size
    if data.draw(st.booleans()):
        history.take(Rollback(to=data.draw(st.integers(0, len(sizes)))))
    assert sorted([*history.edited, *history.pending, *history.withdrawn]) == list(range(total))
    assert sorted(history.due) == sorted(history.retained)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "prune", "options": {"second_moment_weight": 0.01, "log_base": 1.2}, "repair": 0},
        {"method": "memit", "sphere": {"project": "deployed", "alpha": 0.9}, "options": {"second_moment_weight": 0.1}},
        {"method": "memit", "options": {"second_moment_weight": 0.1}, "dtype": "bfloat16"},
    ],
    ids=["prune", "deployed", "bfloat16"],
)
def test_the_weights_of_a_run_are_those_its_model_runs_with(model, tmp_path, options):
    """After every batch, with W0 from the model exactly, without it up to rounding; and what the page draws is that."""
    editor = Editor.from_pretrained(model, tmp_path / "run", reporter=Quiet(), **{**QUICK, **options})
    editor.edit(fact_records(6))
    name, run = editor.weights.names[0], editor.run
    exact, rebuilt = RunWeights(run, editor.weights.original), RunWeights(RunFolder.open(run.path))
    before, after = Series.read(run.path).change(name)
    assert torch.equal(exact.deployed(name), editor.weights.deployed(name))
    torch.testing.assert_close(
        after, editor.weights.deployed(name), rtol=1e-2 if "dtype" in options else 1e-4, atol=1e-5
    )
    torch.testing.assert_close(before, editor.weights.original(name), rtol=1e-4, atol=1e-6)
    assert torch.equal(exact.working(name), editor.weights.working[name])
    apart = (exact.deployed(name) - exact.working(name)).norm() / (exact.working(name) - exact.original(name)).norm()
    assert "dtype" in options or apart > 1e-3, "or this test says nothing"
    shown, solved, got = rebuilt.last_batch(name)
    if make_settings(run.config.settings).deployed_by:
        torch.testing.assert_close(shown + got, after, rtol=1e-4, atol=1e-6)
    assert solved.shape == got.shape == shown.shape
    for number in (1, 2):
        editor._stream.committer.go_to(number)
        assert torch.equal(exact.deployed(name, number), editor.weights.deployed(name))
    assert torch.equal(exact.deployed(name, 0), editor.weights.original(name))
    editor.close()


def test_a_run_without_any_checkpoint_says_so(model, tmp_path):
    editor = Editor.from_pretrained(model, tmp_path / "run", reporter=Quiet(), **{**QUICK, "method": "memit"})
    editor.edit(fact_records(2))
    name = editor.weights.names[0]
    editor.close()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(SphereEditError, match="has no checkpoint"):
        RunWeights(RunFolder.open(tmp_path / "run")).original(name)


@pytest.mark.parametrize("without", [{"patience": 1, "contexts": None}, {"contexts": None}])
def test_a_run_begun_before_some_settings_of_targets_opens_and_is_hashed_as_it_was_begun(model, tmp_path, without):
    editor = Editor.from_pretrained(model, tmp_path / "run", reporter=Quiet(), **{**QUICK, "method": "frugal"})
    editor.edit(fact_records(2))
    editor.close()
    file, journal = tmp_path / "run" / "config.json", tmp_path / "run" / "journal.jsonl"
    content, digest = json.loads(file.read_text()), editor.run.config.digest
    for name in without:
        del content["settings"]["targets"][name]
    file.write_text(json.dumps(content))
    with pytest.raises(SphereEditError, match="is not what this run was started with"):
        RunFolder.open(tmp_path / "run")
    hashed = {**content, "model": {name: value for name, value in content["model"].items() if name != "source"}}
    del hashed["created"]
    older = hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()
    journal.write_text(journal.read_text().replace(digest, older))
    config = RunFolder.open(tmp_path / "run").config
    assert {name: config.settings["targets"][name] for name in without} == without
    assert (config.digest, config.as_content()) == (older, content)
    with closing(Editor.open(tmp_path / "run", Quiet())) as again:
        assert {name: vars(again.settings.targets)[name] for name in without} == without
