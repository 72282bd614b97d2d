"""Model families: the hit test, the replay against a plain forward pass, weights in three views, loading."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from conftest import fact_records
from families import DEPTH, FAMILIES, INNER, WIDTH, save_tiny, tiny, tiny_tokenizer
from plain import averaged_values, clean_values, subject_keys
from sphere_edit import SphereEditError
from sphere_edit.editing.answers import target_rows
from sphere_edit.editing.fact_prompts import FactPrompts
from sphere_edit.editing.keys import SubjectPrompts, SubjectReader, _columns, context_token_keys
from sphere_edit.editing.losses import FromGradients, TargetGradients, TargetLoss
from sphere_edit.editing.methods.alphaedit import AlphaEdit
from sphere_edit.editing.methods.base import LayerProblem, Statistics
from sphere_edit.editing.methods.emmet import Emmet
from sphere_edit.editing.methods.memit import Memit
from sphere_edit.editing.moments import sample_text
from sphere_edit.editing.sources import FromTargets, OptimisedTargets
from sphere_edit.editing.targets import TargetSettings, _Descent, optimise_targets
from sphere_edit.evaluation.scores import Answer, _answer_scores, _hosts, score_facts
from sphere_edit.facts import prompts
from sphere_edit.facts.prompts import KL_PROMPT, Encoder, context_templates, fill, sample_context_templates
from sphere_edit.facts.readers import facts_from
from sphere_edit.files import read_tensors, write_tensors
from sphere_edit.models import gguf, loading, pretrained
from sphere_edit.models.architecture import row_of
from sphere_edit.models.attention import grouped_attention
from sphere_edit.models.checkpoint import Checkpoint
from sphere_edit.models.forward import activations, at, last_hidden, with_cache
from sphere_edit.models.generation import generate
from sphere_edit.models.gguf import embedded_model_file
from sphere_edit.models.identity import fingerprints
from sphere_edit.models.loading import load_model, prepare
from sphere_edit.models.replay import UpperLayers
from sphere_edit.models.tokens import TokenBatch, batches_by_length, over_batches, same_length_batches
from sphere_edit.models.weights import EditedWeights
from sphere_edit.numerics.update import DenseUpdate, LowRankUpdate
from sphere_edit.progress import Quiet

LAYER = 2
TEMPLATES = ["{}", "Ada plays. {}", "It is located in the city. {}"]
families = pytest.mark.parametrize("family", FAMILIES)


def edited(model, layers):
    architecture = row_of(model.config.model_type).architecture(model)
    return EditedWeights(model, architecture, [architecture.module_name(layer, "down") for layer in layers])


def rows_and_pivots(loaded) -> tuple[list[list[int]], list[int]]:
    """Token ids of every fact in two templates, and where the subject's last token stands."""
    encoder = Encoder(loaded.tokenizer)
    coded = [(encoder.encode(text), end) for f in facts() for text, end in [fill(TEMPLATES[1], f), fill("{}", f)]]
    return [tokens.ids for tokens, _ in coded], [tokens.last_token_of(end) for tokens, end in coded]


def facts(count: int = 4):
    return facts_from(fact_records(count)).facts


def within_reach(layer: int):
    """Facts on whose targets a δ in ``layer`` can act: after the last layer nothing carries it on to later positions."""
    return [dataclasses.replace(fact, prompt="They say {}") for fact in facts()] if layer == DEPTH - 1 else facts()


@families
@pytest.mark.parametrize("layer", [0, LAYER, DEPTH - 1])
def test_hit(family, layer):
    """One layer, ridge → 0: the hidden state after the edit equals v*."""
    loaded = tiny(family)
    weights = edited(loaded.model, [layer])
    name = weights.names[0]
    settings = TargetSettings(lr=0.2, steps=6)
    source = OptimisedTargets(loaded, weights, [layer], ["{}"], FromTargets(), settings, 256)
    source.begin(within_reach(layer))
    targets = source.targets
    keys, residual = source.layer(0)
    assert float(residual.norm()) > 0.1, "there is something to write"
    moment = Statistics(second_moment=torch.eye(INNER))
    update = Memit(second_moment_weight=1e-9).solve(LayerProblem(weights.working[name], keys, residual, moment), {})
    weights.add(name, update)
    prompts = SubjectPrompts.of(within_reach(layer), ["{}"], Encoder(loaded.tokenizer))
    after = clean_values(loaded, prompts, layer, 256, inside=loaded.architecture.inside(layer))
    assert float((after - targets.values).norm() / targets.values.norm()) < 1e-3


@families
@pytest.mark.parametrize("layer", [0, LAYER, DEPTH - 1])
@pytest.mark.parametrize("compute", ["model", "bfloat16"])
def test_hit_at_the_mlps_output(family, layer, compute):
    """The same with δ at the MLP's output (ROME), where the averaged key's output becomes v*."""
    loaded = tiny(family)
    weights = edited(loaded.model, [layer])
    (name,) = weights.names
    settings = TargetSettings(lr=0.2, steps=6, compute=compute)
    source = OptimisedTargets(loaded, weights, [layer], TEMPLATES, FromTargets(site="mlp"), settings, 256)
    source.begin(within_reach(layer))
    clean = clean_values(
        loaded, SubjectPrompts.of(within_reach(layer), ["{}"], Encoder(loaded.tokenizer)), layer, 256, inside=True
    )
    torch.testing.assert_close(source.targets.values, clean + source.targets.deltas, atol=1e-4, rtol=1e-4)
    keys, residual = source.layer(0)
    assert float(residual.norm()) > 0.1, "there is something to write"
    problem = LayerProblem(weights.working[name], keys, residual, Statistics())
    weights.add(name, Emmet(second_moment=False).solve(problem, {}))
    prompts = SubjectPrompts.of(within_reach(layer), TEMPLATES, Encoder(loaded.tokenizer))
    after = averaged_values(loaded, prompts, name, 256)
    assert float((after - source.targets.values).norm() / source.targets.values.norm()) < 1e-3
    bias = getattr(loaded.model.get_submodule(name), "bias", None)
    linear = weights.working[name] @ keys + (0 if bias is None else bias[:, None])
    torch.testing.assert_close(after, linear, atol=1e-4, rtol=1e-4)


