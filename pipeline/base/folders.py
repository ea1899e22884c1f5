"""A folder of small whole files, local or in an object store (`s3://`, `gs://`, ...): put if absent, read, list.

Both kinds promise the same: a reader sees a whole file or none, the first writer of a name wins, and a file never
changes under its name. A local file is committed by a hard link (`files`), an object by one conditional PUT of the
finished bytes.
"""

import contextlib
import functools
import os
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.base import files
from pipeline.base.errors import ConfigError, StorageError, first_line

__all__ = ["LARGEST_FILE", "LEFTOVERS", "Folder", "LocalFolder", "ObjectFolder", "Where", "open_folder"]

_PROBE = ".probe-"
LEFTOVERS = re.compile(rf"{files.TEMPORARY.pattern}|{re.escape(_PROBE)}[0-9a-f]{{32}}")
"""Names that a killed process may leave behind; nobody reads them"""

LARGEST_FILE = 2**32
"""Most bytes of a file in such a folder. Parts of the default size have some megabytes"""

_AN_ERROR = object()


@dataclass(frozen=True)
class LocalFolder:
    """A folder on a local or mounted file system."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def child(self, name: str) -> "LocalFolder":
        return LocalFolder(self.path / name)

    def place(self, name: str) -> str:
        """Name one of its files in messages."""
        return str(self.path / name)

    def make(self) -> None:
        """Make the folder if it is missing. Raises StorageError."""
        files.make_folder(self.path)

    def names(self) -> list[str]:
        """Return the names in it, sorted; none if the folder is missing. Raises StorageError."""
        with files.storage_errors(self.path), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return sorted(entry.name for entry in self.path.iterdir())
        return []

    def sizes(self) -> dict[str, int]:
        """Return the size in bytes of each file in it, by one listing; none if the folder is missing."""
        with files.storage_errors(self.path), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return {entry.name: entry.stat().st_size for entry in os.scandir(self.path) if entry.is_file()}
        return {}

    def size(self, name: str) -> int | None:
        """Return a file's size in bytes, None if it is missing. Raises StorageError."""
        with files.storage_errors(self.path / name), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return (self.path / name).stat().st_size
        return None

    def modified(self, name: str) -> float | None:
        """Return a file's time of writing, in seconds of the file server's clock; None if it is missing."""
        with contextlib.suppress(OSError):
            return (self.path / name).stat().st_mtime
        return None

    def read(self, name: str) -> bytes:
        """Read a whole file.

        Raises:
            FileNotFoundError: It is missing.
            DataError: It is no regular file, or larger than any of ours.
            StorageError: It can't be read.
        """
        with files.storage_errors(self.path / name, FileNotFoundError):
            return files.read_file(self.path / name, most=LARGEST_FILE)

    def put_if_absent(self, name: str, content: bytes) -> bool:
        """Write a new file, durably and whole. Returns False if the name is taken. Raises StorageError."""
        return files.put_if_absent(self.path / name, content)

    def replace(self, name: str, content: bytes) -> None:
        """Write a file that may exist. Raises StorageError."""
        files.replace_file(self.path / name, content)

    def delete(self, name: str) -> None:
        """Delete a file, which may be gone already. Raises StorageError."""
        try:
            (self.path / name).unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"{self.path / name}: can't be deleted ({error.strerror})") from error


