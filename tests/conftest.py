"""Small real-format inputs that every test file can build on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from jsonschema import Draft202012Validator

import mtl_nnunet
from mtl_nnunet import selection
from mtl_nnunet.files import to_json

# one small encoder of each family that is supported
FAMILIES = (
    "test_resnet",
    "test_convnext",
    "test_efficientnet",
    "regnety_002",
    "mobilenetv3_small_050",
    "swin_tiny_patch4_window7_224",
)
SELECTION_SCHEMA = Draft202012Validator(
    json.loads((Path(mtl_nnunet.__file__).parent / "selection.schema.json").read_text(encoding="utf-8"))
)
DEMO_RUN = Path(mtl_nnunet.__file__).parent / "demo_data" / "pretraining"
REAL_DATA = Path(os.environ.get("MTL_TEST_DATA", "no such folder"))
needs_real_data = pytest.mark.skipif(
    not (REAL_DATA / "Dataset004_Hippocampus").is_dir(),
    reason="MTL_TEST_DATA does not name the folder of real datasets",
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test finds another one's results."""
    monkeypatch.setenv("MTL_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _selections_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every selection that a test writes in this process is what its JSON Schema says."""
    make = selection._content

    def checked(*args: Any) -> dict[str, Any]:
        content = make(*args)
        SELECTION_SCHEMA.validate(json.loads(to_json(content)))
        return content

    monkeypatch.setattr(selection, "_content", checked)


@pytest.fixture(scope="session")
def demo_run() -> Path:
    """Folder of six checkpoints of a timm ``test_resnet``, epochs 0, 3, 8, 16, 25, 39."""
    return DEMO_RUN


@pytest.fixture
def nnunet_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty nnUNet_raw, nnUNet_preprocessed and nnUNet_results below the returned folder, set in the environment."""
    for name in ("raw", "preprocessed", "results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    return tmp_path


def phantom(shape: Sequence[int], seed: int, channels: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """An image (C, Z, Y, X) with a bright ball and a brighter core on textured ground, and its label (Z, Y, X)."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, s) if s > 1 else np.zeros(1) for s in shape], indexing="ij"))
    centre = rng.uniform(-0.25, 0.25, (len(shape), 1, 1, 1))
    distance = np.sqrt(((grid - centre) ** 2).sum(0))
    label = (distance < 0.6).astype(np.uint8) + (distance < 0.3).astype(np.uint8)
    image = np.stack([100 + (40 + 10 * c) * label + 5 * grid[-1] for c in range(channels)])
    return (image + rng.normal(0, 8, image.shape)).astype(np.float32), label


def write_image(path: Path, voxels: np.ndarray, spacing: Sequence[float] = (1.0, 1.0, 1.0)) -> None:
    """Write (Z, Y, X) voxels with a spacing in (z, y, x)."""
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing([float(s) for s in spacing][::-1])
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))


def write_phantoms(
    folder: Path,
    num_cases: int = 6,
    shape: Sequence[int] = (12, 40, 36),
    spacing: Sequence[float] = (2.0, 1.0, 1.0),
    channel_names: Sequence[str] = ("MRI",),
    ending: str = ".nii.gz",
    seed: int = 0,
) -> Path:
    """Write an nnU-Net raw dataset of phantoms."""
    for i in range(num_cases):
        image, label = phantom(shape, seed=seed + i, channels=len(channel_names))
        for c, voxels in enumerate(image):
            write_image(folder / "imagesTr" / f"case_{i:02d}_{c:04d}{ending}", voxels, spacing)
        write_image(folder / "labelsTr" / f"case_{i:02d}{ending}", label, spacing)
    description = {
        "channel_names": {str(c): name for c, name in enumerate(channel_names)},
        "labels": {"background": 0, "ball": 1, "core": 2},
        "numTraining": num_cases,
        "file_ending": ending,
    }
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder


@pytest.fixture
def make_dataset(nnunet_folders: Path) -> Callable[..., Path]:
    """A function that writes an nnU-Net raw dataset of phantoms below nnUNet_raw and returns its folder."""

    def make(number: int = 1, **options: Any) -> Path:
        return write_phantoms(nnunet_folders / "raw" / f"Dataset{number:03d}_Phantom", seed=100 * number, **options)

    return make


class Workplace:
    """nnU-Net's three folders, and its commands run in them.

    Args:
        root: Where the folders are made.
        dataset: Whose models ``model`` finds.
        trainer: That they were trained with, unless it is told another.
        iterations: Per epoch, training and validation.
    """

    def __init__(self, root: Path, dataset: str, trainer: str, iterations: str = "10,2"):
        self.root = root
        self.dataset = dataset
        self.trainer = trainer
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("nnUNet_")}
        self.environment = {
            **inherited,
            **{f"nnUNet_{k}": str(root / k) for k in ("raw", "preprocessed", "results")},
            "nnUNet_n_proc_DA": "1",
            "nnUNet_def_n_proc": "1",
            # trainings share the cores: a thread that waits must not keep one busy
            "OMP_WAIT_POLICY": "PASSIVE",
            "MTL_ITERATIONS_PER_EPOCH": iterations,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        for folder in ("raw", "preprocessed", "results"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        self.environment["nnUNet_extTrainer"] = self.run("mtl-nnunet", "trainers").stdout.strip()

    def start(self, *command: str, **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            env={**self.environment, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *command: str, fails: bool = False) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        assert (done.returncode != 0) == fails, f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done

    def run_together(self, *commands: Sequence[str]) -> None:
        begun = [self.start(*command) for command in commands]
        for command, process in zip(commands, begun, strict=True):
            output, _ = process.communicate()
            assert process.returncode == 0, f"{' '.join(command)}\n{output[-6000:]}"

    def model(self, trainer: str | None = None, plans: str = "nnUNetPlans", configuration: str = "2d") -> Path:
        return self.root / "results" / self.dataset / f"{trainer or self.trainer}__{plans}__{configuration}"


@pytest.fixture(scope="session")
def chooser_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chooser that reads the published score, as the shipped one does not, fitted on simulated curves."""
    from test_chooser import SCORE, simulated

    from mtl_nnunet.chooser import Chooser, write_chooser
    from mtl_nnunet.chooser_fit import fit_state

    curves = [replace(c, scores={SCORE: c.scores["seen"]}) for c in simulated(12, 0)[0]]
    path = tmp_path_factory.mktemp("chooser") / "mine.json"
    state = fit_state(curves, (SCORE,))
    write_chooser(Chooser({"free": state, "frozen": state}, {"of": "simulated curves"}), path)
    return path
