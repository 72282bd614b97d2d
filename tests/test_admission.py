"""What `edit` may do with a folder, over every state of a run; no model is loaded for it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from sphere_edit import SphereEditError
from sphere_edit.runs.admission import Act, Decision, admit
from sphere_edit.runs.records import SCHEMA

FACTS = {
    "event": "facts", "session": 1, "count": 2, "source": "/home/ada/facts.json", "sha256": "", "protocol": "", "left_out": [],
}  # fmt: skip
BATCH = {
    "event": "batch", "batch": 1, "facts": [0, 1], "superseded": [], "asked": [], "again": [], "matrices": {}, "seconds": {},
    "targets": {"loss_before": None, "loss_after": None, "probability_after": None, "evaluations": []}, "peak_memory": None,
}  # fmt: skip
CONFIG = {
    "schema": SCHEMA, "created": "", "settings": {"method": "memit", "seed": 3}, "method_options": {}, "sphere": None, "layers": [],
    "model": {"source": "owner/model", "fingerprint": "", "family": "llama", "parameters": 1, "dtype": "float32"},
    "matrices": [], "templates": [], "versions": {}, "device": "cpu", "threads": 1,
    "corpus": {"origin": "", "sha256": "", "passages": 0, "tokens": 0, "heldout_passages": 0},
}  # fmt: skip
FINISHED = [FACTS, BATCH, {"event": "finished", "after": 1}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


def written(folder: Path, *entries: dict) -> Path:
    """A run of the model 'owner/model' with this journal."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "journal.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return folder


def test_a_new_folder_starts_a_run(folder):
    assert admit("owner/model", folder, "facts.json") == Decision(Act.START, folder)
    assert admit("owner/model", folder, "facts.json", dry_run=True).act is Act.START
    assert admit("owner/model", None, "facts.json", dry_run=True).act is Act.START, "nothing is written"
    assert not admit("owner/model", None, "facts.json", dry_run=True).folder.exists()
    with pytest.raises(SphereEditError, match="where should the run go"):
        admit("owner/model", None, "facts.json")
    assert not folder.exists()


def test_a_finished_run_is_continued_and_has_nothing_to_resume(folder):
    written(folder, *FINISHED)
    assert admit(str(folder), None, "more.json") == Decision(Act.CONTINUE, folder, 1)
    assert admit(str(folder), folder, "more.json").act is Act.CONTINUE
    assert admit(str(folder), None, "more.json", dry_run=True).act is Act.CONTINUE
    assert admit(str(folder), None, None, resume=True) == Decision(Act.NOTHING, folder, 1)
    assert admit("owner/model", folder, "elsewhere/facts.json", resume=True).act is Act.NOTHING


def test_an_interrupted_run_is_resumed(folder):
    written(folder, FACTS)
    assert admit(str(folder), None, None, resume=True) == Decision(Act.RESUME, folder, 0)
    assert admit("owner/model", folder, "facts.json", resume=True).act is Act.RESUME
    assert admit("owner/model", folder, None, resume=True).act is Act.RESUME
    assert admit(str(folder), None, None, resume=True, settings=[{"device": "cpu"}, {"seed": 3}]).act is Act.RESUME


@pytest.mark.parametrize(
    ("entries", "arguments", "message"),
    [
        (None, {"model": "owner/model", "output": None}, "where should the run go"),
        (None, {"model": "owner/model", "facts": None}, "which facts"),
        (None, {"model": "owner/model", "settings": [{"sead": 1}]}, "there is no setting 'sead'"),
        ([], {"model": "owner/model", "facts": None}, "which facts"),
        (FINISHED, {"model": "owner/model"}, "holds a run already; add --resume"),
        (FINISHED, {"output": Path("other")}, "continues in its own folder; leave out -o other"),
        (FINISHED, {"facts": None}, "which facts"),
        (FINISHED, {"resume": True}, "goes on with the facts"),
        (FINISHED, {"resume": True, "facts": None, "dry_run": True}, "--dry-run tells about facts to come"),
        (FINISHED, {"model": "owner/model", "facts": "b.json", "resume": True}, "has the facts of .*, not those of b.json"),
        (FINISHED, {"model": "owner/other", "facts": "facts.json", "resume": True}, "edits 'owner/model', not 'owner/other'"),
        (FINISHED, {"settings": [{"seed": 4}, {"device": "cpu"}]}, "these would change: seed. Start"),
        ([FACTS], {}, "was interrupted with 2 facts waiting"),
        ([FACTS], {"dry_run": True}, "was interrupted with 2 facts waiting"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused(folder, entries, arguments, message):
    if entries is not None:
        written(folder, *entries)
    new = arguments.get("model", "").startswith("owner")
    defaults = {"model": str(folder), "output": folder if new else None, "facts": "more.json"}
    with pytest.raises(SphereEditError, match=message):
        admit(**{**defaults, **arguments})


def test_paths_that_are_no_utf8_are_refused_before_safetensors_meets_them(folder):
    odd = os.fsdecode(b"odd-\xff")
    for model, output in ((odd, folder), ("owner/model", folder / odd)):
        with pytest.raises(SphereEditError, match="must be UTF-8"):
            admit(model, output, "facts.json")


def test_a_folder_with_something_else_is_no_place_for_a_run(folder):
    folder.mkdir()
    (folder / "thesis.tex").touch()
    with pytest.raises(SphereEditError, match="is not a run folder; choose another"):
        admit("owner/model", folder, "facts.json")
