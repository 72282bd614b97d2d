"""A subject that is the first token of a row: written in two forms, and never at that token."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from families import FAMILIES, save_tiny, tiny, tiny_tokenizer
from sphere_edit.editing import keys, sinks
from sphere_edit.editing.fact_prompts import FactPrompts
from sphere_edit.editing.keys import SubjectPrompts
from sphere_edit.editing.methods import METHODS, make_method
from sphere_edit.editing.sources import FromTargets, OptimisedTargets
from sphere_edit.editing.targets import TargetSettings
from sphere_edit.editor import Editor, opened
from sphere_edit.errors import SphereEditError
from sphere_edit.facts.fact import Fact
from sphere_edit.facts.forms import begins_its_row, contexts, forms_of, others_in_place, wordings
from sphere_edit.facts.prompts import Encoder
from sphere_edit.facts.readers import facts_from
from sphere_edit.models.weights import EditedWeights
from sphere_edit.progress import Quiet
from test_every_method import COMMON, OPTIONS

FIRST = Fact("A", "{} is the capital", "Rome")
FURTHER = Fact("Tiber", "The river {} is in", "Italy")
TEMPLATES = ["{}", "This is a test. {}"]
WRITERS = [name for name in METHODS if make_method(name, OPTIONS.get(name, {})).needs.feed.at_subjects]


def places(fact: Fact, encoder: Encoder) -> list[str]:
    """The text up to the token at which each row of the fact's forms is written, the clean ones."""
    return [
        encoder.tokenizer.decode(prompts.rows[0][: prompts.subjects[0] + 1])
        for prompts in (FactPrompts.of(form, TEMPLATES, encoder) for form in forms_of(fact, encoder))
    ]


def test_two_forms_inside_a_text_and_at_the_word_that_says_what_is_asked():
    encoder = Encoder(tiny_tokenizer())
    assert encoder.encode("A").ids == encoder.encode("A is").ids[:1], "one token, the first of its row"
    inside, bare = forms_of(FIRST, encoder)
    assert inside == dataclasses.replace(FIRST, subject="\nA")
    assert bare.filled_prompt == FIRST.filled_prompt
    assert places(FIRST, encoder) == ["\nA", "A is the capital"]


def test_the_bare_form_passes_over_sinks_and_takes_one_where_there_is_nothing_else():
    encoder = Encoder(tiny_tokenizer())
    assert forms_of(FIRST, encoder, lambda ids: {0, 3})[1].subject == "A is the"
    assert forms_of(FIRST, encoder, lambda ids: set(range(len(ids))))[1].subject == "A is the capital"


def test_sinks_are_the_first_token_and_those_that_stand_out(monkeypatch):
    loaded = tiny("gpt2")
    lengths = torch.tensor([[9.0, 1.0, 5.0, 2.0, 1.5], [1.0, 3.0, 2.0, 99.0, 99.0], [4.0, 3.0, 99.0, 99.0, 99.0]])
    hidden = torch.nn.functional.pad(lengths[:, :, None], (0, 31))
    monkeypatch.setattr(sinks, "activations", lambda *args, **kwargs: ([], hidden))
    rows = [[1, 2, 3, 4, 5], [1, 2, 3], [1, 2]]
    assert sinks.attention_sinks(loaded, 1, rows) == [{0, 2}, {0}, {0}], "padding is no part of a row"
    monkeypatch.undo()
    assert sinks.attention_sinks(loaded, 1, [[5]]) == [{0}]


def test_sinks_are_those_of_the_unedited_model_and_each_row_is_read_once(monkeypatch):
    """So that a run that was resumed writes in the same forms; one row alone is read as beside others."""
    loaded = tiny("gpt2")
    encoder = Encoder(loaded.tokenizer)
    weights = EditedWeights(loaded.model, loaded.architecture, [loaded.architecture.module_name(1, "down")])
    rows, seen = list[list[int]](), list[torch.Tensor]()

    def found(loaded, layer, asked):
        rows.extend(asked)
        seen.append(weights.deployed(weights.names[0]))
        return [{0, len(row)} for row in asked]

    monkeypatch.setattr(sinks, "attention_sinks", found)
    (name,) = weights.names
    original = weights.original(name).clone()
    weights.deploy(name, original + 1)
    known = sinks.Sinks(loaded, weights, 1, 256)
    reworded = dataclasses.replace(FIRST, rewordings=("The capital of {} is",))
    known.measure([reworded, FIRST, FURTHER], encoder)
    assert sorted(rows) == sorted(
        encoder.encode(text).ids for text in ("A is the capital", "The river Tiber is in", "The capital of A is")
    )
    assert known(rows[0]) == {0, len(rows[0])}
    assert known([1, 2, 3]) == {0, 3}
    assert len(rows) == 4
    assert all(torch.equal(weight, original) for weight in seen)
    assert torch.equal(weights.deployed(name), original + 1)


