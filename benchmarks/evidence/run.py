"""The downstream benchmark from raw data to the tables, in one command that goes on where it was interrupted.

Pretrains, trains downstream, scores, and judges the scores: ``downstream.csv``, ``scores.csv`` and ``evaluation/`` in the output
folder.

    python benchmarks/evidence/run.py -raw nnUNet_raw -tar tiny-imagenet-64.tar -o evidence -num_proc 2 -device cpu
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from pretrain import RUNS, name_of

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-raw", type=Path, required=True, help="nnU-Net's folder of raw datasets")
    parser.add_argument("-tar", type=Path, required=True, help="images to pretrain on")
    parser.add_argument("-o", type=Path, required=True)
    parser.add_argument("-num_proc", default="1")
    parser.add_argument("-device", default="cpu")
    args = parser.parse_args()
    how = ["-num_proc", args.num_proc, "-device", args.device]
    runs = [args.o / "runs" / name_of(*run) for run in RUNS]
    stage("pretrain.py", "-tar", args.tar, "-o", args.o / "runs", *how)
    for script, table in (("downstream.py", "downstream.csv"), ("score.py", "scores.csv")):
        stage(script, "-raw", args.raw, "-runs", *runs, "-work", args.o / "targets", "-o", args.o / table, *how)
    tables = ["-downstream", args.o / "downstream.csv", "-scores", args.o / "scores.csv"]
    subprocess.run(["mtl-nnunet", "evaluate-scores", *tables, "-o", args.o / "evaluation", "--overwrite"], check=True)


def stage(script: str, *options: object) -> None:
    subprocess.run([sys.executable, HERE / script, *map(str, options)], check=True)


if __name__ == "__main__":
    main()