@dataclass(frozen=True)
class ObjectFolder:
    """A prefix of names in an object store. It holds no connection, so it can be pickled and forked."""

    url: str
    """Address without a slash at its end, like s3://bucket/runs/shards"""

    def __str__(self) -> str:
        return self.url

    def child(self, name: str) -> "ObjectFolder":
        return ObjectFolder(f"{self.url}/{name}")

    def place(self, name: str) -> str:
        return f"{self.url}/{name}"

    def make(self) -> None:
        """Check that the store can put if absent; it has no folders to make. Raises StorageError."""
        if not _puts_if_absent(self.url):
            raise StorageError(
                f"{self}: this object store ignores the condition of a put (If-None-Match), so two workers could "
                "replace each other's shards. Use a store with conditional writes, or a folder on a disk"
            )

    def names(self) -> list[str]:
        found = self._ask("", lambda fs, path: [(path, name) for name in fs.ls(path, detail=False)], missing=[])
        # Consoles put an empty object for the folder itself.
        return sorted(filter(None, (name.removeprefix(path).strip("/") for path, name in found)))

    def sizes(self) -> dict[str, int]:
        found = self._ask("", lambda fs, path: [(path, info) for info in fs.ls(path, detail=True)], missing=[])
        files = ((path, info) for path, info in found if info["type"] == "file")
        return {info["name"].removeprefix(path).strip("/"): int(info["size"]) for path, info in files}

    def size(self, name: str) -> int | None:
        info = self._ask(name, lambda fs, path: fs.info(path), missing={})
        return None if info.get("type") != "file" else int(info["size"])

    def modified(self, name: str) -> float | None:
        written = self._ask(name, lambda fs, path: fs.modified(path), missing=None)
        return None if written is None else float(written.timestamp())

    def read(self, name: str) -> bytes:
        content = self._ask(name, lambda fs, path: fs.cat_file(path), missing=None)
        if content is None:
            raise FileNotFoundError(self.place(name))
        return bytes(content)

    def put_if_absent(self, name: str, content: bytes) -> bool:
        """Put the finished bytes in one request. Returns False if the name is taken by other bytes.

        Raises StorageError if the store failed and the object is missing. Nothing is ever deleted on a guess.
        """
        self.make()
        try:
            self._ask(name, lambda fs, path: _put(fs, path, content, mode="create"))
        except (FileExistsError, StorageError) as error:
            # A request whose answer was lost may have succeeded, and the client repeats it. So the bytes that are there
            # decide: if they are ours, one of our requests put them.
            try:
                return self.read(name) == content
            except (FileNotFoundError, StorageError) as unread:
                raise (error if isinstance(error, StorageError) else unread) from error
        if self.size(name) != len(content):
            raise StorageError(f"{self.place(name)}: put, but missing or of another size. Run the same command again")
        return True

    def replace(self, name: str, content: bytes) -> None:
        self._ask(name, lambda fs, path: _put(fs, path, content, mode="overwrite"))

    def delete(self, name: str) -> None:
        self._ask(name, lambda fs, path: fs.rm_file(path), missing=None)

    def _ask(self, name: str, request: Callable[[Any, str], Any], *, missing: Any = _AN_ERROR) -> Any:
        """Send a request. Returns `missing` if the name is missing. Raises StorageError."""
        fs, path = _connect(self.url)
        try:
            return request(fs, f"{path}/{name}" if name else path)
        except FileExistsError:
            raise
        except FileNotFoundError as error:
            if missing is not _AN_ERROR:
                return missing
            raise StorageError(f"{self.place(name)}: no such bucket or folder ({first_line(error)})") from error
        # The clients' own errors are not OSErrors.
        except Exception as error:
            raise StorageError(
                f"{self.place(name)}: the object store failed ({type(error).__name__}: {first_line(error)}). Check "
                "address and credentials, then run the same command again"
            ) from error


Folder = LocalFolder | ObjectFolder

Where = str | Path | Folder
"""Forms of a folder's name"""


def open_folder(where: Where) -> Folder:
    """Return the folder of a path or URL, without looking for it. Raises ConfigError if no package serves the URL."""
    if isinstance(where, LocalFolder | ObjectFolder):
        return where
    if isinstance(where, Path) or "://" not in where:
        return LocalFolder(Path(where))
    if where.startswith("file://"):
        return LocalFolder(Path(where.removeprefix("file://")))
    folder = ObjectFolder(where.rstrip("/"))
    _connect(folder.url)
    return folder


def _connect(url: str) -> tuple[Any, str]:
    """Return the file system of a URL, and the path in it. The library keeps a connection for each process."""
    import fsspec

    try:
        # Cached listings may be out of date.
        fs, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        kind = url.partition("://")[0]
        hint = "pip install 'refshard[s3]'" if kind == "s3" else "install the fsspec package for it"
        raise ConfigError(f"{url}: {kind}:// can't be opened here ({first_line(error)}); {hint}") from error
    return fs, str(path).rstrip("/")


def _put(fs: Any, path: str, content: bytes, mode: str) -> None:
    # s3fs uploads more than a chunk in pieces, but only one request is one commit.
    whole = {"chunksize": len(content) + 1} if "s3" in fs.protocol else {}
    fs.pipe_file(path, content, mode=mode, **whole)


@functools.lru_cache(maxsize=16)
def _puts_if_absent(url: str) -> bool:
    """Return True if the second of two conditional puts of one name fails."""
    folder = ObjectFolder(url)
    for _ in range(3):
        name = f"{_PROBE}{uuid.uuid4().hex}"
        folder._ask(name, lambda fs, path: _put(fs, path, b"1", mode="create"))
        try:
            folder._ask(name, lambda fs, path: _put(fs, path, b"2", mode="create"))
        except FileExistsError:
            return True
        finally:
            folder.delete(name)
        # A cleanup may have deleted the object in between, but not three times.
    return False
