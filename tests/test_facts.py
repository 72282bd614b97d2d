from __future__ import annotations

import json
import string
import tracemalloc
from collections import Counter
from http.client import IncompleteRead
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sphere_edit.errors import SphereEditError
from sphere_edit.facts import hub
from sphere_edit.facts.corpus import read_passages
from sphere_edit.facts.fact import MAX_TEXT, Fact, Neighbor
from sphere_edit.facts.prompts import fill
from sphere_edit.facts.readers import facts_from, read_facts
from sphere_edit.runs.selection import next_batch, plan_batches, superseded_by

OWN = {
    "subject": "Big Ben",
    "prompt": "{} stands in the city of",
    "target_new": "Vienna",
    "target_true": "London",
    "paraphrases": ["To see Big Ben, travel to", "Big Ben rings in"],
    "neighbors": [{"prompt": "Tower Bridge is in", "answer": "London"}, "The Shard is in"],
}
NESTED = {
    "case_id": 7,
    "pararel_idx": 11,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "target_new": {"str": "English", "id": "Q1860"},
        "target_true": {"str": "French", "id": "Q150"},
        "subject": "Danielle Darrieux",
    },
    "paraphrase_prompts": ["Danielle Darrieux, a native", "Danielle Darrieux spoke the language"],
    "neighborhood_prompts": ["The native language of Montesquieu is"],
    "attribute_prompts": [],
    "generation_prompts": [],
}
FLAT = {
    "case_id": 2,
    "prompt": "Toko Yasuda, the",
    "target_new": "piano",
    "subject": "Toko Yasuda",
    "ground_truth": "guitar",
    "rephrase_prompt": "Toko Yasuda is incredible at",
    "locality_prompt": "John Lennon performs on the",
    "locality_ground_truth": "guitar",
}
ZSRE = {
    "subject": "UniFirst",
    "src": "What is the product made by UniFirst?",
    "pred": "uniform",
    "rephrase": "What will be the product of UniFirst?",
    "alt": "unmanned aircraft",
    "answers": ["uniform"],
    "loc": "nq question: john goodman's character in the big lebowski",
    "loc_ans": "Walter Sobchak",
}
OWN_FACT = Fact(
    subject="Big Ben",
    prompt="{} stands in the city of",
    target_new="Vienna",
    target_true="London",
    paraphrases=("To see Big Ben, travel to", "Big Ben rings in"),
    neighbors=(Neighbor("Tower Bridge is in", "London"), Neighbor("The Shard is in")),
    record=1,
    separator=" ",
)


def lines(*records: object) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


@pytest.fixture
def write(tmp_path: Path):
    def write_file(name: str, content: bytes | str) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write_file


def told(source: str | Path, **options) -> str:
    """What the user sees; it must be possible to print it."""
    with pytest.raises(SphereEditError) as caught:
        read_facts(source, **options)
    message = str(caught.value)
    assert message.encode().decode().strip()
    return message


# --- what can be read ---------------------------------------------------------------------------------------------


def test_nested_counterfact(write):
    read = read_facts(write("facts.json", json.dumps([NESTED])))
    assert read.facts == [
        Fact(
            subject="Danielle Darrieux",
            prompt="The mother tongue of {} is",
            target_new="English",
            target_true="French",
            paraphrases=("Danielle Darrieux, a native", "Danielle Darrieux spoke the language"),
            neighbors=(Neighbor("The native language of Montesquieu is", "French"),),
            source_id="7",
            record=1,
            separator=" ",
        )
    ]
    assert read.protocol.startswith("CounterFact, nested")


def test_flat_counterfact(write):
    read = read_facts(write("facts.json", json.dumps([FLAT])))
    assert read.facts == [
        Fact(
            subject="Toko Yasuda",
            prompt="{}, the",
            target_new="piano",
            target_true="guitar",
            paraphrases=("Toko Yasuda is incredible at",),
            neighbors=(Neighbor("John Lennon performs on the", "guitar"),),
            source_id="2",
            record=1,
            separator=" ",
        )
    ]
    assert read.protocol.startswith("CounterFact, flat")


@pytest.mark.parametrize(
    ("target", "new", "true"), [("answer", "uniform", None), ("alternative", "unmanned aircraft", "uniform")]
)
def test_zsre_is_edited_to_its_answer_or_to_its_alternative(write, target, new, true):
    read = read_facts(write("facts.json", json.dumps([ZSRE])), zsre_target=target)
    (fact,) = read.facts
    assert (fact.prompt, fact.target_new, fact.target_true) == ("What is the product made by {}?", new, true)
    assert fact.paraphrases == ("What will be the product of UniFirst?",)
    assert fact.neighbors == (Neighbor("nq question: john goodman's character in the big lebowski?", "Walter Sobchak"),)
    assert f"edited to its {target}" in read.protocol


