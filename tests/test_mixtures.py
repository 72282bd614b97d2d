"""Mixtures of experts: joint keys, second moments by expert, weights, and the hit test."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from conftest import fact_records
from mixtures import FEW, MIXTURES, TRANSPOSED, save_mixture, tiny_mixture
from sphere_edit.editing.keys import SubjectPrompts, SubjectReader
from sphere_edit.editing.losses import FromGradients, TargetGradients
from sphere_edit.editing.methods.memit import Memit
from sphere_edit.editing.moments import _products, _Sums, second_moments
from sphere_edit.editing.problem import LayerProblem, Statistics
from sphere_edit.editing.sources import FromTargets, OptimisedTargets
from sphere_edit.editing.targets import TargetSettings
from sphere_edit.errors import SphereEditError
from sphere_edit.exports import delta
from sphere_edit.facts.prompts import Encoder
from sphere_edit.facts.readers import facts_from
from sphere_edit.models.architecture import Matrix
from sphere_edit.models.experts import JointKeys, why_not
from sphere_edit.models.forward import Graph, activations
from sphere_edit.models.loading import LoadedModel, cast_copy, load_model
from sphere_edit.models.replica import Replica
from sphere_edit.models.sites import module_of, parameter_of
from sphere_edit.models.source import stored_tensors
from sphere_edit.models.tokens import TokenBatch
from sphere_edit.models.weights import EditedWeights
from sphere_edit.numerics.experts import by_expert, experts_of, wide
from sphere_edit.numerics.update import LowRankUpdate
from sphere_edit.progress import Quiet

LAYER = 2

mixtures = pytest.mark.parametrize(
    "family", [family if family in FEW else pytest.param(family, marks=pytest.mark.slow) for family in MIXTURES]
)
few = pytest.mark.parametrize("family", FEW)


def name_of(loaded: LoadedModel, layer: int = LAYER) -> str:
    return loaded.architecture.module_name(layer, "experts")


def weights_of(loaded: LoadedModel, *layers: int) -> EditedWeights:
    return EditedWeights(loaded.model, loaded.architecture, [name_of(loaded, layer) for layer in layers or (LAYER,)])


def rows(loaded: LoadedModel, count: int = 4) -> list[list[int]]:
    return [Encoder(loaded.tokenizer).encode(fact.filled_prompt).ids for fact in facts_from(fact_records(count)).facts]


def experts_output(loaded: LoadedModel, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """What all experts say together at each token ``[B · S, d]``, and the part of it that is their biases."""
    module = module_of(loaded.model, loaded.architecture, name_of(loaded))
    seen = {}

    def look(module, args, output):
        seen.update(args=args, output=output.clone())

    hook = module.register_forward_hook(look)
    loaded.model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
    hook.remove()
    output, tokens = seen["output"], batch.ids.numel()
    bias = torch.zeros(())
    if hasattr(module, "down_proj_bias"):
        _, numbers, weights = seen["args"]
        bias = (module.down_proj_bias[numbers] * weights[..., None]).sum(1)
    return output.view(-1, tokens, output.shape[-1]).sum(0), bias


@mixtures
def test_the_probe_finds_the_experts(family):
    _, block, shared = MIXTURES[family]
    architecture = tiny_mixture(family).architecture
    expected = Matrix(f"{block}.experts.down_proj", family in TRANSPOSED, True)
    found = architecture.matrix(LAYER, "experts")
    assert (found.path, found.transposed, found.experts) == (expected.path, expected.transposed, True)
    assert ("down" in architecture.parts[LAYER].matrices) == (shared is not None)


@mixtures
def test_the_wide_matrix_times_the_joint_key_is_what_the_experts_say(family):
    loaded = tiny_mixture(family)
    batch = TokenBatch.of(rows(loaded), loaded.device)
    ((keys,), _) = activations(loaded, batch, [module_of(loaded.model, loaded.architecture, name_of(loaded))])
    assert isinstance(keys, JointKeys)
    output, bias = experts_output(loaded, batch)
    weight = wide(weights_of(loaded).original(name_of(loaded)))
    everywhere = torch.ones_like(batch.mask, dtype=torch.bool)
    said = keys[everywhere] @ weight.T + bias
    assert float((said - output).norm() / output.norm()) < 1e-6
    routed = keys.routes(everywhere).sum(-1).unique().tolist()
    assert routed == [MIXTURES[family][0]["num_experts_per_tok"]]


def test_joint_keys_are_indexed_as_a_tensor_is():
    loaded = tiny_mixture("qwen3_moe")
    batch = TokenBatch.of(rows(loaded), loaded.device)
    ((keys,), _) = activations(loaded, batch, [module_of(loaded.model, loaded.architecture, name_of(loaded))])
    whole = keys[torch.ones_like(batch.mask, dtype=torch.bool)].view(*batch.ids.shape, -1)
    torch.testing.assert_close(keys[1, :3], whole[1, :3], atol=1e-6, rtol=1e-5)
    last = (torch.arange(len(batch.ids)), batch.mask.sum(1) - 1)
    torch.testing.assert_close(keys[last], whole[last], atol=1e-6, rtol=1e-5)
    assert keys[1, 3:3].shape == whole[1, 3:3].shape  # nothing stands after a subject that ends its prompt
    for expert, chosen, part in keys.by_expert((1, slice(0, 3))):
        torch.testing.assert_close(part, whole[1, :3].unflatten(1, (4, -1))[chosen, expert], atol=1e-6, rtol=1e-5)


@few
def test_views_of_the_weights(family):
    loaded = tiny_mixture(family)
    weights, name = weights_of(loaded), name_of(loaded)
    stored = parameter_of(loaded.model, loaded.architecture, name)
    original = weights.original(name)
    assert experts_of(original) == 4
    assert original.shape[1] == 32
    assert torch.equal(original, stored.mT if family in TRANSPOSED else stored)
    weights.set(name, 2 * original)
    assert torch.equal(parameter_of(loaded.model, loaded.architecture, name), 2 * weights._stored[name])
    assert torch.equal(weights.deployed(name), 2 * original)
    (path,) = weights.as_parameters({name: original})
    assert path in dict(loaded.model.named_parameters())
    weights.reset()
    assert torch.equal(weights.deployed(name), original)


@mixtures
def test_hit(family):
    """One layer, ridge → 0: the hidden state after the edit of the experts equals v*."""
    loaded = tiny_mixture(family)
    weights, name = weights_of(loaded), name_of(loaded)
    facts = facts_from(fact_records(4)).facts
    feed = FromTargets()
    source = OptimisedTargets(loaded, weights, [LAYER], ["{}"], feed, TargetSettings(lr=0.2, steps=6), 256)
    source.begin(facts)
    keys, residual = source.layer(0)
    assert float(residual.norm()) > 0.1, "there is something to write"
    moment = Statistics(second_moment=torch.eye(len(keys) // 4).repeat(4, 1, 1))
    problem = LayerProblem(wide(weights.working[name]), keys, residual, moment)
    weights.add(name, Memit(second_moment_weight=1e-9).solve(problem, {}).by_expert(4))
    prompts = SubjectPrompts.of(facts, ["{}"], Encoder(loaded.tokenizer))
    reader = SubjectReader(loaded, prompts, weights.names, [LAYER], False, 256, role="experts")
    after, wanted = reader.clean_values(), source.targets.values
    assert float((after - wanted).norm() / wanted.norm()) < 1e-5


@few
def test_gradients_by_the_wide_matrix_come_from_its_keys_and_its_outputs(family):
    """Gᵀ K over all tokens is the loss's gradient by the wide matrix."""
    loaded = tiny_mixture(family)
    weights, name = weights_of(loaded), name_of(loaded)
    batch = TokenBatch.of(rows(loaded), loaded.device)
    module = module_of(loaded.model, loaded.architecture, name)
    graph = Graph(loaded, batch, outputs_of=[module])
    (by_output,) = torch.autograd.grad(graph.hidden.square().sum(), graph.shifts)
    keys = graph.inputs[0][torch.ones_like(batch.mask, dtype=torch.bool)]
    leaf = weights.original(name).requires_grad_()
    (explicit,) = torch.autograd.grad(
        Graph(loaded, batch, weights.as_parameters({name: leaf})).hidden.square().sum(), leaf
    )
    assert float(explicit.norm()) > 0
    found = by_output.flatten(0, 1).T @ keys
    torch.testing.assert_close(found, wide(explicit), rtol=1e-3, atol=1e-4 * float(explicit.abs().max()))


