"""Runs on disk: nothing is lost, resume and rollback are bit for bit, runs continue, facts supersede one another."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from conftest import Crash, dying, fact_records
from families import save_tiny
from sphere_edit import SphereEditError, files, hyperspherical_energy
from sphere_edit.editing import batch as solving_module
from sphere_edit.editing import guard
from sphere_edit.editor import Editor, opened
from sphere_edit.evaluation.intervals import summarise
from sphere_edit.evaluation.scores import FactScores
from sphere_edit.exports import shipment
from sphere_edit.facts.readers import facts_from
from sphere_edit.numerics.update import LowRankUpdate
from sphere_edit.planning import estimate
from sphere_edit.progress import Quiet, RichReporter
from sphere_edit.reporting.series import Series
from sphere_edit.runs import folder as folder_module
from sphere_edit.runs import stream as stream_module
from sphere_edit.runs.commit import Committer
from sphere_edit.runs.folder import RunFolder
from sphere_edit.runs.measuring import Evaluator
from sphere_edit.runs.records import Finished

QUICK = {
    "batch_size": 2,
    "layers": [1, 2],
    "targets": {"steps": 3, "lr": 0.3},
    "moments": {"sampled_tokens": 256},
    "tokens_per_batch": 256,
}
METHODS = {
    "alphaedit": {"method": "alphaedit", "options": {"l2": 0.1, "null_space": "quantile", "null_space_threshold": 0.8}},
    "memit": {"method": "memit", "options": {"second_moment_weight": 0.1}},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("model"))


def start(model: Path, run: Path, **options) -> Editor:
    """A new run of AlphaEdit; what the model says in words is asked only where ``evaluation`` says so, for it takes as long as editing."""
    options["evaluation"] = {"generation": "off", **options.get("evaluation", {})}
    return Editor.from_pretrained(model, run, **{**QUICK, **METHODS["alphaedit"], **options})


def weights_of(editor: Editor) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in editor.model.state_dict().items()}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def without_times(entries: list[dict]) -> list[dict]:
    return [
        {
            name: value
            for name, value in entry.items()
            if name not in ("seconds", "time", "peak_memory", "expected_memory")
        }
        for entry in entries
    ]


def check_energies(editor):
    """What the journal says of the energies of two batches, against the weights themselves."""
    alpha = editor.settings.diagnostic_sphere().alpha if editor.session.sphere is not None else 0
    reports = [batch.matrices for batch in editor.run.history.batches]
    for name in editor.weights.names:
        original, now = editor.weights.original(name), editor.weights.deployed(name)
        first, second = (report[name] for report in reports)
        assert second["energy"] == pytest.approx(hyperspherical_energy(now).total, rel=1e-12)
        whole = second["energy"] - hyperspherical_energy(original).total
        assert first["energy_change"] + second["energy_change"] == pytest.approx(whole, abs=1e-9 * second["energy"])
        assert second["relative_drift"] == pytest.approx(float((now - original).norm() / original.norm()), rel=1e-5)
        assert second["collateral_ratio"] > 0
        for report in (first, second):
            assert abs(report["first_order"]) <= report["largest_change"]
            assert report["least_response"] <= report["response"]
            # the deployed change is the update, and SPHERE takes a share α of its principal part and nothing else
            assert report["first_order"] == pytest.approx(report["first_order_update"], rel=1e-3, abs=1e-4)
            kept, before = report["first_order_update_principal"], report["first_order_solved_principal"]
            scale = report["largest_change"]
            assert kept == pytest.approx((1 - alpha) * before, abs=1e-5 * scale)
            rest = report["first_order_update"] - kept
            assert rest == pytest.approx(report["first_order_solved"] - before, abs=1e-5 * scale)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sphere", [True, False])
def test_two_batches_change_the_model_and_every_rollback_is_exact(model, tmp_path, method, sphere):
    editor = start(model, tmp_path / "run", sphere={"enabled": sphere}, evaluation={"every": 1}, **METHODS[method])
    original = weights_of(editor)
    metrics = editor.edit(fact_records(4))
    first_batch, second_batch = editor.run.history.batches
    for batch in (first_batch, second_batch):
        for report in batch.matrices.values():
            shrunk = report["principal_norm"] / report["principal_norm_before"]
            alpha = editor.settings.diagnostic_sphere().alpha
            assert report["principal_norm_before"] > 1e-4
            assert shrunk == pytest.approx(1 - alpha if sphere else 1, abs=1e-4)
    check_energies(editor)
    assert metrics["after"] == 2
    after_two = weights_of(editor)
    assert not same(original, after_two)
    changed = {name for name in original if not torch.equal(original[name], after_two[name])}
    assert changed == {f"{name}.weight" for name in editor.weights.names}
    editor.close()
    with opened(tmp_path / "run") as again:
        assert same(weights_of(again), after_two)
        again.rollback(1)
        after_one = weights_of(again)
        assert not same(after_one, after_two)
        assert not same(after_one, original)
        assert not (tmp_path / "run" / "metrics.json").exists()
        again.rollback(0)
        assert same(weights_of(again), original)
        with pytest.raises(SphereEditError, match="cannot roll back to batch 1: this run stands at batch 0"):
            again.rollback(1)


@pytest.mark.parametrize("basis", ["current", "pretrained"])
@pytest.mark.parametrize("project", ["per_layer", "after_all"])
def test_where_sphere_is_applied_and_from_which_weights(model, tmp_path, basis, project):
    sphere = {"alpha": 0.8, "basis": basis, "project": project}
    editor = start(model, tmp_path / "sphere", sphere=sphere)
    plain = start(model, tmp_path / "plain", sphere={"enabled": False})
    editor.edit(fact_records(2)), plain.edit(fact_records(2))
    first, second = editor.weights.names
    ours, theirs = (e.run.read_update(1)[0] for e in (editor, plain))
    for name in (first, second):
        projected = editor.session.sphere(theirs[name], editor.weights.original(name)).dense()
        equal = torch.allclose(ours[name].dense(), projected, atol=1e-6, rtol=1e-4)
        assert equal == (name == first or project == "after_all"), (
            "per layer, the second one sees the first one projected"
        )
    before = editor.weights.snapshot()
    editor.edit(fact_records(2, start=4))
    update = editor.run.read_update(2)[0][first]
    directions = editor.session.sphere.directions(
        before[first] if basis == "current" else editor.weights.original(first)
    )
    report = editor.run.history.batches[1].matrices[first]
    assert report["principal_norm"] == pytest.approx(float(update.to(torch.float64).times(directions).norm()), rel=1e-5)
    assert report["principal_norm"] == pytest.approx(0.2 * report["principal_norm_before"], rel=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_models_are_edited_through_float32_masters(tmp_path, dtype):
    folder = save_tiny("llama", tmp_path / "model", getattr(torch, dtype))
    editor = start(folder, tmp_path / "run")
    editor.edit(fact_records(4))
    name = editor.weights.names[0]
    deployed = editor.model.get_submodule(name).weight
    assert deployed.dtype == getattr(torch, dtype)
    assert torch.equal(deployed, editor.weights.working[name].to(deployed.dtype))
    assert not torch.equal(deployed.float(), editor.weights.working[name]), "the master keeps more digits"
    editor.close()
    with opened(tmp_path / "run") as again:
        assert torch.equal(again.weights.working[name], editor.weights.working[name])


def test_editing_on_after_a_rollback_equals_never_having_gone_further(model, tmp_path):
    longer = start(model, tmp_path / "longer")
    longer.edit(fact_records(6))
    longer.rollback(1)
    longer.edit(fact_records(4, start=8))
    shorter = start(model, tmp_path / "shorter")
    shorter.edit(fact_records(2))
    shorter.edit(fact_records(4, start=8))
    assert same(weights_of(longer), weights_of(shorter))
    assert longer.metrics()["edited"] == shorter.metrics()["edited"]
    assert longer.run.history.withdrawn == {2, 3, 4, 5}
    assert same(
        longer._stream.committer.states["model.layers.1.mlp.down_proj"],
        shorter._stream.committer.states["model.layers.1.mlp.down_proj"],
    )


def test_a_run_continues_next_week_with_its_state_and_original_weights(model, tmp_path):
    once = start(model, tmp_path / "once")
    once.edit(fact_records(6))
    twice = start(model, tmp_path / "twice")
    twice.edit(fact_records(4))
    twice.close()
    with opened(tmp_path / "twice") as later:
        metrics = later.edit(fact_records(2, start=4))
        assert same(weights_of(later), weights_of(once))
        assert metrics["facts"] == 6
        assert metrics["edited"] == once.metrics()["edited"]
        assert metrics["unedited"]["efficacy"] == pytest.approx(once.metrics()["unedited"]["efficacy"])


def test_a_later_fact_supersedes_an_earlier_one_and_it_leaves_retention(model, tmp_path):
    editor = start(model, tmp_path / "run")
    records = fact_records(4)
    contradiction = {**records[0], "target_new": "Vienna", "subject": records[0]["subject"].upper()}
    editor.edit([*records, contradiction])
    history = editor.run.history
    assert history.superseded == {0}
    assert history.retained == [1, 2, 3, 4]
    assert [row["index"] for row in editor.metrics()["per_fact"]] == [1, 2, 3, 4]
    editor.rollback(2)
    assert editor.run.history.retained == [0, 1, 2, 3], "a rollback brings it back"


def test_the_unedited_model_answers_where_a_fact_names_no_answer(model, tmp_path):
    editor = start(model, tmp_path / "run")
    result = editor.evaluate(fact_records(3))
    assert all(fact.target_true for fact in result.facts)
    assert all(neighbor.answer for fact in result.facts for neighbor in fact.neighbors)
    own = result.unedited[0].neighbors[1]
    assert own.correct, "the model's own greedy answer is its likeliest"
    assert result.unedited == result.edited


def test_statistics_are_cached_and_never_taken_from_another_model(model, tmp_path):
    start(model, tmp_path / "a").edit(fact_records(2))
    moments = files.cache_dir() / "moments"
    kept = {path: path.stat().st_mtime_ns for path in moments.iterdir()}
    start(model, tmp_path / "b").edit(fact_records(2))
    assert {path: path.stat().st_mtime_ns for path in moments.iterdir()} == kept
    other = save_tiny("llama", tmp_path / "other-model")
    loaded = Editor.from_pretrained(other, tmp_path / "c", **QUICK, **METHODS["alphaedit"])
    with torch.no_grad():
        loaded.model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    loaded.loaded.fingerprint = "changed"
    loaded.edit(fact_records(2))
    assert len(list(moments.iterdir())) == 2 * len(kept)


# --- crashes ------------------------------------------------------------------------------------------------------


def test_dying_at_any_write_and_resuming_equals_never_having_died(model, tmp_path, monkeypatch):
    def crash_at(step: int | None) -> list[int]:
        count, counted = dying(step)
        for module, name in [(files, "_sync_folder"), (files, "copied"), (folder_module, "write_text")]:
            monkeypatch.setattr(module, name, counted(originals[name]))
        monkeypatch.setattr(RunFolder, "append", counted(originals["append"]))
        monkeypatch.setattr(RunFolder, "thin", counted(originals["thin"]))
        return count

    originals = {
        "_sync_folder": files._sync_folder,
        "copied": files.copied,
        "write_text": files.write_text,
        "append": RunFolder.append,
        "thin": RunFolder.thin,
    }
    options = {"evaluation": {"every": 1, "generation": "plain"}}
    counter = crash_at(None)
    whole = start(model, tmp_path / "whole", **options)
    whole.edit(fact_records(4))
    steps = counter[0]
    assert steps > 15
    for step in range(1, steps + 1):
        run = tmp_path / "crashed"
        shutil.rmtree(run, ignore_errors=True)
        crash_at(step)
        editor = start(model, run, **options)
        try:
            editor.edit(fact_records(4))
        except Crash:
            if editor.run is not None:
                editor.close()
        del editor
        crash_at(None)
        if not RunFolder.exists(run):
            resumed = start(model, run, **options)
            resumed.edit(fact_records(4))
        else:
            resumed = Editor.open(run)
            resumed.resume()
        assert same(weights_of(resumed), weights_of(whole)), f"crash at write {step}"
        assert without_times(resumed.run.entries) == without_times(whole.run.entries), f"crash at write {step}"
        ours, theirs = resumed.metrics(), whole.metrics()
        assert ours == theirs
        resumed.close()


DRIFT = guard.Limit("relative drift", "relative_drift", 0.0)


def test_the_guard_withdraws_the_batch_that_leaves_the_safe_region(model, tmp_path, monkeypatch):
    free = start(model, tmp_path / "free", evaluation={"every": 1})
    free.edit(fact_records(8))
    reports = [batch.matrices for batch in free.run.history.batches]
    drifts = [DRIFT.measured(report) for report in reports]
    assert drifts[0] < drifts[1] < drifts[2], "or this test says nothing"
    monkeypatch.setattr(guard, "LIMITS", (replace(DRIFT, value=(drifts[1] + drifts[2]) / 2),))
    editor = start(model, tmp_path / "run", evaluation={"every": 1}, guard=True)
    metrics = editor.edit(fact_records(8))
    history = editor.run.history
    assert (history.head, history.finished, history.pending, metrics["after"]) == (2, True, [], 2)
    assert history.withdrawn == {4, 5, 6, 7}
    assert history.guard.number == 3
    assert history.guard.matrices == reports[2]
    assert "relative drift" in history.guard.reason
    events = [entry["event"] for entry in editor.run.entries]
    assert events == [
        "facts",
        "unedited",
        "batch",
        "evaluation",
        "batch",
        "evaluation",
        "guard",
        "evaluation",
        "finished",
    ]
    guarded = weights_of(editor)
    free.rollback(2)
    assert same(guarded, weights_of(free)), "nothing of the third batch is left"
    editor.rollback(1)
    assert editor.run.history.guard is None, "a run rolled back further does not stand where the guard stopped it"
    editor.edit(fact_records(8)[2:4])
    # the run goes on as one that never met the guard
    monkeypatch.setattr(guard, "LIMITS", ())
    editor.edit(fact_records(8)[4:6])
    assert editor.run.history.guard is None
    assert editor.run.history.head == 3
    assert editor.run.history.batches[2].matrices == reports[2]


def test_a_guard_that_objects_to_the_first_batch_leaves_the_unedited_model(model, tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "LIMITS", (replace(DRIFT, value=0.0),))
    editor = start(model, tmp_path / "run", guard=True)
    original = weights_of(editor)
    metrics = editor.edit(fact_records(4))
    assert (metrics["after"], metrics["facts"], metrics["per_fact"]) == (0, 0, [])
    assert same(original, weights_of(editor))
    editor.close()
    with opened(tmp_path / "run") as again:
        assert same(original, weights_of(again))
        assert again.run.history.finished


def test_a_guarded_run_measures_second_moments_for_a_method_that_needs_none(model, tmp_path):
    editor = Editor.from_pretrained(model, tmp_path / "run", method="ultraedit", guard=True, moments=QUICK["moments"])
    editor.edit(fact_records(2))
    (batch,) = editor.run.history.batches
    assert 0 < guard.COLLATERAL.measured(batch.matrices) < guard.COLLATERAL.value


def test_an_objection_names_the_number_and_both_values():
    reports = {
        "a": {"collateral_ratio": 0.1, "relative_drift": 0.2, "energy_drift": -0.3},
        "b": {"collateral_ratio": 0.2, "relative_drift": 0.1, "energy_drift": 0.2},
    }
    summed = guard.Limit("sum", "collateral_ratio", 0.25, summed=True)
    largest = guard.Limit("largest", "energy_drift", 0.25)
    assert guard.objection(reports, [summed]) == "the sum would be 0.3, above 0.25"
    assert guard.objection(reports, [largest]) == "the largest would be 0.3, above 0.25"
    assert guard.objection(reports, [replace(summed, value=0.31), replace(largest, value=0.3)]) is None
    reports["a"]["collateral_ratio"] = None
    assert guard.objection(reports, [replace(summed, value=0.0)]) is None, "what was not measured objects to nothing"


def test_checkpoints_on_a_sample_ask_for_much_the_same_facts_and_the_end_for_all(model, tmp_path):
    editor = start(model, tmp_path / "run", evaluation={"every": 1, "sample": 3})
    metrics = editor.edit(fact_records(10))
    asked = [
        json.loads((tmp_path / "run" / "evaluations" / f"batch-{batch:04d}.json").read_text())["facts"]
        for batch in range(1, 6)
    ]
    assert [len(facts) for facts in asked] == [2, 3, 3, 3, 10]
    assert asked[0] == [0, 1]
    assert asked[4] == list(range(10))
    for before, after in pairwise(asked[1:4]):
        gone, come = set(before) - set(after), set(after) - set(before)
        assert len(gone) == len(come) <= 2
        assert all(fact > max(before) for fact in come), "an earlier fact does not come back"
    assert [entry.facts for entry in editor.run.history.evaluations] == [2, 3, 3, 3, 10]
    assert metrics["facts"] == 10
    scores = json.loads((tmp_path / "run" / "evaluations" / "batch-0003.json").read_text())["scores"]
    assert editor.run.history.evaluations[2].summary == summarise([FactScores.from_dict(s) for s in scores])


def test_metrics_hold_what_the_model_says_before_and_after(model, tmp_path):
    editor = start(model, tmp_path / "run", evaluation={"generation": "plain"})
    records = fact_records(2)
    before = [editor.generate(record["prompt"].replace("{}", record["subject"]), 12) for record in records]
    metrics = editor.edit(records)
    after = [editor.generate(record["prompt"].replace("{}", record["subject"]), 12) for record in records]
    for side, whole in (("unedited", before), ("edited", after)):
        for fact, answer in zip(
            metrics["per_fact"], whole, strict=True
        ):  # shown as far as a verdict needs it; a cut may halve a character
            said = fact[side]["rewrite"]["said"].rstrip("\ufffd")
            assert len(said) > 3
            assert answer.startswith(said)


def _work(model: str, run: str) -> None:
    """What a killed and restarted process does."""
    torch.set_num_threads(1)
    if RunFolder.exists(run):
        with opened(run) as editor:
            editor.resume()
    else:
        start(Path(model), Path(run), evaluation={"every": 2}).edit(fact_records(6))


@pytest.mark.parametrize("wanted", [4, pytest.param(40, marks=pytest.mark.slow)])  # minutes; what 4 miss is rare
def test_killed_at_random_instants_and_resumed(model, tmp_path, wanted, monkeypatch):
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join(sys.path)
    )  # Python before 3.12.3 preloads without the path that it is told
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_runs"])

    def launch(run: Path) -> multiprocessing.process.BaseProcess:
        process = context.Process(target=_work, args=(str(model), str(run)))
        process.start()
        return process

    _finish(launch(tmp_path / "warm"))
    began = time.monotonic()
    _finish(launch(tmp_path / "whole"))
    length = time.monotonic() - began
    whole = RunFolder.open(tmp_path / "whole")
    generator = random.Random(wanted)
    kills = attempt = 0
    while kills < wanted:
        attempt += 1
        run = tmp_path / f"killed-{attempt}"
        while True:
            process = launch(run)
            process.join(generator.uniform(0, length))
            if process.exitcode is not None:
                assert process.exitcode == 0
                break
            process.kill()
            process.join()
            kills += 1
        resumed = RunFolder.open(run)
        assert without_times(resumed.entries) == without_times(whole.entries)
        assert resumed.history.finished
        newest = f"batch-{whole.history.head:04d}.safetensors"
        ours, theirs = (folder.path / "checkpoints" / newest for folder in (resumed, whole))
        assert ours.read_bytes() == theirs.read_bytes()
        assert (run / "metrics.json").read_text() == (whole.path / "metrics.json").read_text()
        assert not list(run.rglob("*.tmp"))


def _finish(process: multiprocessing.process.BaseProcess) -> None:
    process.join(300)
    assert process.exitcode == 0


def test_a_half_written_journal_line_is_dropped_and_a_damaged_one_is_told(model, tmp_path):
    editor = start(model, tmp_path / "run")
    editor.edit(fact_records(2))
    editor.close()
    path = tmp_path / "run" / "journal.jsonl"
    content = path.read_bytes()
    path.write_bytes(content + b'{"event": "batch", "ba')
    assert RunFolder.open(tmp_path / "run").history.head == 1
    with opened(tmp_path / "run"):
        assert path.read_bytes() == content
    path.write_bytes(b"garbage\n" + content)
    with pytest.raises(SphereEditError, match=r"journal\.jsonl, line 1 is damaged"):
        RunFolder.open(tmp_path / "run")


def test_an_append_that_fails_half_way_leaves_no_trace(model, tmp_path, monkeypatch):
    editor = start(model, tmp_path / "run")
    editor.edit(fact_records(2))
    path = tmp_path / "run" / "journal.jsonl"
    content = path.read_bytes()
    for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):
        monkeypatch.setattr(os, "fsync", lambda _, error=error: (_ for _ in ()).throw(error))
        with pytest.raises((SphereEditError, KeyboardInterrupt)):
            editor.run.append(Finished(after=1))
        monkeypatch.undo()
        assert path.read_bytes() == content
        assert len(editor.run.entries) == len(content.splitlines())


def test_interrupting_a_batch_in_a_notebook_leaves_the_model_of_the_last_one(model, tmp_path, monkeypatch):
    editor = start(model, tmp_path / "run")
    editor.edit(fact_records(2))
    before = weights_of(editor)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(editor._stream.committer.source, "all_keys", interrupt)
    with pytest.raises(KeyboardInterrupt):
        editor.edit(fact_records(2, start=4))
    assert same(weights_of(editor), before)
    monkeypatch.undo()
    editor.resume()
    straight = start(model, tmp_path / "straight")
    straight.edit(fact_records(2))
    straight.edit(fact_records(2, start=4))
    assert same(weights_of(editor), weights_of(straight))


def test_lost_evaluations_are_made_again_and_damaged_caches_too(model, tmp_path):
    editor = start(model, tmp_path / "run")
    metrics = editor.edit(fact_records(2))
    entries = list(editor.run.entries)
    for path in (tmp_path / "run" / "evaluations").iterdir():
        path.unlink()
    assert editor.resume() == metrics
    assert editor.run.entries == entries
    for path in files.cache_dir().rglob("*.safetensors"):
        damaged = path.read_bytes()[:-50]
        path.write_bytes(damaged)
    for path in (files.cache_dir() / "samples").iterdir():
        path.write_text("[[1, 2")
    again = start(model, tmp_path / "again")
    assert again.edit(fact_records(2))["edited"] == metrics["edited"]


def test_a_run_keeps_what_was_a_default_when_it_began(model, tmp_path, monkeypatch):
    editor = Editor.from_pretrained(model, tmp_path / "run", method="alphaedit", **{**QUICK, "layers": None})
    editor.edit(fact_records(2))
    editor.close()
    monkeypatch.setattr(type(editor.session.method).model_fields["l2"], "default", 1e9)
    with opened(tmp_path / "run") as later:
        assert later.session.method == editor.session.method
        assert later.session.sphere == editor.session.sphere
        assert later.session.layers == editor.session.layers


def test_a_run_finds_its_model_from_another_folder_and_after_a_move(model, tmp_path, monkeypatch):
    shutil.copytree(model, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    start(Path("model"), Path("run")).edit(fact_records(2))
    monkeypatch.chdir("/")
    with opened(tmp_path / "run") as editor:
        before = weights_of(editor)
    (tmp_path / "model").rename(tmp_path / "moved")
    with pytest.raises(SphereEditError, match="there is no folder"):
        Editor.open(tmp_path / "run")
    with opened(tmp_path / "run", model=tmp_path / "moved") as editor:
        assert same(weights_of(editor), before)


def test_unusable_prompts_are_found_before_any_work_wherever_they_stand(model, tmp_path):
    record = {**fact_records(1)[0], "paraphrases": ["word " * 300]}
    editor = start(model, tmp_path / "run")
    with pytest.raises(SphereEditError, match="(?s)record 2: .*tokens; this model reads"):
        editor.edit([fact_records(1, start=3)[0], record])
    assert not (tmp_path / "run").exists()
    with pytest.raises(SphereEditError, match="none of its facts can be used"):
        editor.edit([record], skip_bad=True)


def test_text_that_looks_like_markup_does_no_harm(model, tmp_path):
    record = {**fact_records(1)[0], "target_new": "[/INST] Rome"}
    editor = Editor.from_pretrained(model, tmp_path / "run", reporter=RichReporter(), **QUICK, **METHODS["alphaedit"])
    editor.edit([record, *fact_records(2, start=3), {**record, "target_new": "[bold Vienna"}])
    assert editor.run.history.superseded == {0}


def test_a_superseding_fact_is_written_as_readily_as_a_new_one(model, tmp_path):
    """The superseded key leaves what AlphaEdit preserves; were it kept, half of the change would be held back."""
    first = {**fact_records(1)[0]}
    second = {**first, "target_new": "Sweden"}
    options = {**QUICK, "batch_size": 1, "method": "alphaedit"}
    options["options"] = {**METHODS["alphaedit"]["options"], "l2": 1e-3}
    editor = Editor.from_pretrained(model, tmp_path / "run", **options)
    editor.edit([first, second])
    assert editor.run.history.superseded == {0}
    history = editor.run.history
    for name in editor.weights.names:
        _, seen = editor.run.read_update(2)
        alone = editor.session.method.after_batch({}, seen[name], editor._stream.committer.statistics[name])["system"]
        kept = editor._stream.committer.states[name]["system"]
        torch.testing.assert_close(kept, alone, atol=1e-9 * float(alone.norm()), rtol=1e-6)
    after = editor._stream.committer.states
    editor.rollback(1)
    editor.edit([second])
    assert editor.run.history.superseded == {0}
    assert len(history.batches) == 2
    for name in editor.weights.names:
        assert torch.equal(editor._stream.committer.states[name]["system"], after[name]["system"])


def test_a_lock_keeps_two_off_one_run(model, tmp_path):
    editor = start(model, tmp_path / "run")
    editor.edit(fact_records(2))
    with pytest.raises(SphereEditError, match="another process is working in"):
        Editor.open(tmp_path / "run")
    editor.close()
    with opened(tmp_path / "run") as again:
        assert again.run.history.head == 1


def test_a_full_disk_is_told_and_loses_nothing(model, tmp_path, monkeypatch):
    editor = start(model, tmp_path / "run")
    editor.edit(fact_records(2))
    before = weights_of(editor)
    real = files.save_file

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(SphereEditError, match="the disk is full.*free some space and go on with --resume"):
        editor.edit(fact_records(2, start=4))
    assert same(weights_of(editor), before), "the model in memory is that of the last batch"
    monkeypatch.setattr(files, "save_file", real)
    editor.resume()
    assert editor.run.history.head == 2
    assert not list((tmp_path / "run").rglob("*.tmp"))


def test_another_model_or_changed_updates_are_noticed(model, tmp_path):
    copy = shutil.copytree(model, tmp_path / "copy")
    editor = start(copy, tmp_path / "run")
    editor.edit(fact_records(4))
    editor.close()
    update = tmp_path / "run" / "updates" / "batch-0001.safetensors"
    tensors = files.read_tensors(update)
    files.write_tensors(update, {name: value * 1.01 for name, value in tensors.items()})
    with opened(tmp_path / "run") as again, pytest.raises(SphereEditError, match="is not what batch 1 wrote"):
        again.rollback(1)
    journal = tmp_path / "run" / "journal.jsonl"
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    for line in lines:
        line.pop("update", None)  # as runs were that kept no hash of their updates
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with opened(tmp_path / "run") as again, pytest.raises(SphereEditError, match="cannot be rebuilt bit for bit"):
        again.rollback(1)
    other = save_tiny("qwen2", tmp_path / "qwen")
    for file in copy.iterdir():
        file.unlink()
    shutil.copytree(other, copy, dirs_exist_ok=True)
    with pytest.raises(SphereEditError, match="not the one this run edited"):
        Editor.open(tmp_path / "run")


def test_checkpoints_that_cost_much_are_rare_and_nothing_depends_on_them(model, tmp_path, monkeypatch):
    monkeypatch.setattr("sphere_edit.runs.commit._CHECKPOINT_EVERY", 0)
    often = start(model, tmp_path / "often", batch_size=1)
    often.edit(fact_records(5))
    monkeypatch.setattr("sphere_edit.runs.commit._CHECKPOINT_EVERY", 1e9)
    rare = start(model, tmp_path / "rare", batch_size=1)
    checkpoints = tmp_path / "rare" / "checkpoints"
    written: list[list[str]] = []
    finish = Evaluator.finish

    def watched(self, run):
        written.append(sorted(path.stem for path in checkpoints.iterdir()))
        finish(self, run)

    monkeypatch.setattr(Evaluator, "finish", watched)
    rare.edit(fact_records(5))
    assert written == [["batch-0001", "batch-0005"]], "the first, and the last before what follows the last batch"
    monkeypatch.undo()
    (checkpoints / "batch-0005.safetensors").unlink()
    name = rare.weights.names[0]
    for one, other in zip(Series.read(often.folder).change(name), Series.read(rare.folder).change(name), strict=True):
        assert torch.equal(one, other)
    rare.close()
    with opened(tmp_path / "rare") as again:
        again.resume()
        assert same(weights_of(again), weights_of(often))
        again.rollback(3)
        often.rollback(3)
        assert same(weights_of(again), weights_of(often))


def test_disk_stays_bounded(model, tmp_path, monkeypatch):
    monkeypatch.setattr("sphere_edit.runs.commit._CHECKPOINT_EVERY", 0)
    editor = start(model, tmp_path / "run", batch_size=1)
    editor.edit(fact_records(7))
    kept = sorted(int(path.stem[-4:]) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == [4, 7]
    after = weights_of(editor)
    editor.rollback(5)
    five = weights_of(editor)
    editor.edit(fact_records(2, start=5))
    assert same(weights_of(editor), after), "the same facts again give the same weights again"
    editor.rollback(5)
    assert same(weights_of(editor), five)


def test_export_is_what_evaluation_saw_and_is_never_half_there(model, tmp_path, monkeypatch):
    editor = start(model, tmp_path / "run")
    with pytest.raises(SphereEditError, match="nothing has been edited yet"):
        editor.save_pretrained(tmp_path / "out")
    editor.edit(fact_records(2))
    monkeypatch.setattr(shipment, "whole_card", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        editor.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    editor.save_pretrained(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "2 facts of" in card
    assert "| Efficacy |" in card
    assert "Big" not in card
    with pytest.raises(SphereEditError, match="exists already"):
        editor.save_pretrained(tmp_path / "out")


def test_a_batch_that_makes_weights_infinite_is_not_kept(model, tmp_path, monkeypatch):
    editor = start(model, tmp_path / "run")
    editor.edit(fact_records(2))
    before = weights_of(editor)
    real = solving_module.Solver._finished

    def infinite(self, *args):
        updates, reports = real(self, *args)
        return {name: LowRankUpdate(u.left * float("inf"), u.right) for name, u in updates.items()}, reports

    monkeypatch.setattr(solving_module.Solver, "_finished", infinite)
    with pytest.raises(SphereEditError, match="batch 2 would make .* infinite or NaN; nothing of it was kept"):
        editor.edit(fact_records(2, start=4))
    assert same(weights_of(editor), before)
    json.loads((tmp_path / "run" / "metrics.json").read_text())


class Listening(Quiet):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text, style=""):
        self.said.append(text)


@pytest.mark.parametrize(("likely", "warned"), [(0.5, True), (0.001, False)])
def test_targets_that_do_not_say_their_answers_are_told(model, tmp_path, monkeypatch, likely, warned):
    monkeypatch.setattr(stream_module, "_LIKELY", likely)
    listening = Listening()
    editor = Editor.from_pretrained(model, tmp_path / "run", reporter=listening, **{**QUICK, **METHODS["memit"]})
    editor.edit(fact_records(2))
    (entry,) = editor.run.history.batches
    each = entry.targets["probabilities"]
    assert len(each) == 2
    assert any(chance < likely for chance in each) is warned, "or this test says nothing"
    told = [text for text in listening.said if "make their answers less than" in text]
    assert len(told) == warned
    assert not warned or f"{sum(chance < likely for chance in each)} of 2 facts" in told[0]
    assert not warned or "in other layers than 2: layers and a step for it are found by `sphere-edit tune " in told[0]


@pytest.mark.parametrize("method", ["alphaedit", "memit"])
def test_a_run_whose_statistics_are_gone_says_so_and_can_still_be_left(model, tmp_path, method):
    editor = start(model, tmp_path / "run", **METHODS[method])
    editor.edit(fact_records(2))
    editor.close()
    shutil.rmtree(tmp_path / "run" / "statistics")
    with (
        opened(tmp_path / "run", Quiet()) as editor,
        pytest.raises(SphereEditError, match="lacks what .* put the folder back"),
    ):
        editor.edit(fact_records(2, start=4))
    with opened(tmp_path / "run", Quiet()) as editor:
        editor.rollback(0)
        assert editor.run.history.head == 0


def test_frugal_keeps_facts_of_one_subject_apart(model, tmp_path):
    """Their keys are nearly the same, and their targets know nothing of one another."""
    about = [("Ada", "{} plays the"), ("Ada", "{} lives in"), ("Bruno", "{} plays the"), ("ada ", "{} speaks")]
    facts = [{"subject": subject, "prompt": prompt, "target_new": "French"} for subject, prompt in about]
    batches = {}
    for name in ("frugal", "memit"):
        editor = Editor.from_pretrained(model, tmp_path / name, reporter=Quiet(), **{**QUICK, "method": name})
        editor.edit(facts)
        batches[name] = [entry.facts for entry in editor.run.history.batches if entry.facts]
        editor.close()
    assert batches == {"frugal": [[0, 2], [1], [3]], "memit": [[0, 1], [2, 3]]}


def test_evaluating_leaves_out_what_cannot_be_read_and_says_so(model, tmp_path):
    listening = Listening()
    long = {**fact_records(1)[0], "paraphrases": ["word " * 300]}
    editor = Editor.from_pretrained(model, tmp_path / "run", reporter=listening, **{**QUICK, "device": "cpu"})
    with pytest.raises(SphereEditError, match="facts this model cannot read"):
        editor.evaluate([long, *fact_records(1, start=3)])
    result = editor.evaluate([long, {"subject": ""}, *fact_records(1, start=3)], skip_bad=True)
    assert len(result.facts) == 1
    assert listening.said[-1].startswith("2 records left out; the first: record 2: ")


def test_earlier_facts_are_asked_in_turn_and_the_forgotten_ones_edited_again(model, tmp_path):
    """The journal says who was asked and who had gone; rolled back to, the weights say the same; a replay gives the same bits."""
    options = {**QUICK, "batch_size": 2, "recheck": 2, "method": "memit_seq"}
    options["options"] = {"second_moment_weight": 1e-4}
    records = fact_records(8)
    listening = Listening()
    editor = Editor.from_pretrained(model, tmp_path / "run", reporter=listening, **options)
    editor.edit(records)
    entries = editor.run.history.batches
    assert "2 of 2 earlier facts never took" in " ".join(listening.said), (
        "they were not given once, so nothing is forgotten"
    )
    assert "forgotten: the model holds no more" not in " ".join(listening.said)
    stream, look_back = entries[:4], entries[4:]
    assert [entry.rechecked for entry in stream] == [[], [0, 1], [2, 3, 0, 1], [4, 5, 0, 1]]
    assert len(look_back) > 1, "more is forgotten than fits one batch, or the test does not show what it should"
    (asked_last,) = editor.run.history.final_rechecks
    assert (asked_last.after, asked_last.rechecked) == (4, [6, 7, 2, 3, 0, 1, 4, 5])
    assert asked_last.forgotten == [index for entry in look_back for index in entry.rewritten]
    assert editor.run.history.due[:2] == [0, 1], "after all were asked, by number"
    assert all(entry.rewritten and len(entry.rewritten) <= 2 and not entry.facts for entry in look_back)
    assert not any(entry.rechecked for entry in look_back)
    asking = ["asking earlier facts" in entry.seconds for entry in entries]
    assert asking == [False, True, True, True] + [False] * len(look_back)
    assert "asking earlier facts" in asked_last.seconds
    states = {name: dict(state) for name, state in editor._stream.committer.states.items()}
    known = {name: torch.zeros_like(state["system"]) for name, state in states.items()}
    written: dict[int, tuple[int, int]] = {}
    for entry in entries:
        members = [*entry.facts, *entry.rewritten]
        written.update({index: (entry.number, place) for place, index in enumerate(members)})
    for batch, place in written.values():
        _, seen = editor.run.read_update(batch)
        for name, system in known.items():
            system += torch.outer(*[seen[name]["keys"][:, place].double()] * 2)
    for name, state in states.items():
        start = editor.session.method.start(editor._stream.committer.statistics[name])["system"]
        torch.testing.assert_close(state["system"], start + known[name], rtol=1e-8, atol=1e-10)
    for number in range(len(entries), 0, -1):
        editor._stream.committer.go_to(number)  # digests are compared on the way
        if 0 < number <= 4:
            asked = asked_last.rechecked if number == 4 else entries[number].rechecked
            again = [index for entry in (look_back if number == 4 else [entries[number]]) for index in entry.rewritten]
            scores = editor.evaluate([records[index] for index in asked]).edited if asked else []
            assert again == [index for index, score in zip(asked, scores, strict=True) if not score.rewrite.correct]
    editor.resume()
    assert editor.run.history.head == len(entries), "a stream is closed once"
    editor.rollback(4)
    editor.resume()
    assert editor.run.history.head == 4, "what was rolled back is not written again"
    editor.edit(fact_records(1, start=9))
    assert [entry.facts for entry in editor.run.history.batches[4:6]] == [[8], []]
    editor.close()


def test_what_was_known_once_is_forgotten_and_what_never_was_never_took(model, tmp_path, monkeypatch):
    """The verdicts are given here, batch by batch; only what exists is advised."""
    options = {**QUICK, "batch_size": 2, "recheck": 2, "method": "memit_seq", "options": {"second_moment_weight": 1e-2}}
    listening = Listening()
    verdicts = iter([[True, False], [True, True, False, False], [False] * 6])
    monkeypatch.setattr(Evaluator, "knows", lambda self, facts, title: next(verdicts)[: len(facts)])
    editor = Editor.from_pretrained(model, tmp_path / "run", reporter=listening, **options)
    editor.edit(fact_records(6))
    editor.close()
    second, third = editor.run.history.batches[1:3]
    assert (second.rechecked, second.unanswered) == ([0, 1], [1])
    assert third.rechecked[:2] == [2, 3]
    lines = [line for line in listening.said if line.startswith("Batch")]
    assert lines[1].startswith("Batch 2: 2 facts, and 0 of 2 earlier ones that were forgotten, and 1 that never took")
    assert "2 that never took" not in lines[1]
    said = " ".join(listening.said)
    assert "forgotten: the model holds no more" in said
    assert "rollback --to N, 1 to 2" in said


@pytest.mark.parametrize("survived", [0, 1, 2])
def test_a_run_that_dies_in_its_last_look_back_ends_as_if_it_had_not(model, tmp_path, monkeypatch, survived):
    """Who had forgotten is asked once; asked again between two batches of the look back, others would be written."""
    options = {**QUICK, "batch_size": 2, "recheck": 2, "method": "memit_seq", "options": {"second_moment_weight": 1e-4}}
    records = fact_records(8)
    whole = Editor.from_pretrained(model, tmp_path / "whole", reporter=Quiet(), **options)
    whole.edit(records)
    assert len([entry for entry in whole.run.history.batches if not entry.facts]) > survived
    whole.close()
    editor = Editor.from_pretrained(model, tmp_path / "run", reporter=Quiet(), **options)
    plain, written = Committer.edit, []

    def dying(loop, indices, *rest):
        if not indices and len(written) == survived:
            raise KeyboardInterrupt
        entry = plain(loop, indices, *rest)
        if not indices:
            written.append(entry)
        return entry

    monkeypatch.setattr(Committer, "edit", dying)
    with pytest.raises(KeyboardInterrupt):
        editor.edit(records)
    editor.close()
    monkeypatch.undo()
    again = Editor.open(tmp_path / "run", reporter=Quiet())
    assert again.run.history.closing
    assert again.run.history.forgotten
    again.resume()
    assert without_times([batch.as_entry() for batch in again.run.history.batches]) == without_times(
        [batch.as_entry() for batch in whole.run.history.batches]
    )
    assert same(weights_of(again), weights_of(whole))
    again.close()


@pytest.mark.parametrize("method", ["frugal", "alphaedit", "ultraedit", "lyaplock"])
def test_a_plan_asks_for_the_disk_that_a_run_takes(model, tmp_path, method):
    records = fact_records(8)
    settings = {"batch_size": 4, "layers": [1, 2], "targets": {"steps": 2}, "moments": {"sampled_tokens": 256}}
    settings = {**settings, "method": method, "evaluation": {"generation": "off"}}
    if method == "ultraedit":
        del settings["layers"]
    editor = Editor.from_pretrained(model, tmp_path / "run", reporter=Quiet(), **settings)
    plan = estimate(editor.session, facts_from(records).facts)
    editor.edit(records)
    editor.close()
    assert ("earlier facts" in plan.seconds) == (method == "frugal")
    taken = {
        part: sum(file.stat().st_size for file in (tmp_path / "run" / part).rglob("*.safetensors"))
        for part in ("updates", "checkpoints", "statistics")
    }
    assert all(taken[part] for part in ("updates", "checkpoints"))
    assert 0.5 < (plan.disk - 4000 * len(records)) / sum(taken.values()) < 4, taken


def test_a_plan_counts_what_every_batch_costs(model, tmp_path, monkeypatch):
    """In seconds of this process, which other work on the machine hardly changes: on the plan's side and on the run's."""
    monkeypatch.setattr(time, "monotonic", time.process_time)
    facts, planned = facts_from(fact_records(12)).facts, {}
    for size in (1, 100):
        options = {**QUICK, **METHODS["memit"], "batch_size": size, "repair": 0, "evaluation": {"generation": "off"}}
        editor = Editor.from_pretrained(model, tmp_path / str(size), reporter=Quiet(), **options)
        planned[size] = estimate(editor.session, facts).seconds["solving and measuring"]
    assert planned[1] > 4 * planned[100] > 0
    editor = Editor.from_pretrained(model, tmp_path / "run", reporter=Quiet(), **{**options, "batch_size": 1})
    editor.edit(fact_records(12))
    taken = sum(
        batch.seconds[stage] for batch in editor.run.history.batches for stage in ("solve", "sphere", "diagnosing")
    )
    editor.close()
    assert taken / 4 < planned[1] < 4 * taken
