"""A judge for what a model said: another language model, behind any endpoint that speaks OpenAI's HTTP.

Off unless somebody asks. What it was asked and what it replied is kept word for word, so that its verdicts can be looked at and need not be
paid for twice.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from sphere_edit.errors import SphereEditError
from sphere_edit.evaluation.catalogue import LEARNT, PARTS, Part
from sphere_edit.evaluation.scores import FactScores, PromptScore, questions
from sphere_edit.facts.fact import Fact
from sphere_edit.progress import Reporter

_TOGETHER = 8  # questions under way at one time
_REPLY_TOKENS = 8
_TASK = (
    "You check whether an answer to a question, or the end of an unfinished sentence, says what is right. Say only yes or no. "
    "Other words for the same are right. Judge by what is given as right here, even if you know it otherwise."
)


@dataclass(frozen=True)
class Case:
    """One answer to be judged.

    Attributes:
        fact: its number in the run.
        part: what its prompt is for.
        side: "unedited" or "edited".
    """

    fact: int
    part: Part
    side: str
    prompt: str
    rights: tuple[str, ...]
    said: str

    @property
    def asked(self) -> str:
        """What the judge is asked."""
        right = "\n".join(f"- {text.strip()}" for text in self.rights)
        return f"Prompt: {self.prompt}\nRight is any of:\n{right}\nAnswer: {self.said.strip() or '(nothing)'}\n\nIs the answer right?"


@dataclass(frozen=True)
class Verdict:
    """What a judge made of a question: yes, no, or None where its reply was neither; and the reply itself."""

    right: bool | None
    reply: str

    @classmethod
    def of(cls, reply: str) -> Verdict:
        """By the first word of a reply."""
        word = "".join(sign if sign.isalpha() else " " for sign in reply.casefold()).split()[:1]
        return cls({"yes": True, "no": False}.get(word[0]) if word else None, reply)


@dataclass(frozen=True)
class Judge:
    """A model at an endpoint.

    Attributes:
        url: of the endpoint, up to ``/v1``.
        key: sent as a bearer token; None for an endpoint that wants none. It is kept nowhere.
    """

    url: str
    model: str
    key: str | None = None
    seconds: float = 60.0

    def __call__(self, asked: str) -> Verdict:
        """Ask one question, at temperature 0.

        Raises:
            SphereEditError: the endpoint cannot be reached, refuses, or sends something else than a reply.
        """
        body = {
            "model": self.model,
            "messages": [{"role": "system", "content": _TASK}, {"role": "user", "content": asked}],
            "temperature": 0,
            "max_tokens": _REPLY_TOKENS,
        }
        request = urllib.request.Request(
            f"{self.url.rstrip('/')}/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json", **({"Authorization": f"Bearer {self.key}"} if self.key else {})},
        )
        try:
            with urllib.request.urlopen(request, timeout=self.seconds) as response:
                content = json.load(response)
            return Verdict.of(str(content["choices"][0]["message"]["content"] or ""))
        except urllib.error.HTTPError as error:
            raise SphereEditError(f"the judge at {self.url} refuses: {error.code} {_reason(error)}") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise SphereEditError(f"the judge at {self.url} cannot be asked: {reason}") from None
        except (KeyError, IndexError, TypeError):
            raise SphereEditError(
                f"the judge at {self.url} sent no reply (choices[0].message.content); is it an endpoint like OpenAI's, up to /v1?"
            ) from None


def _reason(error: urllib.error.HTTPError) -> str:
    return error.read(300).decode("utf-8", "replace").strip() or str(error.reason)


def check_url(url: str) -> None:
    """Refuse what is no address of an endpoint.

    Raises:
        SphereEditError: it does not begin with http.
    """
    if not url.startswith(("http://", "https://")):
        raise SphereEditError(f"the judge's address '{url}' should begin with http:// or https://, and end with /v1")


def cases_of(facts: Mapping[int, Fact], scores: Mapping[int, FactScores], side: str) -> list[Case]:
    """What a model said after each prompt that an edit is to change, where it was asked: its whole line, or else its first words."""
    found = []
    for number, score in scores.items():
        fact = facts[number]
        asked = iter(questions(fact))
        for part, prompts in _in_order(score):
            for prompt, question in zip(prompts, asked, strict=False):
                said = prompt.said if prompt.line is None else prompt.line.said
                if part in LEARNT and said is not None:
                    rights = (question.right.text, *(other.text for other in question.right.others))
                    found.append(Case(number, part, side, question.prompt, rights, said))
    return found


def _in_order(score: FactScores) -> Iterable[tuple[Part, Sequence[PromptScore]]]:
    """The parts' prompts in the order of `questions`, which is the parts' own."""
    return [(part, part.prompts(score)) for part in PARTS]


def judged(
    judge: Callable[[str], Verdict],
    cases: Sequence[Case],
    known: dict[str, Verdict],
    keep: Callable[[str, Verdict], object],
    reporter: Reporter,
) -> list[bool | None]:
    """The verdict on each case; equal questions are asked once, and ``known`` ones not at all.

    Args:
        known: verdicts by question, to which those are added that come.
        keep: given each one that comes, at once.

    Raises:
        SphereEditError: the judge cannot be asked; what came before that is kept.
    """
    missing = [asked for asked in dict.fromkeys(case.asked for case in cases) if asked not in known]
    with reporter.bar("judging", len(missing), "answer") as advance, ThreadPoolExecutor(_TOGETHER) as pool:
        try:
            for asked, verdict in zip(missing, pool.map(judge, missing), strict=True):
                known[asked] = verdict
                keep(asked, verdict)
                advance(1)
        except SphereEditError:
            pool.shutdown(cancel_futures=True)
            raise
    return [known[case.asked].right for case in cases]


def shares(cases: Sequence[Case], verdicts: Sequence[bool | None], side: str) -> dict[Part, float]:
    """Percent of right answers of a side in each part that it has cases of: of a fact's prompts first, then over facts. What is unclear is not right."""
    by_fact: dict[Part, dict[int, list[bool]]] = {}
    for case, verdict in zip(cases, verdicts, strict=True):
        if case.side == side:
            by_fact.setdefault(case.part, {}).setdefault(case.fact, []).append(verdict is True)
    return {
        part: 100 * sum(sum(each) / len(each) for each in facts.values()) / len(facts)
        for part, facts in by_fact.items()
    }


def as_line(judge: Judge, asked: str, verdict: Verdict) -> dict[str, Any]:
    """A verdict as it is kept."""
    return {"judge": judge.model, "asked": asked, "reply": verdict.reply, "right": verdict.right}
