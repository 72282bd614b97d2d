"""Hyperspherical energy: gradient, theorems and the measures beside it, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sphere_edit import hyperspherical_energy
from sphere_edit.numerics.energy import KeyMetric, collateral_ratio, effective_rank, energy_bounds, energy_gradient


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def defined(weight: torch.Tensor, power: int) -> torch.Tensor:
    """The energy by its definition, differentiable."""
    rows = weight / weight.norm(dim=1, keepdim=True)
    distances = (rows[:, None] - rows[None]).square().sum(-1)[~torch.eye(len(rows), dtype=torch.bool)].sqrt()
    return (-distances.log() if power == 0 else distances**-power).sum()


@pytest.mark.parametrize("power", [0, 1, 2])
@pytest.mark.parametrize("block", [4, 7, 1024])
def test_gradient_is_autograds_of_the_definition(power, block):
    weight = random(13, 6) * torch.linspace(0.1, 5, 13, dtype=torch.float64)[:, None]
    leaf = weight.clone().requires_grad_()
    (expected,) = torch.autograd.grad(defined(leaf, power), leaf)
    found = energy_gradient(weight, power, block)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert float((found * weight).sum(1).abs().max()) < 1e-9, "the length of a neuron does not matter"


@pytest.mark.parametrize("power", [0, 1, 2])
def test_zero_and_coinciding_neurons_leave_the_gradient_finite(power):
    weight = torch.cat([random(5, 4), torch.zeros(1, 4, dtype=torch.float64), 3 * random(1, 4, seed=9)])
    twice = torch.cat([weight, weight[-1:] * 2])
    gradient = energy_gradient(twice, power)
    assert bool(torch.isfinite(gradient).all())
    assert float(gradient[5].norm()) == 0
    # the twin pulls as any other pair does, but not on its twin
    others = torch.cat([weight[:5], weight[-1:]]).clone().requires_grad_()
    rows = others / others.norm(dim=1, keepdim=True)
    distance = (rows[:5] - rows[5]).norm(dim=1)
    one = 2 * (-distance.log() if power == 0 else distance**-power).sum()
    (expected,) = torch.autograd.grad(one, others)
    torch.testing.assert_close(gradient[6], expected[5], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("power", [0, 1, 2])
def test_energy_of_a_simplex(power):
    """n + 1 neurons as far apart as they can be: cosine −1/n, and a stationary point."""
    n = 5
    simplex = torch.eye(n + 1, dtype=torch.float64) - 1 / (n + 1)
    distance = math.sqrt(2 + 2 / n)
    expected = -math.log(distance) if power == 0 else distance**-power
    assert math.isclose(hyperspherical_energy(simplex, power).per_pair, expected, rel_tol=1e-12)
    assert float(energy_gradient(simplex, power).norm()) < 1e-9


@given(seed=st.integers(0, 10**6), rows=st.integers(2, 9), columns=st.integers(3, 9), power=st.sampled_from([0, 1, 2]))
@settings(max_examples=40, deadline=None)
def test_a_small_update_changes_the_energy_by_its_first_order_and_no_more_than_theorem_2_allows(
    seed, rows, columns, power
):
    weight, delta = random(rows, columns, seed=seed), random(rows, columns, seed=seed + 1)
    gradient = energy_gradient(weight, power)
    bounds = energy_bounds(gradient, delta)
    assert abs(bounds.first_order) <= bounds.largest_change * (1 + 1e-12)
    rows_of = weight / weight.norm(dim=1, keepdim=True)
    assume(float(torch.pdist(rows_of).min()) > 0.1)  # nearer pairs curve too sharply for a difference quotient
    step = 1e-5
    up, down = (hyperspherical_energy(weight + sign * step * delta, power).total for sign in (1, -1))
    assert abs((up - down) / (2 * step) - bounds.first_order) <= 1e-4 * bounds.largest_change


def test_theorem_2_is_tight_along_the_gradient():
    gradient = energy_gradient(random(8, 5))
    bounds = energy_bounds(gradient, 0.01 * gradient)
    assert math.isclose(bounds.first_order, bounds.largest_change, rel_tol=1e-12)


def test_theorem_1_holds_for_inputs_that_span_and_fails_for_fewer():
    weight, delta = random(8, 5), random(8, 5, seed=1)
    gradient = energy_gradient(weight)
    inputs = torch.linalg.qr(random(5, 5, seed=2)).Q
    bounds = energy_bounds(gradient, delta)
    assert float((delta @ inputs).norm()) >= bounds.least_forgetting
    assert math.isclose(float((gradient @ inputs).norm()), energy_bounds(gradient, gradient).least_forgetting)
    # two inputs of five: an update orthogonal to them forgets nothing of them and changes the energy all the same
    few = inputs[:, :2]
    hidden = gradient - gradient @ few @ few.T
    assert float((hidden @ few).norm()) < 1e-9
    assert energy_bounds(gradient, hidden).least_forgetting > 1
    step = 1e-7
    moved = hyperspherical_energy(weight + step * hidden).total - hyperspherical_energy(weight).total
    assert moved / step == pytest.approx(float((gradient * hidden).sum()), rel=1e-3)


def test_theorem_1_for_real_keys_holds_and_is_tight():
    gradient = energy_gradient(random(8, 5))
    keys = random(5, 200, seed=3) * torch.tensor([9.0, 3, 1, 0.3, 0.1], dtype=torch.float64)[:, None]
    moment = keys @ keys.T / 200
    c = moment + 0.01 * moment.diagonal().mean() * torch.eye(5, dtype=torch.float64)
    for seed in range(20):
        delta = random(8, 5, seed=seed)
        bounds = energy_bounds(gradient, delta, KeyMetric.of(moment))
        assert bounds.response == pytest.approx(float((delta @ torch.linalg.cholesky(c)).norm()))
        assert bounds.least_response <= bounds.response
    tight = energy_bounds(gradient, gradient @ torch.linalg.inv(c), KeyMetric.of(moment))
    assert tight.least_response == pytest.approx(tight.response)


def test_collateral_ratio_is_the_mean_squared_change_of_outputs_over_keys():
    weight, delta, keys = random(4, 6), 0.1 * random(4, 6, seed=1), random(6, 50, seed=2)
    ratio = collateral_ratio(delta, weight, keys @ keys.T / 50)
    assert ratio == pytest.approx(float((delta @ keys).square().mean() / (weight @ keys).square().mean()))


def test_effective_rank_counts_equal_directions():
    assert effective_rank(torch.tensor([3.0, 3, 3, 0])) == pytest.approx(3)
    assert 1 < effective_rank(torch.tensor([100.0, 1, 1])) < 1.2
