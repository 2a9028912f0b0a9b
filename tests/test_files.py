"""Partial output never looks like complete output."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mtl_nnunet.errors import UserError
from mtl_nnunet.files import (
    files_written_together,
    folder_written_atomically,
    sha256,
    to_json,
    write_text,
    written_atomically,
)


@contextmanager
def tiny_disk() -> Iterator[None]:
    """No file can grow beyond 1,000 bytes; entered only around the writing, since pytest's own log is a file too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def everything(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b.txt", "old")
    with tiny_disk(), pytest.raises(UserError, match=r"could not write .*b\.txt: File too large"):
        write_text(tmp_path / "a" / "b.txt", "new" * 1000)
    assert (tmp_path / "a" / "b.txt").read_text() == "old"
    assert everything(tmp_path) == ["a", "a/b.txt"]


def test_an_error_of_the_writer_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), written_atomically(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        1 / 0  # noqa: B018
    assert everything(tmp_path) == []


def test_folder_is_whole_or_as_it_was(tmp_path: Path) -> None:
    with folder_written_atomically(tmp_path / "f") as temporary:
        (temporary / "a").write_text("old")
    assert everything(tmp_path) == ["f", "f/a"]
    with pytest.raises(UserError, match="exists already"), folder_written_atomically(tmp_path / "f"):
        pass
    with (
        tiny_disk(),
        pytest.raises(UserError, match="could not write"),
        folder_written_atomically(tmp_path / "f", True) as temporary,
    ):
        (temporary / "a").write_text("new")
        (temporary / "b").write_text("new" * 1000)
    assert (tmp_path / "f" / "a").read_text() == "old"
    assert everything(tmp_path) == ["f", "f/a"]
    with folder_written_atomically(tmp_path / "f", True) as temporary:
        (temporary / "b").write_text("new")
    assert everything(tmp_path) == ["f", "f/b"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for write in (lambda p: write_text(p, "x"), lambda p: folder_written_atomically(p).__enter__()):
        with pytest.raises(UserError, match="could not write"):
            write(tmp_path / "file" / "below")


def test_hash_is_sha256_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_json_has_no_nan() -> None:
    with pytest.raises(ValueError, match="Out of range"):
        to_json({"score": float("nan")})


@pytest.mark.skipif(not os.path.ismount("/dev/shm"), reason="/dev/shm is no disk of its own here")
def test_files_are_written_into_a_disks_topmost_folder() -> None:
    # as containers have them, whose user may write beside it too
    name = f"mtl_nnunet_test_{os.getpid()}.txt"
    try:
        with files_written_together("/dev/shm") as temporary:
            (temporary / name).write_text("whole")
        assert Path("/dev/shm", name).read_text() == "whole"
    finally:
        Path("/dev/shm", name).unlink(missing_ok=True)


def test_processes_of_the_same_number_do_not_write_into_one_file(tmp_path: Path) -> None:
    # the first process of every container is number 1
    with written_atomically(tmp_path / "results") as first, written_atomically(tmp_path / "results") as second:
        first.write_text("first")
        second.write_text("second")
        assert first.read_text() == "first"
    assert everything(tmp_path) == ["results"]
