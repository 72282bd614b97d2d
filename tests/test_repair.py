"""The repair at a stream's end: its gradient, its step, what it does to text and facts, and its place in a run."""

from __future__ import annotations

import math

import pytest
import torch

from conftest import fact_records
from families import save_tiny
from sphere_edit import SphereEditError
from sphere_edit.editing import repair as repair_module
from sphere_edit.editing.curvature import _drawn_slope, damped_inverse, output_curvature
from sphere_edit.editing.repair import Descent, Repair, readable_passages, repair_steps
from sphere_edit.editor import Editor, opened
from sphere_edit.evaluation.heldout import score_heldout
from sphere_edit.evaluation.scores import score_facts
from sphere_edit.facts.readers import facts_from
from sphere_edit.models.loading import load_model
from sphere_edit.models.weights import EditedWeights
from sphere_edit.progress import Quiet
from sphere_edit.runs import commit as commit_module
from sphere_edit.runs.commit import Committer
from sphere_edit.runs.stream import Stream

QUICK = {
    "batch_size": 2,
    "layers": [1, 2],
    "targets": {"steps": 3, "lr": 0.3, "compute": "model"},
    "moments": {"sampled_tokens": 512},
    "tokens_per_batch": 256,
    "evaluation": {"generation": "off"},
    "device": "cpu",
}
TEMPLATES = ["{}", "The river. {}"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture
def edited(model):
    """A float64 model with two matrices changed at random, and their names."""
    loaded = load_model(model, "cpu", "float32")
    loaded.model.double()
    names = ["model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj"]
    weights = EditedWeights(loaded.model, loaded.architecture, names)
    generator = torch.Generator().manual_seed(0)
    for name in names:
        weight = weights.original(name)
        weights.set(name, weight + 0.3 * weight.std() * torch.randn(weight.shape, generator=generator))
    return loaded, weights


@pytest.fixture(autouse=True)
def _short_streams(monkeypatch):
    """A step for each fact, so that a stream of a few has a repair."""
    monkeypatch.setattr(repair_module, "_FACTS_A_STEP", 1)


def the_repair(loaded, weights, count=6, seed=0, metrics=None):
    passages = [[5 + (7 * row + column) % 40 for column in range(12 + row)] for row in range(9)]
    facts = facts_from(fact_records(count)).facts
    identity = {name: torch.eye(weight.shape[1]) for name, weight in weights.working.items()}
    return Repair(loaded, weights, passages, facts, TEMPLATES, metrics or identity, 4096, seed)


def test_the_gradient_is_that_of_the_definition(edited, monkeypatch):
    """KL(unedited ‖ edited) at all positions of all passages and the mean loss of all facts, from the model's own logits in float64."""
    loaded, weights = edited
    monkeypatch.setattr(repair_module, "TEXT_TOKENS", 9 * 20)
    monkeypatch.setattr(repair_module, "STEP_FACTS", 10**6)
    ours = the_repair(loaded, weights)
    ours.templates = ["{}"]
    descent = Descent()
    found = ours.gradients(weights.working, descent)

    repeated = the_repair(loaded, weights)
    rows = next(repeated.batches)
    assert len(rows) == 9
    leaves = {f"{name}.weight": value.double().requires_grad_() for name, value in weights.working.items()}
    originals = {f"{name}.weight": weights.original(name).double() for name in weights.names}

    def log_probs(ids, parameters):
        call = {"input_ids": torch.tensor([ids])}
        return torch.func.functional_call(loaded.model, parameters, (), call).logits[0].log_softmax(-1)

    divergence = torch.zeros((), dtype=torch.float64)
    for ids in rows:
        p, q = log_probs(ids, originals), log_probs(ids, leaves)
        divergence = divergence + (p.exp() * (p - q)).sum()
    divergence = divergence / sum(map(len, rows))
    losses = []
    for fact in ours.facts:
        tokens, first = ours.encoder.with_target(fact.filled_prompt, fact.target_new)
        said = log_probs(tokens.ids, leaves)[first - 1 : -1]
        losses.append(-said[torch.arange(len(said)), tokens.ids[first:]].mean())
    loss = torch.stack(losses).mean()
    expected = torch.autograd.grad(divergence + repair_module._FACTS_WEIGHT * loss, list(leaves.values()))
    assert descent.divergences == [pytest.approx(float(divergence.detach()), rel=1e-6)]
    assert descent.losses == [pytest.approx(float(loss.detach()), rel=1e-6)]
    for name, gradient in zip(weights.names, expected, strict=True):
        torch.testing.assert_close(found[name].double(), gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()))


