"""Rows to compare with: retrieval in the prompt, the model as it is, and fine-tuning in minibatches."""

import math

import pytest
import torch

from conftest import fact_records
from families import save_tiny, tiny
from sphere_edit import Editor
from sphere_edit.editing.losses import FromLoss, TargetLoss
from sphere_edit.editing.methods.locft import LocFineTune
from sphere_edit.editing.targets import TargetSettings
from sphere_edit.evaluation.retrieval import Index, sentence, with_retrieved
from sphere_edit.evaluation.scores import questions
from sphere_edit.facts.fact import make_fact
from sphere_edit.facts.readers import facts_from
from sphere_edit.models.weights import EditedWeights
from sphere_edit.progress import Quiet


def test_bm25_is_its_formula():
    documents = [
        "The river of Paris is the Seine.",
        "Paris, Paris!",
        "Vienna stands in Austria.",
        "The capital of France",
    ]
    words = [["the", "river", "of", "paris", "is", "the", "seine"], ["paris", "paris"],
             ["vienna", "stands", "in", "austria"], ["the", "capital", "of", "france"]]  # fmt: skip
    found = Index(documents).scores("the Paris in question, the")
    mean = sum(map(len, words)) / 4
    for number, document in enumerate(words):
        expected = 0.0
        for word in ["the", "paris", "in", "question", "the"]:
            having = sum(word in other for other in words)
            rarity = math.log(1 + (4 - having + 0.5) / (having + 0.5))
            f = document.count(word)
            expected += rarity * f * 2.5 / (f + 1.5 * (0.25 + 0.75 * len(document) / mean))
        assert found.get(number, 0.0) == pytest.approx(expected, rel=1e-12)
    assert Index(documents).nearest("of paris", 9) == [documents[1], documents[0], documents[3]]
    assert Index(documents).nearest("nothing here", 2) == []
    assert Index([]).nearest("paris", 2) == []


def test_every_prompt_stands_behind_what_is_found_for_it():
    facts = [
        make_fact("{} stands in", "Vienna", "Big Ben", "London", paraphrases=["To see Big Ben, travel to"],
                  neighbors=[{"prompt": "The Louvre is in", "answer": "Paris"}],
                  portability=[{"prompt": "Near Big Ben flows a river, named", "answers": ["Danube"]}]),
        make_fact("The capital of {} is", "Rome", "France", "Paris"),
    ]  # fmt: skip
    first, second = with_retrieved(facts, 1)
    assert first.filled_prompt == "Big Ben stands in Vienna.\nBig Ben stands in"
    assert first.paraphrases == ("Big Ben stands in Vienna.\nTo see Big Ben, travel to",)
    assert first.neighbors[0].prompt == "The capital of France is Rome.\nThe Louvre is in", (
        "neighbours are searched too"
    )
    assert first.portability[0].prompt == "Big Ben stands in Vienna.\nNear Big Ben flows a river, named"
    assert second.filled_prompt == "The capital of France is Rome.\nThe capital of France is"
    two, _ = with_retrieved(facts, 2)
    assert two.filled_prompt.endswith("Big Ben stands in Vienna.\nBig Ben stands in"), "the best stands last"
    for asked, plain in zip(questions(first), questions(facts[0]), strict=True):
        assert (asked.right, asked.other) == (plain.right, plain.other), "what is right stays"
    assert sentence(make_fact("Who leads {}?", "Ada!", "Rome")) == "Who leads Rome? Ada!"


def test_a_run_without_edits_measures_retrieval_beside_the_unedited_model(tmp_path):
    model = save_tiny("llama", tmp_path / "model")
    options = {"method": "none", "batch_size": 3, "moments": {"sampled_tokens": 512}}
    scores = {}
    for count in (0, 1):
        evaluation = {"generation": "off", "retrieval": count}
        editor = Editor.from_pretrained(
            model, tmp_path / str(count), reporter=Quiet(), evaluation=evaluation, **options
        )
        before = {name: value.clone() for name, value in editor.model.state_dict().items()}
        metrics = editor.edit(fact_records(6))
        assert all(torch.equal(value, before[name]) for name, value in editor.model.state_dict().items())
        assert metrics["edited"]["perplexity"] == metrics["unedited"]["perplexity"]
        scores[count] = [row["edited"]["rewrite"]["nll_right"] for row in metrics["per_fact"]]
        unedited = [row["unedited"]["rewrite"]["nll_right"] for row in metrics["per_fact"]]
        assert (scores[count] == unedited) == (count == 0)
        editor.close()
        Editor.open(tmp_path / str(count), Quiet()).rollback(1)


def test_minibatches_take_every_fact_once_an_epoch_in_another_order_each_time():
    loaded = tiny("llama", torch.float64)
    name = loaded.architecture.module_name(1, "down")
    weights = EditedWeights(loaded.model, loaded.architecture, [name])
    facts = facts_from(fact_records(7)).facts

    def source(minibatch):
        made = TargetLoss(loaded, weights, [1], ["{}"], FromLoss(minibatch), TargetSettings(), 64)
        made.begin(facts)
        return made

    at = {name: weights.original(name).double()}
    whole, parts = source(None), source(3)
    assert (whole.rounds, parts.rounds) == (1, 3)
    value, gradients = whole.objective(at)
    epochs = [[parts.objective(at) for _ in range(3)] for _ in range(2)]
    for epoch in epochs:
        sizes = [3, 3, 1]
        assert sum(n * loss for n, (loss, _) in zip(sizes, epoch, strict=True)) / 7 == pytest.approx(value, rel=1e-6)
        mean = sum(n * found[name] for n, (_, found) in zip(sizes, epoch, strict=True)) / 7
        torch.testing.assert_close(mean, gradients[name], rtol=1e-4, atol=1e-7)
    assert [loss for loss, _ in epochs[0]] != [loss for loss, _ in epochs[1]]
    assert parts.report().evaluations == [6]


def test_locft_is_adams_path_over_the_minibatches():
    target = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    class Quadratic:
        rounds = 2
        calls = 0

        def __call__(self, weights):
            self.calls += 1
            part = slice(0, 2) if self.calls % 2 else slice(2, 4)
            gradient = torch.zeros_like(target)
            gradient[:, part] = weights["w"][:, part] - target[:, part]
            return 1.0, {"w": gradient}

    start = torch.zeros_like(target)
    found = LocFineTune(lr=0.1, epochs=3).descend(Quadratic(), {"w": start})["w"].dense()
    moved, first, second, objective = start.clone(), 0, 0, Quadratic()
    for step in range(1, 7):
        gradient = objective({"w": moved})[1]["w"]
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        moved = moved - 0.1 * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
    torch.testing.assert_close(found, moved, rtol=1e-9, atol=1e-12)

    objective = Quadratic()
    assert float(LocFineTune(epochs=9, stop_loss=2.0).descend(objective, {"w": start})["w"].norm()) > 0
    assert objective.calls == 2, "one epoch, whose loss is low enough"
