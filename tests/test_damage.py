"""Whatever in a run folder is not what was written there is told before it changes a result."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from conftest import fact_records
from families import save_tiny, tiny_model
from sphere_edit import SphereEditError, files
from sphere_edit.diagnosis import diagnose
from sphere_edit.editor import Editor, opened
from sphere_edit.progress import Quiet
from sphere_edit.reporting.comparison import read_row
from sphere_edit.reporting.report import write_report
from sphere_edit.reporting.series import Series
from sphere_edit.runs.folder import RunFolder
from sphere_edit.runs.stream import Stream

QUICK = {
    "method": "memit_seq",
    "options": {"second_moment_weight": 0.1},
    "batch_size": 2,
    "layers": [1, 2],
    "recheck": 1,
    "repair": 2,
    "targets": {"steps": 3, "lr": 0.3},
    "moments": {"sampled_tokens": 256},
    "tokens_per_batch": 256,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    """A finished run, to be copied; with a cache of its own."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPHERE_EDIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        editor = Editor.from_pretrained(model, folder, reporter=Quiet(), **QUICK)
        editor.edit(fact_records(6))
        editor.close()
    return folder


def goes_on(folder: Path) -> dict:
    """What comes of two more facts and a way back, which read everything that later results depend on."""
    with opened(folder, Quiet()) as editor:
        metrics = editor.edit(fact_records(2, start=8))
        editor.rollback(1)
        weights = {name: editor.weights.digest(name) for name in editor.weights.names}
    return {"weights": weights, "edited": metrics["edited"]}


def flipped(path: Path, at: float) -> None:
    """The file with one bit changed."""
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 4
    path.write_bytes(bytes(data))


READ = (
    "facts",
    "statistics",
    "updates",
    "heldout.json",
    "passages.json",
    "evaluations",
    "config.json",
    "journal.jsonl",
)


def test_a_flipped_bit_anywhere_is_told_or_changes_nothing(finished, tmp_path):
    """Every file of the run, at several places: a sentence, or exactly what comes of the run without it."""
    whole = goes_on(shutil.copytree(finished, tmp_path / "whole"))
    told = 0
    for path in sorted(file for file in finished.rglob("*") if file.is_file() and file.name != ".lock"):
        inside = path.relative_to(finished)
        if inside.parts[0] not in (*READ, "checkpoints"):
            continue
        for at in (0.3, 0.99) if path.suffix == ".safetensors" else (0.5,):
            copy = shutil.copytree(finished, tmp_path / "copy")
            flipped(copy / inside, at)
            said = None
            try:
                assert goes_on(copy) == whole, f"{inside} at {at}"
            except SphereEditError as error:
                said = str(error)
                told += 1
            assert said is None or str(copy) in said, f"{inside}: {said}"
            shutil.rmtree(copy)
    assert told > 10


@pytest.mark.parametrize("name", ["heldout.json", "passages.json", "facts/0001.jsonl", "config.json"])
def test_a_valid_file_with_other_content_is_told_by_its_name(finished, tmp_path, name):
    copy = shutil.copytree(finished, tmp_path / "copy")
    text = (copy / name).read_text("utf-8")
    changes = {
        "heldout.json": lambda: json.dumps(json.loads(text)[1:]),
        "passages.json": lambda: json.dumps(json.loads(text)[1:]),
        "facts/0001.jsonl": lambda: text.replace("Rome", "Roma"),
        "config.json": lambda: json.dumps({**json.loads(text), "templates": ["{}", "Now: {}"]}),
    }
    (copy / name).write_text(changes[name](), "utf-8")
    with pytest.raises(SphereEditError, match=rf"{Path(name).name} is not what"):
        goes_on(copy)


def test_a_model_that_has_moved_is_no_damage(finished, model, tmp_path):
    copy, moved = shutil.copytree(finished, tmp_path / "copy"), shutil.copytree(model, tmp_path / "moved")
    config = json.loads((copy / "config.json").read_text("utf-8"))
    config["model"]["source"] = str(moved)
    (copy / "config.json").write_text(json.dumps(config), "utf-8")
    goes_on(copy)


def test_what_becomes_of_the_cache_is_nothing_to_a_run(model, tmp_path):
    editor = Editor.from_pretrained(model, tmp_path / "run", reporter=Quiet(), **QUICK)
    editor.edit(fact_records(2))
    editor.close()
    kept = {path: path.read_bytes() for path in (tmp_path / "run" / "statistics").rglob("*.safetensors")}
    damaged = list((files.cache_dir() / "moments").glob("*.safetensors"))
    assert damaged
    for path in damaged:
        with path.open("r+b") as file:  # in place, as an update of a file in use would be
            file.seek(path.stat().st_size - 9)
            file.write(b"\x07")
    assert {path: path.read_bytes() for path in kept} == kept
    again = Editor.from_pretrained(model, tmp_path / "again", reporter=Quiet(), **QUICK)
    again.edit(fact_records(2))
    assert again.weights.digest(again.weights.names[0]) == editor.weights.digest(editor.weights.names[0])
    again.close()