CSV = (
    "subject,prompt,target_new,target_true,paraphrases,neighbors,note\r\n"
    "Big Ben,{} stands in the city of,Vienna,London,"
    '"[""To see Big Ben, travel to"", ""Big Ben rings in""]",'
    '"[{""prompt"": ""Tower Bridge is in"", ""answer"": ""London""}, ""The Shard is in""]",mine\r\n'
)


def cut_short():
    raise IncompleteRead(b"[{")


def test_public_data_sets_are_fetched_once_and_only_whole(tmp_path, monkeypatch):
    records = [{"subject": f"S{n}", "prompt": "{} is", "target_new": "x", "ground_truth": "y"} for n in range(3)]
    page = tmp_path / "page.json"
    page.write_text(json.dumps(records))
    monkeypatch.setitem(hub.DATASETS, "counterfact", hub.DataSet(page.as_uri(), 3))
    assert len(read_facts("counterfact").facts) == 3
    page.unlink()
    assert len(read_facts("counterfact", limit=2).facts) == 2, "it is in the cache"
    monkeypatch.setitem(hub.DATASETS, "zsre", hub.DataSet(page.as_uri(), 3))
    with pytest.raises(SphereEditError, match="data set 'zsre' could not be fetched from .*Give a local copy"):
        read_facts("zsre")
    page.write_text(json.dumps(records[:2]))
    with pytest.raises(SphereEditError, match="it has 2 records and not 3"):
        read_facts("zsre")
    monkeypatch.setattr(hub.urllib.request, "urlopen", lambda *args, **kwargs: cut_short())
    with pytest.raises(SphereEditError, match="data set 'zsre' could not be fetched"):
        read_facts("zsre")
    monkeypatch.undo()
    monkeypatch.setitem(hub.DATASETS, "zsre", hub.DataSet(page.as_uri(), 3))
    page.write_text(json.dumps(records)[:-9])
    with pytest.raises(SphereEditError, match="data set 'zsre' could not be fetched"):
        read_facts("zsre")


def test_facts_are_shuffled_by_seed_and_sliced(write):
    path = write("many.jsonl", b"".join(lines({**OWN, "subject": f"Tower {n}"}) for n in range(10)))
    plain = [fact.subject for fact in read_facts(path).facts]
    assert [fact.subject for fact in read_facts(path, skip=3, limit=4).facts] == plain[3:7]
    mixed = read_facts(path, shuffle=1)
    order = [fact.subject for fact in mixed.facts]
    assert order != plain
    assert sorted(order) == sorted(plain)
    part = read_facts(path, shuffle=1, skip=2, limit=3)
    assert [fact.subject for fact in part.facts] == order[2:5]
    assert part.sha256 != mixed.sha256 == read_facts(path, shuffle=1).sha256
    assert part.facts[0].record == plain.index(order[2]) + 1, "a record keeps its number"
    with pytest.raises(SphereEditError, match="has 10 facts; none is left after the first 10"):
        read_facts(path, skip=10)
    with pytest.raises(SphereEditError, match="--skip takes a number of facts, not -1"):
        read_facts(path, skip=-1)


def test_generation_prompts_of_counterfact_are_kept_and_counted_in_the_hash(write):
    record = {
        "requested_rewrite": {
            "prompt": "{} plays the",
            "subject": "Toko Yasuda",
            "target_new": {"str": "piano"},
            "target_true": {"str": "guitar"},
        },
        "generation_prompts": ["Toko Yasuda is known for", "Toko Yasuda is known for"],
    }
    read = read_facts(write("nested.json", json.dumps([record])))
    assert read.facts[0].generation_prompts == ("Toko Yasuda is known for",) * 2
    other = read_facts(write("other.json", json.dumps([{**record, "generation_prompts": ["Toko"]}])))
    assert read.sha256 != other.sha256


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.json", json.dumps([OWN])),
        ("one.json", json.dumps(OWN)),
        ("pretty.JSON", json.dumps([OWN], indent=4)),
        ("bom.json", b"\xef\xbb\xbf" + json.dumps([OWN]).encode()),
        ("lines.jsonl", lines(OWN)),
        ("no-newline.jsonl", json.dumps(OWN)),
        ("windows.jsonl", lines(OWN).replace(b"\n", b"\r\n")),
        ("bom.jsonl", b"\xef\xbb\xbf" + lines(OWN)),
        ("one-blank.jsonl", lines(OWN) + b"\n"),
        ("blanks.jsonl", lines(OWN) + b"\n  \n\r\n\n"),
        ("table.csv", CSV),
        ("bom.csv", b"\xef\xbb\xbf" + CSV.encode()),
        ("blanks.csv", CSV + "\r\n\r\n"),
        ("spaced-header.csv", CSV.replace("subject,prompt", "subject , prompt ", 1)),
    ],
)
def test_own_facts_read_the_same_from_every_format(write, name, content):
    read = read_facts(write(name, content))
    assert read.facts == [OWN_FACT]
    assert read.bad == []
    assert read.protocol == "subject, prompt, target_new"
    # runs name their data by this hash, so a new version must not change it
    assert read.sha256 == "9aec1153979d069d2c85be02bfad62c8b053d5824eef629959b8a00ef08fa9ae"


