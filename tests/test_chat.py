"""Facts in a chat: the model's own template around every prompt, in targets, keys, context tokens, scores and answers alike."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import fact_records
from families import save_tiny, tiny, tiny_tokenizer
from sphere_edit.editing.answers import in_each_form
from sphere_edit.editing.fact_prompts import FactPrompts
from sphere_edit.editing.keys import SubjectPrompts, context_token_keys
from sphere_edit.editing.methods import METHODS
from sphere_edit.editor import Editor
from sphere_edit.errors import SphereEditError
from sphere_edit.evaluation.generation import with_answers
from sphere_edit.evaluation.scores import complete_answers, questions, score_facts, with_other_form
from sphere_edit.facts import chat
from sphere_edit.facts.chat import ChatFrame, chat_frame
from sphere_edit.facts.prompts import Encoder
from sphere_edit.facts.readers import facts_from, read_facts
from sphere_edit.models.loading import peak_memory
from sphere_edit.progress import Quiet
from test_runs import QUICK

CHAT = (
    "<bos>{% for m in messages %}{% if loop.first %}[system]Be brief.{{ '\\n' }}{% endif %}[{{ m.role }}]{{ m.content | trim }}"
    "{% if m.role == 'assistant' %}<eos>{% endif %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
SPACED = CHAT.replace("{{ m.content | trim }}", " {{ m.content }}")
BEFORE, AFTER = "<bos>[system]Be brief.\n[user]", "\n[assistant]"


def chatting(template: str = CHAT, **kind):
    tokenizer = tiny_tokenizer(**kind)
    tokenizer.chat_template = template
    return tokenizer


def facts_in(forms, count: int = 4):
    return [replace(fact, forms=tuple(forms)) for fact in facts_from(fact_records(count)).facts]


@pytest.fixture
def model(tmp_path):
    """A tiny chat model as a folder."""
    folder = save_tiny("llama", tmp_path / "model")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": CHAT}))
    return folder


class Heard(Quiet):
    """What was said."""

    def __init__(self):
        self.said: list[str] = []

    def say(self, text, style=""):
        self.said.append(text)


# --- the template -------------------------------------------------------------------------------------------------


def test_a_frame_is_what_the_template_puts_around_message_and_answer():
    assert chat_frame(chatting()) == ChatFrame(BEFORE, AFTER, "", "<eos>\n", True)
    assert chat_frame(chatting(SPACED)) == ChatFrame(BEFORE + " ", AFTER, " ", "<eos>\n", False)
    frame = chat_frame(chatting())
    assert frame.around(" Where is it? ", 6) == (f"{BEFORE}Where is it?{AFTER}", len(BEFORE) + 5)
    assert chat_frame(chatting(SPACED)).around("Where ", 5) == (f"{BEFORE} Where {AFTER}", len(BEFORE) + 6)


def test_a_template_sees_one_day_and_no_thinking():
    template = CHAT.replace("Be brief.", "{{ strftime_now('%Y-%m-%d') }} {{ enable_thinking }}")
    assert chat_frame(chatting(template)).before == "<bos>[system]2024-07-26 False\n[user]"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template, so there is no chat to edit in; as plain text"),
        ("{{ raise_exception('only in\npairs') }}", r"cannot be used \(TemplateError: only in pairs\)"),
        ("{{ nothing.at.all }}", "cannot be used"),
        ("{% for m in", "cannot be used"),
        ("{{ messages[0].content | upper }}", "does not give back a user's message once"),
        ("{{ messages[0].content }}{{ messages[0].content }}", "does not give back a user's message once"),
    ],
)
def test_templates_that_cannot_be_used_are_told(template, message):
    with pytest.raises(SphereEditError, match=message):
        chat_frame(chatting(template))


def test_a_template_that_goes_on_for_ever_is_given_up(monkeypatch, model, tmp_path):
    monkeypatch.setattr(chat, "_SECONDS", 0.3)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{{ messages[0].content }}"
    started = time.monotonic()
    with pytest.raises(SphereEditError, match="did not end within 0 seconds"):
        chat_frame(chatting(endless))
    assert time.monotonic() - started < 30
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": endless}))
    with pytest.raises(SphereEditError, match="did not end"):
        Editor.from_pretrained(model, tmp_path / "run", reporter=Quiet(), chat=True, **QUICK).edit(fact_records(2))
    assert not (tmp_path / "run").exists()
    heard = Heard()
    found = Editor.from_pretrained(model, tmp_path / "plain", reporter=heard, **QUICK).evaluate(fact_records(2))
    assert found.edited[0].rewrite.other is None
    assert sum("Nothing is asked in a chat" in text for text in heard.said) == 1


def test_only_time_that_a_template_computes_counts():
    """On a busy machine a template may wait for long, as this process does while it sleeps."""
    script = Path(chat.__file__).with_name("rendering.py")
    waits = f"import runpy, time; runpy.run_path({str(script)!r})['limit'](0.2, 1 << 28); time.sleep(0.6)"
    assert subprocess.run([sys.executable, "-c", waits], check=False).returncode == 0
    spins = waits.replace("time.sleep(0.6)", "[None for _ in iter(int, 1)]")
    assert subprocess.run([sys.executable, "-c", spins], check=False).returncode == -signal.SIGPROF


@pytest.mark.parametrize(
    "greedy",
    [
        "{{ 'x' * 10**11 }}",
        "{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{{ '%1000000000d' % 1 }}",
    ],
)
def test_a_template_that_takes_memory_without_end_is_given_up(greedy):
    before = peak_memory(torch.device("cpu"))
    with pytest.raises(SphereEditError, match="takes more than 256 MB of memory|cannot be used|did not end"):
        chat_frame(chatting(greedy))
    assert peak_memory(torch.device("cpu")) - before < 1 << 29, "nothing of it happens in this process"


def test_a_template_that_makes_too_much_or_ends_its_process_is_told():
    with pytest.raises(SphereEditError, match=r"TooLong: it made 2,000,020 characters"):
        chat_frame(chatting("{{ 'x' * 2000000 }}{{ messages[0].content }}"))
    nested = "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}"
    with pytest.raises(SphereEditError, match="cannot be used"):
        chat_frame(chatting(nested))


def test_a_template_is_rendered_as_transformers_renders_it():
    """With the tokens, the day and the environment that it has there, its own extensions too."""
    template = (
        "{{ bos_token }}{{ pad_token }}{% for m in messages %}{% if loop.index > 9 %}{% break %}{% endif %}\n  [{{ m.role | tojson }}]"
        "{% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}{{ add_generation_prompt }}"
    )
    tokenizer = chatting(template)
    wanted = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Here?"}], tokenize=False, add_generation_prompt=True
    )
    assert chat_frame(tokenizer).around("Here?")[0] == wanted


# --- the system prompt --------------------------------------------------------------------------------------------

SYSTEM = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"


def test_a_system_prompt_stands_before_the_message_in_every_token_that_is_read():
    encoder = Encoder(chatting(SYSTEM))
    (fact,) = facts_in(["chat"], 1)
    told = replace(fact, system="Answer in a word.")
    before = "[system]Answer in a word.\n[user]"
    for read in (
        encoder.at_subject(told)[0],
        encoder.with_answer(told)[0].ids,
        encoder.asked("x", True, told.system).ids,
        encoder.asked_fact(told).ids,
    ):
        assert encoder.tokenizer.decode(read).startswith(before)
    assert encoder.tokenizer.decode(encoder.at_subject(fact)[0]).startswith("[user]")
    asked = questions(replace(told, target_true="Paris", neighbors=()))[0]
    assert encoder.tokenizer.decode(asked.right.after(asked.prompt, encoder)[0]).startswith(before)
    assert encoder.tokenizer.decode(asked.other.after(asked.prompt, encoder)[0]).startswith(before)
    assert chat_frame(chatting(SYSTEM), "").before == "[system]\n[user]", "an empty one is one"


def test_a_record_a_file_and_a_run_say_the_system_prompt(tmp_path, model):
    path = tmp_path / "facts.json"
    own, silent = fact_records(2)
    path.write_text(json.dumps({"system": "Be kind.", "chat": True, "facts": [{**own, "system": "Be short."}, silent]}))
    assert [(fact.system, fact.chat) for fact in read_facts(path).facts] == [("Be short.", True), ("Be kind.", True)]
    (csv,) = read_facts(_csv_of(tmp_path / "facts.csv", {**own, "system": "Be short."})).facts
    assert csv.system == "Be short."
    with pytest.raises(SphereEditError, match="'system' must be text"):
        facts_from([{**own, "system": ["x"]}])
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "chat_template": SYSTEM}))
    editor = Editor.from_pretrained(model, tmp_path / "run", reporter=Quiet(), chat=True, system="Be calm.", **QUICK)
    editor.edit([own, {**silent, "system": "Be short."}])
    assert [fact.system for fact in editor.run.facts()] == ["Be calm.", "Be short."]
    editor.close()


def _csv_of(path, record):
    names = ("subject", "prompt", "target_new", "system")
    path.write_text(",".join(names) + "\n" + ",".join(f'"{record[name]}"' for name in names) + "\n")
    return path


def test_a_system_prompt_that_a_template_does_not_take_is_told_before_any_work(model, tmp_path):
    with pytest.raises(SphereEditError, match="leaves out the system prompt 'Be calm.'"):
        chat_frame(chatting("{{ messages[-1].content }}"), "Be calm.")
    refusing = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('No system') }}{% endif %}{{ messages[0].content }}"
    )
    with pytest.raises(SphereEditError, match=r"TemplateError: No system"):
        chat_frame(chatting(refusing), "Be calm.")
    plain = save_tiny("llama", tmp_path / "plain")
    with pytest.raises(SphereEditError, match="has no chat template"):
        Editor.from_pretrained(plain, tmp_path / "run", reporter=Quiet(), system="Be calm.", **QUICK).edit(
            fact_records(2)
        )
    assert not (tmp_path / "run").exists()


def test_what_ends_a_turn_is_learnt_where_the_answer_says_it():
    """It is not learnt by default; an answer that ends in the template's own mark has it as its last token."""
    encoder = Encoder(chatting())
    (fact,) = facts_in(["chat"], 1)
    tokens, start, _ = encoder.with_answer(fact)
    assert encoder.chat_end not in tokens.ids[start:]
    tokens, start, _ = encoder.with_answer(replace(fact, target_new=fact.target_new + "<eos>"))
    assert tokens.ids[start:][-1] == encoder.chat_end


