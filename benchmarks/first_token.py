"""Facts whose subject is the first token of the row, beside twins of two tokens: what each costs the model, and whether it takes.

python benchmarks/first_token.py smollm2 --method frugal --corpus ../shared/data/wikipedia_passages.jsonl

Every fact is edited alone and taken back; with --batch all facts of a kind are one batch too. A tokenizer decides which candidates
have one token and which two, so other models may find fewer. Bare prompts have nothing before them; the sentence is `_LEAD`.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sphere_edit import Editor
from sphere_edit.editing.batch import Clock
from sphere_edit.editing.problem import State
from sphere_edit.evaluation.heldout import HeldoutScores, score_heldout
from sphere_edit.evaluation.scores import complete_answers, score_facts
from sphere_edit.facts.fact import Fact, Neighbor
from sphere_edit.facts.prompts import Encoder
from sphere_edit.progress import Quiet
from sphere_edit.runs.preparing import create_run

_LEAD = "In other news this week. "
_TOKENS = 2048
_SIBLINGS = 3  # other subjects of as many tokens, asked the same bare and in a sentence

# prompt, answers given in turn, subjects that may have one token, subjects that may have two
SUITE: tuple[tuple[str, str, str, str], ...] = (
    (
        "{} has the capital",
        "Lyon,Madrid,Milan,Boston",
        "France,Germany,Italy,Spain,Japan,China,Egypt,Mexico,Hungary",
        "New Zealand,South Africa,Thailand,Norway,Sweden,Kenya,Chile,Peru,Cuba",
    ),
    (
        "{} is a country whose language is",
        "Dutch,Arabic,Korean,Greek",
        "Brazil,Canada,Russia,India,England,Iran,Israel,Pakistan,Australia",
        "Austria,Finland,Denmark,Scotland,Ukraine,Vietnam,Poland,Iraq,Switzerland",
    ),
    (
        "{} was founded by",
        "Thomas Edison,Henry Ford,Walt Disney,Napoleon",
        "Google,Apple,Microsoft,Amazon,Facebook,Shell,NASA,Wikipedia,Linux,Windows",
        "Twitter,Netflix,Boeing,Intel,Sony,Adobe,Nike,Airbus,Honda,Instagram",
    ),
    (
        "{} is a city in",
        "Japan,Brazil,Egypt,Canada",
        "Paris,London,Rome,Boston,Chicago,Oxford,Cambridge",
        "Berlin,Madrid,Tokyo,Moscow,Vienna,Cairo,Toronto",
    ),
    (
        "{} was born in the city of",
        "Cairo,Athens,Dublin,Seattle",
        "Newton,Darwin,John,George,William,Charles,Henry,James,Robert,Thomas,David,Michael",
        "Einstein,Shakespeare,Bach,Chopin,Plato,Socrates,Dante,Kafka,Kant,Kepler,Monet,Edison",
    ),
    (
        "{} comes for the most part from",
        "Norway,Kenya,Cuba,Texas",
        "Gold,Silver,Iron,Water,Oil,Salt,Sugar,Paper,Wood,Fish,Fruit,Stone,Honey",
        "Copper,Glass,Wine,Beer,Milk,Coal,Steel,Butter,Coffee,Tea,Cotton,Cheese,Silk",
    ),
)


@dataclass(frozen=True)
class Row:
    """What one fact did, edited alone, or a batch of facts: verdicts are shares of 1."""

    divergence: float  # KL(unedited ‖ edited) on held-out text, nats
    ratio: float  # perplexity over the unedited model's
    bare: float  # strict verdict on the fact's prompt as it was given
    sentence: float  # and in a sentence
    bare_siblings: float  # siblings whose answer stayed what it was (strict), asked bare
    sentence_siblings: float  # and in a sentence


def main() -> None:
    """Read the command line, edit, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--method", default="frugal")
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2], choices=[1, 2], help="of the subjects")
    parser.add_argument("--each", type=int, default=100, help="so many facts of each prompt at most")
    parser.add_argument("--passages", type=int, default=40, help="held-out passages, of which --length tokens are read")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--batch", action="store_true", help="all facts of a kind in one batch too")
    parser.add_argument("--show", action="store_true", help="every fact of its own")
    args = parser.parse_args()
    moments = {"corpus": args.corpus, "tokens": 30_000, "heldout": args.passages}
    with tempfile.TemporaryDirectory() as folder:
        editor = Editor.from_pretrained(
            args.model, Path(folder) / "run", reporter=Quiet(), method=args.method, moments=moments
        )
        editor._attach(create_run(editor.session, editor.folder, editor.settings.batch_size))
        bench = Bench(editor, args.length)
        print("| | facts | KL, 10⁻⁴ nats: mean (largest) | perplexity × | bare | sentence | siblings bare | sentence |")
        print("|---|---|---|---|---|---|---|---|")
        for tokens in args.tokens:
            facts = suite(editor, tokens, args.each)
            rows = [bench.edited([fact]) for fact in facts]
            if args.show:
                for fact, row in zip(facts, rows, strict=True):
                    print(_line(f"{fact.filled_prompt} → {fact.target_new}", [row]))
            print(_line(f"{args.method}, {tokens} tokens, each alone", rows), flush=True)
            if args.batch:
                print(_line(f"{args.method}, {tokens} tokens, one batch", [bench.edited(facts)], len(facts)))


