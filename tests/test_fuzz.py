"""Whatever a file holds, reading it works or is refused with a UserError; nothing else comes out."""

from __future__ import annotations

import contextlib
import io
import math
import struct
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from conftest import DEMO_RUN, phantom
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from mtl_nnunet.cases import Case, read_case
from mtl_nnunet.checkpoints import find_checkpoints, read_contents
from mtl_nnunet.encoder import TimmEncoder
from mtl_nnunet.errors import UserError

fuzzed = settings(
    deadline=None,
    derandomize=True,
    max_examples=60,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


def said_in_one_sentence(error: UserError, file: Path) -> None:
    assert file.name in str(error)
    assert "\n" not in str(error)


# ---------------------------------------------------------------------------------------------------------------- NIfTI

DIM, DATATYPE, BITPIX, PIXDIM, VOX_OFFSET, SLOPE, CODES, SFORM = 40, 70, 72, 76, 108, 112, 252, 280
HEADER_SIZE = 352

numbers = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-30, 1e30, 3e38, math.nan, math.inf, -math.inf]),
    st.floats(width=32),
)
counts = st.one_of(st.integers(-3, 12), st.sampled_from([-32768, 32767, 256, 1024]))
edits = st.one_of(
    st.tuples(st.integers(0, HEADER_SIZE - 1), st.binary(min_size=1, max_size=4)),
    st.tuples(st.integers(0, 7).map(lambda i: DIM + 2 * i), counts.map(lambda n: struct.pack("<h", n))),
    st.tuples(st.integers(0, 7).map(lambda i: PIXDIM + 4 * i), numbers.map(lambda x: struct.pack("<f", x))),
    st.tuples(
        st.just(DATATYPE),
        st.sampled_from([(0, 0), (1, 1), (2, 8), (4, 16), (8, 32), (16, 32), (32, 64), (64, 64), (128, 24), (256, 8)])
        .flatmap(lambda kind: st.sampled_from([kind, (kind[0], 16)]))
        .map(lambda kind: struct.pack("<hh", *kind)),
    ),
    st.tuples(st.sampled_from([SLOPE, SLOPE + 4, VOX_OFFSET]), numbers.map(lambda x: struct.pack("<f", x))),
    st.tuples(st.sampled_from([CODES, CODES + 2]), counts.map(lambda n: struct.pack("<h", n))),
    st.tuples(st.integers(0, 17).map(lambda i: SFORM - 24 + 4 * i), numbers.map(lambda x: struct.pack("<f", x))),
    # several numbers of one field at once: shape, voxel size, orientation
    st.tuples(st.just(DIM), st.lists(counts, min_size=8, max_size=8).map(lambda ns: struct.pack("<8h", *ns))),
    st.tuples(st.just(PIXDIM), st.lists(numbers, min_size=8, max_size=8).map(lambda xs: struct.pack("<8f", *xs))),
    st.tuples(st.just(SFORM), st.lists(numbers, min_size=12, max_size=12).map(lambda xs: struct.pack("<12f", *xs))),
)