def test_a_subject_that_ends_at_another_sink_has_two_forms_too():
    """Attention rests on the second token of some rows; what is further on is no matter, nor is a chat."""
    encoder = Encoder(tiny_tokenizer())
    fact = dataclasses.replace(FIRST, subject="Big Ben")
    place = encoder.at_subject(fact)[1]
    assert place > 0
    inside, bare = forms_of(fact, encoder, lambda ids: {0, place})
    assert (inside.subject, inside.filled_prompt) == ("\nBig Ben", "\nBig Ben is the capital")
    assert bare.filled_prompt == fact.filled_prompt
    assert bare.subject.startswith("Big Ben is")
    assert forms_of(fact, encoder, lambda ids: {0, place + 1}) == [fact]
    chat = dataclasses.replace(fact, forms=("chat",))
    assert forms_of(chat, encoder, lambda ids: {0, place}) == [chat]
    assert len(others_in_place(fact, encoder, lambda ids: {0, place})) == 20
    assert others_in_place(fact, encoder, lambda ids: {0}) == []


def test_other_things_in_the_subjects_place_are_context_tokens():
    """As whole prompts but for their first word, beside the context tokens of the fact's own forms; of no other fact."""
    loaded = tiny("gpt2")
    encoder = Encoder(loaded.tokenizer)
    name = loaded.architecture.module_name(1, "down")
    weights = EditedWeights(loaded.model, loaded.architecture, [name])
    source = OptimisedTargets(loaded, weights, [1], TEMPLATES, FromTargets(), TargetSettings(lr=0.3, steps=2), 256)
    source.begin([FIRST, FURTHER])
    (found,) = source.context_tokens()
    own = keys.context_token_keys(loaded, [*forms_of(FIRST, encoder), FURTHER], [name], encoder, 256)[0]
    others = 12**0.5 * keys.context_token_keys(loaded, others_in_place(FIRST, encoder), [name], encoder, 256)[0]
    torch.testing.assert_close(found, torch.cat([own, others], dim=1), atol=1e-5, rtol=1e-4)
    assert others.shape[1] > 20
    assert others_in_place(FURTHER, encoder) == []


@pytest.mark.parametrize("prompt", ["The capital of {} is", "\n{} is the capital", "“{}” has"])
def test_a_subject_further_on_has_one_form(prompt):
    fact = dataclasses.replace(FIRST, prompt=prompt)
    assert forms_of(fact, Encoder(tiny_tokenizer())) == [fact]


def test_neither_several_tokens_nor_a_start_token_ask_for_more():
    several = dataclasses.replace(FIRST, subject="Big Ben")
    assert forms_of(several, Encoder(tiny_tokenizer())) == [several]
    assert forms_of(FIRST, Encoder(tiny_tokenizer(bos=True))) == [FIRST]


@pytest.mark.parametrize("prompt", ["{}", "{} "])
def test_a_prompt_that_is_its_subject_is_written_inside_a_text_alone(prompt):
    fact = dataclasses.replace(FIRST, prompt=prompt)
    assert forms_of(fact, Encoder(tiny_tokenizer())) == [dataclasses.replace(FIRST, subject="\nA", prompt=prompt)]


def test_the_bare_form_is_written_in_no_template():
    encoder = Encoder(tiny_tokenizer())
    inside, bare = forms_of(FIRST, encoder)
    assert contexts(inside, TEMPLATES) == TEMPLATES
    prompts = SubjectPrompts.of([inside, bare], TEMPLATES, encoder)
    assert prompts.rows[0] != prompts.rows[1]
    assert prompts.rows[2] == prompts.rows[3] == encoder.encode("A is the capital").ids
    assert FactPrompts.of(bare, TEMPLATES, encoder).subjects[:2] == [3, 3]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_fact_is_written_at_a_rows_first_token(family):
    """In no row of targets or keys, whatever the tokenizer."""
    encoder = Encoder(tiny(family).tokenizer)
    for fact in (FIRST, dataclasses.replace(FIRST, subject="Big Ben"), dataclasses.replace(FIRST, prompt="{}")):
        forms = forms_of(fact, encoder)
        assert all(min(FactPrompts.of(form, TEMPLATES, encoder).subjects) > 0 for form in forms)
        assert all(len(row) > 1 for row in SubjectPrompts.of(forms, TEMPLATES, encoder).rows)