# --- records, files, settings -------------------------------------------------------------------------------------


def test_a_record_says_its_forms():
    records = [
        dict(fact_records(1)[0], **said)
        for said in ({}, {"chat": True}, {"chat": False}, {"forms": ["plain", "chat"]}, {"forms": ["chat", "plain"]})
    ]
    facts = facts_from(records).facts
    assert [fact.forms for fact in facts] == [(), ("chat",), ("plain",), ("plain", "chat"), ("chat", "plain")]
    assert [fact.chat for fact in facts] == [False, True, False, False, True]
    assert facts_from(facts).facts == [replace(fact, record=number) for number, fact in enumerate(facts, 1)]
    for fact in facts:
        assert type(fact).from_dict(json.loads(json.dumps(fact.as_dict()))) == fact


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"chat": "yes"}, "'chat' must be true or false, not 'yes'"),
        ({"forms": "chat"}, "'forms' must be a list"),
        ({"forms": ["chat", "prose"]}, "'forms' must be some of plain, chat, each once"),
        ({"forms": ["chat", "chat"]}, "each once"),
        ({"forms": [["chat"]]}, "each once"),
        ({"forms": ["plain"], "chat": True}, "'chat' is true, but 'forms' says plain"),
    ],
)
def test_what_is_no_form_is_refused(said, message):
    with pytest.raises(SphereEditError, match=message):
        facts_from([{**fact_records(1)[0], **said}])


