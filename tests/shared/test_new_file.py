"""A new file is whole and durable or not there, and never another's."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from bract.shared import new_file
from bract.shared.errors import UsageError


def test_a_full_disk_leaves_no_part_and_the_file_can_be_written_once_there_is_room(
    tmp_path: Path, file_limit: Callable[[int], AbstractContextManager[None]]
) -> None:
    path, content = tmp_path / "new", b"0123456789" * 1000
    with file_limit(1000), pytest.raises(UsageError, match=r"^cannot write .*new: File too large$"):
        new_file.write(content, path)
    assert list(tmp_path.iterdir()) == []
    new_file.check(path)
    new_file.write(content, path)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupt_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(KeyboardInterrupt):
        new_file.write(b"content", tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_file_and_folder_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, real = [], os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    new_file.write(b"content", tmp_path / "new")
    assert synced == [(tmp_path / "new").stat().st_ino, tmp_path.stat().st_ino]


@pytest.mark.parametrize("kind", ["file", "folder", "link", "dangling link"])
def test_what_is_there_is_left_alone_even_where_it_came_after_the_look(
    kind: str, tmp_path: Path
) -> None:
    path, target = tmp_path / "there", tmp_path / "target"
    if kind == "file":
        path.write_bytes(b"mine")
    elif kind == "folder":
        path.mkdir()
    else:
        target.write_bytes(b"mine") if kind == "link" else None
        path.symlink_to(target)
    before = sorted(tmp_path.iterdir())
    for refused in (lambda: new_file.check(path), lambda: new_file.write(b"other", path)):
        with pytest.raises(UsageError, match="there exists: nothing is overwritten"):
            refused()
    assert sorted(tmp_path.iterdir()) == before
    assert all(file.read_bytes() == b"mine" for file in (path, target) if file.is_file())


def test_a_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    path = tmp_path / "none" / "new"
    with pytest.raises(UsageError, match=r"^no folder .*none to write new into: make it first$"):
        new_file.check(path)
    with pytest.raises(UsageError, match=r"^cannot write .*new: No such file or directory$"):
        new_file.write(b"content", path)
