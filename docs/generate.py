"""The pages of the site that are made from the code: the command line, the settings, the schemas of a run's files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from enum import Enum
from typing import Any

from pydantic import BaseModel, TypeAdapter
from typer.main import get_command

from sphere_edit.cli import app
from sphere_edit.editing.settings import Settings
from sphere_edit.runs.records import AnyRecord, RunConfig
from sphere_edit.runs.summary import MetricsContent

_MARKUP = re.compile(r"(?<!\\)\[/?(bold|dim|/)?\]")


def command_line() -> str:
    """Every command with its arguments and options, as ``--help`` has them."""
    group: Any = get_command(app)
    text = ["# Command line\n", "Made from the program itself; `sphere-edit COMMAND --help` says the same.\n"]
    text += ["## Options before the command\n", *_options(group)]
    for name, command in group.commands.items():
        text += [f"## sphere-edit {name}\n", _plain(command.help), ""]
        text += ["```", f"sphere-edit {name} {_usage(command)}".strip(), "```", "", *_options(command)]
    text.append(_STATUS)
    return "\n".join(text)


_STATUS = """## Exit status

| status | what it says |
|---|---|
| 0 | done |
| 2 | something was wrong with what was given: one sentence says what was expected, what came and what to do |
| 3 | the guard stopped the run; the batches before are kept |
| 4 | a limit was not kept (`eval --fail-under`), or `verify` found something that is not as recorded |
"""


def _usage(command: Any) -> str:
    arguments = [param for param in command.params if param.param_type_name == "argument"]
    return " ".join(["[OPTIONS]", *(_argument(param) for param in arguments)])


def _argument(param: Any) -> str:
    name = _name(param)
    return f"{name}{'…' if param.nargs == -1 else ''}" if param.required else f"[{name}]"


def _name(param: Any) -> str:
    return (param.metavar or param.name).upper().strip("[]").replace("|", " or ")


def _options(command: Any) -> Iterator[str]:
    rows = [row for param in command.params if (row := _row(param)) is not None]
    if rows:
        yield from ("| option | meaning |", "|---|---|", *rows, "")


def _row(param: Any) -> str | None:
    if param.name == "help" or getattr(param, "hidden", False):
        return None
    if param.param_type_name == "argument":
        name = f"`{_name(param)}`"
    else:
        name = ", ".join(f"`{option}`" for option in (*param.opts, *param.secondary_opts))
    meaning = _plain(getattr(param, "help", "") or "")
    kind = param.type_descriptor.annotation
    if isinstance(kind, type) and issubclass(kind, Enum):
        meaning += f" One of {', '.join(f'`{choice.value}`' for choice in kind)}."
    return f"| {name} | {_cell(meaning)} |"


def _plain(text: str) -> str:
    """Without rich's markup."""
    return _MARKUP.sub("", " ".join((text or "").split())).replace("\\[", "[")


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


def settings() -> str:
    """Every setting with its default and its meaning."""
    text = [_SETTINGS, *_fields(Settings, "")]
    return "\n".join(text)


_SETTINGS = """# Settings

Made from `sphere_edit.Settings`. A settings file is YAML with these names, nested as they are here. `--config FILE` reads it, and
the command line wins over it. In Python, give them by name: `Editor.from_pretrained(model, targets={"steps": 25})`.

Each method has `options` of its own, which `sphere-edit methods` lists. A run's `config.json` holds every value as it was used.
"""


def _fields(model: type[BaseModel], prefix: str) -> Iterator[str]:
    nested: list[tuple[str, type[BaseModel]]] = []
    yield from ("| setting | default | type | meaning |", "|---|---|---|---|")
    for name, field in model.model_fields.items():
        kind: Any = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            nested.append((prefix + name, kind))
            continue
        default = field.get_default(call_default_factory=True)
        shown = "required" if field.is_required() else f"`{json.dumps(default, default=str, ensure_ascii=False)}`"
        yield f"| `{prefix}{name}` | {shown} | {_type(kind)} | {_cell(field.description or '')} |"
    for name, kind in nested:
        about = " ".join((kind.__doc__ or "").split("\n\n")[0].split()).replace("``", "`")
        yield from ("", f"## {name}", "", about, "")
        yield from _fields(kind, f"{name}.")


def _type(kind: Any) -> str:
    name = kind.__name__ if isinstance(kind, type) and not hasattr(kind, "__args__") else str(kind)
    for module in ("typing.", "collections.abc.", "sphere_edit.facts.fact.", "sphere_edit.editing.settings."):
        name = name.replace(module, "")
    return f"`{name}`".replace("NoneType", "None").replace(" | ", " or ")


def schemas() -> dict[str, str]:
    """The JSON Schema of each file of a run that others read, by the file's name."""
    kinds = {"config": RunConfig, "journal": AnyRecord, "metrics": MetricsContent, "settings": Settings}
    return {
        f"{name}.schema.json": json.dumps(
            TypeAdapter(kind).json_schema(by_alias=True, mode="serialization" if name != "settings" else "validation"),
            indent=2,
            ensure_ascii=False,
        )
        for name, kind in kinds.items()
    }


def pages() -> dict[str, str]:
    """What the site holds beside the files in ``docs/``: path and content."""
    return {
        "reference/cli.md": command_line(),
        "reference/settings.md": settings(),
        **{f"reference/{name}": content for name, content in schemas().items()},
    }