@families
def test_replay_with_delta_inside_a_layer_is_the_whole_forward_pass(family):
    loaded = tiny(family)
    rows, pivots = rows_and_pivots(loaded)
    delta = torch.randn(len(rows), WIDTH, generator=torch.Generator().manual_seed(1))
    upper = UpperLayers(loaded, rows, pivots, LAYER, inside=True)
    upper.check(upper.hidden(torch.zeros(len(rows), WIDTH)))
    replayed = upper.hidden(delta)
    place = torch.zeros(len(rows), max(map(len, rows)), 1)
    place[torch.arange(len(rows)), torch.tensor(pivots)] = 1
    down = loaded.model.get_submodule(loaded.architecture.module_name(LAYER, "down"))
    hook = down.register_forward_hook(lambda module, args, output: output + place * delta[:, None])
    whole = last_hidden(loaded, TokenBatch.of(rows, loaded.device))
    hook.remove()
    for number, (row, pivot) in enumerate(zip(rows, pivots, strict=True)):
        torch.testing.assert_close(
            replayed[number, : len(row) - pivot], whole[number, pivot : len(row)], atol=2e-4, rtol=1e-3
        )


@families
@pytest.mark.parametrize("inside", [False, True])
def test_what_is_computed_again_on_the_way_back_has_the_same_bits(family, inside):
    loaded = tiny(family)
    rows, pivots = rows_and_pivots(loaded)
    gradients, sizes = [], []
    for kept in (None, 10_000, 1):
        upper = UpperLayers(loaded, rows, pivots, 1, inside, kept=kept)
        delta = torch.full((len(rows), WIDTH), 0.1, requires_grad=True)
        stored: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, into=stored: into.append(x.numel()) or x, lambda x: x):
            said = upper.hidden(delta)
        gradients.append(torch.autograd.grad(said.square().sum(), delta)[0])
        sizes.append(sum(stored))
        assert upper.hidden(delta.detach()).grad_fn is None
    assert float(gradients[0].norm()) > 0
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])
    assert sizes[2] < sizes[1] / 2, "most is not kept"
    assert sizes[1] == sizes[0], "a chunk of few tokens keeps all"


@families
def test_gradients_by_outputs_and_by_weights_are_those_of_the_loss(family):
    """Against central differences of the plain loss, in float64: one direction for each matrix."""
    loaded = tiny(family, torch.float64)
    names = [loaded.architecture.module_name(layer, role) for layer in (1, 2) for role in loaded.architecture.roles]
    weights = EditedWeights(loaded.model, loaded.architecture, names)
    setup = (loaded, weights, [1] * len(names), ["{}"], FromGradients(), TargetSettings(), 64)
    loss, gradients = TargetLoss(*setup), TargetGradients(*setup)
    loss.begin(facts()), gradients.begin(facts())
    weight = {name: weights.original(name).double() for name in names}
    value, by_weight = loss.objective(weight)
    scores = score_facts(
        loaded, [dataclasses.replace(f, neighbors=(), paraphrases=()) for f in answered()], 64, Quiet()
    )
    plain = [score.rewrite.nll_right for score in scores]
    assert value == pytest.approx(sum(plain) / len(plain), rel=1e-6)
    assert gradients.report().loss_before == pytest.approx(plain, rel=1e-6)
    for index, name in enumerate(names):
        direction = torch.randn(weight[name].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(index))
        up, down = (loss.objective({**weight, name: weight[name] + sign * 1e-3 * direction})[0] for sign in (1, -1))
        slope = (up - down) / 2e-3
        assert abs(slope) > 1e-2, "there is a slope to find"
        assert float((by_weight[name] * direction).sum()) == pytest.approx(slope, rel=1e-2, abs=1e-3)
    # the last edited matrix's input at the predicting positions is all through which it acts on the loss there
    keys, residual = gradients.layer(len(names) - 1)
    assert (
        keys.shape[1]
        == residual.shape[1]
        == sum(len(row.predictions.tokens) for _, row in target_rows(loaded, loss._coded, 64))
    )
    assert float(residual.norm()) > 0


def answered():
    return [dataclasses.replace(fact, target_true="Paris") for fact in facts()]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_value_gradient_is_the_slope_of_its_output(family):
    loaded = tiny(family, torch.float64)
    name = loaded.architecture.module_name(LAYER, "up")
    weights = EditedWeights(loaded.model, loaded.architecture, [name])
    source = TargetGradients(loaded, weights, [LAYER], ["{}"], FromGradients(), TargetSettings(), 64)
    source.begin(facts(1))
    _, residual = source.layer(0)
    before = sum(source.report().loss_before)
    (tokens, start) = Encoder(loaded.tokenizer).with_target(facts(1)[0].filled_prompt, facts(1)[0].target_new)
    for column in range(residual.shape[1]):
        shift = torch.zeros(1, len(tokens.ids) - 1, residual.shape[0], dtype=torch.float64)
        shift[0, start - 1 + column] = 1e-3 * residual[:, column]
        hook = loaded.model.get_submodule(name).register_forward_hook(lambda m, a, out, shift=shift: out + shift)
        source.begin(facts(1))
        hook.remove()
        slope = (sum(source.report().loss_before) - before) / 1e-3
        assert slope == pytest.approx(-float(residual[:, column].square().sum()), rel=2e-2)


@families
def test_replay_of_the_upper_layers_is_the_whole_forward_pass(family):
    """Values and gradients of a replay equal those of a plain, right-padded forward pass with δ added by a hook."""
    loaded = tiny(family)
    rows, pivots = rows_and_pivots(loaded)
    torch.manual_seed(1)
    delta = torch.randn(len(rows), WIDTH).requires_grad_()
    upper = UpperLayers(loaded, rows, pivots, LAYER)
    upper.check(upper.hidden(torch.zeros(len(rows), WIDTH)))
    replayed = upper.hidden(delta)

    site = loaded.architecture.value_site(loaded.model, LAYER)
    place = torch.zeros(len(rows), max(map(len, rows)), 1)
    place[torch.arange(len(rows)), torch.tensor(pivots)] = 1
    plain_delta = delta.detach().clone().requires_grad_()

    def add(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = hidden + place * plain_delta[:, None]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    whole: list[torch.Tensor] = []
    hooks = [
        site.register_forward_hook(add),
        loaded.architecture.decoder_layers(loaded.model)[-1].register_forward_hook(
            lambda m, a, out: whole.append(out[0] if isinstance(out, tuple) else out)
        ),
    ]
    batch = TokenBatch.of(rows, loaded.device)
    loaded.model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
    for hook in hooks:
        hook.remove()
    ours = torch.cat(
        [replayed[i, : len(row) - p].flatten() for i, (row, p) in enumerate(zip(rows, pivots, strict=True))]
    )
    theirs = torch.cat(
        [whole[0][i, p : len(row)].flatten() for i, (row, p) in enumerate(zip(rows, pivots, strict=True))]
    )
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-3)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    assert float(plain_delta.grad.norm()) > 0
    assert float((delta.grad - plain_delta.grad).norm() / plain_delta.grad.norm()) < 1e-3


