"""Rewordings that the tool makes: who lends what to whom, what is unfair, and the distance by which the model keeps them."""

import dataclasses

import pytest
import torch

from conftest import fact_records
from families import save_tiny, tiny
from sphere_edit import Editor
from sphere_edit.editing import rewording
from sphere_edit.editing.rewording import divergences, reworded, wording_in
from sphere_edit.errors import SphereEditError
from sphere_edit.facts.fact import make_fact
from sphere_edit.facts.lending import is_fair, lendable
from sphere_edit.facts.prompts import Encoder
from sphere_edit.facts.readers import facts_from
from sphere_edit.progress import Quiet


def fact(prompt, subject, target, truth=None, **more):
    return make_fact(prompt, target, subject, truth, **more)


BORN, NATIVE, PLAYS, SPORT = "{} was born in", "{} is a native of", "{} plays", "The sport of {} is"


def test_prompts_with_common_answers_lend_and_given_rewordings_come_first():
    facts = [
        fact(BORN, "Ada", "Rome", "Paris", rewordings=["The birthplace of Ada is"]),
        fact(BORN, "Bruno", "Vienna", "Rome"),
        fact(NATIVE, "Ola", "Rome", "Vienna"),
        fact("{} lies in", "Prater", "vienna"),
        fact(PLAYS, "Uwe", "tennis", "football"),
        fact(SPORT, "Eva", "football"),
    ]
    found = lendable(facts)
    assert found[BORN] == ["The birthplace of {} is", NATIVE, "{} lies in"], "more alike before less alike"
    assert found[PLAYS] == [SPORT]
    assert found["{} lies in"] == [NATIVE, BORN], "answers are compared without case"


def test_the_order_is_that_of_the_cosine_of_answer_counts():
    facts = [
        *(fact(BORN, f"A{n}", "Rome") for n in range(3)),
        fact(BORN, "B", "Paris"),
        *(fact("{} works in", f"C{n}", "Paris") for n in range(9)),  # 9 common pairs, cosine 1 / √10
        *(fact(NATIVE, f"D{n}", "Rome") for n in range(2)),  # 6 common pairs, cosine 3 / √10
    ]
    assert lendable(facts)[BORN] == [NATIVE, "{} works in"]


def test_what_measures_a_fact_is_never_its_rewording_and_never_lent():
    measured = fact(BORN, "Ada", "Rome", paraphrases=["A long tale. Ada is a native of", "Ada came from"])
    others = [fact(NATIVE, "Ola", "Rome", paraphrases=["Ola's cradle stood in"])]
    assert lendable([measured, *others]) == {BORN: [NATIVE], NATIVE: [BORN]}, "paraphrases lend nothing"
    assert not is_fair(measured, NATIVE)
    assert not is_fair(measured, "In truth {} came from")
    assert is_fair(measured, "The birthplace of {} is")
    assert is_fair(others[0], BORN)
    asked = fact(BORN, "Ada", "Rome", portability=[{"prompt": "Ada  Is a native of", "answers": ["Rome"]}])
    assert not is_fair(asked, NATIVE)


def test_distances_are_the_divergences_of_the_next_token_in_float64():
    loaded = tiny("llama", dtype=torch.float64)
    facts = list(facts_from(fact_records(3)).facts)
    wordings = ["They say that {} is", "{} has"]
    found = divergences(loaded, Encoder(loaded.tokenizer), facts, wordings, max_tokens=16)
    for row, wording in enumerate(wordings):
        for column, one in enumerate(facts):
            p, q = (log_probs(loaded, prompt.replace("{}", one.subject)) for prompt in (one.prompt, wording))
            assert float(found[row, column]) == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-4)
    assert divergences(loaded, Encoder(loaded.tokenizer), facts, [], 16).shape == (0, 3)


def log_probs(loaded, text):
    ids = loaded.tokenizer(text, return_tensors="pt").input_ids
    return loaded.model(input_ids=ids).logits[0, -1].double().log_softmax(-1)


