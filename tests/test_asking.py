"""The fast ways of asking a model, against the plain ones: mixed lengths, a shared prefix, answers that end once they are decided."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gguf as library
import pytest
import torch

from conftest import fact_records
from families import FAMILIES, save_tiny, tiny
from ggufs import save_gguf
from sphere_edit.editing import diagnosing
from sphere_edit.editor import Editor
from sphere_edit.evaluation import generation
from sphere_edit.evaluation.generation import begins_with, continuations, could_begin_with, with_answers
from sphere_edit.evaluation.heldout import score_heldout
from sphere_edit.evaluation.scores import complete_answers, questions, score_facts
from sphere_edit.facts.prompts import Encoder
from sphere_edit.facts.readers import facts_from
from sphere_edit.models import attention, forward, gguf
from sphere_edit.models.attention import use_quicker_attention
from sphere_edit.models.forward import head_rows, last_hidden
from sphere_edit.models.generation import generate, pads_on_the_left
from sphere_edit.models.loaded import LoadedModel
from sphere_edit.models.prefix import Leads, SharedPrefix, common_length
from sphere_edit.models.replay import UpperLayers
from sphere_edit.models.tokens import TokenBatch
from sphere_edit.numerics.energy import hyperspherical_energy
from sphere_edit.progress import Quiet
from test_runs import METHODS, QUICK

ROWS = [[5, 9, 30], [7] * 3 + [41, 42], [60], list(range(3, 10))]  # with what follows, shorter than a window of 16


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_several_lengths_go_on_as_each_does_alone(family):
    """Together, but for a family whose attention makes infinite numbers of padding."""
    loaded = tiny(family, torch.float64)
    together = pads_on_the_left(loaded, ROWS, 7)
    assert together or family == "gemma2"
    alone = [generate(loaded, [row], 7)[0] for row in ROWS]
    if together:
        assert generate(loaded, ROWS, 7) == alone
    said = continuations(loaded, ROWS, [7, 3, 7, 6], 256, Quiet())
    assert said == [row[len(given) :][:count] for row, given, count in zip(alone, ROWS, [7, 3, 7, 6], strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_rows_have_in_common_is_run_once(family, monkeypatch):
    loaded = tiny(family, torch.float64)
    lead = [1, 30, 31, 32, 33, 34, 35, 36]
    rows = [[*lead, *row] for row in ROWS]
    shared = SharedPrefix(loaded, rows, len(lead))
    assert shared.length == len(lead)
    found = shared.last_hidden(rows)
    plain = last_hidden(loaded, TokenBatch.of(rows, loaded.device))[:, len(lead) :]
    for row, ours, theirs in zip(ROWS, found, plain, strict=True):
        torch.testing.assert_close(ours[: len(row)], theirs[: len(row)], atol=1e-6, rtol=1e-6)  # GPT-J turns in float32
    assert SharedPrefix(loaded, rows, 7).length == 0, "too little to be worth it"
    monkeypatch.setattr(SharedPrefix, "_fits", lambda self, row: False)
    plainly = SharedPrefix(loaded, rows, len(lead))
    assert plainly.length == 0, "a model that goes on otherwise than it runs whole rows"
    torch.testing.assert_close(plainly.last_hidden(rows)[:, len(lead) :], plain, atol=0, rtol=0)


def test_a_prefix_that_is_kept_otherwise_is_noticed():
    """Keys and values of the prefix are changed: the row that is run both ways tells."""
    loaded = tiny("llama")
    rows = [[1, *range(30, 45), 9], [1, *range(30, 45), 8]]
    assert SharedPrefix(loaded, rows, 16).length == 16
    run = SharedPrefix._run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SharedPrefix, "_run", lambda self, ids: [(k * 1.1, v) for k, v in run(self, ids)])
        assert SharedPrefix(loaded, rows, 16).length == 0
    whole = replace(loaded, architecture=replace(loaded.architecture, whole_rows=True))
    assert SharedPrefix(whole, rows, 16).length == 0


def rows_behind_leads() -> tuple[list[list[int]], list[int]]:
    """Rows of which most begin with one of three leads, and a pivot in each, behind its lead."""
    leads = [[], list(range(40, 52)), list(range(60, 67)), list(range(70, 81))]
    rests = [[1, 5, 9, 30 + number, 7] for number in range(8)] + [[1, 6, 80 - number] for number in range(8)]
    rows = [[*lead, *rest] for rest in rests for lead in leads]
    return rows, [len(lead) + 2 for _ in rests for lead in leads]


def test_rows_begin_with_the_longest_that_others_have():
    rows, pivots = rows_behind_leads()
    found = Leads.found(rows, pivots)
    assert found.length == 14, "twelve tokens, and the two that half of the rests begin with"
    assert [[*found.distinct[lead], *rest] for lead, rest in zip(found.of, found.rest(rows), strict=True)] == rows
    for lead, row, pivot in zip(found.of, rows, pivots, strict=True):
        alike = sorted((common_length([row, other]) for other in rows), reverse=True)[3]
        assert len(found.distinct[lead]) == min(pivot, alike)
    assert Leads.found(rows[:12], pivots[:12]).length == 0, "too little to be worth it"
    assert Leads.found(rows, [0] * len(rows)).length == 0, "nothing stands before the pivots"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_replay_behind_leads_is_that_of_whole_rows(family, monkeypatch):
    loaded = tiny(family, torch.float64)
    if loaded.architecture.whole_rows:
        return
    rows, pivots = rows_behind_leads()
    ours = UpperLayers(loaded, rows, pivots, 1)
    monkeypatch.setattr(Leads, "found", lambda rows, most: Leads.none(len(rows)))
    plain = UpperLayers(loaded, rows, pivots, 1)
    assert bool(plain.value.isfinite().all()) == (family != "gemma2")
    kept = torch.arange(1, len(rows), 3)
    for _ in range(2):
        delta = torch.randn(plain.value.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        torch.testing.assert_close(ours.value, plain.value, atol=1e-6, rtol=1e-6, equal_nan=True)  # Gemma 2's padding
        torch.testing.assert_close(
            ours.hidden(delta)[ours._real], plain.hidden(delta)[plain._real], atol=1e-5, rtol=1e-5, equal_nan=True
        )
        ours.keep(kept)
        plain.keep(kept)
        kept = torch.arange(4)


def test_a_lead_that_all_rows_have_is_run_once(monkeypatch):
    """As in a chat: no row is without."""
    loaded = tiny("llama", torch.float64)
    rows = [[*range(40, 60), 5 + number, 9, 7] for number in range(32)]
    assert Leads.found(rows, [21] * 32).distinct == [tuple(range(40, 60))]
    ours = UpperLayers(loaded, rows, [21] * 32, 1)
    assert len(ours._calls) == 2
    assert ours._calls[0][0][0].shape[1] == 2, "the pivot and what follows"
    read = []
    monkeypatch.setattr(Leads, "none", lambda rows: read.append(rows))
    UpperLayers(loaded, rows, [21] * 32, 1)
    assert read == [], "it holds, so nothing is run whole"


def test_leads_that_are_kept_otherwise_are_noticed(monkeypatch):
    """Keys of the leads are changed: the row that is run both ways tells, and rows are run whole."""
    loaded = tiny("llama")
    rows, pivots = rows_behind_leads()
    run = Leads.run

    def changed(self: Leads, loaded: LoadedModel) -> Any:
        cache, mask = run(self, loaded)
        for layer in cache.layers:
            layer.keys = layer.keys * 1.1
        return cache, mask

    monkeypatch.setattr(Leads, "run", changed)
    found = UpperLayers(loaded, rows, pivots, 1)
    assert len(found._calls) == 2, "those of the first try are forgotten"
    monkeypatch.setattr(Leads, "found", lambda rows, most: Leads.none(len(rows)))
    plain = UpperLayers(loaded, rows, pivots, 1)
    torch.testing.assert_close(found._clean, plain._clean, atol=0, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_prompts_longer_than_a_window_are_asked_by_length(family):
    """Padded rows of a sliding window are no test of what a model says; the window of this Gemma 2 is 16 tokens."""
    loaded = tiny(family, torch.float64)
    prompts = [*ROWS, list(range(3, 22))]
    alone = [generate(loaded, [row], 7)[0][len(row) :] for row in prompts]
    assert continuations(loaded, prompts, [7] * len(prompts), 256, Quiet()) == alone


def test_common_length():
    assert common_length([[1, 2, 3], [1, 2, 4, 5], [1, 2, 3, 9]]) == 2
    assert common_length([[1, 2], [1, 2, 3]]) == 2
    assert common_length([[4]]) == 1
    assert common_length([[1], [2]]) == 0


@pytest.mark.parametrize(
    ("said", "answer", "is_open"),
    [
        ("New", "New York", True),
        ("new york", "New York", True),  # "New Yorker" would be another
        ("New York ", "New York", True),
        ("New York.", "New York", False),
        ("New Yorks", "New York", False),
        ("Newark", "New York", False),
        ("", "New York", True),
        ("Z�", "Zürich", True),  # half of a character
        ("Zx�", "Zürich", False),
    ],
)
def test_a_text_that_may_yet_begin_with_an_answer(said, answer, is_open):
    assert could_begin_with(said, answer) is is_open


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_answers_end_once_they_are_decided_and_no_verdict_changes(family, monkeypatch):
    """Right answers of 1 to 14 tokens of what the model says, whole and with another end, beside 12 tokens of plain greedy decoding."""
    loaded = tiny(family, torch.float32)
    encoder = Encoder(loaded.tokenizer)
    (first,) = facts_from(fact_records(1)).facts
    before = encoder.encode(first.filled_prompt).ids
    (long,) = generate(loaded, [before], 14)
    facts = []
    for count in (1, 4, 5, 6, 7, 11, 14):
        text = loaded.tokenizer.decode(long[len(before) : len(before) + count])
        facts += [replace(first, target_new=text + more, separator="") for more in ("", "q", " q") if text.strip()]
    facts = complete_answers(loaded, facts)
    scores = score_facts(loaded, facts, 256, Quiet())
    monkeypatch.setattr(generation, "_SHOWN_TOKENS", 12)
    whole = with_answers(loaded, facts, scores, False, 256, Quiet())
    monkeypatch.undo()
    short = with_answers(loaded, facts, scores, False, 256, Quiet())
    asked = [question for fact in facts for question in questions(fact)]
    pairs = list(
        zip(asked, *([prompt for score in side for prompt in score.prompts()] for side in (whole, short)), strict=True)
    )
    for question, longer, shorter in pairs:
        assert shorter.begins == longer.begins
        assert longer.said.startswith(shorter.said) or shorter.said.startswith(longer.said), "one cut later"
        if question.right.ids is None:
            assert shorter.begins == begins_with(question.prompt + longer.said, question.prompt + question.right.text)
    assert {shorter.begins for _, _, shorter in pairs} == {True, False}
    assert any(len(shorter.said) < len(longer.said) for _, longer, shorter in pairs), "none is shorter"


def test_a_gguf_file_is_read_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SPHERE_EDIT_CACHE", str(tmp_path / "cache"))
    file = save_gguf(save_tiny("llama", tmp_path / "model"), tmp_path / "model.gguf", "F32")
    read, reader = [], library.GGUFReader
    monkeypatch.setattr(library, "GGUFReader", lambda path: (read.append(path), reader(path))[1])
    counting = library.GGUFReader
    folder = gguf.converted(str(file.parent), file.name)
    assert len(read) == 1
    assert gguf.converted(str(file.parent), file.name) == folder
    assert len(read) == 1, "not at all once it is converted"
    assert library.GGUFReader is counting, "the library is as it was"


def test_no_energy_is_computed_twice(tmp_path, monkeypatch):
    """Of each matrix: the unedited one's, and that after each batch; before the next it is known."""
    done = []

    def counted(weight, *args):
        done.append(weight)
        return hyperspherical_energy(weight, *args)

    monkeypatch.setattr(diagnosing, "hyperspherical_energy", counted)
    model = save_tiny("llama", tmp_path / "model")
    editor = Editor.from_pretrained(model, tmp_path / "run", **{**QUICK, **METHODS["alphaedit"], "batch_size": 2})
    editor.edit(fact_records(4))
    assert editor.run is not None
    batches, names = editor.run.history.batches, editor.weights.names
    assert len(batches) == 2
    assert len(done) == 3 * len(names)
    for name in names:
        before, after = (
            hyperspherical_energy(of(name)).total for of in (editor.weights.original, editor.weights.deployed)
        )
        changes = [batch.matrices[name]["energy_change"] for batch in batches]
        assert sum(changes) == pytest.approx(after - before, rel=1e-6)
        assert batches[-1].matrices[name]["energy"] == after