def test_a_step_has_its_length_and_follows_the_metric(edited):
    """One step: −∇ M⁻¹ of each matrix, all of them scaled so that the mean square share of ‖W − W0‖ is the rate."""
    loaded, weights = edited
    generator = torch.Generator().manual_seed(1)
    metrics = {}
    for name, weight in weights.working.items():
        root = torch.randn(weight.shape[1], weight.shape[1], generator=generator)
        metrics[name] = root @ root.T / len(root)
    gradients = the_repair(loaded, weights).gradients(weights.working, Descent())
    change, descent = the_repair(loaded, weights, metrics=metrics).run(1, 1.0, Quiet())
    assert len(descent.divergences) == len(descent.losses) == 1
    shares, scales = [], []
    for name in weights.names:
        step = -gradients[name] @ metrics[name]
        scales.append(float((change[name] * step).sum() / step.square().sum()))
        torch.testing.assert_close(change[name], scales[-1] * step, rtol=1e-4, atol=1e-9)
        shares.append(float(change[name].norm() / (weights.working[name] - weights.original(name)).norm()))
    assert scales[0] == pytest.approx(scales[1], rel=1e-4)
    assert math.sqrt(sum(share**2 for share in shares) / 2) == pytest.approx(repair_module._RATE, rel=1e-4)


def test_what_was_not_edited_stays(edited):
    loaded, weights = edited
    first, second = weights.names
    weights.set(first, weights.original(first))
    change, _ = the_repair(loaded, weights).run(2, 1.0, Quiet())
    assert not change[first].any()
    assert change[second].any()
    weights.set(second, weights.original(second))
    change, _ = the_repair(loaded, weights).run(1, 1.0, Quiet())
    assert not any(delta.any() for delta in change.values())


def test_it_takes_back_harm_where_the_facts_do_not_need_it(edited, monkeypatch):
    """What a random change did to text that the steps never saw; without facts to hold it takes back more of it, and knows less."""
    loaded, weights = edited
    rows = [[5 + (7 * row + column) % 40 for column in range(12 + row)] for row in range(20, 29)]
    facts = the_repair(loaded, weights).facts
    with weights.unedited():
        unedited = score_heldout(loaded, rows, 256, Quiet()).hidden
    start = weights.snapshot()

    def look(weight):
        monkeypatch.setattr(repair_module, "_FACTS_WEIGHT", weight)
        weights.restore(start)
        change, _ = the_repair(loaded, weights).run(30, 1.0, Quiet())
        for name, delta in change.items():
            weights.set(name, start[name] + delta)
        loss = sum(s.rewrite.nll_right for s in score_facts(loaded, [fact.bare() for fact in facts], 256, Quiet()))
        return score_heldout(loaded, rows, 256, Quiet(), unedited=unedited).divergence, loss

    before = score_heldout(loaded, rows, 256, Quiet(), unedited=unedited).divergence
    (alone, forgot), (held, knows) = look(0.0), look(0.05)
    assert alone < held < 0.9 * before
    assert knows < forgot


def run_options(**more):
    method = {"method": "memit_seq", "options": {"second_moment_weight": 1e-2}, "recheck": 1}
    return {**QUICK, **method, "repair": 12, **more}


def test_it_is_a_batch_of_its_own_and_stays_out_of_sphere(model, tmp_path):
    sphere = {"alpha": 1.0, "basis": "pretrained"}
    editor = Editor.from_pretrained(model, tmp_path / "run", reporter=Quiet(), **run_options(sphere=sphere))
    editor.edit(fact_records(6))
    entries = editor.run.history.batches
    kinds = ["repair" if entry.kind == "repair" else len(entry.facts) for entry in entries]
    assert kinds[:4] == [2, 2, 2, "repair"], "after the last facts, before the last look back"
    entry = entries[3]
    assert entry.repair["steps"] == len(entry.repair["divergences"]) == 6
    assert set(entry.seconds) >= {"repair", "deploying", "diagnosing", "storing"}
    editor._stream.committer.go_to(4)  # replayed, and its digests compared
    updates, seen = editor.run.read_update(4)
    assert not any(seen.values())
    for name, update in updates.items():
        directions = editor._stream.committer.solver.directions(name, editor.weights.original(name)).float()
        along = float((update.dense() @ directions).norm() / update.norm())
        assert along > 0.01, "an update of alpha 1 would have nothing there"
        assert entry.matrices[name]["update_norm"] == pytest.approx(update.norm(), rel=1e-6)
    editor.close()


