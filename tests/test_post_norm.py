"""Several layers of models that normalise each MLP's output: what their norms say, and how near they come to what is wanted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import fact_records
from families import DEPTH, FAMILIES, INNER, WIDTH, tiny, tiny_tokenizer
from plain import clean_values
from sphere_edit.editing.keys import SubjectPrompts, SubjectReader, interleaved
from sphere_edit.editing.methods.memit import Memit
from sphere_edit.editing.problem import LayerProblem, Statistics
from sphere_edit.editing.sources import FromTargets, OptimisedTargets
from sphere_edit.editing.targets import TargetSettings
from sphere_edit.facts.prompts import Encoder
from sphere_edit.facts.readers import facts_from
from sphere_edit.models.forward import activations
from sphere_edit.models.loading import LoadedModel, prepare
from sphere_edit.models.norms import Norm, norm_after
from sphere_edit.models.tokens import TokenBatch
from sphere_edit.models.weights import EditedWeights

TEMPLATES = ["{}", "Here it is. {}", "They say that {}"]
FAMILIES_FOUND = ("olmo2", "exaone4", "glm4")  # by the probe
families = pytest.mark.parametrize("family", ["gemma2", "gemma3_text", *FAMILIES_FOUND])
FACTS = facts_from(fact_records(4)).facts


def model_of(family: str) -> LoadedModel:
    """A tiny model whose norms' weights are not all alike, as trained ones' are not."""
    if family in FAMILIES:
        loaded = tiny(family)
    else:
        torch.manual_seed(0)
        config, _ = FAMILIES["llama"]
        tokenizer = tiny_tokenizer()
        ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        size = {"vocab_size": len(tokenizer) + 16, "initializer_range": 0.2, "head_dim": 8}
        built = AutoConfig.for_model(family, **size, **ids, **config)
        loaded = prepare(AutoModelForCausalLM.from_config(built), tokenizer, family)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in loaded.model.named_parameters():
        if "norm" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return loaded


def edited(loaded: LoadedModel, layers: list[int]) -> EditedWeights:
    names = [loaded.architecture.module_name(layer, "down") for layer in layers]
    return EditedWeights(loaded.model, loaded.architecture, names)


def norm_of(loaded: LoadedModel, layer: int) -> Norm:
    norm = norm_after(loaded, loaded.architecture.module_name(layer, "down"))
    assert norm is not None
    return norm


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_norm_does_is_told_by_trying_it(family, dtype):
    loaded = model_of(family)
    for layer in range(DEPTH):
        module = norm_of(loaded, layer).module.to(dtype)
        weight = module.weight.double() + (1 if family.startswith("gemma") else 0)
        found = Norm.of(module, WIDTH, module.weight)
        torch.testing.assert_close(found.weight, weight, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6)


@pytest.mark.parametrize(
    "module", [nn.LayerNorm(WIDTH), nn.Identity(), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3), nn.Embedding(4, WIDTH)]
)
def test_other_modules_are_no_norms(module):
    assert Norm.of(module, WIDTH, torch.empty(0)) is None
    assert Norm.of(nn.RMSNorm(WIDTH), WIDTH, torch.empty(0)) is not None


@pytest.mark.parametrize("eps", [1e-6, 0.5])  # the second matters beside the numbers here
def test_the_change_brings_the_norm_nearest_to_what_is_wanted(eps):
    module = nn.RMSNorm(WIDTH, eps=eps, dtype=torch.float64)
    module.weight.data = torch.randn(WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    norm = Norm(module, module.weight.detach())
    generator = torch.Generator().manual_seed(1)
    given, other = (torch.randn(WIDTH, 6, dtype=torch.float64, generator=generator) for _ in range(2))
    other *= given.norm(dim=0) / other.norm(dim=0)

    def says(x: Tensor) -> Tensor:
        return module(x.T).T.detach()

    # what it says of another vector of the same length can be had, and is had
    change = norm.change(given, says(other) - says(given)).double()
    torch.testing.assert_close(given + change, other, atol=1e-5, rtol=1e-5)

    # of anything else, no vector of this length comes nearer
    wanted = 2 * torch.randn(WIDTH, 6, dtype=torch.float64, generator=generator)
    moved = given + norm.change(given, wanted).double()
    torch.testing.assert_close(moved.norm(dim=0), given.norm(dim=0), rtol=1e-5, atol=0)
    reached = (says(moved) - says(given) - wanted).norm(dim=0)
    for seed in range(200):
        noise = torch.randn(WIDTH, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        near = moved + 10.0 ** -(seed % 5) * noise
        near *= given.norm(dim=0) / near.norm(dim=0)
        assert bool(((says(near) - says(given) - wanted).norm(dim=0) >= reached - 1e-5).all())


@families
def test_one_layers_output_moves_to_the_nearest_point_that_it_can_reach(family):
    """Ridge → 0 with δ wanted at the layer's output: no other matrix would come nearer (the hit test, for a norm)."""
    loaded, layer = model_of(family), 1
    weights = edited(loaded, [layer])
    prompts = SubjectPrompts.of(FACTS, ["{}"], Encoder(loaded.tokenizer))
    reader = SubjectReader(loaded, prompts, weights.names, [layer], False, 256)
    before = clean_values(loaded, prompts, layer, 256)
    share = torch.randn(WIDTH, len(FACTS), generator=torch.Generator().manual_seed(0))
    keys, values = reader.keys_and_values(0)
    torch.testing.assert_close(values, before, atol=1e-4, rtol=1e-4)
    (given,) = reader._given
    write(weights, 0, keys, reader.residual(0, share))
    after = clean_values(loaded, prompts, layer, 256)

    norm = norm_of(loaded, layer)
    said = norm.module(given).T
    best = torch.full((len(FACTS),), float("inf"))
    point = torch.randn(64, *given.shape, generator=torch.Generator().manual_seed(1))
    for _ in range(500):  # descent on the sphere, from many starts
        point = (point / point.norm(dim=-1, keepdim=True) * given.norm(dim=-1, keepdim=True)).requires_grad_()
        distance = (norm.module(point) - said.T - share.T).norm(dim=-1)
        best = torch.minimum(best, distance.detach().amin(0))
        (slope,) = torch.autograd.grad(distance.square().sum(), point)
        point = point.detach() - 0.02 * given.square().mean(-1, keepdim=True) * slope
    reached = (after - before - share).norm(dim=0)
    assert bool((reached <= best * (1 + 1e-3)).all())
    assert bool((reached < 0.95 * share.norm(dim=0)).all()), "it comes nearer"


