"""Each method against its equation, its defining property, and the authors' numbers."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from sphere_edit import SphereEditError
from sphere_edit.editing.methods import METHODS, make_method
from sphere_edit.editing.methods.alphaedit import AlphaEdit
from sphere_edit.editing.methods.base import LayerProblem, Statistics
from sphere_edit.editing.methods.memit import Memit
from sphere_edit.numerics.linalg import NullSpaceRule, null_space


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


D_OUT, D_IN, N = 7, 20, 4


@pytest.fixture
def problem() -> LayerProblem:
    factor = random(D_IN, 3 * D_IN, seed=0) * torch.linspace(0.01, 2, D_IN, dtype=torch.float64)[:, None]
    moment = factor @ factor.T / (3 * D_IN)
    statistics = Statistics(moment, null_space(moment, NullSpaceRule.QUANTILE, 0.6))
    weight = random(D_OUT, D_IN, seed=1)
    return LayerProblem(weight, weight, random(D_IN, N, seed=2), random(D_OUT, N, seed=3), statistics)


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
    basis = problem.statistics.null_space
    projector = basis @ basis.T
    keys = problem.keys
    system = previous @ previous.T @ projector + keys @ keys.T @ projector + 3.0 * torch.eye(D_IN, dtype=torch.float64)
    expected = problem.residual @ keys.T @ projector @ torch.linalg.inv(system)
    torch.testing.assert_close(method.solve(problem, state).dense(), expected, atol=1e-10, rtol=1e-8)


def test_alphaedit_zeroes_its_normal_equations_within_the_null_space(problem):
    method = AlphaEdit(l2=0.5)
    delta = method.solve(problem, {}).dense()
    basis = problem.statistics.null_space
    gradient = (delta @ problem.keys - problem.residual) @ problem.keys.T + 0.5 * delta
    assert float((gradient @ basis).abs().max()) < 1e-10


def test_alphaedit_leaves_keys_outside_its_null_space_alone(problem):
    method = AlphaEdit()
    delta = method.solve(problem, {}).dense()
    basis = problem.statistics.null_space
    outside = random(D_IN, 5, seed=5)
    outside -= basis @ (basis.T @ outside)
    assert float((delta @ problem.keys).norm()) > 0.1, "the update does something"
    assert float((delta @ outside).abs().max()) < 1e-12


def test_states_do_not_leak_between_calls(problem):
    method = AlphaEdit()
    state = method.after_batch({}, {"keys": problem.keys}, problem.statistics)
    before = {name: value.clone() for name, value in state.items()}
    first = method.solve(problem, state).dense()
    method.after_batch(state, {"keys": problem.keys}, problem.statistics)
    assert all(torch.equal(before[name], state[name]) for name in before)
    assert torch.equal(first, method.solve(problem, state).dense())


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
    problem = LayerProblem(
        tensors["update.W"], tensors["update.W"], tensors["update.K"], tensors["update.R"], statistics
    )
    assert relative(method.solve(problem, state).dense(), tensors["update.alphaedit.L2_10"]) < 1e-4


@pytest.mark.parametrize("weight", [15000, 20])
def test_memit_agrees_with_the_published_code(published, weight):
    tensors, _ = published
    statistics = Statistics(second_moment=tensors["update.cov"])
    problem = LayerProblem(
        tensors["update.W"], tensors["update.W"], tensors["update.K"], tensors["update.R"], statistics
    )
    update = Memit(second_moment_weight=weight).solve(problem, {})
    assert relative(update.dense(), tensors[f"update.memit.lambda{weight}"]) < 1e-4
