"""Folders here and on an S3 server: one contract, and what faults of the network and of the store come to."""

import multiprocessing
import pickle
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.base.errors import ConfigError, StorageError
from pipeline.base.folders import Folder, LocalFolder, ObjectFolder, open_folder
from support.object_store import BUCKET, CREDENTIALS, Fault, environment, faulty, s3_server

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3_server() as address:
        yield address


@pytest.fixture
def s3(server: str) -> Iterator[ObjectFolder]:
    """A folder of its own on the server."""
    with environment(AWS_ENDPOINT_URL=server, **CREDENTIALS):
        yield ObjectFolder(f"s3://{BUCKET}/{uuid.uuid4().hex}")


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    made: Folder = LocalFolder(tmp_path / "folder") if request.param == "local" else request.getfixturevalue("s3")
    made.make()
    return made


@pytest.mark.parametrize("content", [b"", b"x", bytes(range(256)) * 20_000], ids=["empty", "byte", "5 MB"])
def test_what_is_put_is_read_back_and_nothing_else_is_there(folder: Folder, content: bytes) -> None:
    assert folder.put_if_absent("part", content) is True
    assert folder.read("part") == content
    assert folder.size("part") == len(content)
    assert folder.names() == ["part"]


def test_the_second_writer_of_a_name_loses_and_changes_nothing(folder: Folder) -> None:
    assert folder.put_if_absent("part", b"first")
    assert folder.put_if_absent("part", b"second") is False
    assert folder.read("part") == b"first"


def test_of_many_writers_at_once_one_wins_and_all_readers_see_its_bytes(folder: Folder) -> None:
    won = []
    writers = [
        threading.Thread(
            target=lambda i=i: won.append(i) if folder.put_if_absent("part", b"%d" % i * 1000) else None  # type: ignore[misc]
        )
        for i in range(8)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(won) == 1
    assert folder.read("part") == b"%d" % won[0] * 1000
    assert folder.names() == ["part"]


def test_what_is_not_there_has_no_size_and_cannot_be_read(folder: Folder) -> None:
    assert folder.size("part") is None
    assert folder.child("none").names() == []
    with pytest.raises(FileNotFoundError):
        folder.read("part")
    folder.delete("part")


def test_names_are_those_of_files_and_folders_in_it(folder: Folder) -> None:
    folder.put_if_absent("b", b"1")
    folder.child("a").make()
    folder.child("a").put_if_absent("deep", b"1")
    assert folder.names() == ["a", "b"]
    assert folder.size("a") is None or isinstance(folder, LocalFolder)
    folder.delete("b")
    assert folder.names() == ["a"]


def test_files_are_dated_by_the_server_and_what_is_not_there_has_no_date(folder: Folder) -> None:
    folder.put_if_absent("part", b"x")
    first = folder.modified("part")
    folder.put_if_absent("later", b"x")
    later = folder.modified("later")
    assert first is not None
    assert later is not None
    assert 0 <= later - first < 60
    assert folder.modified("nothing") is None


def test_replacing_gives_the_new_content(folder: Folder) -> None:
    for content in (b"old", b"new and longer"):
        folder.replace("skipped", content)
        assert folder.read("skipped") == content
    assert folder.names() == ["skipped"]


def test_a_folder_survives_a_pickle_and_a_fork_after_its_first_use(folder: Folder) -> None:
    folder.put_if_absent("part", b"content")
    assert pickle.loads(pickle.dumps(folder)) == folder
    context = multiprocessing.get_context("fork")
    queue: Any = context.Queue()
    process = context.Process(target=lambda: queue.put(folder.read("part")))
    process.start()
    assert queue.get(timeout=60) == b"content"
    process.join()


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("runs/a", LocalFolder(Path("runs/a"))),
        (Path("runs/a"), LocalFolder(Path("runs/a"))),
        ("file:///runs/a", LocalFolder(Path("/runs/a"))),
        ("s3://bucket/a/", ObjectFolder("s3://bucket/a")),
        (LocalFolder(Path("a")), LocalFolder(Path("a"))),
    ],
)
def test_a_path_or_a_url_names_a_folder(s3: ObjectFolder, where: Any, expected: Folder) -> None:
    assert open_folder(where) == expected
    assert str(expected.child("train")) == f"{expected}/train"
    assert expected.place("part") == f"{expected}/part"


