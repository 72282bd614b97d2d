"""Sample the text that ships with the package, from the embedded model: about 90 s on two cores.

    OMP_NUM_THREADS=1 python benchmarks/sample_shipped_text.py

Another machine or number of threads rounds otherwise and draws other text; so what is shipped is not drawn anew without need.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import sphere_edit
from sphere_edit.editing.moments import MomentSettings, sample_text
from sphere_edit.editing.shipped import NAME, write_shipped
from sphere_edit.models.loading import load_model
from sphere_edit.progress import RichReporter

_SEED = 0


def main() -> None:
    """Write the file into the package."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path(sphere_edit.__file__).parent / "data" / NAME)
    output = parser.parse_args().output
    loaded = load_model("smollm2", device="cpu", dtype="float32")
    rows = sample_text(loaded, MomentSettings().sampled_tokens, _SEED, RichReporter())
    write_shipped(output, loaded, _SEED, rows)


if __name__ == "__main__":
    main()
