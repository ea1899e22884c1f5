"""Keep joined sets for later runs, and find them again by everything that they were made from.

    train.joined_dir/KEY/train.arrow        one a set
    train.joined_dir/KEY/token-logps.f32    those of all sets
    train.joined_dir/KEY/joined.json        what they were made from (KEY is its digest), digests of the files, counts

A run links these files into its own folder, or copies them where links can't be made, and reads them there. So the
cache may be deleted at any time, on any file system, and by another machine. A folder gets its name once it is
complete, and the digests of all its files are checked before each use.
"""

import contextlib
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.base.digests import cache_folder, sha256_of_files
from pipeline.base.errors import DataError, RefshardError, StorageError
from pipeline.base.files import TEMPORARY, make_folder, replace_file
from pipeline.base.folders import LocalFolder, open_folder
from pipeline.base.progress import say
from pipeline.base.schemas import Schema
from pipeline.base.versions import library_versions, version_of
from pipeline.config.schema import Config
from pipeline.data.dates import asks_for_date
from pipeline.data.sources import digests_of_rows, open_source
from pipeline.models.files import NamedModel, texts_of_model
from pipeline.models.identity import TokenizerFacts, as_json, fingerprint_of
from pipeline.models.lengths import most_positions
from pipeline.models.recollection import digest_of_code
from pipeline.store.format import is_sealed, sealed
from pipeline.store.store import Store

__all__ = ["RECORD", "CachedSets", "JoinedCache", "cached_sets", "joined_folder", "read_joined", "write_joined"]

RECORD = "joined.json"
_SCHEMA = Schema(__package__, "joined")
_KEY = re.compile(r"[0-9a-f]{64}")
_MOST_KEPT = 8
"""Joined sets in one folder; the ones that were used last are kept"""
_ABANDONED_SECONDS = 24 * 3600
"""Age from which a temporary folder counts as a dead process's"""
_READERS = ("datasets", "jinja2")
"""Libraries that decide the tokens, besides those of `library_versions`"""


@dataclass(frozen=True)
class JoinedCache:
    """The cache as a run uses it."""

    folder: Path
    unchanged: Callable[[], bool]
    """Returns True if the data and the tokenizer's files are still those that the run has begun with"""


def joined_folder(config: Config) -> Path:
    """Give the folder of the cache: `train.joined_dir`, or beside the stores, or, if these are not on a disk, the
    user's cache.
    """
    if config.train.joined_dir:
        return Path(config.train.joined_dir)
    output = open_folder(config.precompute.output)
    return output.path / ".joined" if isinstance(output, LocalFolder) else cache_folder() / "joined"


def cached_sets(
    folder: Path, config: Config, stores: Mapping[str, Store], tokenizer: Any, *, keep_missing: bool
) -> "CachedSets | None":
    """Find the place of a run's joined sets in the cache's folder, whether they are there or not.

    None if they can't be found again: the data is streamed, or the chat template reads today's date.
    """
    if config.data.template_date is None and asks_for_date(tokenizer):
        return None
    sets: dict[str, Any] = {}
    for name in config.data.names:
        source, store = open_source(config.data, name), stores.get(name)
        rows = digests_of_rows(source)
        if rows is None:
            return None
        where = {key: value for key, value in asdict(source).items() if key not in ("path", "files")}
        sets[name] = {
            "rows": rows,
            "source": where,
            # A training set is joined without pairs of weight 0, a held-out one with them.
            "is_held_out": name in config.data.eval,
            "store": None if store is None else {"identity": store.fingerprint, "index": store.digest},
        }
    model = NamedModel.policy(config)
    texts = texts_of_model(model.folder(weights=False))
    rules = {key: value for key, value in asdict(config.data).items() if key not in ("path", "sets", "eval")}
    made_from = {
        "sets": sets,
        "rules": rules,
        "tokenizer": asdict(TokenizerFacts.of(tokenizer)),
        "texts": [sorted(sha256_of_files(group).items()) for group in texts],
        "positions": most_positions(config),
        "ld_alpha": config.loss.ld_alpha,
        "on_missing": config.train.on_missing,
        "keep_missing": keep_missing,
        "code": digest_of_code(),
        "versions": {**library_versions(), **{name: version_of(name) for name in _READERS}},
    }
    made_from = as_json(made_from)
    return CachedSets(folder / fingerprint_of(made_from), made_from)


