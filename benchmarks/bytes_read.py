"""What sampling a large dataset reads and holds: only the sampled cases, one at a time a worker.

Writes a few volumes of 512 x 512 x 300 and gives them a thousand names, samples some of the cases, and prints bytes read (the
operating system's count, Linux only) against the bytes of the sampled files, and the peak memory.

    python benchmarks/bytes_read.py -o /some/empty/folder -num_cases 16
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from mtl_nnunet.cases import find_nnunet_dataset
from mtl_nnunet.slices import gather_slices


def bytes_read() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar")).split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", required=True)
    parser.add_argument("-num_volumes", type=int, default=1000)
    parser.add_argument("-num_cases", type=int, default=16)
    parser.add_argument("-num_slices", type=int, default=64)
    parser.add_argument("-num_workers", type=int, default=2)
    args = parser.parse_args()
    folder = Path(args.o) / "Dataset990_Large"
    (folder / "imagesTr").mkdir(parents=True)
    (folder / "labelsTr").mkdir()
    rng = np.random.default_rng(0)
    for i in range(4):
        # noise in few grey levels, so that compression is like that of real scans
        voxels = rng.integers(-100, 100, (300, 512, 512), dtype=np.int16)
        voxels[:, 100:400, 100:400] += np.int16(200 + 20 * i)
        image = sitk.GetImageFromArray(voxels)
        image.SetSpacing((0.8, 0.8, 1.5))
        label = sitk.GetImageFromArray((voxels > 250).astype(np.uint8))
        label.SetSpacing((0.8, 0.8, 1.5))
        sitk.WriteImage(image, str(folder / f"image_{i}.nii.gz"), useCompression=True, compressionLevel=1)
        sitk.WriteImage(label, str(folder / f"label_{i}.nii.gz"), useCompression=True, compressionLevel=1)
    for i in range(args.num_volumes):
        os.link(folder / f"image_{i % 4}.nii.gz", folder / "imagesTr" / f"case_{i:04d}_0000.nii.gz")
        os.link(folder / f"label_{i % 4}.nii.gz", folder / "labelsTr" / f"case_{i:04d}.nii.gz")
    description = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "a": 1},
        "numTraining": args.num_volumes,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(description))
    os.environ["nnUNet_raw"] = args.o
    size = sum((folder / f"{kind}_0.nii.gz").stat().st_size for kind in ("image", "label"))
    idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    before, started = bytes_read(), time.perf_counter()
    dataset = find_nnunet_dataset(990)
    found = bytes_read() - before
    slices = gather_slices(dataset, args.num_slices, args.num_cases, num_workers=args.num_workers)
    total = bytes_read() - before
    print(
        f"{args.num_volumes} cases of 512 x 512 x 300, {size / 2**20:.0f} MiB each: finding them read {found / 2**20:.1f} MiB; sampling "
        f"{len(slices.used)} of them read {total / 2**20:.0f} MiB = {total / size / len(slices.used):.2f} times their files, in "
        f"{time.perf_counter() - started:.0f} s with {args.num_workers} workers"
    )
    volume = 512 * 512 * 300 * 4 / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"peak memory {peak / 2**20:.2f} GiB ({(peak - idle) / 2**10 / volume / args.num_workers:.1f} volumes of float32 a worker); slices {slices.images.nbytes / 2**20:.0f} MiB"
    )


if __name__ == "__main__":
    main()
