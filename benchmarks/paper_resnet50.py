"""The ResNet-50 of arXiv:2410.18677 against its public code, in one run: feature maps at every level.

Takes a checkout of aielte-research/MedSegPretrainImageNet (commit ae4401a). Its own classes build the networks of its own
pretraining configurations; their weights and statistics are randomised and saved as its training saves them; the files go
through read_contents and TimmEncoder. Prints the largest difference at each level, and fails above 1e-5.

    python benchmarks/paper_resnet50.py MedSegPretrainImageNet
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from pathlib import Path
from unittest.mock import MagicMock

import torch
import yaml

from mtl_nnunet.checkpoints import read_contents
from mtl_nnunet.encoder import TimmEncoder

SIZES = ((160, 224), (97, 131))
TOLERANCE = 1e-5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("-seed", type=int, default=0)
    args = parser.parse_args()
    sys.path.insert(0, str(args.checkout / "src"))
    # plots and the count of operations, which no network needs
    sys.modules.update({name: MagicMock() for name in ("fvcore", "fvcore.nn", "utils.framework")})
    worst = 0.0
    for scheme in ("simple", "advanced"):
        torch.manual_seed(args.seed)
        public = public_network(args.checkout, scheme)
        randomise(public)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"resnet50_{scheme}_pretraining_checkpoint_epoch_20.pt"
            torch.save(public.state_dict(), file)
            contents = read_contents(file)
        encoder = TimmEncoder(contents.architecture)
        surplus = encoder.load_weights(contents.weights, str(file))
        print(
            f"{scheme}: {len(public.state_dict())} tensors, {contents.architecture}, not loaded: {', '.join(surplus)}"
        )
        encoder.eval()
        # the wrapper around it passes on the images alone
        deep = public.eval().layers[0].model
        for size in SIZES:
            images = torch.rand(2, 3, *size)
            with torch.inference_mode():
                last, others = deep(images, return_skip_vals=True)
                ours = encoder(images)
            for level, (a, b) in enumerate(zip(ours, [*others, last], strict=True), 1):
                difference = (a - b).abs().max().item()
                worst = max(worst, difference)
                print(
                    f"{scheme:<8} {size[0]} x {size[1]} level {level} {tuple(b.shape)!s:<20} "
                    f"largest difference {difference:.1e}, largest value {b.abs().max().item():.3g}, "
                    f"standard deviation {b.std().item():.3g}"
                )
    if worst > TOLERANCE:
        sys.exit(f"the largest difference is {worst:.1e}, above {TOLERANCE:.0e}")


def public_network(checkout, scheme):
    utils, model = importlib.import_module("utils"), importlib.import_module("model")
    text = (checkout / "config" / "pretraining" / "resnet50" / f"{scheme}.yaml").read_text()
    # its configurations hold tuples, which the safe loader does not know
    layers = yaml.load(text, Loader=yaml.FullLoader)["model"]["model.FeedForwardModel"]["layers"]
    described = [utils.ConfigDict(layer if isinstance(layer, dict) else {layer: {}}) for layer in layers]
    for description in described:
        utils.fill_dict(description)
    return model.FeedForwardModel(described)


def randomise(network) -> None:
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.3)
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            module.num_batches_tracked.fill_(7)


if __name__ == "__main__":
    main()