def test_a_run_that_dies_around_its_repair_goes_on_to_the_same_bits(model, tmp_path, monkeypatch):
    whole = Editor.from_pretrained(model, tmp_path / "whole", reporter=Quiet(), **run_options())
    whole.edit(fact_records(4))
    expected = {name: weight.clone() for name, weight in whole.weights.working.items()}
    head = whole.run.history.head
    whole.close()
    editor = Editor.from_pretrained(model, tmp_path / "run", reporter=Quiet(), **run_options())
    with monkeypatch.context() as patch:
        patch.setattr(Repair, "_text", interrupted)
        with pytest.raises(KeyboardInterrupt):
            editor.edit(fact_records(4))
    assert editor.run.history.head == 2
    assert editor._stream.committer.at == 2, "the model in memory is what the journal says"
    editor.close()
    with opened(tmp_path / "run", Quiet()) as again, monkeypatch.context() as patch:
        patch.setattr(Committer, "edit", interrupted)
        patch.setattr(Stream, "_unanswered", interrupted)
        with pytest.raises(KeyboardInterrupt):
            again.resume()
        assert again.run.history.head == 3
    with opened(tmp_path / "run", Quiet()) as again:
        again.resume()
        assert again.run.history.head == head
        assert all(torch.equal(again.weights.working[name], weight) for name, weight in expected.items())
        again.resume()
        assert again.run.history.head == head, "repaired once"
        again.rollback(3)
        again.rollback(2)
        again.resume()
        assert again.run.history.head == 2, "what was rolled back is not done again"


def interrupted(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("method", ["lyaplock", "ultraedit", "rect", "ft", "alphaedit"])
def test_any_method_can_be_repaired(model, tmp_path, method):
    options = {**run_options(), "method": method, "options": {}, "repair": 2}
    if method == "ultraedit":
        del options["layers"]
    editor = Editor.from_pretrained(model, tmp_path / "run", reporter=Quiet(), **options)
    editor.edit(fact_records(4))
    assert [entry.kind == "repair" for entry in editor.run.history.batches][:3] == [False, False, True]
    if method == "lyaplock":
        committer, head = editor._stream.committer, editor.run.history.head
        live = committer.states
        for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
            checkpoint.unlink()
        committer.go_to(2)
        before = committer.states
        committer.go_to(3)
        for name, state in committer.states.items():
            moved = editor.weights.working[name] - editor.weights.original(name)
            torch.testing.assert_close(state["change"], moved)
            assert torch.equal(state["queue"], before[name]["queue"]), "a repair is no batch to the queue"
            assert not torch.equal(state["lost"], before[name]["lost"])
        committer.go_to(head)
        for name, state in committer.states.items():
            assert all(torch.equal(value, live[name][part]) for part, value in state.items()), "and in a replay"
    editor.edit(fact_records(2, start=4))
    editor.close()


def test_text_that_says_nothing_is_refused():
    assert readable_passages([[1], [2, 3]]) == [[2, 3]]
    with pytest.raises(SphereEditError, match="no passage of two tokens"):
        readable_passages([[1], [2]])


@pytest.mark.parametrize("options", [{"method": "prune", "options": {}}, {"sphere": {"project": "deployed"}}])
def test_it_is_refused_where_the_model_runs_with_other_weights(model, tmp_path, options):
    with pytest.raises(SphereEditError, match="repair cannot follow"):
        Editor.from_pretrained(model, tmp_path / "run", reporter=Quiet(), **run_options(**options))
    editor = Editor.from_pretrained(
        model, tmp_path / "run", reporter=Quiet(), **{**QUICK, "sphere": {"project": "deployed"}}
    )
    assert editor.settings.repair == 0, "a default gives way"


def test_a_few_facts_wait_for_a_repair_and_share_its_length(edited, model, tmp_path, monkeypatch):
    monkeypatch.setattr(repair_module, "_FACTS_A_STEP", 10)
    assert [repair_steps(100, count) for count in (9, 10, 60, 5000)] == [0, 1, 6, 100]
    loaded, weights = edited
    (long, _), (short, _) = (the_repair(loaded, weights).run(1, share, Quiet()) for share in (1.0, 0.25))
    for name in weights.names:
        torch.testing.assert_close(short[name], long[name] / 2)
    monkeypatch.setattr(repair_module, "_FACTS_A_STEP", 4)
    editor = Editor.from_pretrained(model, tmp_path / "run", reporter=Quiet(), **run_options(recheck=0))
    for start in (0, 2, 4):
        editor.edit(fact_records(2, start=start))
    assert [entry.kind == "repair" for entry in editor.run.history.batches] == [False, False, True, False]


@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_a_repair_that_overflows_ends_and_the_run_goes_on(model, tmp_path, monkeypatch, where):
    plain, calls = Repair.gradients, []

    def overflowing(self, weights, descent):
        calls.append(1)
        found = plain(self, weights, descent)
        if len(calls) == 3 and where == "loss":
            descent.divergences[-1] = math.nan
        return {
            name: gradient * (torch.inf if len(calls) == 3 and where == "gradient" else 1)
            for name, gradient in found.items()
        }

    monkeypatch.setattr(Repair, "gradients", overflowing)
    editor = Editor.from_pretrained(model, tmp_path / "run", reporter=Quiet(), **run_options())
    metrics = editor.edit(fact_records(4))
    assert editor.run.history.finished
    assert len(calls) == 3
    (repaired,) = (entry.repair for entry in editor.run.history.batches if entry.kind == "repair")
    assert (repaired["steps"], len(repaired["losses"])) == (2, 2)
    assert all(torch.isfinite(weight).all() for weight in editor.weights.working.values())
    assert metrics["edited"]["perplexity"] is not None


def test_the_guard_lets_a_repair_pass(model, tmp_path, monkeypatch):
    objections = iter([None, None, "not asked"])
    monkeypatch.setattr(commit_module, "objection", lambda matrices: next(objections))
    editor = Editor.from_pretrained(model, tmp_path / "run", reporter=Quiet(), **run_options(guard=True, recheck=0))
    editor.edit(fact_records(4))
    assert editor.run.history.guard is None
    assert editor.run.history.batches[-1].kind == "repair"


# --- K-FAC --------------------------------------------------------------------------------------------------------


def test_output_curvature_is_the_second_moment_of_gradients_of_drawn_answers(edited, monkeypatch):
    loaded, weights = edited
    monkeypatch.setattr(torch, "multinomial", lambda p, count, generator: p.argmax(-1, keepdim=True))
    rows = [[5, 6, 7, 8, 9], [10, 11, 12]]
    found = output_curvature(loaded, list(weights.names), [rows[:1], rows[1:]], seed=0)
    expected = [torch.zeros_like(one, dtype=torch.float64) for one in found]
    for row in rows:
        shifts = []

        def add(module, args, output, shifts=shifts):
            shifts.append(torch.zeros_like(output, requires_grad=True))
            return output + shifts[-1]

        hooks = [loaded.model.get_submodule(name).register_forward_hook(add) for name in weights.names]
        logits = loaded.model(input_ids=torch.tensor([row]), use_cache=False).logits[0]
        for hook in hooks:
            hook.remove()
        loss = torch.nn.functional.cross_entropy(logits, logits.argmax(-1), reduction="sum")
        for total, gradient in zip(expected, torch.autograd.grad(loss, shifts), strict=True):
            total += gradient[0].T @ gradient[0] / 8
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-6 * float(other.abs().max()))


