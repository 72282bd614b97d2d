"""Each method against its equation, its defining property, and the authors' numbers."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import load_file

from sphere_edit import SphereEditError
from sphere_edit.editing.ingredients import DominantVectors
from sphere_edit.editing.methods import METHODS, make_method
from sphere_edit.editing.methods.alphaedit import AlphaEdit
from sphere_edit.editing.methods.base import LayerProblem, Statistics
from sphere_edit.editing.methods.emmet import Emmet
from sphere_edit.editing.methods.encore import Encore
from sphere_edit.editing.methods.frugal import Frugal
from sphere_edit.editing.methods.ft import FineTune
from sphere_edit.editing.methods.lyaplock import LyapLock
from sphere_edit.editing.methods.memit import Memit, MemitSeq
from sphere_edit.editing.methods.prune import Prune
from sphere_edit.editing.methods.rect import Rect
from sphere_edit.editing.methods.revive import Revive
from sphere_edit.editing.methods.rome import Rome
from sphere_edit.editing.methods.ultraedit import UltraEdit
from sphere_edit.editing.targets import Targets, anchored, typical_length
from sphere_edit.numerics.linalg import NullSpaceRule, null_space
from sphere_edit.numerics.update import DenseUpdate


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


D_OUT, D_IN, N = 7, 20, 4


@pytest.fixture
def problem() -> LayerProblem:
    factor = random(D_IN, 3 * D_IN, seed=0) * torch.linspace(0.01, 2, D_IN, dtype=torch.float64)[:, None]
    moment = factor @ factor.T / (3 * D_IN)
    statistics = Statistics(second_moment=moment, null_space=null_space(moment, NullSpaceRule.QUANTILE, 0.6))
    weight = random(D_OUT, D_IN, seed=1)
    return LayerProblem(weight, random(D_IN, N, seed=2), random(D_OUT, N, seed=3), statistics)


def test_memit_zeroes_its_normal_equations(problem):
    method = Memit(second_moment_weight=5.0)
    delta = method.solve(problem, {}).dense()
    left = 5.0 * delta @ problem.statistics.second_moment + (delta @ problem.keys - problem.residual) @ problem.keys.T
    assert float(left.abs().max()) < 1e-10


def test_alphaedit_is_its_published_formula_with_earlier_keys(problem):
    method = AlphaEdit(l2=3.0)
    previous = random(D_IN, 6, seed=4)
    state = method.after_batch({}, {"keys": previous[:, :2]}, problem.statistics)
    state = method.after_batch(state, {"keys": previous[:, 2:]}, problem.statistics)
    basis = problem.statistics["null_space"]
    projector = basis @ basis.T
    keys = problem.keys
    system = previous @ previous.T @ projector + keys @ keys.T @ projector + 3.0 * torch.eye(D_IN, dtype=torch.float64)
    expected = problem.residual @ keys.T @ projector @ torch.linalg.inv(system)
    torch.testing.assert_close(method.solve(problem, state).dense(), expected, atol=1e-10, rtol=1e-8)


def test_alphaedit_zeroes_its_normal_equations_within_the_null_space(problem):
    method = AlphaEdit(l2=0.5)
    delta = method.solve(problem, {}).dense()
    basis = problem.statistics["null_space"]
    gradient = (delta @ problem.keys - problem.residual) @ problem.keys.T + 0.5 * delta
    assert float((gradient @ basis).abs().max()) < 1e-10


def test_alphaedit_leaves_keys_outside_its_null_space_alone(problem):
    method = AlphaEdit()
    delta = method.solve(problem, {}).dense()
    basis = problem.statistics["null_space"]
    outside = random(D_IN, 5, seed=5)
    outside -= basis @ (basis.T @ outside)
    assert float((delta @ problem.keys).norm()) > 0.1, "the update does something"
    assert float((delta @ outside).abs().max()) < 1e-12


def with_dominant(problem: LayerProblem, method: Revive, original: torch.Tensor) -> LayerProblem:
    """The problem with what REVIVE is given of W0."""
    return dataclasses.replace(problem, given=method.needs.get(DominantVectors).of_matrix(original))


@pytest.mark.parametrize("protect", ["either", "both"])
def test_revive_takes_away_what_falls_on_dominant_singular_vectors_and_nothing_else(problem, protect):
    """In ΔW = Σ c_ij u_i v_jᵀ over all of W0's singular vectors, c_ij goes where i or j (or both) are among the first k."""
    original = random(D_OUT, D_IN, seed=6)
    left, values, right = torch.linalg.svd(original)
    share = (values**2).cumsum(0) / (values**2).sum()
    count = 3
    method = Revive(energy=float(share[count - 2] + share[count - 1]) / 2, protect=protect)
    written = method.solve(with_dominant(problem, method, original), {}).dense()
    coefficients = left.T @ AlphaEdit().solve(problem, {}).dense() @ right.T
    first = [torch.arange(size) < count for size in (D_OUT, D_IN)]
    rows, columns = first[0][:, None], first[1][None, :]
    gone = rows | columns if protect == "either" else rows & columns
    assert float(coefficients[gone].norm()) > 0.01 * float(coefficients.norm()), "there is something to take away"
    torch.testing.assert_close(left.T @ written @ right.T, torch.where(gone, 0.0, coefficients), atol=1e-10, rtol=0)