@dataclass(frozen=True)
class CachedSets:
    """The place of joined sets in the cache; they may be absent."""

    folder: Path
    made_from: Mapping[str, Any]

    def size(self) -> int | None:
        """Return the bytes of the files; None if the sets are not there."""
        with contextlib.suppress(RefshardError, OSError):
            names: Iterable[str] = read_joined(self.folder)["files"]
            return sum((self.folder / name).stat().st_size for name in names)
        return None

    def take(self, into: Path) -> bool:
        """Link or copy the files into a run's folder; return False if they are absent or damaged.

        Damaged ones are deleted.
        """
        if not self.folder.exists():
            return False
        try:
            record = read_joined(self.folder)
            make_folder(into)
            for name in record["files"]:
                _link(self.folder / name, into / name)
            if (
                record["made_from"] != self.made_from
                or sha256_of_files(into / n for n in record["files"]) != record["files"]
            ):
                raise DataError("its files have other digests")
            _link(self.folder / RECORD, into / RECORD)
            with contextlib.suppress(OSError):
                os.utime(self.folder / RECORD)
            return True
        except (RefshardError, OSError) as error:
            shutil.rmtree(into, ignore_errors=True)
            # Another process may have deleted it meanwhile.
            if self.folder.exists():
                say(f"warning: {self.folder}: can't be used ({error}); the sets are joined again", err=True)
                # A full disk of the run's damages nothing.
                if isinstance(error, DataError | FileNotFoundError):
                    _delete(self.folder)
            return False

    def keep(self, made: Path) -> None:
        """Put joined sets of a run into the cache, unless another process was first.

        If that fails, the next run joins again.
        """
        temporary = self.folder.with_name(f".tmp-{uuid.uuid4().hex}")
        try:
            make_folder(temporary)
            for name in (*read_joined(made)["files"], RECORD):
                _link(made / name, temporary / name)
            temporary.rename(self.folder)
        except (OSError, StorageError) as error:
            if not self.folder.exists():
                say(f"warning: the joined sets are not kept for later runs: {error}. Set train.joined_dir", err=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        _delete_old(self.folder.parent)


def read_joined(folder: Path) -> dict[str, Any]:
    """Read the record of joined sets. Raises DataError if it is damaged or missing, and as `read_json` does."""
    file = folder / RECORD
    if not file.exists():
        raise DataError(f"{file}: missing")
    record = _SCHEMA.read(file)
    if not is_sealed(record):
        raise DataError(f"{file}: damaged, its SHA-256 is not that of its content")
    return record


def write_joined(folder: Path, record: Mapping[str, Any]) -> None:
    """Write the record of joined sets. Raises StorageError."""
    replace_file(folder / RECORD, sealed(record))


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        # Another file system, one without links, or a file of another user's.
        shutil.copyfile(source, target)


def _delete_old(folder: Path) -> None:
    """Delete the sets that were not used for longest, and what killed processes have left."""
    with contextlib.suppress(OSError):
        there = [path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()]
        kept = sorted((path for path in there if _KEY.fullmatch(path.name)), key=_last_use, reverse=True)
        abandoned = time.time() - _ABANDONED_SECONDS
        left = [path for path in there if TEMPORARY.fullmatch(path.name) and path.stat().st_mtime < abandoned]
        for path in (*kept[_MOST_KEPT:], *left):
            _delete(path)


def _last_use(folder: Path) -> float:
    with contextlib.suppress(OSError):
        return (folder / RECORD).stat().st_mtime
    return 0.0


def _delete(folder: Path) -> None:
    """Delete a folder, which is gone for others at once."""
    aside = folder.with_name(f".tmp-{uuid.uuid4().hex}")
    with contextlib.suppress(OSError):
        folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)