def write(weights: EditedWeights, index: int, keys: Tensor, residual: Tensor) -> None:
    name = weights.names[index]
    problem = LayerProblem(weights.working[name], keys, residual, Statistics(second_moment=torch.eye(INNER)))
    weights.add(name, Memit(second_moment_weight=1e-9).solve(problem, {}))


@families
def test_what_is_left_of_a_target_falls_from_layer_to_layer(family):
    loaded, layers = model_of(family), [0, 1, 2]
    weights = edited(loaded, layers)
    source = OptimisedTargets(loaded, weights, layers, ["{}"], FromTargets(), TargetSettings(lr=0.05, steps=6), 256)
    source.begin(FACTS)
    prompts = SubjectPrompts.of(FACTS, ["{}"], Encoder(loaded.tokenizer))
    start = clean_values(loaded, prompts, layers[-1], 256)
    torch.testing.assert_close(source.targets.values, start + source.targets.deltas, atol=1e-4, rtol=1e-4)
    left = [float(source.targets.deltas.norm())]
    for index in range(len(layers)):
        write(weights, index, *source.layer(index))
        now = clean_values(loaded, prompts, layers[-1], 256)
        left.append(float((source.targets.values - now).norm()))
    assert left == sorted(left, reverse=True), left
    assert left[-1] < 0.7 * left[0], left


def test_each_context_is_asked_for_the_share_at_what_its_norm_is_given():
    loaded, layers = model_of("gemma2"), [0, 2]
    names = edited(loaded, layers).names
    prompts = SubjectPrompts.of(FACTS, TEMPLATES, Encoder(loaded.tokenizer))
    norm = norm_of(loaded, layers[0])
    given = []
    for row in prompts.rows:
        (seen,), _ = activations(loaded, TokenBatch.of([row], loaded.device), [norm.module])
        given.append(seen[0, -1].float())
    given = torch.stack(given).view(len(FACTS), len(TEMPLATES), WIDTH)
    share = torch.randn(WIDTH, len(FACTS), generator=torch.Generator().manual_seed(0))
    each = torch.stack([norm.change(given[:, number].T, share).T for number in range(len(TEMPLATES))], dim=1)
    clean, others = each[:, 0], each[:, 1:]

    mean = SubjectReader(loaded, prompts, names, layers, False, 64)
    mean.keys_and_values(0)
    torch.testing.assert_close(mean.residual(0, share), (clean + others.mean(1)).T / 2, atol=1e-4, rtol=1e-4)

    apart = SubjectReader(loaded, prompts, names, layers, False, 64, "each")
    apart.keys_and_values(0)
    wanted = interleaved(share.T, share.T.repeat_interleave(len(TEMPLATES) - 1, 0)).T
    expected = interleaved(clean, others.flatten(0, 1)).T
    torch.testing.assert_close(apart.residual(0, wanted), expected, atol=1e-4, rtol=1e-4)
