"""Single facts are taken back: their share leaves the weights, the others stay, and every way there survives a kill."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Crash, dying, fact_records
from families import save_tiny
from sphere_edit import SphereEditError, files
from sphere_edit.editing.methods import METHODS
from sphere_edit.editor import Editor, opened
from sphere_edit.facts.readers import facts_from
from sphere_edit.numerics.projection import Sphere
from sphere_edit.numerics.update import LowRankUpdate, joined
from sphere_edit.progress import Quiet
from sphere_edit.reporting.series import Series
from sphere_edit.reporting.stories import Timeline, stories
from sphere_edit.runs import removal, taking_back
from sphere_edit.runs.commit import Committer
from sphere_edit.runs.folder import RunFolder
from sphere_edit.runs.history import History
from sphere_edit.runs.proof import prove
from sphere_edit.runs.records import Rollback
from sphere_edit.runs.removal import chosen, shares_of, with_superseded
from sphere_edit.runs.weights import RunWeights
from test_every_method import COMMON, OPTIONS
from test_records import accepted, batch
from test_runs import same, without_times
from torture import differing, in_child, remains

QUICK: dict[str, Any] = {**COMMON, "batch_size": 2, "layers": [1, 2], "targets": {"steps": 3, "lr": 0.3}}
WRITING = sorted(set(METHODS) - {"none"})
SUBTRACTED = sorted(set(WRITING) - {"rect", "lyaplock", "ft", "locft", "ultraedit"})


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("model"))


def start(model: Path, run: Path, **options: Any) -> Editor:
    method = options.get("method", "memit_seq")
    settings = {**QUICK, "method": method, "options": OPTIONS.get(method, {}), "reporter": Quiet(), **options}
    return Editor.from_pretrained(model, run, **settings)


def weights_of(editor: Editor) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in editor.weights.working.items()}


def states_of(editor: Editor) -> dict[str, torch.Tensor]:
    states = editor._stream.committer.states
    return {f"{name}/{part}": value for name, state in states.items() for part, value in state.items()}


class Listening(Quiet):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str, style: str = "") -> None:
        self.said.append(text)


# --- the arithmetic -----------------------------------------------------------------------------------------------


def test_a_share_after_sphere_is_sphere_of_the_share():
    """SPHERE is linear in ΔW, so what was written for a fact is what its own share would have become; float64."""
    torch.manual_seed(0)
    weight = torch.randn(20, 30, dtype=torch.float64)
    update = LowRankUpdate(torch.randn(20, 6, dtype=torch.float64), torch.randn(6, 30, dtype=torch.float64))
    sphere = Sphere(eta=0.5, alpha=0.7)
    whole = sphere(update, weight)
    columns = [1, 4]
    expected = sphere(update.left[:, columns] @ update.right[columns], weight)
    assert float((sphere(update, weight).dense() - update.dense()).norm()) > 1, "or this test says nothing"
    torch.testing.assert_close(whole.share(columns).dense(), expected, rtol=1e-12, atol=1e-12)
    rest = joined([whole.share([0, 2, 3, 5]), whole.share(columns)])
    torch.testing.assert_close(rest.dense(), whole.dense(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", [*SUBTRACTED, "revive-both"])
def test_a_share_is_what_the_method_wrote_for_the_fact(model, tmp_path, method):
    """Shares of all facts add up to what was written, and a fact's own is of its residual: zero residual, zero share."""
    name, options = method.removesuffix("-both"), OPTIONS.get(method.removesuffix("-both"), {})
    options = {**options, "protect": "both"} if method.endswith("-both") else options
    more = {} if name not in ("emmet", "rome") else {"layers": [1]}
    editor = start(model, tmp_path / "run", method=name, options=options, repair=0, recheck=0, **more)
    editor.edit(fact_records(4))
    run = editor.run
    shares = [shares_of(run, [index], editor.session.method.columnwise) for index in range(4)]
    for name in editor.weights.names:
        total = sum(share[name].dense().double() for share in shares)
        written = sum(update[name].dense().double() for _, update, _ in run.updates(0, 2))
        torch.testing.assert_close(total, written, rtol=1e-5, atol=1e-7)
        assert float(shares[0][name].dense().norm()) > 0
    editor.close()


def test_columns_that_do_not_add_up_are_nobodys():
    """An update with another rank than its facts have columns, as a method might compress it, is not taken apart."""
    written = batch(1, [0, 1], columns=[2, 1])
    update = LowRankUpdate(torch.ones(4, 6), torch.ones(6, 5))
    assert removal._share(written, {1}, update).left.shape == (4, 2)
    assert removal._share(written, {1}, update.share(range(4))) is None
    assert removal._share(batch(1, [0, 1]), {1}, update.share(range(3))) is None


