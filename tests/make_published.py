"""Makes `tests/data/published.json`; run by hand, with ../shared beside the checkout: `python tests/make_published.py`.

What the authors' published implementation says of SmolLM2 is rounded; of their matrices, which are large, nothing is kept. Instead their
formulas are written down here once more, in float64 and as plainly as they are published, are held against their numbers, and then say
what comes out for the seeded matrices of `published.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from published import ALONG, FILE, matrices, sketch

Array = np.ndarray
SHARED = Path(__file__).parents[2] / "shared" / "reference"


def projected(weight: Array, delta: Array, eta: float, alpha: float) -> tuple[Array, int]:
    """SPHERE: ΔW (I − α U Uᵀ), U the principal directions of the normalised rows; and how many there are."""
    rows = weight / np.linalg.norm(weight, axis=1, keepdims=True)
    values, vectors = np.linalg.eigh(rows.T @ rows / len(rows))
    share = np.cumsum(values[::-1]) / values.sum()
    rank = int((share <= eta).sum()) + 1
    principal = vectors[:, ::-1][:, :rank]
    return delta - alpha * delta @ principal @ principal.T, rank


def alphaedit(
    cov: Array, keys: Array, residual: Array, previous: Array, threshold: float, l2: float
) -> tuple[Array, int]:
    """ΔWᵀ = (P (K Kᵀ + Kp Kpᵀ) + L2 I)⁻¹ P K Rᵀ, P on the eigenvectors of C0 below the threshold; and how many these are."""
    values, vectors = np.linalg.eigh(cov)
    null = vectors[:, values < threshold]
    projector = null @ null.T
    system = projector @ (keys @ keys.T + previous @ previous.T) + l2 * np.eye(len(cov))
    return np.linalg.solve(system, projector @ keys @ residual.T).T, null.shape[1]


def memit(cov: Array, keys: Array, residual: Array, weight: float) -> Array:
    """ΔW = R Kᵀ (λ C0 + K Kᵀ)⁻¹."""
    return residual @ np.linalg.solve(weight * cov + keys @ keys.T, keys).T


def rect(delta: Array, weight: Array, share: float = 0.4) -> Array:
    """The share of entries that change most relative to W, and the largest of the others."""
    relative = np.abs(delta / (weight + 1e-8))
    least = np.sort(relative.flatten())[round((1 - share) * relative.size) - 1]
    return np.where(relative >= least, delta, 0.0)


def prune(change: Array, weight: Array) -> Array:
    """σ > σmax(W) becomes ln σ − ln σmax + σmax."""
    left, values, right = np.linalg.svd(change, full_matrices=False)
    most = np.linalg.norm(weight, 2)
    return left * np.where(values > most, np.log(np.maximum(values, most)) - np.log(most) + most, values) @ right


def check(tensors: dict[str, Array], numbers: dict[str, Any]) -> None:
    """These formulas against the authors' results."""

    def near(ours: Array, name: str, limit: float) -> None:
        assert np.linalg.norm(ours - tensors[name]) < limit * np.linalg.norm(tensors[name]), name

    cov, keys, residual = (tensors[f"update.{name}"] for name in ("cov", "K", "R"))
    for eta, alpha in ((0.5, 0.5), (0.5, 0.8), (0.8, 0.8), (0.3, 1.0), (0.95, 0.5)):
        ours, rank = projected(tensors["projection.W"], tensors["projection.delta"], eta, alpha)
        assert rank == numbers[f"projection.rank.eta{eta:g}"]
        near(ours, f"projection.out.eta{eta:g}.alpha{alpha}", 1e-5)
    ours, dims = alphaedit(cov, keys, residual, tensors["update.K_previous"], numbers["update.nullspace_threshold"], 10)
    assert dims == numbers["update.nullspace_dims"]
    near(ours, "update.alphaedit.L2_10", 1e-4)
    for weight in (15000, 20):
        near(memit(cov, keys, residual, weight), f"update.memit.lambda{weight}", 1e-4)
    near(rect(tensors["update.memit.lambda20"], tensors["update.W"]), "update.rect40.of_memit_lambda20", 1e-6)
    near(prune(tensors["update.prune.accumulated"], tensors["update.W"]), "update.prune.out", 1e-4)


def seeded() -> dict[str, Any]:
    """What the formulas give for our own matrices."""
    m = matrices()
    out: dict[str, Any] = {"projection": []}
    for eta, alpha in ((0.5, 0.5), (0.5, 0.8), (0.3, 1.0), (0.95, 0.5)):
        ours, rank = projected(m["W"], m["delta"], eta, alpha)
        out["projection"].append({"eta": eta, "alpha": alpha, "rank": rank, **sketch(ours)})
    ours, dims = alphaedit(m["cov"], m["K"], m["R"], m["K_previous"], 0.3, 10)
    out["alphaedit"] = {"threshold": 0.3, "l2": 10, "dims": dims, **sketch(ours)}
    out["memit"] = [{"weight": weight, **sketch(memit(m["cov"], m["K"], m["R"], weight))} for weight in (15000, 20)]
    out["rect"] = sketch(rect(m["delta"], m["W"]))
    out["prune"] = sketch(prune(8 * m["delta"], m["W"]))
    return out


def language_model(tensors: dict[str, Array], numbers: dict[str, Any]) -> dict[str, Any]:
    """What the published implementation says of SmolLM2, rounded: three facts' keys, one target, six evaluated prompts' records."""
    target = numbers["targets.facts"][0]
    told = {name: target[name] for name in ("subject", "prompt", "target_new")}
    told["loss"] = [round(value, 3) for value in target["loss"]]
    told["probability"] = [round(value, 3) for value in target["mean_target_prob"]]
    reads = {name: sketch(tensors[name][:3]) for name in ("keys.layer4", "keys.layer8", "hidden.layer8")}
    evaluation = [
        {
            **{name: record[name] for name in ("prompts", "target_new", "target_true", "correct")},
            "nll": [{name: round(value, 4) for name, value in nll.items()} for nll in record["nll"]],
        }
        for record in numbers["evaluation"][:6]
    ]
    return {
        "templates": [template for group in numbers["targets.context_templates"] for template in group],
        "hparams": numbers["targets.hparams"],
        "layer": numbers["targets.layer"],
        "facts": numbers["keys.facts"][:3],
        "reads": reads,
        "target": told,
        "evaluation": evaluation,
    }


def main() -> None:
    """Check, then write."""
    tensors = {name: value.astype(np.float64) for name, value in load_file(SHARED / "published.safetensors").items()}
    numbers = json.loads((SHARED / "published.json").read_text("utf-8"))
    check(tensors, numbers)
    about = f"rounded; a sketch is the norm and {ALONG} bilinear forms (published.py); made by make_published.py"
    content = {"about": about, "seeded": seeded(), "smollm2": language_model(tensors, numbers)}
    FILE.write_text(
        json.dumps(content, ensure_ascii=False, separators=(",", ":")).replace("},{", "},\n{") + "\n", "utf-8"
    )


if __name__ == "__main__":
    main()
