"""Keys: the input of an edited matrix at each subject's last token, averaged over context templates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sphere_edit.facts.fact import Fact
from sphere_edit.facts.prompts import Encoder, fill
from sphere_edit.models.forward import TokenBatch, activations, at, batches_by_length
from sphere_edit.models.loading import LoadedModel


@dataclass(frozen=True)
class SubjectPrompts:
    """Every fact's prompt in every template, cut after the subject: ``rows[fact * templates + template]``."""

    rows: list[list[int]]
    facts: int
    templates: int

    @classmethod
    def of(cls, facts: Sequence[Fact], templates: Sequence[str], encoder: Encoder) -> SubjectPrompts:
        """Tokenise; the first template must be the clean one."""
        rows = [encoder.subject_end(*fill(template, fact))[0] for fact in facts for template in templates]
        return cls(rows, len(facts), len(templates))


def subject_keys(
    loaded: LoadedModel, prompts: SubjectPrompts, names: Sequence[str], max_tokens: int
) -> dict[str, Tensor]:
    """``K [d_in, n]`` (float32) of each named matrix: the mean of the clean prompt's key and of the templates' average.

    Source: DESIGN (keys), as in the code of MEMIT (arXiv:2210.07229). One forward pass, up to the last named matrix.
    """
    modules = [loaded.model.get_submodule(name) for name in names]
    found: dict[str, list[Tensor]] = {name: [torch.empty(0)] * len(prompts.rows) for name in names}
    for chunk in batches_by_length([len(row) for row in prompts.rows], max_tokens):
        batch = TokenBatch.of([prompts.rows[index] for index in chunk], loaded.device)
        inputs, _ = activations(loaded, batch, inputs_of=modules)
        for name, hidden in zip(names, inputs, strict=True):
            for index, key in zip(chunk, at(hidden, batch.mask.sum(1) - 1).float(), strict=True):
                found[name][index] = key
    # laid out as they are stored and read back, so that a replay computes the same bits
    return {name: _averaged(torch.stack(keys), prompts).T.contiguous() for name, keys in found.items()}


def _averaged(keys: Tensor, prompts: SubjectPrompts) -> Tensor:
    keys = keys.view(prompts.facts, prompts.templates, -1)
    clean = keys[:, 0]
    return clean if prompts.templates == 1 else (clean + keys[:, 1:].mean(1)) / 2


def clean_values(loaded: LoadedModel, prompts: SubjectPrompts, layer: int, max_tokens: int) -> Tensor:
    """``h [d, n]`` (float32): what stands at the value site of ``layer`` at the subject's last token of the clean prompt."""
    rows = prompts.rows[:: prompts.templates]
    site = loaded.architecture.value_site(loaded.model, layer)
    values: list[Tensor] = [torch.empty(0)] * len(rows)
    for chunk in batches_by_length([len(row) for row in rows], max_tokens):
        batch = TokenBatch.of([rows[index] for index in chunk], loaded.device)
        _, hidden = activations(loaded, batch, output_of=site)
        assert hidden is not None
        for index, value in zip(chunk, at(hidden, batch.mask.sum(1) - 1).float(), strict=True):
            values[index] = value
    return torch.stack(values, dim=1)
