"""All 150 variants of the published score in one pass, against the public functions called once for each.

Three distances, five margins, five levels, pooled or not, on the same images, views, encoder and machine. Prints the
seconds of both, their ratio and the largest difference between the scores. As published (commit ae4401a) the peer's
``predict_w_model`` stops with an error, since it never joins its batches; here they are joined for it.

    git clone https://github.com/aielte-research/MedSegPretrainImageNet peer
    python benchmarks/published_grid.py -peer peer/src -num_slices 16
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time

import numpy as np
import torch
from torchvision.transforms import ColorJitter

from mtl_nnunet.embedding import Target, embed
from mtl_nnunet.encoder import random_encoder
from mtl_nnunet.scores import parse_score
from mtl_nnunet.scores.robustness import table

MARGINS = (0.0, 0.25, 0.5, 0.75, 1.0)


class AsPeerExpects(torch.nn.Module):
    """Answers as the peer's encoders do: deepest map, and the list of the others."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        self.layers = [self]

    def forward(self, images, return_skip_vals=True):
        with torch.inference_mode():
            *skips, deepest = self.encoder(images)
        return deepest, skips


def predict_with_batches_joined(model, imgs, batch_size=32, device="cpu", level=-2, pool=True):
    maps = []
    for batch in torch.split(imgs, batch_size):
        deepest, skips = model(batch.to(device))
        maps.append([*skips, deepest][level])
    joined = torch.cat(maps)
    return joined.flatten(2).mean(2) if pool else joined


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-peer", required=True, help="folder of the peer that holds robustness/")
    parser.add_argument("-encoder", default="resnet50")
    parser.add_argument("-num_slices", type=int, default=16)
    parser.add_argument("-size", type=int, default=224)
    args = parser.parse_args()
    sys.path.insert(0, args.peer)
    import robustness.eval
    from robustness.distance import cosine_distance, inv_pearson_corr, l2_loss
    from robustness.eval import Robustness, eval_encoder

    robustness.eval.predict_w_model = predict_with_batches_joined

    encoder = random_encoder(args.encoder, 3, 0).eval()
    images = torch.rand(args.num_slices, 3, args.size, args.size, generator=torch.Generator().manual_seed(0))
    # torch.corrcoef in single precision is off by up to 4e-4 on maps of this size: compared in double precision
    theirs_by_name = {
        "cosine": cosine_distance,
        "l2": l2_loss,
        "pearson": lambda x, y: inv_pearson_corr(x.double(), y.double()),
    }
    encoder(images[:2])

    started = time.perf_counter()
    torch.manual_seed(7)
    jitter = ColorJitter(brightness=0.1, contrast=0.05, saturation=0.1, hue=0.05)
    views = torch.stack([jitter(images), jitter(images)])
    scores = [parse_score(f"robustness:level=all,pooled={p}") for p in ("yes", "no")]
    target = Target({("paper", 1.0): views.numpy()}, np.arange(args.num_slices), {})
    features = embed(encoder, target, scores)
    ours = {}
    for level, pooled in itertools.product(range(1, features.num_levels + 1), (True, False)):
        a, b = features.embeddings[("paper", 1.0), level, pooled]
        for (distance, margin), value in table(a, b, MARGINS).items():
            ours[distance, margin, level, pooled] = value
    our_seconds = time.perf_counter() - started

    peer = AsPeerExpects(encoder)
    theirs, their_seconds = {}, 0.0
    for distance, margin, level, pooled in ours:
        torch.manual_seed(7)
        started = time.perf_counter()
        scored = eval_encoder(
            peer, images, Robustness(theirs_by_name[distance], margin), level=level - 1, pool=pooled, device="cpu"
        )
        theirs[distance, margin, level, pooled] = float(scored.mean())
        their_seconds += time.perf_counter() - started
    worst = max(ours, key=lambda k: abs(ours[k] - theirs[k]))
    print(
        f"{args.encoder}, {args.num_slices} images of {args.size}, {len(ours)} variants: one pass {our_seconds:.2f} s, "
        f"public functions once for each {their_seconds:.2f} s, ratio {their_seconds / our_seconds:.1f}; largest difference "
        f"{abs(ours[worst] - theirs[worst]):.1e} at {worst}"
    )


if __name__ == "__main__":
    main()
