"""Every prompt of a fact, asked of the model as it stands.

Every prompt has a right answer (target_new; for a neighbour and for portability its own) and a rival (target_true; for a neighbour
target_new; for portability what the unedited model says). What was measured of a prompt is judged in several protocols (`sphere_edit.evaluation.catalogue`):

- *likelihood* (published: ROME, MEMIT, AlphaEdit, SPHERE on CounterFact): the mean negative log-likelihood per token of the
  right answer is lower than that of its rival;
- *strict*: every token of a right answer is the likeliest one, given the answer's tokens before it;
- *token*: the share of the right answer's tokens that are the likeliest, given those before (the authors' ZsRE numbers);
- *generated*: what the model says freely and greedily begins with the right answer (`sphere_edit.evaluation.generation`);
- *exact line*, *ROUGE-L*: what it says until it stops by itself is the right answer, or has so much of it (`sphere_edit.evaluation.natural`);
- *strict, other form*: the strict verdict on the prompt in the form that the fact is not asked in: in a chat, or plain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import zip_longest
from typing import Any

from pydantic import TypeAdapter, ValidationError

from sphere_edit import ranks
from sphere_edit.errors import SphereEditError
from sphere_edit.facts.fact import Fact
from sphere_edit.facts.prompts import Encoder
from sphere_edit.models.configuration import positions
from sphere_edit.models.forward import next_token_scores
from sphere_edit.models.generation import end_tokens, greedy_continuations
from sphere_edit.models.loading import LoadedModel
from sphere_edit.models.prefix import SharedPrefix
from sphere_edit.models.tokens import Predictions, over_batches
from sphere_edit.progress import Quiet, Reporter

_ANSWER_TOKENS = 4096  # in one batch of `score_answers`


@dataclass(frozen=True)
class Line:
    """What the model said until it stopped by itself.

    Attributes:
        said: as many lines of it as the right answer has.
        exact: whether that is a right answer.
        overlap: its ROUGE-L with the right answer that it is nearest to, from 0 to 1.
    """

    said: str
    exact: bool
    overlap: float


@dataclass(frozen=True)
class PromptScore:
    """One prompt of a fact.

    Attributes:
        nll_right: mean negative log-likelihood per token (nats) of the right answer.
        nll_other: of its rival.
        accuracy: share of the right answer's tokens that are the likeliest, given those before.
        also: whether all tokens of one of the other right answers are, where there are any.
        line: what it says until it stops by itself, where it was asked so.
        said: what the model says after the prompt, where it was asked.
        begins: whether that begins with the right answer.
        other: the strict verdict on the prompt in the other form (in a chat, or plain), where it was asked so.
    """

    nll_right: float
    nll_other: float
    accuracy: float
    said: str | None = None
    begins: bool | None = None
    other: bool | None = None
    also: bool | None = None
    line: Line | None = None

    @property
    def prefers(self) -> bool:
        """The likelihood verdict; the same text on both sides counts as kept."""
        return self.nll_right <= self.nll_other

    @property
    def correct(self) -> bool:
        """The strict verdict."""
        return self.accuracy == 1.0 or bool(self.also)


@dataclass(frozen=True)
class FactScores:
    """All prompts of one fact."""

    rewrite: PromptScore
    paraphrases: tuple[PromptScore, ...]
    neighbors: tuple[PromptScore, ...]
    portability: tuple[PromptScore, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> FactScores:
        """The scores that ``as_dict`` described.

        Raises:
            SphereEditError: it described none.
        """
        try:
            return _SCORES.validate_python(record)
        except ValidationError as error:
            first = error.errors()[0]
            raise SphereEditError(
                f"the scores of a fact are damaged ('{'.'.join(map(str, first['loc']))}': {first['msg']}); remove the file that holds them, and "
                "sphere-edit edit RUN --resume measures them again"
            ) from None

    def prompts(self) -> tuple[PromptScore, ...]:
        """Rewrite, paraphrases, neighbours, portability, in the order of `questions`."""
        return (self.rewrite, *self.paraphrases, *self.neighbors, *self.portability)


_SCORES = TypeAdapter(FactScores)


@dataclass(frozen=True)
class Answer:
    """What may follow a prompt: a text, or the very tokens a model said.

    ``separator`` stands between the prompt and the text (None: by the rule of older runs); ``others`` are right as well.
    In a ``chat``, the prompt is a user's message, behind the ``system`` prompt.
    """

    text: str
    ids: tuple[int, ...] | None = None
    separator: str | None = None
    others: tuple[Answer, ...] = field(default=(), compare=False)
    chat: bool = False
    system: str | None = None

    def after(self, prompt: str, encoder: Encoder) -> tuple[list[int], list[int]]:
        """Token ids of the prompt and of the answer after it."""
        if self.ids is not None:
            return encoder.asked(prompt, self.chat, self.system).ids, list(self.ids)
        tokens, start = encoder.answered(prompt, self.text, self.separator, self.chat, self.system)
        return tokens.ids[:start], tokens.ids[start:]


def answer_ends(loaded: LoadedModel, encoder: Encoder, chat: bool) -> frozenset[int]:
    """The tokens that end an answer: those that end a text of the model, and in a chat the one that ends a turn."""
    ends = end_tokens(loaded)
    return ends | {encoder.chat_end} if chat and encoder.chat_end is not None else ends


def complete_answers(loaded: LoadedModel, facts: Sequence[Fact]) -> list[Fact]:
    """Facts with every missing true answer and rival filled by the model's own greedy answer: as many tokens as the right one has, fewer where
    it ends its text.

    To be called with the unedited model in place: what it says is then what the edit is compared with.
    """
    encoder = Encoder(loaded.tokenizer)
    asked = [question for fact in facts for question in _unanswered(fact)]
    if not asked:
        return list(facts)
    coded = [answer.after(prompt, encoder) for prompt, answer in asked]
    ends = [answer_ends(loaded, encoder, answer.chat) for _, answer in asked]
    lengths = [max(1, len(ids)) for _, ids in coded]
    said = iter(greedy_continuations(loaded, [encoder.asked(p, a.chat, a.system).ids for p, a in asked], lengths, ends))

    def answer() -> tuple[str, tuple[int, ...]]:
        ids = next(said)
        return loaded.tokenizer.decode(ids), tuple(ids)

    return [_completed(fact, answer) for fact in facts]


def _unanswered(fact: Fact) -> list[tuple[str, Answer]]:
    """The prompts whose old answer the unedited model is asked for, each with a text of the length that is wanted."""
    new, form = fact.target_new, (fact.chat, fact.system)
    asked = [(fact.filled_prompt, Answer(new, None, fact.separator, (), *form))] if fact.target_true is None else []
    for neighbor in fact.neighbors:
        if neighbor.answer is None:
            asked.append((neighbor.prompt, Answer(new, None, fact.separator_of(neighbor, new), (), *form)))
    for probe in fact.portability:
        if probe.answers and probe.rival is None:
            right = probe.answers[0]
            asked.append((probe.prompt, Answer(right, None, fact.separator_of(probe, right), (), *form)))
    return asked


def _completed(fact: Fact, answer: Callable[[], tuple[str, tuple[int, ...]]]) -> Fact:
    """The fact with the next answers in the places that `_unanswered` names, in its order."""
    if fact.target_true is None:
        text, ids = answer()
        fact = replace(fact, target_true=text, target_true_ids=ids)
    neighbors = []
    for neighbor in fact.neighbors:
        if neighbor.answer is None:
            text, ids = answer()
            neighbor = replace(neighbor, answer=text, answer_ids=ids)
        neighbors.append(neighbor)
    probes = []
    for probe in fact.portability:
        if probe.answers and probe.rival is None:
            text, ids = answer()
            probe = replace(probe, rival=text, rival_ids=ids)
        probes.append(probe)
    return replace(fact, neighbors=tuple(neighbors), portability=tuple(probes))


Ids = tuple[int, ...] | None
Separator = Callable[[str], str | None]


@dataclass(frozen=True)
class Question:
    """A prompt of a fact with its right answer and the rival."""

    prompt: str
    right: Answer
    other: Answer

    @property
    def chat(self) -> bool:
        """Whether it is asked in a chat."""
        return self.right.chat


def questions(fact: Fact) -> list[Question]:
    """All prompts of a complete fact, in its first form: its own, its paraphrases, its neighbours, its portability."""
    new, truth = fact.target_new, _known(fact.target_true)
    form = (fact.chat, fact.system)
    asked = []

    def ask(
        prompt: str, right: Sequence[str], right_ids: Ids, rival: str, rival_ids: Ids, separator: Separator
    ) -> None:
        first, *others = right
        also = tuple(Answer(text, None, separator(text), (), *form) for text in others)
        answers = Answer(first, right_ids, separator(first), also, *form)
        asked.append(Question(prompt, answers, Answer(rival, rival_ids, separator(rival), (), *form)))

    for prompt in (fact.filled_prompt, *fact.paraphrases):
        ask(prompt, (new, *fact.answers), None, truth, fact.target_true_ids, partial(fact.separator_after, prompt))
    for neighbor in fact.neighbors:
        right = (_known(neighbor.answer), *neighbor.answers)
        ask(neighbor.prompt, right, neighbor.answer_ids, new, None, partial(fact.separator_of, neighbor))
    for probe in fact.probes:
        rival = _known(probe.rival)
        ask(probe.prompt, probe.answers, None, rival, probe.rival_ids, partial(fact.separator_of, probe))
    return asked


def score_facts(
    loaded: LoadedModel, facts: Sequence[Fact], max_tokens: int, reporter: Reporter, title: str = "evaluation"
) -> list[FactScores]:
    """Score every prompt of every fact on the model as it stands; facts must be complete (`complete_answers`)."""
    asked = [questions(fact) for fact in facts]
    pairs = {
        (question.prompt, answer): None
        for several in asked
        for question in several
        for answer in (question.right, question.other, *question.right.others)
    }
    scored = _answer_scores(loaded, list(pairs), max_tokens, reporter, title)

    def score(question: Question) -> PromptScore:
        right, accuracy = scored[question.prompt, question.right]
        others = [scored[question.prompt, answer][1] == 1.0 for answer in question.right.others]
        return PromptScore(
            right, scored[question.prompt, question.other][0], accuracy, also=any(others) if others else None
        )

    return [grouped(fact, map(score, several)) for fact, several in zip(facts, asked, strict=True)]


def score_answers(loaded: LoadedModel, prompt: str, answers: Sequence[Answer]) -> list[float]:
    """−log of the probability (nats) of each of some answers after a prompt, all its tokens together, by the model as it stands."""
    asked = list(dict.fromkeys(answers))
    encoder = Encoder(loaded.tokenizer)
    scored = _answer_scores(loaded, [(prompt, answer) for answer in asked], _ANSWER_TOKENS, Quiet(), "answers")
    return [scored[prompt, answer][0] * len(answer.after(prompt, encoder)[1]) for answer in answers]


def with_other_form(
    loaded: LoadedModel, facts: Sequence[Fact], scores: Sequence[FactScores], max_tokens: int, reporter: Reporter
) -> list[FactScores]:
    """The scores with the strict verdict on rewrite and paraphrases in the other form: in a chat, or plain for facts asked in one.

    Prompts that are too long for the model as a chat are not asked.
    """
    encoder = Encoder(loaded.tokenizer)
    limit = positions(loaded.model)
    asked: list[list[tuple[str, Answer]]] = []
    for fact in facts:
        turned = replace(fact, forms=("plain",) if fact.chat else ("chat",))
        asked.append([(question.prompt, question.right) for question in questions(turned)[: 1 + len(fact.paraphrases)]])
    readable = {
        (prompt, answer): None
        for pairs in asked
        for prompt, right in pairs
        for answer in (right, *right.others)
        if sum(map(len, answer.after(prompt, encoder))) <= limit
    }
    scored = _answer_scores(loaded, list(readable), max_tokens, reporter, "other form") if readable else {}
    found = []
    for fact, score, pairs in zip(facts, scores, asked, strict=True):
        verdicts = [_strict(scored, *pair) for pair in pairs]
        told = [replace(prompt, other=said) for prompt, said in zip_longest(score.prompts(), verdicts)]
        found.append(grouped(fact, told))
    return found


def _strict(scored: Mapping[tuple[str, Answer], tuple[float, float]], prompt: str, right: Answer) -> bool | None:
    """Whether one of the right answers is the likeliest, token by token; None where none was asked."""
    known = [scored[prompt, answer][1] == 1.0 for answer in (right, *right.others) if (prompt, answer) in scored]
    return any(known) if known else None


def grouped(fact: Fact, scores: Iterable[PromptScore]) -> FactScores:
    """The scores of a fact's `questions`, told apart."""
    rewrite, *rest = scores
    first = len(fact.paraphrases)
    second = first + len(fact.neighbors)
    return FactScores(rewrite, tuple(rest[:first]), tuple(rest[first:second]), tuple(rest[second:]))


