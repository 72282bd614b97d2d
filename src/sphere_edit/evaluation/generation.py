"""What the edited model says of itself: answers, fluency, and consistency with reference texts."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from sklearn.feature_extraction.text import TfidfVectorizer

from sphere_edit import ranks
from sphere_edit.errors import SphereEditError
from sphere_edit.evaluation.scores import FactScores, PromptScore, Question, answer_ends, grouped, questions
from sphere_edit.facts.chat import chat_frame, has_chat_template
from sphere_edit.facts.fact import Fact
from sphere_edit.facts.prompts import Encoder
from sphere_edit.models.generation import generate, pads_on_the_left, seeded, until_end
from sphere_edit.models.loading import LoadedModel
from sphere_edit.models.tokens import batches_by_length, over_batches, same_length_batches
from sphere_edit.progress import Reporter

_ANSWER_TOKENS = (
    12  # that the model may take to give an answer, at least; in a chat, where it says whole sentences, it does
)
_SHOWN_TOKENS = 6  # after which it is not asked further where that can change no verdict
_ROWS = 64  # of one batch of answers: enough to keep a processor busy, and few enough for several ranks to have some
_TEXT_TOKENS = 100


def with_answers(
    loaded: LoadedModel,
    facts: Sequence[Fact],
    scores: Sequence[FactScores],
    chat: bool,
    max_tokens: int,
    reporter: Reporter,
) -> list[FactScores]:
    """The scores with what the model says, greedily, after every prompt of every fact, and whether it begins with the right answer.

    It says 6 tokens, and goes on while more could change the verdict: to as many as the right answer has, or 12 if that is more. With ``chat``, or for a fact that is given in one, the prompt is a user's
    message in the model's own chat template, and the answer is what the assistant says.
    """
    encoder = Encoder(loaded.tokenizer)
    asked = [question for fact in facts for question in questions(fact)]
    coded = [encoder.asked(question.prompt, chat or question.chat, question.right.system).ids for question in asked]
    shown = [_ANSWER_TOKENS if chat or question.chat else _SHOWN_TOKENS for question in asked]
    said = continuations(loaded, coded, shown, max_tokens, reporter, end=True)
    more = {
        index: size - len(said[index])
        for index, question in enumerate(asked)
        if len(said[index]) == shown[index]
        and (size := max(_ANSWER_TOKENS, len(question.right.after(question.prompt, encoder)[1]))) > shown[index]
        and _is_open(loaded, encoder, question, coded[index], said[index], chat)
    }
    if more:
        rows = [[*coded[index], *said[index]] for index in more]
        rest = continuations(loaded, rows, list(more.values()), max_tokens, reporter, "longer answers", end=True)
        for index, ids in zip(more, rest, strict=True):
            said[index] += ids
    pairs = iter(zip(asked, coded, said, strict=True))
    found = []
    for fact, score in zip(facts, scores, strict=True):
        told = []
        for prompt in score.prompts():
            question, before, ids = next(pairs)
            told.append(_told(loaded, encoder, prompt, question, before, ids, chat))
        found.append(grouped(fact, told))
    return found


def _told(
    loaded: LoadedModel,
    encoder: Encoder,
    score: PromptScore,
    question: Question,
    before: list[int],
    ids: list[int],
    chat: bool,
) -> PromptScore:
    """The score with what was said, ``ids`` after ``before``, and the generated verdict of it.

    An answer that the unedited model gave is a number of its tokens, cut anywhere, its end of text included, and is compared as tokens; what
    it gave to the plain prompt says nothing about a chat. Of other answers the text is compared, special tokens in it included.
    """
    ends, tokenizer = answer_ends(loaded, encoder, chat or question.chat), loaded.tokenizer
    ids = until_end(ids, ends)
    words = [token for token in ids if token not in ends]
    said, answer = said_after(tokenizer, before, words, special=False), question.right
    if answer.ids is None:
        begins: bool | None = _begins(said_after(tokenizer, before, words, special=True), question, chat)
    elif chat and not question.chat:
        begins = None
    else:
        wanted = until_end(answer.ids, ends)  # runs begun earlier kept what the model went on to say after its end
        begins = ids[: len(wanted)] == wanted
    return replace(score, said=said, begins=begins)


def _is_open(
    loaded: LoadedModel, encoder: Encoder, question: Question, before: list[int], ids: list[int], chat: bool
) -> bool:
    """Whether what was said so far, ``ids`` after ``before``, leaves it open if it begins with a right answer."""
    ends, answer = answer_ends(loaded, encoder, chat or question.chat), question.right
    if not ends.isdisjoint(ids):
        return False
    if answer.ids is not None:
        wanted = until_end(answer.ids, ends)
        return (question.chat or not chat) and len(ids) < len(wanted) and ids == wanted[: len(ids)]
    text = said_after(loaded.tokenizer, before, ids, special=True)
    return any(could_begin_with(told, wanted) for told, wanted in _to_compare(text, question, chat))


def said_after(tokenizer: Any, before: list[int], ids: list[int], special: bool) -> str:
    """The text of ``ids`` as they stand after ``before``; some tokenizers drop a text's first space when they decode it alone."""
    whole, lead, alone = (
        tokenizer.decode(part, skip_special_tokens=not special, clean_up_tokenization_spaces=False)
        for part in ([*before, *ids], before, ids)
    )
    return whole[len(lead) :] if whole.startswith(lead) else alone


