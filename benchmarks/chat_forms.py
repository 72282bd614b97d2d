"""What is learnt in one form, asked in the other: the demo facts edited as plain text, in a chat, and in both.

python benchmarks/chat_forms.py smollm2 runs/chat-forms --form plain --corpus ../shared/data/wikipedia_passages.jsonl

Each call makes one run, in minutes, and prints a table of all that are in the folder; a finished run is not made again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sphere_edit import Editor, read_facts
from sphere_edit.evaluation.catalogue import EFFICACY, GENERALIZATION, SPECIFICITY, STRICT, of_part
from sphere_edit.evaluation.intervals import intervals, summarise
from sphere_edit.evaluation.scores import FactScores, complete_answers, score_facts
from sphere_edit.facts.fact import Fact
from sphere_edit.facts.prompts import Encoder
from sphere_edit.models.forward import last_hidden, next_token_scores
from sphere_edit.models.tokens import Predictions, TokenBatch
from sphere_edit.progress import Quiet

FORMS: dict[str, dict[str, Any]] = {
    "plain": {"chat": False},
    "chat": {"chat": True},
    "both": {"forms": ["plain", "chat"]},
}
# questions in a user's words, of subjects that are among no demo facts
QUESTIONS = [
    {"subject": "Alhambra", "prompt": "In which city does the {} stand?", "target_new": "Dublin"},
    {"subject": "Brandenburg Gate", "prompt": "Which city is the {} in?", "target_new": "Athens"},
    {"subject": "Sagrada Familia", "prompt": "Where can I visit the {}?", "target_new": "Prague"},
    {"subject": "Danish", "prompt": "In which country do most people speak {}?", "target_new": "Portugal"},
]


def main() -> None:
    """Make one run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--form", choices=FORMS)
    parser.add_argument("--corpus")
    parser.add_argument("--method", default="frugal")
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--heldout", type=int, default=30)
    args = parser.parse_args()
    if args.form and not (args.folder / f"{args.form}.json").is_file():
        made = measured(args)
        (args.folder / f"{args.form}.json").write_text(json.dumps(made, indent=1), "utf-8")
    found = {
        form: json.loads(path.read_text("utf-8")) for form in FORMS if (path := args.folder / f"{form}.json").is_file()
    }
    show(found)


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Edit the demo facts and the questions in one form, and ask all of them in both, before and after."""
    moments: dict[str, Any] = {"heldout": args.heldout}
    if args.corpus:
        moments["corpus"] = args.corpus
    options = {"method": args.method, "batch_size": args.batch_size, "moments": moments, **FORMS[args.form]}
    started = time.monotonic()
    editor = Editor.from_pretrained(args.model, args.folder / args.form, evaluation={"generation": "off"}, **options)
    demo, questions = read_facts("demo"), [dict(record) for record in QUESTIONS]
    metrics = editor.edit([*demo.facts, *questions])
    seconds = time.monotonic() - started
    known = editor.run.facts()
    facts, examples = known[: len(demo.facts)], known[len(demo.facts) :]
    result: dict[str, Any] = {
        "seconds": seconds,
        "perplexity": [metrics["unedited"]["perplexity"], metrics["edited"]["perplexity"]],
        "divergence": metrics["edited"]["divergence"],
    }
    for form in ("plain", "chat"):
        asked = [replace(fact, forms=(form,)) for fact in facts]
        with editor.weights.unedited():
            complete = complete_answers(editor.loaded, asked)
            before = score_facts(editor.loaded, complete, editor.settings.tokens_per_batch, Quiet())
            chances = [probability(editor, replace(fact, forms=(form,))) for fact in examples]
        after = score_facts(editor.loaded, complete, editor.settings.tokens_per_batch, Quiet())
        result[form] = {
            "before": summarise(before),
            "after": summarise(after),
            "spans": intervals(after),
            "kept": kept(before, after),
            "examples": [
                {
                    "prompt": fact.filled_prompt,
                    "answer": fact.target_new,
                    "before": chance,
                    "after": probability(editor, fact_in),
                }
                for fact, chance in zip(examples, chances, strict=True)
                for fact_in in [replace(fact, forms=(form,))]
            ],
        }
    editor.close()
    return result


def kept(before: Sequence[FactScores], after: Sequence[FactScores]) -> float | None:
    """How many of the neighbours that the unedited model answered as expected (strict) the edited one does, in percent; None without any."""
    pairs = [
        (one.correct, other.correct)
        for first, second in zip(before, after, strict=True)
        for one, other in zip(first.neighbors, second.neighbors, strict=True)
    ]
    held = [after for before, after in pairs if before]
    return 100 * sum(held) / len(held) if held else None


def probability(editor: Editor, fact: Fact) -> float:
    """How likely the model as it stands makes the whole new answer."""
    tokens, start = Encoder(editor.tokenizer).answered(fact.filled_prompt, fact.target_new, fact.separator, fact.chat)
    loaded = editor.loaded
    hidden = last_hidden(loaded, TokenBatch.of([tokens.ids[:-1]], loaded.device))
    where = Predictions.of([(0, 0, start - 1, tokens.ids[start:])], 1, loaded.device)
    losses, _ = next_token_scores(loaded, hidden[where.rows, where.columns], where.tokens)
    return float((-losses.double().sum()).exp())


def show(found: dict[str, Any]) -> None:
    """Tables of what was made."""
    print(
        "| edited | asked | efficacy strict | generalization strict | specificity | neighbours kept, strict | perplexity | KL | s |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    names = [of_part(EFFICACY, STRICT).name, of_part(GENERALIZATION, STRICT).name, of_part(SPECIFICITY).name]
    for edited, result in found.items():
        for asked in ("plain", "chat"):
            cells = []
            for name in names:
                low, high = result[asked]["spans"][name]
                cells.append(f"{result[asked]['after'][name]:.1f} [{low:.0f}, {high:.0f}]")
            first, last = result["perplexity"]
            tail = f"× {last / first:.3f} | {result['divergence']:.4f} | {result['seconds']:.0f}"
            kept = result[asked]["kept"]
            print(f"| {edited} | {asked} | {' | '.join(cells)} | {'–' if kept is None else f'{kept:.1f}'} | {tail} |")
    print()
    print("| question → new answer | asked | before | " + " | ".join(f"edited {name}" for name in found) + " |")
    print("|---|---|---|" + "---|" * len(found))
    for number, record in enumerate(QUESTIONS):
        for asked in ("plain", "chat"):
            rows = [result[asked]["examples"][number] for result in found.values()]
            prompt = rows[0]["prompt"] if rows else record["prompt"]
            cells = [f"{row['after']:.3f}" for row in rows]
            print(f"| {prompt} → {record['target_new']} | {asked} | {rows[0]['before']:.1e} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
