"""What a race saves and whether it finds what a full run finds, over seeds, on real and on made-up scores.

python benchmarks/race.py -d 4 -ckpt RUN -seeds 20       # real scores
python benchmarks/race.py -seeds 20                      # made-up scores: separated, and tied
"""

from __future__ import annotations

import argparse

import numpy as np

from mtl_nnunet.bootstrap import BOOTSTRAP_DRAWS, bootstrap_draws, interval
from mtl_nnunet.cases import find_nnunet_dataset
from mtl_nnunet.checkpoints import find_checkpoints
from mtl_nnunet.racing import FEWEST_PATIENTS, SHARES, race_checkpoints, survivors
from mtl_nnunet.ranking import rank_checkpoints
from mtl_nnunet.scores import parse_score
from mtl_nnunet.slices import gather_slices


def made_up(seed: int, gap: float, num_checkpoints: int = 16, num_patients: int = 64) -> tuple[float, bool, bool]:
    """Scores that are means over patients, ``gap`` standard errors apart: share of forwards, in the set, same choice."""
    rng = np.random.default_rng(seed)
    means = gap * rng.permutation(num_checkpoints) / np.sqrt(num_patients)
    terms = means[:, None] + rng.normal(size=(num_checkpoints, num_patients)) + rng.normal(size=num_patients)
    order = rng.permutation(num_patients)
    running, forwards, start = list(range(num_checkpoints)), 0, 0
    ends = sorted({max(min(FEWEST_PATIENTS, num_patients), round(s * num_patients)) for s in SHARES})
    for end in ends:
        seen = terms[:, order[:end]]
        forwards += (end - start) * len(running)
        start = end
        samples = seen[running] @ bootstrap_draws(end, BOOTSTRAP_DRAWS, seed).T / end
        if end < num_patients:
            running = [running[k] for k in survivors(list(seen[running].mean(1)), samples, end)]
    full = terms @ bootstrap_draws(num_patients, BOOTSTRAP_DRAWS, seed).T / num_patients
    best = int(terms.mean(1).argmax())
    choice = max(running, key=lambda k: terms[k].mean())
    difference = full[choice] - full[best]
    low, high = interval(float(terms[choice].mean() - terms[best].mean()), difference, num_patients)
    return forwards / terms.size, choice == best or low <= 0 <= high, choice == best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d")
    parser.add_argument("-ckpt")
    parser.add_argument("-score", default="contrastive")
    parser.add_argument("-num_slices", type=int, default=128)
    parser.add_argument("-seeds", type=int, default=20)
    args = parser.parse_args()
    if args.d is None:
        for gap in (5.0, 2.0, 1.0, 0.2, 0.0):
            shares, inside, same = zip(*(made_up(seed, gap) for seed in range(args.seeds)), strict=True)
            print(
                f"16 checkpoints {gap} standard errors apart: {np.mean(shares):.0%} of the forwards ({min(shares):.0%} to "
                f"{max(shares):.0%}); choice in the full run's undecided set {sum(inside)}/{args.seeds}, the same {sum(same)}/{args.seeds}"
            )
        return
    checkpoints = find_checkpoints([args.ckpt])
    score = parse_score(args.score)
    shares, inside, same = [], 0, 0
    for seed in range(args.seeds):
        slices = gather_slices(find_nnunet_dataset(args.d), args.num_slices, seed=seed, with_labels=score.labels)
        (full,) = rank_checkpoints(checkpoints, checkpoints[0].architecture, slices, score, seed)
        raced, share = race_checkpoints(checkpoints, checkpoints[0].architecture, slices, score, seed)
        shares.append(share)
        inside += raced.chosen.label in [c.label for c in full.undecided]
        same += raced.chosen.label == full.chosen.label
        print(
            f"seed {seed}: {share:.0%}, race {raced.chosen.label}, full {full.chosen.label}, undecided "
            f"{', '.join(c.label for c in full.undecided)}",
            flush=True,
        )
    print(
        f"{args.score}, {len(checkpoints)} checkpoints: {np.mean(shares):.0%} of the forwards ({min(shares):.0%} to {max(shares):.0%}); "
        f"choice in the full run's undecided set {inside}/{args.seeds}, the same {same}/{args.seeds}"
    )


if __name__ == "__main__":
    main()
