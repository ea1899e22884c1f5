"""Write files that are whole or absent: under a temporary name, synced, then put under their final name.

Every file of a store is written by `put_if_absent`. Its first writer wins, so a second copy of a worker, or a late one,
never replaces a file that readers may have seen.
"""

import contextlib
import ctypes
import errno
import json
import math
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

from pipeline.base.errors import DataError, StorageError

__all__ = [
    "TEMPORARY",
    "delete_named",
    "find_special",
    "make_folder",
    "open_file",
    "parse_json",
    "put_if_absent",
    "read_file",
    "read_head",
    "read_json",
    "replace_file",
    "special_kind",
    "storage_errors",
    "sync_tree",
    "write_json",
]


TEMPORARY = re.compile(r"\.tmp-[0-9a-f]{32}")
"""Names of files and folders that are being written; a kill leaves them behind"""


def delete_named(folder: Path, names: re.Pattern[str]) -> None:
    """Delete the files and folders in a folder whose whole name has a form, then the folder if that left it empty.

    Links are not followed, and errors are passed over: what is left behind is not read.
    """
    with contextlib.suppress(OSError):
        for path in [path for path in folder.iterdir() if names.fullmatch(path.name)]:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        folder.rmdir()


def make_folder(folder: Path) -> None:
    """Make a folder and its missing parents, durably. Raises StorageError."""
    try:
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for path in missing:
            _sync(path.parent)
    except OSError as error:
        raise StorageError(f"{folder}: can't be made ({error.strerror or error}). Choose another folder") from error


def put_if_absent(file: Path, content: bytes) -> bool:
    """Write a new file, durably and whole. Returns False, and changes nothing, if the name is taken.

    Raises StorageError, and leaves nothing behind, if the disk is full or failing, or can't put if absent.
    """
    for tries_left in reversed(range(10)):
        try:
            with _temporary(file, content) as temporary:
                committed = _commit(temporary, file)
            # Also if another was first: from here on its file counts as done.
            _sync(file.parent)
            return committed
        except OSError as error:
            # A cleanup may have deleted the temporary file as a dead writer's. Write it again.
            if not (isinstance(error, FileNotFoundError) and tries_left and file.parent.exists()):
                raise _storage_error(file, error) from error
    raise AssertionError("unreachable")


def replace_file(file: Path, content: bytes) -> None:
    """Write a file that may exist; readers see the old or the new one, never a part. Raises StorageError."""
    with storage_errors(file):
        with _temporary(file, content) as temporary:
            temporary.replace(file)
        _sync(file.parent)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file that readers see whole or not at all. Raises StorageError."""
    replace_file(file, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())


def sync_tree(folder: Path) -> None:
    """Sync a folder: everything in it, itself, and its name in its parent. Raises StorageError."""
    for path in (*folder.rglob("*"), folder, folder.parent):
        with storage_errors(path):
            _sync(path)


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object. Raises DataError if it is damaged or no regular file, StorageError if it can't be read."""
    with storage_errors(file):
        content = read_file(file, most=_LARGEST_JSON)
    return parse_json(str(file), content)


def read_file(file: Path, *, most: int) -> bytes:
    """Read a whole file of at most so many bytes. Raises DataError for a larger one, and as `open_file` does."""
    with open_file(file) as stream:
        if (size := os.fstat(stream.fileno()).st_size) > most:
            raise DataError(f"{file}: must have at most {most:,} bytes, got {size:,}. Put the right file there")
        return stream.read()


def read_head(file: Path, size: int) -> bytes:
    """Read the first bytes of a file; none of what is no regular file. Raises OSError if it can't be read."""
    if not file.is_file():
        return b""
    with open_file(file) as stream:
        return stream.read(size)


def open_file(file: Path) -> BufferedReader:
    """Open a regular file to read its bytes.

    Nothing else is opened: a FIFO would wait for its writer for ever, and a device may never end. Raises DataError for
    such a file, OSError if it can't be opened.
    """
    if (kind := special_kind(file)) is not None:
        raise DataError(f"{file}: must be a regular file, got {kind}. Put the right file there")
    # Should it become a FIFO in between, opening it does not wait.
    return open(file, "rb", opener=lambda path, flags: os.open(path, flags | getattr(os, "O_NONBLOCK", 0)))


