"""Options that several commands share, and what they stand for; nothing heavy is imported to build them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtl_nnunet.cache import ResultCache
    from mtl_nnunet.cases import Dataset
    from mtl_nnunet.scores import Score


def add_dataset(parser: argparse.ArgumentParser) -> None:
    """The target: an nnU-Net dataset or a folder of images."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("-d", metavar="DATASET", help="number or name of a dataset in nnUNet_raw, e.g. 4")
    source.add_argument("-i", metavar="FOLDER", help="folder of images, or Decathlon/MONAI datalist, without nnU-Net")


def add_encoder(parser: argparse.ArgumentParser) -> None:
    """Which weights of which network."""
    parser.add_argument(
        "-weights",
        choices=("default", "ema", "trained"),
        default="default",
        help="which weights in each file: what its own code would evaluate (default), their moving average (EMA, teacher, key "
        "encoder), or what gradients trained (student, query encoder)",
    )
    parser.add_argument("-encoder", metavar="NAME", help="timm's name of the encoder, where the checkpoints do not say")


def add_score(parser: argparse.ArgumentParser) -> None:
    """The scores."""
    parser.add_argument(
        "-score",
        nargs="+",
        metavar="NAME",
        help="score to show, and to choose by where no expected loss is known (default: contrastive, with -labels ccfv); more "
        "names are computed beside it",
    )


def add_chooser(parser: argparse.ArgumentParser) -> None:
    """What expected Dice is learned from."""
    parser.add_argument(
        "-chooser",
        metavar="JSON",
        help="what expected Dice goes by: a file of mtl-nnunet fit-chooser (default: the shipped one)",
    )


def add_views_and_cases(parser: argparse.ArgumentParser) -> None:
    """Labels, views, and which cases and slices are read."""
    parser.add_argument("-labels", action="store_true", help="use the labels of the training cases")
    parser.add_argument(
        "-f",
        metavar="FOLD",
        type=_fold,
        help="with labels: keep the validation cases of this fold of nnU-Net's split out (0 to 4), or all",
    )
    parser.add_argument("-views", choices=("scanner", "paper"), help="views of slices; default: the score's own")
    parser.add_argument(
        "-strength", type=_strength, default=1.0, metavar="X", help="strength of the views (default: 1)"
    )
    parser.add_argument(
        "-num_slices", type=_two_or_more, default=256, metavar="N", help="slices at most (default: 256)"
    )
    parser.add_argument(
        "-num_cases", type=_two_or_more, default=64, metavar="N", help="cases read at most (default: 64)"
    )
    parser.add_argument("-patients", metavar="CSV", help="table case,patient; default: every case is a patient")
    parser.add_argument(
        "-channel_names",
        nargs="+",
        metavar="NAME",
        help="with -i: channels as in nnU-Net's dataset.json, e.g. CT",
    )
    parser.add_argument(
        "-seed", type=_seed, default=0, metavar="N", help="seed of slices, views and bootstrap (default: 0)"
    )


def add_precision(parser: argparse.ArgumentParser) -> None:
    """Precision of the forwards."""
    parser.add_argument("-precision", choices=("auto", "fp32", "bf16"), default="auto", help="default: bf16 on GPUs")


def add_cache(parser: argparse.ArgumentParser) -> None:
    """Where results are kept."""
    parser.add_argument(
        "-cache", metavar="FOLDER", help="where results are kept (default: $MTL_CACHE or ~/.cache/mtl-nnunet)"
    )
    parser.add_argument("--no-cache", action="store_true", help="compute everything anew and keep nothing")


def add_skip_bad_cases(parser: argparse.ArgumentParser) -> None:
    """Going on without cases that cannot be used."""
    parser.add_argument(
        "--skip-bad-cases", action="store_true", help="go on without cases that cannot be used, up to a tenth of them"
    )