def test_csv_cells_take_bars_and_stay_empty(write):
    path = write(
        "facts.csv",
        "subject,prompt,target_new,paraphrases,neighbors\n"
        "Big Ben,{} is in,Vienna,To see Big Ben | Big Ben rings in|,[London] is in | Paris is in\n"
        "Paris,{} is in,Italy,,\n",
    )
    first, second = read_facts(path).facts
    assert first.paraphrases == ("To see Big Ben", "Big Ben rings in")
    assert first.neighbors == (Neighbor("[London] is in"), Neighbor("Paris is in"))
    assert (second.target_true, second.paraphrases, second.neighbors) == (None, (), ())


def test_the_subject_may_stand_in_the_prompt_composed_otherwise(write):
    (fact,) = read_facts(write("f.jsonl", lines({**OWN, "subject": " Zoë ", "prompt": "Zoe\u0308 is in "}))).facts
    assert (fact.subject, fact.prompt, fact.filled_prompt) == ("Zoë", "{} is in ", "Zoë is in ")


@pytest.mark.parametrize(("wrong", "right"), [("neighbours", "neighbors"), ("paraphrase", "paraphrases")])
def test_a_misspelt_field_is_told(write, wrong, right):
    record = {name: value for name, value in OWN.items() if name != right}
    told_of = told(write("facts.jsonl", lines({**record, wrong: ["Paris is a"]})))
    assert f"record 1: '{wrong}' is no field; did you mean '{right}'?" in told_of
    assert read_facts(write("own.jsonl", lines({**OWN, wrong: ["Paris is a"]}))).facts, (
        "beside the right one, it is something else"
    )


def test_the_subject_is_filled_into_paraphrases_and_generation_prompts(write):
    record = {**OWN, "paraphrases": ["Where is {}? In", "Its city is"], "generation_prompts": ["{} is"]}
    (fact,) = read_facts(write("facts.jsonl", lines(record))).facts
    assert fact.paraphrases == (f"Where is {OWN['subject']}? In", "Its city is")
    assert fact.generation_prompts == (f"{OWN['subject']} is",)


def test_shapes_mix_in_one_file(write):
    read = read_facts(write("facts.jsonl", lines(OWN, NESTED, FLAT, ZSRE)))
    assert [fact.record for fact in read.facts] == [1, 2, 3, 4]
    assert read.protocol.count("; ") >= 3


def test_demo_facts_are_complete_and_varied():
    read = read_facts("demo")
    text = (resources.files("sphere_edit") / "data" / "demo_facts.jsonl").read_text("utf-8")
    relations = Counter(json.loads(line)["relation"] for line in text.splitlines())
    assert len(read.facts) == relations.total() == 60
    assert len(relations) >= 6
    assert all(len(fact.paraphrases) == 2 and len(fact.neighbors) == 2 for fact in read.facts)
    assert all(fact.subject in text for fact in read.facts for text in fact.paraphrases)
    assert all(fact.target_true for fact in read.facts)
    assert len({fact.key for fact in read.facts}) == 60


@pytest.mark.parametrize(("split", "target"), [("", "Vienna"), (":test", "Rome")])
def test_local_data_set_folder(tmp_path, write, monkeypatch, split, target):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "facts"
    folder.mkdir()
    write("facts/train.jsonl", lines(OWN | {"neighbors": OWN["neighbors"][:1]}))
    write("facts/test.jsonl", lines(OWN | {"target_new": "Rome", "neighbors": None}))
    (fact,) = read_facts(f"{folder}{split}").facts
    assert (fact.subject, fact.target_new, fact.paraphrases) == ("Big Ben", target, OWN_FACT.paraphrases)