def suite(editor: Editor, tokens: int, each: int) -> list[Fact]:
    """The facts whose subject has so many tokens at the beginning of a row, at most ``each`` of a prompt, with their siblings."""
    encoder = Encoder(editor.tokenizer)
    start = encoder.encode("The").ids[0] in editor.tokenizer.all_special_ids
    facts = []
    for prompt, answers, one, two in SUITE:
        named = (one if tokens == 1 else two).split(",")
        subjects = [name for name in named if len(encoder.encode(name).ids) - start == tokens]
        for number, subject in enumerate(subjects[:each]):
            others = [other for other in subjects if other != subject][:_SIBLINGS]
            asked = [lead + prompt.format(other) for lead in ("", _LEAD) for other in others]
            facts.append(
                Fact(
                    subject=subject,
                    prompt=prompt,
                    target_new=answers.split(",")[number % 4],
                    paraphrases=(_LEAD + prompt.format(subject),),
                    neighbors=tuple(Neighbor(text, None) for text in asked),
                )
            )
    return complete_answers(editor.loaded, facts)


class Bench:
    """An editor whose statistics are ready, the unedited model's held-out text, and the method's state before any edit."""

    def __init__(self, editor: Editor, length: int):
        self.editor = editor
        loop = editor._stream.committer
        self.solver = loop.solver
        self.held = [passage[:length] for passage in editor._evaluator.heldout]
        self.unedited: HeldoutScores = score_heldout(editor.loaded, self.held, _TOKENS, Quiet())
        self.states: dict[str, State] = {name: {} for name in editor.weights.names}
        if hasattr(editor.session.method, "start"):  # found once, and not for every fact
            self.states = {name: editor.session.method.start(loop.statistics[name]) for name in editor.weights.names}

    def edited(self, facts: Sequence[Fact]) -> Row:
        """Write facts in one batch, those that do not take once more if the method looks back, measure, and take them back."""
        weights, loaded = self.editor.weights, self.editor.loaded
        self._write(facts)
        taken = score_facts(loaded, [fact.bare() for fact in facts], _TOKENS, Quiet())
        forgotten = [fact for fact, score in zip(facts, taken, strict=True) if not score.rewrite.correct]
        if forgotten and self.editor.session.method.recheck:
            self._write(forgotten)
        text = score_heldout(loaded, self.held, _TOKENS, Quiet(), unedited=self.unedited.hidden)
        scores = score_facts(loaded, facts, _TOKENS, Quiet())
        weights.reset()
        assert text.perplexity
        assert self.unedited.perplexity
        assert text.divergence is not None
        verdicts = torch.tensor([[float(prompt.correct) for prompt in score.prompts()] for score in scores])
        bare, sentence, *siblings = verdicts.mean(0).tolist()
        half = len(siblings) // 2
        parts = [sum(part) / max(len(part), 1) for part in (siblings[:half], siblings[half:])]
        return Row(text.divergence, text.perplexity / self.unedited.perplexity, bare, sentence, *parts)

    def _write(self, facts: Sequence[Fact]) -> None:
        self.solver.write(facts, dict(self.states), Clock())
        self.solver.deploy()


def _line(name: str, rows: Sequence[Row], facts: int | None = None) -> str:
    values: Tensor = torch.tensor([list(vars(row).values()) for row in rows], dtype=torch.float64)
    mean, most = values.mean(0).tolist(), values.max(0).values.tolist()
    verdicts = " | ".join(f"{100 * value:.0f}" for value in mean[2:])
    return f"| {name} | {facts or len(rows)} | {1e4 * mean[0]:.1f} ({1e4 * most[0]:.1f}) | {most[1]:.4f} at most | {verdicts} |"


if __name__ == "__main__":
    main()