def _begins(text: str, question: Question, chat: bool) -> bool:
    """Whether the whole text, seam included, begins with the prompt and a right answer."""
    return any(begins_with(told, wanted) for told, wanted in _to_compare(text, question, chat))


def _to_compare(text: str, question: Question, chat: bool) -> Iterator[tuple[str, str]]:
    """What was said and each right answer, both behind the prompt.

    In a chat, and in runs begun before facts kept their separator, spaces at the seam do not count.
    """
    answer = question.right
    plain = not (chat or question.chat) and answer.separator is not None
    prompt = question.prompt if plain else ""
    for right in (answer, *answer.others):
        yield prompt + text, f"{prompt}{right.separator if plain else ''}{right.text}"


def begins_with(said: str, answer: str) -> bool:
    """Whether a text begins with an answer, whatever the case and the spaces, and does not go on within its last word."""
    told, wanted = _folded(said), _folded(answer)
    rest = told[len(wanted) :]
    return told.startswith(wanted) and not (wanted[-1:].isalnum() and rest[:1].isalnum() and rest[:1].isascii())


def could_begin_with(said: str, answer: str) -> bool:
    """Whether a text may yet begin with an answer, or not, by what follows it: it is no longer, and the same so far."""
    return _folded(answer).startswith(_folded(said).rstrip("� "))  # the sign of a character that is cut


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold()


def continuations(
    loaded: LoadedModel,
    prompts: Sequence[list[int]],
    lengths: Sequence[int],
    max_tokens: int,
    reporter: Reporter,
    title: str = "generation",
    **options: Any,
) -> list[list[int]]:
    """What the model says after each prompt, all token ids, at most so many; greedily unless ``options`` say otherwise.

    Prompts of several lengths go together, unless the model cannot take them so, or tokens are drawn, which other batches would change.
    """
    asked = list(zip(prompts, lengths, strict=True))
    apart = options.get("do_sample", False) or not pads_on_the_left(loaded, prompts, max(lengths, default=0))
    cut = same_length_batches if apart else partial(batches_by_length, rows=_ROWS)
    with reporter.bar(title, len(prompts), "prompt") as advance, ranks.told(advance) as tell:

        def go_on(chunk: list[tuple[list[int], int]]) -> Iterator[list[int]]:
            rows = generate(loaded, [prompt for prompt, _ in chunk], max(length for _, length in chunk), **options)
            tell(len(chunk))
            return (row[len(prompt) :][:length] for row, (prompt, length) in zip(rows, chunk, strict=True))

        return over_batches(asked, max_tokens, go_on, lambda pair: len(pair[0]), cut)


