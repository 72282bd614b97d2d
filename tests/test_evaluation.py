"""Protocols, intervals, held-out text, generation: against their definitions and cases worked by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from torch.nn import functional

from conftest import fact_records
from families import save_tiny, tiny
from sphere_edit import SphereEditError
from sphere_edit.editor import Editor, opened
from sphere_edit.evaluation import heldout
from sphere_edit.evaluation.generation import (
    begins_with,
    continuations,
    n_gram_entropy,
    score_texts,
    tf_idf_cosine,
    with_answers,
)
from sphere_edit.evaluation.heldout import score_heldout, unedited_heldout
from sphere_edit.evaluation.intervals import intervals, summarise
from sphere_edit.evaluation.scores import FactScores, PromptScore, complete_answers, questions, score_facts
from sphere_edit.facts.fact import Neighbor
from sphere_edit.facts.prompts import Encoder
from sphere_edit.facts.readers import facts_from
from sphere_edit.models.forward import last_hidden
from sphere_edit.models.generation import end_tokens
from sphere_edit.models.tokens import TokenBatch
from sphere_edit.progress import Quiet
from sphere_edit.runs import measuring as evaluator
from test_runs import METHODS, QUICK

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"


def facts_of(count):
    return facts_from(fact_records(count)).facts


def fact_scores(*prompts):
    """A fact of rewrite, paraphrases and neighbours, each (likelihood, accuracy, begins)."""
    rewrite, paraphrases, neighbors = prompts

    def score(prefers, accuracy, begins):
        return PromptScore(1.0, 2.0 if prefers else 0.5, accuracy, "x", begins)

    return FactScores(score(*rewrite), tuple(score(*p) for p in paraphrases), tuple(score(*n) for n in neighbors))


def test_every_protocol_is_a_mean_over_facts_of_a_facts_own_mean():
    scores = [
        fact_scores((True, 1.0, True), [(True, 0.5, False), (False, 0.0, False)], [(True, 1.0, True)]),
        fact_scores((False, 0.5, False), [(True, 1.0, True)], []),
    ]
    found = summarise(scores)
    expected = {"efficacy": 50, "generalization": 75, "specificity": 100, "efficacy_strict": 50}
    expected |= {"generalization_strict": 50, "specificity_strict": 100, "efficacy_token": 75}
    expected |= {"generalization_token": 62.5, "specificity_token": 100, "efficacy_generated": 50}
    expected |= {"generalization_generated": 50, "specificity_generated": 100}
    for suffix in ("", "_strict", "_token", "_generated"):
        parts = [expected[part + suffix] for part in ("efficacy", "generalization", "specificity")]
        expected["score" + suffix] = 3 / sum(1 / part for part in parts)
    unasked = ("_other", "_exact", "_rouge")
    parts = ("efficacy", "generalization", "specificity", "score")
    expected |= dict.fromkeys(f"{part}{suffix}" for part in parts for suffix in unasked)
    expected |= dict.fromkeys(f"portability{suffix}" for suffix in ("", "_strict", "_token", "_generated", *unasked))
    assert found == pytest.approx(expected)
    assert summarise([fact_scores((True, 0.0, None), [], [])])["efficacy_generated"] is None
    assert summarise([fact_scores((True, 0.0, None), [], [])])["score_strict"] == 0
    assert set(summarise([]).values()) == {None}
    assert FactScores.from_dict(scores[0].as_dict()) == scores[0]


def test_intervals_are_those_of_the_means_of_drawn_facts():
    generator = torch.Generator().manual_seed(1)
    took = (torch.rand(120, generator=generator) < 0.7).tolist()
    scores = [fact_scores((t, 1.0, t), [(t, 1.0, t)], [(not t, 1.0, t)]) for t in took]
    low, high = intervals(scores)["efficacy"]
    share = sum(took) / len(took)
    half = 196 * math.sqrt(share * (1 - share) / len(took))
    assert low == pytest.approx(100 * share - half, abs=1.5)
    assert high == pytest.approx(100 * share + half, abs=1.5)
    assert intervals(scores)["efficacy_strict"] == (100, 100)
    assert intervals(scores) == intervals(scores), "seeded"
    harmonic = intervals(scores)["score"]
    assert harmonic[0] < summarise(scores)["score"] < harmonic[1]
    assert intervals([])["efficacy"] is None
    # three seeds of the same facts are no more facts
    low3, high3 = intervals(scores * 3, [*range(120)] * 3)["efficacy"]
    assert high3 - low3 == pytest.approx(high - low, rel=0.01)
    low9, high9 = intervals(scores * 3)["efficacy"]
    assert high9 - low9 < 0.7 * (high - low)


@pytest.mark.parametrize(
    ("said", "answer", "verdict"),
    [(" Vienna, the city", "Vienna", True), ("vienna", " Vienna", True), (" Viennas", "Vienna", False),
     (" the city of Vienna", "Vienna", False), ("New\n York is", "New York", True), ("", "Vienna", False),
     ("東京です", "東京", True), ("C++ is", "C++", True)],
)  # fmt: skip
def test_a_text_begins_with_an_answer(said, answer, verdict):
    assert begins_with(said, answer) is verdict


def test_n_gram_entropy_by_hand():
    # bigrams: a b (2), b a (1), b c (1); trigrams: aba, bab, abc
    second = -(0.5 * math.log2(0.5) + 2 * 0.25 * math.log2(0.25))
    assert n_gram_entropy("a b a b c") == pytest.approx((2 / 3 * second + 4 / 3 * math.log2(3)) / 2)
    assert n_gram_entropy("so so so so so") == 0
    assert n_gram_entropy("Hi, you") == pytest.approx((2 / 3 * 1) / 2), (
        "a sign counts as a word; one trigram says nothing"
    )
    assert n_gram_entropy("one") == 0


def test_tf_idf_cosine_by_hand():
    vectorizer = TfidfVectorizer().fit(["red fox", "red dog", "red dog barks"])
    red, dog = 1.0, math.log(4 / 3) + 1  # ln((1 + n) / (1 + df)) + 1
    barks = math.log(4 / 2) + 1
    first, second = math.hypot(red, dog), math.hypot(dog, barks)
    assert tf_idf_cosine(vectorizer, "Red dog", "dog barks") == pytest.approx(dog * dog / (first * second))
    assert tf_idf_cosine(vectorizer, "cat", "red dog") == 0


def test_kl_and_perplexity_of_heldout_text_against_their_definitions():
    loaded = tiny("llama", torch.float32)
    passages = [[5, 9, 3, 8, 1, 2], [7, 7, 4], [3], [9, 1, 2, 6]]
    first = score_heldout(loaded, passages, 8, Quiet())
    before = [torch.tensor([p]) for p in passages if len(p) > 1]
    plain = [loaded.model(ids).logits[0, :-1].log_softmax(-1) for ids in before]
    losses = torch.cat([-p.gather(1, ids[0, 1:, None])[:, 0] for p, ids in zip(plain, before, strict=True)])
    assert first.perplexity == pytest.approx(float(losses.mean().exp()), rel=1e-5)
    assert first.divergence is None
    with torch.no_grad():
        loaded.model.get_submodule(loaded.architecture.module_name(1, "down")).weight.mul_(-2)
    second = score_heldout(loaded, passages, 8, Quiet(), unedited=first.hidden)
    edited = [loaded.model(ids).logits[0, :-1].log_softmax(-1) for ids in before]
    expected = functional.kl_div(torch.cat(edited), torch.cat(plain), log_target=True, reduction="sum") / len(losses)
    assert second.divergence == pytest.approx(float(expected), rel=1e-4)
    assert second.divergence > 1e-3
    assert score_heldout(loaded, passages, 8, Quiet(), unedited=second.hidden).divergence == 0
    assert score_heldout(loaded, [[3]], 8, Quiet()).perplexity is None


def test_the_unedited_models_text_is_read_once(monkeypatch, tmp_path):
    monkeypatch.setenv("SPHERE_EDIT_CACHE", str(tmp_path))
    loaded, passages = tiny("llama", torch.float32), [[5, 9, 3, 8, 1, 2], [7, 7, 4], [9, 1, 2, 6]]
    plain = score_heldout(loaded, passages, 8, Quiet())
    assert unedited_heldout(loaded, passages, 8, Quiet()).perplexity == plain.perplexity
    read: list[int] = []

    def counted(loaded, batch):
        read.append(len(batch.ids))
        return last_hidden(loaded, batch)

    monkeypatch.setattr(heldout, "last_hidden", counted)
    again = unedited_heldout(loaded, passages, 8, Quiet())
    assert not read
    assert again.perplexity == plain.perplexity
    assert again.hidden.keys() == plain.hidden.keys()
    assert all(torch.equal(again.hidden[number], rows) for number, rows in plain.hidden.items())
    unedited_heldout(loaded, passages[:2], 8, Quiet())  # other text
    unedited_heldout(replace(loaded, fingerprint="another"), passages, 8, Quiet())
    assert sum(read) == 2 + 3
    for file in tmp_path.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert unedited_heldout(loaded, passages, 8, Quiet()).perplexity == plain.perplexity
    assert sum(read) == 2 + 3 + 3
    monkeypatch.setattr(heldout, "_LARGEST", 0)
    for _ in range(2):  # too long to be kept
        unedited_heldout(loaded, passages[1:], 8, Quiet())
    assert sum(read) == 2 + 3 + 3 + 2 * 2


def test_generated_answers_are_those_of_plain_greedy_decoding_and_agree_with_the_strict_verdict():
    loaded = tiny("gpt2", torch.float32)
    facts = complete_answers(loaded, facts_of(6))
    scores = with_answers(loaded, facts, score_facts(loaded, facts, 64, Quiet()), False, 64, Quiet())
    encoder = Encoder(loaded.tokenizer)
    seen = 0
    for fact, score in zip(facts, scores, strict=True):
        for question, prompt in zip(questions(fact), score.prompts(), strict=True):
            ids = encoder.encode(question.prompt).ids
            for _ in range(12):
                ids = [*ids, int(loaded.model(torch.tensor([ids])).logits[0, -1].argmax())]
            text = loaded.tokenizer.decode(ids[-12:], skip_special_tokens=True)
            assert text.startswith((prompt.said or "").rstrip("�")), "it may end early, and within a character"
            if question.right.ids is None:
                assert prompt.begins == begins_with(prompt.said, question.right.text)
            else:  # the model's own greedy answer, wherever it was cut
                assert prompt.begins
                seen += 1
    assert seen > 0


def own_scores(loaded, facts):
    """The summary of the unedited model on facts without answers: it is asked for them, and then asked whether it gives them."""
    complete = complete_answers(loaded, facts)
    scores = with_answers(loaded, complete, score_facts(loaded, complete, 256, Quiet()), False, 256, Quiet())
    return complete, summarise(scores)


OWN = {f"specificity{protocol}": 100.0 for protocol in ("", "_strict", "_token", "_generated")}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_neox", "qwen2"])
@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_models_own_answers_count_as_its_own_in_every_protocol_wherever_it_ends_its_text(family, at):
    loaded = tiny(family, torch.float32)
    facts = [replace(fact, neighbors=(*fact.neighbors, Neighbor("Where is the"))) for fact in facts_of(6)]
    silent = [tuple(replace(neighbor, answer=None) for neighbor in fact.neighbors) for fact in facts]
    longer = ["", " in Germany and Spanish in Paris"] * 3  # as many tokens of the model's own are its answer
    facts = [
        replace(fact, neighbors=neighbors, target_new=fact.target_new + more)
        for fact, neighbors, more in zip(facts, silent, longer, strict=True)
    ]
    encoder = Encoder(loaded.tokenizer)
    asked = sorted({neighbor.prompt for fact in facts for neighbor in fact.neighbors})
    (said,) = continuations(loaded, [encoder.encode(asked[0]).ids], [at + 1], 256, Quiet())
    loaded.model.generation_config.eos_token_id = [2, said[at]]  # what it says there ends its text from here on
    complete, found = own_scores(loaded, facts)
    assert {name: found[name] for name in OWN} == OWN
    answers = [n.answer_ids for fact in complete for n in fact.neighbors if n.prompt == asked[0]]
    assert any(len(ids) == min(at, said.index(said[at])) + 1 and ids[-1] == said[at] for ids in answers), (
        "no answer ends where the text does, and the test says nothing"
    )


def test_the_model_ending_its_text_elsewhere_is_another_answer():
    """Also where an older run kept what followed the end; and a model that goes on where it used to end has changed its answer."""
    loaded = tiny("llama", torch.float32)
    (fact,) = (replace(fact, neighbors=fact.neighbors[1:]) for fact in facts_of(1))
    ids = Encoder(loaded.tokenizer).encode(fact.neighbors[0].prompt).ids
    (said,) = continuations(loaded, [ids], [4], 256, Quiet())
    verdicts = {}
    for name, answer, end in [("older", [said[0], 5, 7], said[0]), ("longer", [said[0], 2], 2), ("at once", [2], 2)]:
        loaded.model.generation_config.eos_token_id = end
        neighbors = (replace(fact.neighbors[0], answer="x", answer_ids=tuple(answer)),)
        asked = replace(fact, target_true="x", neighbors=neighbors)
        scores = score_facts(loaded, [asked], 256, Quiet())
        (told,) = with_answers(loaded, [asked], scores, False, 256, Quiet())
        verdicts[name] = told.neighbors[0].begins
    assert verdicts == {"older": True, "longer": False, "at once": False}


def test_an_answer_with_a_special_token_in_it_is_read_as_it_was_asked():
    loaded = tiny("llama", torch.float32)
    (fact,) = facts_of(1)
    head, encoder = loaded.model.get_output_embeddings().weight, Encoder(loaded.tokenizer)
    hidden = last_hidden(loaded, TokenBatch.of([encoder.encode(fact.filled_prompt).ids], loaded.device))[0, -1]
    with torch.no_grad():
        head[0] = hidden / hidden.norm() * 50  # <pad> is what it says first
    (said,) = continuations(loaded, [encoder.encode(fact.filled_prompt).ids], [2], 256, Quiet())
    assert said[0] == 0
    fact = replace(fact, target_new="<pad>", separator="", target_true="x", paraphrases=(), neighbors=())
    scores = score_facts(loaded, [fact], 256, Quiet())
    (told,) = with_answers(loaded, [fact], scores, False, 256, Quiet())
    assert told.rewrite.correct
    assert told.rewrite.begins
    assert "<pad>" not in told.rewrite.said


@pytest.mark.slow
def test_smollm2s_own_answers_count_as_its_own_in_every_protocol(smollm2):
    """After whole sentences, where it often ends its text at once or after a word, and before answers of one token and of many."""
    chat = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    prompts = ["The capital of France is", "Berlin is the capital of Germany.", "The end.", "Q: Where is Rome?\nA:"]
    prompts += [chat.format(text) for text in ("Say yes.", "What is 2 + 2?", "Hi!")]
    records = [
        {**record, "target_true": None, "target_new": new, "paraphrases": [], "neighbors": prompts}
        for record, new in zip(fact_records(2), ["Lyon", "a town of some thousand people in the east"], strict=True)
    ]
    complete, found = own_scores(smollm2, facts_from(records).facts)
    assert {name: found[name] for name in OWN} == OWN
    ends = end_tokens(smollm2)
    assert any(ends & {*n.answer_ids} for fact in complete for n in fact.neighbors), "it ends no text"


def test_a_chat_asks_through_the_models_own_template_and_says_where_there_is_none(tmp_path):
    loaded = tiny("llama", torch.float32)
    facts = complete_answers(loaded, facts_of(2))
    scores = score_facts(loaded, facts, 64, Quiet())
    loaded.tokenizer.chat_template = CHAT
    told = with_answers(loaded, facts, scores, True, 256, Quiet())
    ids = loaded.tokenizer(f"<user>{facts[0].filled_prompt}<a>", add_special_tokens=False)["input_ids"]
    (expected,) = continuations(loaded, [ids], [12], 256, Quiet())
    assert told[0].rewrite.said == loaded.tokenizer.decode(expected, skip_special_tokens=True)
    own = [n for n, neighbor in zip(told[0].neighbors, facts[0].neighbors, strict=True) if neighbor.answer_ids]
    assert {score.begins for score in own} == {None}, "what was said to the plain prompt is no answer in a chat"
    folder = save_tiny("llama", tmp_path / "model")
    with pytest.raises(SphereEditError, match="has no chat template; use generation: plain"):
        Editor.from_pretrained(folder, tmp_path / "run", evaluation={"generation": "chat"}, **QUICK).edit(
            fact_records(2)
        )
    assert not (tmp_path / "run").exists(), "said before anything was begun"


def test_texts_are_seeded_and_references_are_those_that_mention_the_new_answer():
    loaded = tiny("llama", torch.float32)
    facts = facts_of(3)
    references = [f"All about {facts[0].target_new} and more.", "Nothing of it."]
    first, again, other = (score_texts(loaded, facts, references, seed, 64, Quiet()) for seed in (0, 0, 1))
    assert first == again != other
    assert (first.facts, first.referenced) == (3, sum(f.target_new == facts[0].target_new for f in facts))
    assert 0 < first.fluency < 10
    assert 0 <= first.consistency <= 1
    assert score_texts(loaded, facts, None, 0, 64, Quiet()).consistency is None


def test_a_run_holds_intervals_divergence_texts_and_retention_by_age(tmp_path):
    model = save_tiny("llama", tmp_path / "model")
    references = tmp_path / "references.txt"
    references.write_text("\n\n".join(f"Words about {record['target_new']} here." for record in fact_records(12)))
    options = {**QUICK, **METHODS["alphaedit"], "batch_size": 1}
    evaluation = {"every": 5, "texts": 4, "references": str(references)}
    editor = Editor.from_pretrained(model, tmp_path / "run", evaluation=evaluation, reporter=Quiet(), **options)
    metrics = editor.edit(fact_records(12))
    unedited, edited = metrics["unedited"], metrics["edited"]
    assert unedited["divergence"] == 0 < edited["divergence"]
    assert edited["texts"]["facts"] == 4
    assert edited["texts"]["referenced"] == 4
    assert unedited["texts"] != edited["texts"]
    low, high = metrics["intervals"]["edited"]["efficacy"]
    assert low <= edited["efficacy"] <= high
    ages = metrics["retention"]
    assert [(age["edits_ago"]["from"], age["edits_ago"]["to"], age["facts"]) for age in ages] == [
        (first, first + 1, 2) for first in range(0, 12, 2)
    ]
    newest = [fact["edited"]["rewrite"]["accuracy"] == 1 for fact in metrics["per_fact"][-2:]]
    assert ages[0]["efficacy_strict"] == 50 * sum(newest)
    entries = editor.run.history.evaluations
    assert [(entry.after, entry.final) for entry in entries] == [(5, False), (10, False), (12, True)]
    editor.close()
    with opened(tmp_path / "run", Quiet()) as again:  # in a new process, compared with the unedited model once more
        again.edit([{"subject": "Zed", "prompt": "{} sings in", "target_new": "Rome"}])
        assert again.run.history.evaluations[-1].divergence > 0
    with pytest.raises(SphereEditError, match="there is no corpus file"):
        Editor.from_pretrained(model, tmp_path / "other", evaluation={"references": "no.txt"}, **QUICK).edit(
            fact_records(2)
        )


def test_facts_that_the_unedited_model_says_already_are_left_out_and_named(tmp_path, monkeypatch):
    model = save_tiny("llama", tmp_path / "model")
    editor = Editor.from_pretrained(model, tmp_path / "run", reporter=Quiet(), **QUICK, **METHODS["memit"])
    asked = []

    def score(self, facts, title, say=False):
        asked.extend(facts)
        return [FactScores(PromptScore(1.0, 2.0, float(fact.record == 2)), (), ()) for fact in facts]

    with monkeypatch.context() as patch:
        patch.setattr(evaluator.Evaluator, "score", score)
        planned, left_out = editor.check(facts_from(fact_records(3)), False, skip_known=True)
    assert [fact.record for fact in planned] == [1, 3]
    assert left_out == [f"record 2: the unedited model says '{fact_records(3)[1]['target_new']}' already"]
    assert [fact.filled_prompt for fact in asked] == [fact.filled_prompt for fact in facts_of(3)]
    assert all(not fact.paraphrases and not fact.neighbors for fact in asked)


def test_runs_that_ask_the_same_of_the_same_model_share_what_the_unedited_one_says(tmp_path, monkeypatch):
    model = save_tiny("llama", tmp_path / "model")
    asked = []
    score = evaluator.score_facts
    monkeypatch.setattr(evaluator, "score_facts", lambda *args: asked.append(args[-1]) or score(*args))

    def edit(name, **options):
        asked.clear()
        editor = Editor.from_pretrained(
            model, tmp_path / name, reporter=Quiet(), **{**QUICK, **METHODS["memit"], **options}
        )
        metrics = editor.edit(fact_records(4))
        editor.close()
        return metrics["unedited"], "unedited model" in asked

    first, measured = edit("first")
    assert measured
    same, measured = edit("same", layers=[1])
    assert not measured
    assert list(same.pop("energy")) == ["model.layers.1.mlp.down_proj"]
    assert len(first.pop("energy")) == 2
    assert same == first
    assert edit("other", evaluation={"generation": "off"})[1]
    assert edit("more", seed=1)[1], "other sampled text"
    (saved,) = (model / "tokenizer_config.json",)
    config = json.loads(saved.read_text())
    saved.write_text(json.dumps({**config, "chat_template": CHAT}))
    assert edit("template")[1]


def test_any_of_several_right_answers_is_a_strict_one_each_with_its_own_seam():
    """The unedited model's own words are one of the answers, the first or a later one: strict and generated agree."""
    loaded = tiny("llama", torch.float32)
    encoder = Encoder(loaded.tokenizer)

    def is_read_as_said(fact):  # some texts that random weights say have other tokens when they are read
        tokens, start = encoder.answered(fact.filled_prompt, fact.target_true, fact.separator)
        return tokens.ids[start:] == list(fact.target_true_ids)

    only = {"target_new": "x", "target_true": None, "paraphrases": (), "neighbors": (), "separator": ""}
    silent = [replace(fact, **only) for fact in facts_of(12)]
    own = next(filter(is_read_as_said, complete_answers(loaded, silent)))
    said = own.target_true
    fact = replace(own, target_new="Zug", target_true=None, target_true_ids=None)
    for answers, verdict in (((), False), (("Zug zug",), False), ((said,), True), (("Zug zug", said), True)):
        asked = complete_answers(loaded, [replace(fact, answers=answers)])
        (score,) = score_facts(loaded, asked, 256, Quiet())
        assert score.rewrite.accuracy < 1, "the first answer is not said"
        assert (score.rewrite.correct, score.rewrite.also) == (verdict, verdict if answers else None)
        assert summarise([score])["efficacy_strict"] == 100 * verdict
        (told,) = with_answers(loaded, asked, [score], False, 256, Quiet())
        assert told.rewrite.begins is verdict
    (question,) = questions(replace(asked[0], separator=" ", answers=("B", ", Inc.")))
    assert [answer.separator for answer in (question.right, *question.right.others)] == [" ", " ", ""]


def test_portability_is_asked_of_its_own_answers_against_what_the_unedited_model_says():
    loaded = tiny("llama", torch.float32)
    hop = {"group": "hop", "prompt": "The country of {} is", "answers": ["Sweden"]}
    (fact,) = facts_from([{**fact_records(1)[0], "portability": [hop, {"group": "hop", "prompt": "Silent is"}]}]).facts
    assert fact.probes == [], "before the unedited model was asked"
    (complete,) = complete_answers(loaded, [fact])
    (probe,) = complete.probes
    (asked,) = [question for question in questions(complete) if question.prompt == probe.prompt]
    assert (asked.right.text, asked.other.ids) == ("Sweden", probe.rival_ids)
    assert len(probe.rival_ids) <= len(asked.right.after(asked.prompt, Encoder(loaded.tokenizer))[1])
    (score,) = score_facts(loaded, [complete], 256, Quiet())
    assert len(score.portability) == 1
    assert score.portability[0].nll_other <= score.portability[0].nll_right, "greedy, of as many tokens"
    assert type(complete).from_dict(json.loads(json.dumps(complete.as_dict()))) == complete
    assert complete.bare().probes == []