def test_a_copy_by_hard_links_has_a_journal_of_its_own(finished, tmp_path):
    copy = tmp_path / "linked"
    shutil.copytree(finished, copy, copy_function=os.link)
    before = (finished / "journal.jsonl").read_bytes()
    goes_on(copy)
    assert (finished / "journal.jsonl").read_bytes() == before
    assert (copy / "journal.jsonl").read_bytes().startswith(before)


@pytest.mark.parametrize("name", ["updates", "checkpoints", "figures", "report.html"])
def test_nothing_is_removed_or_overwritten_through_a_link(finished, tmp_path, name):
    copy = shutil.copytree(finished, tmp_path / "copy")
    elsewhere = tmp_path / "elsewhere"
    if (copy / name).exists():
        shutil.move(copy / name, elsewhere)
    else:
        elsewhere.mkdir()
    (copy / name).symlink_to(elsewhere)
    with pytest.raises(SphereEditError, match=f"{name} is a link"):
        goes_on(copy)


def test_a_name_of_a_matrix_cannot_lead_out_of_the_folder(finished, tmp_path):
    copy = shutil.copytree(finished, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text("utf-8"))
    config["matrices"] = ["../../secret"]
    (copy / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(SphereEditError, match="is no name of a matrix"):
        Editor.open(copy, Quiet())


# --- the journal, the tensors, other folders ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda lines: [lines[0], lines[0], *lines[1:]], "session 1 with 6 facts follows 1 session"),
        (lambda lines: [line for line in lines if line.get("batch") != 1], "batch 2 follows batch 0"),
        (lambda lines: [*lines, {"event": "rollback", "to": 99}], "a rollback to batch 99"),
        (lambda lines: [{**line, "facts": [77]} if line.get("batch") == 1 else line for line in lines], "about fact 77 of 6"),
        (lambda lines: [*lines, {"event": "finished", "after": -1}], "'finished' after batch -1"),
        (lambda lines: [*lines, []], "line"),
    ],
)  # fmt: skip
def test_a_journal_that_contradicts_itself_is_told(finished, tmp_path, change, told):
    copy = shutil.copytree(finished, tmp_path / "copy")
    lines = [json.loads(line) for line in (copy / "journal.jsonl").read_text("utf-8").splitlines()]
    (copy / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in change(lines)), "utf-8")
    with pytest.raises(SphereEditError, match=f"is damaged.*{told}|{told}.* is damaged"):
        Editor.open(copy, Quiet())