def test_subtraction_takes_away_the_share_and_the_key(model, tmp_path):
    """W loses the fact's columns of every batch that wrote it; the state is that of the other keys, both in float64."""
    editor = start(model, tmp_path / "run", repair=0)
    editor.edit(fact_records(4))
    run, name = editor.run, editor.weights.names[0]
    before = editor.weights.working[name].double()
    share = shares_of(run, [1], True)[name].dense().double()
    keys = torch.cat([run.read_keys(number)[name] for number in (1, 2)], dim=1).double()
    original = editor.session.method.start(editor._stream.committer.statistics[name])["system"]
    editor.remove(1)
    after = editor.weights.working[name].double()
    record = run.history.batches[2]
    assert (record.kind, record.removed, record.rechecked) == ("removal", [1], [0, 2, 3])
    subtracted = RunWeights(run, editor.weights.original).working(name, 3).double()
    torch.testing.assert_close(subtracted, before - share, rtol=1e-5, atol=1e-7)
    assert not torch.equal(after, before)
    editor._stream.committer.go_to(3)
    system = editor._stream.committer.states[name]["system"]
    kept = keys[:, [0, 2, 3]]
    torch.testing.assert_close(system, original + kept @ kept.T, rtol=1e-8, atol=1e-9)
    editor.close()


# --- every method -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", WRITING)
def test_every_method_takes_facts_back(method, model, tmp_path):
    """The way is the method's; the removed prompts come nearer to the unedited model; replay and rollbacks are bit for bit."""
    listening = Listening()
    settings = {**COMMON, "method": method, "options": OPTIONS.get(method, {}), "batch_size": 3}
    editor = Editor.from_pretrained(model, tmp_path / "run", reporter=listening, **settings)
    records = [{**record, "prompt": "People speak of {}", "paraphrases": []} for record in fact_records(6)]
    editor.edit(records)
    head, edited = editor.run.history.head, weights_of(editor)
    metrics = editor.remove([1, 4])
    run, history = editor.run, editor.run.history
    assert (metrics["facts"], metrics["removed"], history.retained) == (4, 2, [0, 2, 3, 5])
    assert [row["index"] for row in metrics["removed_facts"]] == [1, 4]
    record = history.batches[head]
    assert record.kind == "removal"
    assert bool(record.written_back) == (method not in SUBTRACTED)
    assert any("could be subtracted" in line for line in listening.said) == (method not in SUBTRACTED)
    assert any("stays in its state" in line for line in listening.said) == (method == "ultraedit")
    last = history.removal_checks[-1]
    assert last.after == history.head
    assert [entry["fact"] for entry in last.facts] == [1, 4]
    assert not any(entry["new"] for entry in last.facts)
    now, states, number = weights_of(editor), states_of(editor), history.head
    editor.close()
    shutil.rmtree(run.path / "checkpoints")
    with opened(run.path, Quiet()) as again:
        assert same(weights_of(again), now)
        assert states.keys() == states_of(again).keys()
        for part, value in states_of(again).items():
            assert torch.equal(value, states[part]), part
        for name in again.weights.names:
            assert torch.equal(RunWeights(run, again.weights.original).deployed(name), again.weights.deployed(name))
        again.rollback(head)
        assert same(weights_of(again), edited)
        assert again.run.history.retained == list(range(6))
        again.remove([1, 4])
        assert again.run.history.head == number
        assert same(weights_of(again), now), "the same again, after a rollback across it"


def test_the_unedited_model_is_written_where_subtraction_does_not_bring_it_back(model, tmp_path, monkeypatch):
    """First its state at the subjects, then, where that is not enough, its answers; each once."""
    editor = start(model, tmp_path / "run", repair=0)
    editor.edit(fact_records(6))
    plain, asked = taking_back.Returned.of, []

    def not_yet(*args):
        found = plain(*args)
        asked.append(found)
        back = len(asked) > 2 and len(asked) % 2 == 0
        return replace(found, returned=back)

    monkeypatch.setattr(taking_back.Returned, "of", not_yet)
    editor.remove([0, 3])
    written = [(record.kind, record.removed, record.written_back) for record in editor.run.history.batches[3:]]
    assert written == [("removal", [0, 3], []), ("removal", [], [0, 3]), ("removal", [], [0])]
    targets = [record.targets for record in editor.run.history.batches[4:]]
    assert [target["loss_after"] is not None for target in targets] == [False, True], "only answers are optimised"
    assert editor.run.history.written_back == {0, 3}
    editor.edit([fact_records(1)[0]])
    assert editor.run.history.written_back == {3}, "a new fact in its place supersedes what was written back"
    assert editor.run.history.superseded == set()
    editor.close()


