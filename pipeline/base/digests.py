"""SHA-256 of files, cached so that a relaunch does not read gigabytes of weights again; changes of files in use.

The cache knows a file by path, size, inode, times of change (ctime too, which no program can set back), and a digest of
sixteen blocks spread over it. It can't notice a change outside of these blocks that leaves size, inode and all times as
they were: a write through a mapping that the system has not yet stamped, or a file server that sets back its clock.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.base.errors import DataError, IdentityError, StorageError
from pipeline.base.files import make_folder, open_file, read_json, replace_file, storage_errors

__all__ = [
    "WatchedFiles",
    "add_to_cache",
    "cache_folder",
    "read_cache",
    "read_sha256",
    "sha256_of_file",
    "sha256_of_files",
    "stamp_of",
]

Stamp = tuple[int, int, int, int]
"""Size, time of change of the content, of content or name (both in ns), inode"""

_CACHE = "digests.json"
_BLOCKS, _BLOCK_BYTES = 16, 4096


def stamp_of(file: Path) -> Stamp:
    """Return a file's size, times of change and inode. Raises StorageError."""
    with storage_errors(file):
        status = file.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def read_sha256(file: Path) -> str:
    """Read a file and return its SHA-256 in hex. Raises StorageError."""
    with storage_errors(file), open_file(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_of_file(file: Path) -> str:
    """Return a file's SHA-256 in hex, from the cache if the file is as it was. Raises StorageError."""
    entry = "|".join(map(str, (file.resolve(), *stamp_of(file))))
    digest, _, sample = str(read_cache(_CACHE).get(entry, "")).partition(" ")
    if sample and sample == _sample(file):
        return digest
    digest = read_sha256(file)
    add_to_cache(_CACHE, entry, f"{digest} {_sample(file)}", most=1000)
    return digest


def read_cache(name: str) -> dict[str, Any]:
    """Read a file of the user's cache; it is empty if it can't be read."""
    try:
        return read_json(_cache_file(name))
    except (DataError, StorageError):
        return {}


def add_to_cache(name: str, key: str, value: Any, *, most: int) -> None:
    """Add an entry to a file of the user's cache, which keeps the newest. If it can't be written, that costs time."""
    # Other processes may have added to the cache.
    entries = [*read_cache(name).items(), (key, value)]
    with contextlib.suppress(StorageError):
        make_folder(_cache_file(name).parent)
        replace_file(_cache_file(name), json.dumps(dict(entries[-most:]), indent=0).encode())


def cache_folder() -> Path:
    """Return this program's folder in the user's cache. Raises StorageError for a user without a home."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    try:
        # As the standard says, a relative folder does not count: it would be made wherever the command runs.
        return Path(named if Path(named).is_absolute() else "~/.cache").expanduser() / "refshard"
    except RuntimeError as error:
        raise StorageError(f"~/.cache: there is no cache ({error}). Set XDG_CACHE_HOME") from error


def _cache_file(name: str) -> Path:
    return cache_folder() / name


def sha256_of_files(files: Iterable[Path]) -> dict[str, str]:
    """Return the cached SHA-256 of each file by its name; the names must differ. Raises StorageError."""
    return {file.name: sha256_of_file(file) for file in files}


class WatchedFiles:
    """Files that are in use: their digests, and checks that they are still what was digested.

    Args:
        files: Files to read for their digests.
        remedy: Sentence that ends the error's message.
    """

    def __init__(self, files: Iterable[Path], remedy: str = "Restore it and run the same command again") -> None:
        self._remedy = remedy
        # The stamp first: a change while the digest is taken must be noticed.
        self._known = {file: (stamp_of(file), sha256_of_file(file)) for file in files}

    def are_untouched(self) -> bool:
        """Return True if no file was touched since its digest was taken."""
        return all(file.exists() and stamp_of(file) == stamp for file, (stamp, _) in self._known.items())

    def check_untouched(self) -> None:
        """Refuse what was loaded if a file was touched since its digest was taken, even if it was put back.

        Raises:
            IdentityError: A file was touched.
        """
        for file, (stamp, _) in self._known.items():
            if stamp_of(file) != stamp:
                raise self._changed(file)

    def check(self) -> None:
        """Refuse to continue if a file holds something else by now. A file that is gone is no longer read.

        Raises:
            IdentityError: A file's content has changed.
        """
        for file, (stamp, digest) in self._known.items():
            if file.exists() and (now := stamp_of(file)) != stamp:
                # A backup's hard link changes the time, not the content.
                if read_sha256(file) != digest:
                    raise self._changed(file)
                self._known[file] = (now, digest)

    def _changed(self, file: Path) -> IdentityError:
        return IdentityError(f"{file}: changed while it was in use. {self._remedy}")


def _sample(file: Path) -> str:
    """Return a digest of blocks from the file's beginning to its end. Raises StorageError."""
    digest = hashlib.sha256()
    with storage_errors(file), open_file(file) as stream:
        last = max(0, stream.seek(0, os.SEEK_END) - _BLOCK_BYTES)
        for number in range(_BLOCKS):
            stream.seek(last * number // (_BLOCKS - 1))
            digest.update(stream.read(_BLOCK_BYTES))
    return digest.hexdigest()[:32]