def test_what_w0_does_along_dominant_vectors_outlives_revive(problem):
    """With ``either``, u_i and v_i stay singular vectors of W0 + ΔW, with their σ_i."""
    original = random(D_OUT, D_IN, seed=6)
    left, values, right = torch.linalg.svd(original, full_matrices=False)
    method = Revive(energy=0.5)
    update = method.solve(with_dominant(problem, method, original), {}).dense()
    edited = original + update
    assert float(update.norm()) > 0.1, "the update does something"
    torch.testing.assert_close(edited @ right[:2].T, left[:, :2] * values[:2])
    torch.testing.assert_close(edited.T @ left[:, :2], right[:2].T * values[:2])


def test_states_do_not_leak_between_calls(problem):
    method = AlphaEdit()
    state = method.after_batch({}, {"keys": problem.keys}, problem.statistics)
    before = {name: value.clone() for name, value in state.items()}
    first = method.solve(problem, state).dense()
    method.after_batch(state, {"keys": problem.keys}, problem.statistics)
    assert all(torch.equal(before[name], state[name]) for name in before)
    assert torch.equal(first, method.solve(problem, state).dense())


@pytest.mark.parametrize("name", ["alphaedit", "memit_seq", "encore", "frugal"])
def test_what_a_method_remembers_lies_in_memory_as_a_checkpoint_reads_it(problem, name):
    """Products with one column round otherwise for the other order, and a resumed run would drift from one that was not."""
    method = METHODS[name]()
    state = method.after_batch({}, {"keys": problem.keys}, problem.statistics)
    for held in (state, method.forget(state, problem.keys[:, :1], problem.statistics)):
        assert all(value.stride() == (value.shape[1], 1) for value in held.values())


def test_alphaedit_with_earlier_keys_zeroes_its_normal_equations(problem):
    method = AlphaEdit(l2=0.5)
    previous = random(D_IN, 6, seed=4)
    state = method.after_batch({}, {"keys": previous}, problem.statistics)
    delta = method.solve(problem, state).dense()
    basis = problem.statistics["null_space"]
    gradient = (delta @ problem.keys - problem.residual) @ problem.keys.T + delta @ previous @ previous.T + 0.5 * delta
    assert float((gradient @ basis).abs().max()) < 1e-10