def test_the_state_that_is_written_back_is_the_unedited_models(model, tmp_path):
    """Written exactly (no ordinary keys to spare), the last edited layer holds at the subject what it held before any edit."""
    options = {"method": "emmet", "options": {}, "layers": [1], "batch_size": 1, "sphere": {"enabled": False}}
    editor = start(model, tmp_path / "run", repair=0, **options)
    editor.edit(fact_records(3))
    source = editor._stream.committer.source
    fact = editor.run.facts()[1]

    def held() -> torch.Tensor:
        source._take_up([fact])
        return source._new_reader().keys_and_values(0)[1].double()

    with editor.weights.unedited():
        unedited = held()
    before = held()
    editor._stream.committer.write_back([1], [fact], "state", [1])
    after = held()
    assert float((before - unedited).norm()) > 100 * float((after - unedited).norm())
    editor.close()


# --- going back to where nothing was written ----------------------------------------------------------------------


@pytest.mark.parametrize("method", ["frugal", "alphaedit", "ultraedit"])
def test_removing_adding_and_removing_again_ends_at_the_bits_of_removing_once(model, tmp_path, method):
    more = {} if method != "ultraedit" else {"layers": None}
    editor = start(model, tmp_path / "run", method=method, **more)
    editor.edit(fact_records(6))
    editor.remove([1])
    once, states = weights_of(editor), states_of(editor)
    metrics = editor.metrics()
    editor.edit([fact_records(2)[1]])
    assert editor.run.history.retained == [0, 2, 3, 4, 5, 6]
    assert not same(weights_of(editor), once)
    editor.remove([6])
    assert editor.run.history.removal is None
    assert same(weights_of(editor), once)
    assert editor.metrics()["edited"] == metrics["edited"]
    head = editor.run.history.head
    editor.close()
    proof = prove(RunFolder.open(tmp_path / "run"), Quiet())
    assert (proof.faults, proof.batches) == ([], head)
    with opened(tmp_path / "run", Quiet()) as again:
        assert same(weights_of(again), once)
        for part, value in states_of(again).items():
            assert torch.equal(value, states[part])
        again.rollback(head - 1)
        assert again.run.history.retained == [0, 2, 3, 4, 5, 6]


def test_all_facts_removed_leave_the_unedited_model(model, tmp_path):
    editor = start(model, tmp_path / "run")
    original = {name: value.clone() for name, value in editor.model.state_dict().items()}
    editor.edit(fact_records(3))
    metrics = editor.remove([0, 1, 2])
    assert metrics["facts"] == 0
    assert all(torch.equal(value, original[name]) for name, value in editor.model.state_dict().items())
    assert all(entry["returned"] and entry["kl"] == 0 for entry in editor.run.history.removal_checks[-1].facts)
    editor.edit(fact_records(1))
    assert editor.run.history.retained == [3]
    editor.close()
    assert Series.read(tmp_path / "run").changed


@pytest.mark.parametrize("method", ["frugal", "alphaedit", "rect"])
def test_exact_is_the_run_without_the_fact(model, tmp_path, method):
    """Replayed from the batch before it, the run has the bits of one that never had the fact: weights and state."""
    records = fact_records(12)
    options = {"batch_size": 2, "repair": 2} if method == "frugal" else {}
    never = start(model, tmp_path / "never", method=method, **options)
    never.edit([*records[:3], *records[4:]])
    listening = Listening()
    editor = start(model, tmp_path / "run", method=method, **{**options, "reporter": listening})
    editor.edit(records)
    editor.remove([3], exact=True)
    assert any(line.startswith("Replaying from batch 1: 9 other facts to edit again") for line in listening.said)
    assert same(weights_of(editor), weights_of(never))
    for part, value in states_of(never).items():
        assert torch.equal(value, states_of(editor)[part])
    ours, theirs = editor.metrics(), never.metrics()
    assert ours["edited"] == theirs["edited"]
    assert [row["edited"] for row in ours["per_fact"]] == [row["edited"] for row in theirs["per_fact"]]
    assert ours["retention"] == theirs["retention"]
    editor.rollback(2)
    assert editor.run.history.retained == [0, 1, 2, 3]
    for one in (never, editor):
        one.close()


