"""Files are whole or absent: what a second writer, a failing disk and a damaged file lead to."""

import contextlib
import ctypes
import dataclasses
import errno
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.base import files
from pipeline.base.digests import read_sha256
from pipeline.base.errors import ConfigError, DataError, StorageError
from pipeline.base.files import make_folder, put_if_absent, read_json, replace_file
from pipeline.base.folders import LocalFolder
from pipeline.config.data import DataConfig
from pipeline.config.reader import load_config
from pipeline.data.readers import open_parquet
from pipeline.data.sources import open_source, read_rows
from pipeline.models.files import NamedModel
from pipeline.replies.records import read_generations
from support.processes import ROOT

Write = Callable[[Path, bytes], Any]


def _names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def _fail(monkeypatch: pytest.MonkeyPatch, call: str, number: int) -> None:
    """Let a call of the operating system fail as it does: with an OSError of this number."""

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, refuse)


@pytest.mark.parametrize("content", [b"", b"x", bytes(range(256)) * 5000], ids=["empty", "byte", "large"])
def test_a_new_file_holds_the_content_and_nothing_else_is_left(tmp_path: Path, content: bytes) -> None:
    assert put_if_absent(tmp_path / "part", content) is True
    assert (tmp_path / "part").read_bytes() == content
    assert _names(tmp_path) == ["part"]


def test_the_second_writer_loses_and_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "part"
    put_if_absent(file, b"first")
    before = file.stat()
    assert put_if_absent(file, b"second") is False
    assert file.read_bytes() == b"first"
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert _names(tmp_path) == ["part"]


def test_a_new_folder_is_synced_into_those_that_it_lies_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr(files, "_sync", synced.append)
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    assert sorted(synced) == [tmp_path, tmp_path / "a"]
    make_folder(tmp_path / "a" / "b")
    assert len(synced) == 2


def test_of_many_writers_at_once_exactly_one_wins(tmp_path: Path) -> None:
    file, won = tmp_path / "part", []
    start = threading.Barrier(8)

    def write(number: int) -> None:
        start.wait()
        if put_if_absent(file, b"%d" % number * 1000):
            won.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert file.read_bytes() == b"%d" % won[0] * 1000
    assert _names(tmp_path) == ["part"]


def test_a_link_that_was_made_but_reported_as_taken_counts_as_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def link_twice(source: Any, target: Any) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", link_twice)
    assert put_if_absent(tmp_path / "part", b"ours") is True
    assert _names(tmp_path) == ["part"]


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, bytes(data[:7])))
    put_if_absent(tmp_path / "part", bytes(range(100)))
    assert (tmp_path / "part").read_bytes() == bytes(range(100))


def test_the_bytes_are_synced_before_the_name_and_the_folder_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, link = os.fsync, os.link

    def watch_fsync(descriptor: int) -> None:
        done.append("sync folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "sync file")
        fsync(descriptor)

    def watch_link(source: Any, target: Any) -> None:
        done.append("link")
        link(source, target)

    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(os, "link", watch_link)
    put_if_absent(tmp_path / "part", b"x")
    assert done == ["sync file", "link", "sync folder"]


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
@pytest.mark.parametrize(
    ("write", "order"),
    [
        ("put_if_absent", "open tmp, write tmp, fsync tmp, link, unlink tmp, open folder, fsync folder"),
        ("replace_file", "open tmp, write tmp, fsync tmp, rename, open folder, fsync folder"),
    ],
)
def test_the_system_is_asked_in_this_order(tmp_path: Path, write: str, order: str) -> None:
    """As the kernel sees it: whatever Python does in between."""
    file = str(tmp_path / "part")
    program = f"from pathlib import Path; from pipeline.base.files import {write}; {write}(Path({file!r}), b'x')"
    log = tmp_path.with_name(f"{tmp_path.name}.log")
    traced = "openat,write,fsync,fdatasync,link,linkat,rename,renameat,renameat2,unlink,unlinkat"
    done = subprocess.run(
        ["strace", "-f", "-y", "-e", f"trace={traced}", "-o", str(log), sys.executable, "-c", program],
        capture_output=True,
        cwd=ROOT,
    )
    if done.returncode and b"ptrace" in done.stderr:
        pytest.skip("no right to trace here")
    asked = []
    for line in log.read_text().splitlines():
        if str(tmp_path) not in line or "= -1" in line:
            continue
        # Not every processor has the calls without `at`.
        call = line.split(maxsplit=1)[1].partition("(")[0].removesuffix("2").removesuffix("at")
        what = "" if call in ("link", "rename") else " tmp" if ".tmp-" in line else " folder"
        asked.append(call + what)
    assert ", ".join(asked) == order


@pytest.mark.parametrize("call", ["open", "write", "fsync", "link"])
@pytest.mark.parametrize(
    ("number", "says"),
    [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "the disk is full"), (errno.EIO, os.strerror(errno.EIO))],
)
def test_a_failing_disk_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, says: str
) -> None:
    _fail(monkeypatch, call, number)
    with pytest.raises(StorageError) as caught:
        put_if_absent(tmp_path / "part", b"content")
    monkeypatch.undo()
    assert caught.value.exit_status == 74
    assert str(tmp_path / "part") in str(caught.value)
    assert says in str(caught.value)
    assert _names(tmp_path) == []


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS])
def test_without_hard_links_a_rename_that_replaces_nothing_commits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    _fail(monkeypatch, "link", number)
    assert put_if_absent(tmp_path / "part", b"first") is True
    assert put_if_absent(tmp_path / "part", b"second") is False
    assert (tmp_path / "part").read_bytes() == b"first"
    assert _names(tmp_path) == ["part"]


