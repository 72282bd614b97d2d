"""Changes cut to a rank and shared out: each part against its definition, in float64."""

from __future__ import annotations

from itertools import chain, product

import pytest
import torch
from torch import Tensor

from sphere_edit.numerics.lowrank import Shared, holders

NAMES = ("low", "middle", "high")


def random_group(facts: int, rows_each: int = 1, width: int = 20, seed: int = 0) -> tuple[dict[str, Tensor], ...]:
    """Changes that write the same targets, a part each, as an edit's layers do; their keys; and ordinary inputs' moments."""
    torch.manual_seed(seed)
    targets = torch.randn(width, facts, dtype=torch.float64) * torch.logspace(0, 1, facts, dtype=torch.float64)
    changes, keys, ordinary = {}, {}, {}
    for number, name in enumerate(NAMES):
        d_in = 60 + number
        inputs = torch.randn(2 * d_in, d_in, dtype=torch.float64)
        ordinary[name] = inputs.T @ inputs / len(inputs)
        subjects = 6 * torch.randn(facts, d_in, dtype=torch.float64)
        solved = torch.linalg.solve(ordinary[name] + subjects.T @ subjects, subjects.T)
        changes[name] = (number + 1) / 6 * targets @ solved.T
        rows = subjects.repeat_interleave(rows_each, 0)
        keys[name] = (rows + 0.1 * torch.randn_like(rows)).float()
    return changes, keys, ordinary


def rest(factors: dict[str, tuple[Tensor, Tensor]], changes: dict[str, Tensor], keys: dict[str, Tensor]) -> Tensor:
    """How much of the whole effect on every row is missing, relative."""
    wanted = torch.stack([keys[name].double() @ changes[name].T for name in NAMES]).sum(0)
    found = torch.stack([keys[name].double() @ (b.double() @ a.double()).T for name, (b, a) in factors.items()]).sum(0)
    return (found - wanted).norm(dim=1) / wanted.norm(dim=1)


def test_at_full_rank_every_product_is_the_change():
    changes, keys, ordinary = random_group(12)
    group = Shared(changes, keys, ordinary)
    assert group.largest == 20
    for rank in (20, 25):
        for name, (b, a) in group.factors(rank).items():
            assert (b.shape, a.shape) == ((20, rank), (rank, changes[name].shape[1]))
            torch.testing.assert_close(b.double() @ a.double(), changes[name], rtol=1e-4, atol=1e-6)


def test_what_others_no_longer_write_is_taken_over_by_weighted_least_squares():
    """The definition, direction by direction, and a gradient of zero; the moment of directions likewise."""
    changes, keys, ordinary = random_group(12, rows_each=2)
    group = Shared(changes, keys, ordinary)
    effects = {name: keys[name].double() @ changes[name].T for name in NAMES}
    total = effects["low"] + effects["middle"] + effects["high"]
    sizes = total.norm(dim=1) ** 2
    moment = torch.stack([torch.outer(row, row) / row.dot(row) for row in total]).mean(0)
    moment += sum(changes[name] @ ordinary[name] @ changes[name].T for name in NAMES) / sizes.mean()
    v = group.directions
    torch.testing.assert_close(v @ torch.diag(group.strengths) @ v.T, moment, rtol=1e-9, atol=1e-9)
    counts, factors = holders(group.strengths, 3, 4), group.factors(4)
    held = {name: (v.T.float() @ b).argmax(0).tolist() for name, (b, _) in factors.items()}
    assert sorted(chain(*held.values())) == sorted(j for j, m in enumerate(counts.tolist()) for _ in range(m))
    weights = (1 / sizes) / (1 / sizes).sum()
    for name, (b, a) in factors.items():
        assert len(set(held[name])) == 4, "no direction twice in one matrix"
        handed = torch.zeros(len(total), 4, dtype=torch.float64)
        for column, j in enumerate(held[name]):
            for other in NAMES:
                if j not in held[other]:
                    handed[:, column] += effects[other] @ v[:, j] / counts[j]
        assert float(handed.norm()) > 0.1
        taken = (a.double() - b.double().T @ changes[name]).requires_grad_()
        missed = keys[name].double() @ taken.T - handed
        loss = (weights * missed.square().sum(1)).sum()
        loss = loss + 0.5 * torch.trace(taken @ ordinary[name] @ taken.T)
        (gradient,) = torch.autograd.grad(loss, taken)
        pull = (weights[:, None] * handed).T @ keys[name].double()
        assert float(gradient.norm()) < 1e-5 * float(pull.norm())


def test_places_go_where_they_cost_least():
    torch.manual_seed(1)
    costs = {0: 5.0, 1: 1.0, 2: 1 / 2, 3: 1 / 3}
    for rank in (1, 2, 3, 4):
        strengths = torch.rand(4, dtype=torch.float64).sort(descending=True).values ** 4
        found = holders(strengths, 3, rank)
        assert int(found.sum()) == 3 * rank

        def cost(counts, strengths=strengths) -> float:
            return sum(float(s) * costs[int(m)] for s, m in zip(strengths, counts, strict=True))

        least = min(cost(counts) for counts in product(range(4), repeat=4) if sum(counts) == 3 * rank)
        assert cost(found) == pytest.approx(least, rel=1e-12)


def test_together_they_keep_more_facts_than_one_has_directions_and_each_alone_does_not():
    changes, keys, ordinary = random_group(12, rows_each=3)
    shared = Shared(changes, keys, ordinary).factors(4)
    alone = {name: Shared({name: changes[name]}, keys, ordinary).factors(4)[name] for name in NAMES}
    assert float(rest(shared, changes, keys).median()) < 0.2
    assert float(rest(alone, changes, keys).median()) > 0.4


def test_one_matrix_by_itself_keeps_its_strongest_directions():
    changes, keys, ordinary = random_group(12)
    group = Shared({"low": changes["low"]}, keys, ordinary)
    b, a = group.factors(4)["low"]
    kept = group.directions[:, :4]
    torch.testing.assert_close(b.double() @ a.double(), kept @ kept.T @ changes["low"], rtol=1e-4, atol=1e-6)


def test_without_second_moments_all_inputs_are_ordinary():
    changes, keys, _ = random_group(12)
    unknown = Shared(changes, keys, dict.fromkeys(NAMES))
    alike = {name: keys[name].double().square().mean() * torch.eye(keys[name].shape[1]).double() for name in NAMES}
    for name, (b, a) in Shared(changes, keys, alike).factors(4).items():
        torch.testing.assert_close(unknown.factors(4)[name][0] @ unknown.factors(4)[name][1], b @ a)