# --- which facts --------------------------------------------------------------------------------------------------


def folded_history() -> tuple[History, list]:
    facts = facts_from(
        [
            {"subject": "France", "prompt": "The capital of {} is", "target_new": "Madrid"},
            {"subject": "France", "prompt": "The river of {} is", "target_new": "Tiber"},
            {"subject": "Japan", "prompt": "The capital of {} is", "target_new": "Vienna"},
            {"subject": "Japan", "prompt": "The capital of {} is", "target_new": "Rome"},
            {"subject": "2", "prompt": "{} is a number like", "target_new": "seven"},
            {"subject": "Italy", "prompt": "The capital of {} is", "target_new": "Bonn"},
        ]
    ).facts
    later = batch(2, [3, 4])
    later.superseded.append(2)
    return History.of([accepted(6), batch(1, [0, 1, 2]), later, batch(3, kind="removal", removed=[0])]), facts


def test_facts_are_meant_by_number_subject_prompt_or_record():
    history, facts = folded_history()
    assert chosen(history, facts, [1, "1", "the RIVER  of France is", facts[1]]) == [1]
    assert chosen(history, facts, ["france"]) == [1], "the other one about France was removed"
    assert chosen(history, facts, ["The capital of Japan is", "4"]) == [3, 4], "what is superseded is not meant"
    assert with_superseded(history, facts, [3]) == [2, 3]


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        (17, "this run has no fact 17; its facts have the numbers 0 to 5"),
        ("Norway", "no fact 'Norway'"),
        (0, "fact 0 .* was removed already, in batch 3"),
        (2, "fact 2 .* was superseded by fact 3; remove that one"),
        (5, "fact 5 .* has not been edited yet"),
        ("2", "superseded by fact 3"),
        ("", "no fact ''"),
        (-1, "no fact -1"),
    ],
)
def test_what_cannot_be_removed_is_told(wanted, told):
    history, facts = folded_history()
    if wanted == "2":  # both a number and a subject; of the two only the subject's fact stands
        assert chosen(history, facts, [wanted]) == [4]
        return
    with pytest.raises(SphereEditError, match=told):
        chosen(history, facts, [wanted])


def test_what_could_be_several_facts_is_told_with_all_of_them():
    history, facts = folded_history()
    history.take(Rollback(to=2))
    with pytest.raises(SphereEditError, match="'France' could be 2 facts: 0 'The capital of France is' → 'Madrid'; 1 "):
        chosen(history, facts, ["France"])
    other = facts_from([{"subject": "France", "prompt": "The capital of {} is", "target_new": "Oslo"}]).facts[0]
    with pytest.raises(SphereEditError, match="record 1 says 'Oslo', and fact 0 of the run 'Madrid'"):
        chosen(history, facts, [other])
    with pytest.raises(SphereEditError, match="which facts"):
        chosen(history, facts, [])


def test_a_removed_fact_takes_what_it_superseded_with_it_and_can_be_edited_again(model, tmp_path):
    first = {"subject": "France", "prompt": "The capital of {} is", "target_new": "Madrid"}
    editor = start(model, tmp_path / "run", repair=0)
    editor.edit([first, *fact_records(3)])
    editor.edit([{**first, "target_new": "Rome"}])
    editor.remove("France")
    history = editor.run.history
    assert (history.removed, history.superseded) == ({0, 4}, set())
    assert [entry["fact"] for entry in history.removal_checks[-1].facts] == [4], "one prompt is asked once"
    editor.edit([first])
    assert history.retained[-1] == 5
    with pytest.raises(SphereEditError, match="was removed already"):
        editor.remove(4)
    editor.close()


def test_facts_are_named_in_python_by_whatever_is_at_hand(tmp_path):
    record = fact_records(1)[0]
    (fact,) = facts_from([record]).facts
    (tmp_path / "some.jsonl").write_text(json.dumps(record) + "\n")
    assert removal.wanted_from(3) == [3]
    assert removal.wanted_from("Big Ben") == ["Big Ben"]
    for given in (tmp_path / "some.jsonl", [record], facts_from([record]), [fact]):
        assert [one.key for one in removal.wanted_from(given)] == [fact.key]
    assert [type(one) for one in removal.wanted_from([1, "x", record])] == [int, str, type(fact)]


