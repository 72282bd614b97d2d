"""What is looked at once, when a model is loaded: what it is made of, and whether it computes so."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sphere_edit.errors import SphereEditError
from sphere_edit.models.architecture import Architecture, described, row_of
from sphere_edit.models.finding import found_layout
from sphere_edit.models.hooks import first_output
from sphere_edit.models.loaded import LoadedModel
from sphere_edit.models.offload import home
from sphere_edit.models.one_layer import NotFound
from sphere_edit.models.replay import UpperLayers, WholeRows, fits

_TOKENS, _MOST = 8, 12
# the head is given the same numbers, so that only the order of sums can differ; Granite's scaled logits differ by much more
_TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}


def architecture_of(model: Any, ids: Sequence[int], source: str) -> Architecture:
    """The layout of ``model``: by the row of its ``config.model_type``, or, without one or where that does not fit, found by running it.

    Args:
        ids: token ids of a sentence.
        source: what the user called the model.

    Raises:
        SphereEditError: no layout was found; it says what is missing and what the model is made of.
    """
    row = row_of(model.config.model_type)
    with suppress(AttributeError):  # a model of the family that is laid out otherwise
        if row is not None:
            return row.architecture(model)
    try:
        return found_layout(model, _some(ids))
    except NotFound as error:
        raise SphereEditError(
            f"'{source}' (model type '{model.config.model_type}') cannot be edited: {error}. {described(model)}"
        ) from None


def with_replay(loaded: LoadedModel, ids: Sequence[int]) -> LoadedModel:
    """The same, with what was found out of how its upper layers can be run again (`replay`): from a token on, or whole rows.

    Raises:
        SphereEditError: in neither way.
    """
    architecture = loaded.architecture
    layer = architecture.having(architecture.writer)[0]
    rows = [_some(ids), _some(ids)[:-3]]
    if fits(UpperLayers, loaded, rows, layer):
        return loaded
    whole = replace(loaded, architecture=replace(architecture, whole_rows=True))
    if fits(WholeRows, whole, rows, layer):
        return whole
    raise SphereEditError(
        f"'{loaded.source}' (model type '{loaded.model.config.model_type}') cannot be edited: its upper layers, run again with the "
        "arguments they were called with, give another result than its own forward pass"
    )


def _some(ids: Sequence[int]) -> list[int]:
    """A dozen tokens or fewer, eight at least."""
    return (list(ids or [0]) * _TOKENS)[: max(_TOKENS, min(len(ids), _MOST))]


@torch.no_grad()
def check_head(model: Any, architecture: Architecture, ids: Sequence[int], source: str) -> None:
    """Compare `Architecture.head` with the model's own logits over a few tokens.

    Logits that are infinite or undefined on both sides count as equal: a dtype that overflows is told by what fails in it.

    Args:
        ids: token ids, of which the first eight are run.
        source: what the user called the model.

    Raises:
        SphereEditError: they differ, as where a family scales its logits (Granite, Cohere, MiniCPM); or no pass can be run.
    """
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.append(first_output(output))

    hook = architecture.last_layer(model).register_forward_hook(keep)
    device = home(model.get_input_embeddings())
    try:
        row = torch.tensor([list(ids[:_TOKENS]) or [0]], device=device)
        theirs = model(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False).logits
        ours = architecture.head(model, seen[0])
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
        reason = " ".join(str(error).split())[:300]
        raise SphereEditError(
            f"model '{source}' cannot be run on {device} in {next(model.parameters()).dtype}: {reason}"
        ) from None
    finally:
        hook.remove()
    difference = _difference(ours, theirs)
    tolerance = _TOLERANCES.get(theirs.dtype, 1e-4)
    if not difference <= tolerance:
        raise SphereEditError(
            f"the logits of '{source}' are not what its final norm and output embedding make of its last layer (relative "
            f"difference {difference:.1e}, allowed {tolerance:.0e}): this '{model.config.model_type}' model changes "
            "them in a way that sphere-edit does not know, so neither targets nor measurements would be of this model"
        )


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """Relative to ``theirs``, in the Frobenius norm; infinite where only one of the two is finite, or the shapes differ."""
    if ours.shape != theirs.shape or not torch.equal(ours.isfinite(), theirs.isfinite()):
        return float("inf")
    first, second = (torch.where(logits.isfinite(), logits, 0).double() for logits in (ours, theirs))
    return float((first - second).norm() / second.norm().clamp_min(1e-30))
