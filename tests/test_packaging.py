"""What the wheel carries, and that it works where there is no checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(PROJECT)]
    subprocess.run(command, check=True)
    (built,) = folder.glob("mtl_nnunet-*.whl")
    return built


@pytest.mark.slow
def test_wheel_carries_trainers_inside_the_package_only(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert "mtl_nnunet/trainers/mtl_nnunet_trainers.py" in names
    assert "mtl_nnunet/py.typed" in names
    assert {f"mtl_nnunet/{n}.html.jinja" for n in ("page", "parts", "report", "training")} <= set(names)
    assert "mtl_nnunet/demo_data/pretraining/checkpoint-39.pth.tar" in names
    for file in ("LICENSE", "docs/README.md", "configs/metadata.json", "configs/train.yaml", "configs/logging.conf"):
        assert f"mtl_nnunet/bundle/{file}" in names
    tops = {n.split("/")[0] for n in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"mtl_nnunet"}


@pytest.mark.slow
def test_trainers_of_an_installed_wheel_are_found_by_nnunet(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)], check=True
    )
    inherited = {k: v for k, v in os.environ.items() if k != "nnUNet_extTrainer"}
    environment = {**inherited, "PYTHONPATH": str(site)}
    printed = subprocess.run(
        [sys.executable, "-c", "from mtl_nnunet.cli.main import main; main(['trainers'])"],
        env=environment, check=True, capture_output=True, text=True, cwd=tmp_path,
    ).stdout.strip()  # fmt: skip
    assert Path(printed) == site / "mtl_nnunet" / "trainers"
    find = (
        "from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find;"
        "t = find('MTLTrainer'); print(t.__module__, __import__(t.__module__, fromlist='x').__file__)"
    )
    found = subprocess.run(
        [sys.executable, "-c", find],
        env={**environment, "nnUNet_extTrainer": printed}, check=True, capture_output=True, text=True, cwd=tmp_path,
    ).stdout.splitlines()[-1]  # fmt: skip
    assert found == f"mtl_nnunet.trainer {site / 'mtl_nnunet' / 'trainer.py'}"