@few
def test_the_gradients_a_method_feeds_on_are_those_of_the_joint_keys(family):
    loaded = tiny_mixture(family)
    facts = facts_from(fact_records(3)).facts
    source = TargetGradients(loaded, weights_of(loaded), [LAYER], ["{}"], FromGradients(), TargetSettings(), 256)
    source.begin(facts)
    keys, residual = source.layer(0)
    assert keys.shape == (len(wide(source.weights.original(name_of(loaded))).T), residual.shape[1])
    reached = (keys.unflatten(0, (4, -1)).norm(dim=1) > 0).sum(0)
    assert reached.unique().tolist() == [MIXTURES[family][0]["num_experts_per_tok"]]


@few
def test_second_moments_are_those_of_the_joint_keys_by_expert(family):
    loaded = tiny_mixture(family)
    name, passages = name_of(loaded), rows(loaded, 6) * 3
    said = []
    reporter = Quiet()
    reporter.say = lambda text, style="": said.append(text)
    found = second_moments(loaded, passages, [name], 64, reporter)[name]
    explicit, tokens, reached = torch.zeros(()), 0, torch.zeros(4)
    for row in passages:
        batch = TokenBatch.of([row], loaded.device)
        ((keys,), _) = activations(loaded, batch, [module_of(loaded.model, loaded.architecture, name)])
        vectors = keys[0, :].double()
        explicit, tokens = explicit + vectors.T @ vectors, tokens + len(row)
        reached = reached + (vectors.unflatten(1, (4, -1)).norm(dim=-1) > 0).sum(0)
    width = len(explicit) // 4
    blocks = torch.stack([explicit[n * width : (n + 1) * width, n * width : (n + 1) * width] for n in range(4)])
    more = blocks.sum(0) / reached.sum()  # one token of the layer's mean for each expert
    expected = (blocks + more) / (tokens + 4 * tokens / reached.sum())
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    few_tokens = int((reached < width).sum())
    assert any("fewer tokens" in line for line in said) == (few_tokens > 0)
    assert bool((torch.linalg.eigvalsh(found) > -1e-6).all())