@families
def test_a_facts_target_does_not_depend_on_its_batch(family):
    loaded = tiny(family)
    settings = TargetSettings(lr=0.2, steps=8, stop_loss=0.0, tokens=4096)
    through = optimise_targets(loaded, facts(6), TEMPLATES, LAYER, settings)
    third, fourth = sorted(losses[4] for losses in through.losses)[2:4]
    settings = settings.model_copy(update={"stop_loss": (third + fourth) / 2})
    together = optimise_targets(loaded, facts(6), TEMPLATES, LAYER, settings)
    assert len({len(losses) for losses in together.losses}) > 1, "some leave the batch before others"
    for number, fact in enumerate(facts(6)):
        alone = optimise_targets(loaded, [fact], TEMPLATES, LAYER, settings)
        difference = (alone.values[:, 0] - together.values[:, number]).norm() / alone.values.norm()
        assert float(difference) < 1e-4
        assert len(alone.losses[0]) == len(together.losses[number])


def test_finished_facts_leave_the_optimisation_early_and_clamping_holds():
    loaded = tiny("llama")
    settings = TargetSettings(lr=0.5, steps=40, stop_loss=6.3, tokens=4096)
    result = optimise_targets(loaded, facts(6), TEMPLATES, LAYER, settings)
    finished = [losses for losses in result.losses if losses[-1] < 6.3]
    assert len({len(losses) for losses in finished}) > 1, "facts finish at different steps"
    assert all(loss >= 6.3 for losses in result.losses for loss in losses[:-1])
    prompts = SubjectPrompts.of(facts(6), ["{}"], Encoder(loaded.tokenizer))
    h = clean_values(loaded, prompts, LAYER, 256)
    tight = optimise_targets(loaded, facts(6), TEMPLATES, LAYER, settings.model_copy(update={"clamp_norm_factor": 0.1}))
    share = (tight.values - h).norm(dim=0) / h.norm(dim=0)
    assert float(share.max()) <= 0.1 + 1e-5
    assert float(share.max()) > 0.09, "the clamp is what holds it"


@pytest.mark.parametrize("rule", ["normalised", "polyak"])
def test_steps_in_l2_are_no_longer_than_their_share_of_h(rule):
    loaded = tiny("llama")
    settings = TargetSettings(rule=rule, lr=0.2, steps=4, patience=1, stop_loss=0.0, kl_factor=0.0, weight_decay=0.0)
    found = optimise_targets(loaded, facts(4), TEMPLATES, LAYER, settings)
    h = found.values - found.deltas
    shares = found.deltas.norm(dim=0) / h.norm(dim=0)
    assert float(shares.max()) <= 3 * 0.2 + 1e-5, "three updates"
    assert float(shares.min()) > 0.2
    assert all(losses[-1] < losses[0] for losses in found.losses)


def test_a_target_that_is_the_likeliest_answer_twice_is_finished():
    """With answers of one token: a random model of this size can hardly say several."""
    loaded = tiny("llama")
    settings = TargetSettings(lr=0.5, steps=20, stop_loss=0.0)
    chosen = [dataclasses.replace(fact, target_new="in", separator=" ") for fact in within_reach(DEPTH - 1)]
    through = optimise_targets(loaded, chosen, TEMPLATES, LAYER, settings)
    once, twice = (
        optimise_targets(loaded, chosen, TEMPLATES, LAYER, settings.model_copy(update={"most_probable": count}))
        for count in (1, 2)
    )
    encoder = Encoder(loaded.tokenizer)
    for number, fact in enumerate(chosen):
        losses = twice.losses[number]
        assert len(once.losses[number]) < len(losses) < 20
        assert through.losses[number][: len(losses)] == pytest.approx(losses, rel=1e-4)
        prompts = FactPrompts.of(fact, TEMPLATES, encoder)
        rows, pivots = prompts.rows[: len(TEMPLATES)], prompts.subjects[: len(TEMPLATES)]
        hidden = UpperLayers(loaded, rows, pivots, LAYER).hidden(once.deltas[:, number].expand(len(rows), -1))
        columns = torch.tensor(prompts.starts) - 1 - torch.tensor(pivots)
        said = loaded.architecture.head(loaded.model, at(hidden, columns)).argmax(-1)
        assert said.tolist() == [target for (target,) in prompts.targets]


