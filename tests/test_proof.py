"""`verify` proves runs and exports: what is whole is said to be, and whatever is changed, missing or of another run is told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from conftest import fact_records
from families import save_tiny
from sphere_edit.cli import app
from sphere_edit.editor import Editor
from sphere_edit.files import read_tensors, write_tensors
from sphere_edit.models import loading
from sphere_edit.progress import Quiet

QUICK = {
    "method": "alphaedit",
    "options": {"l2": 0.1, "null_space": "quantile", "null_space_threshold": 0.8},
    "batch_size": 2,
    "layers": [1, 2],
    "repair": 2,
    "targets": {"steps": 3, "lr": 0.3},
    "moments": {"sampled_tokens": 256},
    "tokens_per_batch": 256,
}


def verify(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["verify", *map(str, arguments)], env={"COLUMNS": "200"})
    return result.exit_code, " ".join((result.output + str(result.exception or "")).split())


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    """A finished run and its export, beside each other, to be copied."""
    place = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPHERE_EDIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        editor = Editor.from_pretrained(model, place / "run", reporter=Quiet(), **QUICK)
        editor.edit(fact_records(4))
        editor.save_pretrained(place / "out")
        editor.close()
    return place


@pytest.fixture
def place(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "place")


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))


def test_a_whole_run_is_proven_without_its_model_being_loaded(place, monkeypatch):
    monkeypatch.setattr(loading, "from_pretrained", lambda *args, **options: pytest.fail("the model was loaded"))
    status, said = verify(place / "run")
    assert (status, "2 of 2 batches rebuilt" in said) == (0, True), said


def test_every_file_of_a_run_that_is_changed_or_missing_is_told(place):
    names = [path.relative_to(place / "run") for path in sorted((place / "run").rglob("*")) if path.is_file()]
    told, kept_metrics = [], (place / "run" / "metrics.json").read_bytes()
    for name in names:
        if name.parts[0] in (".lock", "figures") or name.suffix == ".html":
            continue
        for spoil in (flipped, Path.unlink):
            kept = (place / "run" / name).read_bytes()
            spoil(place / "run" / name)
            status, said = verify(place / "run")
            (place / "run" / name).write_bytes(kept)
            if name.parts[0] == "checkpoints" and spoil is Path.unlink:
                assert status == 0, "checkpoints are made again from the updates"
                continue
            if name.name in ("metrics.json", "journal.jsonl") and spoil is flipped and status == 0:
                continue  # what nothing else says: of the journal there is no second copy
            assert status != 0, f"{name}, {spoil}: {said}"
            told.append(name)
    assert len(told) > 15
    metrics = json.loads((place / "run" / "metrics.json").read_text())
    metrics["edited"]["efficacy_strict"] = 99.5
    (place / "run" / "metrics.json").write_text(json.dumps(metrics))
    assert "says 99.5 of efficacy_strict, and the journal" in verify(place / "run")[1]
    (place / "run" / "metrics.json").write_bytes(kept_metrics)
    assert verify(place / "run")[0] == 0


def test_an_update_with_other_numbers_and_a_hash_of_its_own_is_told_by_its_batch(place):
    """Somebody who knows the format writes another ΔW and all hashes that stand beside it."""
    run = place / "run"
    path = run / "updates" / "batch-0002.safetensors"
    tensors = read_tensors(path)
    name = next(name for name in tensors if name.endswith(("left", "delta")))
    digest = write_tensors(path, {**tensors, name: tensors[name] * 1.5})
    lines = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    for line in lines:
        if line["event"] == "batch" and line["batch"] == 2:
            line["update"] = digest
    (run / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    status, said = verify(run)
    assert status == 4
    assert f"{name.rsplit('/', 1)[0]} after batch 2 is not what" in said


def test_a_run_whose_model_is_gone_or_another_says_so_and_finds_it_where_it_is_now(place, model, tmp_path):
    config = json.loads((place / "run" / "config.json").read_text())
    config["model"]["source"] = str(tmp_path / "gone")
    (place / "run" / "config.json").write_text(json.dumps(config))
    status, said = verify(place / "run")
    assert status == 4
    assert "there is no folder" in said
    assert verify(place / "run", "--model", model)[0] == 0
    other = save_tiny("llama", tmp_path / "other", seed=1)
    status, said = verify(place / "run", "--model", other)
    assert status == 4
    assert "after batch 1 is not what" in said


def test_an_export_is_proven_alone_and_against_its_run(place):
    assert verify(place / "out") == (
        0,
        f"{place / 'out'} is whole: 6 files as written; compared with its manifest alone",
    )
    status, said = verify(place / "out", "--against", place / "run")
    assert (status, f"its weights are those of {place / 'run'}" in said) == (0, True), said
    for path in sorted((place / "out").iterdir()):
        kept = path.read_bytes()
        for spoil in (flipped, Path.unlink):
            spoil(path)
            assert verify(place / "out")[0] != 0 or path.name == "sphere_edit.json", path
            path.write_bytes(kept)


def test_an_export_of_another_state_or_run_is_told(place):
    run, out = place / "run", place / "out"
    with_other = json.loads((out / "sphere_edit.json").read_text())
    matrix = next(iter(with_other["matrices"]))
    with_other["matrices"][matrix] = "0" * 64
    (out / "sphere_edit.json").write_text(json.dumps(with_other))
    assert f"{matrix} is not what" in verify(out, "--against", run)[1]
    result = CliRunner().invoke(app, ["rollback", str(run), "--to", "1"])
    assert result.exit_code == 0
    status, said = verify(out, "--against", run)
    assert status == 4
    assert "is not an export of" in said


def test_what_is_neither_is_refused(place, tmp_path):
    (tmp_path / "empty").mkdir()
    status, said = verify(tmp_path / "empty")
    assert status != 0
    assert "neither a run folder nor an export" in said
    (place / "out" / "sphere_edit.json").write_text("{}")
    assert "is damaged" in verify(place / "out")[1]
