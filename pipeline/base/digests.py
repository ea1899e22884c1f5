"""SHA-256 of files, cached on request so that a relaunch does not read gigabytes of weights again."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.base.errors import DataError, StorageError
from pipeline.base.files import make_folder, read_json, replace_file, storage_errors

__all__ = ["read_sha256", "sha256_of_file", "sha256_of_files"]


def read_sha256(file: Path) -> str:
    """Read a file and return its SHA-256 in hex. Raises StorageError."""
    with storage_errors(file), file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_of_file(file: Path) -> str:
    """Return a file's SHA-256 in hex, cached by path, size, time of change and inode. Raises StorageError."""
    cache_file = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "refshard" / "digests.json"
    with storage_errors(file):
        status = file.stat()
    entry = f"{file.resolve()}|{status.st_size}|{status.st_mtime_ns}|{status.st_ino}"
    if isinstance(cached := _read_cache(cache_file).get(entry), str):
        return cached
    digest = read_sha256(file)
    # Other processes may have added to the cache. If it can't be written, that costs time, never correctness.
    entries = [*_read_cache(cache_file).items(), (entry, digest)]
    with contextlib.suppress(StorageError):
        make_folder(cache_file.parent)
        replace_file(cache_file, json.dumps(dict(entries[-1000:]), indent=0).encode())
    return digest


def sha256_of_files(files: Iterable[Path]) -> dict[str, str]:
    """Return the cached SHA-256 of each file by its name; the names must differ. Raises StorageError."""
    return {file.name: sha256_of_file(file) for file in files}


def _read_cache(file: Path) -> dict[str, Any]:
    try:
        return read_json(file)
    except (DataError, StorageError):
        return {}
