"""What the paraphrases of a data set ask for, and how many of each kind a run's model answers.

python benchmarks/wordings.py ../shared/data/counterfact.json --natural smollm2 --runs runs/demo

A paraphrase *rewords* its prompt if its last sentence is the wording of some record's own prompt, whatever stands before it: of CounterFact
those are its templates of relations. Any other asks for something that *follows* from the fact ("X worships" for X's religion), to which
the answer itself need not be the right next word. ``--natural`` asks the unedited model about its own knowledge: of the true answers that it gives after
a record's prompt, how many does it give after the paraphrase?
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

from sphere_edit import read_facts
from sphere_edit.editor import opened
from sphere_edit.evaluation.scores import FactScores, complete_answers, score_facts
from sphere_edit.facts.fact import Fact
from sphere_edit.models.loading import load_model
from sphere_edit.progress import Quiet

Kind = Literal["rewords", "follows"]
_TOKENS = 4096  # in one forward pass


def main() -> None:
    """Print the kinds, and the strict answers to each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("facts")
    parser.add_argument("--natural", metavar="MODEL", help="ask this model for the true answers it knows")
    parser.add_argument("--limit", type=int, help="the first so many records, for --natural")
    parser.add_argument("--runs", nargs="*", default=[], help="whose models are asked for their new answers")
    args = parser.parse_args()
    facts = read_facts(args.facts, skip_bad=True).facts
    known = {fact.prompt for fact in facts}
    kinds = [kind_of(paraphrase, fact.subject, known) for fact in facts for paraphrase in fact.paraphrases]
    print(
        f"{len(kinds):,} paraphrases: {kinds.count('rewords'):,} reword, {kinds.count('follows'):,} ask for what follows"
    )
    print("| | facts | strict on the prompt | rewording | what follows |")
    print("|---|---|---|---|---|")
    if args.natural:
        asked = [turned for fact in facts[: args.limit] if (turned := true_side(fact)) is not None]
        scores = score_facts(load_model(args.natural), asked, _TOKENS, Quiet())
        held = [(fact, score) for fact, score in zip(asked, scores, strict=True) if score.rewrite.correct]
        print(row("what the unedited model knows", held, known))
    for run in args.runs:
        with opened(run, Quiet(), only_to_read=True) as editor:
            assert editor.run is not None
            standing = [editor.run.facts()[index] for index in editor.run.history.retained]
            with editor.weights.unedited():
                complete = complete_answers(editor.loaded, standing)
            print(
                row(
                    run, list(zip(complete, score_facts(editor.loaded, complete, _TOKENS, Quiet()), strict=True)), known
                )
            )


def kind_of(paraphrase: str, subject: str, known: Iterable[str]) -> Kind:
    """Whether a paraphrase is one of the ``known`` wordings (with ``{}``) behind whatever, or asks for something else."""
    wording = last_sentence(paraphrase, subject)
    return "rewords" if wording is not None and wording in known else "follows"


def last_sentence(text: str, subject: str) -> str | None:
    """The sentence that the text ends with, with ``{}`` for the subject; None if it does not name it."""
    place = text.rfind(subject) if subject else -1
    if place < 0:
        return None
    ends = [match.end() for match in re.finditer(r"[.!?]\s+|\n+", text[:place])]
    sentence = text[ends[-1] if ends else 0 :]
    at = sentence.rfind(subject)
    return sentence[:at] + "{}" + sentence[at + len(subject) :]


def true_side(fact: Fact) -> Fact | None:
    """The fact as it is true, with the new answer for its rival; None where the file does not say what is true."""
    if fact.target_true is None:
        return None
    return replace(
        fact,
        target_new=fact.target_true,
        target_true=fact.target_new,
        target_true_ids=None,
        answers=(),
        neighbors=(),
        portability=(),
    )


def row(name: str, asked: Sequence[tuple[Fact, FactScores]], known: Iterable[str]) -> str:
    """One line of the table."""
    verdicts: dict[Kind, list[bool]] = defaultdict(list)
    for fact, score in asked:
        for paraphrase, said in zip(fact.paraphrases, score.paraphrases, strict=True):
            verdicts[kind_of(paraphrase, fact.subject, known)].append(said.correct)
    held = share([score.rewrite.correct for _, score in asked])
    return f"| {name} | {len(asked)} | {held} | {share(verdicts['rewords'])} | {share(verdicts['follows'])} |"


def share(verdicts: Sequence[bool]) -> str:
    """Percent of them, and of how many."""
    return f"{100 * sum(verdicts) / len(verdicts):.1f} % of {len(verdicts)}" if verdicts else "–"


if __name__ == "__main__":
    main()
