"""SHA-256 of files, cached on request so that a relaunch does not read gigabytes of weights again."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from pipeline.base.errors import StorageError

__all__ = ["read_sha256", "sha256_of_file", "sha256_of_files"]


def read_sha256(file: Path) -> str:
    """Read a file and return its SHA-256 in hex. Raises StorageError."""
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise StorageError(f"{file}: can't be read ({error.strerror or error})") from error


def sha256_of_file(file: Path) -> str:
    """Return a file's SHA-256 in hex, cached by path, size, time of change and inode. Raises StorageError."""
    cache_file = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "refshard" / "digests.json"
    try:
        status = file.stat()
    except OSError as error:
        raise StorageError(f"{file}: can't be read ({error.strerror})") from error
    entry = f"{file.resolve()}|{status.st_size}|{status.st_mtime_ns}|{status.st_ino}"
    cache = _read_cache(cache_file)
    if entry in cache:
        return cache[entry]
    digest = read_sha256(file)
    _write_cache(cache_file, {**_read_cache(cache_file), entry: digest})
    return digest


def sha256_of_files(files: Iterable[Path]) -> dict[str, str]:
    """Return the cached SHA-256 of each file by its name; the names must differ. Raises StorageError."""
    return {file.name: sha256_of_file(file) for file in files}


def _read_cache(file: Path) -> dict[str, str]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return {k: v for k, v in content.items() if isinstance(v, str)} if isinstance(content, dict) else {}


def _write_cache(file: Path, entries: dict[str, str]) -> None:
    # A cache that can't be written costs time, never correctness.
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        temporary.write_text(json.dumps(dict(list(entries.items())[-1000:]), indent=0), encoding="utf-8")
        temporary.replace(file)
    except OSError:
        return
