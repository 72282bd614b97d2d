from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from sphere_edit.errors import SphereEditError
from sphere_edit.facts.fact import Fact
from sphere_edit.facts.prompts import KL_PROMPT, Encoder, Tokens, fill, joined

# subject, prompt, target
FACTS = [
    ("Danielle Darrieux", "The mother tongue of {} is", "French"),
    ("Zoë Kravitz", "{} lives in", "São Paulo"),
    ("Gödel", "Where did {}'s career begin? In", "Brünn"),
    ("東京", "{}は", "日本"),
    ("🗼🧑‍🚀", "We saw {} in", "Ürgüp"),
    ("I", "{} am", "a"),
    ("C++", "(the makers of {})", " 1985"),
]
TEMPLATES = ["{}", "The sky, {x}. {}", "日本。 {}"]
CORPUS = [fill(template, Fact(*fact))[0] + joined(fact[2]) for fact in FACTS for template in TEMPLATES]
BOS, EOS, UNK = SPECIAL = ["<s>", "</s>", "<unk>"]


def wrapped(tokenizer: Tokenizer, form: str, *more: Any) -> PreTrainedTokenizerFast:
    added = processors.TemplateProcessing(single=form, special_tokens=[(BOS, 0), (EOS, 1)])
    tokenizer.post_processor = processors.Sequence([*more, added])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, unk_token=UNK)


def byte_level(form: str = "$A", trim_offsets: bool = True) -> PreTrainedTokenizerFast:
    """As GPT-2, Llama 3 and Qwen do it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return wrapped(tokenizer, form, processors.ByteLevel(trim_offsets=trim_offsets))


def unigram(form: str = "<s> $A") -> PreTrainedTokenizerFast:
    """As SentencePiece does it, with '▁' for a space and one in front."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=SPECIAL, unk_token=UNK, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return wrapped(tokenizer, form)


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "byte-level": byte_level,
    "byte-level, spaces in offsets": lambda: byte_level(trim_offsets=False),
    "byte-level, BOS": lambda: byte_level("<s> $A"),
    "byte-level, EOS": lambda: byte_level("$A </s>"),
    "byte-level, BOS and two EOS": lambda: byte_level("<s> $A </s> </s>"),
    "unigram, BOS": unigram,
    "unigram, EOS": lambda: unigram("$A </s>"),
    "slow, EOS": ByT5Tokenizer,
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def encoder(request) -> Encoder:
    return Encoder(TOKENIZERS[request.param]())


def decoded(encoder: Encoder, ids: list[int]) -> str:
    return encoder.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: fact[0])
def test_the_subjects_last_token_covers_its_last_character(encoder, fact, template):
    text, end = fill(template, Fact(*fact))
    ids, last = encoder.subject_end(text, end)
    tokens = encoder.encode(text)
    assert ids == tokens.ids[: last + 1]
    assert decoded(encoder, ids).startswith(text[:end])
    assert not decoded(encoder, ids[:-1]).startswith(text[:end])
    start, stop = tokens.spans[last]
    assert start < end <= stop
    assert not any(start < end <= stop for start, stop in tokens.spans[last + 1 :])


@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: fact[0])
def test_the_targets_first_token_begins_the_target(encoder, fact):
    prompt, target = Fact(*fact).filled_prompt, fact[2]
    tokens, first = encoder.with_target(prompt + " ", target)
    whole = prompt + joined(target)
    assert decoded(encoder, tokens.ids) == whole
    assert decoded(encoder, tokens.ids[:first]).rstrip() == prompt
    start, stop = tokens.spans[first]
    assert start <= len(whole) - len(target.strip()) < stop
    assert whole[start:].strip() == target.strip()


def test_special_tokens_stay_in_front_and_go_behind(encoder):
    tokenizer = encoder.tokenizer
    tokens, whole = encoder.encode(CORPUS[0]), tokenizer(CORPUS[0])["input_ids"]
    begins, ends = whole[0] == tokenizer.bos_token_id, whole[-1] == tokenizer.eos_token_id
    assert tokens.ids == whole[: len(tokens.ids)]
    assert tokens.ids[-1] not in tokenizer.all_special_ids
    assert (tokens.ids[0] == tokenizer.bos_token_id) == begins
    assert (len(tokens.ids) < len(whole)) == ends
    assert len(tokens.spans) == len(tokens.ids)
    assert not begins or tokens.spans[0] == (0, 0)


def test_a_document_starts_with_exactly_one_start_token(encoder):
    start = encoder.document_start()
    front = [token for token in start + encoder.encode("The").ids if token in encoder.tokenizer.all_special_ids]
    assert len(front) == 1


