"""SHA-256 of files, cached: a relaunch does not read many gigabytes of weights again."""

import hashlib
import json
import os
from pathlib import Path

from pipeline.errors import StorageError

__all__ = ["sha256_of_file"]


def sha256_of_file(file: Path) -> str:
    """SHA-256 of a file in hex, cached by path, size and time of change: a relaunch reads no weights twice."""
    cache_file = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "refshard" / "digests.json"
    try:
        status = file.stat()
    except OSError as error:
        raise StorageError(f"{file}: can't be read ({error.strerror})") from error
    entry = f"{file.resolve()}|{status.st_size}|{status.st_mtime_ns}|{status.st_ino}"
    cache = _read_cache(cache_file)
    if entry in cache:
        return cache[entry]
    try:
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise StorageError(f"{file}: can't be read ({error.strerror})") from error
    _write_cache(cache_file, {**_read_cache(cache_file), entry: digest})
    return digest


def _read_cache(file: Path) -> dict[str, str]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_cache(file: Path, entries: dict[str, str]) -> None:
    # A cache that can't be written costs time, never correctness.
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        temporary.write_text(json.dumps(dict(list(entries.items())[-1000:]), indent=0), encoding="utf-8")
        temporary.replace(file)
    except OSError:
        return