def test_a_fact_in_two_forms_is_taken_back_in_both(tmp_path):
    from test_chat import CHAT

    folder = save_tiny("llama", tmp_path / "model")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": CHAT}))
    editor = start(folder, tmp_path / "run", repair=0, forms=["plain", "chat"])
    editor.edit(fact_records(4))
    share = shares_of(editor.run, [1], True)[editor.weights.names[0]]
    assert share.left.shape[1] == 2, "a column for each form"
    editor._stream.committer.write_back([1], [editor.run.facts()[1]], "answer", [1])
    assert editor.run.history.batches[-1].columns == [2]
    assert editor.run.history.batches[-1].targets["loss_before"] is not None
    editor.close()


# --- dying --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_dying_at_any_write_of_a_removal_ends_as_if_it_had_not(model, tmp_path, monkeypatch, exact):
    def crash_at(step: int | None) -> list[int]:
        count, counted = dying(step)
        monkeypatch.setattr(files, "_sync_folder", counted(originals["_sync_folder"]))
        monkeypatch.setattr(RunFolder, "append", counted(originals["append"]))
        monkeypatch.setattr(RunFolder, "thin", counted(originals["thin"]))
        return count

    originals = {"_sync_folder": files._sync_folder, "append": RunFolder.append, "thin": RunFolder.thin}
    with_all = start(model, tmp_path / "base", recheck=2, repair=0)
    with_all.edit(fact_records(6))
    with_all.close()

    def removed(run: Path) -> Editor:
        """What a user does until it is done: the same command, or --resume once it was begun."""
        editor = Editor.open(run, reporter=Quiet())
        if editor.run.history.removed:
            editor.resume()
        else:
            editor.remove([2], exact)
        return editor

    shutil.copytree(tmp_path / "base", tmp_path / "whole")
    counter = crash_at(None)
    whole = removed(tmp_path / "whole")
    steps = counter[0]
    assert steps > 5
    for step in range(1, steps + 1):
        run = tmp_path / "crashed"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(tmp_path / "base", run)
        crash_at(step)
        with pytest.raises(Crash):
            removed(run)
        crash_at(None)
        again = removed(run)
        assert same(weights_of(again), weights_of(whole)), f"crash at write {step}"
        assert without_times(again.run.entries) == without_times(whole.run.entries), f"crash at write {step}"
        assert again.metrics() == whole.metrics()
        assert not list(run.rglob("*.tmp"))
        again.close()
    whole.close()


WAYS = {"subtracted": ("memit_seq", False), "written over": ("rect", False), "replayed": ("memit_seq", True)}


