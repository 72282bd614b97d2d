"""What is looked at once, when a model is loaded: whether it computes as its family's row says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sphere_edit.errors import SphereEditError
from sphere_edit.models.architecture import Architecture, described, row_of
from sphere_edit.models.hooks import first_output

_TOKENS = 8
# the head is given the same numbers, so that only the order of sums can differ; Granite's scaled logits differ by much more
_TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}


def architecture_of(model: Any) -> Architecture:
    """The layout of ``model``, by the row of its ``config.model_type``.

    Raises:
        SphereEditError: for an unknown family; and for a known one whose modules are not where the row says.
    """
    model_type = model.config.model_type
    row = row_of(model_type)
    if row is None:
        raise SphereEditError(f"model family '{model_type}' is not supported yet.\n{described(model)}")
    try:
        return row.architecture(model)
    except AttributeError as error:
        raise SphereEditError(
            f"this '{model_type}' model is not laid out as its family usually is: {error}.\n{described(model)}"
        ) from None


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

    hook = architecture.decoder_layers(model)[-1].register_forward_hook(keep)
    device = model.get_input_embeddings().weight.device
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
            f"difference {difference:.1e}, allowed {tolerance:.0e}): this '{model.config.model_type}' model scales or changes "
            "them in a way that sphere-edit does not know, so neither targets nor measurements would be of this model"
        )


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """Relative to ``theirs``, in the Frobenius norm; infinite where only one of the two is finite, or the shapes differ."""
    if ours.shape != theirs.shape or not torch.equal(ours.isfinite(), theirs.isfinite()):
        return float("inf")
    first, second = (torch.where(logits.isfinite(), logits, 0).double() for logits in (ours, theirs))
    return float((first - second).norm() / second.norm().clamp_min(1e-30))
