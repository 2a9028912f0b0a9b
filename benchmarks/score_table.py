"""Every score of every checkpoint of some runs on some datasets: values, what each would choose, and what it costs.

Writes one row a dataset, run, score and checkpoint (and one for random weights) to a CSV, and prints one line a dataset,
run and score. Rows that the CSV has already are not computed again.

    python benchmarks/score_table.py -d 4 28 32 -runs RUN RUN -o benchmarks/scores.csv
"""

from __future__ import annotations

import argparse
import csv
import os
import time
from pathlib import Path

from mtl_nnunet.cases import find_nnunet_dataset, with_patients
from mtl_nnunet.checkpoints import find_checkpoints
from mtl_nnunet.ranking import rank_checkpoints
from mtl_nnunet.scores import SCORES, parse_score
from mtl_nnunet.slices import gather_slices

COLUMNS = [
    "dataset",
    "run",
    "score",
    "epoch",
    "value",
    "low",
    "high",
    "probability_of_best_score",
    "undecided",
    "chosen",
    "levels",
    "slices",
    "patients",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", nargs="+", required=True)
    parser.add_argument("-runs", nargs="+", required=True)
    parser.add_argument("-score", nargs="+", default=list(SCORES))
    parser.add_argument("-num_slices", type=int, default=256)
    parser.add_argument("-num_cases", type=int, default=256)
    parser.add_argument("-o", required=True)
    args = parser.parse_args()
    output = Path(args.o)
    done = set()
    if output.is_file():
        with open(output, newline="") as file:
            done = {(row["dataset"], row["run"]) for row in csv.DictReader(file)}
    else:
        output.write_text(",".join(COLUMNS) + "\n")
    for number in args.d:
        dataset = find_nnunet_dataset(number)
        table = Path(os.environ["nnUNet_raw"], dataset.name, "patients.csv")
        if table.is_file():
            dataset = with_patients(dataset, table)
        slices = None
        for run in args.runs:
            if (dataset.name, Path(run).name) in done:
                continue
            slices = slices or gather_slices(dataset, args.num_slices, args.num_cases, with_labels=True)
            checkpoints = find_checkpoints(run)
            scores = [parse_score(s) for s in args.score]
            started = time.perf_counter()
            rankings = rank_checkpoints(checkpoints, checkpoints[0].architecture, slices, scores)
            seconds = time.perf_counter() - started
            with open(output, "a", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                for ranking in rankings:
                    for row in (*ranking.checkpoints, ranking.random):
                        levels = " ".join(f"{level}:{value:.5g}" for level, value in row.levels.items())
                        figures = [f"{v:.6g}" for v in (row.value, row.low, row.high)]
                        chance = row.probability_of_best_score
                        writer.writerow(
                            [
                                dataset.name,
                                Path(run).name,
                                ranking.score.name,
                                row.label,
                                *figures,
                                "" if chance is None else f"{chance:.3f}",
                                int(row.undecided),
                                int(row is ranking.chosen),
                                levels,
                                len(slices.images),
                                slices.num_patients,
                            ]
                        )
            print(
                f"{dataset.name}, {Path(run).name}: {len(slices.images)} slices, {slices.num_patients} patients, "
                f"{len(scores)} scores of {len(checkpoints)} checkpoints in {seconds:.0f} s"
            )
            for ranking in rankings:
                beats = ranking.better(ranking.checkpoints[ranking.best], ranking.random)
                print(
                    f"  {ranking.score.name:<12} chooses {ranking.chosen.label:>3}: {ranking.chosen.value:8.4f}, last "
                    f"{ranking.last.value:8.4f}, random {ranking.random.value:8.4f}{'' if beats else ' (no checkpoint is better)'}, "
                    f"undecided {len(ranking.undecided)}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
