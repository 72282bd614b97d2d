"""What the studio does, without a browser: its desk, its queue, its folders, its drafts, and the words and tables that it shows."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import FACTS, fact_records
from families import save_tiny
from sphere_edit import SphereEditError
from sphere_edit.evaluation.comparing import compare
from sphere_edit.facts.readers import facts_from, read_named, read_pasted
from sphere_edit.facts.suggesting import suggest_neighbours, suggest_paraphrases
from sphere_edit.preview import preview
from sphere_edit.progress import Quiet
from sphere_edit.reporting.ledger import WHICH, ledger, sought
from sphere_edit.runs.folder import RunFolder
from sphere_edit.studio import look
from sphere_edit.studio.desk import Desk
from sphere_edit.studio.places import Places
from sphere_edit.studio.server import checked
from sphere_edit.studio.worker import Job, Live, Worker

SETTINGS: dict[str, Any] = {
    "method": "memit_seq",
    "options": {"second_moment_weight": 0.01},
    "batch_size": 2,
    "layers": [1, 2],
    "targets": {"steps": 3, "lr": 0.3},
    "templates": 0,
    "moments": {"sampled_tokens": 512},
    "tokens_per_batch": 256,
}
HOSTILE = ["<img src=x onerror=alert(1)>", "<script>alert(1)</script>", "\x1b[31m", "\u202egnp.exe", "${alert(1)}{{1}}"]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("studio")
    save_tiny("llama", root / "model")
    return root


def done(job: Job | None) -> Any:
    assert job is not None
    assert job.over.wait(120)
    if job.error:
        raise SphereEditError(job.error)
    return job.result


@pytest.fixture
def desk(root, tmp_path):
    desk = Desk(Places([tmp_path, root]), SETTINGS, Quiet())
    done(desk.open_model(str(root / "model"), "first"))
    yield desk
    done(desk.worker.submit("closing", desk.close))


def weights(desk: Desk) -> dict[str, torch.Tensor]:
    return {name: desk.editor.weights.deployed(name) for name in desk.editor.weights.names}


# --- editing, and the way back ------------------------------------------------------------------------------------


def test_a_preview_is_taken_back_bit_for_bit_and_editing_writes_what_it_showed(desk):
    before = weights(desk)
    done(desk.add(facts_from(fact_records(3))))
    done(desk.preview())
    found = desk.previewed
    assert found is not None
    assert [row.kind for row in found.rows[:4]] == ["fact", "paraphrase", "neighbour", "neighbour"]
    assert len(found.rows) == 12
    assert any(row.before != row.after for row in found.rows)
    assert all(torch.equal(before[name], weight) for name, weight in weights(desk).items())
    assert desk.known_run().history.head == 0
    assert len(desk.draft.rows) == 3  # it was not kept, so they are still to be edited
    done(desk.edit())
    assert {name: desk.editor.weights.digest(name) for name in desk.editor.weights.names} == found.digests
    assert desk.draft.rows == []
    assert desk.previewed is None


def test_a_preview_of_more_facts_goes_back_to_the_last_batch_also_where_it_fails(desk, monkeypatch):
    done(desk.add(facts_from(fact_records(2))))
    done(desk.edit())
    before, head = weights(desk), desk.known_run().history.head
    found = preview(desk.editor, facts_from(fact_records(2, 4)))
    metrics = desk.known_run().current_metrics()
    assert metrics is not None
    assert found.text["unedited"]["perplexity"] == metrics["edited"]["perplexity"]
    monkeypatch.setattr(type(desk.editor), "metrics", lambda self: (_ for _ in ()).throw(SphereEditError("full disk")))
    with pytest.raises(SphereEditError, match="full disk"):
        preview(desk.editor, facts_from(fact_records(2, 6)))
    assert desk.known_run().history.head == head
    assert all(torch.equal(before[name], weight) for name, weight in weights(desk).items())


def test_stop_ends_after_the_batch_and_going_on_ends_at_the_same_bits(desk, root, tmp_path, monkeypatch):
    records = fact_records(6)
    done(desk.add(facts_from(records)))
    editor, asked = desk.editor, []

    def say(text: str, style: str = "") -> None:
        if text.startswith("Batch 2"):
            asked.append(text)
            desk.stop()

    monkeypatch.setattr(desk.live, "say", say)
    with pytest.raises(SphereEditError, match="stopped after batch 2, as asked; 2 facts waiting"):
        done(desk.edit())
    assert asked
    assert desk.known_run().history.pending == [4, 5]
    desk.draft.add(facts_from(fact_records(1, 8)))
    with pytest.raises(SphereEditError, match="2 facts waiting in this run"):
        desk.edit()
    done(desk.go_on())
    whole = Desk(Places([tmp_path, root]), SETTINGS, Quiet())
    done(whole.open_model(str(root / "model"), "whole"))
    done(whole.add(facts_from(records)))
    done(whole.edit())
    assert desk.known_run().history.finished
    for name in editor.weights.names:
        assert editor.weights.digest(name) == whole.editor.weights.digest(name)
    done(whole.worker.submit("closing", whole.close))


def test_a_stop_in_a_preview_takes_it_back_and_one_without_work_does_nothing(desk, monkeypatch):
    desk.stop()
    done(desk.add(facts_from(fact_records(6))))
    before = weights(desk)
    monkeypatch.setattr(desk.live, "say", lambda text, style="": desk.stop() if text.startswith("Batch 2") else None)
    with pytest.raises(SphereEditError, match="the preview was stopped, and what it had done is taken back"):
        done(desk.preview())
    assert all(torch.equal(before[name], weight) for name, weight in weights(desk).items())
    assert desk.known_run().history.pending == []
    monkeypatch.undo()
    done(desk.edit())
    assert len(desk.known_run().history.retained) == 6


def test_rollback_and_removal_say_first_what_they_withdraw(desk):
    records = fact_records(4)
    records.append({**records[0], "target_new": "Japan"})
    done(desk.add(facts_from(records)))
    done(desk.edit())
    history = desk.known_run().history
    assert history.superseded == {0}
    back = history.back_to(2)
    assert (back.batches, back.withdrawn, back.again) == (tuple(range(3, history.head + 1)), (4,), (0,))
    said = look.going_back(desk, 2)
    assert "4: 'The Eiffel Tower is located in the city of' → 'Japan'" in said.split("These stand again:")[0]
    assert "0: 'The Eiffel Tower is located in the city of' → 'Rome'" in said.split("These stand again:")[1]
    assert "takes that one with it" in look.taking_back(desk, 4)
    assert desk.known_run().history.head == history.head  # asking does nothing
    with pytest.raises(SphereEditError, match="no batch 9"):
        look.going_back(desk, 9)
    with pytest.raises(SphereEditError, match="superseded by fact 4"):
        look.taking_back(desk, 0)
    done(desk.remove(4))
    assert desk.known_run().history.removed == {0, 4}
    done(desk.roll_back(1))
    assert desk.known_run().history.retained == [0, 1]


# --- one thing at a time ------------------------------------------------------------------------------------------


def test_one_job_writes_at_a_time_and_others_have_places():
    worker, go = Worker(Live(Quiet())), threading.Event()
    first = worker.submit("editing 3 facts", go.wait, writes=True)
    with pytest.raises(SphereEditError, match="'editing 3 facts' is at work, here or in another tab"):
        worker.submit("editing 1 facts", go.wait, writes=True)
    second, third = worker.submit("asking 'a'", lambda: 2), worker.submit("asking 'b'", lambda: 3)
    assert worker.before(third)[-1] == "asking 'a'"
    assert "asking 'b'" in worker.queue()
    assert worker.writing
    go.set()
    assert (done(second), done(third)) == (2, 3)
    assert first.over.is_set()
    assert not worker.writing
    assert worker.before(third) == []


def test_what_nobody_foresaw_is_a_sentence_on_the_page_and_the_worker_goes_on(capsys):
    worker = Worker(Live(Quiet()))
    job = worker.submit("dividing", lambda: 1 / 0)
    with pytest.raises(SphereEditError, match="dividing failed \\(ZeroDivisionError"):
        done(job)
    assert "Traceback" in capsys.readouterr().err
    assert done(worker.submit("again", lambda: 1)) == 1


def test_bars_say_rate_and_time_left():
    live = Live(Quiet())
    with live.bar("targets", 100, "fact") as advance:
        advance(25)
        (bar,) = live.bars
        bar.began -= 5
        assert (bar.done, round(bar.rate), round(bar.left or 0)) == (25, 5, 15)
    assert live.bars == []


# --- facts --------------------------------------------------------------------------------------------------------


def test_every_fault_stands_beside_its_row_in_the_readers_words(desk, tmp_path):
    lines = [
        json.dumps(fact_records(1)[0]),
        '{"subject": "Ada"}',
        "no json",
        json.dumps({**fact_records(1)[0], "target_new": "Japan"}),
    ]
    path = tmp_path / "facts.jsonl"
    path.write_text("\n".join(lines))
    given = read_named(path, "facts.jsonl")
    assert [sentence[:9] for sentence in given.bad] == ["record 2:", "record 3:"]
    done(desk.add(given))
    rows = look.drafted(desk).grid[1]
    assert [row[0] for row in rows] == ["1", "2", "3", "4"]
    assert rows[0][4] == "good"
    assert rows[1][4] == "'prompt' is missing (found: subject)"
    assert rows[2][4] == "not valid JSON (column 1: Expecting value)"
    assert rows[3][4].startswith("contradicts record 1 in the same batch")
    with pytest.raises(SphereEditError, match="3 rows cannot be edited; the first is row 2: 'prompt' is missing"):
        desk.edit()
    desk.draft.take_out([2, 3, 4])
    done(desk.edit())
    done(desk.add(facts_from([{**fact_records(1)[0], "target_new": "Japan"}])))
    assert look.drafted(desk).grid[1][0][4] == "supersedes fact 0, 'Rome'"


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ('[{"subject": "Ada", "prompt": "{} plays", "target_new": "chess"}]', 1),
        ('{"subject": "Ada", "prompt": "{} plays", "target_new": "chess"}\n' * 2, 2),
        ("subject,prompt,target_new\nAda,{} plays,chess\nBo,{} plays,chess\n", 2),
    ],
)
def test_pasted_text_is_read_as_the_file_that_it_looks_like(text, count):
    found = read_pasted(text)
    assert (len(found.facts), found.bad) == (count, [])


@pytest.mark.parametrize("text", ["", "  \n", "\x00\x01", "hello", "x" * 1_000_000, "\ud800", "[" * 100_000])
def test_pasted_nonsense_is_a_sentence(text):
    with pytest.raises(SphereEditError, match="^what was pasted") as said:
        read_pasted(text, "what was pasted")
    assert "/tmp" not in str(said.value)


def test_suggestions_are_of_the_same_sentence_and_none_is_the_fact_itself(desk, monkeypatch):
    from sphere_edit.facts import suggesting

    loaded = desk.editor.loaded
    monkeypatch.setattr(suggesting, "_said", lambda loaded, prompt: ["Ben", "Big Ben", "Rome", "A; {}"][:3])
    assert suggest_neighbours(loaded, "Big Ben", "{} stands in") == ["Ben stands in", "Rome stands in"]
    monkeypatch.setattr(
        suggesting, "_said", lambda loaded, prompt: ["Where is Big Ben?", "Big Ben stands in", "Where is it?"]
    )
    assert suggest_paraphrases(loaded, "Big Ben", "{} stands in") == ["Where is Big Ben?"]
    monkeypatch.undo()
    others, things = done(desk.suggest("Ada", "{} plays the"))  # a random model's are nothing, and no mistake
    assert all("Ada" in other for other in others)
    assert all(thing.endswith("plays the") for thing in things)


# --- what is shown ------------------------------------------------------------------------------------------------


def test_both_answers_are_those_of_generate_and_marks_are_where_they_part(desk):
    done(desk.add(facts_from(fact_records(2))))
    done(desk.edit())
    editor = desk.editor
    subject, prompt, new = FACTS[0]
    filled = prompt.replace("{}", subject)
    found = done(desk.compare(filled, [new, "Paris"], new_tokens=8))
    assert found.said[1] == editor.generate(filled, 8)
    with editor.weights.unedited():
        assert found.said[0] == editor.generate(filled, 8)
    same = ["".join(text for text, differs in side if not differs) for side in (found.unedited, found.edited)]
    assert same[0] == same[1]
    ids = editor.tokenizer(f"{filled} {new}")["input_ids"]
    with torch.no_grad():  # the probability by its definition, in float64
        logits = editor.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    first = len(editor.tokenizer(filled)["input_ids"])
    wanted = sum(float(logits[at - 1, ids[at]]) for at in range(first, len(ids)))
    assert found.chances[0].edited == pytest.approx(torch.tensor(wanted).exp().item(), rel=1e-3)
    once, again = (compare(editor.loaded, editor.weights, filled, new_tokens=8, seed=5) for _ in range(2))
    assert once == again


def test_the_ledger_has_every_fact_and_its_filters(desk):
    records = fact_records(4)
    records.append({**records[0], "target_new": "Japan"})
    done(desk.add(facts_from(records)))
    done(desk.edit())
    entries = ledger(desk.known_run())
    assert sorted(entry.index for entry in entries) == list(range(5))
    assert [entry.index for entry in sought(entries, "superseded")] == [0]
    assert {entry.batch for entry in sought(entries, batch=2)} == {2}
    assert [entry.index for entry in sought(entries, text="MOUNT fuji")] == [1]
    assert all(sought(entries, which) is not None for which in WHICH)
    failing = sought(entries, "failing")
    assert entries[: len(failing)] == failing
    desk.editor.rollback(1)
    assert {entry.index for entry in sought(ledger(desk.known_run()))} == {0, 1}
    assert {entry.index for entry in sought(ledger(desk.known_run()), "withdrawn")} == {2, 3, 4}


def test_pages_of_many_facts(desk):
    desk.draft.add(facts_from([{"subject": f"S{n}", "prompt": "{} is", "target_new": "x"} for n in range(2050)]))
    found = look.drafted(desk, 21)
    assert (found.page, found.pages, len(found.grid[1])) == (21, 21, 50)
    assert found.grid[1][0][0] == "2001"
    assert look.drafted(desk, 99).page == 21


def test_everything_foreign_is_text(desk):
    records = [
        {"subject": f"{text.replace(chr(27), '')} {n}", "prompt": "{} plays the", "target_new": "chess <b>"}
        for n, text in enumerate(HOSTILE)
    ]
    done(desk.add(facts_from(records)))
    done(desk.edit())
    html = look.status(desk) + look.answers(desk)
    assert set(re.findall(r"<(\w+)", html)) <= {"div", "p", "b", "br", "ul", "li", "progress", "em", "span", "small"}
    desk.live.say(HOSTILE[0])
    assert "&lt;img src=x onerror=alert(1)&gt;" in look.status(desk)
    cells = [text for row in look.facts(desk).grid[1] + look.timeline(desk)[1] for text in row]
    assert not any(sign in text for text in cells for sign in "\x1b\u202e\n")
    assert look.cell("x" * 1_000_000)[-1] == "…"
    assert len(look.cell("x" * 1_000_000)) <= 300


def test_tables_say_what_the_terminal_says(desk):
    done(desk.add(facts_from(fact_records(2))))
    done(desk.edit())
    assert look.inspected(desk)[0][1][1][0] == ["model", str(desk.editor.loaded.source)]
    title, (headers, rows) = look.story(desk, 1)[0]
    assert title.startswith("Fact 1, 'Mount Fuji stands in' → 'Sweden': stands")
    assert headers[2] == "what happened"
    assert [row[2] for row in rows] == ["came, from facts given in Python", "edited"]
    title, (headers, rows) = look.story(desk, 1)[2]
    assert (headers[1:4], rows[0][0]) == (["says", "likelihood", "strict"], "Efficacy")
    assert [row[0] for row in rows] == ["Efficacy", "Generalization", "Specificity", "Specificity"]
    assert "2 facts edited" in look.timeline(desk)[1][-1][2]
    assert any(row[0].startswith("Perplexity") for row in look.metrics(desk)[1])
    assert look.figure(desk) is not None
    assert "Did the edits take?" in look.answers(desk)


def test_nothing_is_shown_as_a_result_before_there_is_one(root, tmp_path):
    desk = Desk(Places([tmp_path, root]), SETTINGS, Quiet())
    assert look.facts(desk).grid[1] == look.timeline(desk)[1] == look.metrics(desk)[1] == []
    assert "No model is loaded" in look.status(desk)
    for ask in (
        lambda: desk.compare("a"),
        desk.edit,
        desk.verify,
        lambda: look.story(desk, 0),
        lambda: desk.export("hf", "x"),
    ):
        with pytest.raises(SphereEditError):
            ask()


# --- what may be opened and written -------------------------------------------------------------------------------


def test_export_and_verify(desk, root):
    done(desk.add(facts_from(fact_records(2))))
    done(desk.edit())
    assert done(desk.export("delta", "change")) == desk.places.home / "change"
    assert desk.exports() == ["change"]
    assert "is whole" in done(desk.verify())
    assert "its weights are those of" in done(desk.verify("change"))
    with pytest.raises(SphereEditError, match="is there already"):
        desk.export("delta", "change")
    again = Desk(Places([desk.places.home]), SETTINGS, Quiet())
    with pytest.raises(SphereEditError, match="another process"):
        done(again.open_run(desk.places.home / "first"))


@pytest.mark.parametrize(
    "name", ["", "..", "../x", "/etc/x", "a/b", "a\\b", ".hidden", "x" * 101, "a\nb", "a.", "C:x", "\x00"]
)
def test_new_folders_are_plain_names(tmp_path, name):
    with pytest.raises(SphereEditError):
        Places([tmp_path]).new(name)


def test_no_path_outside_the_chosen_folders(tmp_path, root):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "link").symlink_to(root)
    places = Places([mine])
    for path in (root, mine / ".." / "other", mine / "link" / "model", "/etc/passwd", "~", "\x00"):
        with pytest.raises(SphereEditError):
            places.inside(path)
        with pytest.raises(SphereEditError):
            places.model(str(path))
    assert places.model("owner/name") == "owner/name"  # a hub id
    assert Places([mine], str(root / "model")).model(str(root / "model")) == str(root / "model")  # as the command said
    assert places.models() == ["smollm2"]


def test_a_run_that_is_given_is_a_chosen_folder(desk, tmp_path):
    done(desk.add(facts_from(fact_records(1))))
    done(desk.edit())
    other = tmp_path / "elsewhere"
    other.mkdir()
    places = Places([other], str(tmp_path / "first"))
    assert places.inside(tmp_path / "first") == tmp_path / "first"
    assert places.runs() == [tmp_path / "first"]
    assert RunFolder.exists(places.runs()[0])


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.2", "::", "example.org"])
def test_other_addresses_want_a_password(host):
    with pytest.raises(SphereEditError, match="give a name and a password with --auth"):
        checked(host, None)
    assert checked(host, "me:long enough: with colons") == ("me", "long enough: with colons")
    for bad in ("me", "me:", ":password", "me:short"):
        with pytest.raises(SphereEditError, match="NAME:PASSWORD"):
            checked(host, bad)
    assert checked("127.0.0.1", None) is None