def test_answers_are_drawn_from_the_models_own_distribution(edited):
    """So that E[p − e_y] = 0: over many draws the mean slope vanishes, and another seed draws others."""
    loaded, _ = edited
    hidden = torch.randn(1, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64).repeat(4000, 1)
    slopes = _drawn_slope(loaded, hidden, torch.Generator().manual_seed(0))
    assert float(slopes.mean(0).norm()) < 0.1 * float(slopes.norm(dim=1).mean())
    other = _drawn_slope(loaded, hidden, torch.Generator().manual_seed(1))
    assert not torch.equal(slopes, other)


def test_the_damped_inverse_is_its_formula():
    root = torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    curvature = root @ root.T
    expected = torch.linalg.inv(curvature + 0.1 * curvature.trace() / 6 * torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(damped_inverse(curvature), expected)
    assert float(damped_inverse(torch.diag(torch.tensor([1.0, 0.0]))).isfinite().all())


def test_with_kfac_a_first_step_goes_along_the_gradient_between_both_metrics(edited):
    loaded, weights = edited
    passages, facts = [[5, 6, 7, 8, 9, 10]] * 3, facts_from(fact_records(2)).facts
    metrics = dict.fromkeys(weights.names)

    def repair(curved):
        return Repair(loaded, weights, passages, facts, TEMPLATES, metrics, 256, seed=3, curved=curved)

    plain, curved = (repair(way).run(1, 1.0, Quiet())[0] for way in (False, True))
    outputs = repair(True)._output_metrics()
    for name in weights.names:
        wanted = outputs[name].double() @ plain[name].double()
        cosine = (wanted * curved[name].double()).sum() / (wanted.norm() * curved[name].double().norm())
        assert float(cosine) > 0.999
        straight = (plain[name] * curved[name]).sum() / (plain[name].norm() * curved[name].norm())
        assert float(straight) < 0.999