def special_kind(file: Path) -> str | None:
    """Name what is under a path, links followed, if that is no regular file. Raises OSError."""
    mode = file.stat().st_mode
    kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}
    return None if stat.S_ISREG(mode) else kinds.get(stat.S_IFMT(mode), "a device")


def find_special(folder: Path) -> str | None:
    """Describe a FIFO, device or socket in a folder, or a text file too large to be one; None without.

    Libraries open the files of models and datasets by name.
    """
    for path in folder.glob("*"):
        with contextlib.suppress(FileNotFoundError):  # a link to nothing
            kind = special_kind(path)
            if kind not in (None, "a folder"):
                return f"{path}, {kind}"
            if kind is None and path.suffix in _TEXT and (size := path.stat().st_size) > _LARGEST_JSON:
                return f"{path}, {size:,} bytes"
    return None


_LARGEST_JSON = 2**30
_TEXT = (".json", ".jinja", ".txt", ".model")


def parse_json(place: str, content: bytes, *, finite: bool = False) -> dict[str, Any]:
    """Parse a JSON object. Raises DataError, which names the place, if it is not one.

    `finite` makes null of numbers that are not finite: NaN, and numbers too large for a float.
    """
    try:
        parsed = json.loads(content, parse_constant=_finite, parse_float=_finite) if finite else json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: damaged, not JSON ({error})") from error
    if not isinstance(parsed, dict):
        raise DataError(f"{place}: damaged, expected a JSON object")
    return parsed


def _finite(text: str) -> float | None:
    number = float(text)
    return number if math.isfinite(number) else None


@contextlib.contextmanager
def storage_errors(file: Path, *passed: type[OSError]) -> Iterator[None]:
    """Raise a StorageError in place of the system's error with a file, except the types that are passed on."""
    try:
        yield
    except passed:
        raise
    except OSError as error:
        raise _storage_error(file, error) from error


def _storage_error(file: Path, error: OSError) -> StorageError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(f"{file}: the disk is full. Free some space and run the same command again")
    return StorageError(f"{file}: can't be written or read ({error.strerror or error})")


@contextlib.contextmanager
def _temporary(file: Path, content: bytes) -> Iterator[Path]:
    """Write the content durably under a temporary name beside the file, which is deleted in the end."""
    temporary = file.with_name(f".tmp-{uuid.uuid4().hex}")
    try:
        _write_durably(temporary, content)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _write_durably(file: Path, content: bytes) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _commit(temporary: Path, file: Path) -> bool:
    """Give a written file its name. Returns False if the name is taken."""
    try:
        # A link appears at once and fails if the name is taken; a plain rename would replace.
        os.link(temporary, file)
    except FileExistsError:
        # After a lost answer, a file server repeats the request and reports our own link as taken.
        return temporary.samefile(file)
    except OSError as error:
        # Linux's errors without hard links; EPERM also means a folder that may not be changed.
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        return _rename_if_absent(temporary, file, error)
    return True


def _rename_if_absent(temporary: Path, file: Path, no_link: OSError) -> bool:
    """Give a written file its name by Linux's rename that replaces nothing. Returns False if the name is taken."""
    here, replace_nothing = -100, 1  # AT_FDCWD and RENAME_NOREPLACE, of renameat2(2)
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None:
        if renameat2(here, os.fsencode(temporary), here, os.fsencode(file), replace_nothing) == 0:
            return True
        if ctypes.get_errno() == errno.EEXIST:
            return False
    raise StorageError(
        f"{file}: can't be put under its name ({no_link.strerror}); this file system has neither hard links nor "
        "renames that replace nothing. Choose a folder on another one"
    )


def _sync(path: Path) -> None:
    """Sync a folder's names, or a file's content, to the disk."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
