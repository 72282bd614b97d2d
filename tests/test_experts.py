"""A layer of experts as one wide matrix: every formula by blocks against the explicit ``[d_out, E · d_in]`` problem, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from sphere_edit import Sphere
from sphere_edit.editing.ingredients import DominantVectors
from sphere_edit.editing.memory import in_metric
from sphere_edit.editing.methods import METHODS, make_method
from sphere_edit.editing.problem import LayerProblem, Statistics
from sphere_edit.numerics.energy import (
    KeyMetric,
    collateral_ratio,
    energy_bounds,
    energy_gradient,
    hyperspherical_energy,
)
from sphere_edit.numerics.experts import by_expert, inputs_of, times, wide, width
from sphere_edit.numerics.linalg import NullSpaceRule, null_space, spd_factor
from sphere_edit.numerics.projection import rank_of
from sphere_edit.numerics.update import DenseUpdate, LowRankUpdate, joined

EXPERTS, D_OUT, D_IN, FACTS = 5, 7, 12, 4


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def joint_keys(count: int, seed: int) -> Tensor:
    """Keys of tokens that are routed to two of the experts each, with weights that add up to 1."""
    keys = torch.zeros(EXPERTS, D_IN, count, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    for token in range(count):
        chosen = torch.randperm(EXPERTS, generator=generator)[:2]
        share = 0.2 + 0.6 * float(torch.rand(1, generator=generator))
        for expert, weight in zip(chosen.tolist(), (share, 1 - share), strict=True):
            keys[expert, :, token] = weight * random(D_IN, seed=1000 * seed + 10 * token + expert)
    return keys.flatten(0, 1)


@dataclass
class Pair:
    """One problem twice: with blocks, and as an ordinary matrix whose C0 happens to be block-diagonal."""

    blocks: Statistics
    dense: Statistics
    weight: Tensor

    def problem(self, statistics: Statistics, seed: int, **given: Tensor) -> LayerProblem:
        return LayerProblem(
            wide(self.weight), joint_keys(FACTS, seed), random(D_OUT, FACTS, seed=seed), statistics, given
        )


@pytest.fixture(params=[rule.value for rule in NullSpaceRule])
def pair(request: pytest.FixtureRequest) -> Pair:
    root = random(EXPERTS, D_IN, 3 * D_IN, seed=1) * torch.logspace(-2, 0.5, D_IN, dtype=torch.float64)[:, None]
    root *= torch.linspace(0.2, 2, EXPERTS, dtype=torch.float64)[:, None, None]  # some experts see more than others
    moment = root @ root.mT / (3 * D_IN)
    whole = torch.block_diag(*moment)
    rule, threshold = NullSpaceRule(request.param), {"mean": 0.1, "quantile": 0.6, "absolute": 0.05}[request.param]
    blocks = Statistics(second_moment=moment, null_space=null_space(moment, rule, threshold))
    dense = Statistics(second_moment=whole, null_space=null_space(whole, rule, threshold))
    return Pair(blocks, dense, random(EXPERTS, D_OUT, D_IN, seed=2))


def test_views_of_a_layer_of_experts_come_back_and_multiply_alike():
    weight, keys = random(EXPERTS, D_OUT, D_IN, seed=3), joint_keys(FACTS, 4)
    torch.testing.assert_close(by_expert(wide(weight), EXPERTS), weight, atol=0, rtol=0)
    torch.testing.assert_close(wide(weight), torch.cat(list(weight), dim=1), atol=0, rtol=0)
    blocks = random(EXPERTS, 3, D_IN, seed=5)
    torch.testing.assert_close(times(blocks, keys), torch.block_diag(*blocks) @ keys)
    assert inputs_of(weight) == inputs_of(wide(weight)) == width(blocks.mT) == EXPERTS * D_IN


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("memit", {"second_moment_weight": 3.0}),
        ("memit_seq", {"second_moment_weight": 3.0}),
        ("frugal", {"second_moment_weight": 0.1}),
        ("alphaedit", {"l2": 0.7}),
        ("encore", {"ridge": 0.7, "second_moment_weight": 3.0}),
        ("emmet", {}),
        ("emmet", {"second_moment": False, "ridge": 0.3}),
        ("rome", {}),
        ("revive", {"l2": 0.7}),
        ("ultraedit", {}),
    ],
)
def test_methods_are_their_formulas_on_the_wide_matrix_over_three_batches_and_a_forgotten_fact(pair, name, options):
    method = make_method(name, options)
    given: dict[str, Tensor] = {}
    if name == "revive":
        given = dict(DominantVectors(0.2).of_matrix(wide(pair.weight)))
    states: list[dict[str, Tensor]] = [{}, {}]
    for batch in range(3):
        updates = []
        for index, statistics in enumerate((pair.blocks, pair.dense)):
            if name == "frugal":
                given = {"context_tokens": joint_keys(6, 40 + batch)}
            problem = pair.problem(statistics, 20 + batch, **given)
            updates.append(method.solve(problem, states[index]).dense())
            seen = {"keys": problem.keys, "residual": problem.residual, "bystanders": given.get("context_tokens")}
            told = {part: value for part, value in seen.items() if value is not None}
            states[index] = method.after_batch(states[index], told, statistics)
            if batch == 1 and method.forgets:
                states[index] = method.forget(states[index], problem.keys[:, 1:2], statistics)
        blocks, explicit = updates
        assert float(explicit.norm()) > 1e-6
        torch.testing.assert_close(blocks, explicit, rtol=1e-7, atol=1e-9 * float(explicit.norm()))
    gradient = random(EXPERTS, D_OUT, D_IN, seed=50)
    metrics = [method.metric(state, known) for state, known in zip(states, (pair.blocks, pair.dense), strict=True)]
    if metrics[0] is not None:
        torch.testing.assert_close(wide(in_metric(gradient, metrics[0])), in_metric(wide(gradient), metrics[1]))


def test_a_memory_of_experts_holds_of_each_key_the_experts_it_is_routed_to(pair):
    method = make_method("memit_seq", {})
    state = method.after_batch({}, {"keys": joint_keys(FACTS, 1)}, pair.blocks)
    assert state["values"].shape == (2 * FACTS, D_IN)
    assert max(part.numel() for part in state.values()) == EXPERTS * D_IN**2


def test_a_key_that_was_never_remembered_cannot_be_forgotten(pair):
    method = make_method("memit_seq", {})
    state = method.after_batch({}, {"keys": joint_keys(FACTS, 1)}, pair.blocks)
    with pytest.raises(ValueError, match="never remembered"):
        method.forget(state, joint_keys(1, 2), pair.blocks)


def test_what_a_method_cannot_do_for_experts_is_said_of_it():
    assert [name for name, method in METHODS.items() if not method.by_experts] == ["lyaplock"]


def test_sphere_takes_each_experts_own_directions_out_of_the_wide_update(pair):
    sphere = Sphere(eta=0.5, alpha=0.8)
    directions = sphere.directions(pair.weight)
    own = [sphere.directions(expert) for expert in pair.weight]
    explicit = torch.block_diag(*own)
    assert len({one.shape[1] for one in own}) > 1  # so that some have columns of zeros
    assert rank_of(directions) == explicit.shape[1]
    update = LowRankUpdate(random(D_OUT, FACTS, seed=6), random(FACTS, EXPERTS * D_IN, seed=7))
    whole = update.dense()
    expected = whole - 0.8 * (whole @ explicit) @ explicit.T
    for given in (update.by_expert(EXPERTS), DenseUpdate(by_expert(whole, EXPERTS))):
        torch.testing.assert_close(wide(sphere(given, pair.weight).dense()), expected)
        torch.testing.assert_close(float(given.times(directions).norm()), float((whole @ explicit).norm()))
    torch.testing.assert_close(wide(sphere(by_expert(whole, EXPERTS), pair.weight)), expected)


def test_updates_by_expert_are_those_of_the_wide_matrix():
    weight = random(EXPERTS, D_OUT, D_IN, seed=8)
    one = LowRankUpdate(random(D_OUT, FACTS, seed=9), random(FACTS, EXPERTS * D_IN, seed=10))
    two = LowRankUpdate(random(D_OUT, 2, seed=11), random(2, EXPERTS * D_IN, seed=12))
    both = joined([one.by_expert(EXPERTS), two.by_expert(EXPERTS)])
    explicit = one.dense() + two.dense()
    torch.testing.assert_close(wide(both.dense()), explicit)
    torch.testing.assert_close(both.wide().dense(), explicit)
    torch.testing.assert_close(wide(both.added_to(weight)), wide(weight) + explicit)
    assert both.norm() == pytest.approx(float(explicit.norm()))
    shares = [both.share([0, 5]), both.share([1, 2, 3, 4])]
    torch.testing.assert_close(wide(shares[0].dense() + shares[1].dense()), explicit)
    assert float(shares[0].norm()) > 0
    assert DenseUpdate(both.dense()).wide().norm() == pytest.approx(float(explicit.norm()))


def test_energy_is_the_sum_over_experts_and_its_bounds_hold(pair):
    energies = [hyperspherical_energy(expert) for expert in pair.weight]
    together = hyperspherical_energy(pair.weight)
    assert together.total == pytest.approx(sum(one.total for one in energies))
    assert together.per_pair == pytest.approx(sum(one.per_pair for one in energies) / EXPERTS)
    step = 1e-6 * random(EXPERTS, D_OUT, D_IN, seed=13)
    gradient = energy_gradient(pair.weight)
    change = hyperspherical_energy(pair.weight + step).total - together.total
    assert change == pytest.approx(float((gradient * step).sum()), rel=1e-3)
    moment, whole = pair.blocks["second_moment"], pair.dense["second_moment"]
    bounds = energy_bounds(gradient, step, KeyMetric.of(moment))
    explicit = energy_bounds(wide(gradient), wide(step), KeyMetric.of(whole))
    for name, value in vars(explicit).items():
        assert getattr(bounds, name) == pytest.approx(value), name
    assert collateral_ratio(step, pair.weight, moment) == pytest.approx(
        collateral_ratio(wide(step), wide(pair.weight), whole)
    )


def test_an_expert_without_any_token_does_not_spoil_the_others():
    moment = torch.stack([torch.eye(D_IN, dtype=torch.float64), torch.zeros(D_IN, D_IN, dtype=torch.float64)])
    assert bool(spd_factor(moment).isfinite().all())
    torch.testing.assert_close(spd_factor(moment)[0], spd_factor(torch.block_diag(*moment))[:D_IN, :D_IN])
