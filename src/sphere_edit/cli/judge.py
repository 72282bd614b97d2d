"""The command that has another language model judge what a run's model said."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sphere_edit.cli.options import Run
from sphere_edit.cli.screen import out, reporter
from sphere_edit.counting import counted
from sphere_edit.errors import SphereEditError

if TYPE_CHECKING:
    from sphere_edit.evaluation.judging import Verdict

JUDGED = "judged.jsonl"


def judge(
    run: Run,
    url: Annotated[str, typer.Option(help="An endpoint like OpenAI's, up to /v1: http://localhost:8000/v1.")],
    model: Annotated[str, typer.Option(help="The judge's name there.")],
    key_env: Annotated[
        str, typer.Option(metavar="NAME", help="The environment variable with its key, if it wants one.")
    ] = "OPENAI_API_KEY",
    limit: Annotated[int | None, typer.Option(help="Judge only the first N facts.", min=1)] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help=f"Keep questions and verdicts here. \\[default: RUN/{JUDGED}]"),
    ] = None,
) -> None:
    """Have another language model judge what the unedited and the edited model said; its replies are kept, and nothing is asked twice.

    It is sent the facts' prompts, their right answers, and what the models said after them.
    """
    from sphere_edit.evaluation.catalogue import LEARNT
    from sphere_edit.evaluation.judging import Judge, as_line, cases_of, check_url, judged, shares
    from sphere_edit.files import plain_errors
    from sphere_edit.reporting.results import make_table
    from sphere_edit.runs.folder import RunFolder
    from sphere_edit.runs.measuring import read_scores, read_unedited

    check_url(url)
    folder = RunFolder.open(run)
    folder.lock(only_to_read=True)
    evaluation = folder.history.evaluation_at_head(final=True)
    if evaluation is None:
        raise SphereEditError(
            f"{run} has not been evaluated where it stands; sphere-edit edit {run} --resume does that"
        )
    facts, before, _ = read_unedited(folder)
    after = dict(list(read_scores(folder, evaluation).items())[:limit])
    by_number = dict(enumerate(facts))
    cases = [
        *cases_of(by_number, {number: before[number] for number in after}, "unedited"),
        *cases_of(by_number, after, "edited"),
    ]
    if not cases:
        raise SphereEditError(
            f"{run} did not keep what its models said; edit with evaluation: {{natural: 64}} for whole answers, or generation: plain"
        )
    kept = output or run / JUDGED
    asked_of = Judge(url, model, os.environ.get(key_env))
    with plain_errors(kept):
        known = _known(kept, model)
        with kept.open("a", encoding="utf-8") as file:
            file.write("\n" if _is_cut(kept) else "")

            def keep(asked: str, verdict: Verdict) -> None:
                file.write(json.dumps(as_line(asked_of, asked, verdict), ensure_ascii=False) + "\n")
                file.flush()

            verdicts = judged(asked_of, cases, known, keep, reporter())
    table = make_table(f"{counted(len(after), 'fact')} as '{model}' judges them", "", "before", "after", left=("",))
    sides = [shares(cases, verdicts, side) for side in ("unedited", "edited")]
    for part in LEARNT:
        if any(part in side for side in sides):
            table.add_row(part.label, *(f"{side[part]:.1f} %" if part in side else "–" for side in sides))
    out.print(table)
    if unclear := verdicts.count(None):
        out.print(f"{unclear} of {len(verdicts)} replies were neither yes nor no, and count as no")
    out.print(f"Questions and replies: {kept}", soft_wrap=True)


def _is_cut(path: Path) -> bool:
    """Whether the last line of a file has no end."""
    return path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n")


def _known(path: Path, model: str) -> dict[str, Verdict]:
    """What this judge has said before. A last line that a kill has cut is asked again."""
    from sphere_edit.evaluation.judging import Verdict

    found = {}
    for line in path.read_text("utf-8").splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
            if entry["judge"] == model:
                found[entry["asked"]] = Verdict(entry["right"], entry["reply"])
        except (ValueError, KeyError, TypeError):
            continue
    return found
