"""SPHERE's basis and application, as published (a d_in × d_in eigenproblem and projector) and here (the smaller Gram matrix, factors).

python benchmarks/projection.py --shape 4096 14336
"""

from __future__ import annotations

import argparse
import time

import textbook
import torch
from torch import Tensor

from sphere_edit import Sphere
from sphere_edit.numerics.update import LowRankUpdate


def main() -> None:
    """Time both on a random weight and an update of a hundred facts, and compare what they give."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, default=(4096, 14336), metavar=("D_OUT", "D_IN"))
    parser.add_argument("--facts", type=int, default=100)
    args = parser.parse_args()
    d_out, d_in = args.shape
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    # neurons that share some directions, as trained ones do
    weight = random(d_out, d_in) + random(d_out, 64) @ random(64, d_in)
    update = LowRankUpdate(random(d_out, args.facts) / 10, random(args.facts, d_in) / 10)
    sphere = Sphere(eta=0.5, alpha=0.5)

    began = time.monotonic()
    ours = sphere(update, weight)
    engine = time.monotonic() - began
    print(f"engine: {engine:.2f} s (basis and application)", flush=True)
    began = time.monotonic()
    theirs = textbook.project(update.dense(), weight, 0.5, 0.5)
    dense = time.monotonic() - began
    difference = float((ours.dense() - theirs).norm() / theirs.norm())
    print(f"as published: {dense:.2f} s (float32)\nratio {dense / engine:.1f}, relative difference {difference:.1e}")


if __name__ == "__main__":
    main()
