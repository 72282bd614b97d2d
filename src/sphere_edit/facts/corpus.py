"""Passages of ordinary text from files and the hub, for statistics and perplexity."""

from __future__ import annotations

import json
from pathlib import Path

from sphere_edit.counting import counted
from sphere_edit.errors import SphereEditError
from sphere_edit.facts.hub import HubSource

_MAX_PASSAGES = 20_000


def read_passages(source: str) -> list[str]:
    """Passages of a ``.txt`` or ``.jsonl`` file or of a hub data set (``owner/name[/config][:split]``) with a ``text`` field.

    Raises:
        SphereEditError: it cannot be read, or holds fewer than two passages.
    """
    try:
        path = Path(source).expanduser()
        text = path.read_text(encoding="utf-8-sig") if path.is_file() else None
    except UnicodeDecodeError as error:
        raise SphereEditError(f"corpus {source} is not valid UTF-8 text (byte {error.start})") from None
    except (OSError, RuntimeError) as error:
        raise SphereEditError(f"corpus {source} cannot be read: {error}") from None
    if text is not None:
        if path.suffix == ".jsonl":
            passages = [
                _text_of(line, number, source) for number, line in enumerate(text.split("\n"), 1) if line.strip()
            ]
        elif path.suffix in (".txt", ".md"):
            passages = [" ".join(part.split()) for part in text.split("\n\n")]
        else:
            raise SphereEditError(f"corpus {source}: expected a .txt or .jsonl file, or a hub data set")
    elif path.suffix in (".txt", ".jsonl", ".md") or (hub := HubSource.parse(source)) is None:
        raise SphereEditError(f"there is no corpus file '{source}'")
    else:
        passages = _hub_passages(hub)
    passages = [passage for passage in passages if passage.strip()]
    if len(passages) < 2:
        raise SphereEditError(
            f"corpus {source} holds {counted(len(passages), 'passage')}; at least 2 are needed, hundreds are better"
        )
    return passages


def _text_of(line: str, number: int, source: str) -> str:
    try:
        text = json.loads(line)["text"]
        text.encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        text = None
    if not isinstance(text, str):
        raise SphereEditError(f"corpus {source}, line {number}: expected a JSON object with a 'text' field")
    return text


def _hub_passages(source: HubSource) -> list[str]:
    rows = source.rows(_MAX_PASSAGES)
    try:
        return [str(row["text"]) for row in rows]
    except KeyError:
        raise SphereEditError(f"corpus '{source.name}' has no field 'text' in its rows") from None