@pytest.fixture(scope="module")
def nifti(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small valid file: 8 x 9 x 6 voxels, int16, sform and qform set."""
    voxels = phantom((6, 9, 8), seed=1)[0][0].astype(np.int16)
    image = nibabel.Nifti1Image(voxels.transpose(2, 1, 0), np.diag([1.0, 1.5, 3.0, 1.0]))
    image.set_qform(image.affine, code=1)
    file = tmp_path_factory.mktemp("nifti") / "valid.nii"
    nibabel.save(image, file)
    return file.read_bytes()


def mutated(content: bytes, changes: list[tuple[int, bytes]]) -> bytes:
    changed = bytearray(content)
    for offset, new in changes:
        changed[offset : offset + len(new)] = new
    return bytes(changed)


def read_or_refuse(content: bytes, folder: Path, reader: str, as_label: bool = False) -> bool:
    """Whether the file was read; what was read is fit for use."""
    file = folder / "case_0000.nii"
    file.write_bytes(content)
    label = folder / "label.nii"
    try:
        # readers talk; what they say is not under test
        with contextlib.redirect_stdout(io.StringIO()), np.errstate(all="ignore"):
            image = read_case(
                Case("case", "case", (label,) if as_label else (file,), file if as_label else None), reader, 1
            )
    except UserError as error:
        said_in_one_sentence(error, file)
        return False
    assert image.voxels.dtype == np.float32
    assert image.voxels.ndim == 4
    assert image.voxels.shape[0] == 1
    assert image.voxels.size
    assert np.isfinite(image.voxels).all()
    assert all(math.isfinite(s) and s > 0 for s in image.spacing)
    if as_label:
        assert image.label is not None
        assert image.label.shape == image.voxels.shape[1:]
    return True


@pytest.mark.parametrize("reader", ["SimpleITKIO", "monai"])
@fuzzed
@given(changes=st.lists(edits, min_size=1, max_size=3))
def test_any_header_is_read_or_refused(
    nifti: bytes, tmp_path: Path, reader: str, changes: list[tuple[int, bytes]]
) -> None:
    read_or_refuse(mutated(nifti, changes), tmp_path, reader)


@pytest.mark.parametrize("reader", ["SimpleITKIO", "monai"])
@fuzzed
@given(changes=st.lists(edits, min_size=1, max_size=3))
def test_any_header_of_a_label_is_read_or_refused(
    nifti: bytes, tmp_path: Path, reader: str, changes: list[tuple[int, bytes]]
) -> None:
    (tmp_path / "label.nii").write_bytes(nifti)
    read_or_refuse(mutated(nifti, changes), tmp_path, reader, as_label=True)


@pytest.mark.parametrize("reader", ["SimpleITKIO", "monai"])
@fuzzed
@given(data=st.data())
def test_any_truncation_is_refused(nifti: bytes, tmp_path: Path, reader: str, data: st.DataObject) -> None:
    assert read_or_refuse(nifti, tmp_path, reader)
    kept = data.draw(st.integers(0, len(nifti) - 1))
    assert not read_or_refuse(nifti[:kept], tmp_path, reader)


# ---------------------------------------------------------------------------------------------------------- checkpoints

VALID = DEMO_RUN / "checkpoint-39.pth.tar"
keys = st.one_of(
    st.sampled_from(["state_dict", "model", "model_state_dict", "arch", "args", "epoch", "module.", "_orig_mod.", ""]),
    st.sampled_from(["conv1.0.weight", "bn1.weight", "fc.weight", "module.conv1.0.weight"]),
    st.text(max_size=5),
    st.integers(-2, 2),
    st.none(),
    st.booleans(),
    st.tuples(st.integers(0, 2)),
)
tensors = st.builds(
    lambda shape, dtype, fill: torch.full(shape, fill).to(dtype),
    st.lists(st.integers(0, 3), max_size=4),
    st.sampled_from(
        [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64]
    ),
    st.sampled_from([0.0, 1.0, math.nan, math.inf]),
)
odd_tensors = st.sampled_from(
    [
        torch.eye(3).to_sparse(),
        torch.empty(2, 3, device="meta"),
        torch.nn.Parameter(torch.ones(3)),
    ]
)
leaves = st.one_of(
    tensors,
    odd_tensors,
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["²", "7", "test_resnet", "9" * 5000, "a\nb"]),
)
nested = st.recursive(
    leaves,
    lambda inner: st.one_of(st.dictionaries(keys, inner, max_size=4), st.lists(inner, max_size=3)),
    max_leaves=8,
)


def one_by_one(weights: dict[str, torch.Tensor], source: str) -> None:
    """Load into an encoder, or refuse; what was loaded is finite."""
    encoder = TimmEncoder("test_resnet", 1)
    encoder.load_weights(weights, source)
    assert all(torch.isfinite(p).all() for p in encoder.parameters())


def use_or_refuse(file: Path) -> None:
    for use in (
        lambda: find_checkpoints([file]),
        lambda: find_checkpoints([file.parent]),
        lambda: one_by_one(read_contents(file).weights, str(file)),
    ):
        try:
            use()
        except UserError as error:
            said_in_one_sentence(error, file)


@fuzzed
@given(content=nested)
def test_any_content_of_a_checkpoint_is_read_or_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "run.pth")
    use_or_refuse(tmp_path / "run.pth")


@fuzzed
@given(extra=st.dictionaries(keys, nested, max_size=3), inside=st.dictionaries(keys, leaves, max_size=2))
def test_any_change_of_a_good_checkpoint_is_read_or_refused(
    tmp_path: Path, extra: dict[Any, Any], inside: dict[Any, Any]
) -> None:
    content = torch.load(VALID, weights_only=True)
    torch.save({**content, "state_dict": {**content["state_dict"], **inside}, **extra}, tmp_path / "run.pth")
    use_or_refuse(tmp_path / "run.pth")


@fuzzed
@given(data=st.data(), position=st.integers(0, 10**6), new=leaves)
def test_any_exchanged_tensor_is_loaded_or_refused(
    data: st.DataObject, position: int, new: Any, tmp_path: Path
) -> None:
    weights = dict(torch.load(VALID, weights_only=True)["state_dict"])
    name = sorted(weights)[position % len(weights)]
    old = weights[name]
    kinds = [lambda: new, lambda: old.to(torch.complex64), lambda: old.to_sparse(), lambda: old.to("meta")]
    kinds += [
        lambda: old.flatten(),
        lambda: old[None],
        lambda: old.to(torch.float8_e4m3fn),
        lambda: old.double() * 1e300,
    ]
    weights[name] = data.draw(st.sampled_from(kinds))()
    torch.save(weights, tmp_path / "run.pth")
    use_or_refuse(tmp_path / "run.pth")


def written(folder: Path, form: str) -> bytes:
    file = folder / f"valid.{form}"
    weights = dict(torch.load(VALID, weights_only=True)["state_dict"])
    if form == "safetensors":
        save_file(weights, file)
    else:
        torch.save({"state_dict": weights, "epoch": 3}, file, _use_new_zipfile_serialization=form == "pth")
    content = file.read_bytes()
    file.unlink()
    return content


@pytest.mark.parametrize("form", ["pth", "tar", "safetensors"], ids=["zip", "legacy", "safetensors"])
@fuzzed
@given(
    changes=st.lists(
        st.tuples(
            st.one_of(st.integers(0, 3000), st.integers(-3000, -1), st.integers(0, 10**7)), st.binary(max_size=3)
        ),
        max_size=4,
    ),
    cut=st.one_of(st.just(0), st.integers(0, 10**7)),
)
def test_any_damage_to_a_checkpoint_is_read_or_refused(
    tmp_path: Path, form: str, changes: list[tuple[int, bytes]], cut: int
) -> None:
    whole = written(tmp_path, form)
    content = mutated(whole, [(offset % len(whole), new) for offset, new in changes])
    file = tmp_path / f"run.{form}"
    file.write_bytes(content[: len(content) - cut % len(content)])
    use_or_refuse(file)
