"""What is taught behind an answer: nothing, a full stop, or the token that ends a text or a turn."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from conftest import fact_records
from families import tiny
from sphere_edit import SphereEditError
from sphere_edit.editing.answers import coded_targets
from sphere_edit.editing.fact_prompts import FactPrompts
from sphere_edit.editing.settings import make_settings
from sphere_edit.editing.targets import TargetSettings, optimise_targets
from sphere_edit.facts.prompts import Encoder
from sphere_edit.facts.readers import facts_from

_CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.fixture(scope="module")
def loaded():
    made = tiny("llama", torch.float64)
    made.tokenizer.chat_template = _CHAT
    return made


def facts():
    return list(facts_from(fact_records(3)).facts)


def test_an_end_is_taught_behind_the_answer_and_changes_nothing_before_it(loaded):
    eos = loaded.tokenizer.eos_token_id
    plain = coded_targets(Encoder(loaded.tokenizer), facts())
    for ends, last in (("stop", "."), ("token", None)):
        encoder = Encoder(loaded.tokenizer, ends)
        for (ids, start), (with_end, begins), fact in zip(plain, coded_targets(encoder, facts()), facts(), strict=True):
            assert (with_end[:-1], begins) == (ids, start)
            assert with_end[-1] == eos if last is None else loaded.tokenizer.decode(with_end[-1:]) == last
            (row, *_) = FactPrompts.of(fact, ["{}"], encoder).targets
            assert row == with_end[start:]
    told = dataclasses.replace(facts()[0], target_new="Rome!")
    assert Encoder(loaded.tokenizer, "stop").taught(told) == "Rome!"


def test_in_a_chat_the_end_is_that_of_the_turn(loaded):
    fact = dataclasses.replace(facts()[0], forms=("chat",))
    ((ids, start),) = coded_targets(Encoder(loaded.tokenizer, "token"), [fact])
    ((plain, _),) = coded_targets(Encoder(loaded.tokenizer), [fact])
    assert ids == [*plain, loaded.tokenizer.eos_token_id]
    assert len(ids) > start + 1


def test_a_tokenizer_without_an_end_is_told():
    with pytest.raises(SphereEditError, match="no token that ends a text"):
        Encoder(SimpleNamespace(eos_token=None), "token").taught(facts()[0])


def test_a_target_makes_its_end_likely_too(loaded):
    """Its loss is that of answer and end: more than the answer's alone while the end is unlikely, and it falls."""
    settings = TargetSettings(steps=12, lr=0.5, kl_factor=0.0, weight_decay=0.0, rule="normalised")
    open_ended = optimise_targets(loaded, facts(), ["{}"], 1, settings)
    ended = optimise_targets(loaded, facts(), ["{}"], 1, settings.model_copy(update={"ends": "token"}))
    for one, other in zip(open_ended.losses, ended.losses, strict=True):
        assert other[0] != one[0]
        assert min(other) < other[0]
    assert make_settings({"targets": {"ends": "stop"}}).targets.ends == "stop"
    with pytest.raises(SphereEditError, match="ends"):
        make_settings({"targets": {"ends": "full"}})
