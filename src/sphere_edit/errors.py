"""The one exception a user should ever meet."""

from __future__ import annotations


class SphereEditError(Exception):
    """A mistake in the input, the settings or the surroundings, told in a sentence that says what to do.

    The command line prints it without a traceback and exits with status 2.
    """
