"""What was done to a model's weights: any two compatible checkpoints, or a run, compared matrix by matrix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from sphere_edit.editing.diagnosing import MatrixReport, compared
from sphere_edit.errors import SphereEditError
from sphere_edit.models.checkpoint import Checkpoint
from sphere_edit.models.loading import full_name
from sphere_edit.progress import Reporter
from sphere_edit.runs.folder import RunFolder
from sphere_edit.runs.weights import RunWeights


def diagnose(
    model: str,
    against: str | None,
    layers: Sequence[int] | None,
    roles: Sequence[str] | None,
    power: int,
    eta: float,
    reporter: Reporter,
) -> Iterator[MatrixReport]:
    """Report each matrix of ``model``, and what became of it in ``against``, one at a time.

    Args:
        model: a model; or a run, whose original model is then compared with what the run made of it.
        against: a model or a run to compare with.
        layers: all by default, or those that the run edited.
        roles: matrices in each layer, by role or by their name; what writes the MLP's output by default, or what the run edited.
        power: s of HE_s.
        eta: share of the neurons' spectrum that counts as principal.

    Raises:
        SphereEditError: a model, run, layer or matrix that is not there, or two models that do not compare.
    """
    if RunFolder.exists(model):
        if against is not None:
            raise SphereEditError(f"{model} is a run, which is compared with its own original; leave out --against")
        model, against = RunFolder.open(model).config.model.source, model
    run = RunFolder.open(against) if against is not None and RunFolder.exists(against) else None
    before = Checkpoint(model, None if run is None else run.config.architecture)
    after: Checkpoint | RunWeights | None = None
    if run is not None:
        after, base = RunWeights(run, before.weight), run.config.model.source
        if full_name(model) != base:
            raise SphereEditError(f"{against} edits '{base}', not '{model}'")
    elif against is not None:
        after = Checkpoint(against)
    if isinstance(after, RunWeights) and layers is None and roles is None:
        names = after.names
    else:
        names = before.names(layers, roles)
    with reporter.bar("matrices", len(names), "matrix") as advance:
        for name in names:
            yield _report(name, before, after, power, eta)
            advance(1)


def _report(
    name: str, before: Checkpoint, after: Checkpoint | RunWeights | None, power: int, eta: float
) -> MatrixReport:
    now: Tensor | None = None
    moment: Tensor | None = None
    if isinstance(after, RunWeights):
        weight, now, moment = after.original(name), after.deployed(name), after.second_moment(name)
    else:
        weight = before.weight(name)
        now = None if after is None else after.weight(name)
    if now is not None and now.shape != weight.shape:
        raise SphereEditError(
            f"{name} is {tuple(weight.shape)} in '{before.source}' and {tuple(now.shape)} in the other; "
            "only models of one shape compare"
        )
    return compared(name, weight, now, moment, power, eta)
