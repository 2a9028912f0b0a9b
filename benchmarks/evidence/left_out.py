"""Does a chooser keep what it says on targets and encoders that were left out of its fit, table by table?

The intervals of a fit on several tables may hold on all of them together, and be too narrow on the one and too wide on the other.

    python benchmarks/evidence/left_out.py downstream_scores.csv balanced.csv
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mtl_nnunet.chooser_fit import hold_out, kept
from mtl_nnunet.curves import STATES, read_curves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", type=Path, nargs="+")
    args = parser.parse_args()
    tables = {path: read_curves(path) for path in args.tables}
    for state in STATES:
        curves = {path: [c for c in found if c.state == state] for path, found in tables.items()}
        everything = [c for found in curves.values() for c in found]
        for by in ("dataset", "encoder"):
            held = hold_out(everything, (), by)
            for path, own in curves.items():
                # the very curves: two of different tables may have all names in common
                part = [h for h in held if any(h.curve is c for c in own)]
                coverage, expected, measured = kept(part, held)
                print(
                    f"{state}, {by} left out, {path.name}: {len(part)} curves, {coverage:.0%} held in 90 % intervals, expected "
                    f"{100 * expected:.2f}, measured {100 * measured:.2f} Dice points"
                )


if __name__ == "__main__":
    main()
