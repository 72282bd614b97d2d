"""Renders a chat template in a process of its own, with little memory and little time. Run by `sphere_edit.facts.chat`, never imported.

Standard input holds ``{"template", "chats", "values", "seconds", "bytes"}`` as JSON. Each of the chats is ``[messages, ask]``, and ``ask``
says whether the assistant is to begin to speak. Standard output gets ``{"texts"}``, or ``{"kind", "words"}`` of what went wrong.
Where the system has no such limits (Windows; for memory also macOS), the process that waits for this one sets the time alone.
"""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

_LONGEST = 1_000_000  # characters of one rendered chat


def rendered(template: str, chats: list[list[Any]], values: dict[str, Any]) -> dict[str, Any]:
    """What the template makes of each chat, or why it makes nothing."""
    from transformers.utils.chat_template_utils import render_jinja_template

    render: Any = render_jinja_template
    texts = []
    try:
        for messages, ask in chats:
            (text,), _ = render([messages], chat_template=template, add_generation_prompt=ask, **values)
            if len(text) > _LONGEST:
                return {"kind": "TooLong", "words": f"it made {len(text):,} characters of a short message"}
            texts.append(text)
    except BaseException as error:  # a template may raise anything
        return {"kind": type(error).__name__, "words": " ".join(str(error)[:2000].split())[:200]}
    return {"texts": texts}


def limit(seconds: float, more: int) -> None:
    """From here on: so many seconds of a processor, after which the system ends this process, and so many bytes beside those it has.

    A template only computes. So a machine that is busy with other things does not make it take longer than it may.
    """
    with contextlib.suppress(ImportError, AttributeError, OSError, ValueError):
        import resource
        import signal

        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + more
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> None:
    """Read, render, write."""
    given = json.load(sys.stdin)
    import transformers.utils.chat_template_utils  # noqa: F401  # before anything is counted

    limit(given["seconds"], given["bytes"])
    json.dump(rendered(given["template"], given["chats"], given["values"]), sys.stdout)


if __name__ == "__main__":
    main()
