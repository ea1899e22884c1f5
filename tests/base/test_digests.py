"""Digests of files: the cache serves no file that has changed, and files in use are noticed when they change."""

import hashlib
import os
from pathlib import Path

import pytest

from pipeline.base import digests
from pipeline.base.digests import WatchedFiles, sha256_of_file, stamp_of
from pipeline.base.errors import IdentityError, StorageError
from support.tally import tally

LARGE = bytes(range(256)) * 4096  # 1 MiB


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "weights").write_bytes(LARGE)
    return tmp_path / "weights"


def overwrite(file: Path, at: int = 100, content: bytes = b"other") -> str:
    """Overwrite in place with the size and the time of before, as `rsync --inplace -t` does; give the new digest."""
    before = file.stat()
    with file.open("r+b") as stream:
        stream.seek(at)
        stream.write(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_digest_is_read_once_for_a_file_that_stays(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = sha256_of_file(file)
    assert first == hashlib.sha256(LARGE).hexdigest()
    monkeypatch.setattr(digests, "read_sha256", lambda file: pytest.fail("read again"))
    assert sha256_of_file(file) == first


def test_a_file_overwritten_in_place_with_its_time_set_back_has_its_own_digest(file: Path) -> None:
    first = sha256_of_file(file)
    second = overwrite(file)
    assert sha256_of_file(file) == second != first


@pytest.mark.parametrize("at", [0, 100, len(LARGE) // 15 * 7 + 100, len(LARGE) - 5])
def test_a_change_that_leaves_all_times_is_noticed_by_the_sampled_blocks(
    file: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stamp = stamp_of(file)
    monkeypatch.setattr(digests, "stamp_of", lambda file: stamp)
    first = sha256_of_file(file)
    second = overwrite(file, at)
    assert sha256_of_file(file) == second != first


def test_a_damaged_cache_is_not_believed(file: Path, tmp_path: Path) -> None:
    right = sha256_of_file(file)
    cache = tmp_path / "cache/refshard/digests.json"
    for content in ("", "[]", "{", cache.read_text().replace(right[:8], "00000000").replace(" ", "")):
        cache.write_text(content)
        assert sha256_of_file(file) == right


@pytest.mark.parametrize("named", ["", "cache", None])
def test_a_cache_is_never_made_where_the_command_runs(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str | None
) -> None:
    """A variable that is set to nothing or to a relative folder counts as not set, as the XDG standard says."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    if named is None:
        monkeypatch.delenv("XDG_CACHE_HOME")
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", named)
    sha256_of_file(file)
    assert not list(Path().iterdir())
    assert (tmp_path / "home/.cache/refshard/digests.json").exists()
    tally("XDG_CACHE_HOME set to nothing or to a relative folder", 1, outcome="the cache is in the user's home")


def test_a_user_without_a_home_has_no_cache(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a container's user has none whose number is in no file of users."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert sha256_of_file(file) == hashlib.sha256(LARGE).hexdigest()


def test_files_in_use_may_be_linked_or_deleted_but_not_changed(file: Path, tmp_path: Path) -> None:
    watched = WatchedFiles([file], "Do this")
    watched.check_untouched()
    os.link(file, tmp_path / "backup")
    watched.check()
    overwrite(file)
    with pytest.raises(IdentityError, match=r"weights: changed while it was in use\. Do this"):
        watched.check()
    file.unlink()
    watched.check()


def test_a_file_that_was_replaced_and_put_back_while_it_was_loaded_is_noticed(file: Path, tmp_path: Path) -> None:
    watched = WatchedFiles([file])
    file.rename(tmp_path / "aside")
    file.write_bytes(b"other")
    (tmp_path / "aside").replace(file)
    assert file.read_bytes() == LARGE
    with pytest.raises(IdentityError, match="changed while it was in use"):
        watched.check_untouched()


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="missing: can't be written or read"):
        sha256_of_file(tmp_path / "missing")
