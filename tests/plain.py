"""The plain formulas that fast paths are held against: whole forward passes, one batch a template, nothing kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sphere_edit.editing.keys import SubjectPrompts
from sphere_edit.models.forward import activations, at
from sphere_edit.models.loading import LoadedModel
from sphere_edit.models.tokens import TokenBatch, batches_by_length


def subject_keys(
    loaded: LoadedModel, prompts: SubjectPrompts, names: Sequence[str], max_tokens: int
) -> dict[str, Tensor]:
    """``K [d_in, n]`` (float32) of each named matrix: the mean of the clean prompt's key and of the templates' average.

    Source: DESIGN (keys), as in the code of MEMIT (arXiv:2210.07229). One forward pass, up to the last named matrix.
    """
    modules = [loaded.model.get_submodule(name) for name in names]
    found, _ = _at_last_tokens(loaded, prompts.rows, max_tokens, inputs_of=modules)
    return {name: _columns(_averaged(keys, prompts)) for name, keys in zip(names, found, strict=True)}


def clean_values(
    loaded: LoadedModel, prompts: SubjectPrompts, layer: int, max_tokens: int, inside: bool = False
) -> Tensor:
    """``h [d, n]`` (float32): what stands at the value site of ``layer`` at the subject's last token of the clean prompt."""
    site = loaded.architecture.value_site(loaded.model, layer, inside)
    _, values = _at_last_tokens(loaded, prompts.rows[:: prompts.templates], max_tokens, output_of=site)
    return _columns(values)


def averaged_values(loaded: LoadedModel, prompts: SubjectPrompts, name: str, max_tokens: int) -> Tensor:
    """``[d_out, n]`` (float32): the output of the matrix ``name``, averaged over the templates just as its keys are.

    The output being linear in the key, this is W times the averaged key (and the bias, where there is one).
    """
    site = loaded.model.get_submodule(name)
    _, values = _at_last_tokens(loaded, prompts.rows, max_tokens, output_of=site)
    return _columns(_averaged(values, prompts))


def _at_last_tokens(
    loaded: LoadedModel,
    rows: Sequence[list[int]],
    max_tokens: int,
    inputs_of: Sequence[nn.Module] = (),
    output_of: nn.Module | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Inputs of some modules and the output of one at each row's last token, ``[rows, d]`` each, float32."""
    found: list[list[Tensor]] = [[torch.empty(0)] * len(rows) for _ in (*inputs_of, output_of)]
    for chunk in batches_by_length([len(row) for row in rows], max_tokens):
        batch = TokenBatch.of([rows[index] for index in chunk], loaded.device)
        inputs, output = activations(loaded, batch, inputs_of, output_of)
        for kept, hidden in zip(found, (*inputs, output), strict=True):
            if hidden is not None:
                for index, vector in zip(chunk, at(hidden, batch.mask.sum(1) - 1).float(), strict=True):
                    kept[index] = vector
    *stacked, last = [torch.stack(vectors) for vectors in found]
    return stacked, last


def _averaged(vectors: Tensor, prompts: SubjectPrompts) -> Tensor:
    vectors = vectors.view(prompts.facts, prompts.templates, -1)
    clean = vectors[:, 0]
    return clean if prompts.templates == 1 else (clean + vectors[:, 1:].mean(1)) / 2


def _columns(vectors: Tensor) -> Tensor:
    return vectors.T.contiguous()
