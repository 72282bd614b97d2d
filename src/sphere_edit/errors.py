"""The one exception a user should ever meet."""

from __future__ import annotations

from collections.abc import Sequence


class SphereEditError(Exception):
    """A mistake in the input, the settings or the surroundings, told in a sentence that says what to do.

    The command line prints it without a traceback and exits with status 2.
    """


def refused_records(problem: str, records: Sequence[str], shown: int = 20) -> SphereEditError:
    """The error for records that cannot be used: what is wrong with the first of them, and how many more there are."""
    more = [f"… and {len(records) - shown} more"] if len(records) > shown else []
    return SphereEditError("\n  ".join([f"{problem}:", *records[:shown], *more]))