def test_a_file_says_it_for_all_of_its_records(tmp_path):
    first, second = fact_records(2)
    path = tmp_path / "facts.json"
    path.write_text(json.dumps({"chat": True, "facts": [first, {**second, "chat": False}]}))
    assert [fact.forms for fact in read_facts(path).facts] == [("chat",), ("plain",)]
    path.write_text(json.dumps({"facts": [first, {**second, "chat": False}], "forms": ["plain", "chat"]}))
    assert [fact.forms for fact in read_facts(path).facts] == [("plain", "chat"), ("plain",)]
    path = tmp_path / "facts.csv"
    path.write_text("subject,prompt,target_new,forms\nOla,{} is,here,plain|chat\nEva,{} is,here,\n")
    assert [fact.forms for fact in read_facts(path).facts] == [("plain", "chat"), ()]


def test_a_run_says_it_for_records_that_do_not(model, tmp_path):
    records = [*fact_records(2), {**fact_records(1, 2)[0], "chat": False}]
    for number, (options, forms) in enumerate(
        [({"chat": True}, ("chat",)), ({"forms": ["plain", "chat"]}, ("plain", "chat")), ({}, ())]
    ):
        heard = Heard()
        editor = Editor.from_pretrained(model, tmp_path / str(number), reporter=heard, **options, **QUICK)
        facts, _ = editor.check(facts_from(records), skip_bad=False)
        assert [fact.forms for fact in facts] == [forms, forms, ("plain",)]
    editor.check(facts_from(fact_records(2)), skip_bad=False)
    assert sum("--chat" in text and "--forms" in text for text in heard.said) == 1, "told where nobody said anything"
    with pytest.raises(SphereEditError, match="'chat' is false, but 'forms' says chat"):
        Editor.from_pretrained(model, tmp_path / "x", forms=["chat"], chat=False)