@pytest.mark.skipif(os.name != "posix", reason="kills processes")
@pytest.mark.parametrize(
    ("way", "every"),
    [("subtracted", False), ("written over", False), *(pytest.param(w, True, marks=pytest.mark.slow) for w in WAYS)],
)
def test_killed_at_any_event_of_the_file_system_a_removal_ends_as_if_it_had_not_been(model, tmp_path, way, every):
    """The process itself is killed: at a few events that change something, or in the slow checks at each. All files are compared."""
    method, exact = WAYS[way]
    editor = start(model, tmp_path / "base", method=method, recheck=2, repair=0, evaluation={"generation": "off"})
    editor.edit(fact_records(4))
    editor.close()
    shutil.copytree(tmp_path / "base", tmp_path / "whole" / "run")
    said, events = in_child(lambda: _removes(str(tmp_path / "whole" / "run"), exact), changing=True)
    assert said == "well"
    wanted = remains(tmp_path / "whole")
    killed = 0
    for event in range(1, events + 1, 1 if every else max(1, events // 5)):
        place = tmp_path / "killed"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(tmp_path / "base", place / "run")
        said, _ = in_child(lambda place=place, event=event: _removes(str(place / "run"), exact), None, event, True)
        killed += said == "killed"
        assert in_child(lambda place=place: _removes(str(place / "run"), exact))[0] == "well"
        assert not differing(remains(place), wanted), f"event {event} of {events}"
    assert killed > 4
    print(f"removal, {way}: killed at {killed} of {events} events")


def _removes(run: str, exact: bool = False) -> None:
    """What a killed and restarted process does."""
    torch.set_num_threads(1)
    with opened(run, Quiet()) as editor:
        if editor.run.history.removed:
            editor.resume()
        else:
            editor.remove([2], exact)


@pytest.mark.slow  # what dying at every write does not find is rare
@pytest.mark.parametrize("wanted", [10])
def test_killed_at_random_instants_of_a_removal_and_resumed(model, tmp_path, wanted):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_removal"])
    editor = start(model, tmp_path / "base", recheck=2, repair=0)
    editor.edit(fact_records(8))
    editor.close()

    def launch(run: Path) -> multiprocessing.process.BaseProcess:
        process = context.Process(target=_removes, args=(str(run),))
        process.start()
        return process

    shutil.copytree(tmp_path / "base", tmp_path / "whole")
    began = time.monotonic()
    launch(tmp_path / "whole").join(300)
    length = time.monotonic() - began
    whole = RunFolder.open(tmp_path / "whole")
    assert whole.history.removed == {2}
    generator, kills = random.Random(wanted), 0
    while kills < wanted:
        run = tmp_path / "killed"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(tmp_path / "base", run)
        while True:
            process = launch(run)
            process.join(generator.uniform(0, 1.2 * length))
            if process.exitcode is not None:
                assert process.exitcode == 0
                break
            process.kill()
            process.join()
            kills += 1
        resumed = RunFolder.open(run)
        assert without_times(resumed.entries) == without_times(whole.entries)
        assert (run / "metrics.json").read_text() == (whole.path / "metrics.json").read_text()
        assert not list(run.rglob("*.tmp"))


def test_a_removal_waits_for_an_interrupted_run(model, tmp_path, monkeypatch):
    editor = start(model, tmp_path / "run")

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Committer, "edit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        editor.edit(fact_records(4))
    with pytest.raises(SphereEditError, match="was interrupted; finish it first"):
        editor.remove([0])
    editor.close()


# --- told ---------------------------------------------------------------------------------------------------------


def test_history_tells_what_happened_to_a_run_and_to_a_fact(model, tmp_path):
    editor = start(model, tmp_path / "run", recheck=1, repair=0, evaluation={"generation": "plain"})
    editor.edit(fact_records(4))
    editor.edit([{**fact_records(1)[0], "target_new": "Sweden"}])
    editor.remove([1])
    run = editor.run
    editor.close()
    events = Timeline.of(run).events
    kinds = [event.kind for event in events]
    assert kinds[:3] == ["facts", "edit", "edit"]
    assert "subtracted" in kinds
    assert kinds[-1] == "check"
    assert all(event.time is not None and event.stands for event in events)
    (story,) = stories(run, "1")
    told = [event.kind for event in story.events]
    assert told[:2] == ["facts", "edit"]
    assert "subtracted" in told
    assert story.state == "removed"
    assert story.answers[0].after == 0
    assert story.answers[-1].after == run.history.head
    assert all(answer.said is not None for answer in story.answers)
    older = stories(run, fact_records(1)[0]["subject"])
    assert [one.state for one in older] == ["superseded", "stands"]
    assert [event.about["by"] for event in older[0].events if event.kind == "superseded"] == [4]
    with pytest.raises(SphereEditError, match="has no fact 'nothing'"):
        stories(run, "nothing")


def test_history_says_what_was_taken_back(model, tmp_path):
    editor = start(model, tmp_path / "run", repair=0)
    editor.edit(fact_records(4))
    editor.rollback(1)
    run = editor.run
    editor.close()
    assert [(event.kind, event.stands) for event in Timeline.of(run).events if event.batch == 2] == [
        (event.kind, False) for event in Timeline.of(run).events if event.batch == 2
    ]
    (story,) = stories(run, "3")
    assert story.state == "withdrawn"
    assert [(event.kind, event.stands) for event in story.events if event.kind in ("edit", "rollback")] == [
        ("edit", False),
        ("rollback", True),
    ]


def test_the_commands_remove_and_tell(model, tmp_path, blank_figures):
    from test_cli import run as command

    records = fact_records(4)
    folder = tmp_path / "run"
    editor = start(model, folder, repair=0, recheck=0)
    editor.edit(records)
    editor.close()
    (tmp_path / "gone.jsonl").write_text(json.dumps(records[0]) + "\n")
    out = command("remove", folder, "--fact", "2", "--facts", tmp_path / "gone.jsonl")
    assert "Removing 2 facts" in out
    assert "what was written for them is subtracted" in out
    assert "Removed facts:" in out
    assert "Removed facts" in (folder / "report.html").read_text()
    shown = command("show", folder)
    assert "2 removed" in shown
    assert "removal" in shown
    assert "2 facts removed: what was written subtracted" in command("history", folder)
    assert "What the model says" in command("history", folder, "2")
    with pytest.raises(SphereEditError, match="was removed already"):
        command("remove", folder, "--fact", "2")
    with pytest.raises(SphereEditError, match="which facts"):
        command("remove", folder)