def test_sums_under_way_are_stored_with_the_tokens_that_reached_each_expert(tmp_path):
    loaded = tiny_mixture("qwen3_moe")
    name, sums = name_of(loaded), _Sums()
    batch = TokenBatch.of(rows(loaded), loaded.device)
    ((keys,), _) = activations(loaded, batch, [module_of(loaded.model, loaded.architecture, name)])
    real = batch.mask.bool()
    sums.add({name: _products(keys, real)}, int(real.sum()))
    sums.windows += 1
    sums.write(tmp_path / "partial.safetensors")
    again = _Sums.read(tmp_path / "partial.safetensors", loaded.device)
    assert torch.equal(again.moment(name), sums.moment(name))
    assert int(again.routed[name].sum()) == 2 * int(batch.mask.sum())
    assert not torch.equal(again.moment(name), again.mean(name))


def test_the_bfloat16_copy_computes_with_the_edited_experts():
    loaded = tiny_mixture("qwen3_moe")
    weights, name = weights_of(loaded), name_of(loaded)
    source = OptimisedTargets(loaded, weights, [LAYER], ["{}"], FromTargets(), TargetSettings(compute="bfloat16"), 256)
    assert source.computing() is not loaded
    weights.set(name, by_expert(3 * wide(weights.original(name)), 4))
    copied = parameter_of(source.computing().model, loaded.architecture, name)
    assert torch.equal(copied, parameter_of(loaded.model, loaded.architecture, name).to(torch.bfloat16))
    assert copied is not parameter_of(cast_copy(loaded, torch.bfloat16).model, loaded.architecture, name)


def test_experts_that_cannot_be_edited_say_why():
    loaded = tiny_mixture("qwen3_moe")
    module = module_of(loaded.model, loaded.architecture, name_of(loaded))
    assert why_not(module) is None
    module.has_post_expert_norm = True
    assert "normalised" in why_not(module)
    with pytest.raises(SphereEditError, match="cannot be edited: each expert's output is normalised"):
        weights_of(loaded)
    assert "gate_up_proj" in why_not(torch.nn.Linear(2, 2))


@few
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_export_changes_the_edited_experts_in_the_files_alone(family, dtype, tmp_path):
    source = save_mixture(family, tmp_path / "source", dtype)
    loaded = load_model(source, "cpu")
    model = loaded.model
    weights, name = weights_of(loaded), name_of(loaded)
    change = torch.zeros_like(weights.original(name))
    change[1] = 0.5
    weights.set(name, weights.original(name) + change)
    replica = Replica(loaded, weights)
    assert replica.why_anew == ""
    (tmp_path / "edited").mkdir()
    replica.write(tmp_path / "edited")
    before, after = stored_tensors(source), stored_tensors(tmp_path / "edited")
    changed = [key for key in before if before[key].content() != after[key].content()]
    assert len(changed) == 1
    assert ("experts.1." in changed[0]) == (family not in TRANSPOSED)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "edited", dtype=dtype)
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[key], value) for key, value in again.named_parameters())


def test_a_delta_of_experts_gives_their_bits():
    original = torch.randn(3, 5, 4)
    updates = [LowRankUpdate(torch.randn(5, n), torch.randn(3, n, 4)) for n in (2, 3)]
    wanted = updates[1].added_to(updates[0].added_to(original))
    parts = {
        "left": torch.cat([one.left for one in updates], 1),
        "right": torch.cat([one.right for one in updates], 1),
        "batches": torch.tensor([2, 3]),
    }
    exact = delta._exact(original, parts, wanted, torch.float32)
    assert torch.equal(delta.rebuilt(original, exact, torch.float32), wanted)
