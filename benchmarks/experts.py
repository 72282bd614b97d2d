"""What editing a mixture's experts comes to: routed and shared ones beside a dense twin, and what C0 by blocks and its shrinking cost.

python benchmarks/experts.py --models runs/mixtures            # trains them first, some minutes each
python benchmarks/experts.py --models runs/mixtures --moments  # the second question alone

The models are tiny and trained on the invented world of benchmarks/families.py. The second question is asked of one layer of a
trained mixture: with C0 in each form, λ is set so that the facts' keys miss a tenth of their residual, and what then happens to the
outputs at the joint keys of text that no C0 has seen is compared (the collateral ratio, with all cross terms).
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from families import MIXTURES, prepared
from sphere_edit.editing.methods.memit import Memit
from sphere_edit.editing.moments import load_corpus
from sphere_edit.editing.problem import LayerProblem, Statistics
from sphere_edit.editing.settings import make_settings
from sphere_edit.editing.sources import FromTargets, OptimisedTargets
from sphere_edit.editing.targets import TargetSettings
from sphere_edit.editor import Editor
from sphere_edit.evaluation.catalogue import (
    DIVERGENCE,
    EFFICACY,
    GENERALIZATION,
    PERPLEXITY,
    SPECIFICITY,
    STRICT,
    of_part,
)
from sphere_edit.models.experts import JointKeys
from sphere_edit.models.forward import activations
from sphere_edit.models.loading import LoadedModel, load_model
from sphere_edit.models.sites import module_of
from sphere_edit.models.tokens import TokenBatch, batches_of
from sphere_edit.models.weights import EditedWeights
from sphere_edit.numerics.experts import wide
from sphere_edit.progress import Quiet

SPANS = (slice(1), slice(3), slice(1, 4))  # of the layers that have all matrices that are compared
LAYER = 3  # of the second question
MISS = 0.1  # of the residual, in it
TEXTS = (500, 2_000, 8_000, 60_000)  # tokens that C0 is measured on
GIVEN = (1, 4, 16, 128)
FRESH = 12_000  # tokens that it is judged on


def runs_of(family: str, folder: Path, steps: int) -> Iterator[tuple[str, str, dict[str, Any], dict[str, Any]]]:
    """What was edited of a family and how, the unedited scores, and the edited ones."""
    model, corpus, _, facts = prepared(family, folder, steps)
    given = make_settings({"batch_size": 7, "moments": {"corpus": str(corpus)}, "evaluation": {"generation": "off"}})
    architecture = load_model(model).architecture
    roles = [role for role in ("down", "experts") if role in architecture.roles]
    for role in roles:
        common = [layer for layer in architecture.having(role) if all(layer in architecture.having(r) for r in roles)]
        dense = [[layer] for layer in architecture.having(role)[:1] if layer not in common]
        for method, layers in (
            *(("frugal", layers) for layers in [*dense, *(common[span] for span in SPANS)]),
            ("memit_seq", common[SPANS[1]]),
        ):
            options = {"method": method, "layers": {role: layers}}
            with tempfile.TemporaryDirectory() as run:
                editor = Editor.from_pretrained(
                    model, run, make_settings(given.model_dump(exclude_unset=True), options), Quiet()
                )
                metrics = editor.edit(facts)
                editor.close()
            yield role, f"{method}, layers {', '.join(map(str, layers))}", metrics["unedited"], metrics["edited"]


def show_runs(folder: Path, steps: int, families: Sequence[str]) -> None:
    """One row a family, kind of matrix and method."""
    shown = [of_part(part, STRICT) for part in (EFFICACY, GENERALIZATION, SPECIFICITY)]
    heads = " | ".join([*(metric.words for metric in shown), PERPLEXITY.words, DIVERGENCE.column])
    print(
        f"\n| family | edited | method | {heads} | routes changed: text | facts |\n|---|---|---|{'---|' * (len(shown) + 4)}"
    )
    for family in families:
        told = False
        for role, method, before, after in runs_of(family, folder, steps):
            for label, scores in (("nothing", before), (role, after)) if not told else ((role, after),):
                cells = " | ".join(f"{scores[metric.name]:.1f}" for metric in shown)
                ratio = scores[PERPLEXITY.name] / before[PERPLEXITY.name]
                kl = f"{scores.get(DIVERGENCE.name, 0.0):.3f}"
                routes = scores.get("routes", {})
                changed = " | ".join(f"{routes[of]:.1f} %" if of in routes else "–" for of in ("text", "facts"))
                how = "" if label == "nothing" else method
                print(f"| {family} | {label} | {how} | {cells} | × {ratio:.3f} | {kl} | {changed} |", flush=True)
            told = True


def joint_keys(loaded: LoadedModel, name: str, passages: Sequence[Sequence[int]], tokens: int) -> Tensor:
    """Joint keys ``[tokens, E · d_in]`` at all tokens of some passages, float64."""
    module = module_of(loaded.model, loaded.architecture, name)
    found: list[Tensor] = []
    for rows in batches_of([list(row) for row in passages], 2048):
        batch = TokenBatch.of(rows, loaded.device)
        ((keys,), _) = activations(loaded, batch, [module])
        assert isinstance(keys, JointKeys)
        found.append(keys[batch.mask.bool()].double())
        if sum(map(len, found)) >= tokens:
            break
    return torch.cat(found)[:tokens]


def update_for(problem: LayerProblem) -> Tensor:
    """ΔW whose miss is `MISS`: λ by bisection."""
    low, high = -12.0, 8.0
    for _ in range(40):
        middle = (low + high) / 2
        delta = Memit(second_moment_weight=10**middle).solve(problem, {}).dense()
        missed = float((problem.residual - delta @ problem.keys).norm() / problem.residual.norm())
        low, high = (middle, high) if missed < MISS else (low, middle)
    return delta


def show_moments(family: str, folder: Path, steps: int) -> None:
    """What each form of C0 makes of the same facts."""
    model, corpus, _, facts = prepared(family, folder, steps)
    loaded = load_model(model)
    name = loaded.architecture.module_name(LAYER, "experts")
    weights = EditedWeights(loaded.model, loaded.architecture, [name])
    source = OptimisedTargets(loaded, weights, [LAYER], ["{}"], FromTargets(), TargetSettings(rule="normalised"), 2048)
    source.begin(facts.facts)
    keys, residual = (part.double() for part in source.layer(0))
    settings = make_settings({"moments": {"corpus": str(corpus), "tokens": max(TEXTS) + FRESH}}).moments
    passages = load_corpus(loaded, settings, 0, Quiet()).passages
    fresh = joint_keys(loaded, name, passages[::-1], FRESH)
    weight = wide(weights.original(name)).double()
    outputs = float((fresh @ weight.T).square().sum())
    print("\n| family | tokens | C0 | collateral ratio on fresh text |\n|---|---|---|---|")
    everything = joint_keys(loaded, name, passages, max(TEXTS))
    experts = len(weights.original(name))
    for tokens in TEXTS:
        seen = everything[:tokens].unflatten(1, (experts, -1))
        whole = everything[:tokens].T @ everything[:tokens] / tokens
        blocks = torch.einsum("tei,tej->eij", seen, seen) / tokens
        reached = (seen.abs().sum(-1) > 0).sum(0)
        off = float((whole - torch.block_diag(*blocks)).norm() / whole.norm())
        print(
            f"{tokens:,} tokens reach the experts {reached.tolist()} times; cross terms are {100 * off:.0f} % of ‖C0‖"
        )
        mean = blocks.sum(0) / reached.sum()
        forms = {"with all cross terms": whole, "one block an expert": blocks}
        forms |= {f"and the layer's mean as {more} tokens": blocks + more * mean for more in GIVEN}
        forms["I in place of C0"] = torch.eye(len(mean), dtype=torch.float64).repeat(experts, 1, 1)
        for label, moment in forms.items():
            delta = update_for(LayerProblem(weight, keys, residual, Statistics(second_moment=moment)))
            moved = float((fresh @ delta.T).square().sum())
            print(f"| {family} | {tokens:,} | {label} | {moved / outputs:.2e} |", flush=True)


def main() -> None:
    """Either table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=MIXTURES, action="append")
    parser.add_argument("--steps", type=int, default=600, help="training steps of 32 passages")
    parser.add_argument("--models", type=Path, required=True, help="where trained models are kept, and taken from")
    parser.add_argument("--moments", action="store_true", help="compare forms of C0 instead")
    args = parser.parse_args()
    args.models.mkdir(parents=True, exist_ok=True)
    if args.moments:
        for family in args.family or ["qwen3_moe"]:
            show_moments(family, args.models, args.steps)
    else:
        show_runs(args.models, args.steps, args.family or list(MIXTURES))


if __name__ == "__main__":
    main()
