"""Facts that are to be taken back: which ones are meant, and what of the run's updates is theirs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sphere_edit.counting import counted
from sphere_edit.errors import SphereEditError
from sphere_edit.facts.fact import Fact, folded, short
from sphere_edit.facts.readers import FactSet, facts_from
from sphere_edit.numerics.update import LowRankUpdate, Update, joined
from sphere_edit.runs.folder import RunFolder
from sphere_edit.runs.history import History
from sphere_edit.runs.records import Batch

FactName = int | str | Fact  # a fact's number, its subject or prompt, or its subject and prompt as a record has them

_SHOWN = 5  # facts that a message names


# --- which are meant ----------------------------------------------------------------------------------------------


def wanted_from(given: int | str | Path | FactSet | Iterable[FactName | Mapping[str, Any]]) -> list[FactName]:
    """Whatever names facts, one by one; a path is a file of records."""
    if isinstance(given, (int, str, Fact)):
        return [given]
    if isinstance(given, (Path, FactSet)):
        return list(facts_from(given).facts)
    single = list(given)
    records = (
        facts_from([one for one in single if isinstance(one, Mapping)]).facts
        if any(isinstance(one, Mapping) for one in single)
        else []
    )
    return [one for one in single if not isinstance(one, Mapping)] + list(records)


def removable(run: RunFolder, wanted: Sequence[FactName]) -> list[int]:
    """The facts of a run that are meant and can be taken back now.

    Raises:
        SphereEditError: the run is to be finished first, or as `chosen` says.
    """
    if not run.history.finished:
        raise SphereEditError(
            f"{run.path} was interrupted; finish it first: sphere-edit edit {run.path} --resume. Then remove facts"
        )
    return chosen(run.history, run.facts(), wanted)


def chosen(history: History, facts: Sequence[Fact], wanted: Sequence[FactName]) -> list[int]:
    """The facts of a run that are meant, each once, in the run's order.

    Raises:
        SphereEditError: one is not in the run, does not stand any more, or several could be meant.
    """
    if not wanted:
        raise SphereEditError("which facts? Give their numbers, subjects or prompts")
    return sorted({_standing(history, facts, one) for one in wanted})


def _standing(history: History, facts: Sequence[Fact], wanted: FactName) -> int:
    """The one fact that is meant, which stands."""
    found = matching(facts, wanted)
    standing = set(history.retained)
    here = [index for index in found if index in standing]
    if len(here) == 1:
        return here[0]
    if len(here) > 1:
        raise SphereEditError(
            f"{_said(wanted)} could be {counted(len(here), 'fact')}: {_listed(facts, here)}. Say which, by number or by prompt"
        )
    if not found:
        raise SphereEditError(f"this run has no fact {_said(wanted)}; {_numbers(facts)}")
    raise SphereEditError(_why_not(history, facts, found[-1]))


def matching(facts: Sequence[Fact], wanted: FactName) -> list[int]:
    """All facts ever accepted that ``wanted`` may name.

    Raises:
        SphereEditError: a record's prompt is known, and its new answer is another one.
    """
    if isinstance(wanted, Fact):
        return _like(facts, wanted)
    if isinstance(wanted, int):
        return [wanted] if 0 <= wanted < len(facts) else []
    text = folded(wanted)
    named = [
        index for index, fact in enumerate(facts) if text and text in (folded(fact.subject), folded(fact.filled_prompt))
    ]
    number = int(text) if text.isdecimal() else -1
    return sorted({*named, number}) if 0 <= number < len(facts) else named


def _like(facts: Sequence[Fact], wanted: Fact) -> list[int]:
    """The facts with the subject, the prompt and the new answer of a record."""
    same = [index for index, fact in enumerate(facts) if fact.key == wanted.key]
    found = [index for index in same if facts[index].target_new.strip() == wanted.target_new.strip()]
    if same and not found:
        raise SphereEditError(
            f"record {wanted.record} says '{short(wanted.target_new.strip())}', and fact {same[-1]} of the run "
            f"'{short(facts[same[-1]].target_new.strip())}', after '{short(wanted.filled_prompt)}'; give the number: --fact {same[-1]}"
        )
    return found


def with_superseded(history: History, facts: Sequence[Fact], removed: Sequence[int]) -> list[int]:
    """These facts and the earlier ones that they superseded: without both, the unedited model's answer comes back."""
    keys = {facts[index].key for index in removed}
    return sorted({*removed, *(index for index in history.superseded if facts[index].key in keys)})


def _why_not(history: History, facts: Sequence[Fact], index: int) -> str:
    """Why a fact that was accepted does not stand."""
    name = f"fact {index} ({named(facts[index])})"
    if index in history.removed:
        number = next(batch.number for batch in history.batches if index in batch.removed)
        return f"{name} was removed already, in batch {number}"
    if index in history.superseded:
        later = [other for other in history.retained if facts[other].key == facts[index].key]
        return f"{name} was superseded by fact {later[-1]}; remove that one, which takes both back"
    if index in history.withdrawn:
        return f"{name} was taken back by a rollback or by the guard; it does not stand"
    return f"{name} has not been edited yet"


def named(fact: Fact) -> str:
    """A fact in few words: its prompt and its new answer."""
    return f"'{short(fact.filled_prompt)}' → '{short(fact.target_new.strip())}'"


def _said(wanted: FactName) -> str:
    if isinstance(wanted, Fact):
        return f"'{short(wanted.filled_prompt)}' (record {wanted.record})"
    return str(wanted) if isinstance(wanted, int) else f"'{short(wanted)}'"


def _listed(facts: Sequence[Fact], indices: Sequence[int]) -> str:
    shown = "; ".join(f"{index} {named(facts[index])}" for index in indices[:_SHOWN])
    return shown + (f"; and {len(indices) - _SHOWN} more" if len(indices) > _SHOWN else "")


def _numbers(facts: Sequence[Fact]) -> str:
    return f"its facts have the numbers 0 to {len(facts) - 1}; `sphere-edit history RUN` lists what happened to them"


# --- what is theirs -----------------------------------------------------------------------------------------------


def shares_of(run: RunFolder, removed: Sequence[int], columnwise: bool) -> dict[str, LowRankUpdate] | None:
    """What every batch that stands wrote for some facts, added up, by matrix; None where that cannot be told apart.

    It can where the method is ``columnwise``: ΔW is a sum over columns, some for each fact. What RECT, LyapLock, fine-tuning and UltraEdit
    write is not. SPHERE is linear in ΔW, so the share of what was written is what SPHERE left of the share.
    """
    if not columnwise:
        return None
    parts: dict[str, list[Update]] = {}
    for batch in run.history.standing:
        if set(removed).isdisjoint(batch.members):
            continue
        for name, update in run.read_update(batch.number)[0].items():
            share = _share(batch, set(removed), update)
            if share is None:
                return None
            parts.setdefault(name, []).append(share)
    shares = {name: joined(updates) for name, updates in parts.items()}
    return {name: share for name, share in shares.items() if isinstance(share, LowRankUpdate)}


def _share(batch: Batch, removed: set[int], update: Update) -> LowRankUpdate | None:
    """The columns of some facts; an update may hold all columns several times over (REVIVE)."""
    if not isinstance(update, LowRankUpdate):
        return None
    rank = update.left.shape[1]
    width = sum(batch.columns) if batch.columns else rank
    if rank % width or (not batch.columns and rank % len(batch.members)):
        return None
    own = batch.columns_of(removed, width)
    return update.share([first + column for first in range(0, rank, width) for column in own])