def test_heldout_text_at_every_second_place(monkeypatch):
    """The same places before and after, and the mean over them; however few logits exist at one time."""
    loaded = tiny("llama", torch.float32)
    passages = [[9, 1, 2, 6], [7, 7, 4], [5, 9, 3, 8, 1, 2]]
    first = score_heldout(loaded, passages, 64, Quiet(), positions=5)
    in_order = sorted(passages, key=len)
    logs = torch.cat([loaded.model(torch.tensor([row])).logits[0, :-1].log_softmax(-1) for row in in_order])[::2]
    following = torch.tensor([token for row in in_order for token in row[1:]])[::2]
    assert first.perplexity == pytest.approx(float((-logs.gather(1, following[:, None])).mean().exp()), rel=1e-5)
    with torch.no_grad():
        loaded.model.get_submodule(loaded.architecture.module_name(1, "down")).weight.mul_(-2)
    second = score_heldout(loaded, passages, 64, Quiet(), unedited=first.hidden, positions=5)
    after = torch.cat([loaded.model(torch.tensor([row])).logits[0, :-1].log_softmax(-1) for row in in_order])[::2]
    expected = float((logs.exp() * (logs - after)).sum(-1).mean())
    assert second.divergence == pytest.approx(expected, rel=1e-4)
    assert expected > 1e-3
    monkeypatch.setattr(forward, "_HEAD_NUMBERS", 2 * after.shape[-1])
    assert head_rows(loaded) == 2
    again = score_heldout(loaded, passages, 64, Quiet(), unedited=first.hidden, positions=5)
    assert again.divergence == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_short_rows_in_plain_products_say_what_fused_attention_says(family, monkeypatch):
    """With and without padding, behind a prefix and while generating; rows of more keys than are short go the fused way."""
    monkeypatch.setattr(attention, "_WIDE", 1)
    loaded = tiny(family, torch.float64)
    model, rows = loaded.model, [[1, *row] for row in ROWS]
    whole = TokenBatch.of(rows, loaded.device)
    equal = TokenBatch.of([[1, 5, 9, 30], [1, 7, 7, 7]], loaded.device)
    prefix = [1, 30, 31, 32, 33, 34, 35, 36]

    def said() -> list[Any]:
        shared = SharedPrefix(loaded, [[*prefix, *row] for row in rows], 8)
        behind = shared.last_hidden([[*prefix, *row] for row in rows])
        return [last_hidden(loaded, whole)[whole.mask.bool()], last_hidden(loaded, equal), behind[whole.mask.bool()]]

    fused = model.config._attn_implementation == "sdpa"
    before, generated = said(), generate(loaded, rows[:1], 5)
    assert use_quicker_attention(model) == fused
    for short in (attention._SHORT, 5):
        monkeypatch.setattr(attention, "_SHORT", short)
        for ours, theirs in zip(said(), before, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6, equal_nan=True)
        assert generate(loaded, rows[:1], 5) == generated


def test_attention_that_comes_out_otherwise_stays_fused(monkeypatch):
    loaded = tiny("llama")
    assert not use_quicker_attention(loaded.model), "too narrow to gain"
    monkeypatch.setattr(attention, "_WIDE", 1)
    plain = attention.grouped_attention

    def off(*args: Any, **others: Any) -> Any:
        output, weights = plain(*args, **others)
        return output * 1.1, weights

    for wrong in (off, lambda *args, **others: {}["what this family has not"]):
        monkeypatch.setattr(attention, "grouped_attention", wrong)
        assert not use_quicker_attention(loaded.model)
        assert loaded.model.config._attn_implementation == "sdpa"
    monkeypatch.setattr(attention, "grouped_attention", plain)
    assert use_quicker_attention(loaded.model)
    assert not use_quicker_attention(loaded.model), "once is enough"