def test_a_file_system_that_cannot_put_if_absent_is_named_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoRename:
        """A C library in which `renameat2` is missing."""

    monkeypatch.setattr(ctypes, "CDLL", lambda *arguments, **settings: NoRename())
    _fail(monkeypatch, "link", errno.EPERM)
    with pytest.raises(StorageError, match=r"neither hard links nor renames that replace nothing\. Choose a folder on"):
        put_if_absent(tmp_path / "part", b"content")
    assert _names(tmp_path) == []


def test_a_temporary_file_that_is_cleaned_away_under_its_writer_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link, cleaned = os.link, []

    def clean_first(source: Any, target: Any) -> None:
        if not cleaned:
            Path(source).unlink()
            cleaned.append(source)
        link(source, target)

    monkeypatch.setattr(os, "link", clean_first)
    assert put_if_absent(tmp_path / "part", b"content") is True
    assert cleaned
    assert (tmp_path / "part").read_bytes() == b"content"
    assert _names(tmp_path) == ["part"]


@pytest.mark.parametrize("write", [put_if_absent, replace_file])
def test_a_folder_that_is_missing_or_a_file_is_a_storage_error(tmp_path: Path, write: Write) -> None:
    (tmp_path / "file").write_bytes(b"")
    for folder in ("missing", "file"):
        with pytest.raises(StorageError, match="can't be written"):
            write(tmp_path / folder / "part", b"content")
    assert _names(tmp_path) == ["file"]


def test_replacing_gives_the_new_content(tmp_path: Path) -> None:
    for content in (b"old", b"new and longer", b""):
        replace_file(tmp_path / "run.json", content)
        assert (tmp_path / "run.json").read_bytes() == content
    assert _names(tmp_path) == ["run.json"]


@pytest.mark.parametrize("call", ["open", "write", "fsync"])
def test_a_failed_replacement_keeps_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    replace_file(tmp_path / "run.json", b"old")
    _fail(monkeypatch, call, errno.ENOSPC)
    with pytest.raises(StorageError, match=r"the disk is full\. Free some space and run the same command again"):
        replace_file(tmp_path / "run.json", b"new")
    monkeypatch.undo()
    assert (tmp_path / "run.json").read_bytes() == b"old"
    assert _names(tmp_path) == ["run.json"]


def test_a_json_object_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": [1, "é"]}', encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"a": [1, "é"]}


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b'{"a": 1', b'{"a": 1}}', b"\xff\xfe{", b'"text"', b"[1]", b"null", b"\x00" * 20, b"[" * 100_000],
    ids=["empty", "cut", "cut later", "doubled", "not UTF-8", "text", "list", "null", "zeros", "deep"],
)
def test_damaged_json_is_a_data_error_that_names_the_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.json: damaged") as caught:
        read_json(tmp_path / "a.json")
    assert caught.value.exit_status == 65


def test_json_that_cannot_be_read_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"missing\.json: can't be written or read"):
        read_json(tmp_path / "missing.json")


def _make(kind: str, path: Path) -> None:
    match kind:
        case "a FIFO":
            os.mkfifo(path)
        case "a socket":
            with socket.socket(socket.AF_UNIX) as opened, contextlib.chdir(path.parent):
                opened.bind(path.name)
        case "a device":
            path.symlink_to("/dev/zero")
        case _:
            path.mkdir()


@pytest.mark.parametrize("kind", ["a FIFO", "a socket", "a device", "a folder"])
def test_regular_files_alone_are_opened_anywhere(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    _make(kind, path)
    readers: list[tuple[type[Exception], Callable[[], Any]]] = [
        (DataError, lambda: read_json(path)),
        (DataError, lambda: read_sha256(path)),
        (DataError, lambda: LocalFolder(tmp_path).read(path.name)),
        (DataError, lambda: read_generations(path)),
        (DataError, lambda: open_parquet(path)),
        (ConfigError, lambda: load_config(path)),
    ]
    if kind != "a folder":
        source = open_source(DataConfig(path=str(ROOT / "README.md"), format="jsonl"))
        readers += [
            (ConfigError, lambda: open_source(DataConfig(path=str(path)))),
            (DataError, lambda: list(read_rows(dataclasses.replace(source, files=(path,))))),
            (ConfigError, lambda: NamedModel(str(tmp_path), None, "policy.model").folder()),
        ]
    for error, read in readers:
        with pytest.raises(error, match=rf"must (be a|hold) regular file.*, got .*{kind}"):
            read()


def test_no_more_is_read_than_a_file_may_hold(tmp_path: Path) -> None:
    (tmp_path / "large.json").write_bytes(b"{}")
    os.truncate(tmp_path / "large.json", 2**40)
    for read in (lambda: read_json(tmp_path / "large.json"), lambda: LocalFolder(tmp_path).read("large.json")):
        with pytest.raises(DataError, match=r"large\.json: must have at most .* bytes, got 1,099,511,627,776"):
            read()
    with pytest.raises(ConfigError, match=r"policy\.model: .*must hold regular files, got .*large\.json, 1,099"):
        NamedModel(str(tmp_path), None, "policy.model").folder()


def test_only_names_of_the_form_are_deleted_and_links_are_not_followed(tmp_path: Path) -> None:
    mine, folder = tmp_path / "mine", tmp_path / "run"
    for path in (mine / "a", folder / "0001" / "b", folder / "notes"):
        path.mkdir(parents=True)
    (folder / "0002").symlink_to(mine, target_is_directory=True)
    files.delete_named(folder, re.compile("[0-9]{4}"))
    assert [path.name for path in folder.iterdir()] == ["notes"]
    assert (mine / "a").exists()
    (folder / "notes").rmdir()
    files.delete_named(folder, re.compile("[0-9]{4}"))
    assert not folder.exists()
    files.delete_named(folder, re.compile("[0-9]{4}"))