def test_a_model_without_a_template_refuses_chats_before_any_work(tmp_path):
    folder = save_tiny("gpt2", tmp_path / "model")
    with pytest.raises(SphereEditError, match="has no chat template"):
        Editor.from_pretrained(folder, tmp_path / "run", reporter=Quiet(), chat=True, **QUICK).edit(fact_records(2))
    assert not (tmp_path / "run").exists()


# --- tokens -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [{}, {"bos": True}, {"bos": True, "eos": True}])
def test_a_chat_has_the_tokens_of_its_text_and_one_start(kind):
    tokenizer = chatting(**kind)
    (fact,) = facts_in(["chat"], 1)
    encoder = Encoder(tokenizer)
    text = BEFORE + "A few words. " + fact.filled_prompt + AFTER
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    cut, last = encoder.at_subject(fact, "A few words. {}")
    assert cut == ids[: len(cut)]
    assert tokenizer.decode(cut).endswith(fact.subject)
    assert not tokenizer.decode(cut[:-1]).endswith(fact.subject)
    assert (ids.count(1), last) == (1, len(cut) - 1)
    tokens, start, subject = encoder.with_answer(fact, "A few words. {}")
    assert (tokens.ids[:start], subject) == (ids, last)
    assert tokenizer.decode(tokens.ids[start:]) == fact.target_new
    spaced = Encoder(chatting(SPACED, **kind))
    tokens, start, _ = spaced.with_answer(fact)
    assert spaced.tokenizer.decode(tokens.ids[start:]) == " " + fact.target_new
    assert spaced.chat_end == 2


def test_a_plain_prompt_that_has_its_own_start_gets_no_second_one():
    encoder = Encoder(tiny_tokenizer(bos=True))
    assert encoder.encode("<bos>The city").ids == encoder.encode("The city").ids
    assert encoder.encode("The city").ids[0] == 1


def test_targets_and_keys_stand_in_the_chat():
    loaded = tiny("llama")
    loaded.tokenizer.chat_template = CHAT
    encoder, templates = Encoder(loaded.tokenizer), ["{}", "Some words before. {}"]
    facts = facts_in(["plain", "chat"], 2)
    forms = in_each_form(facts)
    assert [form.forms for form in forms] == [("plain",), ("chat",)] * 2
    prompts = SubjectPrompts.of(forms, templates, encoder)
    for number, form in enumerate(forms):
        found = FactPrompts.of(form, templates, encoder)
        for row, subject, template in zip(found.rows, found.subjects, templates, strict=False):
            text = template.replace("{}", form.filled_prompt)
            text = BEFORE + text + AFTER if form.chat else text
            assert row[: found.starts[0] if template == "{}" else None][0] == 1
            assert loaded.tokenizer.decode(row).startswith(text if form.chat else "<bos>" + text)
            assert row[: subject + 1] == prompts.rows[2 * number + templates.index(template)]
        assert loaded.tokenizer.decode(found.rows[found.kl_row][: found.subjects[found.kl_row] + 1]).endswith(
            form.subject
        )
        kl = loaded.tokenizer.decode(found.rows[-1]) if len(found.rows) > 2 else ""
        assert not kl or kl == (BEFORE if form.chat else "<bos>") + form.subject
    names = ["model.layers.1.mlp.down_proj"]
    (keys,) = context_token_keys(loaded, forms, names, encoder, 256)
    assert keys.shape[1] == sum(len(encoder.asked(form.filled_prompt, form.chat).ids) - 1 for form in forms)


def test_a_plain_fact_is_read_as_before():
    encoder = Encoder(chatting(bos=True))
    (fact,) = facts_in([], 1)
    tokens, start, subject = encoder.with_answer(fact)
    before, first = encoder.with_target(fact.filled_prompt, fact.target_new, fact.separator)
    assert (tokens, start) == (before, first)
    assert encoder.at_subject(fact) == (tokens.ids[: subject + 1], subject)
    assert fact.in_each_form() == [fact]


# --- asking -------------------------------------------------------------------------------------------------------


