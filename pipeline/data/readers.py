"""Read the rows of one file, folder or hub dataset: JSON Lines, JSON arrays, CSV, Parquet, save_to_disk, hub."""

import csv
import gzip
import io
import itertools
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, AnyStr, cast

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.base.errors import BadRow, ConfigError, DataError, StorageError, first_line
from pipeline.base.files import find_special, open_file, read_json
from pipeline.config.columns import LAYOUT_COLUMNS, PAIR_COLUMNS
from pipeline.data.pairs import kind_of
from pipeline.data.rows import LARGEST_ROW, Row, Source

__all__ = ["READERS", "is_json_array", "json_lines", "load_hub", "load_saved", "open_parquet", "saved_folder"]

_LARGEST_ARRAY = 2**30
"""Most bytes of a JSON array. It is held as a whole, and takes some ten times the memory once it is parsed."""

_LARGEST_FOOTER = 16 * 2**20
_LARGEST_GROUP = 16 * 2**30
"""Most unpacked bytes of a row group, whose pages are read together."""

_ROWS_AT_ONCE = 256
_ROWS_CHECKED_AT_ONCE = 1000


def _open_bytes(file: Path) -> IO[bytes]:
    try:
        stream = open_file(file)
        if file.suffix.lower() != ".gz":
            return stream
        stream.close()
        return cast(IO[bytes], gzip.open(file, "rb"))
    except OSError as error:
        raise StorageError(f"{file}: can't be read ({error.strerror})") from error


def _guarded(file: Path, lines: Iterable[AnyStr]) -> Iterator[AnyStr]:
    """Name the file if its stream breaks: cut or damaged gzip, a failing disk."""
    try:
        yield from lines
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{file}: damaged gzip file ({error}); fetch it again") from error
    except OSError as error:
        raise StorageError(f"{file}: can't be read ({error.strerror or error})") from error


def _lines(stream: IO[bytes]) -> Iterator[bytes]:
    """Yield the lines. A line above the limit is cut, but still above it."""
    while line := stream.readline(LARGEST_ROW + 1):
        yield line
        while len(line) > LARGEST_ROW and not line.endswith(b"\n"):
            line = stream.readline(LARGEST_ROW + 1)


def is_json_array(source: Source) -> bool:
    """Return True if the source's `.json` files hold an array each, instead of JSON Lines."""
    if not all(file.name.lower().endswith((".json", ".json.gz")) for file in source.files):
        return False
    with _open_bytes(source.files[0]) as stream:
        for chunk in _guarded(source.files[0], iter(lambda: stream.read(256), b"")):
            if text := chunk.lstrip(b"\xef\xbb\xbf \r\n\t"):
                return text.startswith(b"[")
    return False


def json_lines(source: Source) -> Iterator[tuple[Path, int, bytes]]:
    """Yield (file, line number from 1, line) of every line that is not blank."""
    for file in source.files:
        with _open_bytes(file) as stream:
            for number, line in enumerate(_guarded(file, _lines(stream)), start=1):
                text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                # A line that was cut may be blank at its beginning only.
                if text.strip() or len(line) > LARGEST_ROW:
                    yield file, number, text


def _read_jsonl(source: Source) -> Iterator[Row]:
    if is_json_array(source):
        yield from _read_json_array(source)
        return
    for row, (file, number, line) in enumerate(json_lines(source)):
        place = f"{file}:{number}"
        yield Row(row, place, partial(_parse_json_line, line, place))


def _parse_json_line(line: bytes, place: str) -> Mapping[str, Any]:
    if len(line) > LARGEST_ROW:
        raise BadRow("too_large", f"{place}: longer than {LARGEST_ROW:,} bytes, which no row may be")
    is_utf16 = b"\x00" in line[:4] or line[:2] in (b"\xff\xfe", b"\xfe\xff")
    hint = "; the file looks like UTF-16, save it as UTF-8" if is_utf16 else ""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRow("not_utf8", f"{place}: not UTF-8 at byte {error.start + 1} of the line{hint}") from error
    try:
        value = json.loads(text, object_pairs_hook=_object_without_duplicates)
    except json.JSONDecodeError as error:
        raise BadRow("not_json", f"{place}: not JSON at column {error.colno}: {error.msg}{hint}") from error
    except (ValueError, RecursionError) as error:
        raise BadRow("not_json", f"{place}: not usable JSON: {error}") from error
    return _as_object(value, place)