def dataset_named(args: argparse.Namespace) -> Dataset:
    """The dataset of ``-d`` or ``-i``, with the patients of ``-patients``.

    Raises:
        UserError: It cannot be used.
    """
    from mtl_nnunet.cases import find_image_folder, find_nnunet_dataset, with_patients
    from mtl_nnunet.errors import UserError

    if args.channel_names and args.d:
        raise UserError("-channel_names goes with -i; with -d they stand in dataset.json.")
    dataset = (
        find_nnunet_dataset(args.d, args.skip_bad_cases)
        if args.d
        else find_image_folder(args.i, args.channel_names, args.skip_bad_cases)
    )
    return with_patients(dataset, args.patients) if args.patients else dataset


def scores_named(args: argparse.Namespace) -> list[Score]:
    """The scores of ``-score``, with the views of ``-views`` and ``-strength``.

    Raises:
        UserError: An unknown score, or options that do not go with any of them.
    """
    from mtl_nnunet.errors import UserError, listed
    from mtl_nnunet.scores import LABELLED, parse_score

    scores = [parse_score(s, args.views, args.strength) for s in score_words(args)]
    if args.labels and not any(s.labels for s in scores):
        raise UserError(
            f"-labels is given, and no score here uses labels. Choose one of {listed(LABELLED, len(LABELLED))}."
        )
    if (args.views or args.strength != 1) and all(s.views == "plain" for s in scores):
        raise UserError(
            "-views and -strength go with scores that compare views, and none is named here. Leave them out."
        )
    return scores


def cache_named(args: argparse.Namespace) -> ResultCache | None:
    """The cache of ``-cache``, or None with ``--no-cache``."""
    from mtl_nnunet.cache import ResultCache, default_folder

    return None if args.no_cache else ResultCache(args.cache or default_folder())


def available_device(wanted: str | None) -> str:
    """The device of ``-device``; of None a GPU where there is one.

    Raises:
        UserError: It is not there.
    """
    import torch

    from mtl_nnunet.errors import UserError

    if wanted is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available[wanted]:
        have = ", ".join(name for name, there in available.items() if there)
        raise UserError(f"-device {wanted} is not available on this machine. Available: {have}.")
    return wanted


def dataset_words(args: argparse.Namespace) -> list[Any]:
    """``-d`` or ``-i`` as typed."""
    return ["-d", args.d] if args.d else ["-i", args.i]


def weights_words(args: argparse.Namespace) -> list[Any]:
    """Network, patients, weights and channels as typed, where they are not the default."""
    words: list[Any] = []
    for name in ("encoder", "patients"):
        if getattr(args, name):
            words += [f"-{name}", getattr(args, name)]
    if args.weights != "default":
        words += ["-weights", args.weights]
    if args.channel_names:
        words += ["-channel_names", *args.channel_names]
    return words


def score_words(args: argparse.Namespace) -> list[str]:
    """The names of the scores, the default where none is typed."""
    return args.score or ["ccfv" if args.labels else "contrastive"]


def label_and_view_words(args: argparse.Namespace) -> list[Any]:
    """Labels, fold and views as typed, where they are not the default."""
    words: list[Any] = ["-labels"] if args.labels else []
    for name in ("f", "views"):
        if getattr(args, name) is not None:
            words += [f"-{name}", getattr(args, name)]
    return words


def sampling_words(args: argparse.Namespace) -> list[Any]:
    """What decides which slices and views are read."""
    words: list[Any] = ["--skip-bad-cases"] if args.skip_bad_cases else []
    for name in ("strength", "precision", "num_slices", "num_cases", "seed"):
        words += [f"-{name}", getattr(args, name)]
    return words


def whole(text: str, least: int, most: int = 2**32 - 1) -> int:
    """A whole number between two others, from what a user typed."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is no whole number") from None
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"{text} is not between {least} and {most}")
    return value


def one_or_more(text: str) -> int:
    """A whole number from 1."""
    return whole(text, 1)


def above_zero(text: str) -> float:
    """A number above 0, from what a user typed."""
    value = _number(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def zero_or_more(text: str) -> float:
    """A number from 0, from what a user typed."""
    value = _number(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not at least 0")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is no number") from None


def _two_or_more(text: str) -> int:
    return whole(text, 2)


def _seed(text: str) -> int:
    return whole(text, 0)


def _fold(text: str) -> int | str:
    return text if text == "all" else whole(text, 0)


def _strength(text: str) -> float:
    value = above_zero(text)
    if value > 2:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 2")
    return value
