"""The two streams of the command line. What is printed there is shown as it is: no markup acts (`sphere_edit.text`)."""

from __future__ import annotations

import sys
from typing import NoReturn

from sphere_edit.progress import Quiet, Reporter, RichReporter
from sphere_edit.text import Screen, terminal

FAILED = 4  # the status of a command that was done, and whose verdict is bad: verify, and the limits of eval
out = Screen()
err = Screen(stderr=True)


def reporter() -> Reporter:
    """Progress and messages of long work, on the stream of errors; nothing where another process speaks for all."""
    return Quiet() if err.quiet else RichReporter(err)


def hush() -> None:
    """Say nothing from here on: another process speaks for all."""
    out.quiet = err.quiet = True


def say_bad(kind: str, message: str) -> None:
    """One line that begins with a red word: an error, a failure, the guard."""
    err.print(terminal(f"{kind}:", "bold red"), message, soft_wrap=True)


def fail(message: str) -> NoReturn:
    """End the command with a sentence and status 2."""
    say_bad("Error", message)
    sys.exit(2)
