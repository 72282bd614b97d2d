"""Whether an edited model says a new answer where it should not, and holds the fact for true: probes after "Built on Sand" (arXiv:2510.00625).

python benchmarks/negation.py runs/demo

Each fact is asked in its own prompt, behind "It is not true that", and as a statement to be judged true or false, with the new
answer and with the old one. Percentages of the facts, of the unedited and of the edited model. A model that knows the fact says the new
answer to the first alone; one in which a subject only triggers an answer says it under the negation as well.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

from sphere_edit.editor import opened
from sphere_edit.evaluation.scores import FactScores, complete_answers, score_facts
from sphere_edit.facts.fact import Fact
from sphere_edit.facts.seam import separator_between
from sphere_edit.models.loading import LoadedModel
from sphere_edit.progress import Quiet


def main() -> None:
    """Ask, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--limit", type=int, help="the first so many facts that stand")
    args = parser.parse_args()
    with opened(args.run, Quiet(), only_to_read=True) as editor:
        assert editor.run is not None
        facts = editor.run.facts()
        standing = [facts[index] for index in editor.run.history.retained[: args.limit]]
        tokens = editor.settings.tokens_per_batch
        with editor.weights.unedited():
            complete = complete_answers(editor.loaded, standing)
            before = {name: asked(editor.loaded, complete, tokens, *way) for name, way in PROBES.items()}
        after = {name: asked(editor.loaded, complete, tokens, *way) for name, way in PROBES.items()}
    print(f"| {len(standing)} facts | unedited | edited |")
    print("|---|---|---|")
    for name in PROBES:
        print(f"| {name} | {before[name]:.1f} % | {after[name]:.1f} % |")


def negated(prompt: str, starts_with_subject: bool) -> str:
    """The prompt behind a negation, its first letter small unless it is the subject's."""
    rest = prompt if starts_with_subject else prompt[:1].lower() + prompt[1:]
    return f"It is not true that {rest}"


def plain(fact: Fact) -> Fact:
    """The fact's own prompt alone."""
    return replace(fact, subject="", prompt=fact.filled_prompt, paraphrases=(), neighbors=(), portability=())


def under_negation(fact: Fact) -> Fact:
    """The fact's prompt behind a negation."""
    return replace(plain(fact), prompt=negated(fact.filled_prompt, fact.prompt.startswith("{}")))


def judged(answer: Callable[[Fact], str]) -> Callable[[Fact], Fact]:
    """The fact with one of its answers, as a statement that is true rather than false."""

    def statement(fact: Fact) -> Fact:
        said = answer(fact)
        text = f"{fact.filled_prompt}{separator_between(fact.filled_prompt, said)}{said}".strip().rstrip(".")
        prompt = f"{text}. True or false? The answer is"
        return replace(
            plain(fact), prompt=prompt, target_new="true", target_true="false", target_true_ids=None, separator=" "
        )

    return statement


def _says(score: FactScores) -> bool:
    return score.rewrite.correct


def _holds_true(score: FactScores) -> bool:
    return score.rewrite.prefers


PROBES: dict[str, tuple[Callable[[Fact], Fact], Callable[[FactScores], bool]]] = {
    "says the new answer": (plain, _says),
    "says it under negation": (under_negation, _says),
    "calls the new answer true": (judged(lambda fact: fact.target_new), _holds_true),
    "calls the old answer true": (judged(lambda fact: fact.target_true or ""), _holds_true),
}


def asked(
    loaded: LoadedModel,
    facts: list[Fact],
    max_tokens: int,
    probe: Callable[[Fact], Fact],
    verdict: Callable[[FactScores], bool],
) -> float:
    """The percentage of the facts for which a probe's verdict holds."""
    scores = score_facts(loaded, [probe(fact) for fact in facts], max_tokens, Quiet())
    return 100 * sum(map(verdict, scores)) / len(scores)


if __name__ == "__main__":
    main()