def test_near_wordings_are_kept_nearest_first_and_far_ones_left(monkeypatch):
    loaded = tiny("llama")
    facts = [fact(BORN, "Ada", "Rome"), fact(NATIVE, "Ola", "Rome"), fact("{} lies in", "Bruno", "Rome"),
             fact("{} stands in", "Japan", "Rome")]  # fmt: skip
    distance = {NATIVE: 0.4, "{} lies in": 0.1, "{} stands in": 0.6, BORN: 9.0}
    monkeypatch.setattr(
        rewording, "divergences",
        lambda loaded, encoder, facts, wordings, tokens: torch.tensor([[distance.get(w, 9.0)] * len(facts) for w in wordings]),
    )  # fmt: skip
    found = reworded(loaded, facts, 512, 0, Quiet())
    assert found.facts[0].rewordings == ("{} lies in", NATIVE)
    assert (found.tried, found.lent, found.written) == (12, 6, 0)
    own = dataclasses.replace(facts[0], rewordings=("Where was {} born? In",) * rewording.MOST)
    assert reworded(loaded, [own, *facts[1:]], 512, 0, Quiet()).facts[0] == own, "what is given stays"


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ('"The birthplace of Ada is..."\nAnother line', "The birthplace of {} is"),
        ("Ada comes from", "{} comes from"),
        ("Ada was born in", None),  # the prompt itself
        ("She was born in", None),
        ("Ada, yes Ada, was born in", None),
        ("Ada was born in Rome", None),  # an answer
        ("Adam comes from", None),
        ("{Ada} comes from", None),
        ('The beginning of a sentence: "Ada was born in', None),  # the prompt, repeated
        ("", None),
    ],
)
def test_a_wording_is_found_in_what_a_model_says(said, found):
    assert wording_in(said, fact(BORN, "Ada", "Rome", "Paris")) == found


def test_a_wording_with_a_piece_of_the_subject_left_in_it_is_none():
    kyle = fact("{} plays as", "Kyle Boller", "midfielder")
    assert wording_in("Kyle Boller, a game of, Boller, playing as", kyle) is None
    assert wording_in("The position of Kyle Boller is", kyle) == "The position of {} is"


def test_auto_is_told_kept_with_the_facts_and_survives_a_resume(tmp_path, monkeypatch):
    monkeypatch.setattr(rewording, "NEAR", 99.0)  # a model of random weights reads nothing alike
    model = save_tiny("llama", tmp_path / "model")
    (tmp_path / "text.txt").write_text("The river there is the Tiber.\n\n" * 40)
    options = {"moments": {"corpus": str(tmp_path / "text.txt")}, "method": "memit", "batch_size": 4}
    told = Said()
    editor = Editor.from_pretrained(model, tmp_path / "run", reporter=told, rewordings="auto", **options)
    editor.edit(fact_records(4))
    kept = editor.run.facts()
    line = next(text for text in told.lines if text.startswith("Rewordings: "))
    assert [bool(one.rewordings) for one in kept] == [False, True, True, False], "two have an old answer in common"
    assert f"Rewordings: {sum(len(one.rewordings) for one in kept)} for " in line
    assert editor.run.config.settings["rewordings"] == "auto"
    measured = [text for one in kept for text in one.paraphrases]
    assert all(wording.replace("{}", one.subject) not in measured for one in kept for wording in one.rewordings)
    editor.close()
    assert Editor.open(tmp_path / "run", Quiet()).run.facts() == kept


class Said(Quiet):
    def __init__(self):
        self.lines = []

    def say(self, text, style=None):
        self.lines.append(text)


def test_auto_is_refused_where_no_target_is_optimised(tmp_path):
    model = save_tiny("llama", tmp_path / "model")
    editor = Editor.from_pretrained(model, tmp_path / "run", reporter=Quiet(), rewordings="auto", method="ft")
    with pytest.raises(SphereEditError, match="rewordings: auto is for methods with optimised targets; ft uses none"):
        editor.edit(fact_records(2))


def test_a_given_rewording_that_the_tokenizer_cannot_place_is_told_before_any_work(tmp_path):
    model = save_tiny("llama", tmp_path / "model")
    record = {**fact_records(1)[0], "rewordings": ["no subject here"]}
    editor = Editor.from_pretrained(model, tmp_path / "run", reporter=Quiet(), method="memit")
    with pytest.raises(SphereEditError, match="does not occur in the prompt 'no subject here'"):
        editor.edit([record])