@families
def test_a_key_for_each_context_is_that_of_its_row_and_the_hit_holds_in_every_context(family):
    """Each column is the row's own key or value times the root of its share; one layer, ridge → 0: δ arrives everywhere."""
    loaded = tiny(family)
    weights = edited(loaded.model, [LAYER])
    (name,) = weights.names
    settings, chosen = TargetSettings(lr=0.2, steps=6), within_reach(LAYER)
    source = OptimisedTargets(loaded, weights, [LAYER], TEMPLATES, FromTargets(contexts="each"), settings, 256)
    source.begin(chosen)
    keys, residual = source.layer(0)
    shares = torch.tensor([0.5, 0.25, 0.25] * len(chosen)).sqrt()
    encoder = Encoder(loaded.tokenizer)
    rows = SubjectPrompts.of(chosen, TEMPLATES, encoder)
    alone = SubjectPrompts(rows.rows, len(rows.rows), 1)  # every row as if it were a fact of its own
    torch.testing.assert_close(keys, subject_keys(loaded, alone, [name], 256)[name] * shares, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(residual, source.targets.deltas.repeat_interleave(3, 1) * shares, atol=1e-4, rtol=1e-4)
    before = clean_values(loaded, alone, LAYER, 256, loaded.architecture.inside(LAYER))
    moment = Statistics(second_moment=torch.eye(INNER))
    weights.add(
        name, Memit(second_moment_weight=1e-9).solve(LayerProblem(weights.working[name], keys, residual, moment), {})
    )
    arrived = clean_values(loaded, alone, LAYER, 256, loaded.architecture.inside(LAYER)) - before
    wanted = source.targets.deltas.repeat_interleave(3, 1)
    assert float((arrived - wanted).norm() / wanted.norm()) < 1e-2
    again = source.all_keys(chosen)[name]
    torch.testing.assert_close(again, subject_keys(loaded, alone, [name], 256)[name] * shares, atol=1e-4, rtol=1e-4)


@families
def test_keys_are_the_mean_of_two_means_whatever_the_batching(family):
    loaded = tiny(family)
    prompts = SubjectPrompts.of(facts(), TEMPLATES, Encoder(loaded.tokenizer))
    name = loaded.architecture.module_name(LAYER, "down")
    keys = subject_keys(loaded, prompts, [name], 64)[name]
    single = []
    for row in prompts.rows:
        seen: list[torch.Tensor] = []
        hook = loaded.model.get_submodule(name).register_forward_pre_hook(
            lambda m, args, seen=seen: seen.append(args[0][0, -1])
        )
        loaded.model(input_ids=torch.tensor([row]))
        hook.remove()
        single.append(seen[0])
    plain = torch.stack(single).view(4, 3, -1)
    torch.testing.assert_close(keys.T, (plain[:, 0] + plain[:, 1:].mean(1)) / 2, atol=1e-5, rtol=1e-4)


def test_batches_by_length_hold_every_index_once_within_the_limit():
    lengths = [5, 1, 9, 3, 3, 20, 7]
    batches = batches_by_length(lengths, 12)
    assert sorted(index for batch in batches for index in batch) == list(range(7))
    assert all(len(batch) * max(lengths[i] for i in batch) <= 12 or len(batch) == 1 for batch in batches)


@pytest.mark.parametrize("cut", [batches_by_length, same_length_batches])
def test_results_over_batches_come_in_the_order_of_the_rows(cut):
    rows = ["moment", "a", "statistics", "abc", "xyz", "a passage of text", "weights"]
    seen = []

    def work(chunk):
        seen.append(chunk)
        return (row.upper() for row in chunk)

    assert over_batches(rows, 12, work, cut=cut) == [row.upper() for row in rows]
    assert seen == [[rows[index] for index in chunk] for chunk in cut([len(row) for row in rows], 12)]
    assert over_batches([(row, 1) for row in rows], 12, lambda chunk: chunk, lambda pair: len(pair[0]), cut) == [
        (row, 1) for row in rows
    ]
    assert over_batches([], 12, work, cut=cut) == []
    with pytest.raises(ValueError, match="zip"):
        over_batches(rows, 12, lambda chunk: chunk[1:], cut=cut)


# --- weights ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_weights_have_three_views_and_a_way_back(family, dtype):
    loaded = tiny(family, dtype)
    weights = edited(loaded.model, [1, 2])
    name = weights.names[0]
    stored = loaded.model.get_submodule(name).weight.detach().clone()
    assert weights.working[name].shape == (WIDTH, INNER)
    assert weights.working[name].dtype == torch.float32
    step = DenseUpdate(torch.full((WIDTH, INNER), 1e-4))
    for _ in range(3):
        weights.add(name, step)
    torch.testing.assert_close(weights.working[name], weights.original(name) + 3e-4, rtol=0, atol=1e-7)
    assert torch.equal(weights.deployed(name), weights.working[name].to(dtype).float())
    deployed = loaded.model.get_submodule(name).weight.detach().clone()
    with weights.unedited():
        assert torch.equal(loaded.model.get_submodule(name).weight, stored)
    assert torch.equal(loaded.model.get_submodule(name).weight, deployed)
    kept = weights.working[name].clone()
    weights.deploy(name, 2 * weights.original(name))
    assert torch.equal(weights.working[name], kept)
    assert torch.equal(weights.deployed(name), (2 * weights.original(name)).to(dtype).float())
    weights.reset()
    assert torch.equal(loaded.model.get_submodule(name).weight, stored)


def test_an_edit_that_overflows_float16_is_refused():
    loaded = tiny("llama", torch.float16)
    weights = edited(loaded.model, [1])
    with pytest.raises(SphereEditError, match="does not fit float16"):
        weights.add(weights.names[0], DenseUpdate(torch.full((WIDTH, INNER), 1e6)))


@pytest.mark.parametrize(
    "sample", [sample_context_templates, lambda loaded, seed: sample_text(loaded, 64, seed, Quiet(), 8)]
)
def test_a_model_that_overflows_float16_where_it_samples_is_told(sample):
    """It loads, for its weights are finite."""
    loaded = tiny("llama", torch.float16)
    sample(loaded, 0)
    with torch.no_grad():
        mlp = loaded.model.model.layers[1].mlp
        mlp.down_proj.weight.mul_(6e4)
        mlp.up_proj.weight.mul_(3e4)
    assert all(weight.isfinite().all() for weight in loaded.model.parameters())
    with pytest.raises(SphereEditError, match="overflows in float(16|32) where it samples text; try --dtype float32"):
        sample(loaded, 0)


def test_a_models_context_templates_are_sampled_once(monkeypatch, tmp_path):
    monkeypatch.setenv("SPHERE_EDIT_CACHE", str(tmp_path))
    loaded, sampled = tiny("llama"), []
    expected = sample_context_templates(loaded, 3, 2)
    assert len(expected) == 11

    def counted(loaded, seed, per_opener):
        sampled.append(seed)
        return sample_context_templates(loaded, seed, per_opener)

    monkeypatch.setattr(prompts, "sample_context_templates", counted)
    assert context_templates(loaded, 3, 2) == context_templates(loaded, 3, 2) == expected
    assert sampled == [3]
    for other, seed, count in (
        (loaded, 4, 2),
        (loaded, 3, 1),
        (dataclasses.replace(loaded, fingerprint="another"), 3, 2),
    ):
        context_templates(other, seed, count)
    assert sampled == [3, 4, 3, 3]
    assert context_templates(loaded, 3, 0) == ["{}"]


def test_gpt2_and_llama_twins_with_the_same_weights_get_the_same_update():
    """Conv1D against Linear: two models that compute the same thing, stored transposed to one another."""
    gpt2, llama = _twins()
    tokenizer = tiny_tokenizer()
    ids = torch.tensor([tokenizer("The capital of France is Paris").input_ids])
    torch.testing.assert_close(gpt2(ids).logits, llama(ids).logits, atol=1e-4, rtol=1e-4)
    records = [
        {"subject": s, "prompt": "The city of {}", "target_new": t} for s, t in [("Paris", "Rome"), ("Madrid", "Italy")]
    ]
    centred = torch.eye(WIDTH) - 1 / WIDTH
    delta = centred @ torch.randn(WIDTH, len(records), generator=torch.Generator().manual_seed(1))
    found = []
    for model in (gpt2, llama):
        loaded = prepare(model, tokenizer, "twin")
        weights = edited(model, [1, 2])
        prompts = SubjectPrompts.of(facts_from(records).facts, TEMPLATES, Encoder(tokenizer))
        targets = clean_values(loaded, prompts, 2, 256) + delta
        for index, name in enumerate(weights.names):
            keys = subject_keys(loaded, prompts, [name], 256)[name]
            residual = (targets - clean_values(loaded, prompts, 2, 256)) / (2 - index)
            problem = LayerProblem(weights.working[name], keys, residual, Statistics(second_moment=torch.eye(INNER)))
            weights.add(name, Memit(second_moment_weight=0.1).solve(problem, {}))
        found.append([weights.working[name] - weights.original(name) for name in weights.names])
    for ours, theirs in zip(*found, strict=True):
        assert float(ours.norm()) > 1e-2
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-3


def _twins():
    """GPT-2 without positions, attention and biases, with SiLU; Llama with an 'up' that is constantly 1: the same map.

    Every write into the residual stream is centred, so that LayerNorm and RMSNorm agree.
    """
    torch.manual_seed(0)
    vocabulary = len(tiny_tokenizer())
    common = {"bos_token_id": 1, "eos_token_id": 2, "vocab_size": vocabulary, "tie_word_embeddings": False}
    gpt2 = GPT2LMHeadModel(
        GPT2Config(
            n_embd=WIDTH,
            n_inner=INNER,
            n_layer=3,
            n_head=4,
            n_positions=64,
            activation_function="silu",
            layer_norm_epsilon=1e-6,
            **common,
        )
    )
    llama = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=WIDTH,
            intermediate_size=INNER,
            num_hidden_layers=3,
            num_attention_heads=4,
            mlp_bias=True,
            rms_norm_eps=1e-6,
            **common,
        )
    )
    centre = torch.eye(WIDTH) - 1 / WIDTH
    with torch.no_grad():
        embedding = torch.randn(vocabulary, WIDTH) @ centre
        head = torch.randn(vocabulary, WIDTH)
        gpt2.transformer.wte.weight.copy_(embedding), llama.model.embed_tokens.weight.copy_(embedding)
        gpt2.lm_head.weight.copy_(head), llama.lm_head.weight.copy_(head)
        gpt2.transformer.wpe.weight.zero_()
        for block, layer in zip(gpt2.transformer.h, llama.model.layers, strict=True):
            up, down = torch.randn(INNER, WIDTH) * 0.3, centre @ torch.randn(WIDTH, INNER) * 0.3
            block.attn.c_proj.weight.zero_(), block.attn.c_proj.bias.zero_(), layer.self_attn.o_proj.weight.zero_()
            block.mlp.c_fc.weight.copy_(up.T), block.mlp.c_fc.bias.zero_()
            block.mlp.c_proj.weight.copy_(down.T), block.mlp.c_proj.bias.zero_()
            layer.mlp.gate_proj.weight.copy_(up), layer.mlp.gate_proj.bias.zero_()
            layer.mlp.up_proj.weight.zero_(), layer.mlp.up_proj.bias.fill_(1.0)
            layer.mlp.down_proj.weight.copy_(down), layer.mlp.down_proj.bias.zero_()
    return gpt2.eval(), llama.eval()


