"""One table: every method on three families, on two of them with SPHERE. Two batches; the targets become likelier; resume and
rollback are bit for bit. A method that is added to METHODS is in the table by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import fact_records
from families import save_tiny
from sphere_edit.editing.methods import METHODS
from sphere_edit.editor import Editor, opened
from sphere_edit.progress import Quiet
from sphere_edit.runs.commit import Committer

FAMILIES = ("llama", "gpt2", "qwen2")
COMMON: dict[str, Any] = {
    "batch_size": 3,
    "templates": 0,  # a random model's context says nothing: with it, keys of templates and prompt have little in common
    "targets": {"steps": 12, "lr": 0.5},
    "moments": {"sampled_tokens": 512},
    "tokens_per_batch": 256,
    "evaluation": {"generation": "off"},
}
OPTIONS: dict[str, dict[str, Any]] = {  # what suits random models of width 32
    "alphaedit": {"l2": 0.01, "null_space": "quantile", "null_space_threshold": 0.9},
    "nas": {"l2": 0.01, "null_space": "quantile", "null_space_threshold": 0.9},
    "revive": {"l2": 0.01, "null_space": "quantile", "null_space_threshold": 0.9},
    "memit": {"second_moment_weight": 0.01},
    "memit_seq": {"second_moment_weight": 0.01},
    "rect": {"second_moment_weight": 0.01},
    "prune": {"second_moment_weight": 0.01},
    "encore": {"second_moment_weight": 0.01, "ridge": 0.001},
    "lyaplock": {"second_moment_weight": 0.01},
    "ft": {"lr": 5e-3},
    "locft": {"lr": 5e-3, "minibatch": 2},
    "ultraedit": {"rate": 3e-2},
}

EDITING = [name for name in METHODS if name != "none"]  # the control, which edits nothing


def records(count: int) -> list[dict[str, Any]]:
    """Facts whose prompt ends with the subject: there, a random model's answer hangs on the edited position."""
    return [{**record, "prompt": "People speak of {}", "paraphrases": []} for record in fact_records(count)]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    return {family: save_tiny(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


def weights_of(editor: Editor) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in editor.model.state_dict().items()}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def losses(metrics: dict[str, Any], which: str) -> torch.Tensor:
    return torch.tensor([row[which]["rewrite"]["nll_right"] for row in metrics["per_fact"]])


@pytest.mark.parametrize(
    ("family", "sphere"),
    [("llama", True), ("gpt2", True), ("qwen2", False)],
    ids=["llama-sphere", "gpt2-sphere", "qwen2-plain"],
)
@pytest.mark.parametrize("method", EDITING)
def test_every_method(method, sphere, family, models, tmp_path, monkeypatch):
    def start(run: str, **more: Any) -> Editor:
        settings = {**COMMON, "method": method, "options": OPTIONS.get(method, {}), "sphere": {"enabled": sphere}}
        return Editor.from_pretrained(models[family], tmp_path / run, reporter=Quiet(), **{**settings, **more})

    editor = start("run")
    original = weights_of(editor)
    metrics = editor.edit(records(6))
    sizes = [len(entry.facts) for entry in editor.run.history.batches]
    closing = [METHODS[method].repair, METHODS[method].recheck]  # at the end, of text and of what is forgotten
    assert sizes[:2] == [3, 3]
    assert sizes[2:] in ([0] * sum(step > 0 for step in closing), [0] * (closing[0] > 0))
    assert metrics["after"] == len(sizes)
    assert metrics["facts"] == 6
    # negative control: before, no fact is known, and its target is as unlikely as a random model has it
    assert metrics["unedited"]["efficacy_strict"] == 0.0
    before, after = losses(metrics, "unedited"), losses(metrics, "edited")
    assert float(before.min()) > 2.0
    assert float((before - after).mean()) > 1.0, "the targets become likelier, those of the first batch included"
    edited = weights_of(editor)
    changed = {name for name in original if not torch.equal(original[name], edited[name])}
    assert changed == {f"{name}.weight" for name in editor.weights.names}

    # interrupted after its first batch and resumed
    real = Committer.edit

    def once(self, *args):
        if self.run.history.head == 1:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(Committer, "edit", once)
    broken = start("broken")
    with pytest.raises(KeyboardInterrupt):
        broken.edit(records(6))
    monkeypatch.undo()
    after_one = weights_of(broken)
    assert not same(after_one, edited)
    broken.close()
    with opened(tmp_path / "broken", Quiet()) as resumed:
        assert same(weights_of(resumed), after_one)
        assert resumed.resume()["edited"] == metrics["edited"]
        assert same(weights_of(resumed), edited)
        for name, state in resumed._stream.committer.states.items():
            for part, value in state.items():
                assert torch.equal(value, editor._stream.committer.states[name][part])

    # replayed from the first batch on, and rolled back
    editor.close()
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        checkpoint.unlink()
    with opened(tmp_path / "run", Quiet()) as again:
        assert same(weights_of(again), edited)
        for name, state in editor._stream.committer.states.items():
            assert state.keys() == again._stream.committer.states[name].keys()
            for part, value in state.items():
                assert torch.equal(value, again._stream.committer.states[name][part]), (
                    "what later batches go on from is the same"
                )
        again.rollback(1)
        assert same(weights_of(again), after_one)
        again.rollback(0)
        assert same(weights_of(again), original)


@pytest.mark.parametrize("method", EDITING)
def test_sphere_takes_away_what_it_says(method, models, tmp_path):
    """α = 1: nothing of what SPHERE acts on is left along the principal directions; plain, there is something."""
    settings = {**COMMON, "method": method, "options": OPTIONS.get(method, {})}
    share = {}
    for alpha in (0.0, 1.0):
        sphere = {"alpha": alpha, "project": METHODS[method].sphere.project, "basis": "pretrained"}
        run = tmp_path / f"{alpha}"
        editor = Editor.from_pretrained(models["llama"], run, reporter=Quiet(), sphere=sphere, **settings)
        editor.edit(records(3))
        share[alpha] = []
        for name in editor.weights.names:
            original = editor.weights.original(name).double()
            change = editor.weights.deployed(name).double() - original
            share[alpha].append(float((change @ editor.session.sphere.directions(original)).norm() / change.norm()))
    assert min(share[0.0]) > 0.05
    assert max(share[1.0]) < 1e-4, "float32 weights"


@pytest.mark.parametrize("method", [name for name, kind in METHODS.items() if kind.max_batch == 1])
def test_a_method_of_one_fact_at_a_time_projects_each_fact_before_the_next_is_solved(method, models, tmp_path):
    """Three facts in one batch come to the weights of three batches of one; projected only at the end, to others."""
    found = {}
    for size, project in ((3, "per_layer"), (1, "per_layer"), (3, "after_all")):
        sphere = {"alpha": 1.0, "project": project, "basis": "pretrained"}
        settings = {**COMMON, "method": method, "sphere": sphere, "batch_size": size}
        run = tmp_path / f"{size}-{project}"
        editor = Editor.from_pretrained(models["llama"], run, reporter=Quiet(), **settings)
        editor.edit(records(3))
        found[size, project] = torch.cat([weight.flatten() for weight in editor.weights.working.values()])
        original = torch.cat([editor.weights.original(name).flatten() for name in editor.weights.names])
    change = float((found[3, "per_layer"] - original).norm())
    assert float((found[3, "per_layer"] - found[1, "per_layer"]).norm()) < 1e-4 * change
    assert float((found[3, "per_layer"] - found[3, "after_all"]).norm()) > 1e-2 * change
