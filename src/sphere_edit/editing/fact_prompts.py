"""The rows of token ids in which a fact's target is optimised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sphere_edit.facts.fact import Fact
from sphere_edit.facts.forms import contexts, wordings
from sphere_edit.facts.prompts import KL_PROMPT, Encoder, fill


@dataclass(frozen=True)
class FactPrompts:
    """One fact's rows of token ids: one a template or rewording (prompt and target but for its last token), then the KL prompt's.

    The KL prompt ends with the subject: that is where its next token is predicted, and nothing after it can matter. If
    the fact's own prompt begins with the subject, the first row says the same up to there, and there is no other.
    """

    rows: list[list[int]]
    subjects: list[int]  # subject's last token in each row
    starts: list[int]  # first target token after each template's prompt
    targets: list[list[int]]  # target tokens after each template's prompt

    @property
    def kl_row(self) -> int:
        """The row whose next-token distribution at the subject's last token the KL divergence is about."""
        return len(self.targets) if len(self.rows) > len(self.targets) else 0

    @property
    def answer_tokens(self) -> int:
        """Tokens of the answer, after the template that makes the most of it."""
        return max(map(len, self.targets))

    def replayed_tokens(self, whole: bool = False) -> int:
        """Tokens in one evaluation of the loss: from the subject's last token on, or of ``whole`` rows, padded."""
        spans = (len(row) - (0 if whole else subject) for row, subject in zip(self.rows, self.subjects, strict=True))
        return len(self.rows) * max(spans)

    @classmethod
    def of(cls, fact: Fact, templates: Sequence[str], encoder: Encoder) -> FactPrompts:
        """The prompts of one fact in every template, the first of which is the bare one, and its rewordings."""
        rows, subjects, starts, targets = [], [], [], []
        for form, template in wordings(fact, templates, encoder):
            tokens, start, subject = encoder.with_answer(form, template)
            rows.append(tokens.ids[:-1])
            subjects.append(subject)
            starts.append(start)
            targets.append(tokens.ids[start:])
        return cls.with_kl(fact, encoder, rows, subjects, starts, targets)

    @classmethod
    def said(
        cls, fact: Fact, templates: Sequence[str], encoder: Encoder, answers: Sequence[Sequence[int]]
    ) -> FactPrompts:
        """The prompts of one fact in every template with other answers, token ids, one a template."""
        places = [encoder.at_subject(fact, template)[1] for template in contexts(fact, templates)]
        prompts = in_contexts(fact, templates, encoder)
        rows = [[*prompt, *answer[:-1]] for prompt, answer in zip(prompts, answers, strict=True)]
        return cls.with_kl(fact, encoder, rows, places, [len(prompt) for prompt in prompts], [*map(list, answers)])

    @classmethod
    def with_kl(
        cls,
        fact: Fact,
        encoder: Encoder,
        rows: list[list[int]],
        subjects: list[int],
        starts: list[int],
        targets: list[list[int]],
    ) -> FactPrompts:
        """These rows and the KL prompt's, unless the first says the same."""
        kl_tokens, kl_subject = encoder.at_subject(fact, prompt=KL_PROMPT)
        kl_row = kl_tokens[: kl_subject + 1]
        if rows[0][: subjects[0] + 1] != kl_row:
            rows.append(kl_row)
            subjects.append(kl_subject)
        return cls(rows, subjects, starts, targets)


def in_contexts(fact: Fact, templates: Sequence[str], encoder: Encoder) -> list[list[int]]:
    """Token ids of a fact's prompt in every template, without an answer."""
    return [
        encoder.asked(fill(template, fact)[0], fact.chat, fact.system).ids for template in contexts(fact, templates)
    ]
