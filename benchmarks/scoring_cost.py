"""What scoring a checkpoint costs beside the bare encoder forwards on the same tensors, in one run.

Prints seconds for preparation (reading, resampling, views: once for all checkpoints), for scoring a checkpoint, and for
nothing but the forwards that it needs, with the ratio of the two and the peak memory of the process.

    python benchmarks/scoring_cost.py -d 4 -ckpt RUN -score contrastive robustness
    python benchmarks/scoring_cost.py -encoder resnet50 -size 224        # random weights, generated slices
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time

import numpy as np
import torch

from mtl_nnunet.cases import find_nnunet_dataset
from mtl_nnunet.checkpoints import find_checkpoints, read_contents
from mtl_nnunet.encoder import random_encoder
from mtl_nnunet.ranking import BATCH_SIZE, BOOTSTRAP_DRAWS, bootstrap_draws, embed
from mtl_nnunet.scores import parse_score
from mtl_nnunet.slices import gather_slices
from mtl_nnunet.views import make_views


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", help="dataset in nnUNet_raw; without it, generated slices")
    parser.add_argument("-ckpt", help="folder of a pretraining run; without it, random weights")
    parser.add_argument("-encoder")
    parser.add_argument("-score", nargs="+", default=["contrastive", "robustness"])
    parser.add_argument("-num_slices", type=int, default=256)
    parser.add_argument("-size", type=int, default=224, help="side of generated slices")
    parser.add_argument("-repeats", type=int, default=5)
    parser.add_argument("-device", default="cpu")
    args = parser.parse_args()

    checkpoint = find_checkpoints([args.ckpt])[-1] if args.ckpt else None
    name = args.encoder or checkpoint.architecture
    started = time.perf_counter()
    if args.d:
        slices = gather_slices(find_nnunet_dataset(args.d), args.num_slices)
        images, patients = slices.images, slices.patients
    else:
        images = torch.randn(args.num_slices, 1, args.size, args.size, generator=torch.Generator().manual_seed(0))
        patients = np.arange(args.num_slices) // 4
    reading = time.perf_counter() - started
    draws = bootstrap_draws(int(patients.max()) + 1, BOOTSTRAP_DRAWS, 0)
    print(
        f"{name}, slices {tuple(images.shape)}, {draws.shape[1]} patients, {torch.get_num_threads()} threads, {args.device}"
    )
    for text in args.score:
        score = parse_score(text)
        started = time.perf_counter()
        views = make_views(images, score.views, score.num_views, seed=0)
        viewing = time.perf_counter() - started

        def score_once(score=score, views=views) -> None:
            encoder = random_encoder(name, views.shape[2], seed=0)
            if checkpoint is not None:
                encoder.load_weights(read_contents(checkpoint.path).weights, str(checkpoint.path))
            embeddings = torch.stack([embed(encoder, v, score.level, score.pooled, args.device) for v in views])
            statistic = score.statistic(embeddings, patients)
            statistic(np.ones((1, draws.shape[1])))
            statistic(draws)

        bare = random_encoder(name, images.shape[1], seed=0).to(args.device).eval()

        def forwards_only(views=views, bare=bare) -> None:
            with torch.inference_mode():
                for view in views:
                    for batch in torch.split(view, BATCH_SIZE):
                        bare(batch.to(args.device))
            if args.device == "cuda":
                torch.cuda.synchronize()

        scoring, forwards = [], []
        score_once(), forwards_only()
        # in turn, so that a drift of the machine's speed meets both
        for _ in range(args.repeats):
            for function, seconds in ((score_once, scoring), (forwards_only, forwards)):
                started = time.perf_counter()
                function()
                seconds.append(time.perf_counter() - started)
        ratios = [f / s for f, s in zip(forwards, scoring, strict=True)]
        print(
            f"  {score.name:<12} reading {reading:6.2f} s + views {viewing:6.2f} s (once); "
            f"per checkpoint {statistics.median(scoring):6.3f} s, bare forwards {statistics.median(forwards):6.3f} s; "
            f"forwards / scoring {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )
    print(f"  peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