def test_sequential_memit_without_a_history_is_memit_and_with_one_zeroes_its_normal_equations(problem):
    plain, method = Memit(second_moment_weight=5.0), MemitSeq(second_moment_weight=5.0)
    assert torch.equal(method.solve(problem, {}).dense(), plain.solve(problem, {}).dense())
    previous = random(D_IN, 6, seed=4)
    state = method.after_batch({}, {"keys": previous[:, :2]}, problem.statistics)
    state = method.after_batch(state, {"keys": previous[:, 2:]}, problem.statistics)
    delta = method.solve(problem, state).dense()
    preserved = 5.0 * problem.statistics.second_moment + previous @ previous.T
    gradient = delta @ preserved + (delta @ problem.keys - problem.residual) @ problem.keys.T
    assert float(gradient.abs().max()) < 1e-10
    assert float((delta @ previous).norm()) < 0.9 * float((plain.solve(problem, {}).dense() @ previous).norm())
    forgotten = method.forget(state, previous[:, :2], problem.statistics)
    only = method.after_batch({}, {"keys": previous[:, 2:]}, problem.statistics)
    torch.testing.assert_close(forgotten["system"], only["system"], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    ("method", "weight", "ridge"),
    [(Encore(second_moment_weight=5.0, ridge=0.7), 5.0, 0.7), (Frugal(second_moment_weight=0.3), 0.3 * D_IN, 0.0)],
    ids=["encore", "frugal"],
)
def test_sequential_memits_kin_solve_their_normal_equations(problem, method, weight, ridge):
    """``ΔW (λ C0 + μ I + Kp Kpᵀ) + (ΔW K − R) Kᵀ = 0``, before the first batch and after some; forgotten keys count no more."""
    moment = problem.statistics.second_moment
    preserved = weight * moment + ridge * torch.eye(D_IN, dtype=torch.float64)
    previous = random(D_IN, 6, seed=4)
    states = [({}, torch.zeros(D_IN, 0, dtype=torch.float64))]
    first = method.after_batch({}, {"keys": previous[:, :2]}, problem.statistics)
    both = method.after_batch(first, {"keys": previous[:, 2:]}, problem.statistics)
    states += [(first, previous[:, :2]), (both, previous)]
    states += [(method.forget(both, previous[:, :2], problem.statistics), previous[:, 2:])]
    for state, known in states:
        delta = method.solve(problem, state).dense()
        gradient = delta @ (preserved + known @ known.T) + (delta @ problem.keys - problem.residual) @ problem.keys.T
        assert float(gradient.abs().max()) < 1e-9