def test_local_data_set_folder_without_the_split_or_without_data(tmp_path, write, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "facts"
    folder.mkdir()
    assert "is neither a file nor a data set that can be loaded" in told(folder)
    write("facts/train.jsonl", lines(OWN))
    assert told(f"{folder}:test") == f"data set '{folder}' has no split 'test'; it has train"


@pytest.mark.parametrize(
    ("name", "target", "count", "bad"),
    [("counterfact.json", "answer", 300, 0), ("zsre.json", "answer", 500, 0), ("zsre.json", "alternative", 490, 10)],
)
def test_public_sets(shared, name, target, count, bad):
    limit = 300 if name == "counterfact.json" else None
    read = read_facts(shared / "data" / name, limit=limit, skip_bad=True, zsre_target=target)
    assert (len(read.facts), len(read.bad)) == (count, bad)
    assert all(fact.paraphrases and fact.neighbors for fact in read.facts)


# --- how many, and what is left out -------------------------------------------------------------------------------

BAD = {**OWN, "target_new": ""}


def test_limit_counts_usable_facts_and_stops_there(write):
    path = write("facts.jsonl", lines(OWN, BAD, OWN, OWN, BAD))
    read = read_facts(path, limit=2, skip_bad=True)
    assert [fact.record for fact in read.facts] == [1, 3]
    assert read.bad == ["record 2: 'target_new' is empty"]
    assert len(read_facts(path, limit=1).facts) == 1


def test_skip_bad_lists_every_record_left_out(write):
    read = read_facts(write("facts.jsonl", lines(BAD, OWN, 5) + b"{\n" + lines(OWN)), skip_bad=True)
    assert [fact.record for fact in read.facts] == [2, 5]
    assert [reason.split(":")[0] for reason in read.bad] == ["record 1", "record 3", "record 4"]


def test_many_bad_records_are_counted_and_not_all_shown(write):
    message = told(write("facts.jsonl", lines(*[BAD] * 25)))
    assert "25 records cannot be used (--skip-bad goes on without)" in message
    assert message.count("\n  record ") == 20
    assert message.endswith("… and 5 more")


def test_nothing_left_is_an_error_too(write):
    assert told(write("facts.jsonl", lines(BAD, BAD)), skip_bad=True).endswith("no usable fact in it (2 bad records)")
    assert told(write("facts.json", "[]")).endswith("no usable fact in it")


@pytest.mark.parametrize("limit", [0, -3])
def test_limit_is_positive(limit):
    assert told("demo", limit=limit) == f"--limit takes a positive number of facts, not {limit}"


def test_the_hash_names_the_facts(write):
    first = read_facts(write("a.jsonl", lines(OWN, FLAT)))
    assert first.sha256 == read_facts(write("b.json", json.dumps([OWN, FLAT]))).sha256
    assert first.sha256 != read_facts(write("c.jsonl", lines(FLAT, OWN))).sha256
    assert first.sha256 != read_facts(write("d.jsonl", lines(OWN))).sha256


def test_facts_from_memory():
    read = facts_from([OWN, NESTED])
    assert read.facts[0] == OWN_FACT
    assert read.facts[1].source_id == "7"
    again = facts_from(read.facts)
    assert (again.facts, again.sha256) == (read.facts, read.sha256)
    assert facts_from(again) is again
    with pytest.raises(SphereEditError, match=r"facts given in Python: 1 record .*\n  record 2: 'target_new' is empty"):
        facts_from([OWN, BAD])


# --- records that cannot be used ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"prompt": "The clock is in"},
            "the subject 'Big Ben' does not occur in the prompt 'The clock is in'; expected once, or '{}' in its place",
        ),
        ({"prompt": "Big Ben, Big Ben is in"}, "the subject 'Big Ben' occurs twice in the prompt"),
        ({"prompt": "{} and {} are in"}, "the prompt '{} and {} are in' holds '{}' twice; it takes one subject"),
        ({"prompt": "The clock\nis\n\nin"}, "the subject 'Big Ben' does not occur in the prompt 'The clock is in'"),
        ({"target_new": " \t"}, "'target_new' is empty"),
        ({"subject": ""}, "'subject' is empty"),
        ({"target_new": None}, "'target_new' is missing"),
        ({"subject": float("inf")}, "'subject' must be text, not float inf"),
        ({"prompt": ["{} is in"]}, "'prompt' must be text, not list ['{} is in']"),
        ({"target_true": {"text": "London"}}, "'target_true' must be text, not dict {'text': 'London'}"),
        ({"paraphrases": "Big Ben is"}, "'paraphrases' must be a list, not str 'Big Ben is'"),
        ({"paraphrases": [None]}, "'paraphrases' is missing"),
        ({"neighbors": [7]}, "each neighbor is a prompt or {prompt, answer}, not 7"),
        ({"neighbors": [{"answer": "x"}]}, "each neighbor is a prompt or {prompt, answer}, not {'answer': 'x'}"),
        ({"neighbors": [{"prompt": "a", "answer": {}}]}, "'neighbors.answer' must be text, not dict {}"),
        ({"neighbors": ["{} is a"]}, "the neighbor '{} is a' holds '{}'; it is about another subject"),
        ({"subject": "Big \ud800Ben"}, "'subject' is not valid Unicode (it holds half of a surrogate pair)"),
        ({"prompt": "{} is \x1b[31m in"}, r"'prompt' holds control characters: '{} is \x1b[31m in'"),
        ({"target_new": "Vienna\x00"}, r"'target_new' holds control characters: 'Vienna\x00'"),
        ({"target_new": "x" * (MAX_TEXT + 1)}, "'target_new' has 10,001 characters; at most 10,000 are allowed"),
    ],
)
def test_a_bad_field_is_told_with_its_record_number(write, change, reason):
    path = write("facts.jsonl", lines(OWN, {**OWN, **change}, OWN))
    message = told(path)
    assert message.startswith(f"{path}: 1 record cannot be used (--skip-bad goes on without):\n  record 2: {reason}")
    assert message.count("\n") == 1
    assert len(read_facts(path, skip_bad=True).facts) == 2


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"subject": "a", "prompt": "a is"}, "'target_new' is missing (found: subject, prompt)"),
        ({"text": "a"}, "'subject' is missing (found: text)"),
        ({}, "'subject' is missing (found: nothing)"),
        ({"\ud800\x1b\n": 1}, r"'subject' is missing (found: \ud800\x1b\n)"),
        (5, "expected an object with subject, prompt and target_new, found int"),
        (None, "expected an object with subject, prompt and target_new, found NoneType"),
        (["a", "b", "c"], "expected an object with subject, prompt and target_new, found list"),
        ({"requested_rewrite": {"subject": "a"}}, "'requested_rewrite.prompt' is missing"),
        ({"requested_rewrite": "a"}, "'requested_rewrite' must be an object, not str 'a'"),
        ({**NESTED, "neighborhood_prompts": "a b"}, "'neighborhood_prompts' must be a list, not str 'a b'"),
        ({**ZSRE, "answers": []}, "'answers' is empty, and they are what is edited to"),
        ({**ZSRE, "answers": "uniform"}, "'answers' must be a list, not str 'uniform'"),
        ({**ZSRE, "src": "What is it?"}, "the subject 'UniFirst' does not occur in the prompt 'What is it?'"),
    ],
)
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_a_record_of_another_shape_is_told_with_its_number(write, suffix, record, reason):
    content = lines(OWN, record) if suffix == ".jsonl" else json.dumps([OWN, record])
    message = told(write(f"facts{suffix}", content))
    assert f"1 record cannot be used (--skip-bad goes on without):\n  record 2: {reason}" in message
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"subject": "Z\xfcrich"}', "not valid UTF-8 (byte 0xfc at position 14); save the file as UTF-8"),
        (b'{"subject": "Zur', "not valid JSON (column 13: Unterminated string starting at)"),
        (b"subject: a", "not valid JSON (column 1: Expecting value)"),
        (b"", "the line is empty"),
        (b'{"id": ' + b"9" * 5000 + b"}", "not valid JSON (a number of thousands of digits)"),
        (b'{"a":' * 100_000, "not valid JSON (nested too deeply)"),
    ],
)
def test_a_bad_line_of_jsonl_is_told_with_its_number(write, line, reason):
    path = write("facts.jsonl", lines(OWN) + line + b"\n" + lines(OWN))
    assert told(path).endswith(f"\n  record 2: {reason}")
    assert [fact.record for fact in read_facts(path, skip_bad=True).facts] == [1, 3]


