"""Seconds and extra memory of the hyperspherical energy of one random matrix. Prints one line.

python benchmarks/energy.py --shape 4096 14336
"""

from __future__ import annotations

import argparse
import resource
import time

import torch

from sphere_edit import hyperspherical_energy


def main() -> None:
    """Measure in this process, which has done nothing else."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, default=(4096, 14336), metavar=("D_OUT", "D_IN"))
    shape = parser.parse_args().shape
    weight = torch.randn(*shape)
    hyperspherical_energy(weight[:8, :8])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    energy = hyperspherical_energy(weight)
    seconds = time.perf_counter() - began
    extra = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(
        f"{shape[0]} × {shape[1]}: {energy.per_pair:.6f} a pair, {seconds:.2f} s, {extra / 1e6:.2f} GB beside the matrix"
    )


if __name__ == "__main__":
    main()
