"""What more checkpoints cost: how often cases are read and views are made, seconds and memory, for 1, 4 and 16 of them.

Each row is a process of its own, so that its peak memory is its own.

    python benchmarks/many_checkpoints.py -d 4 -ckpt RUN
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time

from mtl_nnunet import embedding, slices
from mtl_nnunet.cases import find_nnunet_dataset
from mtl_nnunet.checkpoints import find_checkpoints
from mtl_nnunet.ranking import rank_checkpoints


def counted(function, calls):
    def counting(*arguments, **named):
        calls.append(1)
        return function(*arguments, **named)

    return counting


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", required=True)
    parser.add_argument("-ckpt", required=True)
    parser.add_argument("-score", nargs="+", default=["contrastive", "infonce", "robustness", "rankme"])
    parser.add_argument("-n", type=int, nargs="+", default=[1, 4, 16], help="how many; a run's files are taken in turn")
    args = parser.parse_args()
    if len(args.n) > 1:
        for n in args.n:
            subprocess.run(
                [sys.executable, __file__, "-d", args.d, "-ckpt", args.ckpt, "-score", *args.score, "-n", str(n)],
                check=True,
                stderr=subprocess.DEVNULL,
            )
        return
    read, viewed = [], []
    slices.read_case = counted(slices.read_case, read)
    embedding.make_views = counted(embedding.make_views, viewed)
    found = find_checkpoints(args.ckpt)
    checkpoints = [found[i % len(found)] for i in range(args.n[0])]
    started = time.perf_counter()
    gathered = slices.gather_slices(find_nnunet_dataset(args.d))
    reading = time.perf_counter() - started
    rank_checkpoints(checkpoints, found[0].architecture, gathered, args.score)
    seconds = time.perf_counter() - started - reading
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{args.n[0]:>3} checkpoints: {len(gathered.used)} cases read {len(read)} times, {len(viewed)} kinds of views made; reading "
        f"{reading:.1f} s, views and scores {seconds:.1f} s, peak memory {peak:.2f} GiB",
        flush=True,
    )


if __name__ == "__main__":
    main()