def without_hashes(folder: Path) -> None:
    """As a folder that was put together by hand: nothing in it says what its files should be."""
    lines = [json.loads(line) for line in (folder / "journal.jsonl").read_text("utf-8").splitlines()]
    for line in lines:
        for name in ("inputs", "update"):
            line.pop(name, None)
    (folder / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")


@pytest.mark.parametrize("kind", ["checkpoints", "updates", "statistics/second_moment"])
@pytest.mark.parametrize("change", ["renamed", "reshaped", "retyped", "gone"])
def test_tensors_that_do_not_fit_are_told(finished, tmp_path, kind, change):
    copy = shutil.copytree(finished, tmp_path / "copy")
    without_hashes(copy)
    for path in (copy / kind).glob("*.safetensors"):
        tensors = files.read_tensors(path)
        changed = {
            "renamed": lambda tensors=tensors: {f"other/{name}": value for name, value in tensors.items()},
            "reshaped": lambda tensors=tensors: {name: value[..., :1].contiguous() for name, value in tensors.items()},
            "retyped": lambda tensors=tensors: {name: value.to(torch.int32) for name, value in tensors.items()},
            "gone": dict,
        }[change]()
        files.write_tensors(path, changed)
    with pytest.raises(SphereEditError, match=r"put .* back|cannot be rebuilt|damaged"):
        goes_on(copy)


def test_tokens_beyond_the_vocabulary_are_told(finished, tmp_path):
    copy = shutil.copytree(finished, tmp_path / "copy")
    without_hashes(copy)
    (copy / "heldout.json").write_text("[[1, 2, 999999]]", "utf-8")
    with pytest.raises(SphereEditError, match="expected lists of token ids below"):
        Editor.open(copy, Quiet())


@pytest.mark.parametrize("method", ["memit", "frugal", "rect", "revive", "ultraedit"])
@pytest.mark.parametrize("scale", [0.0, 1e-38])
def test_matrices_of_nothing_are_edited_or_refused_in_words(tmp_path, method, scale):
    loaded, tokenizer = tiny_model("llama")
    with torch.no_grad():
        loaded.model.layers[1].mlp.down_proj.weight.mul_(scale)
    loaded.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    options = {**{name: QUICK[name] for name in ("targets", "moments", "tokens_per_batch")}, "method": method}
    editor = Editor.from_pretrained(tmp_path / "model", tmp_path / "run", reporter=Quiet(), layers=[1], **options)
    try:
        editor.edit(fact_records(2))
    except SphereEditError:
        return
    (_, *_), (report, *_) = (
        editor.run.history.batches,
        list(diagnose(str(tmp_path / "run"), None, None, None, 1, 0.5, Quiet())),
    )
    assert report.change is not None


def test_a_rollback_that_dies_after_its_line_is_finished_by_the_next_command(finished, tmp_path, monkeypatch):
    """Metrics and page of the withdrawn state go, whenever it is opened again."""
    copy = shutil.copytree(finished, tmp_path / "copy")
    (copy / "report.html").write_text("of the withdrawn state")
    with opened(copy, Quiet()) as editor:
        monkeypatch.setattr(Stream, "_tidy", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            editor.rollback(1)
        monkeypatch.undo()
    assert (copy / "metrics.json").exists()
    with opened(copy, Quiet()) as editor:
        assert editor.run.history.head == 1
    assert not (copy / "metrics.json").exists()
    assert not (copy / "report.html").exists()


def test_a_folder_that_cannot_be_written_can_be_asked_and_exported(finished, tmp_path, monkeypatch):
    copy = shutil.copytree(finished, tmp_path / "copy")
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}

    acquire = FileLock.acquire

    def denied(lock, *args, **options):
        if Path(lock.lock_file).is_relative_to(copy):
            raise PermissionError(13, "Permission denied")
        return acquire(lock, *args, **options)

    monkeypatch.setattr(FileLock, "acquire", denied)
    with pytest.raises(SphereEditError, match="Permission denied"):
        Editor.open(copy, Quiet())
    editor = Editor.open(copy, Quiet(), only_to_read=True)
    assert editor.evaluate(fact_records(2)).summary()["edited"]
    editor.save_pretrained(tmp_path / "out")
    editor.close()
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before


def test_a_run_from_elsewhere_uses_nothing_outside_its_folder_unless_told(finished, model, tmp_path, monkeypatch):
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "mine.yaml").write_text("task: mine\n")
    texts = tmp_path / "texts.txt"
    texts.write_text("One passage.\n\nAnother one.")
    for name, value in (("tasks", ["mine"]), ("references", str(texts))):
        evaluation = {name: value, **({"task_dir": str(tasks)} if name == "tasks" else {"texts": 1})}
        folder = tmp_path / f"run-{name}"
        if name == "references":
            editor = Editor.from_pretrained(model, folder, reporter=Quiet(), **{**QUICK, "evaluation": evaluation})
            editor.edit(fact_records(2))
            editor.close()
        else:  # a run that somebody else made
            shutil.copytree(finished, folder)
            without_hashes(folder)
            config = json.loads((folder / "config.json").read_text("utf-8"))
            config["settings"]["evaluation"] |= evaluation
            (folder / "config.json").write_text(json.dumps(config), "utf-8")
        with monkeypatch.context() as patch:
            patch.setenv("SPHERE_EDIT_CACHE", str(tmp_path / f"elsewhere-{name}"))
            with opened(folder, Quiet()) as editor:
                with pytest.raises(SphereEditError, match=r"begun elsewhere and names.*--trust-run"):
                    editor.edit(fact_records(2, start=4))
                editor.rollback(0)  # which reads nothing of the kind
    with opened(tmp_path / "run-references", Quiet()) as editor:
        editor.edit(fact_records(2, start=4))
    with opened(tmp_path / "run-references", Quiet(), trust_run=True) as editor:
        editor.edit(fact_records(2, start=6))


@pytest.mark.parametrize(
    "change",
    [lambda content: [], lambda content: {}, lambda content: {**content, "per_fact": [{}]}, lambda content: {**content, "after": "x"}],
)  # fmt: skip
def test_metrics_that_are_none_are_told_by_whoever_reads_them(finished, tmp_path, change):
    copy = shutil.copytree(finished, tmp_path / "copy")
    content = json.loads((copy / "metrics.json").read_text("utf-8"))
    (copy / "metrics.json").write_text(json.dumps(change(content)), "utf-8")
    for read in (
        RunFolder.open(copy).metrics,
        Series.read(copy).facts,
        lambda: read_row("group", "memit_seq", "plain", {0: copy}),
        lambda: write_report([copy], tmp_path / "page.html"),
    ):
        with pytest.raises(SphereEditError, match="metrics.json is damaged"):
            read()
    with opened(copy, Quiet()) as editor:  # which makes it again
        assert editor.metrics()["edited"] == content["edited"]


def test_energy_does_not_hide_damaged_second_moments(finished, tmp_path):
    copy = shutil.copytree(finished, tmp_path / "copy")
    for path in (copy / "statistics" / "second_moment").iterdir():
        flipped(path, 0.99)
    with pytest.raises(SphereEditError, match="second_moment.* is damaged"):
        list(diagnose(str(copy), None, None, None, 1, 0.5, Quiet()))