def _object_without_duplicates(items: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(items)
    if len(result) != len(items):
        raise ValueError(f"key {_most_common(key for key, _ in items)!r} is repeated")
    return result


def _as_object(item: Any, place: str) -> Mapping[str, Any]:
    if not isinstance(item, dict):
        raise BadRow("not_json", f"{place}: must be a JSON object, got {kind_of(item)}")
    return item


def _most_common(names: Iterable[str]) -> str:
    return Counter(names).most_common(1)[0][0]


def _read_json_array(source: Source) -> Iterator[Row]:
    numbers = itertools.count()
    for file in source.files:
        with _open_bytes(file) as stream:
            chunks = _guarded(file, iter(partial(stream.read, 2**20), b""))
            content = b"".join(itertools.islice(chunks, _LARGEST_ARRAY // 2**20 + 1))
        if len(content) > _LARGEST_ARRAY:
            raise DataError(
                f"{file}: a JSON array of more than {_LARGEST_ARRAY:,} bytes; write one row per line (.jsonl)"
            )
        try:
            items = json.loads(content.decode("utf-8-sig"), object_pairs_hook=_object_without_duplicates)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file}: not usable as a JSON array: {error}") from error
        for i, item in enumerate(items, start=1):
            place = f"{file} item {i}"
            yield Row(next(numbers), place, partial(_as_object, item, place))


def _read_csv(source: Source) -> Iterator[Row]:
    numbers = itertools.count()
    for file in source.files:
        with _open_bytes(file) as stream:
            # Bytes that are not UTF-8 become lone surrogates, so that `_csv_row` can name their row.
            text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
            # The module's own limit is 128 KiB a cell, and a preference text may be longer.
            csv.field_size_limit(LARGEST_ROW)
            reader = csv.reader(_guarded(file, _csv_lines(file, text)), strict=True)
            header: list[str] = []
            begin = 1
            try:
                for cells in reader:
                    place, begin = f"{file}:{begin}", reader.line_num + 1
                    if header and cells:
                        yield Row(next(numbers), place, partial(_csv_row, header, cells, place))
                    elif cells:
                        header = cells
                        if not _is_utf8(header) or "\0" in header[0]:
                            raise DataError(f"{place}: the header is not UTF-8; save the file as UTF-8")
                        if len(set(header)) < len(header):
                            raise DataError(f"{place}: the header names a column twice: {', '.join(header)}")
            except csv.Error as error:
                raise DataError(f"{file}:{begin}: not CSV: {error}") from error


def _csv_lines(file: Path, text: IO[str]) -> Iterator[str]:
    for number in itertools.count(1):
        line = text.readline(LARGEST_ROW + 1)
        if len(line) > LARGEST_ROW:
            # Only the whole line would tell where its row ends.
            raise DataError(f"{file}:{number}: longer than {LARGEST_ROW:,} characters; split the row or take it out")
        if not line:
            return
        yield line


def _csv_row(header: list[str], cells: list[str], place: str) -> Mapping[str, Any]:
    if len(cells) != len(header):
        raise BadRow("not_csv", f"{place}: {len(cells)} cells where the header names {len(header)} columns")
    if not _is_utf8(cells):
        raise BadRow("not_utf8", f"{place}: not UTF-8; save the file as UTF-8")
    return dict(zip(header, cells, strict=True))


def _is_utf8(cells: Sequence[str]) -> bool:
    try:
        "".join(cells).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def open_parquet(file: Path) -> pq.ParquetFile:
    """Open an untrusted Parquet file. Its footer is checked before memory is allocated for what it declares."""
    options = {
        # A footer of a few kilobytes can ask for gigabytes of strings and lists.
        "thrift_string_size_limit": _LARGEST_FOOTER,
        "thrift_container_size_limit": 100_000,
        # A column has the type it is stored as, whatever extension types the file names.
        "arrow_extensions_enabled": False,
        "page_checksum_verification": True,
    }
    try:
        with pq.ParquetFile(pa.BufferReader(_footer_alone(file)), **options) as described:
            footer, names = described.metadata, described.schema_arrow.names
            problem = _declared_wrongly(footer)
            # A text that is stored once stays so in memory, however many rows have it.
            texts = [column.path for column in described.schema if column.physical_type == "BYTE_ARRAY"]
        parquet = pq.ParquetFile(file, metadata=footer, read_dictionary=texts, **options)
    except Exception as error:  # the library may raise anything for a damaged file
        if isinstance(error, OSError) and error.errno is not None:
            raise StorageError(f"{file}: can't be read ({error.strerror})") from error
        raise DataError(f"{file}: not a readable Parquet file ({first_line(error)})") from error
    if problem is not None:
        raise DataError(f"{file}: damaged, {problem}")
    if len(set(names)) < len(names):
        raise DataError(f"{file}: column {_most_common(names)!r} is repeated; rename one of the two")
    return parquet


def _footer_alone(file: Path) -> bytes:
    """Return a Parquet file of the footer alone, without its writer's Arrow schema, whose extension types run code."""
    with open_file(file) as stream:
        size = stream.seek(0, io.SEEK_END)
        stream.seek(max(0, size - 8))
        end = stream.read()
        length = int.from_bytes(end[:4], "little")
        if end[4:] == b"PARE":
            raise ValueError("encrypted")
        if end[4:] != b"PAR1" or length > min(size, _LARGEST_FOOTER):
            raise ValueError("no footer at its end")
        stream.seek(size - 8 - length)
        return b"PAR1" + stream.read(length).replace(b"ARROW:schema", b"no-ARROW-use") + end


def _declared_wrongly(footer: pq.FileMetaData) -> str | None:
    """Return what a footer declares wrongly. Columns are not asked: an encrypted one's metadata ends the process."""
    rows = 0
    for number in range(footer.num_row_groups):
        group = footer.row_group(number)
        rows += group.num_rows
        if group.total_byte_size > _LARGEST_GROUP:
            return f"row group {number} unpacks to more than {_LARGEST_GROUP:,} bytes; write smaller row groups"
    return None if rows == footer.num_rows else f"its footer counts {footer.num_rows:,} rows, its groups {rows:,}"


def _read_parquet(source: Source) -> Iterator[Row]:
    numbers = itertools.count()
    named = {name: source.columns.get(name, name) for name in PAIR_COLUMNS} | dict(source.columns)
    # Those of other layouts, which a pair with a prompt does not use.
    others = {"system", *LAYOUT_COLUMNS}
    for file in source.files:
        parquet = open_parquet(file)
        names = parquet.schema_arrow.names
        # A dotted name leads into a column.
        there = {name: column if column in names else column.partition(".")[0] for name, column in named.items()}
        prompt = next((there[name] for name in ("prompt", "user") if there.get(name) in names), None)
        wanted = {*there.values(), *(() if prompt else others)}
        # Without a needed column all are read, so that the pair's error can name the columns that there are.
        needed = {there[name] for name in ("chosen", "rejected", *source.columns)}
        reads_all = source.all_columns or not needed <= set(names)
        columns = None if reads_all else [name for name in names if name in wanted]
        in_file = 0
        try:
            for batch in _batches(parquet, columns, prompt):
                for i in range(batch.num_rows):
                    place = f"{file} row {in_file}"
                    yield Row(next(numbers), place, partial(_decode, place, partial(_arrow_row, batch, i)))
                    in_file += 1
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DataError(f"{file}: damaged after row {in_file} ({first_line(error)})") from error
        if in_file != parquet.metadata.num_rows:
            raise DataError(f"{file}: damaged, holds {in_file:,} rows, not the {parquet.metadata.num_rows:,} it counts")


def _batches(parquet: pq.ParquetFile, columns: list[str] | None, prompt: str | None) -> Iterator[pa.RecordBatch]:
    """Yield the rows in batches: all columns from the first row on whose prompt is null, for it has another layout.

    A batch is of one row group: pyarrow can't join two groups' columns of messages.
    """
    for group in range(parquet.num_row_groups):
        for number, batch in enumerate(parquet.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=columns)):
            if columns is not None and prompt is not None and batch.column(prompt).null_count:
                columns = None
                yield from itertools.islice(parquet.iter_batches(_ROWS_AT_ONCE, row_groups=[group]), number, None)
                break
            yield batch


def _arrow_row(batch: pa.RecordBatch, i: int) -> Mapping[str, Any]:
    return {name: batch.column(c)[i].as_py() for c, name in enumerate(batch.schema.names)}


def _decode(place: str, read: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
    try:
        return read()
    except UnicodeDecodeError as error:
        raise BadRow("not_utf8", f"{place}: holds text that is not UTF-8 ({error.reason})") from error
    except OSError as error:
        raise DataError(f"{place}: damaged ({first_line(error)})") from error
    except (pa.ArrowException, ValueError, OverflowError, LookupError) as error:
        # For example a date that Python can't represent, or an unknown time zone.
        raise BadRow("wrong_type", f"{place}: holds a value that can't be read ({first_line(error)})") from error


def load_saved(source: Source) -> Any:
    """Open a `save_to_disk` folder. Return the split as a datasets.Dataset without media columns."""
    import datasets

    folder = saved_folder(source)
    if (found := find_special(folder)) is not None:
        raise DataError(f"{folder}: must hold regular files, got {found}. Take it out")
    try:
        loaded = datasets.load_from_disk(folder)
    except Exception as error:  # the library trusts the folder's files, and fails anywhere if they are damaged
        raise DataError(f"{folder}: not a readable save_to_disk folder ({first_line(error)})") from error
    return _without_media(loaded.with_format(None))


def saved_folder(source: Source) -> Path:
    """Give the folder of a `save_to_disk` source's split. Raises ConfigError without such a split."""
    folder = Path(source.path)
    if (folder / "state.json").exists():
        return folder
    splits = read_json(folder / "dataset_dict.json").get("splits")
    if not isinstance(splits, list) or not all(isinstance(name, str) for name in splits):
        raise DataError(f"{folder}: not a readable save_to_disk folder (its dataset_dict.json names no splits)")
    if source.split not in splits:
        raise ConfigError(f"data.split: {source.path} has no split {source.split!r}; it has {', '.join(splits)}")
    return folder / source.split


def _without_media(dataset: Any) -> Any:
    """Drop columns of images and the like, which no pair has: to read one opens any file or URL that the row names."""
    media = [name for name, feature in (getattr(dataset, "features", None) or {}).items() if _holds_media(feature)]
    if not media:
        return dataset
    # A stream would open them before it drops them.
    return (dataset.decode(False) if hasattr(dataset, "decode") else dataset).remove_columns(media)


def _holds_media(feature: Any) -> bool:
    if isinstance(feature, Mapping):
        return any(map(_holds_media, feature.values()))
    if isinstance(feature, list | tuple):
        return any(map(_holds_media, feature))
    if hasattr(feature, "feature"):
        return _holds_media(feature.feature)
    return hasattr(feature, "decode_example") and type(feature).__name__ != "Json"


def _read_disk(source: Source) -> Iterator[Row]:
    dataset = load_saved(source)
    return _map_style_rows(dataset, source, partial(_checked_row, dataset, set()))


def _checked_row(dataset: Any, checked: set[int], number: int) -> Mapping[str, Any]:
    """Read a row of memory-mapped Arrow files, after a check: a flipped bit in them could crash the process."""
    block = number // _ROWS_CHECKED_AT_ONCE
    if block not in checked:
        try:
            dataset.data.slice(block * _ROWS_CHECKED_AT_ONCE, _ROWS_CHECKED_AT_ONCE).validate(full=True)
        except pa.ArrowException as error:
            raise OSError(first_line(error)) from error
        checked.add(block)
    row: Mapping[str, Any] = dataset[number]
    return row


def load_hub(source: Source) -> Any:
    """Open a hub dataset, which is fetched unless it is streamed, without media columns.

    Raises ConfigError if the hub has no such dataset, StorageError if it can't be reached.
    """
    import datasets

    try:
        loaded = datasets.load_dataset(
            source.path, source.name, split=source.split, revision=source.revision, streaming=source.streaming
        )
    except ConnectionError as error:
        raise StorageError(
            f"data.path: {source.path!r} is not a file here, and the hub can't be reached: {first_line(error)}"
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"data.path: {source.path!r} is neither a file here nor a dataset that the hub gives "
            f"(split {source.split}): {first_line(error)}"
        ) from error
    except datasets.exceptions.DatasetsError as error:
        raise DataError(f"data.path: {source.path!r}: the library can't read it: {first_line(error)}") from error
    return _without_media(loaded)


def _read_hub(source: Source) -> Iterator[Row]:
    loaded = load_hub(source)
    if not source.streaming:
        yield from _map_style_rows(loaded, source, loaded.__getitem__)
        return
    try:
        for number, values in enumerate(loaded):
            yield Row(number, f"{source.path} ({source.split}) row {number}", partial(dict, values))
    except OSError as error:
        raise StorageError(f"{source.path}: the stream broke off ({first_line(error)}); run again") from error


def _map_style_rows(dataset: Any, source: Source, read: Callable[[int], Mapping[str, Any]]) -> Iterator[Row]:
    for number in range(source.start, len(dataset)):
        place = f"{source.path} ({source.split}) row {number}"
        yield Row(number, place, partial(_decode, place, partial(read, number)))


READERS: Mapping[str, Callable[[Source], Iterator[Row]]] = {
    "jsonl": _read_jsonl,
    "csv": _read_csv,
    "parquet": _read_parquet,
    "disk": _read_disk,
    "hub": _read_hub,
}
