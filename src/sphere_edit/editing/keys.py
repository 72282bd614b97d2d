"""Keys: the input of an edited matrix at each subject's last token, averaged over context templates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sphere_edit.facts.fact import Fact
from sphere_edit.facts.forms import contexts
from sphere_edit.facts.prompts import Encoder
from sphere_edit.models.forward import activations
from sphere_edit.models.loading import LoadedModel
from sphere_edit.models.norms import norm_after
from sphere_edit.models.sites import module_of
from sphere_edit.models.tokens import TokenBatch, over_batches
from sphere_edit.models.walk import LayerWalk


@dataclass(frozen=True)
class SubjectPrompts:
    """Every fact's prompt in every template, cut after the subject: ``rows[fact * templates + template]``."""

    rows: list[list[int]]
    facts: int
    templates: int

    @classmethod
    def of(cls, facts: Sequence[Fact], templates: Sequence[str], encoder: Encoder) -> SubjectPrompts:
        """Tokenise; the first template must be the clean one."""
        rows = [encoder.at_subject(fact, template)[0] for fact in facts for template in contexts(fact, templates)]
        return cls(rows, len(facts), len(templates))


class SubjectReader:
    """Keys and values at the subjects' last tokens, while the edited layers are written one after another.

    Keys (DESIGN, as in the code of MEMIT, arXiv:2210.07229) are the mean of the clean prompt's and of the other templates'
    average. Layers below the edited ones, and those already written, are not run again.

    Args:
        layers: of each matrix in ``names``, lowest first.
        contexts: a column a fact, averaged over the templates, or one a fact and template, fact by fact, the clean prompt first.
        inside, role: values stand at the output of the last layer's matrix ``role``; otherwise at that of the layer.
        averaged: values are averaged as keys are (R-ROME); otherwise they are what stands there in the clean prompt.
        own: values of a matrix stand at its own layer's output, not at the last one's.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        prompts: SubjectPrompts,
        names: Sequence[str],
        layers: Sequence[int],
        inside: bool,
        max_tokens: int,
        contexts: Literal["mean", "each"] = "mean",
        role: str | None = None,
        own: bool = False,
        averaged: bool = False,
    ):
        model, architecture = loaded.model, loaded.architecture
        self._names, self._layers, self._averaged, self._contexts = names, layers, averaged, contexts
        self._modules = [module_of(model, architecture, name) for name in names]
        self._norms = [None if inside else norm_after(loaded, name) for name in names]
        self._given: list[
            Tensor
        ] = []  # what the norm behind the last matrix read is given, in clean prompts and others
        self._site = architecture.value_site(model, layers[-1], inside, role)
        self._own = dict(architecture.running(model)) if own else {}
        self._per_fact = prompts.templates - 1
        clean = prompts.rows[:: prompts.templates]
        others = [row for index, row in enumerate(prompts.rows) if index % prompts.templates]
        self._clean = LayerWalk(loaded, clean, layers[0], layers[-1], max_tokens)
        self._others = LayerWalk(loaded, others, layers[0], layers[-1], max_tokens) if others else None

    def keys_and_values(self, index: int) -> tuple[Tensor, Tensor]:
        """``K [d_in, columns]`` of matrix number ``index``, those below it being written, and ``h [d, columns]``; float32."""
        layer, norm = self._layers[index], self._norms[index]
        inputs = [self._modules[index], *([] if norm is None else [norm.module])]
        last, site = (layer, self._own[layer]) if self._own else (self._layers[-1], self._site)
        self._clean.stand_at(layer)
        (keys, *self._given), values = self._clean.read(last, inputs, site)
        assert values is not None
        if self._others is None:
            return _columns(keys), _columns(values)
        self._others.stand_at(layer)
        if self._contexts == "each":
            (others, *given), other_values = self._others.read(last, inputs, site)
            self._given += given
            assert other_values is not None
            return _columns(interleaved(keys, others)), _columns(interleaved(values, other_values))
        (others, *given), other_values = self._others.read(layer, inputs, self._site if self._averaged else None)
        self._given += given
        if other_values is not None:
            values = _averaged(values, other_values)
        return _columns(_averaged(keys, others)), _columns(values)

    def residual(self, index: int, share: Tensor) -> Tensor:
        """``R [d_out, columns]`` of the matrix read last, number ``index``, for what is wanted of it in the residual stream.

        ``share [d, columns]`` itself, or, with a norm between the two, what to add before that (`norms.Norm.change`): in each context
        to what stands there, averaged or laid out as the keys are.
        """
        norm = self._norms[index]
        if norm is None:
            return share
        clean, *others = self._given
        wanted = [share.T, *(share.T.repeat_interleave(self._per_fact, 0) for _ in others)]
        if self._contexts == "each" and others:
            wanted = _apart(share.T, len(clean))
        changes = [norm.change(rows.T, columns.T).T for rows, columns in zip(self._given, wanted, strict=True)]
        return _columns((interleaved if self._contexts == "each" else _averaged)(*changes))

    def carried(self, deltas: Tensor) -> dict[int, Tensor]:
        """What each layer from the first edited one on holds, ``[d, columns]``, when ``deltas [d, n]`` is added to the first's output."""
        clean = self._clean.carried(deltas.T)
        if self._contexts == "each" and self._others is not None:
            each = deltas.T.repeat_interleave(self._per_fact, 0)
            clean = [interleaved(*pair) for pair in zip(clean, self._others.carried(each), strict=True)]
        return dict(zip(self._clean.layers, map(_columns, clean), strict=True))

    def clean_values(self) -> Tensor:
        """``h [d, n]`` (float32) of the clean prompts, with the weights as they stand."""
        self._clean.stand_at(self._layers[0])
        _, values = self._clean.read(self._layers[-1], output_of=self._site)
        assert values is not None
        return _columns(values)

    def all_keys(self) -> dict[str, Tensor]:
        """``K [d_in, columns]`` of every matrix, all being written, in one pass."""
        found = []
        for walk in (self._clean, self._others):
            if walk is not None:
                walk.stand_at(self._layers[0])
                found.append(walk.read(self._layers[-1], self._modules)[0])
        together = interleaved if self._contexts == "each" else _averaged
        keys = [together(*parts) for parts in zip(*found, strict=True)]
        return {name: _columns(vectors) for name, vectors in zip(self._names, keys, strict=True)}


