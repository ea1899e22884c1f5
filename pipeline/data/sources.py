"""Find, read and count the rows of a preference dataset, wherever it is.

Local files are read as streams, so memory does not grow with their length. A row is decoded only when it is loaded: a
worker that skips another worker's rows pays for finding them, not for parsing them.
"""

import contextlib
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.base.digests import sha256_of_file, sha256_of_files
from pipeline.base.errors import ConfigError, DataError, first_line
from pipeline.base.files import read_json, special_kind
from pipeline.config.data import DataConfig
from pipeline.data.readers import READERS, is_json_array, json_lines, load_hub, load_saved, open_parquet, saved_folder
from pipeline.data.rows import Row, Source

__all__ = [
    "as_recorded",
    "count_rows",
    "data_files",
    "describe",
    "digests_of_data",
    "digests_of_rows",
    "open_source",
    "read_rows",
]

_STATE = "state.json"
_ENDINGS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet", ".csv": "csv"}


def open_source(data: DataConfig, name: str = "train") -> Source:
    """Find the rows of a set by its name. Raises ConfigError for an unknown set, file or format."""
    own = data.of(name)
    path = own.path or ""
    base, start, stop = _parse_split(own.split)
    kind, files = _find_files(path, base, own.format)
    return Source(
        path=path,
        format=kind,
        name=own.name,
        revision=own.revision,
        split=base,
        start=start,
        stop=stop,
        files=files,
        columns=own.columns,
        roles=own.roles,
        streaming=own.streaming,
    )


def read_rows(source: Source) -> Iterator[Row]:
    """Yield the rows of the source in order, from `start` to `stop`.

    Raises DataError if a whole file is damaged or has no row to read, StorageError if a file or the hub can't be read.
    """
    number = 0
    for row in READERS[source.format](source):
        if source.stop is not None and row.number >= source.stop:
            return
        number = row.number + 1
        if row.number >= source.start:
            yield row
    if number <= source.start:
        raise DataError(f"{describe(source)}: no rows in it; check data.path and data.split")


def count_rows(source: Source) -> int | None:
    """Count the rows from `start` to `stop` without decoding them; None if they are parsed or fetched all at once."""
    if source.format == "jsonl" and not is_json_array(source):
        total = sum(1 for _ in json_lines(source))
    elif source.format == "parquet":
        total = sum(open_parquet(file).metadata.num_rows for file in source.files)
    elif source.format == "disk":
        total = len(load_saved(source))
    elif source.format == "csv":
        total = sum(1 for _ in itertools.islice(READERS["csv"](source), source.stop))
    else:
        return None
    stop = total if source.stop is None else min(source.stop, total)
    return max(0, stop - source.start)


def data_files(source: Source) -> tuple[Path, ...]:
    """Return the local files that hold the rows; none for a hub dataset."""
    if source.format != "disk":
        return source.files
    folder = saved_folder(source)
    files = [folder / name for name in (_STATE, "dataset_info.json", *_saved_names(folder))]
    for file in files:
        if not file.is_file():
            raise DataError(f"{folder}: not a readable save_to_disk folder (no file {file.name} in it)")
    return tuple(files)


def digests_of_data(source: Source) -> dict[str, str]:
    """Return the SHA-256 of what decides the rows of local data, by file name; nothing for a hub dataset.

    Names of a `save_to_disk` folder are relative to it. `state.json` stands for the order of its files and their types.
    """
    files = data_files(source)
    if source.format != "disk":
        return sha256_of_files(files)
    folder = saved_folder(source)
    within, names = folder.relative_to(source.path), _saved_names(folder)
    state = json.dumps([names, read_json(folder / "dataset_info.json").get("features")], sort_keys=True)
    digests = {(within / name).as_posix(): sha256_of_file(folder / name) for name in names}
    return {**digests, (within / _STATE).as_posix(): hashlib.sha256(state.encode()).hexdigest()}


def digests_of_rows(source: Source) -> dict[str, str] | None:
    """Return the SHA-256 of what decides the rows, by file; None if they are streamed, so that nobody knows them.

    Those of a hub dataset are of the files that it was fetched into.
    """
    if source.format != "hub":
        return digests_of_data(source)
    files = [] if source.streaming else [Path(file["filename"]) for file in load_hub(source).cache_files]
    return {f"{number}/{file.name}": sha256_of_file(file) for number, file in enumerate(files)} or None


def as_recorded(stored: Any, now: Any) -> Any:
    """Complete stored digests by what earlier versions did not record of a `save_to_disk` folder: splits and state."""
    if not isinstance(now, dict) or not isinstance(stored, dict):
        return stored
    has_state = [any(Path(name).name == _STATE for name in digests) for digests in (stored, now)]
    return {name: stored.get(name, digest) for name, digest in now.items()} if has_state == [False, True] else stored


