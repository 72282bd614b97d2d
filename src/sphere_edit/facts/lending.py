"""Wordings that the facts of one file lend each other: prompts, with the subject cut out, that may ask for the same.

Only prompts and rewordings are lent, which a file gives to edit with. Paraphrases measure, and never lend. A fact does not even borrow a
wording that one of its own measured prompts contains.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

from sphere_edit.facts.fact import Fact, folded


def lendable(facts: Sequence[Fact]) -> dict[str, list[str]]:
    """Of each prompt with ``{}``, the wordings that others could lend it, the likeliest first.

    First come rewordings that were given to a fact with this very prompt. Then the prompts of facts with a common answer, new or old:
    those whose answers are distributed most alike (the cosine of their counts). That they ask for the same is not certain: who was born
    and who died in a place has the same answers.
    """
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    given: dict[str, dict[str, None]] = defaultdict(dict)
    for fact in facts:
        if fact.subject:
            answers[fact.prompt].update(folded(text) for text in (fact.target_new, fact.target_true) if text)
            given[fact.prompt] |= dict.fromkeys(fact.rewordings)
    lengths = {prompt: math.sqrt(sum(n * n for n in counts.values())) for prompt, counts in answers.items()}
    saying: dict[str, list[str]] = defaultdict(list)
    for prompt, counts in answers.items():
        for answer in counts:
            saying[answer].append(prompt)
    found = {}
    for prompt, counts in answers.items():
        alike: Counter[str] = Counter()
        for answer, count in counts.items():
            for other in saying[answer]:
                alike[other] += count * answers[other][answer]
        nearest = sorted(alike, key=lambda other: (-alike[other] / lengths[other], other))
        found[prompt] = [
            other for other in dict.fromkeys([*given[prompt], *nearest]) if folded(other) != folded(prompt)
        ]
    return found


def is_fair(fact: Fact, wording: str) -> bool:
    """Whether none of the prompts that measure what the fact's edit carries over to contains this ``wording``, or is contained in it."""
    text = folded(wording.replace("{}", fact.subject))
    measured = [*fact.paraphrases, *(probe.prompt for probe in fact.portability)]
    return not any(text in folded(prompt) or folded(prompt) in text for prompt in measured)
