"""Does a chooser keep what it says on curves that came after it?

What the chooser expects a checkpoint to lose, and the 90 % interval of that, beside what was measured; at each price of a whole
pretraining the loss of what it takes, of the last epoch, and of stopping everywhere at the same mean share. A table that it was fitted
on is refused. Curves differ from the fitted ones in what the table says: here in the pretraining, not in target or network.

    python benchmarks/evidence/new_curves.py mtl_nnunet/chooser.json second_seed.csv
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from mtl_nnunet.chooser import Chooser, draw_curves, read_chooser
from mtl_nnunet.chooser_fit import TYPICAL_PRICES, HeldOut, measured_losses, seed_covariances
from mtl_nnunet.curves import Curve, read_curves
from mtl_nnunet.evaluation import fixed_line, same_budget
from mtl_nnunet.files import sha256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chooser", type=Path)
    parser.add_argument("table", type=Path)
    args = parser.parse_args()
    chooser = read_chooser(args.chooser)
    if sha256(args.table) in chooser.provenance["tables"].values():
        raise SystemExit(f"{args.chooser} was fitted on {args.table}. Pass a table that came after it.")
    curves = read_curves(args.table)
    for state in sorted({c.state for c in curves}):
        held = said_of([c for c in curves if c.state == state], chooser)
        print(f"encoder {state}: {len(held)} curves, {seeds_in_words(held)}, losses in Dice points")
        for price in TYPICAL_PRICES:
            print(line(held, price, chooser.states[state].prior.loss_factor))


def said_of(curves: list[Curve], chooser: Chooser) -> list[HeldOut]:
    """What it says of each curve by epochs alone, with the noise of the seeds that the measured Dice has.

    Raises:
        SystemExit: Trainings of one seed, whose noise nobody knows.
    """
    if all(np.isfinite(c.dice).sum(1).max() < 2 for c in curves):
        raise SystemExit("every checkpoint was trained with one seed, so the noise of what was measured is not known.")
    held = []
    for c, noise in zip(curves, seed_covariances(curves), strict=True):
        draws = draw_curves(chooser.states[c.state].prior, c.epochs.astype(float), {})
        expected = (draws.max(1, keepdims=True) - draws).mean(0)
        held.append(HeldOut(c, c.run, expected, measured_losses(draws, noise)))
    return held


def seeds_in_words(held: list[HeldOut]) -> str:
    counts = {int(n) for h in held for n in np.isfinite(h.curve.dice).sum(1)}
    return f"{min(counts)} to {max(counts)} seeds" if len(counts) > 1 else f"{min(counts)} seeds"


def line(held: list[HeldOut], price: float, factor: float) -> str:
    """At one price; at none the last epoch is taken, as the command does."""
    curves = [h.curve for h in held]
    chosen = [h.choice(price) if price else len(h.expected) - 1 for h in held]
    share = float(np.mean([c.epochs[k] / c.epochs[-1] for c, k in zip(curves, chosen, strict=True)]))
    measured = np.array([h.regret[k] for h, k in zip(held, chosen, strict=True)])
    expected = [h.losses[:, k].mean() for h, k in zip(held, chosen, strict=True)]
    within = [h.holds(k, factor) for h, k in zip(held, chosen, strict=True)]
    fixed = fixed_line(curves, [same_budget(curves, share)])[1][0]
    last = np.mean([h.regret[-1] for h in held])
    return (
        f"price {100 * price:.2f}: share {share:.2f}, lost {100 * measured.mean():.2f} (fixed there {100 * fixed:.2f}, last "
        f"{100 * last:.2f}), expected {100 * np.mean(expected):.2f}, {np.mean(within):.0%} held in 90 % intervals"
    )


if __name__ == "__main__":
    main()
