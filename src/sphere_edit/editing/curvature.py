"""K-FAC: the curvature of what a model says, by an edited matrix, as a product of two factors (arXiv:1503.05671; for editing CrispEdit, arXiv:2602.15823).

The Fisher information of the next-token distributions by a matrix W is approximated as ``C ⊗ G``: C the second moment of W's inputs, which is C0,
and ``G = E[g gᵀ]`` that of the gradients g by its outputs. In that metric a gradient ∇ becomes ``G⁻¹ ∇ C⁻¹``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sphere_edit.editing.targets import GRADIENT_SCALE
from sphere_edit.models.forward import Graph, deterministic
from sphere_edit.models.loading import LoadedModel
from sphere_edit.models.sites import module_of
from sphere_edit.models.tokens import TokenBatch

_DAMPING = 0.1  # of G's mean eigenvalue, added to all of them
_BLOCK = 64  # positions whose distributions exist at one time; changes memory, not results


def output_curvature(
    loaded: LoadedModel, names: Sequence[str], batches: Sequence[Sequence[Sequence[int]]], seed: int
) -> list[Tensor]:
    """G ``[d_out, d_out]`` of each matrix, float32, on the model as it stands: a mean over the tokens of some rows of token ids.

    g is the gradient of ``Σ −log p(y)`` over all positions of a row by the matrix's output at one of them. Each y is drawn from the model's own p,
    which is what makes it the Fisher information, and not the gradients of the text.
    """
    modules = [module_of(loaded.model, loaded.architecture, name) for name in names]
    generator, sums, tokens = torch.Generator().manual_seed(seed), [torch.zeros(0)] * len(names), 0
    with deterministic(loaded.device), loaded.quick():
        for rows in batches:
            batch = TokenBatch.of(rows, loaded.device)
            graph = Graph(loaded, batch, outputs_of=modules)
            real = batch.mask.bool()
            slope = torch.zeros_like(graph.hidden)
            slope[real] = _drawn_slope(loaded, graph.hidden[real].detach(), generator)
            gradients = torch.autograd.grad(graph.hidden, graph.shifts, slope)
            found = [gradient[real].float() / GRADIENT_SCALE for gradient in gradients]
            squares = [rows.T @ rows for rows in found]
            sums = squares if tokens == 0 else [one + other for one, other in zip(sums, squares, strict=True)]
            tokens += int(real.sum())
    return [total / max(1, tokens) for total in sums]


def _drawn_slope(loaded: LoadedModel, hidden: Tensor, generator: torch.Generator) -> Tensor:
    """The gradient of −log p(y) by the last layer's output ``[n, d_model]``, y drawn from p, scaled; by the logits it is ``p − e_y``."""
    slopes = []
    for block in hidden.split(_BLOCK):
        with torch.enable_grad():
            block = block.requires_grad_()
            logits = loaded.architecture.head(loaded.model, block)
        outer = logits.detach().float().softmax(-1)
        drawn = torch.multinomial(outer.cpu(), 1, generator=generator).to(outer.device)
        outer.scatter_add_(1, drawn, -torch.ones_like(drawn, dtype=outer.dtype))
        slopes.append(torch.autograd.grad(logits, block, (outer * GRADIENT_SCALE).to(logits.dtype))[0])
    return torch.cat(slopes)


def damped_inverse(curvature: Tensor) -> Tensor:
    """``(G + 0.1 tr(G)/d_out I)⁻¹ [d_out, d_out]``, computed in float64."""
    wide = curvature.double()
    wide.diagonal().add_(_DAMPING * float(wide.diagonal().mean()))
    return torch.cholesky_inverse(torch.linalg.cholesky(wide)).to(curvature.dtype)