def check_chat(loaded: LoadedModel) -> None:
    """Refuse a model whose answers cannot be asked for in a chat.

    Raises:
        SphereEditError: its tokenizer has no chat template, or one that cannot be used.
    """
    if not has_chat_template(loaded.tokenizer):
        raise SphereEditError(
            f"'{loaded.source}' has no chat template; use generation: plain, which continues the prompt itself"
        )
    chat_frame(loaded.tokenizer)


# --- fluency and consistency --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextScores:
    """How the model writes about edited subjects.

    Attributes:
        fluency: weighted entropy of 2- and 3-grams in bits, the mean over texts (`n_gram_entropy`).
        consistency: mean TF-IDF cosine of a fact's texts with its reference texts, from 0 to 1; None without any.
        facts: how many facts were written about.
        referenced: how many of them had reference texts.
    """

    fluency: float
    consistency: float | None
    facts: int
    referenced: int


def score_texts(
    loaded: LoadedModel,
    facts: Sequence[Fact],
    references: Sequence[str] | None,
    seed: int,
    max_tokens: int,
    reporter: Reporter,
) -> TextScores:
    """Let the model write 100 tokens after each of a fact's generation prompts, sampled from the 5 likeliest (ROME's protocol).

    A data set without generation prompts has its rewrite prompt and paraphrases used instead. Reference texts of a fact are
    those ``references`` that mention its target_new.
    """
    encoder = Encoder(loaded.tokenizer)
    prompts = [(index, prompt) for index, fact in enumerate(facts) for prompt in _writing_prompts(fact)]
    coded = [encoder.encode(prompt).ids for _, prompt in prompts]
    with seeded(loaded.device, seed):
        lengths = [_TEXT_TOKENS] * len(coded)
        said = continuations(loaded, coded, lengths, max_tokens, reporter, "writing", do_sample=True, top_k=5)
    texts: list[list[str]] = [[] for _ in facts]
    for (index, prompt), ids in zip(prompts, said, strict=True):
        texts[index].append(prompt + loaded.tokenizer.decode(ids, skip_special_tokens=True))
    entropies = [sum(map(n_gram_entropy, several)) / len(several) for several in texts]
    cosines = list(_cosines(facts, texts, references)) if references else []
    return TextScores(
        sum(entropies) / len(entropies),
        sum(cosines) / len(cosines) if cosines else None,
        len(facts),
        len(cosines),
    )


def _writing_prompts(fact: Fact) -> Sequence[str]:
    return fact.generation_prompts or (fact.filled_prompt, *fact.paraphrases)


def n_gram_entropy(text: str) -> float:
    """``(2/3 H₂ + 4/3 H₃) / 2``, H_n the entropy in bits of the text's n-grams of words and signs (ROME, arXiv:2202.05262, §3.2).

    A text that repeats itself has little of it. Too short a text for a trigram has H₃ = 0.
    """
    words = re.findall(r"\w+|[^\w\s]", text)
    return sum(weight * _entropy(words, n) for n, weight in ((2, 2 / 3), (3, 4 / 3))) / 2


def _entropy(words: Sequence[str], n: int) -> float:
    counts = Counter(zip(*(words[start:] for start in range(n)), strict=False))
    total = counts.total()
    return -sum(count / total * math.log2(count / total) for count in counts.values())


def tf_idf_cosine(vectorizer: TfidfVectorizer, first: str, second: str) -> float:
    """Cosine of two texts' TF-IDF vectors, in ``vectorizer``'s vocabulary and document frequencies."""
    one, other = vectorizer.transform([first, second])
    return float((one @ other.T).sum())  # the vectors have length 1, or 0 where no word is known


def _cosines(facts: Sequence[Fact], texts: Sequence[Sequence[str]], references: Sequence[str]) -> Iterator[float]:
    vectorizer = TfidfVectorizer().fit(references)
    folded = [reference.casefold() for reference in references]
    for fact, several in zip(facts, texts, strict=True):
        mention = re.compile(rf"\b{re.escape(fact.target_new.strip().casefold())}\b")
        about = [reference for reference, low in zip(references, folded, strict=True) if mention.search(low)]
        if about:
            yield tf_idf_cosine(vectorizer, " ".join(several), " ".join(about))
