"""Prompts as tokens: where the subject ends and the target begins, found by character offsets.

Whatever form a fact is given in, plain or chat, it is `Encoder` that makes tokens of it (`at_subject`, `with_answer`, `asked`, `answered`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

from sphere_edit import ranks
from sphere_edit.errors import SphereEditError
from sphere_edit.facts.chat import ChatFrame, chat_frame
from sphere_edit.facts.fact import Fact
from sphere_edit.facts.seam import joined
from sphere_edit.files import cache_dir, read_cache, write_cache
from sphere_edit.models.generation import generate, seeded
from sphere_edit.models.identity import cache_key, config_values, tokenizer_identity
from sphere_edit.models.loading import LoadedModel

KL_PROMPT = "{} is a"
_ANCHORS = ("\n", ".", "a", "。")  # what an answer is cut from where it would grow together with its prompt
_TEMPLATES = "templates 1"  # to be raised whenever the same model and seed would give other ones
_OPENERS = ("The", "Therefore", "Because", "I", "You")


@dataclass(frozen=True)
class Tokens:
    """Token ids of a text, and for each the characters ``[start, end)`` it covers (``(0, 0)`` for special ones)."""

    ids: list[int]
    spans: list[tuple[int, int]]

    def last_token_of(self, end: int) -> int:
        """Index of the last token that covers the character before ``end``."""
        return _not_dropped([i for i, (first, last) in enumerate(self.spans) if first < end <= last], end)[-1]

    def first_token_after(self, start: int) -> int:
        """Index of the first token that covers anything at or after character ``start``."""
        return _not_dropped([i for i, (first, last) in enumerate(self.spans) if last > max(start, first)], start + 1)[0]


def _not_dropped(tokens: list[int], character: int) -> list[int]:
    if not tokens:
        raise SphereEditError(
            f"the tokenizer makes no token of character {character} of a prompt, so the subject or the target cannot be "
            "located; this model does not know that character"
        )
    return tokens


Ends = Literal[
    "open", "stop", "token"
]  # what is taught behind an answer: nothing, a full stop, the token that ends a text
_STOPS = (".", "!", "?", "。", "！", "？")


class Encoder:
    """A tokenizer that knows which characters every token stands for, be it fast or slow, with BOS or without."""

    def __init__(self, tokenizer: Any, ends: Ends = "open"):
        self.tokenizer, self.ends = tokenizer, ends
        self._frames: dict[str | None, ChatFrame] = {}

    def frame(self, system: str | None = None) -> ChatFrame:
        """What the model's chat template puts around a message, with a system prompt or the one that it has by default.

        Raises:
            SphereEditError: it has none, or one that cannot be used.
        """
        if system not in self._frames:
            self._frames[system] = chat_frame(self.tokenizer, system)
        return self._frames[system]

    # --- facts and their prompts, in either form ------------------------------------------------------------------

    def at_subject(self, fact: Fact, template: str = "{}", prompt: str | None = None) -> tuple[list[int], int]:
        """Ids of a fact's prompt (or another with ``{}``) in a context template, cut after its subject, and the subject's last token.

        In a chat, the context stands within the user's message, before the prompt.
        """
        text, end = self._read(*fill(template, fact, prompt), fact.chat, fact.system)
        return self.subject_end(text, end, chat=fact.chat)

    def with_answer(self, fact: Fact, template: str = "{}") -> tuple[Tokens, int, int]:
        """Tokens of a fact's prompt in a context template and of its new answer; the answer's first token, and the subject's last one."""
        message, place = fill(template, fact)
        tokens, start = self.answered(message, self.taught(fact), fact.separator, fact.chat, fact.system)
        return tokens, start, tokens.last_token_of(self._read(message, place, fact.chat, fact.system)[1])

    def taught(self, fact: Fact) -> str:
        """What an edit teaches: the fact's new answer, and what ends it, if anything is to (``ends``).

        Raises:
            SphereEditError: an end token is wanted, and there is none.
        """
        if self.ends == "open":
            return fact.target_new
        if self.ends == "stop":
            return fact.target_new if fact.target_new.rstrip().endswith(_STOPS) else f"{fact.target_new}."
        end = self.frame(fact.system).end.strip() if fact.chat else self.tokenizer.eos_token
        if not end:
            raise SphereEditError("this tokenizer has no token that ends a text; set targets.ends to open or stop")
        return fact.target_new + str(end)

    def asked(self, prompt: str, chat: bool = False, system: str | None = None) -> Tokens:
        """Tokens of a prompt; in a chat those of the whole chat, up to where the assistant begins to speak."""
        return self.encode(self._read(prompt, 0, chat, system)[0], chat)

    def asked_fact(self, fact: Fact) -> Tokens:
        """Tokens of a fact's own prompt, in the form and with the system prompt that it is asked with."""
        return self.asked(fact.filled_prompt, fact.chat, fact.system)

    def answered(
        self, prompt: str, answer: str, separator: str | None, chat: bool = False, system: str | None = None
    ) -> tuple[Tokens, int]:
        """Tokens of a prompt and an answer, and the answer's first; in a chat the template says what stands between them."""
        text, _ = self._read(prompt, 0, chat, system)
        return self.with_target(text, answer, self.frame(system).lead if chat else separator, chat)

    def _read(self, message: str, place: int, chat: bool, system: str | None) -> tuple[str, int]:
        """A prompt as the model reads it, and where character ``place`` of it is then."""
        return self.frame(system).around(message, place) if chat else (message, place)

    @cached_property
    def chat_end(self) -> int | None:
        """The token that ends what the assistant says, if it is a special one."""
        ids = self.tokenizer(self.frame().end.lstrip(), add_special_tokens=False)["input_ids"] or [None]
        return ids[0] if ids[0] in self.tokenizer.all_special_ids else None

    # --- texts ----------------------------------------------------------------------------------------------------

    def encode(self, text: str, chat: bool = False) -> Tokens:
        """Tokens of a whole text, special ones in front kept, special ones behind (an EOS) dropped.

        A chat has its special tokens in its text, and gets no others; nor does a text that begins with BOS itself.

        Raises:
            SphereEditError: the tokenizer changes the text, so that characters cannot be followed.
        """
        start = self.tokenizer.bos_token
        whole = chat or bool(start and text.startswith(start))
        if self.tokenizer.is_fast:
            coded = self.tokenizer(
                text,
                add_special_tokens=not whole,
                return_offsets_mapping=True,
                return_special_tokens_mask=True,
            )
            ids, special = list(coded["input_ids"]), list(coded["special_tokens_mask"])
            spans = [
                (0, 0) if hidden else tuple(span) for span, hidden in zip(coded["offset_mapping"], special, strict=True)
            ]
        else:
            ids = list(self.tokenizer(text, add_special_tokens=not whole)["input_ids"])
            special = [0] * len(ids)
            if not whole:
                special = list(self.tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True))
            spans = self._spans_by_decoding(text, ids, special)
        while ids and special[-1]:
            ids.pop(), special.pop(), spans.pop()
        if not ids or all(special):
            raise SphereEditError(f"the tokenizer makes no tokens of '{text[:80]}'")
        return Tokens(ids, spans)

    def _spans_by_decoding(self, text: str, ids: list[int], special: list[int]) -> list[tuple[int, int]]:
        """A slow tokenizer gives no offsets: decode longer and longer prefixes and see how far each one reaches."""
        plain = [token for token, hidden in zip(ids, special, strict=True) if not hidden]
        whole = self.tokenizer.decode(plain, clean_up_tokenization_spaces=False)
        lead = len(whole) - len(whole.lstrip()) - (len(text) - len(text.lstrip()))
        if whole[max(lead, 0) :] != text:
            raise SphereEditError(
                f"the tokenizer does not give back the text it was given ('{text[:60]}' became '{whole[:60]}'), "
                "so the subject's tokens cannot be located; use the model's fast tokenizer"
            )
        spans, seen, reached = [], [], 0
        for token, hidden in zip(ids, special, strict=True):
            if hidden:
                spans.append((0, 0))
                continue
            seen.append(token)
            decoded = self.tokenizer.decode(seen, clean_up_tokenization_spaces=False).rstrip("�")
            end = max(reached, min(len(decoded) - max(lead, 0), len(text)))
            # bytes of an unfinished character belong to that character
            spans.append((reached, end if end > reached else min(reached + 1, len(text))))
            reached = end
        return spans

    def document_start(self) -> list[int]:
        """The token that stands before a document where this tokenizer puts none itself: an end-of-text or start token."""
        ids = self.encode("The").ids
        if ids[0] in self.tokenizer.all_special_ids:
            return []
        separator = self.tokenizer.get_vocab().get("<|endoftext|>")
        found = (separator, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        return [next((token for token in found if token is not None), 0)]

    def subject_end(self, text: str, subject_end: int, chat: bool = False) -> tuple[list[int], int]:
        """Ids of ``text`` cut after the subject, and the index of the subject's last token (``text[:subject_end]``)."""
        tokens = self.encode(text, chat)
        last = tokens.last_token_of(subject_end)
        return tokens.ids[: last + 1], last

    def with_target(
        self, prompt: str, target: str, separator: str | None = None, chat: bool = False
    ) -> tuple[Tokens, int]:
        """Tokens of the prompt, then of ``separator`` and target, and the index where the latter begin.

        Those of the prompt are what the prompt alone leads to, its white space included: no token holds a piece of both sides. Where the
        tokenizer makes one of the whole text, the two are cut apart. Without a separator, the rule of runs begun before facts kept theirs.

        Raises:
            SphereEditError: the tokenizer makes no token of the target, or the two cannot be cut apart.
        """
        if separator is None:
            return self._as_before(prompt, target)
        head, whole = self.encode(prompt, chat), self.encode(prompt + separator + target, chat)
        start = len(head.ids)
        if whole.ids[:start] != head.ids:
            whole = self._cut(head, prompt, separator + target, chat)
        first = len(prompt) + len(separator) + len(target) - len(target.lstrip())
        whole.first_token_after(first)
        return whole, _not_dropped(list(range(start, len(whole.ids))), first + 1)[0]

    def answer_of(self, fact: Fact) -> list[int]:
        """Ids of the fact's new answer as it stands after its own prompt."""
        tokens, start = self.with_target(fact.filled_prompt, fact.target_new, fact.separator)
        return tokens.ids[start:]

    def _as_before(self, prompt: str, target: str) -> tuple[Tokens, int]:
        """The prompt without white space at its end, one space where the target's first letter asks for it, and the target's first token.

        That token may lie behind the space. Only where it holds a piece of the prompt too, it is cut apart.
        """
        prompt, rest = prompt.rstrip(), joined(target)
        tokens = self.encode(prompt + rest)
        start = tokens.first_token_after(len(prompt) + len(rest) - len(rest.lstrip()))
        if tokens.spans[start][0] < len(prompt):
            return self.with_target(prompt, target, rest[: len(rest) - len(target)])
        return tokens, start

    def _cut(self, head: Tokens, prompt: str, rest: str, chat: bool) -> Tokens:
        """The prompt's own tokens, and those that ``rest`` has after something it does not grow together with."""
        for anchor in _ANCHORS:
            try:
                before, both = self.encode(anchor, chat), self.encode(anchor + rest, chat)
            except SphereEditError:  # no token for this one
                continue
            count, shift = len(before.ids), len(prompt) - len(anchor)
            if both.ids[:count] == before.ids and len(both.ids) > count:
                spans = [(max(first + shift, len(prompt)), last + shift) for first, last in both.spans[count:]]
                return Tokens(head.ids + both.ids[count:], head.spans + spans)
        raise SphereEditError(
            f"the tokenizer grows the prompt '…{prompt[-40:]}' and its answer '{rest[:40]}' together; a \"separator\" in the record would keep them apart"
        )


def fill(template: str, fact: Fact, prompt: str | None = None) -> tuple[str, int]:
    """The fact's prompt (or another with ``{}``) in a context template, and where its subject ends in characters.

    Raises:
        SphereEditError: the fact has no subject.
    """
    if not fact.subject:
        raise SphereEditError(
            f"'{fact.prompt[:60]}' comes without the subject that it is about; add \"subject\" to its record"
        )
    prompt = fact.prompt if prompt is None else prompt
    before, after = prompt.split("{}")
    lead, trail = template.split("{}", 1)
    return lead + before + fact.subject + after + trail, len(lead) + len(before) + len(fact.subject)


def sample_context_templates(loaded: LoadedModel, seed: int, per_opener: int = 1, length: int = 10) -> list[str]:
    """Context templates in the model's own words: ``"{}"`` and texts of ``length`` tokens followed by ``". {}"``.

    Sampled (top-k 5, as MEMIT does, arXiv:2210.07229) with ``seed``; the clean template always comes first.
    """
    templates = ["{}"]
    encoder = Encoder(loaded.tokenizer)
    with seeded(loaded.device, seed):
        for opener in _OPENERS if per_opener else ():
            start = encoder.document_start() + encoder.encode(opener).ids
            texts = generate(loaded, [start] * per_opener, length, do_sample=True, top_k=5)
            for row in texts:
                text = loaded.tokenizer.decode(row, skip_special_tokens=True)
                text = " ".join(text.replace("{", " ").replace("}", " ").replace("�", " ").split())
                templates.append(f"{text.rstrip('.')}. {{}}")
    return templates


def context_templates(loaded: LoadedModel, seed: int, per_opener: int = 1) -> list[str]:
    """`sample_context_templates`, from the cache where this very model, which must be unedited, has sampled them before."""
    if not per_opener:
        return sample_context_templates(loaded, seed, 0)
    model = (loaded.fingerprint, config_values(loaded.model), tokenizer_identity(loaded.tokenizer))
    key = cache_key(loaded.device, _TEMPLATES, *model, list(_OPENERS), seed, per_opener)
    file = cache_dir() / "templates" / f"{key}.json"
    found: list[str] | None = read_cache(file)
    if found is None:
        found = ranks.once(partial(sample_context_templates, loaded, seed, per_opener))
        write_cache(file, found)
    return found
