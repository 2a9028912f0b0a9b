"""Where the rule expected-gain would have stopped curves that were trained to their end, and what that would have lost.

The shipped chooser goes by epochs alone, so all curves of a table stop at the same one. Net is the loss against the best of the
curve plus the price times the share of the run that was paid for. Curves that the chooser was fitted on flatter it.

    python benchmarks/evidence/stops.py downstream_scores.csv balanced.csv
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from mtl_nnunet.curves import STATES, read_curves
from mtl_nnunet.stopping import StopRule, decide


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", type=Path, nargs="+")
    parser.add_argument("-price", type=float, nargs="+", default=[0.5, 1, 2])
    args = parser.parse_args()
    for table in args.tables:
        curves = read_curves(table)
        for state in STATES:
            mine = [curve for curve in curves if curve.state == state]
            epochs = mine[0].epochs.astype(float)
            if any(not np.array_equal(curve.epochs, epochs) for curve in mine):
                raise SystemExit(
                    f"{table}: curves have different epochs. Expected one grid for all, as balanced.py makes it."
                )
            dice = 100 * np.stack([curve.mean_dice for curve in mine])
            loss = (dice.max(axis=1, keepdims=True) - dice).mean(axis=0)
            for price in args.price:
                at = stop(epochs, StopRule("expected-gain", price, state))
                net = loss + price * epochs / epochs[-1]
                print(
                    f"{table.name}, {state}, price {price:g}: stops after {epochs[at]:g}, loss {loss[at]:.2f}, net {net[at]:.2f}; "
                    f"best fixed epoch {net.min():.2f} ({epochs[net.argmin()]:g})"
                )


def stop(epochs: np.ndarray, rule: StopRule) -> int:
    """Index of the checkpoint after which the rule stops, of checkpoints seen one after the other."""
    for k in range(1, len(epochs)):
        # it goes by epochs, so the score's values do not count
        if decide(rule, list(epochs[:k]), np.zeros(k).tolist(), np.zeros((k, 1)), 1, None, epochs[-1]).stop:
            return k - 1
    return len(epochs) - 1


if __name__ == "__main__":
    main()