def _answer_scores(
    loaded: LoadedModel, pairs: Sequence[tuple[str, Answer]], max_tokens: int, reporter: Reporter, title: str
) -> dict[tuple[str, Answer], tuple[float, float]]:
    """For each (prompt, answer): mean NLL per answer token, and the share of them that are the argmax."""
    encoder = Encoder(loaded.tokenizer)
    coded = [answer.after(prompt, encoder) for prompt, answer in pairs]
    hosts = _hosts([(*before, *answer[:-1]) for before, answer in coded])
    shared = SharedPrefix(loaded, list(hosts), min((len(before) - 1 for before, _ in coded), default=0))
    with reporter.bar(title, len(pairs), "answer") as advance, ranks.told(advance) as tell:

        def read(chunk: list[tuple[int, ...]]) -> Iterator[list[tuple[float, float]]]:
            hidden, lead = shared.last_hidden(chunk), shared.length + 1
            guests = [(row, index) for row, host in enumerate(chunk) for index in hosts[host]]
            answers = [
                (at, row, len(coded[index][0]) - lead, coded[index][1]) for at, (row, index) in enumerate(guests)
            ]
            where = Predictions.of(answers, len(guests), hidden.device)
            losses, likeliest = next_token_scores(loaded, hidden[where.rows, where.columns], where.tokens)
            sizes = [len(answer) for *_, answer in answers]
            right = (likeliest == where.tokens).split(sizes)
            scores = iter(
                (float(loss.double().mean()), float(hits.double().mean()))
                for loss, hits in zip(losses.split(sizes), right, strict=True)
            )
            tell(len(guests))
            return ([next(scores) for _ in hosts[host]] for host in chunk)

        scored = over_batches(list(hosts), max_tokens, read)
    return {
        pairs[index]: score
        for guests, scores in zip(hosts.values(), scored, strict=True)
        for index, score in zip(guests, scores, strict=True)
    }


def _hosts(rows: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], list[int]]:
    """Which rows have to be run, and for each the indices of the rows that it begins with, its own included.

    What a causal model computes at a position depends on what stands before it alone, so a row that begins another one
    need not be run: two answers of one token each after a prompt are both read off the prompt.
    """
    hosts: dict[tuple[int, ...], list[int]] = {}
    host: tuple[int, ...] = ()
    for index in sorted(range(len(rows)), key=lambda index: rows[index], reverse=True):
        row = rows[index]
        if host[: len(row)] != row:  # in this order a row comes right after those that it begins
            host = row
        hosts.setdefault(host, []).append(index)
    return hosts


def _known(answer: str | None) -> str:
    assert answer is not None, "complete_answers was not called"
    return answer