def test_deep_nesting_where_text_belongs_is_one_bad_record(write):
    deep = lines(OWN).replace(b'"Vienna"', b"[" * 600 + b"]" * 600)
    read = read_facts(write("facts.jsonl", lines(OWN) + deep), skip_bad=True)
    assert len(read.facts) == 1
    assert read.bad[0].startswith("record 2: ")


def test_an_id_that_is_no_text_does_no_harm(write):
    path = write("facts.jsonl", lines({**OWN, "id": "\ud800"}, {**OWN, "id": None}, {**OWN, "case_id": 3, "id": 4}))
    assert [fact.source_id for fact in read_facts(path).facts] == ["?", "", "3"]


def test_a_line_of_100_mb_is_neither_a_traceback_nor_held_in_memory(write):
    path = write("facts.jsonl", lines(OWN) + b'{"subject": "' + b"x" * 8192)
    with path.open("r+b") as file:
        file.seek(100_000_000 + len(lines(OWN)) - 1)
        file.write(b"\n" + lines(OWN))
    tracemalloc.start()
    try:
        read = read_facts(path, skip_bad=True)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()
    assert [fact.record for fact in read.facts] == [1, 3]
    assert read.bad == ["record 2: the line is 100.0 MB long; a fact is at most 1 MB"]


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ("Big Ben,{} is in,\n", "record 2: 'target_new' is missing"),
        ("Big Ben,{} is in\n", "record 2: 'target_new' is missing"),
        ("Big Ben,{} is in,Rome,Paris,Oslo\n", "record 2: more fields than the header's 4"),
        (
            'Big Ben,{} is in,Rome,"[""a"", ""b"""\n',
            """record 2: 'paraphrases' begins as a JSON list and is none: ["a", "b\"""",
        ),
        ("Big Ben,{} is in,Rome,[{}]\n", "record 2: 'paraphrases' must be text, not dict {}"),
        ("Big Ben,{} is in,Ro\x07me,\n", r"record 2: 'target_new' holds control characters: 'Ro\x07me'"),
        (
            "Big Ben,{} is in,Rome," + "[" * 99 + "\n",
            f"record 2: 'paraphrases' begins as a JSON list and is none: {'[' * 79}…",
        ),
        ("Big Ben,{} is in,Rome,[" + "9" * 5000 + "]\n", None),
    ],
)
def test_a_bad_row_of_csv_is_told_with_its_number(write, rows, reason):
    path = write("facts.csv", "subject,prompt,target_new,paraphrases\nBig Ben,{} is in,Rome,\n" + rows)
    if reason is None:
        assert len(read_facts(path).facts) == 2
    else:
        assert told(path).endswith(f"\n  {reason}")
        assert len(read_facts(path, skip_bad=True).facts) == 1


