"""The command that finds settings for a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sphere_edit.cli.options import Corpus, Device, MaxMemory, ModelDtype, TrustRemoteCode, WhichMap, given, places
from sphere_edit.cli.screen import out, reporter
from sphere_edit.errors import SphereEditError


def tune(
    model: Annotated[str, typer.Argument(help="Hub id, local folder, .gguf file or 'smollm2'.")],
    facts: Annotated[
        str,
        typer.Option(help="File or data set to calibrate on, with paraphrases and neighbours: some dozens of facts."),
    ] = "demo",
    method: Annotated[str | None, typer.Option(help="Method whose settings are sought. \\[default: frugal]")] = None,
    corpus: Corpus = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the settings to this YAML file too, for edit --config.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with settings to start from.")] = None,
    device: Device = None,
    device_map: WhichMap = None,
    max_memory: MaxMemory = None,
    dtype: ModelDtype = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Find layers, step and weights for a model; later runs take them by themselves, before any published ones."""
    import yaml

    from sphere_edit.editing.settings import make_settings, read_settings_file
    from sphere_edit.facts.readers import read_facts
    from sphere_edit.files import check_room, write_text
    from sphere_edit.models.loading import load_model
    from sphere_edit.reporting.results import trials_table
    from sphere_edit.tuning import check_tunable
    from sphere_edit.tuning import tune as find

    moments = corpus and {"corpus": corpus}
    options = given({"method": method, "dtype": dtype and dtype.value, "moments": moments})
    if output is not None:
        check_room(output.absolute().parent, 0)
    where = places(device, device_map, max_memory)
    start = make_settings(read_settings_file(config) if config else {}, where, options)
    check_tunable(start)
    calibration = read_facts(facts)
    loaded = load_model(model, start.device, start.dtype, trust_remote_code, reporter(), start.placement())
    trials = find(loaded, start, reporter(), calibration.facts)
    out.print(trials_table([trial.summary for trial in trials], start.method))
    if trials[0].score == 0:
        raise SphereEditError(
            "nothing was chosen, and nothing kept; calibrate on facts that this model can learn: --facts"
        )
    chosen = make_settings(start.model_dump(exclude_unset=True), {"method": start.method}, trials[0].settings)
    best = yaml.safe_dump(chosen.model_dump(mode="json", exclude_unset=True), sort_keys=False)
    out.print(
        f"Chosen, and taken by later runs of {start.method} on this model unless you say otherwise:", style="bold"
    )
    out.print(best.rstrip())
    if output is not None:
        write_text(output, best)