def _saved_names(folder: Path) -> list[str]:
    """Return the names of the files that a `save_to_disk` folder is read from, in their order."""
    try:
        return [str(file["filename"]) for file in read_json(folder / _STATE)["_data_files"]]
    except (DataError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: not a readable save_to_disk folder ({first_line(error)})") from error


def describe(source: Source) -> str:
    """Name the source for people: its path, split and range of rows."""
    rows = "" if (source.start, source.stop) == (0, None) else f"[{source.start or ''}:{source.stop or ''}]"
    return f"{source.path} ({source.split}{rows})"


def _parse_split(split: str) -> tuple[str, int, int | None]:
    match = re.fullmatch(r"([\w.+-]+)(?:\[([0-9]{,18}):([0-9]{,18})\])?", split)
    if match is None:
        raise ConfigError(
            f"data.split: must be a name with or without a range of rows, got {split!r}. Write train or train[200:1000]"
        )
    base, start, stop = match[1], int(match[2] or 0), int(match[3]) if match[3] else None
    if stop is not None and stop <= start:
        raise ConfigError(f"data.split: must hold rows, got {split!r}")
    return base, start, stop


def _ending(path: Path) -> str | None:
    suffixes = [s.lower() for s in path.suffixes if s.lower() != ".gz"]
    return _ENDINGS.get(suffixes[-1]) if suffixes else None


def _find_files(path: str, split: str, format: str | None) -> tuple[str, tuple[Path, ...]]:
    local, exists = Path(path), False
    with contextlib.suppress(OSError):  # a name that is too long, a folder without permission
        exists = local.exists()
    if format == "hub" or not path or not exists:
        looks_local = format not in (None, "hub") or _ending(local) is not None or path.startswith((".", "/", "~"))
        if looks_local or path.count("/") > 1 or not path:
            raise ConfigError(f"data.path: {path!r}: no such file or folder")
        return "hub", ()
    if local.is_dir() and ((local / "state.json").exists() or (local / "dataset_dict.json").exists()):
        return "disk", ()
    if format == "disk":
        raise ConfigError(f"data.path: must be a folder made by save_to_disk, got {path}")
    if not local.is_dir() and (found := special_kind(local)) is not None:
        raise ConfigError(f"data.path: must be a regular file or a folder, got {found}, {path}. Name a file")
    files = _files_of_split(local, split, format) if local.is_dir() else (local,)
    kinds = {format or _ending(file) for file in files}
    if len(kinds) > 1:
        raise ConfigError(f"data.path: {path}: files of several formats for split {split}; set data.format")
    kind = kinds.pop()
    if kind is None:
        raise ConfigError(f"data.path: {path}: can't tell its format; set data.format to jsonl, parquet or csv")
    return kind, files


def _files_of_split(folder: Path, split: str, format: str | None) -> tuple[Path, ...]:
    """Return `SPLIT.jsonl`, `SPLIT-00000-of-00002.parquet`, ..., of the folder, or of its `data/` as on the hub.

    Only a number may follow the split's name: `train_prefs.parquet` is another split.
    """
    stems = re.compile(rf"{re.escape(split)}(?:[-_.]\d[\w-]*)?")
    for place in filter(Path.is_dir, (folder, folder / "data")):
        found = [
            file
            for file in sorted(place.iterdir())
            if file.is_file()
            and _ending(file) is not None
            and format in (None, _ending(file))
            and stems.fullmatch(_stem(file))
        ]
        if found:
            _check_whole(place, found)
            return tuple(found)
    raise ConfigError(
        f"data.path: {folder}: no file of split {split!r} in it, like {split}.jsonl or {split}-00000.parquet"
    )


def _stem(file: Path) -> str:
    return re.sub(r"\.\w+(?:\.gz)?$", "", file.name, flags=re.IGNORECASE)


def _check_whole(folder: Path, files: Sequence[Path]) -> None:
    """Refuse a split of which a numbered file is missing, or that is there twice. Raises ConfigError."""
    named: dict[str, Path] = {}
    numbered: dict[int, list[Path]] = {}
    for file in files:
        if (twin := named.setdefault(_stem(file), file)) is not file and _ending(twin) == _ending(file):
            raise ConfigError(
                f"data.path: must hold each row once, got {twin.name} and {file.name} in {folder}. Remove one of them"
            )
        if count := re.search(r"-of-(\d+)$", _stem(file)):
            numbered.setdefault(int(count[1]), []).append(file)
    if len(numbered) > 1:
        (one, *_), (other, *_), *_ = numbered.values()
        raise ConfigError(
            f"data.path: must hold one set of numbered files, got {one.name} and {other.name} in {folder}. Remove "
            "one set"
        )
    for wanted, there in numbered.items():
        if len(there) < wanted:
            raise ConfigError(
                f"data.path: must hold all {wanted} files of the split, got {len(there)} in {folder}. Fetch the "
                "others, or name a file"
            )