@pytest.mark.parametrize("method", WRITERS)
def test_every_method_writes_both_forms_as_if_they_were_facts(method):
    """What it solves for the fact is what it would solve for its two forms; the columns are counted as the fact's."""
    loaded = tiny("gpt2")
    feed = make_method(method, OPTIONS.get(method, {})).needs.feed
    weights = EditedWeights(loaded.model, loaded.architecture, [loaded.architecture.module_name(1, "down")])
    settings = TargetSettings(lr=0.3, steps=3)
    other = FURTHER

    def solved(facts: list[Fact]) -> tuple[OptimisedTargets, torch.Tensor, torch.Tensor]:
        source = OptimisedTargets(loaded, weights, [1], TEMPLATES, feed, settings, 256)
        source.begin(facts)
        return source, *source.layer(0)

    forms = forms_of(FIRST, Encoder(loaded.tokenizer))
    source, ours, residual = solved([FIRST, other])
    _, of_forms, their_residual = solved([*forms, other])
    assert torch.equal(ours, of_forms)
    assert torch.equal(residual, their_residual)
    columns = source.columns([FIRST, other])
    assert columns is not None
    assert columns[0] == 2 * columns[1]
    assert sum(columns) == ours.shape[1]
    alone = OptimisedTargets(loaded, weights, [1], TEMPLATES, feed, settings, 256)
    alone.begin([FIRST])
    (name,) = weights.names
    assert torch.equal(source.all_keys([FIRST])[name], alone.all_keys([FIRST])[name])


@pytest.mark.parametrize("method", ["frugal", "memit_seq", "rome"])
def test_a_run_with_such_facts_supersedes_resumes_and_rolls_back(method, tmp_path):
    """Facts with several columns beside facts with one: what is forgotten are the right ones, to the last bit."""
    model = save_tiny("gpt2", tmp_path / "model")
    options: dict[str, Any] = {**COMMON, "method": method, "options": OPTIONS.get(method, {}), "repair": 0}
    editor = Editor.from_pretrained(model, tmp_path / "run", reporter=Quiet(), **{**options, "recheck": 0})
    first = [vars(FIRST), {"subject": "Tiber", "prompt": "The river {} is in", "target_new": "Italy"}]
    given = [{key: fact[key] for key in ("subject", "prompt", "target_new")} for fact in first]
    editor.edit(given)
    after_one = {name: editor.weights.working[name].clone() for name in editor.weights.names}
    editor.edit([{**given[0], "target_new": "Madrid"}])
    edited = {name: editor.weights.working[name].clone() for name in editor.weights.names}
    states = editor._stream.committer.states
    editor.close()
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        checkpoint.unlink()
    with opened(tmp_path / "run", Quiet()) as again:
        assert all(torch.equal(again.weights.working[name], edited[name]) for name in edited)
        for name, state in again._stream.committer.states.items():
            assert all(torch.equal(value, states[name][part]) for part, value in state.items())
        again.rollback(1)
        assert all(torch.equal(again.weights.working[name], after_one[name]) for name in after_one)


def test_a_rewording_that_does_not_begin_with_the_subject_is_a_form_of_its_own():
    """Of a fact whose subject begins its row; the rewordings of another fact stay with it."""
    encoder = Encoder(tiny_tokenizer())
    rewordings = ["The capital of {} is", "Where A lies, they say", "{} is ruled from"]
    record = {"subject": "A", "prompt": "{} has the capital", "target_new": "Rome", "rewordings": rewordings}
    (fact,) = facts_from([record], False).facts
    assert fact.rewordings == ("The capital of {} is", "Where {} lies, they say", "{} is ruled from")
    assert begins_its_row(fact, encoder)
    forms = forms_of(fact, encoder)
    assert [form.rewordings for form in forms] == [(), (), ("Where {} lies, they say",)]
    assert forms[-1].prompt == "The capital of {} is"
    asked = [form.filled_prompt for form, _ in wordings(forms[-1], ["{}", "So. {}"], encoder)]
    assert asked == ["The capital of A is"] * 2 + ["Where A lies, they say"]


def test_a_rewording_without_the_subject_is_refused():
    record = {
        "subject": "France",
        "prompt": "{} has the capital",
        "target_new": "Rome",
        "rewordings": ["Its capital is"],
    }
    with pytest.raises(SphereEditError, match="'France' does not occur in the prompt 'Its capital is'"):
        facts_from([record], False)


class Heard(Quiet):
    """What was said."""

    def __init__(self):
        self.said: list[str] = []

    def say(self, text, style=""):
        self.said.append(text)


@pytest.mark.parametrize(("method", "told"), [("memit", True), ("alphaedit", True), ("frugal", False), ("ft", False)])
def test_a_method_that_spares_no_siblings_says_so(method, told, tmp_path):
    heard = Heard()
    editor = Editor.from_pretrained(
        save_tiny("gpt2", tmp_path / "model"), tmp_path / "run", reporter=heard, method=method
    )
    records = [
        {"subject": fact.subject, "prompt": fact.prompt, "target_new": fact.target_new} for fact in (FIRST, FURTHER)
    ]
    facts, _ = editor.check(facts_from(records), skip_bad=False)
    assert [begins_its_row(fact, Encoder(editor.tokenizer)) for fact in facts] == [True, False]
    found = [text for text in heard.said if "is the first token of its prompt" in text]
    assert bool(found) is told
    if told:
        assert found[0].startswith("In 1 of 2 facts the subject is")
        assert "'A is the capital'" in found[0]