def test_the_end_of_text_token_starts_a_document_where_there_is_one():
    tokenizer = byte_level()
    tokenizer.add_tokens(["<|endoftext|>"], special_tokens=True)
    assert Encoder(tokenizer).document_start() == [tokenizer.get_vocab()["<|endoftext|>"]]


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if "slow" not in name])
def test_the_padding_side_changes_nothing(name):
    tokenizer = TOKENIZERS[name]()
    found = []
    for side in ("left", "right"):
        tokenizer.padding_side = side
        found.append([Encoder(tokenizer).encode(text) for text in CORPUS])
    assert found[0] == found[1]


BYTES = {name: Encoder(TOKENIZERS[name]()) for name in ("byte-level, BOS and two EOS", "slow, EOS")}
WORDS = st.text(st.characters(exclude_categories=("Cs", "Cc", "Cn", "Co"), exclude_characters="�{}"), max_size=8)


def test_every_byte_of_a_slow_tokenizer_covers_its_whole_character():
    spans = Encoder(ByT5Tokenizer()).encode("xï🏔x").spans
    assert spans == [(0, 1), (1, 2), (1, 2), (2, 3), (2, 3), (2, 3), (2, 3), (3, 4)]


@pytest.mark.parametrize("name", BYTES)
@given(WORDS, WORDS.map(str.strip).filter(bool), WORDS, st.sampled_from(string.ascii_letters))
@settings(max_examples=60, deadline=None)
def test_any_subject_is_found_among_bytes(name, before, subject, after, target):
    encoder = BYTES[name]
    text, end = fill("{}", Fact(subject, f"{before}{{}}{after}", target))
    ids, last = encoder.subject_end(text, end)
    assert decoded(encoder, ids).startswith(text[:end])
    assert not decoded(encoder, ids[:-1]).startswith(text[:end])
    tokens, first = encoder.with_target(text, target)
    assert last < first
    assert decoded(encoder, tokens.ids[first:]).strip() == target


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("Rome", " Rome"),
        ("Ürgüp", " Ürgüp"),
        ("Москва", " Москва"),
        ("1985", " 1985"),
        (" Rome", " Rome"),
        ("\nRome", "\nRome"),
        ("日本", "日本"),
        ("パリ", "パリ"),
        ("「東京」", "「東京」"),
    ],
)
def test_a_target_follows_one_space_but_in_scripts_without(target, expected):
    assert joined(target) == expected


@pytest.mark.parametrize(
    ("template", "prompt", "text", "head"),
    [
        ("{}", None, "The C++ standard", "The C++"),
        ("Well. {}", None, "Well. The C++ standard", "Well. The C++"),
        ("{x}{y} {}", None, "{x}{y} The C++ standard", "{x}{y} The C++"),
        ("{{}}", None, "{The C++ standard}", "{The C++"),
        ("{} and {}", None, "The C++ standard and {}", "The C++"),
        ("So. {}", KL_PROMPT, "So. C++ is a", "So. C++"),
        ("{}", "f(x) {return {}}", "f(x) {return C++}", "f(x) {return C++"),
        ("%s {0} {}", "{{}}%d", "%s {0} {C++}%d", "%s {0} {C++"),
    ],
)
def test_fill(template, prompt, text, head):
    assert fill(template, Fact("C++", "The {} standard", "1998"), prompt) == (text, len(head))


def test_fill_takes_a_subject_with_braces():
    text, end = fill("So {}", Fact("{}{x}", "A {} is", "b"))
    assert (text, text[:end]) == ("So A {}{x} is", "So A {}{x}")


def test_tokens_that_cover_nothing_are_passed_over():
    tokens = Tokens([0, 1, 2, 3, 4], [(0, 0), (0, 3), (3, 3), (3, 7), (6, 7)])
    assert [tokens.last_token_of(end) for end in (1, 3, 4, 7)] == [1, 1, 3, 4]
    assert [tokens.first_token_after(start) for start in (0, 2, 3, 6)] == [1, 1, 3, 3]


# --- tokenizers that cannot be followed ---------------------------------------------------------------------------


def test_a_slow_tokenizer_that_changes_the_text_is_refused():
    class Lowering(ByT5Tokenizer):
        def _tokenize(self, text):
            return super()._tokenize(text.lower())

    encoder = Encoder(Lowering())
    assert encoder.encode("the sky").spans[-1] == (6, 7)
    with pytest.raises(
        SphereEditError, match=r"does not give back the text it was given \('The sky' became 'the sky'\)"
    ):
        encoder.encode("The sky")


def test_a_tokenizer_without_the_subjects_characters_is_refused():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.train_from_iterator(["the sky is"], trainers.BpeTrainer(vocab_size=20, show_progress=False))
    encoder = Encoder(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    with pytest.raises(SphereEditError, match="the tokenizer makes no tokens of '東京'"):
        encoder.encode("東京")
    with pytest.raises(SphereEditError, match="the tokenizer makes no token of character 8 of a prompt"):
        encoder.subject_end("the sky東", 8)
    with pytest.raises(SphereEditError, match="the tokenizer makes no token of character "):
        encoder.with_target("the sky is", "東京")
