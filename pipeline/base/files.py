"""Write files that are whole or absent: under a temporary name, synced, then put under their final name.

Every file of a store is written by `put_if_absent`. Its first writer wins, so a second copy of a worker, or a late one,
never replaces a file that readers may have seen.
"""

import contextlib
import ctypes
import errno
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.base.errors import DataError, StorageError

__all__ = [
    "make_folder",
    "parse_json",
    "put_if_absent",
    "read_json",
    "replace_file",
    "storage_error",
    "sync_tree",
    "write_json",
]

_TRIES = 10


def make_folder(folder: Path) -> None:
    """Make a folder and its missing parents, durably. Raises OSError."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        _sync(path.parent)


def put_if_absent(file: Path, content: bytes) -> bool:
    """Write a new file, durably and whole. Returns False, and changes nothing, if the name is taken.

    Raises:
        StorageError: The disk is full or failing, or its file system can't put if absent. Nothing is left behind.
    """
    for tries_left in reversed(range(_TRIES)):
        temporary = file.with_name(f".tmp-{uuid.uuid4().hex}")
        try:
            _write_durably(temporary, content)
            try:
                committed = _commit(temporary, file)
            finally:
                temporary.unlink(missing_ok=True)
            # Also if another was first: from here on its file counts as done.
            _sync(file.parent)
        except FileNotFoundError as error:
            # A cleanup may have deleted the temporary file as a dead writer's. Write it again.
            if not (tries_left and file.parent.exists()):
                raise storage_error(file, error) from error
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise storage_error(file, error) from error
        else:
            return committed
    raise AssertionError("unreachable")


def replace_file(file: Path, content: bytes) -> None:
    """Write a file that may exist; readers see the old or the new one, never a part. Raises StorageError."""
    temporary = file.with_name(f".tmp-{uuid.uuid4().hex}")
    try:
        _write_durably(temporary, content)
        temporary.replace(file)
        _sync(file.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise storage_error(file, error) from error


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file that readers see whole or not at all. Raises StorageError."""
    replace_file(file, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())


def sync_tree(folder: Path) -> None:
    """Sync a folder: everything in it, itself, and its name in its parent.

    Raises:
        StorageError: The disk is full or failing.
    """
    for path in (*folder.rglob("*"), folder, folder.parent):
        try:
            _sync(path)
        except OSError as error:
            raise storage_error(path, error) from error


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object. Raises DataError if it is damaged, StorageError if it can't be read."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise storage_error(file, error) from error
    return parse_json(str(file), content)


def parse_json(place: str, content: bytes) -> dict[str, Any]:
    """Parse a JSON object. Raises DataError, which names the place, if it is not one."""
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: damaged, not JSON ({error})") from error
    if not isinstance(parsed, dict):
        raise DataError(f"{place}: damaged, expected a JSON object")
    return parsed


def storage_error(file: Path, error: OSError) -> StorageError:
    """Make the StorageError of a system's error with a file."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(f"{file}: the disk is full. Free some space and run the same command again")
    return StorageError(f"{file}: can't be written or read ({error.strerror or error})")


def _write_durably(file: Path, content: bytes) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)
"""Linux's errors of a file system without hard links; EPERM also means a folder that may not be changed"""


def _commit(temporary: Path, file: Path) -> bool:
    """Give a written file its name. Returns False if the name is taken."""
    try:
        # A link appears at once and fails if the name is taken; a plain rename would replace.
        os.link(temporary, file)
    except FileExistsError:
        # After a lost answer, a file server repeats the request and reports our own link as taken.
        return _same_file(temporary, file)
    except OSError as error:
        if error.errno not in _NO_LINKS:
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


def _same_file(a: Path, b: Path) -> bool:
    try:
        return a.samefile(b)
    except OSError:
        return False


def _sync(path: Path) -> None:
    """Sync a folder's names, or a file's content, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
