"""MTLTrainer, MTLTrainerScratch and nnU-Net's own trainer at the same number of iterations: Dice on a fold's validation cases.

nnU-Net does not seed training, so each repeat is another draw; the spread over repeats is what to judge a difference by.
nnU-Net's environment variables must be set and the dataset planned, preprocessed and selected for.

    python benchmarks/training_comparison.py -d 4 -f 0 -repeats 3 -iterations 25,5 -device cuda -o comparison.csv
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import statistics
import subprocess
import time
from pathlib import Path

from mtl_nnunet.cli.main import trainers_folder

TRAINERS = ("MTLTrainer_10epochs", "MTLTrainerScratch_10epochs", "StockTrainer_10epochs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", required=True)
    parser.add_argument("-c", default="2d")
    parser.add_argument("-f", default="0")
    parser.add_argument(
        "-p", default="nnUNetPlans", help="plans, e.g. a copy of nnUNetPlans with a smaller batch for a CPU"
    )
    parser.add_argument("-repeats", type=int, default=3)
    parser.add_argument(
        "-iterations", default="25,5", help="training,validation iterations per epoch; there are 10 epochs"
    )
    parser.add_argument("-device", default="cuda")
    parser.add_argument("-trainers", nargs="+", default=TRAINERS)
    parser.add_argument("-o", type=Path, default=Path("training_comparison.csv"))
    args = parser.parse_args()

    folders = [str(trainers_folder()), str(Path(__file__).parent / "trainers")]
    environment = {
        **os.environ,
        "nnUNet_extTrainer": os.pathsep.join(folders),
        "MTL_ITERATIONS_PER_EPOCH": args.iterations,
    }
    rows = []
    for repeat in range(args.repeats):
        for trainer in args.trainers:
            (dataset,) = Path(os.environ["nnUNet_preprocessed"]).glob(f"Dataset{int(args.d):03d}_*")
            model = Path(os.environ["nnUNet_results"], dataset.name, f"{trainer}__{args.p}__{args.c}")
            shutil.rmtree(model, ignore_errors=True)
            started = time.monotonic()
            command = ["nnUNetv2_train", args.d, args.c, args.f, "-tr", trainer, "-p", args.p, "-device", args.device]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
            seconds = time.monotonic() - started
            epochs = [float(x.split()[-2]) for x in done.stdout.splitlines() if "Epoch time:" in x]
            summary = json.loads((model / f"fold_{args.f}" / "validation" / "summary.json").read_text())
            dice = {label: values["Dice"] for label, values in summary["mean"].items()}
            row = {"trainer": trainer, "repeat": repeat, **{f"dice_{k}": round(v, 4) for k, v in dice.items()}}
            row |= {"seconds": round(seconds), "median_epoch_s": round(statistics.median(epochs), 2)}
            rows.append(row)
            print(row, flush=True)
            with open(args.o, "w", newline="") as file:
                writer = csv.DictWriter(file, fieldnames=rows[0])
                writer.writeheader()
                writer.writerows(rows)
    for trainer in args.trainers:
        for key in [k for k in rows[0] if k.startswith("dice_")]:
            values = [r[key] for r in rows if r["trainer"] == trainer]
            spread = f" +- {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            print(f"{trainer:<28} {key}: {statistics.mean(values):.4f}{spread}")


if __name__ == "__main__":
    main()
