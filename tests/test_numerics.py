"""Formulas against their definitions, theorems, and the authors' numbers."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from sphere_edit import Sphere, SphereEditError, hyperspherical_energy
from sphere_edit.numerics import linalg
from sphere_edit.numerics.linalg import (
    NullSpaceRule,
    grown_inverse,
    grown_solution,
    null_space,
    principal_rank,
    right_eigenbasis,
    spd_solve,
)
from sphere_edit.numerics.projection import unit_rows
from sphere_edit.numerics.update import DenseUpdate, LowRankUpdate, update_from


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


shapes = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(0, 10_000))


@settings(deadline=None, max_examples=60)
@given(shapes)
def test_gram_eigenbasis_is_the_eigenbasis_of_the_large_matrix(shape):
    n, d, seed = shape
    rows = random(n, d, seed=seed)
    values, vectors = right_eigenbasis(rows)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(len(values), dtype=torch.float64), atol=1e-8, rtol=0)
    torch.testing.assert_close(rows.T @ rows / n @ vectors, vectors * values, atol=1e-9, rtol=0)
    torch.testing.assert_close((vectors * values) @ vectors.T, rows.T @ rows / n, atol=1e-9, rtol=0)


@settings(deadline=None, max_examples=60)
@given(shapes, st.floats(0, 1), st.floats(0, 1))
def test_sphere_is_its_definition_with_the_dense_projector(shape, eta, alpha):
    n, d, seed = shape
    weight, delta = random(n, d, seed=seed), random(n, d, seed=seed + 1)
    unit = weight / weight.norm(dim=1, keepdim=True)
    values, vectors = torch.linalg.eigh(unit.T @ unit / n)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    ratio = (values / values.sum()).cumsum(0)
    most = int(torch.linalg.matrix_rank(unit))
    # a cumulative ratio equal to η may round either way
    ranks = {min(int((ratio <= eta + slack).sum()) + 1, most) for slack in (-1e-9, 1e-9)}
    ours = Sphere(eta=eta, alpha=alpha)(delta, weight)
    matching = []
    for rank in ranks:
        projector = torch.eye(d, dtype=torch.float64) - alpha * vectors[:, :rank] @ vectors[:, :rank].T
        matching.append(torch.allclose(ours, delta @ projector, atol=1e-7, rtol=0))
    assert any(matching)


def test_sphere_at_alpha_zero_is_the_identity_and_at_one_removes_the_principal_part():
    weight, delta = random(10, 30), random(10, 30, seed=1)
    assert torch.equal(Sphere(alpha=0)(delta, weight), delta)
    full = Sphere(alpha=1, eta=0.6)
    directions = full.directions(weight)
    assert (delta @ directions).norm() > 1, "the update has a principal part to begin with"
    once = full(delta, weight)
    assert (once @ directions).norm() < 1e-12
    torch.testing.assert_close(full(once, weight), once)


def test_sphere_shrinks_the_principal_part_by_one_minus_alpha_and_leaves_the_rest():
    weight, delta = random(10, 30), random(10, 30, seed=1)
    sphere = Sphere(eta=0.5, alpha=0.8)
    directions = sphere.directions(weight)
    result = sphere(delta, weight)
    torch.testing.assert_close(result @ directions, 0.2 * delta @ directions)
    rest = torch.eye(30, dtype=torch.float64) - directions @ directions.T
    torch.testing.assert_close(result @ rest, delta @ rest)


def test_factors_and_dense_updates_go_through_sphere_alike():
    weight = random(8, 20)
    update = LowRankUpdate(random(8, 3, seed=1), random(3, 20, seed=2))
    sphere = Sphere(eta=0.4, alpha=0.7)
    expected = sphere(update.dense(), weight)
    torch.testing.assert_close(sphere(update, weight).dense(), expected)
    torch.testing.assert_close(sphere(DenseUpdate(update.dense()), weight).dense(), expected)
    assert sphere(update.to(torch.float32), weight.float()).left.dtype == torch.float32


@pytest.mark.parametrize("kind", ["low rank", "dense"])
def test_update_algebra(kind):
    low = LowRankUpdate(random(6, 2), random(2, 9, seed=1))
    update = low if kind == "low rank" else DenseUpdate(low.dense())
    dense, weight, basis = low.dense(), random(6, 9, seed=2), torch.linalg.qr(random(9, 3, seed=3))[0]
    torch.testing.assert_close(update.added_to(weight), weight + dense)
    torch.testing.assert_close(update.times(basis), dense @ basis)
    torch.testing.assert_close(update.without(basis, 0.3).dense(), dense - 0.3 * dense @ basis @ basis.T)
    assert math.isclose(update.norm(), float(dense.norm()), rel_tol=1e-12)
    torch.testing.assert_close(update_from(update.tensors()).dense(), dense)


@pytest.mark.parametrize("weight", [torch.zeros(3, 5), torch.ones(1, 4), torch.eye(4)[:3].repeat(2, 1)])
def test_sphere_on_degenerate_weights(weight):
    delta = torch.ones_like(weight)
    if weight.abs().sum() == 0:
        assert torch.equal(Sphere()(delta, weight), delta), "no neuron has a direction, so there is nothing to suppress"
    else:
        assert torch.isfinite(Sphere(eta=1.0, alpha=1.0)(delta, weight)).all()


def test_sphere_refuses_impossible_values():
    with pytest.raises(ValueError, match="less than or equal to 1"):
        Sphere(alpha=1.5)
    with pytest.raises(ValueError, match="'current' or 'pretrained'"):
        Sphere(basis="other")


def test_spd_solve_is_the_inverse_and_survives_a_singular_matrix():
    factor = random(8, 8)
    matrix, right = factor @ factor.T + torch.eye(8), random(8, 3, seed=1)
    torch.testing.assert_close(matrix @ spd_solve(matrix, right), right)
    thin = random(8, 2)
    singular, reachable = thin @ thin.T, thin @ random(2, 3, seed=1)
    torch.testing.assert_close(singular @ spd_solve(singular, reachable), reachable, atol=1e-5, rtol=1e-4)
    with pytest.raises(SphereEditError, match="NaN or infinite"):
        spd_solve(matrix * float("nan"), right)


def test_null_space_rules():
    values = torch.tensor([0.001, 0.01, 0.03, 1.0, 3.0], dtype=torch.float64)
    basis = torch.linalg.qr(random(5, 5))[0]
    moment = basis @ values.diag() @ basis.T
    for rule, threshold, count in [
        (NullSpaceRule.ABSOLUTE, 0.02, 2),
        (NullSpaceRule.MEAN, 0.05, 3),
        (NullSpaceRule.QUANTILE, 0.6, 3),
    ]:
        found = null_space(moment, rule, threshold)
        torch.testing.assert_close(found @ found.T, basis[:, :count] @ basis[:, :count].T)
        scaled = null_space(moment * 100, rule, threshold) if rule is not NullSpaceRule.ABSOLUTE else found
        assert scaled.shape == found.shape, f"{rule} must not depend on scale"
    with pytest.raises(SphereEditError, match="raise the threshold"):
        null_space(moment, NullSpaceRule.ABSOLUTE, 1e-9)


# --- hyperspherical energy ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [0, 1, 2])
def test_energy_is_its_definition_in_any_block_size(power):
    weight = random(23, 7)
    unit = unit_rows(weight)
    expected = 0.0
    for i in range(23):
        for j in range(23):
            if i != j:
                distance = float((unit[i] - unit[j]).norm())
                expected += -math.log(distance) if power == 0 else distance**-power
    for block in (1, 5, 23, 100):
        energy = hyperspherical_energy(weight, power, block)
        assert math.isclose(energy.total, expected, rel_tol=1e-9)
        assert math.isclose(energy.per_pair, expected / (23 * 22), rel_tol=1e-9)


@pytest.mark.parametrize(
    ("power", "antipodal", "orthogonal"), [(0, -math.log(2), -math.log(2) / 2), (1, 0.5, 0.5**0.5), (2, 0.25, 0.5)]
)
def test_energy_of_known_configurations(power, antipodal, orthogonal):
    pair = torch.tensor([[1.0, 0.0], [-3.0, 0.0]])
    assert math.isclose(hyperspherical_energy(pair, power).per_pair, antipodal, rel_tol=1e-9)
    assert math.isclose(hyperspherical_energy(torch.eye(6) * 2, power).per_pair, orthogonal, rel_tol=1e-9)


def test_energy_ignores_rotation_row_scale_and_zero_rows():
    weight = random(9, 5)
    rotation = torch.linalg.qr(random(5, 5, seed=1))[0]
    scale = random(9, 1, seed=2).abs() + 0.1
    reference = hyperspherical_energy(weight).total
    assert math.isclose(hyperspherical_energy(weight @ rotation).total, reference, rel_tol=1e-10)
    assert math.isclose(hyperspherical_energy(weight * scale).total, reference, rel_tol=1e-10)
    padded = hyperspherical_energy(torch.cat([weight, torch.zeros(2, 5)]))
    assert math.isclose(padded.total, reference, rel_tol=1e-10)
    assert padded.neurons == 9


def test_energy_of_coinciding_neurons_is_large_and_finite():
    energy = hyperspherical_energy(torch.ones(2, 4))
    assert 1e6 < energy.per_pair < 1e8
    with pytest.raises(ValueError, match="0, 1 or 2"):
        hyperspherical_energy(torch.eye(2), power=3)


# --- the authors' numbers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["eta0.5.alpha0.5", "eta0.5.alpha0.8", "eta0.8.alpha0.8", "eta0.3.alpha1.0", "eta0.95.alpha0.5"]
)
def test_projection_agrees_with_the_published_code(shared, name):
    tensors = load_file(shared / "reference" / "published.safetensors")
    ranks = json.loads((shared / "reference" / "published.json").read_text())
    eta, alpha = (float(part) for part in name.removeprefix("eta").split(".alpha"))
    sphere = Sphere(eta=eta, alpha=alpha)
    assert sphere.directions(tensors["projection.W"]).shape[1] == ranks[f"projection.rank.eta{eta:g}"]
    ours, theirs = sphere(tensors["projection.delta"], tensors["projection.W"]), tensors[f"projection.out.{name}"]
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5


@pytest.mark.parametrize("n", [1, 5, 40])
def test_growing_by_keys_equals_the_whole_solve(n):
    generator = torch.Generator().manual_seed(n)
    rows, keys = (torch.randn(12, k, generator=generator, dtype=torch.float64) for k in (30, n))
    base = rows @ rows.T
    grown = base + keys @ keys.T
    inverse = torch.linalg.inv(base)
    torch.testing.assert_close(grown_solution(inverse @ keys, keys), torch.linalg.solve(grown, keys))
    torch.testing.assert_close(grown_inverse(inverse, keys), torch.linalg.inv(grown))


def test_directions_of_a_large_matrix_in_its_own_precision_are_those_in_float64(monkeypatch):
    """What is projected differs by less than 1e-5, as for a matrix of Llama's width, and the basis is orthonormal."""
    generator = torch.Generator().manual_seed(0)
    for large, shape in ((linalg._LARGE, (2048, 2300)), (256, (300, 256))):
        monkeypatch.setattr(linalg, "_LARGE", large)
        weight = torch.randn(*shape, generator=generator) + torch.randn(
            shape[0], 64, generator=generator
        ) @ torch.randn(64, shape[1], generator=generator)
        delta = torch.randn(50, shape[1], generator=generator, dtype=torch.float64)
        sphere = Sphere(eta=0.5, alpha=0.5)
        basis = sphere.directions(weight)
        torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1], dtype=torch.float64), atol=1e-5, rtol=0)
        rows = weight.double() / weight.double().norm(dim=1, keepdim=True)
        values, vectors = right_eigenbasis(rows)
        exact = vectors[:, : principal_rank(values, 0.5)]
        assert basis.shape == exact.shape
        ours, theirs = (sphere.suppress(delta, directions) for directions in (basis, exact))
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-5