def test_a_url_of_an_unknown_kind_is_a_wrong_setting() -> None:
    with pytest.raises(ConfigError, match="nowhere://"):
        open_folder("nowhere://bucket/a")


def test_without_s3fs_the_way_to_install_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    def missing(*arguments: Any, **settings: Any) -> Any:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(ConfigError, match=r"pip install 'refshard\[s3\]'"):
        open_folder("s3://bucket/a")


# Faults, over HTTP.


def first_put(happens: str) -> tuple[Fault, list[str]]:
    """The first PUT of a part fails in a certain way; all else goes well."""
    failed: list[str] = []

    def fault(method: str, path: str) -> str | None:
        if method == "PUT" and "/part" in path and not failed:
            failed.append(path)
            return happens
        return None

    return fault, failed


@pytest.fixture
def through(server: str) -> Callable[[Fault], Any]:
    """Give a folder on the server, reached through a proxy with a fault."""
    import contextlib

    @contextlib.contextmanager
    def reach(fault: Fault) -> Iterator[ObjectFolder]:
        with faulty(server, fault) as proxy, environment(AWS_ENDPOINT_URL=proxy, **CREDENTIALS):
            yield ObjectFolder(f"s3://{BUCKET}/{uuid.uuid4().hex}")

    return reach


@pytest.mark.parametrize("happens", ["refused", "lost before", "lost after"])
def test_a_put_whose_first_request_fails_is_repeated_and_counts_once(
    through: Callable[[Fault], Any], happens: str
) -> None:
    fault, failed = first_put(happens)
    with through(fault) as folder:
        assert folder.put_if_absent("part", b"ours") is True
        assert failed
        assert folder.read("part") == b"ours"
        assert folder.names() == ["part"]


def test_a_put_that_came_after_anothers_is_lost_to_it_though_the_answer_is_lost_too(
    through: Callable[[Fault], Any],
) -> None:
    fault, failed = first_put("lost after")
    with through(fault) as folder:
        folder.make()
        folder._ask("part", lambda fs, path: fs.pipe_file(path, b"another's"))
        assert failed
        assert folder.put_if_absent("part", b"ours") is False
        assert folder.read("part") == b"another's"


@pytest.mark.parametrize("happens", ["refused", "lost before"])
def test_a_store_that_is_down_is_a_storage_error_and_deletes_nothing(
    through: Callable[[Fault], Any], happens: str
) -> None:
    asked: list[str] = []

    def fault(method: str, path: str) -> str | None:
        asked.append(method)
        return happens if method == "PUT" and "/part" in path else None

    with through(fault) as folder:
        folder.make()
        asked.clear()
        with pytest.raises(StorageError, match=r"/part: the object store failed") as caught:
            folder.put_if_absent("part", b"ours")
        assert caught.value.exit_status == 74
        assert "DELETE" not in asked


def test_an_answer_that_is_always_lost_leaves_what_was_put_and_takes_it_for_ours(
    through: Callable[[Fault], Any],
) -> None:
    with through(lambda method, path: "lost after" if method == "PUT" and "/part" in path else None) as folder:
        assert folder.put_if_absent("part", b"ours") is True
        assert folder.read("part") == b"ours"


def test_a_store_that_ignores_conditions_is_refused_before_anything_is_written(
    through: Callable[[Fault], Any],
) -> None:
    with through(lambda method, path: "unconditional") as folder:
        with pytest.raises(StorageError, match="ignores the condition of a put"):
            folder.put_if_absent("part", b"ours")
        assert folder.names() == []


def test_a_missing_bucket_and_a_dead_server_are_storage_errors(s3: ObjectFolder) -> None:
    with pytest.raises(StorageError, match="no such bucket"):
        ObjectFolder("s3://no-such-bucket/a").make()
    with environment(AWS_ENDPOINT_URL="http://127.0.0.1:9"), pytest.raises(StorageError, match="object store failed"):
        s3.make()
