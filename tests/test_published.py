"""The formulas against those of the authors' published implementation, on seeded matrices (`make_published.py`)."""

from __future__ import annotations

import pytest
import torch

from published import far, matrices, published
from sphere_edit import Sphere
from sphere_edit.editing.methods.alphaedit import AlphaEdit
from sphere_edit.editing.methods.base import LayerProblem, Statistics
from sphere_edit.editing.methods.memit import Memit
from sphere_edit.editing.methods.prune import Prune
from sphere_edit.editing.methods.rect import Rect
from sphere_edit.numerics.linalg import NullSpaceRule, null_space
from sphere_edit.numerics.update import DenseUpdate

NUMBERS = published("seeded")
MATRICES = {name: torch.tensor(value, dtype=torch.float32) for name, value in matrices().items()}


@pytest.mark.parametrize("given", NUMBERS["projection"], ids=lambda given: f"{given['eta']}-{given['alpha']}")
def test_projection(given):
    sphere = Sphere(eta=given["eta"], alpha=given["alpha"])
    assert sphere.directions(MATRICES["W"]).shape[1] == given["rank"]
    assert far(sphere(MATRICES["delta"], MATRICES["W"]), given) < 1e-4
    other = Sphere(eta=given["eta"], alpha=given["alpha"] - 0.02)
    assert far(other(MATRICES["delta"], MATRICES["W"]), given) > 1e-3, "the comparison would see another α"


def problem(statistics: Statistics) -> LayerProblem:
    return LayerProblem(MATRICES["W"], MATRICES["K"], MATRICES["R"], statistics)


def test_alphaedit():
    given = NUMBERS["alphaedit"]
    basis = null_space(MATRICES["cov"], NullSpaceRule.ABSOLUTE, given["threshold"])
    assert basis.shape[1] == given["dims"]
    statistics = Statistics(null_space=basis)
    method = AlphaEdit(l2=given["l2"])
    state = method.after_batch({}, {"keys": MATRICES["K_previous"]}, statistics)
    assert far(method.solve(problem(statistics), state).dense(), given) < 1e-4
    assert far(method.solve(problem(statistics), {}).dense(), given) > 1e-3, "nor would it miss the earlier keys"


@pytest.mark.parametrize("given", NUMBERS["memit"], ids=lambda given: str(given["weight"]))
def test_memit(given):
    update = Memit(second_moment_weight=given["weight"]).solve(problem(Statistics(second_moment=MATRICES["cov"])), {})
    assert far(update.dense(), given) < 1e-4


def test_rect():
    assert far(Rect().finish(DenseUpdate(MATRICES["delta"]), MATRICES["W"]).dense(), NUMBERS["rect"]) < 1e-6


def test_prune():
    weight, change = MATRICES["W"], 8 * MATRICES["delta"]
    assert far(Prune().deploy(weight, weight + change) - weight, NUMBERS["prune"]) < 1e-4
    assert far(change, NUMBERS["prune"]) > 1e-2, "something is restrained"