# --- files that cannot be read ------------------------------------------------------------------------------------

HEADER = b"subject,prompt,target_new\n"


UNREADABLE = {
    "zip.jsonl": (b"PK\x03\x04\x14\0\0\0", " is a zip file, not the .jsonl text it is named as"),
    "gzip.json": (b"\x1f\x8b\x08\0", " is a gzip file, not the .json text it is named as"),
    "picture.csv": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", " is a PNG picture, not the .csv text it is named as"),
    "paper.json": (b"%PDF-1.7\n", " is a PDF, not the .json text it is named as"),
    "parquet.jsonl": (b"PAR1\x15\x04", " is a Parquet file, not the .jsonl text it is named as"),
    "program.jsonl": (b"\x7fELF\x02\x01\0\0", " is a binary file, not the .jsonl text it is named as"),
    "utf-16.json": (json.dumps([OWN]).encode("utf-16"), " is UTF-16; save it as UTF-8"),
    "utf-16-be.csv": ("\ufeffsubject".encode("utf-16-be"), " is UTF-16; save it as UTF-8"),
    "utf-16-bare.jsonl": (lines(OWN).decode().encode("utf-16-le"), " is a binary file, not the .jsonl text it is"),
    "json.csv": (json.dumps([OWN]), " holds JSON, not CSV; rename it to .json or .jsonl"),
    "lines.csv": (lines(OWN), " holds JSON, not CSV; rename it to .json or .jsonl"),
    "lines.json": (lines(OWN, OWN), ", line 2: not valid JSON (Extra data); if it holds one object a line, rename"),
    "list.jsonl": (json.dumps([OWN]), " holds one JSON list, not an object a line; rename it to .json"),
    "long-list.jsonl": ("[" + " " * 2_000_000 + "]", " holds one JSON list, not an object a line; rename it to"),
    "bom-list.jsonl": (b"\xef\xbb\xbf [\n{}]", " holds one JSON list, not an object a line; rename it to .json"),
    "empty.json": (b"", " is empty"),
    "empty.jsonl": (b"\n\n", " is empty"),
    "empty.csv": (b"\xef\xbb\xbf", " is empty"),
    "facts.txt": (lines(OWN), ": facts come from .json, .jsonl or .csv files, not '.txt'"),
    "facts": (lines(OWN), ": facts come from .json, .jsonl or .csv files, not 'facts'"),
    "truncated.json": (json.dumps([OWN, OWN], indent=1)[:-30], ", line 32: not valid JSON ("),
    "latin-1.json": ('[\n"Zürich"]'.encode("latin-1"), ", line 2: not valid UTF-8 (byte 0xfc); save the file as"),
    "latin-1.csv": (HEADER + "a,a is,Köln".encode("latin-1"), ", line 2: not valid UTF-8 (byte 0xf6); save the"),
    "deep.json": (b"[" * 100_000, ": not valid JSON (nested too deeply)"),
    "digits.json": (b"[" + b"9" * 5000 + b"]", ": not valid JSON (a number of thousands of digits)"),
    "text.json": (b'"Vienna"', ": expected a list of records, found str"),
    "other.json": (b'{"data": []}', ": no usable fact in it"),
    "columns.csv": (b"subject,prompt\na,b\n", ": the header lacks the column 'target_new' (found: subject, prompt)"),
    "german.csv": (b"subject;prompt;target_new\n", ": the header lacks the column 'subject' (found: subject;prompt"),
    "no-header.csv": (b"\na,a is,b\n", ": the header lacks the column 'subject' (found: nothing)"),
    "only-header.csv": (HEADER, ": no usable fact in it"),
    "quote.csv": (HEADER + b'a,"a is,b\n', ", line 2: not valid CSV (unexpected end of data)"),
    "field.csv": (HEADER + b"a,a is," + b"b" * 200_000, ", line 2: not valid CSV (field larger than field limit"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_file_that_is_not_what_it_says(write, name):
    content, reason = UNREADABLE[name]
    path = write(name, content)
    message = told(path)
    assert message.startswith(f"{path}{reason}")
    assert "\n" not in message


def test_a_file_that_is_not_there(tmp_path):
    (tmp_path / "folder.json").mkdir()
    for missing in (tmp_path / "missing.jsonl", tmp_path / "folder.json", tmp_path / "no" / "folder", "missing.csv"):
        assert told(missing) == f"there is no file '{missing}'"
    assert told("x" * 300 + ".json").endswith(" cannot be read: File name too long")
    assert told("~nobody-of-this-name/facts.json").startswith("~nobody-of-this-name/facts.json cannot be read: ")


# --- anything at all ----------------------------------------------------------------------------------------------

FIELDS = sorted({*OWN, *NESTED, *NESTED["requested_rewrite"], *FLAT, *ZSRE, "str", "id", "answer"})
FRAGMENTS = [b"subject", b"prompt", b"target_new", b",", b"\n", b"\r", b'"', b"{", b"}", b"[", b"]", b":", b"|", b"\\u"]
FRAGMENTS += [b"\\ud800", b"\xef\xbb\xbf", b"\xff", b"\0", b"a", HEADER, lines(OWN), lines(FLAT), CSV.encode()]
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["a", "a {}", "{}"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4),
    max_leaves=8,
)
RECORDS = st.sampled_from([OWN, NESTED, FLAT, ZSRE]).flatmap(
    lambda record: st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=3).map(lambda change: {**record, **change})
)


