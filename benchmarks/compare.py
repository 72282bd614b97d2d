"""Finished runs of the same facts side by side, and what SPHERE changed over the plain method, paired by fact. Prints markdown.

python benchmarks/compare.py runs/plain runs/sphere
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sphere_edit.reporting.comparison import UNEDITED, markdown, read_row
from sphere_edit.reporting.series import Series


def main() -> None:
    """Read the runs and print their table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    folders = parser.parse_args().runs
    rows = [read_row("runs", UNEDITED, "", {0: folders[0]}, "unedited")]
    for folder in folders:
        run = Series.read(folder)
        rows.append(read_row("runs", run.method, "SPHERE" if run.sphere else "plain", {0: folder}))
    print(markdown(rows))


if __name__ == "__main__":
    main()
