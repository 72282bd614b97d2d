"""The options of ``edit``, one by one, and what they set."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from sphere_edit.cli.options import Basis, Matrices, Project, Rewordings, Service, places

Model = Annotated[str, typer.Argument(help="Hub id, local folder, .gguf file, 'smollm2', or a RUN to continue.")]
Facts = Annotated[
    str | None,
    typer.Argument(
        help="JSON, JSONL or CSV file, 'demo', counterfact, multi_counterfact, zsre, or a hub data set (owner/name\\[/config]\\[:split])."
    ),
]
Output = Annotated[Path | None, typer.Option("-o", "--output", help="Run folder to create.")]
Method = Annotated[str | None, typer.Option(help="Editing method; sphere-edit methods lists them. \\[default: frugal]")]
UseSphere = Annotated[bool | None, typer.Option("--sphere/--no-sphere", help="SPHERE projection. \\[default: on]")]
Eta = Annotated[float | None, typer.Option(help="Share of the spectrum that is principal. \\[default: 0.5]")]
Alpha = Annotated[
    float | None, typer.Option(help="How much of the update along it is taken away. \\[default: the method's]")
]
WhichBasis = Annotated[Basis | None, typer.Option(help="Weights the directions come from. \\[default: the method's]")]
WhenProjected = Annotated[Project | None, typer.Option(help="When to project. \\[default: the method's]")]
BatchSize = Annotated[int | None, typer.Option(help="Facts in one batch. \\[default: 100]")]
WhichRewordings = Annotated[
    Rewordings | None,
    typer.Option(help="auto: facts also lend one another wordings, and a chat model writes some. \\[default: given]"),
]
Layers = Annotated[
    str | None, typer.Option(help="Edited layers: '4-8', '4,6' or 'gate:11-15,up:18'. \\[default: the method's]")
]
WhichMatrices = Annotated[
    Matrices | None,
    typer.Option(help="Of a mixture of experts: each layer's shared expert or dense MLP, or its routed experts."),
]
Seed = Annotated[int | None, typer.Option(help="Seed of sampled templates and text. \\[default: 0]")]
Skip = Annotated[int, typer.Option(help="Leave out the first N facts.")]
Shuffle = Annotated[int | None, typer.Option(help="Put the facts in a random order first, with this seed.")]
EvalEvery = Annotated[int | None, typer.Option(help="Evaluate after every N batches too.")]
EvalSample = Annotated[
    int | None, typer.Option(help="There, ask for N past facts at most, a fixed random sample. \\[default: all]")
]
Guard = Annotated[
    bool | None,
    typer.Option("--guard/--no-guard", help="Stop before a batch that would harm the model. \\[default: off]"),
]
Config = Annotated[Path | None, typer.Option(help="YAML file with any setting of the API; the command line wins.")]
SkipKnown = Annotated[
    bool, typer.Option("--skip-known", help="Leave out facts whose new answer the unedited model gives already.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with a run that was interrupted.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, show settings and costs, edit nothing.")]
LogTo = Annotated[
    Service | None,
    typer.Option("--log", help="Tell a logger of batches and metrics, by its own package; the run keeps them anyway."),
]

_SETS = {
    "sphere": ("sphere", "enabled"),
    "eta": ("sphere", "eta"),
    "alpha": ("sphere", "alpha"),
    "basis": ("sphere", "basis"),
    "project": ("sphere", "project"),
    "corpus": ("moments", "corpus"),
    "eval_every": ("evaluation", "every"),
    "eval_sample": ("evaluation", "sample"),
    **{
        name: (name,)
        for name in (
            "method", "batch_size", "chat", "forms", "system", "rewordings", "layers", "matrices", "dtype",
            "seed", "guard",
        )
    },
}  # fmt: skip


def settings_of(said: Mapping[str, Any]) -> dict[str, Any]:
    """What was said on the command line, by the options' names, as settings; the rest is left to their own defaults."""
    from sphere_edit.editing.settings import read_layers

    settings: dict[str, Any] = places(said["device"], said["device_map"], said["max_memory"])
    for option, (*groups, name) in _SETS.items():
        value = said[option]
        if value is None:
            continue
        if option == "layers":
            value = read_layers(value)
        elif option == "forms":
            value = [form.strip() for form in value.split(",")]
        place = settings
        for group in groups:
            place = place.setdefault(group, {})
        place[name] = value.value if isinstance(value, Enum) else value
    return settings