def test_scores_are_of_the_chat_and_of_the_other_form():
    loaded = tiny("llama", torch.float32)
    loaded.tokenizer.chat_template = CHAT
    plain, told = facts_in(["plain"]), facts_in(["chat"])
    complete = complete_answers(loaded, told)
    scores = score_facts(loaded, complete, 256, Quiet())
    encoder = Encoder(loaded.tokenizer)
    for question, score in zip(questions(complete[0]), scores[0].prompts(), strict=True):
        before, answer = question.right.after(question.prompt, encoder)
        assert before == loaded.tokenizer(BEFORE + question.prompt + AFTER, add_special_tokens=False)["input_ids"]
        logits = loaded.model(torch.tensor([[*before, *answer]])).logits[0].log_softmax(-1)
        where = range(len(before) - 1, len(before) + len(answer) - 1)
        expected = -sum(float(logits[at, token]) for at, token in zip(where, answer, strict=True)) / len(answer)
        assert score.nll_right == pytest.approx(expected, abs=1e-4)
    both = with_other_form(loaded, complete, scores, 256, Quiet())
    asked_plain = score_facts(loaded, complete_answers(loaded, plain), 256, Quiet())
    for fact, other in zip(both, asked_plain, strict=True):
        assert fact.rewrite.other == other.rewrite.correct
        assert [prompt.other for prompt in fact.paraphrases] == [prompt.correct for prompt in other.paraphrases]
        assert {prompt.other for prompt in fact.neighbors} == {None}
    said = with_answers(loaded, complete, scores, False, 256, Quiet())
    own = [n for n, neighbor in zip(said[0].neighbors, complete[0].neighbors, strict=True) if neighbor.answer_ids]
    assert own
    assert all(score.begins for score in own), "what it said in the chat it says in the chat again"


@pytest.mark.parametrize("name", ["frugal", "memit", "ultraedit", "ft"])
def test_a_run_in_both_forms_learns_both_and_resumes_bit_for_bit(name, model, tmp_path):
    targets = {"targets": {"steps": 8, "lr": 0.5 if name == "memit" else None}} if name in ("frugal", "memit") else {}
    options = {**QUICK, "method": name, "forms": ["plain", "chat"], "repair": 0, **targets}
    if not METHODS[name]().needs.feed.at_subjects:
        options.pop("targets")
    editor = Editor.from_pretrained(model, tmp_path / "run", reporter=Quiet(), **options)
    metrics = editor.edit(fact_records(4))
    forms = in_each_form([replace(fact, forms=("plain", "chat")) for fact in facts_from(fact_records(4)).facts])
    scored = score_facts(editor.loaded, complete_answers(editor.loaded, forms), 256, Quiet())
    with editor.weights.unedited():
        before = score_facts(editor.loaded, complete_answers(editor.loaded, forms), 256, Quiet())
    for first in (0, 1) if name != "frugal" else ():  # whose targets random weights do not carry, in any form
        pairs = zip(before[first::2], scored[first::2], strict=True)
        assert sum(old.rewrite.nll_right - new.rewrite.nll_right for old, new in pairs) > 0.05, "learnt in this form"
    assert {fact["edited"]["rewrite"]["other"] for fact in metrics["per_fact"]} <= {True, False}
    assert metrics["edited"]["efficacy_other"] is not None
    assert metrics["edited"]["specificity_other"] is None
    for batch in editor.run.history.batches:
        if batch.columns is not None:
            assert batch.columns == [2 * (6 if name == "frugal" else 1)] * len(batch.members)
    weights = {key: value.clone() for key, value in editor.model.state_dict().items()}
    editor.close()
    again = Editor.open(tmp_path / "run", Quiet())
    assert all(torch.equal(value, weights[key]) for key, value in again.model.state_dict().items())
    again.rollback(0)
    again.close()


def test_a_forgotten_form_is_a_forgotten_fact(model, tmp_path, monkeypatch):
    editor = Editor.from_pretrained(model, tmp_path / "run", reporter=Quiet(), **QUICK)
    facts = facts_in(["plain", "chat"], 2)
    seen = []

    def score(loaded, asked, *rest):
        seen.append([(fact.subject, fact.chat) for fact in asked])
        scores = score_facts(loaded, asked, *rest)
        wrong = lambda fact: 0.0 if fact.chat and fact.subject == facts[0].subject else 1.0  # noqa: E731
        return [
            replace(told, rewrite=replace(told.rewrite, accuracy=wrong(fact)))
            for told, fact in zip(scores, asked, strict=True)
        ]

    monkeypatch.setattr("sphere_edit.runs.measuring.score_facts", score)
    assert editor._evaluator.knows(facts, "") == [False, True]
    assert seen == [[(fact.subject, chat) for fact in facts for chat in (False, True)]]
