"""The published sequential editing loop, written down as directly as it is described: the yardstick for `edit_speed.py`.

One fact at a time; at every step of its target a whole forward pass over every template and the whole vocabulary's logits at
every position; a whole forward pass for every reading of keys and values; a d_in × d_in system and a d_in × d_in eigenbasis
for every batch and layer. AlphaEdit + SPHERE as in arXiv:2410.02355 and arXiv:2510.01172. Nothing of the package's engine is used
but the model, the tokens' positions and the settings' names; `tests/test_reference.py` holds it against the authors' numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sphere_edit.editing.targets import TargetSettings
from sphere_edit.facts.fact import Fact
from sphere_edit.facts.prompts import KL_PROMPT, Encoder, fill
from sphere_edit.models.loading import LoadedModel


def target(
    loaded: LoadedModel, fact: Fact, templates: Sequence[str], layer: int, settings: TargetSettings
) -> tuple[Tensor, list[float]]:
    """v* [d] of one fact and its loss at every step, with ``torch.optim.Adam`` on δ."""
    encoder = Encoder(loaded.tokenizer)
    rows, lookups, answers = [], [], []
    for template in templates:
        text, end = fill(template, fact)
        tokens, start = encoder.with_target(text, fact.target_new, fact.separator)
        rows.append(tokens.ids[:-1])
        lookups.append(tokens.last_token_of(end))
        answers.append((start - 1, tokens.ids[start:]))
    kl_row, kl_lookup = encoder.subject_end(*fill("{}", fact, KL_PROMPT))
    ids, mask = padded([*rows, kl_row])
    lookups.append(kl_lookup)

    delta: Tensor | None = None
    clean: Tensor | None = None
    kl_clean: Tensor | None = None
    losses: list[float] = []
    optimiser: torch.optim.Adam | None = None
    block = loaded.architecture.decoder_layers(loaded.model)[layer]

    def add_delta(module: Any, args: Any, output: Any) -> Any:
        nonlocal delta, clean, optimiser
        hidden = output[0] if isinstance(output, tuple) else output
        if delta is None:
            clean = hidden[0, lookups[0]].detach().clone()
            delta = torch.zeros_like(clean, requires_grad=True)
            optimiser = torch.optim.Adam([delta], lr=settings.lr)
        hidden = hidden.clone()
        for row, position in enumerate(lookups):
            hidden[row, position] = hidden[row, position] + delta
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    for step in range(settings.steps):
        hook = block.register_forward_hook(add_delta)
        logits = loaded.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        hook.remove()
        assert delta is not None
        assert clean is not None
        assert optimiser is not None
        log_probs = logits.log_softmax(-1)
        kl_now = log_probs[-1, lookups[-1]]
        if kl_clean is None:
            kl_clean = kl_now.detach()
        nll = torch.stack(
            [
                -log_probs[row, first : first + len(tokens)].gather(1, torch.tensor(tokens)[:, None]).mean()
                for row, (first, tokens) in enumerate(answers)
            ]
        ).mean()
        divergence = (kl_now.exp() * (kl_now - kl_clean)).sum()
        loss = nll + settings.kl_factor * divergence + settings.weight_decay * delta.norm() / clean.norm() ** 2
        losses.append(float(loss.detach()))
        if losses[-1] < settings.stop_loss or step == settings.steps - 1:
            break
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        largest = settings.clamp_norm_factor * clean.norm()
        if delta.norm() > largest:
            with torch.no_grad():
                delta *= largest / delta.norm()
    assert delta is not None
    assert clean is not None
    return (clean + delta).detach(), losses


@torch.no_grad()
def at_subjects(loaded: LoadedModel, facts: Sequence[Fact], template: str, module: Any, inputs: bool) -> Tensor:
    """A module's input or output at each fact's subject's last token, ``[facts, d]``, from a whole forward pass."""
    encoder = Encoder(loaded.tokenizer)
    coded = [encoder.encode(fill(template, fact)[0]) for fact in facts]
    lookups = [tokens.last_token_of(fill(template, fact)[1]) for tokens, fact in zip(coded, facts, strict=True)]
    ids, mask = padded([tokens.ids for tokens in coded])
    seen: list[Tensor] = []

    def record(module: Any, args: Any, output: Any) -> None:
        seen.append(args[0] if inputs else output[0] if isinstance(output, tuple) else output)

    hook = module.register_forward_hook(record)
    loaded.model(input_ids=ids, attention_mask=mask, use_cache=False)
    hook.remove()
    return torch.stack([seen[0][row, position] for row, position in enumerate(lookups)])


def keys(loaded: LoadedModel, facts: Sequence[Fact], templates: Sequence[str], name: str) -> Tensor:
    """``K [d_in, n]``: the mean of the clean prompt's key and the mean over the other templates'."""
    module = loaded.model.get_submodule(name)
    found = [at_subjects(loaded, facts, template, module, inputs=True) for template in templates]
    return ((found[0] + torch.stack(found[1:]).mean(0)) / 2).T


def project(delta: Tensor, weight: Tensor, eta: float, alpha: float) -> Tensor:
    """SPHERE with the d_in × d_in eigenproblem and the d_in × d_in projector."""
    rows = weight / (weight.norm(dim=1, keepdim=True) + 1e-8)
    values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
    ratio = values.flip(0).cumsum(0) / values.sum()
    principal = vectors[:, -(int((ratio <= eta).sum()) + 1) :]
    projector = torch.eye(weight.shape[1]) - alpha * principal @ principal.T
    return delta @ projector.T


def edit_batch(
    loaded: LoadedModel,
    facts: Sequence[Fact],
    templates: Sequence[str],
    layers: Sequence[int],
    names: Sequence[str],
    projectors: Sequence[Tensor],
    previous: list[Tensor],
    settings: TargetSettings,
    l2: float,
    eta: float,
    alpha: float,
    done: Any = lambda: None,
) -> list[list[float]]:
    """Edit a batch in place: weights ``names`` of the model, and ``previous``, each layer's ``Kp Kpᵀ [d_in, d_in]``.

    ``projectors`` are each layer's null-space projector ``P [d_in, d_in]``. Returns every fact's losses.
    """
    found, losses = [], []
    for fact in facts:
        value, curve = target(loaded, fact, templates, layers[-1], settings)
        found.append(value)
        losses.append(curve)
        done()
    targets = torch.stack(found, dim=1)
    last = loaded.architecture.decoder_layers(loaded.model)[layers[-1]]
    for index, name in enumerate(names):
        k = keys(loaded, facts, templates, name)
        h = at_subjects(loaded, facts, templates[0], last, inputs=False).T
        residual = (targets - h) / (len(names) - index)
        p, identity = projectors[index], torch.eye(len(k))
        system = p @ (k @ k.T + previous[index]) + l2 * identity
        delta = torch.linalg.solve(system, p @ k @ residual.T).T
        weight = loaded.model.get_submodule(name).weight
        with torch.no_grad():
            weight += project(delta, weight, eta, alpha)
    for index, name in enumerate(names):
        k = keys(loaded, facts, templates, name)
        previous[index] += k @ k.T
    return losses


def padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Right-padded ids and their mask."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask
