"""Small real-format inputs that every test file can build on."""

from __future__ import annotations

import atexit
import json
import logging
import multiprocessing
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from multiprocessing.pool import ThreadPool
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from unittest import mock

import matplotlib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from jsonschema import Draft202012Validator

import mtl_nnunet
from mtl_nnunet import html_report, selection
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
def _own_process() -> Iterator[None]:
    """What libraries, scripts and commands set for their whole process does not reach the next test.

    MONAI's bundles set the logging and the generators, nnU-Net's plots matplotlib's defaults, scripts the number of threads
    and nnU-Net's folders.
    """
    root, cudnn = logging.getLogger(), torch.backends.cudnn
    handlers, level = root.handlers[:], root.level
    threads, deterministic, benchmark = torch.get_num_threads(), cudnn.deterministic, cudnn.benchmark
    # no default seed of ours, whose random networks would come twice
    random.seed(1201)
    np.random.seed(1201)
    torch.manual_seed(1201)
    with mock.patch.dict(os.environ), matplotlib.rc_context():
        yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    cudnn.deterministic, cudnn.benchmark = deterministic, benchmark
    # pytest's own come and go by themselves
    for handler in set(root.handlers) - set(handlers):
        if not type(handler).__module__.startswith("_pytest."):
            root.removeHandler(handler)
    root.setLevel(level)


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


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that read what was chosen and not how it looks: drawing takes longer than scoring a tiny run."""
    monkeypatch.setattr(html_report, "write_report", lambda folder, *_: (folder / "report.html").write_text("undrawn"))


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


@contextmanager
def nnunet_folders_below(root: Path) -> Iterator[None]:
    """nnU-Net's three folders, set in the environment."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("raw", "preprocessed", "results"):
            (root / name).mkdir(parents=True, exist_ok=True)
            patch.setenv(f"nnUNet_{name}", str(root / name))
        yield


def plan_with_nnunet(*numbers: int, preprocessed: str | None = None) -> None:
    """What ``nnUNetv2_plan_and_preprocess`` does, by the same functions, in this process.

    Args:
        numbers: Of the datasets.
        preprocessed: Which configuration of the first one is preprocessed.
    """
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
    from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiments, preprocess

    # threads in place of processes, each of which would import torch for longer than it works
    pools = SimpleNamespace(Pool=ThreadPool)
    with mock.patch.object(multiprocessing, "get_context", return_value=pools):
        for number in numbers:
            fingerprint = DatasetFingerprintExtractor(number, num_processes=1)
            # nnU-Net draws 10**8 voxels, of foregrounds that have a few thousand here
            fingerprint.num_foreground_voxels_for_intensitystats = 10**6
            fingerprint.run(overwrite_existing=True)
        plan_experiments(list(numbers))
        if preprocessed:
            preprocess(numbers[:1], configurations=[preprocessed], num_processes=[1])


FORKS = """
import json, os, sys
exec(sys.argv[1])
for line in sys.stdin:
    code, arguments, environment, folder, files = json.loads(line)
    child = os.fork()
    if not child:
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        for descriptor, file in enumerate((os.devnull, *files)):
            os.dup2(os.open(file, os.O_RDWR | os.O_CREAT), descriptor)
        sys.argv = arguments
        exec(code)
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@cache
def forking(imports: str) -> subprocess.Popen[str]:
    """A process that has imported what its children will need, as ``run_forked`` asks for them."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FORKS, imports]
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(process.kill)
    return process


def run_forked(
    code: str, arguments: Sequence[str], environment: Mapping[str, str], folder: Path, imports: str
) -> subprocess.CompletedProcess[str]:
    """What ``python -c CODE`` does, in a process of its own that need not import the large libraries first.

    Args:
        code: What is executed.
        arguments: ``sys.argv``.
        environment: All of it; a library that is imported before reads it no more.
        folder: Where it runs.
        imports: Code that is executed once for all commands that name it, with one thread each.
    """
    with TemporaryDirectory() as temporary:
        files = [str(Path(temporary, name)) for name in ("out", "err")]
        process = forking(imports)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps([code, list(arguments), dict(environment), str(folder), files]) + "\n")
        process.stdin.flush()
        status = int(process.stdout.readline())
        out, err = (Path(file).read_text(encoding="utf-8") for file in files)
    return subprocess.CompletedProcess(list(arguments), status, out, err)


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
