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
from mtl_nnunet.embedding import BATCH_SIZE, embed, make_target
from mtl_nnunet.encoder import random_encoder
from mtl_nnunet.ranking import evaluate
from mtl_nnunet.scores import parse_score
from mtl_nnunet.slices import Slices, gather_slices


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
    parser.add_argument("-precision", default="auto")
    parser.add_argument("--channels_last", action="store_true", help="the bare forwards too")
    args = parser.parse_args()

    checkpoint = find_checkpoints([args.ckpt])[-1] if args.ckpt else None
    name = args.encoder or checkpoint.architecture
    started = time.perf_counter()
    if args.d:
        slices = gather_slices(find_nnunet_dataset(args.d), args.num_slices, with_labels=True)
    else:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(args.num_slices, 1, args.size, args.size, generator=generator)
        n = args.num_slices
        slices = Slices(
            images,
            np.arange(n) // 4,
            ("",) * n,
            (0,) * n,
            0,
            (1.0, 1.0),
            ("",),
            False,
            {},
            (),
            labels=(images[:, 0] > 1).short(),
        )
    reading = time.perf_counter() - started
    print(
        f"{name}, slices {tuple(slices.images.shape)}, {slices.num_patients} patients, {torch.get_num_threads()} threads, {args.device}"
    )
    for text in args.score:
        score = parse_score(text)
        started = time.perf_counter()
        target = make_target(slices, [score], seed=0)
        viewing = time.perf_counter() - started
        views = target.views[score.view_key]

        def score_once(score=score, target=target) -> None:
            encoder = random_encoder(name, target.input_channels, seed=0)
            if checkpoint is not None:
                encoder.load_weights(read_contents(checkpoint.path).weights, str(checkpoint.path))
            evaluate(embed(encoder, target, [score], args.device, args.precision), [score], seed=0)

        bare = random_encoder(name, target.input_channels, seed=0).to(args.device).eval()
        if args.channels_last:
            bare = bare.to(memory_format=torch.channels_last)
        deepest = max(score.resolved_levels(len(bare.output_channels), name))

        def forwards_only(views=views, bare=bare, deepest=deepest) -> None:
            layout = torch.channels_last if args.channels_last else torch.contiguous_format
            with torch.inference_mode():
                for view in views:
                    for batch in torch.split(torch.from_numpy(view), BATCH_SIZE):
                        bare.first_levels(batch.to(args.device).to(memory_format=layout), deepest)
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
