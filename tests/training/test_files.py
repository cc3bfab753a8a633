"""Files that are written whole or not at all, and what is said when they cannot be."""

import errno
import os
from pathlib import Path

import pytest

from vestige.errors import RecipeError, StorageError
from vestige.training.files import LOCK, locked, read_json, write_bytes, write_json, writing


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_keeps_what_was_there(call, tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_json(path, {"a": 1})

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(StorageError) as told:
        write_json(path, {"a": 2})
    assert str(told.value).startswith(
        f"could not write {path}: No space left on device; free some space"
    )
    assert told.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == [path]
    assert read_json(path) == {"a": 1}


def test_a_folder_that_is_a_file_is_told(tmp_path):
    (tmp_path / "run").write_text("in the way")
    with pytest.raises(StorageError, match=r"run/a\.json: .*nothing is in the way"):
        write_bytes(tmp_path / "run/a.json", b"")
    assert (tmp_path / "run").read_text() == "in the way"


def test_what_was_told_is_not_told_again(tmp_path):
    outer, inner = writing(tmp_path / "outer"), writing(tmp_path / "inner")
    with pytest.raises(StorageError, match="inner"), outer, inner:
        raise OSError(errno.EIO, "x")


def test_a_stop_while_a_file_is_written_leaves_nothing_of_it(tmp_path, monkeypatch):
    def stop(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        write_bytes(tmp_path / "a", b"x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"\xff", b"[1]", b"3", b"{", b"[" * 100_000, None])
def test_what_is_no_mapping_is_read_as_nothing(content, tmp_path):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    assert read_json(path) is None


def test_a_lock_is_held_once_and_goes_with_its_block(tmp_path):
    folder = tmp_path / "run"
    with locked(folder):
        with (
            pytest.raises(RecipeError, match=r"another process is running in .*run"),
            locked(folder),
        ):
            pass
        assert (folder / LOCK).exists()
    with locked(folder), locked(None):
        pass
    assert list(Path(folder).iterdir()) == []
