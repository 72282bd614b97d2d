"""Options and arguments that several commands share."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer


class Matrices(str, Enum):
    """Settings.matrices as the command line shows it."""

    down = "down"
    experts = "experts"


class Rewordings(str, Enum):
    """Settings.rewordings as the command line shows it."""

    given = "given"
    auto = "auto"


class Basis(str, Enum):
    """Which weights SPHERE takes its directions from."""

    current = "current"
    pretrained = "pretrained"


class Project(str, Enum):
    """When SPHERE is applied."""

    per_layer = "per_layer"
    after_all = "after_all"
    deployed = "deployed"


class Dtype(str, Enum):
    """Numbers the model computes with; edits are made on float32 masters in any case."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Target(str, Enum):
    """What a ZsRE record is edited to."""

    answer = "answer"
    alternative = "alternative"


class Service(str, Enum):
    """Loggers that a run can tell its numbers to."""

    trackio = "trackio"
    wandb = "wandb"
    tensorboard = "tensorboard"


Run = Annotated[Path, typer.Argument(help="A run folder.")]
ModelOrRun = Annotated[str, typer.Argument(metavar="MODEL_OR_RUN", help="A model as for edit, or a run folder.")]
Corpus = Annotated[
    str | None,
    typer.Option(help="Text for the second moments: .txt, .jsonl or a hub data set. \\[default: the model's own]"),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, … \\[default: what is there]")]
WhichMap = Annotated[
    str | None,
    typer.Option(
        "--device-map",
        help="Spread a model larger than the device: auto, balanced, sequential, or a JSON or YAML file with each module's place.",
    ),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(help="With a map that is found, bytes of weights at each place: '0=20GB,cpu=60GB,disk'."),
]
ModelDtype = Annotated[
    Dtype | None, typer.Option("--dtype", help="Numbers the model computes with. \\[default: its own]")
]
Limit = Annotated[int | None, typer.Option(help="Take only the first N facts.")]
ZsreTarget = Annotated[
    Target, typer.Option("--target", help="What a ZsRE record is edited to: the true answer or the false alternative.")
]
Chat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--no-chat",
        help="Prompts are messages in the model's own chat, where records say nothing. \\[default: plain]",
    ),
]
Forms = Annotated[str | None, typer.Option(help="Forms of every fact at once: 'plain,chat'; asked in the first.")]
System = Annotated[
    str | None, typer.Option(help="System prompt of chats, where records say nothing. \\[default: the model's]")
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out records that cannot be used.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write all numbers to this file.")]
TrustRun = Annotated[
    bool,
    typer.Option("--trust-run", help="Use tasks and texts that a run begun elsewhere names; tasks can run code."),
]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]


def places(device: str | None, device_map: str | None, max_memory: str | None) -> dict[str, Any]:
    """Where a model goes, by the names of the settings, of what was said on the command line."""
    from sphere_edit.models.placement import read_map, read_memory

    found = {"device_map": device_map and read_map(device_map), "max_memory": max_memory and read_memory(max_memory)}
    return {name: value for name, value in {"device": device, **found}.items() if value is not None}


def given(options: dict[str, Any]) -> dict[str, Any]:
    """What the user said; the rest is left to the settings' own defaults."""
    said = {name: given(value) if isinstance(value, dict) else value for name, value in options.items()}
    return {name: value for name, value in said.items() if value is not None and value != {}}