def only_clear_errors(path: Path) -> None:
    try:
        read = read_facts(path, skip_bad=True)
    except SphereEditError as error:
        str(error).encode()
        return
    assert all(reason.startswith("record ") and "\n" not in reason for reason in read.bad)
    assert all(fill("{}", fact)[0] == fact.filled_prompt for fact in read.facts if fact.subject)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
@given(content=st.binary(max_size=60) | st.lists(st.sampled_from(FRAGMENTS), max_size=12).map(b"".join))
@settings(max_examples=120, deadline=None)
def test_any_bytes_are_facts_or_a_clear_error(tmp_path_factory, suffix, content):
    path = tmp_path_factory.getbasetemp() / f"bytes{suffix}"
    path.write_bytes(content)
    only_clear_errors(path)


@given(records=st.lists(RECORDS | VALUES, min_size=1, max_size=3))
@settings(max_examples=80, deadline=None)
def test_any_record_is_a_fact_or_a_clear_error(tmp_path_factory, records):
    path = tmp_path_factory.getbasetemp() / "records.jsonl"
    path.write_bytes(lines(*records))
    only_clear_errors(path)


@given(
    st.builds(
        Fact,
        paraphrases=st.lists(st.text(), max_size=3).map(tuple),
        neighbors=st.lists(st.builds(Neighbor), max_size=3).map(tuple),
    )
)
@settings(max_examples=50, deadline=None)
def test_facts_survive_json(fact):
    assert Fact.from_dict(json.loads(json.dumps(fact.as_dict()))) == fact


WORDS = st.text(string.ascii_letters + "éß東京🗼{} \u0308", min_size=1, max_size=12)


@given(WORDS, WORDS, WORDS, st.booleans())
@example("{", "a", "}", True)
@example("is ", "{", " or ", True)
@settings(deadline=None)
def test_a_usable_fact_holds_its_subject_once_and_reads_back_as_itself(before, subject, after, filled):
    prompt = f"{before}{subject if filled else '{}'}{after}"
    try:
        (fact,) = facts_from([{"subject": subject, "prompt": prompt, "target_new": "x"}]).facts
    except SphereEditError:
        return
    assert fact.prompt.count("{}") == 1
    assert facts_from([fact]).facts == [fact]
    text, end = fill("So. {}", fact)
    assert text == f"So. {fact.filled_prompt}"
    assert text[:end].endswith(fact.subject)


# --- batches ------------------------------------------------------------------------------------------------------


def fact(record: int, target: str = "Vienna", subject: str = "Big Ben", prompt: str = "{} is in") -> Fact:
    return Fact(subject, prompt, target, record=record)


def other(record: int) -> Fact:
    return fact(record, subject=f"Tower {record}")


@pytest.mark.parametrize(
    ("twin", "reason"),
    [
        (fact(3), "record 3: the same fact as record 1, in one batch"),
        (fact(3, subject="big  BEN"), "record 3: the same fact as record 1, in one batch"),
        (
            fact(3, "Rome", prompt="{}  Is in"),
            "record 3: contradicts record 1 in the same batch ('Big Ben Is in' → 'Vienna' or 'Rome'?)",
        ),
    ],
)
def test_one_batch_says_one_thing_of_a_subject_and_prompt(twin, reason):
    stream = [fact(1), other(2), twin, other(4)]
    with pytest.raises(SphereEditError) as caught:
        plan_batches(stream, 4, skip_bad=False)
    expected = "facts that cannot stand in one batch (--skip-bad keeps the first of each):"
    assert str(caught.value) == f"{expected}\n  {reason}"
    plan = plan_batches(stream, 4, skip_bad=True)
    assert [kept.record for kept in plan.facts] == [1, 2, 4]
    assert plan.bad == [reason]


def test_across_batches_a_fact_may_be_said_again():
    stream = [fact(1), other(2), fact(3, "Rome"), other(4), fact(5)]
    plan = plan_batches(stream, 2, skip_bad=False)
    assert plan.facts == stream
    assert plan.bad == []


def test_other_subjects_and_other_prompts_are_other_facts():
    stream = [fact(1), fact(2, subject="Big Bend"), fact(3, prompt="{} was built in")]
    assert plan_batches(stream, 10, skip_bad=False).facts == stream


