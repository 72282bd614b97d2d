"""A model's chat template, as what stands around a user's message: rendered once, within a time limit, then plain text.

A template is a program that comes with a model. It is asked for three short chats. What it puts before the message, behind it and
around the answer is all that is used afterwards, so that a chat is the same text on every day and in every process.
"""

from __future__ import annotations

import ctypes
import datetime
from collections.abc import Callable
from dataclasses import dataclass
from threading import Thread
from typing import Any

from sphere_edit.errors import SphereEditError

_SECONDS = 5.0  # in which a template must have rendered its chats
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


def chat_frame(tokenizer: Any) -> ChatFrame:
    """What a tokenizer's chat template puts around a message, with the system prompt that it has by default.

    Models that think first are asked not to (``enable_thinking``), so that the answer comes at once.

    Raises:
        SphereEditError: there is no template, or one that fails, takes too long, or does not give back the message.
    """
    if not has_chat_template(tokenizer):
        raise SphereEditError(f"this model has no chat template, so there is no chat to edit in; {_PLAIN}")

    def rendered(message: str, answer: str | None = None) -> str:
        chat = [{"role": "user", "content": message}]
        if answer is not None:
            chat.append({"role": "assistant", "content": answer})
        template = tokenizer.get_chat_template()
        if _NOW in template:
            template = _one_day() + template
        options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": answer is None, "enable_thinking": False}
        return str(tokenizer.apply_chat_template(chat, chat_template=template, **options))

    asked, padded, told = _in_time(
        lambda: (rendered(_MESSAGE), rendered(f"  {_MESSAGE}  "), rendered(_MESSAGE, _ANSWER))
    )
    if asked.count(_MESSAGE) != 1 or padded.count(_MESSAGE) != 1:
        raise SphereEditError(
            f"the chat template of this model does not give back a user's message once and unchanged; {_PLAIN}"
        )
    before, _, after = asked.partition(_MESSAGE)
    lead, _, end = told.removeprefix(asked).partition(_ANSWER)
    return ChatFrame(before, after, "" if lead.strip() else lead, end, f"  {_MESSAGE}  " not in padded)


def _one_day() -> str:
    """A macro in a template's own language that says the day it always is."""
    parts = [f"replace('%{sign}', '{_DAY.strftime('%' + sign)}')" for sign in "aAbBdHIjmMpSyY"]
    return f"{{% macro {_NOW}(form) %}}{{{{ form | {' | '.join(parts)} }}}}{{% endmacro %}}"


def _in_time(render: Callable[[], tuple[str, str, str]]) -> tuple[str, str, str]:
    """What a template renders, unless it fails or takes too long."""
    found: list[tuple[str, str, str]] = []
    failures: list[BaseException] = []

    def work() -> None:
        try:
            found.append(render())
        except BaseException as error:  # a template may raise anything, and what ends this thread must not be printed
            failures.append(error)

    thread = Thread(target=work, daemon=True)
    thread.start()
    thread.join(_SECONDS)
    if thread.is_alive():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))
        raise SphereEditError(f"the chat template of this model did not end within {_SECONDS:.0f} seconds; {_PLAIN}")
    if failures:
        words = " ".join(str(failures[0]).split())[:200]
        raise SphereEditError(
            f"the chat template of this model cannot be used ({type(failures[0]).__name__}: {words}); {_PLAIN}"
        )
    return found[0]