# --- loading ------------------------------------------------------------------------------------------------------


def test_loading_refuses_what_is_no_model(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "fake.gguf").write_bytes(b"GGML of an older kind")
    (tmp_path / "facts.json").write_text("[]")
    for source, message in [
        (tmp_path / "nowhere", "there is no folder"),
        (tmp_path / "empty", r"no config\.json"),
        (tmp_path / "fake.gguf", "does not start as a GGUF file"),
        (tmp_path / "gone.gguf", "there is no file"),
        (tmp_path / "facts.json", "is a file, not a model"),
    ]:
        with pytest.raises(SphereEditError, match=message):
            load_model(source)
    folder = save_tiny("llama", tmp_path / "pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(SphereEditError, match="pickled weights are never loaded"):
        load_model(folder)
    folder = save_tiny("llama", tmp_path / "pointer")
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(SphereEditError, match="git lfs pull"):
        load_model(folder)


@pytest.mark.parametrize("loss", ["head", "layers", "shape"])
def test_loading_refuses_a_checkpoint_that_lacks_weights(tmp_path, loss):
    """transformers would put random numbers in their place, others at each loading."""
    folder = save_tiny("llama", tmp_path / "model")
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    if loss == "head":
        del tensors["lm_head.weight"]
    elif loss == "layers":
        config["num_hidden_layers"] += 2
    else:
        config["intermediate_size"] += 8
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SphereEditError, match="of the weights that its config.json describes|cannot be loaded"):
        load_model(folder)


