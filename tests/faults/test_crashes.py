"""A store whose writer dies at any step, and a machine that loses what was not synced: each part is whole or absent.

The writer's calls of the operating system are recorded. A machine that goes down after any of them may have kept, of
what was not synced, anything: contents in full, in part, as zeros or not at all; names or not. Each such disk is made
for real, and read.
"""

import contextlib
import hashlib
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pipeline.base import files
from pipeline.base.errors import DataError, RefshardError, UnfinishedError
from pipeline.store.format import part_name
from support.stores import UNITS, contents, stored_rows, write_store
from support.tally import tally


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("expected") / "train"
    write_store(folder)
    return contents(folder)


FINISHED = "every part whole or absent; the same command finishes with the same bytes"

CALLS = ("open", "write", "fsync", "link", "unlink", "replace", "mkdir", "close")


def _die_at(step: int, after: bool) -> None:
    """Let this process die at the `step`-th call of the operating system, before or after it is carried out."""
    count = itertools.count()

    def dying(call: Callable[..., Any]) -> Callable[..., Any]:
        def either(*arguments: Any, **options: Any) -> Any:
            number = next(count)
            if number == step and not after:
                os._exit(9)
            try:
                return call(*arguments, **options)
            finally:
                if number == step:
                    os._exit(9)

        return either

    for name in CALLS:
        setattr(os, name, dying(getattr(os, name)))


def _in_a_child(act: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            act()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_writer_that_dies_at_any_call_leaves_whole_parts_and_the_next_one_finishes(
    tmp_path: Path, expected: dict[str, bytes], after: bool
) -> None:
    for step in itertools.count():
        folder = tmp_path / str(step) / "train"

        def dying(step: int = step, folder: Path = folder) -> None:
            _die_at(step, after)
            write_store(folder)

        status = _in_a_child(dying)
        if status == 0:
            break
        assert status == 9
        _check_state(folder, expected)
        shutil.rmtree(folder.parent, ignore_errors=True)
    # The manifest, three parts, what was skipped, and the index, of about nine calls each.
    assert step > 40
    tally(f"the writer dies {'after' if after else 'before'} each of its system calls", step, outcome=FINISHED)


def _check_state(folder: Path, expected: dict[str, bytes]) -> None:
    """What readers see in a folder is right or absent, and a worker finishes it with the same bytes."""
    for name in part_names(folder):
        assert (folder / name).read_bytes() == expected[name], name
    try:
        rows = stored_rows(folder)
    except (UnfinishedError, DataError) as error:
        # A damaged file under a final name is seen; but it should not be there at all.
        assert "damaged" not in str(error), error
    else:
        assert [row["row"] for row in rows] == list(range(2 * UNITS))
        assert [row["chosen_token_logps"][0] for row in rows] == [-1.0 - row for row in range(2 * UNITS)]
    write_store(folder)
    assert contents(folder) == expected


def part_names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.glob("part-*")) if folder.exists() else []


# A machine that goes down.


@dataclass
class _Inode:
    content: bytes = b""
    synced: bytes | None = None
    """Content at the last sync; None before the first"""


@dataclass
class _Disk:
    """One folder: what programs see, and what is sure to be there after a power cut."""

    names: dict[str, _Inode] = field(default_factory=dict)
    synced: dict[str, _Inode] = field(default_factory=dict)

    def states(self) -> Iterator[dict[str, bytes]]:
        """Every folder that may be found after a power cut now."""
        changed = [name for name in {*self.names, *self.synced} if self.names.get(name) is not self.synced.get(name)]
        for kept in itertools.product([True, False], repeat=len(changed)):
            names = dict(self.synced)
            for name, is_kept in zip(changed, kept, strict=True):
                inode = self.names.get(name) if is_kept else self.synced.get(name)
                names.pop(name, None)
                if inode is not None:
                    names[name] = inode
            for damage in _DAMAGE.values():
                yield {
                    name: inode.content if inode.synced == inode.content else damage(inode)
                    for name, inode in names.items()
                }