def test_batches_are_cut_from_what_is_kept():
    stream = [fact(1), fact(2), other(3), fact(4, "Rome")]
    plan = plan_batches(stream, 2, skip_bad=True)
    assert [kept.record for kept in plan.facts] == [1, 3, 4]


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("xy")), max_size=12), st.integers(1, 5))
@settings(deadline=None)
def test_no_planned_batch_holds_a_key_twice(stream, size):
    facts = [fact(number, target, subject) for number, (subject, target) in enumerate(stream, 1)]
    plan = plan_batches(facts, size, skip_bad=True)
    assert len(plan.facts) + len(plan.bad) == len(facts)
    for start in range(0, len(plan.facts), size):
        keys = [kept.key for kept in plan.facts[start : start + size]]
        assert len(set(keys)) == len(keys)


@given(st.lists(st.sampled_from(["a", "A ", "b", "c"]), max_size=12), st.integers(1, 5))
@settings(deadline=None)
def test_a_batch_is_about_different_subjects_and_every_fact_has_its_turn(subjects, size):
    """In order for each subject, so that what supersedes comes after what it supersedes."""
    facts = [fact(number, subject=subject) for number, subject in enumerate(subjects, 1)]
    pending, done = list(range(len(facts))), []
    while pending:
        batch = next_batch(facts, pending, size)
        assert 1 <= len(batch) <= size
        assert batch[0] == pending[0]
        assert len({facts[index].key[0] for index in batch}) == len(batch)
        pending = [index for index in pending if index not in batch]
        done += batch
    assert sorted(done) == list(range(len(facts)))
    for subject in "abc":
        own = [index for index in done if facts[index].key[0] == subject]
        assert own == sorted(own)


def test_a_batch_of_different_subjects_is_the_next_facts_in_order():
    facts = [fact(number, subject=str(number)) for number in range(7)]
    assert next_batch(facts, [1, 2, 4, 5, 6], 3) == [1, 2, 4]


def test_a_later_fact_supersedes_an_earlier_one_whatever_its_case_and_spaces():
    facts = [
        fact(1),
        other(2),
        fact(3, "Rome", "BIG  ben", "{} IS in"),
        fact(4, subject="Straße"),
        fact(5, subject="STRASSE"),
    ]
    assert superseded_by(facts, [2], [0, 1]) == [0]
    assert superseded_by(facts, [4], [0, 1, 2, 3]) == [3]
    assert superseded_by(facts, [1], [0]) == []
    assert superseded_by(facts, [2], []) == []


# --- passages -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("text.txt", "One two\nthree.\n\nFour\u2028five.\n\n\n\n"),
        ("windows.md", b"\xef\xbb\xbfOne two\r\nthree.\r\n\r\nFour five.\r\n"),
        ("lines.jsonl", lines({"text": "One two three."}, {"title": "x", "text": "Four five."})),
        ("separator.jsonl", '{"text": "One two three."}\n\n{"text": "Four\u2028five."}\n'),
    ],
)
def test_passages(write, name, content):
    passages = [" ".join(passage.split()) for passage in read_passages(str(write(name, content)))]
    assert passages == ["One two three.", "Four five."]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", lines({"text": "a"}, {"title": "b"}), ", line 2: expected a JSON object with a 'text' field"),
        ("a.jsonl", lines({"text": "a"}, {"text": 5}), ", line 2: expected a JSON object with a 'text' field"),
        ("a.jsonl", lines({"text": "a"}, {"text": "\ud800"}), ", line 2: expected a JSON object with a 'text' field"),
        ("a.jsonl", b"[" * 100_000, ", line 1: expected a JSON object with a 'text' field"),
        ("a.jsonl", b"9" * 5000, ", line 1: expected a JSON object with a 'text' field"),
        ("a.txt", b"a\n\n\xff", " is not valid UTF-8 text (byte 3)"),
        ("a.txt", "only one", " holds 1 passage; at least 2 are needed, hundreds are better"),
        ("a.txt", "", " holds 0 passages; at least 2 are needed, hundreds are better"),
        ("a.pdf", "a\n\nb", ": expected a .txt or .jsonl file, or a hub data set"),
    ],
)
def test_passages_that_cannot_be_used(write, name, content, reason):
    path = write(name, content)
    with pytest.raises(SphereEditError) as caught:
        read_passages(str(path))
    assert str(caught.value) == f"corpus {path}{reason}"


def test_passages_that_are_not_there(tmp_path):
    for missing in (f"{tmp_path}/missing.txt", f"{tmp_path}/missing"):
        with pytest.raises(SphereEditError, match=f"there is no corpus file '{missing}'"):
            read_passages(missing)
    with pytest.raises(SphereEditError, match="cannot be read"):
        read_passages("x" * 300 + ".txt")


def test_an_alternative_is_refused_where_no_record_has_one(write):
    path = write("own.jsonl", json.dumps({"subject": "Big Ben", "prompt": "{} stands in", "target_new": "Vienna"}))
    with pytest.raises(SphereEditError, match="has no ZsRE record.*leave --target alternative out"):
        read_facts(path, zsre_target="alternative")