def context_token_keys(
    loaded: LoadedModel, facts: Sequence[Fact], names: Sequence[str], encoder: Encoder, max_tokens: int
) -> list[Tensor]:
    """Of each matrix, lowest layer first, its inputs ``[d_in, m]`` (float32) at every token of the bare prompts but the subjects' last.

    They are the context tokens of `ingredients.ContextTokens`, which says why.
    """
    modules = [module_of(loaded.model, loaded.architecture, name) for name in names]
    rows = [encoder.asked_fact(fact).ids for fact in facts]
    subjects = [encoder.at_subject(fact)[1] for fact in facts]

    def read(chunk: list[tuple[list[int], int]]) -> Iterator[list[Tensor]]:
        inputs, _ = activations(loaded, TokenBatch.of([row for row, _ in chunk], loaded.device), modules)
        for number, (row, subject) in enumerate(chunk):
            yield [torch.cat([seen[number, :subject], seen[number, subject + 1 : len(row)]]).float() for seen in inputs]

    asked = list(zip(rows, subjects, strict=True))
    found = over_batches(asked, max_tokens, read, lambda pair: len(pair[0]))
    return [_columns(torch.cat(vectors)) for vectors in zip(*found, strict=True)]


def _averaged(clean: Tensor, others: Tensor | None = None) -> Tensor:
    """Mean of the clean prompt's vectors ``[n, d]`` and the average of the other templates' ``[n · templates, d]``."""
    return clean if others is None else (clean + others.view(len(clean), -1, clean.shape[1]).mean(1)) / 2


def interleaved(clean: Tensor, others: Tensor | None = None) -> Tensor:
    """The clean prompt's vectors ``[n, d]`` and the other templates' ``[n · templates, d]``, fact by fact, weighed.

    Least squares over these columns are a mean over each fact's contexts in which the clean prompt counts as much as all others
    together, as it does in `_averaged`: each vector stands here times the root of its share.
    """
    if others is None:
        return clean
    rest = others.view(len(clean), -1, clean.shape[1])
    shared = rest * (0.5 / rest.shape[1]) ** 0.5
    return torch.cat([clean[:, None] * 0.5**0.5, shared], dim=1).flatten(0, 1)


def _apart(rows: Tensor, count: int) -> list[Tensor]:
    """The clean prompt's vectors ``[count, d]`` and the other templates', of those that `interleaved` has made of them."""
    each = rows.view(count, -1, rows.shape[1])
    return [each[:, 0] / 0.5**0.5, (each[:, 1:] / (0.5 / (each.shape[1] - 1)) ** 0.5).flatten(0, 1)]


def _columns(vectors: Tensor) -> Tensor:
    """One column a fact, laid out as it is stored and read back, so that a replay computes the same bits."""
    return vectors.T.contiguous()
