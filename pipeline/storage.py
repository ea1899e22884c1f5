"""Files that are whole or absent: written under a name of their own, synced, then put under their final name.

`put_if_absent` is the only way into a store. Its first writer wins, so a second copy of a worker, or a late one
that a scheduler lost sight of, can never replace what readers may have seen already.
"""

import contextlib
import errno
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import DataError, StorageError

__all__ = ["put_if_absent", "read_json", "replace_file", "sync_files", "write_json"]


def put_if_absent(file: Path, content: bytes) -> bool:
    """Write a new file, durably and as a whole. False if the name is already there, which is left as it is.

    Raises:
        StorageError: The disk is full or failing, or its file system has no hard links. Nothing is left behind.
    """
    temporary = file.with_name(f".tmp-{uuid.uuid4().hex}")
    try:
        _write_durably(temporary, content)
        try:
            # A link appears at once and as a whole, and fails if the name is taken; a rename would replace.
            os.link(temporary, file)
        except FileExistsError:
            # A file server that repeats a request whose answer was lost reports our own link as taken.
            if not _same_file(temporary, file):
                return False
        except OSError as error:
            raise _no_links(file, error) from error
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(file.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise _storage_error(file, error) from error
    return True


def replace_file(file: Path, content: bytes) -> None:
    """Write a file that may be there already, so that readers see the old or the new one, never a part."""
    temporary = file.with_name(f".tmp-{uuid.uuid4().hex}")
    try:
        _write_durably(temporary, content)
        temporary.replace(file)
        _sync_folder(file.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise _storage_error(file, error) from error


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file that readers see whole or not at all."""
    replace_file(file, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())


def sync_files(folder: Path) -> None:
    """Have the files of a folder on the disk before its name says that they are."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    _sync_folder(folder)


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object. Raises DataError where it is damaged, StorageError where it can't be read."""
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise _storage_error(file, error) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: damaged, not JSON ({error})") from error
    if not isinstance(content, dict):
        raise DataError(f"{file}: damaged, expected a JSON object")
    return content


def _write_durably(file: Path, content: bytes) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _same_file(a: Path, b: Path) -> bool:
    try:
        return a.samefile(b)
    except OSError:
        return False


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _no_links(file: Path, error: OSError) -> StorageError:
    # Linux answers EPERM where a file system knows no hard links, as it does for a folder that may not be changed.
    if error.errno in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
        return StorageError(
            f"{file}: can't be put under its name ({error.strerror}); where this file system has no hard links, "
            "choose a folder on another one"
        )
    return _storage_error(file, error)


def _storage_error(file: Path, error: OSError) -> StorageError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(f"{file}: the disk is full; free some space and run the same command again")
    return StorageError(f"{file}: can't be written or read ({error.strerror or error})")