def test_over_ordinary_keys_distinctiveness_is_the_width(problem):
    """E[kᵀ C0⁻¹ k] = d_in, which makes λ / d_in mean the same for any matrix."""
    keys = random(D_IN, 500, seed=6) * torch.linspace(0.1, 3, D_IN, dtype=torch.float64)[:, None]
    moment = keys @ keys.T / 500
    distinct = (keys * torch.linalg.solve(moment, keys)).sum(0)
    assert float(distinct.mean()) == pytest.approx(D_IN, rel=1e-9)
    ordinary = LayerProblem(problem.weight, keys[:, :1], problem.residual[:, :1], Statistics(second_moment=moment))
    reached = Frugal(second_moment_weight=0.2).solve(ordinary, {}).dense() @ ordinary.keys
    expected = distinct[0] / (0.2 * D_IN + distinct[0]) * ordinary.residual
    torch.testing.assert_close(reached, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("second_moment", [True, False])
def test_emmet_meets_its_constraint_at_the_least_cost(problem, second_moment):
    delta = Emmet(second_moment=second_moment).solve(problem, {}).dense()
    assert float((delta @ problem.keys - problem.residual).abs().max()) < 1e-8
    cost = problem.statistics.second_moment if second_moment else torch.eye(D_IN, dtype=torch.float64)
    least = float(torch.trace(delta @ cost @ delta.T))
    # whatever else meets the constraint differs by something that vanishes on the keys, and costs more
    free = torch.eye(D_IN, dtype=torch.float64) - problem.keys @ torch.linalg.pinv(problem.keys)
    for seed in range(20):
        other = delta + 0.1 * random(D_OUT, D_IN, seed=seed) @ free
        assert float((other @ problem.keys - problem.residual).abs().max()) < 1e-8
        assert float(torch.trace(other @ cost @ other.T)) > least
    # its multipliers: ΔW C lies in the span of the keys
    assert float((delta @ cost @ free).abs().max()) < 1e-8


def test_emmet_with_a_ridge_is_memit(problem):
    ours = Emmet(ridge=3.0).solve(problem, {}).dense()
    torch.testing.assert_close(ours, Memit(second_moment_weight=3.0).solve(problem, {}).dense(), atol=1e-9, rtol=1e-9)


def test_emmet_survives_two_facts_with_one_key(problem):
    twins = dataclasses.replace(problem, keys=problem.keys[:, [0, 0, 1, 2]])
    delta = Emmet().solve(twins, {}).dense()
    assert bool(torch.isfinite(delta).all())
    torch.testing.assert_close(delta @ twins.keys[:, 2:], twins.residual[:, 2:], atol=1e-3, rtol=1e-3)


def test_rome_is_its_closed_form(problem):
    single = dataclasses.replace(problem, keys=problem.keys[:, :1], residual=problem.residual[:, :1])
    delta = Rome().solve(single, {}).dense()
    assert float((delta @ single.keys - single.residual).abs().max()) < 1e-8
    direction = torch.linalg.solve(problem.statistics.second_moment, single.keys)
    expected = single.residual @ direction.T / float(single.keys.T @ direction)
    torch.testing.assert_close(delta, expected, atol=1e-9, rtol=1e-9)
    assert Rome.max_batch == 1


@pytest.mark.parametrize("keep", [0.1, 0.4, 0.55, 1.0])
def test_rect_keeps_the_share_it_says_and_that_with_the_largest_relative_change(problem, keep):
    method = Rect(keep=keep, second_moment_weight=5.0)
    delta = method.solve(problem, {}).dense()
    kept = method.finish(DenseUpdate(delta), problem.weight).dense()
    assert int((kept != 0).sum()) == min(delta.numel(), round(keep * delta.numel()) + 1)
    assert torch.equal(kept[kept != 0], delta[kept != 0])
    relative = (delta / problem.weight).abs()
    if keep < 1:
        assert float(relative[kept != 0].min()) >= float(relative[kept == 0].max())


def test_prune_restrains_the_accumulated_singular_values_and_those_alone():
    original = random(12, 30, seed=0) / 4
    limit = float(torch.linalg.matrix_norm(original, 2))
    assert limit > 1, "otherwise the natural logarithm would not shrink"
    u, s, v = torch.linalg.svd(random(12, 30, seed=1), full_matrices=False)
    s = torch.linspace(0.1, 4 * limit, 12, dtype=torch.float64).flip(0)
    change = u * s @ v
    for base in (math.e, 1.2):
        deployed = Prune(log_base=base).deploy(original, original + change)
        found, values, _ = torch.linalg.svd(deployed - original, full_matrices=False)
        formula = torch.where(s > limit, (s.log() - math.log(limit)) / math.log(base) + limit, s).minimum(s)
        torch.testing.assert_close(values, formula.sort(descending=True).values, atol=1e-10, rtol=1e-10)
        torch.testing.assert_close((found.T @ u).abs().diagonal()[-1], torch.ones((), dtype=torch.float64))
    strict = float(torch.linalg.matrix_norm(Prune().deploy(original, original + change) - original, 2))
    assert strict == pytest.approx(math.log(4 * limit) - math.log(limit) + limit)
    small = original + 0.9 * limit * change / float(s[0])
    assert Prune().deploy(original, small) is small, "nothing to restrain: bit for bit the working weight"


def test_prune_never_enlarges():
    """Below σmax = 1 / ln b the published formula would: its slope at σmax is above 1."""
    original = random(6, 9, seed=0) / 100
    change = random(6, 9, seed=1) / 50
    restrained = Prune().deploy(original, original + change) - original
    assert float(torch.linalg.matrix_norm(restrained, 2)) <= float(torch.linalg.matrix_norm(change, 2)) * (1 + 1e-12)


def test_ultraedit_keeps_the_statistics_that_two_passes_over_everything_would_give(problem):
    method, state = UltraEdit(), {}
    batches = [(random(D_IN, n, seed=n) * 3 + 1, random(D_OUT, n, seed=50 + n)) for n in (3, 1, 8)]
    for keys, residual in batches:
        state = method.after_batch(state, {"keys": keys, "residual": residual}, Statistics())
    everything = torch.cat([torch.cat(batch) for batch in batches], dim=1)
    assert float(state["count"]) == 12
    torch.testing.assert_close(state["mean"], everything.mean(1), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(state["squares"] / 11, everything.var(1), atol=1e-12, rtol=1e-12)


def test_ultraedit_is_its_published_formula_and_zeroes_its_normal_equations(problem):
    method = UltraEdit(rate=0.3, ridge=2.0)
    earlier = {"keys": random(D_IN, 5, seed=7), "residual": random(D_OUT, 5, seed=8)}
    delta = method.solve(problem, method.after_batch({}, earlier, Statistics())).dense()
    features = torch.cat([torch.cat(list(earlier.values())), torch.cat([problem.keys, problem.residual])], dim=1)
    normal = (features - features.mean(1, keepdim=True)) / features.std(1, keepdim=True)
    keys, gradients = normal[:, 5:].split([D_IN, D_OUT])
    values = 0.3 * keys.square().sum(0) * gradients
    system = problem.keys @ problem.keys.T + 2.0 * torch.eye(D_IN, dtype=torch.float64)
    torch.testing.assert_close(delta, values @ problem.keys.T @ torch.linalg.inv(system), atol=1e-9, rtol=1e-9)
    assert float(((delta @ problem.keys - values) @ problem.keys.T + 2.0 * delta).abs().max()) < 1e-8


def test_ultraedit_takes_a_single_token(problem):
    single = dataclasses.replace(problem, keys=problem.keys[:, :1], residual=problem.residual[:, :1])
    delta = UltraEdit().solve(single, {}).dense()
    assert bool(torch.isfinite(delta).all())
    assert float((delta @ single.keys).flatten() @ single.residual.flatten()) > 0, "the output moves as the loss asks"


def quadratic(goal: torch.Tensor):
    """A loss whose gradient is known, and the weights at which it was asked for."""
    asked = []

    def objective(weights):
        asked.append({name: weight.clone() for name, weight in weights.items()})
        gap = weights["w"] - goal
        return float(gap.square().sum()) / 2, {"w": gap}

    return objective, asked


def test_fine_tuning_is_adam_down_the_loss():
    start, goal = random(3, 4, seed=0), random(3, 4, seed=1)
    objective, asked = quadratic(goal)
    update = FineTune(lr=0.01, steps=5, weight_decay=0.1).descend(objective, {"w": start})["w"]
    w, first, second = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for step in range(1, 6):
        gradient = w - goal + 0.1 * w
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        w = w - 0.01 * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
    torch.testing.assert_close(update.dense(), w - start, atol=1e-12, rtol=1e-10)
    assert len(asked) == FineTune(steps=5).evaluations == 6
    assert torch.equal(asked[0]["w"], start), "what it was given is left as it is"


def test_fine_tuning_stops_once_the_loss_is_low_and_keeps_to_its_norm_constraint():
    start, goal = random(3, 4, seed=0), random(3, 4, seed=1)
    objective, asked = quadratic(goal)
    loss = FineTune(lr=0.1, steps=500, stop_loss=0.1).descend(objective, {"w": start})["w"].dense() + start - goal
    assert len(asked) < 400
    assert float(loss.square().sum()) / 2 < 0.1
    objective, _ = quadratic(goal)
    held = FineTune(lr=0.1, steps=50, norm_constraint=0.05).descend(objective, {"w": start})["w"].dense()
    assert float(held.abs().max()) == pytest.approx(0.05)
    assert float((start + held - goal).norm()) < float((start - goal).norm())


@pytest.mark.parametrize("name", METHODS)
def test_every_method_documents_itself_and_refuses_unknown_options(name):
    kind = METHODS[name]
    assert kind.paper
    assert "Δ" in kind.__doc__
    assert all(field.description for field in kind.model_fields.values())
    with pytest.raises(SphereEditError, match=rf"{name}: option 'typo'"):
        make_method(name, {"typo": 1})


def test_unknown_method_is_told_which_exist():
    with pytest.raises(SphereEditError, match="no method 'magic'.*alphaedit"):
        make_method("magic", {})


# --- the authors' numbers -----------------------------------------------------------------------------------------


@pytest.fixture
def published(shared):
    return load_file(shared / "reference" / "published.safetensors"), json.loads(
        (shared / "reference" / "published.json").read_text()
    )


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def test_alphaedit_agrees_with_the_published_code(published):
    tensors, numbers = published
    basis = null_space(tensors["update.cov"], NullSpaceRule.ABSOLUTE, numbers["update.nullspace_threshold"])
    assert basis.shape[1] == numbers["update.nullspace_dims"]
    statistics = Statistics(null_space=basis)
    method = AlphaEdit(l2=10.0)
    state = method.after_batch({}, {"keys": tensors["update.K_previous"]}, statistics)
    problem = LayerProblem(tensors["update.W"], tensors["update.K"], tensors["update.R"], statistics)
    assert relative(method.solve(problem, state).dense(), tensors["update.alphaedit.L2_10"]) < 1e-4


@pytest.mark.parametrize("weight", [15000, 20])
def test_memit_agrees_with_the_published_code(published, weight):
    tensors, _ = published
    statistics = Statistics(second_moment=tensors["update.cov"])
    problem = LayerProblem(tensors["update.W"], tensors["update.K"], tensors["update.R"], statistics)
    update = Memit(second_moment_weight=weight).solve(problem, {})
    assert relative(update.dense(), tensors[f"update.memit.lambda{weight}"]) < 1e-4


def test_rect_agrees_with_the_published_code(published):
    tensors, _ = published
    delta = tensors["update.memit.lambda20"]
    ours = Rect().finish(DenseUpdate(delta), tensors["update.W"]).dense()
    theirs = tensors["update.rect40.of_memit_lambda20"]
    assert torch.equal(ours != 0, theirs != 0)
    assert relative(ours, theirs) < 1e-6


def test_prune_agrees_with_the_published_code(published):
    tensors, numbers = published
    weight, change = tensors["update.W"].double(), tensors["update.prune.accumulated"].double()
    ours = Prune().deploy(weight, weight + change) - weight
    assert relative(ours, tensors["update.prune.out"]) < 1e-4
    clamped = torch.linalg.svdvals(change) > torch.linalg.matrix_norm(weight, 2)
    assert int(clamped.sum()) == numbers["update.prune.n_clamped"]


@pytest.mark.parametrize("method", [AlphaEdit(l2=0.5), MemitSeq(second_moment_weight=5.0)])
def test_the_kept_inverse_stays_that_of_all_keys_over_a_long_stream(problem, method):
    """A hundred steps of rank n against one solve of the whole system, and a spoilt inverse is noticed and made afresh."""
    statistics = problem.statistics
    state = {}
    for batch in range(100):
        # keys of very different lengths, some twice
        state = method.after_batch(state, {"keys": random(D_IN, N, seed=batch % 70) * 10 ** (batch % 4)}, statistics)
    inverse = torch.linalg.inv(state["system"])
    torch.testing.assert_close(state["inverse"], inverse, rtol=0, atol=1e-8 * float(inverse.norm()))
    spoilt = {**state, "inverse": state["inverse"] * (1 + 1e-4)}
    mended = method.after_batch(spoilt, {"keys": random(D_IN, N, seed=1)}, statistics)
    right = method.after_batch(state, {"keys": random(D_IN, N, seed=1)}, statistics)
    torch.testing.assert_close(mended["inverse"], right["inverse"], rtol=0, atol=1e-8 * float(inverse.norm()))


def test_lyaplock_minimises_what_it_weighs_and_its_queue_grows_beyond_the_bound(problem):
    """Three batches by hand: ‖ΔW K − R‖² + q λ ‖(W + ΔW − W0) C0^½‖² + Σ ‖(W + ΔW − W_s) K_s‖² has no gradient."""
    method = LyapLock(second_moment_weight=5.0, budget=1.2)
    original, moment = problem.weight, problem.statistics.second_moment
    weight, state, history, queue, disturbances = original, {}, [], 1.0, []
    for batch in range(3):
        keys, residual = random(D_IN, N, seed=10 + batch), random(D_OUT, N, seed=20 + batch)
        delta = method.solve(LayerProblem(weight, keys, residual, problem.statistics), state).dense()
        weight = weight + delta
        gradient = (delta @ keys - residual) @ keys.T + queue * 5.0 * (weight - original) @ moment
        gradient += sum(((weight - then) @ known @ known.T for then, known in history), start=torch.zeros(()))
        assert float(gradient.abs().max()) < 1e-9
        history.append((weight, keys))
        change = weight - original
        disturbances.append(float((change @ moment @ change.T).trace()))
        if batch:
            queue = max(queue + disturbances[-1] / (1.2 * disturbances[0]) - 1, 1.0)
        state = method.after_batch(state, {"keys": keys, "change": change}, problem.statistics)
        assert float(state["queue"]) == pytest.approx(queue)
        lost = sum(((then - weight) @ known @ known.T for then, known in history), start=torch.zeros(()))
        torch.testing.assert_close(state["lost"], lost, atol=1e-9, rtol=1e-9)
    assert queue > 1
    # a repair: E and W − W0 follow the weights, the queue counts batches and stands still
    weight = weight + 0.1 * random(D_OUT, D_IN, seed=30)
    repaired = method.after_repair(state, {"change": weight - original}, problem.statistics)
    lost = sum(((then - weight) @ known @ known.T for then, known in history), start=torch.zeros(()))
    torch.testing.assert_close(repaired["lost"], lost, atol=1e-9, rtol=1e-9)
    assert float((repaired["lost"] - state["lost"]).norm()) > 1.0
    assert torch.equal(repaired["change"], weight - original)
    assert all(torch.equal(repaired[part], state[part]) for part in ("queue", "keys", "bound"))
    known = history[0][1]
    forgotten = method.forget(state, known, problem.statistics)
    torch.testing.assert_close(forgotten["keys"], state["keys"] - known @ known.T)
    assert float((forgotten["lost"] @ known).abs().max()) < 1e-9 < float((state["lost"] @ known).abs().max())


def test_frugal_leaves_context_tokens_of_this_and_all_earlier_batches_alone(problem):
    """``ΔW (λ C0 + Kp Kpᵀ + ρ Bp Bpᵀ + ρ B Bᵀ) + (ΔW K − R) Kᵀ = 0``; a superseded fact's context tokens stay."""
    method = Frugal(second_moment_weight=0.3, bystander_weight=0.4)
    beside, moment = random(D_IN, 5, seed=5), problem.statistics.second_moment
    problem = dataclasses.replace(problem, given={"context_tokens": beside})
    known, known_beside = random(D_IN, 2, seed=6), random(D_IN, 3, seed=7)
    written = method.after_batch({}, {"keys": known, "bystanders": known_beside}, problem.statistics)
    cases = [
        ({}, known[:, :0], known_beside[:, :0]),
        (written, known, known_beside),
        (method.forget(written, known, problem.statistics), known[:, :0], known_beside),
    ]
    for state, keys, others in cases:
        delta = method.solve(problem, state).dense()
        preserved = 0.3 * D_IN * moment + keys @ keys.T + 0.4 * (others @ others.T + beside @ beside.T)
        gradient = delta @ preserved + (delta @ problem.keys - problem.residual) @ problem.keys.T
        assert float(gradient.abs().max()) < 1e-9
    without = method.solve(dataclasses.replace(problem, given={}), {}).dense()
    assert float((method.solve(problem, {}).dense() @ beside).norm()) < 0.9 * float((without @ beside).norm())


def test_anchored_targets_are_of_one_length_or_given_up():
    """``δ ← μ (v0 + δ) / ‖v0 + δ‖ − v0``; what was longer than 2 μ is left as it is (NAS)."""
    outputs, deltas, clean = (random(D_OUT, 4, seed=seed) for seed in (30, 31, 32))
    deltas[:, 2] *= 100
    targets = Targets(clean + deltas, deltas, [[1.0]] * 4, [[0.0]] * 4)
    lengths = (outputs + deltas).norm(dim=0)
    anchor = float(lengths[:2].max())
    found = anchored(targets, outputs, anchor)
    kept = [column for column in range(4) if lengths[column] <= 2 * anchor]
    assert kept == [0, 1, 3]
    torch.testing.assert_close(
        (outputs + found.deltas).norm(dim=0)[kept], torch.full((3,), anchor, dtype=torch.float64)
    )
    cosines = torch.cosine_similarity(outputs + found.deltas, outputs + deltas, dim=0)[kept]
    torch.testing.assert_close(cosines, torch.ones(3, dtype=torch.float64))
    assert not found.deltas[:, 2].any()
    torch.testing.assert_close(found.values, clean + found.deltas)


def test_the_anchor_leaves_out_the_longest_twentieth():
    vectors = torch.eye(40)[:, :40] * torch.arange(1.0, 41.0)
    assert typical_length(vectors) == pytest.approx(sum(range(1, 39)) / 38)
    assert typical_length(vectors[:, :1]) == 1.0
