"""Files that are whole or absent: written under a name of their own, synced, then put under their final name.

`put_if_absent` is the only way into a store. Its first writer wins, so a second copy of a worker, or a late one
that a scheduler lost sight of, can never replace what readers may have seen already.
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
    """Make a folder and those that it lies in, durably, unless they are there. Raises OSError."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        _sync(path.parent)


def put_if_absent(file: Path, content: bytes) -> bool:
    """Write a new file, durably and as a whole. False if the name is already there, which is left as it is.

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
            # Also where another was first: what is there counts as done from here on.
            _sync(file.parent)
        except FileNotFoundError as error:
            # Who cleans up may take a running writer's file for a dead one's; then it is written again.
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
    """Write a file that may be there already, so that readers see the old or the new one, never a part."""
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
    """Write a JSON file that readers see whole or not at all."""
    replace_file(file, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())


def sync_tree(folder: Path) -> None:
    """Have a folder on the disk: the files and folders in it, itself, and its name in the folder above.

    Raises:
        StorageError: The disk is full or failing.
    """
    for path in (*folder.rglob("*"), folder, folder.parent):
        try:
            _sync(path)
        except OSError as error:
            raise storage_error(path, error) from error


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object. Raises DataError where it is damaged, StorageError where it can't be read."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise storage_error(file, error) from error
    return parse_json(str(file), content)


def parse_json(place: str, content: bytes) -> dict[str, Any]:
    """Read a JSON object from what stood in a place, which the DataError names that is raised where it is none."""
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: damaged, not JSON ({error})") from error
    if not isinstance(parsed, dict):
        raise DataError(f"{place}: damaged, expected a JSON object")
    return parsed


def storage_error(file: Path, error: OSError) -> StorageError:
    """Say what an error of the system means for a file."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(f"{file}: the disk is full; free some space and run the same command again")
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
"""What Linux answers where a file system knows no hard links; EPERM also for a folder that may not be changed"""


def _commit(temporary: Path, file: Path) -> bool:
    """Give a written file its name. False if the name is taken."""
    try:
        # A link appears at once and as a whole, and fails if the name is taken; a plain rename would replace.
        os.link(temporary, file)
    except FileExistsError:
        # A file server that repeats a request whose answer was lost reports our own link as taken.
        return _same_file(temporary, file)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return _rename_if_absent(temporary, file, error)
    return True


def _rename_if_absent(temporary: Path, file: Path, no_link: OSError) -> bool:
    """As `_commit`, where there are no hard links: Linux can rename without replacing."""
    here, replace_nothing = -100, 1  # AT_FDCWD and RENAME_NOREPLACE, of renameat2(2)
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None:
        if renameat2(here, os.fsencode(temporary), here, os.fsencode(file), replace_nothing) == 0:
            return True
        if ctypes.get_errno() == errno.EEXIST:
            return False
    raise StorageError(
        f"{file}: can't be put under its name ({no_link.strerror}); this file system has neither hard links nor "
        "renames that replace nothing: choose a folder on another one"
    )


def _same_file(a: Path, b: Path) -> bool:
    try:
        return a.samefile(b)
    except OSError:
        return False


def _sync(path: Path) -> None:
    """Have a folder's names, or a file's content, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
