"""Our scores with labels against their public implementations, on the same features, in one run.

Prints seconds of each, ours also with the error bars over patients that the others do not have.

    python benchmarks/peers.py -logme LogME/LogME.py -ccfv CCFV/utils/ccfv.py -hscore tllib/ranking/hscore.py -gbc gbc.py

The peers: thuml/LogME (needs numba; compiled before it is timed), EndoluminalSurgicalVision-IMR/CCFV, tllib of
thuml/Transfer-Learning-Library, and for GBC a NumPy copy of google-research's stable_transfer/transferability/gbc.py.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from itertools import combinations

import numpy as np
import torch

from mtl_nnunet.scores import ccfv, gbc, hscore, logme


def module_of(path):
    specification = importlib.util.spec_from_file_location("peer", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def seconds_of(function, repeats):
    function()
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        value = function()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken), value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-logme")
    parser.add_argument("-ccfv")
    parser.add_argument("-hscore")
    parser.add_argument("-gbc")
    parser.add_argument("-repeats", type=int, default=3)
    args = parser.parse_args()
    for n, d, num_patients in ((4096, 256, 64), (4096, 1024, 64), (1000, 2048, 16)):
        compare_all(args, n, d, num_patients)


def compare_all(args, n, d, num_patients):
    rng = np.random.default_rng(0)
    patients = np.arange(n) % num_patients
    labels = (np.arange(n) // num_patients) % 3
    x = (rng.normal(size=(n, d)) + 0.3 * rng.normal(size=(3, d))[labels]).astype(np.float32)
    features = torch.from_numpy(x)

    def compare(name, ours, with_bars, theirs):
        a, value = seconds_of(ours, args.repeats)
        b, _ = seconds_of(with_bars, args.repeats)
        c, their_value = seconds_of(theirs, args.repeats)
        print(
            f"N={n} D={d} {name:<7} ours {a:7.3f} s ({value:.5g}), with error bars {b:7.3f} s, public {c:7.3f} s "
            f"({their_value:.5g}); public / ours {c / a:.2f}, with bars {c / b:.2f}",
            flush=True,
        )

    if args.logme:
        peer = module_of(args.logme)
        compare(
            "logme",
            lambda: logme.logme(features, labels),
            lambda: logme.statistic(features, labels, patients),
            lambda: peer.LogME(regression=False).fit(x.astype(np.float64), labels),
        )
    if args.hscore:
        peer = module_of(args.hscore)
        compare(
            "hscore",
            lambda: float(hscore.hscore(features, labels)),
            lambda: hscore.statistic(features, labels, patients),
            lambda: peer.h_score(x.astype(np.float64), labels),
        )
    if args.gbc:
        peer = module_of(args.gbc)
        compare(
            "gbc",
            lambda: float(gbc.gbc(features, labels, "diagonal")),
            lambda: gbc.statistic(features, labels, patients, d, "diagonal"),
            lambda: peer.GBC(None).score(x.astype(np.float64), labels, "diagonal"),
        )
    if args.ccfv and d <= 256:
        peer = module_of(args.ccfv)
        rows = {(p, c): x[(patients == p) & (labels == c)] for p in range(num_patients) for c in (1, 2)}
        # one pair is timed and multiplied: all of them would take an hour
        pairs = list(combinations(range(num_patients), 2))
        one = [peer.cal_w_distance(rows[0, 1].astype(float), rows[1, 1].astype(float))]

        def public():
            started = time.perf_counter()
            peer.cal_w_distance(rows[0, 1].astype(float), rows[1, 1].astype(float))
            pair = time.perf_counter() - started
            started = time.perf_counter()
            peer.cal_variety(x)
            one[0] = 2 * len(pairs) * pair + time.perf_counter() - started
            return one[0]

        a, _ = seconds_of(lambda: ccfv.ccfv(features, labels, patients), args.repeats)
        print(
            f"N={n} D={d} ccfv    ours {a:7.3f} s with error bars, public {public():7.3f} s (from one of its pairs); ratio {one[0] / a:.0f}"
        )


if __name__ == "__main__":
    main()
