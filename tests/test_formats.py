"""Every layout of records that is known is read whole: what is given has a place, or is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from families import save_tiny
from sphere_edit.editor import Editor
from sphere_edit.errors import SphereEditError
from sphere_edit.facts.fact import BadRecord, Neighbor, Probe
from sphere_edit.facts.readers import FactSet, facts_from, read_facts
from sphere_edit.facts.shapes import cut_sentence, subject_of
from sphere_edit.progress import Quiet


def only(record: dict[str, Any]) -> tuple[Any, FactSet]:
    read = facts_from([record])
    (fact,) = read.facts
    return fact, read


def groups(fact: Any) -> dict[str, list[tuple[str, tuple[str, ...]]]]:
    found: dict[str, list[tuple[str, tuple[str, ...]]]] = {}
    for probe in fact.portability:
        found.setdefault(probe.group, []).append((probe.prompt, probe.answers))
    return found


KNOWEDIT = {
    "subject": "Ola Bern",
    "prompt": "The employer of Ola Bern is",
    "target_new": "Norpost",
    "ground_truth": [["Sunbank", "Sun Bank"]],
    "rephrase_prompt": "Ola Bern works for",
    "cond": "a >> b",
    "portability": {
        "Reasoning": [{"prompt": "Ola Bern's employer sits in", "ground_truth": [["Lund", "City of Lund"]]}],
        "Subject_Aliasing": [{"prompt": "The employer of O. Bern is", "ground_truth": "Norpost"}],
    },
    "locality": {
        "Relation_Specificity": [{"prompt": "The gender of Ola Bern is", "ground_truth": ["male", "man"]}],
        "Forgetfulness": [{"prompt": "Ola Bern once worked for", "ground_truth": ["Telnor"]}],
    },
}


def test_knowedit():
    fact, read = only(KNOWEDIT)
    assert (fact.target_true, fact.true_answers) == ("Sunbank", ("Sun Bank",))
    assert fact.paraphrases == ("Ola Bern works for",)
    assert fact.neighbors == (
        Neighbor("The gender of Ola Bern is", "male", None, ("man",)),
        Neighbor("Ola Bern once worked for", "Telnor"),
    )
    assert groups(fact) == {
        "Reasoning": [("Ola Bern's employer sits in", ("Lund", "City of Lund"))],
        "Subject_Aliasing": [("The employer of O. Bern is", ("Norpost",))],
    }
    assert read.protocol.startswith("KnowEdit")
    assert read.ignored == {"cond": 1}
    assert read.remarks()[1:] == ["Fields that are not used (in so many records): cond (1)"]
    silent = {"Reasoning": [{"prompt": "Ola Bern's employer sits in", "ground_truth": []}]}
    (remark,) = only({**KNOWEDIT, "portability": silent})[1].remarks()[2:]
    assert remark == "Kept, and not measured: portability without an answer, Reasoning (1)"


def test_wikibio_of_knowedit():
    fact, read = only(
        {
            "text": "This is about ola bern. Ola Bern was a baker.",
            "labels": "He baked in Lund, where he had a shop.",
            "concept": "ola bern",
            "locality": {"Relation_Specificity": [{"prompt": "ola bern field of work", "ground_truth": ["food"]}]},
        }
    )
    assert (fact.subject, fact.prompt) == ("ola bern", "This is about {}. Ola Bern was a baker.")
    assert (fact.target_new, fact.separator) == ("He baked in Lund, where he had a shop.", " ")
    assert fact.neighbors == (Neighbor("ola bern field of work", "food"),)
    assert not read.ignored


def test_wikibigedit_of_the_hub_and_flat():
    fact, read = only(
        {
            "tag": "new",
            "subject": "Ola Bern",
            "update": "Where does Ola Bern live?",
            "rephrase": "What is Ola Bern's home?",
            "ans": "Lund",
            "personas": "Yo, where's Ola Bern at?",
            "loc": "Where does Ada live?",
            "loc_ans": "Oslo",
            "mhop": "In which country does Ola Bern live?",
            "mhop_ans": "Sweden",
        }
    )
    assert (fact.prompt, fact.target_new) == ("Where does {} live?", "Lund")
    assert fact.paraphrases == ("What is Ola Bern's home?",)
    assert fact.neighbors == (Neighbor("Where does Ada live?", "Oslo"),)
    assert groups(fact) == {
        "multi-hop": [("In which country does Ola Bern live?", ("Sweden",))],
        "personas": [("Yo, where's Ola Bern at?", ("Lund",))],
    }
    assert read.ignored == {"tag": 1}
    flat, _ = only(
        {
            "subject": "Ola Bern",
            "prompt": "Where does Ola Bern live?",
            "target_new": "Lund",
            "ground_truth": "Lund",
            "rephrase_prompt": "What is Ola Bern's home?",
            "locality_prompt": "Where does Ada live?",
            "locality_ground_truth": "Oslo",
        }
    )
    assert (flat.paraphrases, flat.neighbors, flat.target_true) == (fact.paraphrases, fact.neighbors, None)


MQUAKE = {
    "case_id": 4,
    "requested_rewrite": [
        {
            "prompt": "{} lives in",
            "relation_id": "P1",
            "target_new": {"str": "Norland", "id": "Q1"},
            "target_true": {"str": "Suland", "id": "Q2"},
            "subject": "Ola Bern",
            "question": "Where does Ola Bern live?",
        },
        {
            "prompt": "The king of {} is",
            "target_new": {"str": "Emil"},
            "target_true": {"str": "Karl"},
            "subject": "Norland",
        },
    ],
    "questions": ["Who is the king of Ola Bern's country?", "Whose subject is Ola Bern?"],
    "answer": "Otto",
    "new_answer": "Emil",
    "new_answer_alias": ["Emil II"],
    "new_single_hops": [
        {"question": "Who rules Norland?", "cloze": "Norland is ruled by", "answer": "Emil", "answer_alias": []}
    ],
}


def test_mquake_gives_a_fact_for_each_rewrite_and_the_questions_to_the_last():
    read = facts_from([MQUAKE])
    first, second = read.facts
    assert (first.subject, first.target_new, first.target_true) == ("Ola Bern", "Norland", "Suland")
    assert first.paraphrases == ("Where does Ola Bern live?",)
    assert not first.portability
    assert groups(second) == {
        "multi-hop": [(question, ("Emil", "Emil II")) for question in MQUAKE["questions"]],
        "single hops": [("Who rules Norland?", ("Emil",)), ("Norland is ruled by", ("Emil",))],
    }
    assert (first.record, second.record, first.source_id) == (1, 1, "4")
    assert read.ignored == {"answer": 1, "requested_rewrite.relation_id": 1}


def test_a_limit_counts_the_facts_of_a_record(tmp_path):
    path = tmp_path / "facts.jsonl"
    path.write_text("".join(json.dumps(MQUAKE) + "\n" for _ in range(3)))
    assert len(read_facts(path).facts) == 6
    assert [fact.record for fact in read_facts(path, limit=3).facts] == [1, 1, 2]


def test_qaedit_fastedit_cknowedit_ultraedit_and_unke():
    qaedit, read = only(
        {
            "id": 3,
            "source": "NQ",
            "prompt": "who rules norland?",
            "target": "Emil",
            "subject": "norland",
            "rephrase": "Who is the king of Norland?",
            "locality": [
                {"loc": "who is the saint of bakers", "loc_ans": "Honoré"},
                {"loc": "when", "loc_ans": "1994"},
            ],
        }
    )
    assert (qaedit.target_new, qaedit.target_true, qaedit.source_id) == ("Emil", None, "3")
    assert qaedit.paraphrases == ("Who is the king of Norland?",)
    assert qaedit.neighbors == (Neighbor("who is the saint of bakers", "Honoré"), Neighbor("when", "1994"))
    assert read.ignored == {"source": 1}
    fast, _ = only(
        {"prompt": "The king of {} is", "subject": "Norland", "target": "Emil", "queries": ["{} is ruled by"]}
    )
    assert (fast.target_new, fast.paraphrases) == ("Emil", ("Norland is ruled by",))
    chinese, _ = only(
        {
            "prompt": "《海城志》的编纂者是",
            "target_old": "王明",
            "target_new": "李华",
            "rephrase": ["《海城志》的作者是"],
            "portability": [{"prompt": "编纂者的朝代是", "answer": "唐"}],
            "locality": [{"prompt": "从哪一朝代开始？", "answer": "周"}],
        }
    )
    assert (chinese.subject, chinese.target_true, chinese.separator) == ("", "王明", "")
    assert chinese.paraphrases == ("《海城志》的作者是",)
    assert (chinese.neighbors, chinese.portability) == (
        (Neighbor("从哪一朝代开始？", "周"),),
        (Probe("", "编纂者的朝代是", ("唐",)),),
    )
    ultra, _ = only(
        {
            "prompt": "Who rules Norland?",
            "rephrase_prompt": "Norland's king?",
            "ans": "Emil",
            "loc": "nq question: who",
            "loc_ans": "Ada",
        }
    )
    assert (ultra.target_new, ultra.neighbors) == ("Emil", (Neighbor("nq question: who?", "Ada"),))
    unke, read = only(
        {
            "id": 1,
            "question": "Who is Ola Bern?",
            "para_question": "Tell me of Ola Bern.",
            "answer": "Ola Bern is a baker. " * 20,
            "sub_question": ["What is his trade?", "His name?"],
            "sub_answer": ["baker", "Ola Bern"],
        }
    )
    assert unke.paraphrases == ("Tell me of Ola Bern.",)
    assert groups(unke) == {"sub-questions": [("What is his trade?", ("baker",)), ("His name?", ("Ola Bern",))]}
    assert not read.ignored


def language(word: str) -> dict[str, Any]:
    return {
        "case_id": 1,
        "subject": "Ola Bern",
        "src": f"{word} Ola Bern?",
        "rephrase": f"{word} Bern?",
        "old": "Oslo",
        "alt": "Lund",
        "loc": f"{word} Ada?",
        "loc_ans": "Rome",
        "port": f"{word} country?",
        "port_ans": "Sweden",
    }


def test_bmike_is_edited_in_english_and_asked_in_the_others():
    fact, read = only({"de": language("Wo wohnt"), "en": language("Where lives")})
    assert (fact.prompt, fact.target_new, fact.target_true) == ("Where lives {}?", "Lund", "Oslo")
    assert fact.neighbors == (Neighbor("Where lives Ada?", "Rome"), Neighbor("Wo wohnt Ada?", "Rome"))
    assert groups(fact) == {
        "portability": [("Where lives country?", ("Sweden",))],
        "de": [("Wo wohnt Ola Bern?", ("Lund",)), ("Wo wohnt Bern?", ("Lund",)), ("Wo wohnt country?", ("Sweden",))],
    }
    assert not read.ignored
    alone, _ = only({"de": language("Wo wohnt")})
    assert alone.prompt == "Wo wohnt {}?"


def test_rippleedits():
    def criterion(prompt: str, *values: str) -> list[dict[str, Any]]:
        answers = [{"value": value, "aliases": [f"{value}!"]} for value in values]
        return [
            {"test_queries": [{"prompt": prompt, "answers": answers, "query_type": "regular"}], "test_condition": "OR"}
        ]

    fact, read = only(
        {
            "example_type": "popular",
            "edit": {
                "prompt": "The name of the mother of Ola Bern is Eva Lind.",
                "subject_id": "Q1",
                "relation": "MOTHER",
                "target_id": "Q2",
                "original_fact": {"prompt": "The name of the mother of Ola Bern is Ada Lind.", "target_id": "Q3"},
            },
            "Relation_Specifity": criterion("The gender of Ola Bern is", "male"),
            "Forgetfulness": [],
            "Compositionality_I": criterion("The name of the aunt of Ola Bern is", "Ina", "Una"),
        }
    )
    assert (fact.subject, fact.prompt) == ("Ola Bern", "The name of the mother of {} is")
    assert (fact.target_new, fact.target_true) == ("Eva Lind", "Ada Lind")
    assert fact.neighbors == (Neighbor("The gender of Ola Bern is", "male", None, ("male!",)),)
    assert groups(fact) == {
        "Compositionality_I": [("The name of the aunt of Ola Bern is", ("Ina", "Ina!", "Una", "Una!"))]
    }
    assert "Compositionality_I.test_condition" in read.ignored
    assert "edit.subject_id" in read.ignored


@pytest.mark.parametrize(
    ("sentence", "relation", "prompt", "subject", "target"),
    [
        ("Dawn is followed by Night by Day.", "FOLLOWED_BY", None, None, None),
        ("Dawn follows Night.", "FOLLOWS", "Dawn follows", "Dawn", "Night"),
        ("The names of the siblings of Ola are Ada.", "SIBLING", "The names of the siblings of Ola are", "Ola", "Ada"),
        (
            "The name of the league which Ola plays in is Elite.",
            "LEAGUE",
            "The name of the league which Ola plays in is",
            "Ola",
            "Elite",
        ),
        (
            "The name of the position held by Ola is mayor of Lund.",
            "POSITION_HELD",
            "The name of the position held by Ola is",
            "Ola",
            "mayor of Lund",
        ),
        (
            "The name of the currency in Norland is krone.",
            "CURRENCY",
            "The name of the currency in Norland is",
            "Norland",
            "krone",
        ),
    ],
)
def test_sentences_of_rippleedits_are_cut(sentence, relation, prompt, subject, target):
    if prompt is None:  # the sentence before the edit tells where the target begins
        assert cut_sentence(sentence, "Dawn is followed by Noon.") == ("Dawn is followed by", "Night by Day", "Noon")
        return
    assert cut_sentence(sentence, None) == (prompt, target, None)
    assert subject_of(prompt, relation) == subject


def test_a_sentence_without_a_verb_is_refused():
    with pytest.raises(BadRecord, match="no target is found in the sentence 'Dawn.'"):
        cut_sentence("Dawn.", None)


def test_zsre_counts_every_answer_and_says_which_field_is_empty():
    record = {
        "subject": "Ola",
        "src": "Who paid Ola?",
        "alt": "Ada",
        "answers": ["Norpost", "Nor Post"],
        "portability_prompt": "Who?",
        "portability_ground_truth": "Eva",
    }
    fact, _ = only(record)
    assert (fact.target_new, fact.answers) == ("Norpost", ("Nor Post",))
    assert groups(fact) == {"portability": [("Who?", ("Eva",))]}
    with pytest.raises(SphereEditError, match="record 1: 'answers' is empty, and they are what is edited to"):
        facts_from([{**record, "answers": []}])


@pytest.mark.parametrize("given", ["Lund", {"str": "Lund"}, {"str": "Lund", "id": "Q1"}, ["Lund"], [["Lund"]]])
def test_an_answer_is_a_text_or_what_data_sets_make_of_one(given):
    fact, _ = only({"subject": "Ola", "prompt": "{} lives in", "target_new": given, "target_true": given})
    assert (fact.target_new, fact.answers, fact.target_true) == ("Lund", (), None)


def test_own_records_in_the_fields_of_others_lose_nothing():
    fact, read = only(
        {
            "subject": "Ola",
            "prompt": "Ola lives in",
            "target_new": "Lund",
            "ground_truth": "Oslo",
            "paraphrases": ["{}'s home is"],
            "rephrase_prompt": "You find Ola in",
            "neighbors": ["Ada lives in"],
            "locality": [{"prompt": "Eva lives in", "ground_truth": "Rome"}],
            "locality_prompt": "Una lives in",
            "generation_prompts": ["{} is"],
            "portability": [{"group": "hop", "prompt": "{}'s country is", "answers": ["Sweden"]}],
            "rewordings": ["Lund is where Ola lives"],
            "chat": True,
            "note": "mine",
        }
    )
    assert fact.target_true == "Oslo"
    assert fact.paraphrases == ("Ola's home is", "You find Ola in")
    assert fact.neighbors == (Neighbor("Ada lives in"), Neighbor("Eva lives in", "Rome"), Neighbor("Una lives in"))
    assert (fact.generation_prompts, fact.rewordings, fact.chat) == (("Ola is",), ("Lund is where {} lives",), True)
    assert fact.portability == (Probe("hop", "Ola's country is", ("Sweden",)),)
    assert read.ignored == {"note": 1}
    assert facts_from([fact]).facts == [fact], "read again, it is the same"
    assert not facts_from([fact]).ignored


def test_unknown_fields_are_counted_over_usable_records_alone():
    good = {"subject": "Ola", "prompt": "{} is", "target_new": "x", "note": 1}
    read = facts_from(
        [good, {**good, "prompt": "No"}, {**good, "prompt": "{} was", "note": None, "mark": 0}], skip_bad=True
    )
    assert read.ignored == {"note": 1, "mark": 1}


def test_locality_side_by_side_as_easyedit_takes_it():
    record = {
        "subject": "Ola",
        "prompt": "{} is",
        "target_new": "x",
        "locality": {"near": {"prompt": ["a", "b"], "ground_truth": ["c", ["d", "e"]]}},
    }
    fact, _ = only(record)
    assert fact.neighbors == (Neighbor("a", "c"), Neighbor("b", "d", None, ("e",)))
    record["locality"]["near"]["ground_truth"].pop()
    with pytest.raises(
        SphereEditError, match=r"'locality.prompt' has 2 items and 'locality.ground_truth' 1; expected as many"
    ):
        facts_from([record])


def test_text_that_is_no_text_is_read_as_json_writes_it():
    fact, _ = only({"subject": 7, "prompt": "7 is", "target_new": True, "target_true": 1.5})
    assert (fact.subject, fact.target_new, fact.target_true) == ("7", "true", "1.5")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (
            {"subject": "Rome", "prompt": "Romeo is by"},
            "it is only part of 'Romeo' there; put '{}' in its place if that is meant",
        ),
        ({"subject": "ola bern", "prompt": "Ola Bern is a"}, "it stands there as 'Ola Bern': write the subject so"),
        ({"subject": "Ola", "prompt": "{subject} is a"}, "where '{subject}' stands, write '{}'"),
        ({"subject": "Ola", "prompt": "{0} is a"}, "where '{0}' stands, write '{}'"),
        ({"subject": "Ola", "prompt": "%s is a"}, "where '%s' stands, write '{}'"),
        ({"subject": "Ola", "prompt": "Ola met the aunt of Ola in"}, "as in '{} met the aunt of Ola in'"),
        ({"prompt": "{} is a"}, "'subject' is missing: the prompt '{} is a' holds '{}' for it"),
        ({"subject": "Ola", "prompt": "{} is", "separator": 5}, "'separator' must be text, not int 5"),
        ({"subject": "Ola", "prompt": "{} is", "chat": "yes"}, "'chat' must be true or false, not 'yes'"),
        ({"subject": "Ola", "prompt": "{} is", "target_new": []}, "'target_new' is an empty list; an answer is needed"),
    ],
)
def test_a_record_that_cannot_be_used_says_what_to_write(record, reason):
    with pytest.raises(SphereEditError) as caught:
        facts_from([{"target_new": "x", **record}])
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("subject", "prompt", "filled"),
    [
        ("Ola", "{} met the aunt of Ola in", "Ola met the aunt of Ola in"),
        ("Java", "{} is not JavaScript but", "Java is not JavaScript but"),
        ("Java", "Java is not JavaScript but", "Java is not JavaScript but"),
        ("{} operator", "The {} operator returns a", "The {} operator returns a"),
        ("{} operator", "The {} returns a", "The {} operator returns a"),
    ],
)
def test_braces_say_which_subject_is_meant(subject, prompt, filled):
    fact, _ = only({"subject": subject, "prompt": prompt, "target_new": "x", "paraphrases": [filled]})
    assert fact.filled_prompt == filled
    assert fact.paraphrases == (filled,)


# --- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", [{"data": None}, {"version": 2, "facts": None, "by": {"name": "me"}}])
def test_a_list_within_an_object_is_looked_into(tmp_path, wrapped):
    path = tmp_path / "facts.json"
    own = [{"subject": "Ola", "prompt": "{} is", "target_new": "x"}]
    path.write_text(json.dumps({name: own if value is None else value for name, value in wrapped.items()}))
    assert [fact.subject for fact in read_facts(path).facts] == ["Ola"]
    path.write_text(json.dumps({"train": own, "test": own}))
    with pytest.raises(SphereEditError, match="found an object with lists 'train', 'test'; save the list alone"):
        read_facts(path)
    path.write_text(json.dumps({"7": own[0], "8": {**own[0], "subject": "Ada"}}))
    assert [fact.subject for fact in read_facts(path).facts] == ["Ola", "Ada"]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("facts.json", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a Git LFS pointer"),
        ("facts.json", b"\n<!DOCTYPE html>\n<html></html>", "is a web page"),
        ("facts.jsonl", b"\x80\x04\x95\x00.", "is a Python pickle, which can run code and is never opened"),
    ],
)
def test_a_file_that_is_something_else_is_told_what_it_is(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SphereEditError, match=reason):
        read_facts(tmp_path / name)


def test_csv_takes_other_layouts_and_facts_without_a_subject(tmp_path):
    path = tmp_path / "facts.csv"
    path.write_text("prompt,ans,loc,loc_ans\nWho rules Norland?,Emil,Who?,Ada\n")
    (fact,) = read_facts(path).facts
    assert (fact.subject, fact.target_new, fact.neighbors) == ("", "Emil", (Neighbor("Who?", "Ada"),))
    path.write_text("subject,prompt,target_new,separator,chat\nOla,{} is a non,stop,-,true\n")
    (fact,) = read_facts(path).facts
    assert (fact.separator, fact.chat) == ("-", True)


def test_a_hub_source_has_one_grammar():
    from sphere_edit.facts.hub import HubSource

    assert HubSource.parse("owner/name") == HubSource("owner/name", None, None)
    assert HubSource.parse("owner/name/config:test") == HubSource("owner/name", "config", "test")
    assert HubSource.parse("name:test") == HubSource("name", None, "test")
    for path in ("a/b/c/d", "/a/b", "../a", "a//b", ""):
        found = HubSource.parse(path)
        assert found is None or Path(path).is_dir()


# --- facts without a subject --------------------------------------------------------------------------------------


def test_methods_that_write_at_the_subject_refuse_facts_without_and_others_edit_them(tmp_path):
    model = save_tiny("llama", tmp_path / "model")
    given = [
        {"prompt": "The river there is the", "target_new": "Rome"},
        {"prompt": "Ada plays the", "target_new": "Tiber"},
    ]
    quick: dict[str, Any] = {"targets": {"steps": 2}, "moments": {"sampled_tokens": 512}, "reporter": Quiet()}
    editor = Editor.from_pretrained(model, tmp_path / "memit", method="memit", **quick)
    with pytest.raises(
        SphereEditError,
        match=r"record 1: 'The river there is the' comes without a 'subject', and memit .*\(ft, locft, ultraedit\)",
    ):
        editor.edit(given)
    assert not (tmp_path / "memit").exists()
    assert len(editor.evaluate(given).edited) == 2, "asking needs none"
    free = Editor.from_pretrained(model, tmp_path / "ultraedit", method="ultraedit", **quick)
    assert free.edit(given)["facts"] == 2


# --- public files, where they are ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "records"), [("wikibigedit.json", 1500), ("qaedit.json", 500)])
def test_public_questions_read_with_few_refused_each_for_a_reason(shared, name, records):
    read = read_facts(shared / "data" / name, skip_bad=True)
    assert len(read.facts) + len(read.bad) == records
    assert len(read.bad) <= records // 100
    assert all(len(reason) > len("record 1: ") for reason in read.bad)
    assert all(fact.paraphrases and fact.neighbors for fact in read.facts)
    assert read.protocol.startswith({"w": "WikiBigEdit", "q": "QAEdit"}[name[0]])


CASES = {
    "cknowedit.json": "CKnowEdit",
    "fastedit.json": "FastEdit",
    "knowedit-counterfact.json": "KnowEdit",
    "knowedit-recent.json": "KnowEdit",
    "knowedit-wikibio.json": "KnowEdit, WikiBio",
    "knowedit-zsre.json": "KnowEdit",
    "mquake.json": "MQuAKE",
    "qaedit.json": "QAEdit",
    "target-list.jsonl": "subject, prompt, target_new",
    "wikibigedit-hub.json": "WikiBigEdit",
    "wrapped.json": "subject, prompt, target_new",
}


@pytest.mark.parametrize("name", CASES)
def test_the_shared_cases_read_whole(shared, name):
    read = read_facts(shared / "cases" / name)
    assert read.protocol.startswith(CASES[name])
    left = {"answer", "single_hops", "source", "tag", "cond", "requested_rewrite.relation_id"}
    assert set(read.ignored) <= left, "ids, and answers from before the edit"
    if name not in ("target-list.jsonl", "wrapped.json"):
        assert all(any((f.paraphrases, f.neighbors, f.portability)) for f in read.facts)


def test_the_shared_cases_that_are_refused_say_why(shared):
    with pytest.raises(SphereEditError, match="record 1: 'answers' is empty"):
        read_facts(shared / "cases" / "zsre-no-answers.json")
    own = read_facts(shared / "cases" / "own-fields.jsonl", skip_bad=True)
    first, second, operator, year = own.facts
    assert (first.paraphrases, first.neighbors) == (
        ("You find the Louvre in",),
        (Neighbor("The Prado stands in", "Madrid"),),
    )
    assert (second.target_true, second.paraphrases) == ("Paris", ("You find the Louvre in",))
    assert second.neighbors
    assert second.generation_prompts
    assert operator.filled_prompt == "The {} operator in Quill returns a"
    assert year.target_new == "1970"
    hints = ["only part of 'Romeo'", "write '{}'", "stands there as 'John Marlow'", "put '{}' where it is meant"]
    assert all(hint in reason for hint, reason in zip(hints, own.bad, strict=True))
