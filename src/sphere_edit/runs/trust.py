"""Which run folders were made here. A folder from elsewhere may name things outside it, which are used only if the user says so."""

from __future__ import annotations

from pathlib import Path

from sphere_edit.editing.settings import EvaluationSettings
from sphere_edit.errors import SphereEditError
from sphere_edit.files import cache_dir, write_text
from sphere_edit.runs.records import RunConfig


def remember(config: RunConfig) -> None:
    """Note that a run was begun here."""
    write_text(_note(config), "")


def is_own(config: RunConfig) -> bool:
    """Whether a run was begun here, and decided then what its config says now."""
    return _note(config).is_file()


def refuse_untrusted(settings: EvaluationSettings) -> None:
    """Refuse to use what a run from elsewhere names outside its folder.

    Raises:
        SphereEditError: it names tasks, whose definitions may run code, or a file of references.
    """
    named = {"tasks": ", ".join(settings.tasks), "a task folder": settings.task_dir, "references": settings.references}
    said = "; ".join(f"{what} ({value})" for what, value in named.items() if value)
    if said:
        raise SphereEditError(
            f"this run was begun elsewhere and names what lies outside its folder: {said}. Definitions of tasks can run code on this "
            "machine. If you trust it, say so: --trust-run (in Python: Editor.open(…, trust_run=True))"
        )


def _note(config: RunConfig) -> Path:
    return cache_dir() / "own-runs" / f"{config.created.replace(':', '')}-{config.digest[:32]}"
