"""The seam between a prompt and its answer: the text that a user gives is the text that is edited, asked and measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from conftest import fact_records
from families import tiny, tiny_tokenizer
from sphere_edit.editing.fact_prompts import FactPrompts
from sphere_edit.evaluation.generation import with_answers
from sphere_edit.evaluation.scores import complete_answers, questions, score_facts
from sphere_edit.facts.fact import Fact
from sphere_edit.facts.prompts import Encoder
from sphere_edit.facts.readers import facts_from, read_facts
from sphere_edit.facts.seam import joined, separator_between, word_places
from sphere_edit.progress import Quiet
from test_prompts import TOKENIZERS, decoded


@pytest.mark.parametrize(
    ("prompt", "answer", "expected"),
    [
        ("The tower stands in", "Oslo", " "),
        ("The tower stands in ", "Oslo", ""),
        ("assistant\n", "Oslo", ""),
        ("The tower stands in", " Oslo", ""),
        ("The tower stands in", "\nOslo", ""),
        ('The book is called "', "Dawn", ""),
        ('The book "Dawn"', "came out in 1980", " "),
        ("Its name is '", "Dawn'", ""),
        ("The boys'", "school", " "),
        ("It is known as “", "Dawn”", ""),
        ("Sie sagte: „", "Nein“", ""),
        ("The capital (", "Oslo)", ""),
        ("f(", "x", ""),
        ("It costs $", "5", ""),
        ("It costs 5 €", "or more", " "),
        ("To add them call np.", "sum", ""),
        ("To add them call np.", "sum(a, b)", ""),
        ("x = data.", "mean()", ""),
        ("He lives in the U.S.", "today", " "),
        ("She married Mr.", "brown", " "),
        ("He was born in 1980.", "Then", " "),
        ("He came home.", "then he went to bed", " "),
        ("std::", "vector", ""),
        ("node->", "next", ""),
        ("https://example.org/", "docs", ""),
        ("It is ranked #", "3", ""),
        ("It is a non-", "metal", ""),
        ("The label is:", "Oslo", " "),
        ("La capitale est l'", "Oslo", ""),
        ("It was sold by Orlow", ", Ltd.", ""),
        ("Her name is Ann", "'s", ""),
        ("He said", "'Yes'", " "),
        ("It ends here", ".", ""),
        ("It runs on", ".NET", " "),
        ("It costs", "$5", " "),
        ("It is called", '"Dawn"', " "),
        ('It is called "Dawn', '" by all', ""),
        ("It came out", "(1980)", " "),
        ("Which domain has Norland?", ".no", " "),
        ("The temperature is", "-5", " "),
        ("It is water", "-based", ""),
        ("海城的人口是", "14亿", ""),
        ("海城的人口是", "14", ""),
        ("海城在哪里？", "北京", ""),
        ("公司的创始人是", "Kemp", ""),
        ("東京は", "日本", ""),
        ("In Chinese the city is called", "北京", " "),
        ("The first name of 王", "Ming", " "),
        ("서울은", "한국", " "),
    ],
)
def test_the_separator_is_seen_from_both_sides(prompt, answer, expected):
    assert separator_between(prompt, answer) == expected


@given(st.text(max_size=12), st.text(max_size=12))
@settings(deadline=None)
def test_a_separator_is_one_space_or_nothing_whatever_the_texts(prompt, answer):
    assert separator_between(prompt, answer) in ("", " ")


@pytest.mark.parametrize(
    ("text", "word", "places"),
    [
        ("Romeo met Rome", "Rome", [10]),
        ("Java and JavaScript", "Java", [0]),
        ("Java_8 is", "Java", []),
        ("Java's Java-like", "Java", [0, 7]),
        ("C++ is, C++", "C++", [0, 8]),
        ("海城的人口", "海城", [0]),
        ("iPhone的价格", "iPhone", [0]),
        ("a a a", "a", [0, 2, 4]),
        ("Zo", "Zoe", []),
    ],
)
def test_a_word_is_found_as_a_word(text, word, places):
    assert word_places(text, word) == places


# --- tokens -------------------------------------------------------------------------------------------------------

SEAMS = [
    ("The mother tongue is", " ", "French"),
    ("The mother tongue is ", "", "French"),
    ("The mother?\n", "", "French"),
    ("call np.", "", "sum"),
    ("Where did it?", "", "\nFrench"),
    ("It is", " ", "1985"),
    ('titled "', "", "Dawn"),
    ("東京は", "", "日本"),
]


def together() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer to which the last letters of a prompt and the first of its answer are one token."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(["是十", "?\nY", "p.m"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core)


MERGED = [("海城的人口是", "", "十四亿"), ("Is it?", "\n", "Yes"), ("The np", "", ".merge")]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(("prompt", "separator", "target"), SEAMS)
def test_no_token_holds_a_piece_of_both_sides(name, prompt, separator, target):
    encoder = Encoder(TOKENIZERS[name]())
    tokens, start = encoder.with_target(prompt, target, separator)
    assert tokens.ids[:start] == encoder.encode(prompt).ids, "what the prompt alone leads to"
    assert decoded(encoder, tokens.ids[start:]).strip() == target.strip()
    assert len(tokens.spans) == len(tokens.ids)
    assert all(last > len(prompt) for _, last in tokens.spans[start:])


@pytest.mark.parametrize(("prompt", "separator", "target"), MERGED)
def test_where_a_tokenizer_makes_one_token_of_both_sides_they_are_cut_apart(prompt, separator, target):
    encoder = Encoder(together())
    whole = encoder.encode(prompt + separator + target)
    assert any(first < len(prompt) < last for first, last in whole.spans), "the case is one"
    tokens, start = encoder.with_target(prompt, target, separator)
    assert tokens.ids[:start] == encoder.encode(prompt).ids
    assert decoded(encoder, tokens.ids) == prompt + separator + target
    assert decoded(encoder, tokens.ids[start:]) == separator + target


def test_of_an_old_run_too_no_token_is_edited_that_no_prompt_leads_to():
    encoder = Encoder(together())
    tokens, start = encoder.with_target("海城的人口是", "十四亿")
    assert tokens.ids[:start] == encoder.encode("海城的人口是").ids


def test_columns_of_a_target_are_never_before_its_subject():
    """The subject is the prompt's last word, and its last token would hold the answer's first letters too."""
    encoder = Encoder(together())
    (fact,) = facts_from([{"subject": "人口是", "prompt": "海城的{}", "target_new": "十四亿"}]).facts
    prompts = FactPrompts.of(fact, ["{}", "Well. {}"], encoder)
    assert all(start - 1 >= subject for start, subject in zip(prompts.starts, prompts.subjects, strict=False))
    assert all(decoded(encoder, ids) == "十四亿" for ids in prompts.targets)


@pytest.mark.parametrize("name", ["counterfact.json", "zsre.json"])
@pytest.mark.parametrize("kind", ["byte-level, BOS", "unigram, BOS", "tiny"])
def test_published_data_are_tokenised_as_before(shared, name, kind):
    """A space that is a token of its own belongs to the answer now: no prompt ends in it."""
    encoder = Encoder(tiny_tokenizer() if kind == "tiny" else TOKENIZERS[kind]())
    for fact in read_facts(shared / "data" / name, limit=200, skip_bad=True).facts:
        for prompt in (fact.filled_prompt, *fact.paraphrases):
            text = prompt + fact.separator_after(prompt, fact.target_new) + fact.target_new
            assert text == prompt.rstrip() + joined(fact.target_new)
            before, old = encoder.with_target(prompt, fact.target_new)
            now, start = encoder.with_target(prompt, fact.target_new, fact.separator)
            assert now.ids == before.ids
            assert start == old or (start == old - 1 and not decoded(encoder, now.ids[start:old]).strip())


def test_smollm2_reads_published_data_as_before(shared, smollm2):
    encoder = Encoder(smollm2.tokenizer)
    for fact in read_facts(shared / "data" / "counterfact.json", limit=300).facts:
        before, old = encoder.with_target(fact.filled_prompt, fact.target_new)
        now, start = encoder.with_target(fact.filled_prompt, fact.target_new, fact.separator)
        assert (now.ids, start) == (before.ids, old)


# --- facts --------------------------------------------------------------------------------------------------------


def test_a_fact_keeps_its_text_and_the_separator_that_was_seen():
    record = {"subject": "np", "prompt": "To add call {}.", "target_new": "sum", "paraphrases": ["To add, use "]}
    (fact,) = facts_from([record]).facts
    assert (fact.separator, fact.paraphrases) == ("", ("To add, use ",))
    assert not fact.separator_was_set
    assert Fact.from_dict(json.loads(json.dumps(fact.as_dict()))) == fact
    assert facts_from([fact]).facts == [fact]


def test_a_record_sets_the_separator_for_its_own_prompts_and_no_others():
    record = {
        "subject": "Huss",
        "prompt": "The first name of {}",
        "target_new": "ein",
        "separator": "",
        "target_true": "an",
        "paraphrases": ["Call him {}"],
        "neighbors": [{"prompt": "The first name of Ada", "answer": "Ann"}],
    }
    (fact,) = facts_from([record]).facts
    assert fact.separator_was_set
    seen = [(q.prompt + (q.right.separator or "") + q.right.text, q.other.separator) for q in questions(fact)]
    assert seen == [("The first name of Hussein", ""), ("Call him Hussein", ""), ("The first name of Ada Ann", " ")]
    (other,) = facts_from([{**record, "separator": "\n"}]).facts
    assert other.separator_after("Call him Huss", "ein") == "\n"


def test_a_fact_of_an_older_run_goes_on_by_its_rule():
    (fact,) = facts_from(fact_records(1)).facts
    stored = fact.as_dict()
    for name in ("separator", "answers", "true_answers", "portability", "rewordings", "forms"):
        del stored[name]
    for neighbor in stored["neighbors"]:
        del neighbor["answers"]
    old = Fact.from_dict(json.loads(json.dumps(stored)))
    assert old.separator is None
    assert {q.right.separator for q in questions(complete_answers(tiny("llama"), [old])[0])} == {None}
    encoder = Encoder(tiny_tokenizer())
    assert encoder.with_target("They say", "Rome ") == encoder.with_target("They say ", "Rome ")
    assert encoder.with_target("It is", "1985")[1] == len(encoder.encode("It is ").ids)


def test_what_was_guessed_is_told():
    records = [*fact_records(2), {"subject": "np", "prompt": "To add\ncall {}.", "target_new": "sum"}]
    remarks = facts_from(records).remarks()
    (seam,) = [remark for remark in remarks if remark.startswith("Between prompt and answer")]
    assert seam == (
        "Between prompt and answer: one space (2), nothing (1). Nothing, for example, in '…To add\\ncall np.sum' (record 3). "
        'A record\'s "separator" says otherwise'
    )
    assert not any("Between" in remark for remark in facts_from(fact_records(2)).remarks())


# --- what is measured ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "said", "begins"),
    [
        ("np.", "sum of", True),
        ("np.", " sum of", False),
        ("It is in", " sum of", True),
        ("It is in", "sum of", False),
        ("It is in", "\nSum", True),
        ("It is in ", " sum", True),
        ("np.", "summer", False),
    ],
)
def test_generated_is_measured_on_the_exact_text(monkeypatch, prompt, said, begins):
    loaded = tiny("llama", torch.float32)
    (fact,) = facts_from([{"prompt": prompt, "target_new": "sum", "target_true": "x"}]).facts
    scores = score_facts(loaded, [fact], 64, Quiet())
    ids = loaded.tokenizer(said, add_special_tokens=False)["input_ids"]
    monkeypatch.setattr("sphere_edit.evaluation.generation.continuations", lambda *args, **kwargs: [ids])
    (told,) = with_answers(loaded, [fact], scores, False, 64, Quiet())
    assert (told.rewrite.said, told.rewrite.begins) == (said, begins)


def test_any_right_answer_counts_where_it_is_generated(monkeypatch):
    loaded = tiny("llama", torch.float32)
    (fact,) = facts_from([{"prompt": "Ada plays the", "target_new": ["violin", "fiddle"], "target_true": "x"}]).facts
    assert (fact.target_new, fact.answers) == ("violin", ("fiddle",))
    scores = score_facts(loaded, [fact], 64, Quiet())
    for said, right in ((" fiddle", True), (" violin", True), (" drum", False)):
        ids = loaded.tokenizer(said, add_special_tokens=False)["input_ids"]
        monkeypatch.setattr("sphere_edit.evaluation.generation.continuations", lambda *a, ids=ids, **k: [ids])
        assert with_answers(loaded, [fact], scores, False, 64, Quiet())[0].rewrite.begins is right


def test_seams_of_the_shared_cases(shared: Path):
    read = read_facts(shared / "cases" / "seam.jsonl", skip_bad=True)
    seen = {fact.subject: fact.separator for fact in read.facts}
    assert seen == {"Alpine Nights": "", "Tessel kit": "", "Huss": " ", "海城": "", "Orlow": "", "Kirsche": " "}
    assert read.bad == [reason for reason in read.bad if "occurs twice" in reason and "put '{}'" in reason]
    path = shared / "cases" / "seam.jsonl"
    (twice,) = [json.loads(line) for line in path.read_text("utf-8").splitlines() if "vecta" in line]
    meant = {**twice, "prompt": twice["prompt"].replace("vecta", "{}", 1)}
    (fact,) = facts_from([meant]).facts
    assert (fact.filled_prompt, fact.separator) == (twice["prompt"], ""), (
        "the text that was given, and nothing after a dot"
    )
    chats = read_facts(shared / "cases" / "chat.jsonl").facts
    assert all(fact.prompt.endswith("assistant\n") and fact.separator == "" for fact in chats)