@pytest.mark.parametrize("wrong", [float("nan"), float("-inf")])
def test_loading_refuses_weights_that_are_no_numbers(tmp_path, wrong):
    folder = save_tiny("llama", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    name = "model.layers.1.mlp.up_proj.weight"
    model.get_parameter(name).data[3, 5] = wrong
    model.save_pretrained(folder)
    with pytest.raises(
        SphereEditError, match=f"model' are broken: {name} holds numbers that are infinite or undefined"
    ):
        load_model(folder)


def test_loading_refuses_impossible_devices_and_dtypes(tmp_path):
    folder = save_tiny("llama", tmp_path / "model")
    with pytest.raises(SphereEditError, match="device 'cuda:99' cannot be used|device 'nonsense' cannot be used"):
        load_model(folder, device="cuda:99")
    with pytest.raises(SphereEditError, match="dtype 'int8' is not one of"):
        load_model(folder, dtype="int8")
    (folder / "config.json").write_text("{")
    with pytest.raises(SphereEditError, match=r"config\.json is damaged"):
        load_model(folder)


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_loading_a_folder_keeps_or_changes_the_dtype(tmp_path, dtype):
    folder = save_tiny("qwen2", tmp_path / "model", torch.bfloat16)
    loaded = load_model(folder, dtype=dtype)
    expected = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    assert next(loaded.model.parameters()).dtype == expected
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert not loaded.model.training


def test_statistics_keys_depend_on_weights_up_to_the_layer_and_on_the_configuration():
    loaded = tiny("llama")
    before = fingerprints(loaded.model, loaded.architecture.layers, [1, 2])
    with torch.no_grad():
        loaded.model.model.layers[2].mlp.down_proj.weight[0, 0] += 1
    after = fingerprints(loaded.model, loaded.architecture.layers, [1, 2])
    assert before[1] == after[1]
    assert before[2] != after[2]
    loaded.model.config.rms_norm_eps = 1e-3
    assert fingerprints(loaded.model, loaded.architecture.layers, [1])[1] != after[1]


def test_right_padding_changes_no_hidden_state():
    loaded = tiny("gemma3_text")
    rows = [[1, 5, 9, 30, 40, 50, 60, 7, 8, 9, 10, 11], [1, 5, 9]]
    batch = TokenBatch.of(rows, loaded.device)
    together = at(last_hidden(loaded, batch), batch.mask.sum(1) - 1)
    for row, hidden in zip(rows, together, strict=True):
        alone = last_hidden(loaded, TokenBatch.of([row], loaded.device))[0, -1]
        torch.testing.assert_close(hidden, alone, atol=1e-5, rtol=1e-4)


def test_generation_ignores_the_models_own_sampling_settings():
    loaded = tiny("llama")
    plain = generate(loaded, [[5, 9, 30]], 8)
    own = loaded.model.generation_config
    own.do_sample, own.temperature, own.repetition_penalty, own.top_p = True, 3.0, 5.0, 0.5
    assert generate(loaded, [[5, 9, 30]], 8) == plain
    assert loaded.model.generation_config is own
    own.eos_token_id = plain[0][5]
    end = plain[0].index(own.eos_token_id, 3)
    assert generate(loaded, [[5, 9, 30]], 8) == [plain[0][:end]], "a row ends before the end of text"


def test_keys_read_back_from_disk_give_the_same_state_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    statistics = Statistics(null_space=torch.linalg.qr(torch.randn(1024, 600))[0])
    averaged = _columns(torch.randn(60, 1024))
    write_tensors(tmp_path / "keys.safetensors", {"keys": averaged})
    read = read_tensors(tmp_path / "keys.safetensors")["keys"]
    ours, theirs = (AlphaEdit().after_batch({}, {"keys": keys}, statistics)["system"] for keys in (averaged, read))
    assert torch.equal(ours, theirs)


@families
@pytest.mark.parametrize("inside", [False, True])
def test_keys_and_values_read_layer_by_layer_are_those_of_whole_forward_passes(family, inside):
    loaded = tiny(family)
    layers = [LAYER] if inside or loaded.architecture.alone(LAYER) else [0, 1, LAYER]
    weights = edited(loaded.model, layers)
    prompts = SubjectPrompts.of(facts(6), TEMPLATES, Encoder(loaded.tokenizer))
    reader = SubjectReader(loaded, prompts, weights.names, layers, inside, 64, averaged=inside)
    before = subject_keys(loaded, prompts, weights.names, 64)
    for _ in range(2):  # a second time, the walk goes back to its beginning
        for index, name in enumerate(weights.names):
            keys, values = reader.keys_and_values(index)
            assert keys.is_contiguous()
            plain = averaged_values(loaded, prompts, name, 64) if inside else clean_values(loaded, prompts, LAYER, 64)
            torch.testing.assert_close(keys, subject_keys(loaded, prompts, [name], 64)[name], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(values, plain, atol=1e-4, rtol=1e-4)
            weights.add(
                name, DenseUpdate(0.05 * torch.randn(WIDTH, INNER, generator=torch.Generator().manual_seed(index)))
            )
        after, expected = reader.all_keys(), subject_keys(loaded, prompts, weights.names, 64)
        for name in weights.names:
            torch.testing.assert_close(after[name], expected[name], atol=1e-5, rtol=1e-4)
    last = weights.names[-1]
    assert float((after[last] - before[last]).norm()) > 1e-2 or len(layers) == 1, "what was written is seen above"


def test_a_gguf_file_is_converted_once(smollm2, monkeypatch):
    file = embedded_model_file()
    read = []
    real = pretrained.from_pretrained
    for module in (gguf, loading):
        monkeypatch.setattr(
            module, "from_pretrained", lambda *args, **options: read.append(options) or real(*args, **options)
        )
    again = load_model(file)
    assert [options.get("gguf") for options in read] == [None], "its safetensors are read, not the file itself"
    assert again.fingerprint == smollm2.fingerprint
    config = again.model.config
    assert config.rope_parameters["rope_theta"] == 100_000.0, "the base the GGUF file names"
    assert "quantization_config" not in json.dumps(config.to_dict())


def test_a_gguf_file_loads_with_the_weights_it_holds(smollm2):
    """Dequantised by the format's own library, the rows of q and k put back from llama.cpp's order."""
    model, config = smollm2.model, smollm2.model.config
    stored = {tensor.name: tensor for tensor in GGUFReader(embedded_model_file()).tensors}
    assert len(smollm2.architecture.decoder_layers(model)) == config.num_hidden_layers == 30

    def held(name: str) -> torch.Tensor:
        return torch.from_numpy(dequantize(stored[name].data, stored[name].tensor_type).copy())

    layer = model.model.layers[17]
    for name, weight in (
        ("token_embd.weight", model.model.embed_tokens.weight),
        ("output_norm.weight", model.model.norm.weight),
        ("blk.17.ffn_down.weight", layer.mlp.down_proj.weight),
        ("blk.17.ffn_gate.weight", layer.mlp.gate_proj.weight),
        ("blk.17.attn_v.weight", layer.self_attn.v_proj.weight),
    ):
        assert torch.equal(weight, held(name)), name
    for name, heads, weight in (
        ("blk.17.attn_q.weight", config.num_attention_heads, layer.self_attn.q_proj.weight),
        ("blk.17.attn_k.weight", config.num_key_value_heads, layer.self_attn.k_proj.weight),
    ):
        rows = held(name)
        halves = rows.reshape(heads, -1, 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)
        assert torch.equal(weight, halves), name


@families
def test_loss_and_gradient_of_a_target_are_those_of_its_definition(family):
    """The loss as DESIGN states it, over whole forward passes with δ added by hook, differentiated by autograd."""
    loaded = tiny(family)
    settings = TargetSettings(kl_factor=0.5, weight_decay=0.3)
    given = [
        dataclasses.replace(fact, prompt=prompt)
        for fact, prompt in zip(facts(), ["In truth {} is", "{} has"] * 2, strict=True)
    ]
    given[1] = dataclasses.replace(given[1], rewordings=("Everybody knows {} for its", "Where {} is, there is"))
    encoder = Encoder(loaded.tokenizer)
    prompts = [FactPrompts.of(fact, TEMPLATES, encoder) for fact in given]
    assert [len(prompt.targets) - len(TEMPLATES) for prompt in prompts] == [0, 2, 0, 0]
    given_alone = [prompt for prompt, fact in zip(prompts, given, strict=True) if not fact.rewordings]
    assert {prompt.kl_row for prompt in given_alone} == {0, len(TEMPLATES)}, "both ways of the KL prompt occur"
    descent = _Descent(loaded, prompts, LAYER, settings, inside=False)
    descent._evaluate()  # δ = 0: fixes the distribution that the KL divergence is taken from
    generator = torch.Generator().manual_seed(0)
    deltas = torch.randn(descent.delta.shape, generator=generator)
    descent.delta = deltas.clone().requires_grad_()
    evaluation = descent._evaluate()
    gradient = descent._gradient(evaluation)
    for number, fact in enumerate(given):
        delta = deltas[number].clone().requires_grad_()
        loss = defined_loss(loaded, fact, delta, descent.h[number], settings, encoder)
        (expected,) = torch.autograd.grad(loss, delta)
        assert float(evaluation.loss[number]) == pytest.approx(float(loss.detach()), rel=1e-5)
        torch.testing.assert_close(gradient[number], expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def defined_loss(loaded, fact, delta, h, settings, encoder):
    site = loaded.architecture.value_site(loaded.model, LAYER)

    def log_probs(ids, position, shift):
        def add(module, args, output):
            hidden = output[0] if isinstance(output, tuple) else output
            hidden = torch.cat([hidden[:, :position], hidden[:, position, None] + shift, hidden[:, position + 1 :]], 1)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        hook = site.register_forward_hook(add)
        logits = loaded.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
        hook.remove()
        return logits.log_softmax(-1)

    nll = []
    said = [(template, None) for template in TEMPLATES] + [("{}", prompt) for prompt in fact.rewordings]
    for template, prompt in said:
        text, end = fill(template, fact, prompt)
        tokens, start = encoder.with_target(text, fact.target_new)
        found = log_probs(tokens.ids, tokens.last_token_of(end), delta)
        target = torch.tensor(tokens.ids[start:])
        nll.append(-found[start - 1 : -1].gather(1, target[:, None]).mean())
    ids, position = encoder.subject_end(*fill("{}", fact, KL_PROMPT))
    now = log_probs(ids, position, delta)[position]
    before = log_probs(ids, position, torch.zeros_like(delta))[position].detach()
    divergence = (now.exp() * (now - before)).sum()
    decay = delta.norm() / h.square().sum()
    return torch.stack(nll).mean() + settings.kl_factor * divergence + settings.weight_decay * decay


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_grouped_attention_is_attention_over_repeated_keys(softcap):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, 3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(2, 2, 5, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    key.requires_grad_()
    mask = torch.full((2, 1, 3, 5), 0.0, dtype=torch.float64)
    mask[0, 0, 0, 3:] = mask[1, 0, :2, 2:] = float("-inf")
    output, weights = grouped_attention(nn.Identity(), query, key, value, mask, scaling=0.3, softcap=softcap)
    repeated_key, repeated_value = key.repeat_interleave(3, dim=1), value.repeat_interleave(3, dim=1)
    scores = torch.einsum("bhsd,bhtd->bhst", query, repeated_key) * 0.3
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    plain = (scores + mask).softmax(-1)
    torch.testing.assert_close(weights, plain, rtol=0, atol=1e-6)
    expected = torch.einsum("bhst,bhtd->bshd", plain, repeated_value)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)
    pick = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    ours = torch.autograd.grad((output * pick).sum(), (query, key))
    theirs = torch.autograd.grad((expected * pick).sum(), (query, key))
    for mine, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj"])
def test_scores_read_off_shared_rows_are_those_of_each_answer_alone(family):
    """Answers of one and of several tokens after shared prompts, against one whole forward pass an answer."""
    loaded = tiny(family)
    encoder = Encoder(loaded.tokenizer)
    pairs = [
        (prompt, Answer(text)) for prompt in ("They say", "They say so") for text in ("so", "so far off", "x", "y")
    ]
    scored = _answer_scores(loaded, pairs, 64, Quiet(), "")
    for prompt, answer in pairs:
        tokens, start = encoder.with_target(prompt, answer.text)
        logits = loaded.model(input_ids=torch.tensor([tokens.ids]), use_cache=False).logits[0].float().log_softmax(-1)
        target = torch.tensor(tokens.ids[start:])
        found = logits[start - 1 : -1]
        nll, correct = scored[prompt, answer]
        assert nll == pytest.approx(-float(found.gather(1, target[:, None]).mean().detach()), rel=1e-4)
        assert correct == bool((found.argmax(-1) == target).all())


def test_rows_that_begin_another_are_not_run():
    rows = [(1, 2), (1, 2, 3), (4,), (1, 2), (1, 3), (4, 5), (4, 6), (1,)]
    hosts = _hosts(rows)
    assert set(hosts) == {(1, 2, 3), (1, 3), (4, 5), (4, 6)}
    assert sorted(index for guests in hosts.values() for index in guests) == list(range(len(rows)))
    assert all(host[: len(rows[index])] == rows[index] for host, guests in hosts.items() for index in guests)


@families
def test_a_checkpoint_gives_the_matrices_that_the_loaded_model_has(family, tmp_path):
    save_tiny(family, tmp_path / "model")
    loaded = load_model(tmp_path / "model", "cpu")
    checkpoint = Checkpoint(str(tmp_path / "model"))
    assert checkpoint.depth == DEPTH
    roles = list(loaded.architecture.roles)
    names = checkpoint.names(None, roles)
    assert names == [loaded.architecture.module_name(layer, role) for layer in range(DEPTH) for role in roles]
    weights = EditedWeights(loaded.model, loaded.architecture, names)
    for name in names:
        assert torch.equal(checkpoint.weight(name), weights.original(name))


@families
def test_context_tokens_are_the_inputs_at_all_tokens_of_the_prompt_but_the_subjects_last(family):
    """Against one plain forward pass a fact, its tokens picked out one by one."""
    loaded = tiny(family)
    encoder, chosen = Encoder(loaded.tokenizer), facts(4)
    names = [loaded.architecture.module_name(layer, "down") for layer in (0, LAYER)]
    found = context_token_keys(loaded, chosen, names, encoder, 32)
    expected: list[list[torch.Tensor]] = [[] for _ in names]
    for fact in chosen:
        ids = encoder.encode(fact.filled_prompt).ids
        cut, subject = encoder.subject_end(*fill("{}", fact))
        assert ids[: len(cut)] == cut
        modules = [loaded.model.get_submodule(name) for name in names]
        seen, _ = activations(loaded, TokenBatch.of([ids], loaded.device), modules)
        for columns, inputs in zip(expected, seen, strict=True):
            columns += [vector for position, vector in enumerate(inputs[0]) if position != subject]
    for ours, columns in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, torch.stack(columns, dim=1), atol=1e-5, rtol=1e-4)


def test_long_answers_take_steps_in_proportion_and_short_ones_as_before():
    settings = TargetSettings(rule="normalised")
    assert [settings.steps_for(tokens) for tokens in (1, 8, 10, 25)] == [13, 13, 26, 65]
    assert TargetSettings().steps_for(25) == 13, "Adam's are as published"
    assert [settings.most_steps(tokens) for tokens in (1, 10)] == [39, 78], "where the answer is not likely by then"
    assert TargetSettings().most_steps(25) == 13


@pytest.mark.parametrize("patience", [1, 3])
def test_a_fact_that_is_hard_to_find_is_given_time_and_others_are_not(patience):
    """With no loss to stop at, what is likely by the usual number of steps ends there, and what is not goes on, to the limit or until it is."""
    loaded, chosen = tiny("llama"), facts(4)
    settings = TargetSettings(rule="normalised", lr=0.1, steps=4, stop_loss=0.0, patience=patience)
    found = optimise_targets(loaded, chosen, TEMPLATES, LAYER, settings)
    for losses in found.losses:
        assert 4 <= len(losses) <= 4 * patience
        late = losses[3:]
        assert len(late) == 1 or all(loss >= 0.1 for loss in late[:-1]), "none goes on that was likely"
        assert len(losses) == 4 * patience or losses[-1] < 0.1
    assert any(len(losses) > 4 for losses in found.losses) == (patience > 1)


def test_a_target_is_optimised_in_some_of_the_contexts_which_its_own_words_choose():
    templates = ["{}", *(f"{word} {{}}" for word in ("One.", "Two.", "Three.", "Four.", "Five."))]
    chosen = facts(12)
    settings = TargetSettings(rule="normalised", lr=0.1, steps=3, contexts=3)
    used = [settings.templates_of(fact, templates) for fact in chosen]
    assert all(some[0] == "{}" and len({*some}) == 3 and {*some} <= {*templates} for some in used)
    assert {template for some in used for template in some} == {*templates}, "by turns, all of them"
    for contexts in (None, 6, 9):
        assert settings.model_copy(update={"contexts": contexts}).templates_of(chosen[0], templates) == templates
    assert settings.model_copy(update={"contexts": 1}).templates_of(chosen[0], templates) == ["{}"]
    assert settings.templates_of(chosen[0], ["{}"]) == ["{}"], "a run without sampled templates"
    loaded = tiny("llama")
    together = optimise_targets(loaded, chosen[:3], templates, LAYER, settings)
    for number, fact in enumerate(chosen[:3]):
        alone = optimise_targets(
            loaded, [fact], used[number], LAYER, TargetSettings(rule="normalised", lr=0.1, steps=3)
        )
        torch.testing.assert_close(together.deltas[:, number], alone.deltas[:, 0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("contexts", ["mean", "each"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj"])
def test_carried_values_are_those_of_the_models_own_pass_with_the_target_below(family, contexts):
    """Layer by layer the residual is what a plain pass with δ at the first edited layer holds there, less what the model holds now."""
    loaded, layers = tiny(family), [0, 1, LAYER]
    weights = edited(loaded.model, layers)
    feed = FromTargets(contexts=contexts, values="each")
    source = OptimisedTargets(loaded, weights, layers, TEMPLATES, feed, TargetSettings(lr=0.3, steps=3), 256)
    chosen = facts()
    source.begin(chosen)
    encoder, deltas = Encoder(loaded.tokenizer), source.targets.deltas
    assert float(deltas.norm()) > 0

    def seen(fact, template, layer, delta=None):
        ids, place = encoder.at_subject(fact, template)
        found = []

        def shift(module, args, output):
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            hidden[:, place] += delta
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        def keep(module, args, output):
            found.append((output[0] if isinstance(output, tuple) else output)[0, place].clone())

        blocks = loaded.architecture.decoder_layers(loaded.model)
        hooks = [] if delta is None else [blocks[layers[0]].register_forward_hook(shift)]
        hooks.append(blocks[layer].register_forward_hook(keep))
        loaded.model(input_ids=torch.tensor([ids]), use_cache=False)
        for hook in hooks:
            hook.remove()
        return found[0]

    said = TEMPLATES if contexts == "each" else TEMPLATES[:1]
    shares = [0.5, *[0.5 / (len(said) - 1)] * (len(said) - 1)] if contexts == "each" else [1.0]
    wanted = {
        layer: [seen(fact, t, layer, deltas[:, n]) for n, fact in enumerate(chosen) for t in said] for layer in layers
    }
    for index, layer in enumerate(layers):
        keys, residual = source.layer(index)
        now = [seen(fact, t, layer) for fact in chosen for t in said]
        expected = [(w - h) * share**0.5 for w, h, share in zip(wanted[layer], now, shares * len(chosen), strict=True)]
        torch.testing.assert_close(residual, torch.stack(expected, 1), rtol=1e-3, atol=1e-4)
        weights.add(weights.names[index], LowRankUpdate(residual, 0.3 * torch.linalg.pinv(keys)))


def test_one_layer_carries_nothing():
    loaded = tiny("llama")
    found = []
    for values in ("last", "each"):
        weights = edited(loaded.model, [LAYER])
        feed = FromTargets(contexts="each", values=values)
        source = OptimisedTargets(loaded, weights, [LAYER], TEMPLATES, feed, TargetSettings(lr=0.3, steps=3), 256)
        source.begin(facts())
        found.append(source.layer(0))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_is_given_by_the_name_that_the_model_has(name):
    """transformers renamed the argument in 5.24, and warns a user who gives it by the old name."""
    model = nn.Module()
    model.forward = eval(f"lambda input_ids, {name}=None, use_cache=None: None")
    assert with_cache(model, "kept") == {name: "kept", "use_cache": True}
