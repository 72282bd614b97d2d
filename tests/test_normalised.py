"""The nearest normalised vectors against their definition, brute force, and what a norm says."""

from __future__ import annotations

import pytest
import torch

from sphere_edit.numerics.normalised import nearest_normalised


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def distance(weight: torch.Tensor, u: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return (weight[:, None] * u - wanted).norm(dim=0)


def descended(weight: torch.Tensor, wanted: torch.Tensor, length: torch.Tensor, starts: int = 40) -> torch.Tensor:
    """The least distance that projected gradient descent finds from many starts, column by column."""
    many, lengths = wanted.repeat(1, starts), length.repeat(starts)
    u = random(*many.shape)
    for _ in range(1000):
        u = u * (lengths / u.norm(dim=0))
        u = u - 0.4 / weight.square().max() * weight[:, None] * (weight[:, None] * u - many)
    found = distance(weight, u * (lengths / u.norm(dim=0)), many)
    return found.view(starts, -1).amin(0)


@pytest.mark.parametrize("size", [0.1, 1.0, 30.0])
def test_no_descent_on_the_sphere_comes_nearer(size):
    weight, wanted = 1 + 0.5 * random(5, seed=1), size * random(5, 8, seed=2)
    length = random(8, seed=3).abs() + 0.2
    u = nearest_normalised(weight, wanted, length)
    torch.testing.assert_close(u.norm(dim=0), length)
    found, best = distance(weight, u, wanted), descended(weight, wanted, length)
    assert bool((found <= best + 1e-9).all())
    torch.testing.assert_close(found, best, atol=1e-5, rtol=1e-5)  # and descent gets there


@pytest.mark.parametrize("width", [2, 64, 640])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_it_solves_its_equation_with_the_one_multiplier_of_the_least_distance(width, size):
    """``(w² + μ) u = w y`` with μ ≥ −min w²: no other stationary point of the sphere has such a μ."""
    weight, wanted = 3 * random(width, seed=1), size * random(width, 20, seed=2)
    length = width**0.5 * (random(20, seed=3).abs() + 0.1)
    u = nearest_normalised(weight, wanted, length)
    torch.testing.assert_close(u.norm(dim=0), length, rtol=1e-12, atol=0)
    b, squares = weight[:, None] * wanted, weight.square()[:, None]
    multiplier = ((b - squares * u) * u).sum(0) / length.square()
    scale = (squares * u).norm(dim=0) + b.norm(dim=0)
    assert float((((squares + multiplier) * u - b).norm(dim=0) / scale).max()) < 1e-12
    assert bool((multiplier + weight.square().min() >= -1e-9 * weight.square().max()).all())


def test_equal_weights_give_the_wanted_direction():
    wanted = random(6, 4)
    u = nearest_normalised(torch.full((6,), 2.0), wanted, torch.full((4,), 3.0))
    torch.testing.assert_close(u, 3 * wanted / wanted.norm(dim=0))


def test_what_can_be_said_is_said():
    """A wanted vector that the norm can say is met to rounding, with weights of either sign."""
    weight, u = random(9, seed=1), random(9, 5, seed=2)
    found = nearest_normalised(weight, weight[:, None] * u, u.norm(dim=0))
    torch.testing.assert_close(found, u, rtol=1e-8, atol=1e-8)


def test_nothing_wanted_along_the_smallest_weight_leaves_it_the_rest_of_the_length():
    """No μ above −min w² gives the length here (the hard case): any other split of it is farther."""
    weight, wanted = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([[0.0], [0.5], [0.5]]).double()
    u = nearest_normalised(weight, wanted, torch.tensor([2.0]))
    torch.testing.assert_close(u[1:, 0], torch.tensor([1 / 3, 3 / 16], dtype=torch.float64))
    assert float(u[0, 0]) > 0
    assert float(distance(weight, u, wanted)) <= float(descended(weight, wanted, torch.tensor([2.0]).double())) + 1e-9
    nothing = nearest_normalised(torch.tensor([0.0, 1.0]), torch.zeros(2, 1), torch.tensor([3.0]))
    torch.testing.assert_close(nothing, torch.tensor([[3.0], [0.0]], dtype=torch.float64))