_DAMAGE: dict[str, Callable[[_Inode], bytes]] = {
    "kept": lambda inode: inode.content,
    "lost": lambda inode: inode.synced or b"",
    "zeros": lambda inode: bytes(len(inode.content)),
    "half": lambda inode: inode.content[: len(inode.content) // 2],
}


class _Recorder:
    """Follows the calls of the operating system in one folder, and takes down what each power cut could leave."""

    def __init__(self, folder: Path) -> None:
        self.disk = _Disk()
        self.states: dict[str, dict[str, bytes]] = {}
        self.when_done: list[tuple[str, list[dict[str, bytes]]]] = []
        """After each put: the name, and the states that a power cut at this moment could leave"""
        self._folder = folder
        self._descriptors: dict[int, _Inode | None] = {}

    @contextlib.contextmanager
    def recording(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        with monkeypatch.context() as patch:
            for name in ("open", "write", "fsync", "link", "unlink", "replace"):
                patch.setattr(os, name, self._watched(getattr(os, name), getattr(self, f"after_{name}")))
            put = files.put_if_absent

            def put_and_tell(file: Path, content: bytes) -> bool:
                result = put(file, content)
                self.when_done.append((file.name, list(self.disk.states())))
                return result

            patch.setattr(files, "put_if_absent", put_and_tell)
            yield

    def _watched(self, call: Callable[..., Any], after: Callable[..., None]) -> Callable[..., Any]:
        def watched(*arguments: Any, **options: Any) -> Any:
            result = call(*arguments, **options)
            after(result, *arguments)
            for state in self.disk.states():
                # Names of temporary files differ from run to run and mean nothing.
                visible = {name: content for name, content in state.items() if not name.startswith(".tmp-")}
                self.states[hashlib.sha256(repr(sorted(visible.items())).encode()).hexdigest()] = visible
            return result

        return watched

    def after_open(self, descriptor: int, path: Any, flags: int, mode: int = 0) -> None:
        if Path(path) == self._folder:
            self._descriptors[descriptor] = None
        elif Path(path).parent == self._folder and flags & os.O_CREAT:
            self._descriptors[descriptor] = self.disk.names[Path(path).name] = _Inode()

    def after_write(self, written: int, descriptor: int, content: Any) -> None:
        if inode := self._descriptors.get(descriptor):
            inode.content += bytes(content[:written])

    def after_fsync(self, nothing: None, descriptor: int) -> None:
        if descriptor not in self._descriptors:
            return
        inode = self._descriptors[descriptor]
        if inode is None:
            self.disk.synced = dict(self.disk.names)
        else:
            inode.synced = inode.content

    def after_link(self, nothing: None, source: Any, target: Any) -> None:
        self.disk.names[Path(target).name] = self.disk.names[Path(source).name]

    def after_unlink(self, nothing: None, path: Any) -> None:
        self.disk.names.pop(Path(path).name, None)

    def after_replace(self, nothing: None, source: Any, target: Any) -> None:
        self.disk.names[Path(target).name] = self.disk.names.pop(Path(source).name)


def _check_power_cuts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, bytes]) -> int:
    """Record a writer, make every disk that a power cut could leave, and read each. Gives their number."""
    recorder = _Recorder(tmp_path / "train")
    with recorder.recording(monkeypatch):
        write_store(tmp_path / "train")
    assert [name for name, _ in recorder.when_done] == ["manifest.json", *map(part_name, range(UNITS)), "index.json"]
    for name, states in recorder.when_done:
        assert all(state.get(name) == expected[name] for state in states), f"{name}: done, and not on the disk"
    for number, state in enumerate(recorder.states.values()):
        folder = tmp_path / "states" / str(number) / "train"
        folder.mkdir(parents=True)
        for name, content in state.items():
            (folder / name).write_bytes(content)
        _check_state(folder, expected)
        shutil.rmtree(folder.parent)
    return len(recorder.states)


def test_after_a_power_cut_at_any_moment_parts_are_whole_or_absent_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, bytes]
) -> None:
    states = _check_power_cuts(tmp_path, monkeypatch, expected)
    assert states >= 7
    tally("power cut after any call: each disk that it could leave", states, outcome=FINISHED)


def _without_the_files_sync(patch: pytest.MonkeyPatch) -> None:
    def write_only(file: Path, content: bytes) -> None:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        os.write(descriptor, content)
        os.close(descriptor)

    patch.setattr(files, "_write_durably", write_only)


def _without_the_folders_sync(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(files, "_sync", lambda folder: None)


def _written_in_place(patch: pytest.MonkeyPatch) -> None:
    def in_place(file: Path, content: bytes) -> bool:
        if file.exists():
            return False
        files._write_durably(file, content)
        files._sync(file.parent)
        return True

    patch.setattr(files, "put_if_absent", in_place)


@pytest.mark.parametrize("mutate", [_without_the_files_sync, _without_the_folders_sync, _written_in_place])
def test_the_power_cuts_notice_each_sync_that_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, bytes], mutate: Callable[..., None]
) -> None:
    mutate(monkeypatch)
    with pytest.raises((AssertionError, RefshardError)):
        _check_power_cuts(tmp_path, monkeypatch, expected)
