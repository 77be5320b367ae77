from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bract.shared import keyfiles, keys
from bract.shared.errors import UsageError


def files(folder: Path) -> list[keyfiles.NewFile]:
    return [
        keyfiles.public(folder / "a", b"public"),
        keyfiles.private(folder / "b", b"secret"),
        keyfiles.private(folder / "deep/c", b"secret"),
    ]


def test_files_hold_their_bytes_and_only_public_ones_are_open(tmp_path: Path) -> None:
    before = os.umask(0)  # the loosest: nothing but the mode asked for protects the key
    try:
        keyfiles.create(files(tmp_path / "new"))
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "new").rglob("*")}
    assert modes == {"a": 0o644, "b": 0o600, "deep": 0o700, "c": 0o600}
    assert (tmp_path / "new/deep/c").read_bytes() == b"secret"


@given(there=st.sets(st.sampled_from(["a", "b", "deep/c"]), min_size=1))
def test_where_one_exists_nothing_is_written(
    there: set[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("keys")
    (folder / "deep").mkdir()
    for name in there:
        (folder / name).write_text("old")
    with pytest.raises(UsageError, match="never overwritten"):
        keyfiles.create(files(folder))
    found = {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}
    assert found == dict.fromkeys(there, "old")


def test_where_one_exists_not_even_a_folder_is_made(tmp_path: Path) -> None:
    (tmp_path / "b").write_text("old")
    wanted = [keyfiles.private(tmp_path / path, b"secret") for path in ("new/a", "b")]
    with pytest.raises(UsageError, match="b exists"):
        keyfiles.create(wanted)
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_a_dangling_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "b").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="b exists"):
        keyfiles.create(files(tmp_path))
    assert not (tmp_path / "elsewhere").exists()
    assert not (tmp_path / "a").exists()


def test_a_file_that_appears_meanwhile_is_kept_and_the_others_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "b").write_text("another process")
    monkeypatch.setattr(os.path, "lexists", lambda path: False)
    with pytest.raises(UsageError, match="b exists"):
        keyfiles.create(files(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["b"]
    assert (tmp_path / "b").read_text() == "another process"


def test_a_full_disk_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []

    def fsync(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UsageError, match=r"cannot write .*b: No space left"):
        keyfiles.create(files(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_every_file_and_folder_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    keyfiles.create(files(tmp_path))
    wanted = [tmp_path, *tmp_path.rglob("*")]
    assert sorted(synced) == sorted(p.stat().st_ino for p in wanted)


def test_a_file_where_the_folder_should_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "new").write_text("")
    with pytest.raises(UsageError, match="new is a file"):
        keyfiles.create(files(tmp_path / "new"))


def test_a_secret_is_not_in_the_repr() -> None:
    assert "secret" not in repr(keyfiles.private(Path("key.pem"), b"secret"))


def test_a_saved_signing_key_is_private_and_never_overwritten(tmp_path: Path) -> None:
    key = keys.generate()
    keys.save(key, tmp_path / "key.pem")
    assert stat.S_IMODE((tmp_path / "key.pem").stat().st_mode) == 0o600
    assert keys.load(tmp_path / "key.pem").public == key.public
    with pytest.raises(UsageError, match="never overwritten"):
        keys.save(keys.generate(), tmp_path / "key.pem")
    assert keys.load(tmp_path / "key.pem").public == key.public


def test_a_key_that_others_may_read_is_told_of_once_where_it_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keyfiles.warn_if_open.cache_clear()
    path = tmp_path / "ledger.pem"
    keys.save(keys.generate(), path)
    keys.load(path)
    assert caplog.records == []
    keyfiles.warn_if_open.cache_clear()
    path.chmod(0o640)
    for _ in range(2):
        keys.load(path)
    (told,) = caplog.records
    assert told.getMessage() == f"private key: mode 0640 opens it to others: chmod 600 {path}"
