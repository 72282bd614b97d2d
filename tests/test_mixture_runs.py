"""Mixtures of experts through a whole run: edit, resume, roll back, export, and what is said of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import fact_records
from mixtures import FEW, save_mixture
from sphere_edit import Editor, SphereEditError
from sphere_edit.editing.settings import make_settings
from sphere_edit.evaluation.routing import changed_share
from sphere_edit.facts.readers import facts_from
from sphere_edit.models.loading import load_model
from sphere_edit.models.sites import parameter_of
from sphere_edit.progress import Quiet
from sphere_edit.reporting.report import write_report
from sphere_edit.tuning import tune

FAST = {
    "layers": {"experts": [1, 2]},
    "batch_size": 4,
    "templates": 0,
    "targets": {"steps": 4, "lr": 0.3, "rule": "adam"},
    "moments": {"sampled_tokens": 600},
    "evaluation": {"generation": "off"},
}


def begun(family: str, folder: Path, method: str, **options) -> Editor:
    source = folder / "source"
    if not source.exists():
        save_mixture(family, source)
    given = make_settings(FAST, {"method": method}, options)
    return Editor.from_pretrained(source, folder / f"run-{method}", given, Quiet())


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("qwen3_moe", "frugal"),
        ("gpt_oss", "alphaedit"),
        ("llama4_text", "memit"),
        *[pytest.param(family, "frugal", marks=pytest.mark.slow) for family in FEW[2:]],
        *[
            pytest.param("qwen3_moe", method, marks=pytest.mark.slow)
            for method in ("memit_seq", "encore", "emmet", "rome", "rect", "prune", "nas", "revive", "ft", "ultraedit")
        ],
    ],
)
def test_a_run_on_experts_edits_resumes_rolls_back_and_exports(family, method, tmp_path):
    single = {"layers": {"experts": [1]}} if method in ("emmet", "rome", "ft") else {}
    editor = begun(family, tmp_path, method, **single)
    metrics = editor.edit(fact_records(12))
    head = editor.run.history.head
    after = {name: editor.weights.working[name].clone() for name in editor.weights.names}
    assert all(name.endswith("experts.down_proj") for name in after)
    assert any(not torch.equal(after[name], editor.weights.original(name)) for name in after)
    batch, *later = editor.run.history.batches
    assert any(one.kind == "repair" for one in later) == (method == "frugal")
    for entry in batch.matrices.values():
        assert len(entry["expert_norms"]) == 4
        assert sum(norm**2 for norm in entry["expert_norms"]) == pytest.approx(entry["update_norm"] ** 2, rel=1e-3)
    assert set(metrics["edited"]["routes"]) == {"text", "facts"}
    if method == "frugal":
        write_report([editor.folder], tmp_path / "report.html", tmp_path / "figures", Quiet())
        assert ", expert " in (tmp_path / "figures" / "idea.svg").read_text()
    editor.save_pretrained(tmp_path / "exported")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float32)
    for name in after:
        deployed = parameter_of(editor.model, editor.loaded.architecture, name)
        assert torch.equal(dict(again.named_parameters())[name], deployed)
    editor.close()

    reopened = Editor.open(tmp_path / f"run-{method}", Quiet())
    assert all(torch.equal(reopened.weights.working[name], after[name]) for name in after)
    reopened.edit(fact_records(4, start=12))
    third = {name: reopened.weights.digest(name) for name in after}
    reopened.rollback(head)
    assert all(torch.equal(reopened.weights.working[name], after[name]) for name in after)
    reopened.rollback(0)
    assert all(
        torch.equal(reopened.weights.deployed(name), reopened.weights.original(name)) for name in reopened.weights.names
    )
    assert third != {name: reopened.weights.digest(name) for name in after}
    reopened.close()


def test_shared_experts_are_the_default_and_routed_ones_are_asked_for(tmp_path):
    source = save_mixture("deepseek_v3", tmp_path / "source")
    plain = {name: value for name, value in FAST.items() if name != "layers"}
    for given, role in (({}, "down"), ({"matrices": "experts"}, "experts")):
        editor = Editor.from_pretrained(source, tmp_path / f"run-{role}", make_settings(plain, given), Quiet())
        ends = "shared_experts.down_proj" if role == "down" else "mlp.experts.down_proj"
        assert all(name.endswith(ends) for name in editor.weights.names)
        assert (editor.settings.moments.tokens == 400_000) == (role == "experts")


def test_what_cannot_be_done_with_experts_is_said_before_any_work(tmp_path):
    with pytest.raises(SphereEditError, match="lyaplock cannot edit routed experts"):
        begun("qwen3_moe", tmp_path, "lyaplock")
    with pytest.raises(SphereEditError, match="leave out --matrices"):
        begun("qwen3_moe", tmp_path, "memit", matrices="experts")
    plain = {name: value for name, value in FAST.items() if name != "layers"}
    given = make_settings(plain, {"matrices": "down"})
    with pytest.raises(SphereEditError, match="has no 'down' matrices"):
        Editor.from_pretrained(tmp_path / "source", tmp_path / "run", given, Quiet())


def test_a_route_is_the_set_of_experts_of_a_token_in_a_layer():
    before = [torch.tensor([[[1, 1, 0], [1, 0, 1]], [[0, 1, 1], [0, 1, 1]]], dtype=torch.bool)]
    after = [before[0].clone()]
    assert changed_share(before, after) == 0
    after[0][1, 0] = torch.tensor([True, True, False])
    assert changed_share(before, after) == 25


def test_the_journal_holds_plain_numbers_of_every_expert(tmp_path):
    editor = begun("qwen3_moe", tmp_path, "memit")
    editor.edit(fact_records(4))
    lines = [json.loads(line) for line in (tmp_path / "run-memit" / "journal.jsonl").read_text().splitlines()]
    (batch,) = [line for line in lines if line["event"] == "batch"]
    assert all(isinstance(norm, float) for entry in batch["matrices"].values() for norm in entry["expert_norms"])
    editor.close()


def test_tune_tries_the_routed_experts_where_shared_ones_are_the_default(tmp_path, monkeypatch):
    monkeypatch.setattr("sphere_edit.trials._ENDS", ())
    monkeypatch.setattr("sphere_edit.tuning._tried_along", lambda *args: [])
    loaded = load_model(save_mixture("deepseek_v3", tmp_path / "source"), "cpu")
    plain = {name: value for name, value in FAST.items() if name != "layers"}
    facts = facts_from(fact_records(4)).facts
    tried = [trial.settings for trial in tune(loaded, make_settings(plain, {"method": "frugal"}), Quiet(), facts)]
    assert sorted(settings.get("matrices", "") for settings in tried) == ["", "experts"]
    asked = make_settings(plain, {"method": "frugal", "matrices": "experts"})
    assert [trial.settings for trial in tune(loaded, asked, Quiet(), facts)] == [{"layers": [1, 2]}]
    tuned = {"matrices": "experts", "layers": [1]}
    assert make_settings(tuned, {"layers": {"down": [2]}}).matrices is None, "layers of a role say which matrices"


@pytest.mark.parametrize("method", ["frugal", "alphaedit"])
def test_facts_are_taken_back_from_experts(method, tmp_path):
    editor = begun("qwen3_moe", tmp_path, method)
    editor.edit(fact_records(8))
    before = {name: editor.weights.digest(name) for name in editor.weights.names}
    metrics = editor.remove(1)
    assert metrics["facts"] == 7
    assert before != {name: editor.weights.digest(name) for name in editor.weights.names}
    editor.close()


@pytest.mark.slow
def test_the_page_draws_the_expert_that_changed_most(tmp_path):
    editor = begun("qwen3_moe", tmp_path, "memit")
    editor.edit(fact_records(4))
    editor.close()
    page = write_report([tmp_path / "run-memit"], tmp_path / "page.html").read_text()
    _, entry = max(editor.run.history.batches[-1].matrices.items(), key=lambda item: item[1]["relative_drift"])
    norms = entry["expert_norms"]
    assert f"expert {norms.index(max(norms))}" in page
