"""A model's chat template, as what stands around a user's message: rendered once, within a time limit, then plain text.

A template is a program that comes with a model. It is asked for three short chats, in a process of its own that has few seconds and little
memory (`sphere_edit.facts.rendering`). What it puts before the message, behind it and around the answer is all that is used afterwards, so
that a chat is the same text on every day and in every process.
"""

from __future__ import annotations

import datetime
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from sphere_edit.errors import SphereEditError
from sphere_edit.facts.fact import short

_SECONDS = 5.0  # of a processor, in which a template must have rendered its chats
_BYTES = 256 << 20  # of memory that it may take
_START = 300.0  # seconds by the clock that its process may take to start, on a busy machine
_SCRIPT = Path(__file__).with_name("rendering.py")
_OVERDUE = int(getattr(signal, "SIGPROF", 0))  # what ends it then
_MESSAGE, _ANSWER = "A message, number 7.", "An answer, number 8."
_DAY = datetime.datetime(2024, 7, 26, 12)  # for templates that name the day: a run must be the same tomorrow
_NOW = "strftime_now"  # by which they ask for it
_PLAIN = "as plain text (--no-chat) facts can be edited all the same"


@dataclass(frozen=True)
class ChatFrame:
    """What a chat template puts around a user's message and the assistant's answer.

    Attributes:
        before: the system prompt, if there is one, and what begins the user's message.
        after: what ends the message, up to where the assistant begins to speak.
        lead: white space between that and the assistant's first word.
        end: what ends the answer.
        strips: whether white space at both ends of a message is taken away.
    """

    before: str
    after: str
    lead: str
    end: str
    strips: bool

    def around(self, message: str, place: int = 0) -> tuple[str, int]:
        """The chat with this message, up to where the assistant begins to speak, and where character ``place`` of the message is in it."""
        if self.strips:
            place -= len(message) - len(message.lstrip())
            message = message.strip()
        return self.before + message + self.after, len(self.before) + place


def has_chat_template(tokenizer: Any) -> bool:
    """Whether a tokenizer comes with one."""
    return getattr(tokenizer, "chat_template", None) is not None


def chat_frame(tokenizer: Any, system: str | None = None) -> ChatFrame:
    """What a tokenizer's chat template puts around a message, with this system prompt, or the one that it has by default.

    Models that think first are asked not to (``enable_thinking``), so that the answer comes at once.

    Raises:
        SphereEditError: there is no template, or one that fails, takes too long or too much memory, or does not give back the message
            or the system prompt.
    """
    if not has_chat_template(tokenizer):
        raise SphereEditError(f"this model has no chat template, so there is no chat to edit in; {_PLAIN}")
    with _told():
        template, values = tokenizer.get_chat_template(), json.dumps(tokenizer.special_tokens_map, default=str)
    asked, padded, told = _rendered(template, values, system)
    if asked.count(_MESSAGE) != 1 or padded.count(_MESSAGE) != 1:
        raise SphereEditError(
            f"the chat template of this model does not give back a user's message once and unchanged; {_PLAIN}"
        )
    before, _, after = asked.partition(_MESSAGE)
    if system is not None and system.strip() not in before:
        raise SphereEditError(
            f"the chat template of this model leaves out the system prompt '{short(system)}'; it can be edited without one"
        )
    lead, _, end = told.removeprefix(asked).partition(_ANSWER)
    return ChatFrame(before, after, "" if lead.strip() else lead, end, f"  {_MESSAGE}  " not in padded)


def _one_day() -> str:
    """A macro in a template's own language that says the day it always is."""
    parts = [f"replace('%{sign}', '{_DAY.strftime('%' + sign)}')" for sign in "aAbBdHIjmMpSyY"]
    return f"{{% macro {_NOW}(form) %}}{{{{ form | {' | '.join(parts)} }}}}{{% endmacro %}}"


@lru_cache(maxsize=64)
def _rendered(template: str, values: str, system: str | None) -> tuple[str, str, str]:
    """A short message, the same between spaces, and the same with an answer, as the template writes them."""
    first = [] if system is None else [{"role": "system", "content": system}]
    asked, padded = ([*first, {"role": "user", "content": text}] for text in (_MESSAGE, f"  {_MESSAGE}  "))
    told = [*asked, {"role": "assistant", "content": _ANSWER}]
    work = {
        "template": _one_day() + template if _NOW in template else template,
        "chats": [(asked, True), (padded, True), (told, False)],
        "values": {**json.loads(values), "enable_thinking": False},
        "seconds": _SECONDS,
        "bytes": _BYTES,
    }
    found = _in_own_process(json.dumps(work))
    if found.get("kind") == "MemoryError":
        raise SphereEditError(f"the chat template of this model takes more than {_BYTES >> 20} MB of memory; {_PLAIN}")
    if "texts" not in found:
        raise SphereEditError(
            f"the chat template of this model cannot be used ({found.get('kind')}: {found.get('words')}); {_PLAIN}"
        )
    first_text, second, third = found["texts"]
    return first_text, second, third


def _in_own_process(work: str) -> dict[str, Any]:
    """What `sphere_edit.facts.rendering` answers, in a process that cannot take more than it is given."""
    paths = (
        f"import sys; sys.path[:] = {sys.path!r}; import runpy; runpy.run_path({str(_SCRIPT)!r}, run_name='__main__')"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", paths],
            input=work.encode(),
            capture_output=True,
            timeout=_START + _SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise _endless() from None
    except OSError as error:
        raise SphereEditError(f"no process can be started to render a chat in ({error.strerror}); {_PLAIN}") from None
    if _OVERDUE and done.returncode == -_OVERDUE:
        raise _endless()
    try:
        return dict(json.loads(done.stdout))
    except ValueError:  # it was ended, or ended itself
        last = (done.stderr.decode("utf-8", "replace").strip().splitlines() or [f"status {done.returncode}"])[-1]
        return {"kind": "its process ended", "words": last[:200]}


def _endless() -> SphereEditError:
    return SphereEditError(f"the chat template of this model did not end within {_SECONDS:.0f} seconds; {_PLAIN}")


@contextmanager
def _told() -> Iterator[None]:
    """Whatever a tokenizer says of its template instead of giving it, in a sentence."""
    try:
        yield
    except Exception as error:
        words = " ".join(str(error).split())[:200]
        raise SphereEditError(f"the chat template of this model cannot be used ({words}); {_PLAIN}") from None
