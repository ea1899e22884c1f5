"""Read the rows of one file, folder or hub dataset: JSON Lines, JSON arrays, CSV, Parquet, save_to_disk, hub."""

import csv
import functools
import gzip
import io
import itertools
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, AnyStr, cast

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.base.errors import BadRow, ConfigError, DataError, StorageError, first_line
from pipeline.config.schema import PAIR_COLUMNS
from pipeline.data.rows import LARGEST_ROW, Row, Source

__all__ = [
    "READERS",
    "is_json_array",
    "json_lines",
    "load_saved",
    "open_parquet",
]

_LARGEST_ARRAY = 2**30
"""Bytes of a JSON array, which is held as a whole, and in some ten times the memory once it is parsed"""


_UTF16 = (b"\xff\xfe", b"\xfe\xff")


_LARGEST_FOOTER = 16 * 2**20


_LARGEST_GROUP = 16 * 2**30
"""Bytes of one row group, unpacked: its pages are fetched together"""


_ROWS_CHECKED_AT_ONCE = 1000


def _open_bytes(file: Path) -> IO[bytes]:
    try:
        return cast(IO[bytes], gzip.open(file, "rb") if file.suffix.lower() == ".gz" else file.open("rb"))
    except OSError as error:
        raise StorageError(f"{file}: can't be read ({error.strerror})") from error


def _guarded(file: Path, lines: Iterable[AnyStr]) -> Iterator[AnyStr]:
    """Name the file when its stream breaks: cut or damaged gzip, a failing disk."""
    try:
        yield from lines
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{file}: damaged gzip file ({error}); fetch it again") from error
    except OSError as error:
        raise StorageError(f"{file}: can't be read ({error.strerror or error})") from error


def _lines(stream: IO[bytes]) -> Iterator[bytes]:
    """Yield the lines; of one above the limit its beginning alone, which is then still above it."""
    while line := stream.readline(LARGEST_ROW + 1):
        yield line
        while len(line) > LARGEST_ROW and not line.endswith(b"\n"):
            line = stream.readline(LARGEST_ROW + 1)


def is_json_array(source: Source) -> bool:
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
                # Of a line that is too long, blanks at its beginning say nothing about the rest.
                if text.strip() or len(line) > LARGEST_ROW:
                    yield file, number, text


def _read_jsonl(source: Source) -> Iterator[Row]:
    if is_json_array(source):
        yield from _read_json_array(source)
        return
    for row, (file, number, line) in enumerate(json_lines(source)):
        place = f"{file}:{number}"
        yield Row(row, place, lambda line=line, place=place: _parse_json_line(line, place))  # type: ignore[misc]


def _parse_json_line(line: bytes, place: str) -> Mapping[str, Any]:
    if len(line) > LARGEST_ROW:
        raise BadRow("too_large", f"{place}: longer than {LARGEST_ROW:,} bytes, which no row may be")
    hint = "; the file looks like UTF-16, save it as UTF-8" if b"\x00" in line[:4] or line[:2] in _UTF16 else ""
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
    if not isinstance(value, dict):
        raise BadRow("not_json", f"{place}: expected a JSON object, found {type(value).__name__}")
    return value


def _object_without_duplicates(items: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(items)
    if len(result) != len(items):
        twice = Counter(key for key, _ in items).most_common(1)[0][0]
        raise ValueError(f"key {twice!r} is there twice")
    return result


def _read_json_array(source: Source) -> Iterator[Row]:
    number = 0
    for file in source.files:
        with _open_bytes(file) as stream:
            chunks = _guarded(file, iter(functools.partial(stream.read, 2**20), b""))
            content = b"".join(itertools.islice(chunks, _LARGEST_ARRAY // 2**20 + 1))
        if len(content) > _LARGEST_ARRAY:
            raise DataError(f"{file}: a JSON array above {_LARGEST_ARRAY:,} bytes; write one row a line (.jsonl)")
        try:
            items = json.loads(content.decode("utf-8-sig"), object_pairs_hook=_object_without_duplicates)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file}: not usable as a JSON array: {error}") from error
        for i, item in enumerate(items):
            place = f"{file} item {i + 1}"
            yield Row(number, place, lambda item=item, place=place: _as_object(item, place))  # type: ignore[misc]
            number += 1


def _as_object(item: Any, place: str) -> Mapping[str, Any]:
    if not isinstance(item, dict):
        raise BadRow("not_json", f"{place}: expected a JSON object, found {type(item).__name__}")
    return item


def _read_csv(source: Source) -> Iterator[Row]:
    number = 0
    for file in source.files:
        with _open_bytes(file) as stream:
            # What is not UTF-8 is let through as lone surrogates, for the row that holds it to be named by _csv_row.
            text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
            # A preference text can be long; the csv module's own limit is 128 KiB a cell.
            csv.field_size_limit(LARGEST_ROW)
            reader = csv.reader(_guarded(file, _csv_lines(file, text)), strict=True)
            header: list[str] | None = None
            while True:
                line = reader.line_num + 1
                try:
                    cells = next(reader)
                except StopIteration:
                    break
                except csv.Error as error:
                    raise DataError(f"{file}:{line}: not CSV: {error}") from error
                if not cells:
                    continue
                if header is None:
                    header = cells
                    if not _is_utf8(header) or "\0" in header[0]:
                        raise DataError(f"{file}:{line}: the header is not UTF-8; save the file as UTF-8")
                    if len(set(header)) < len(header):
                        raise DataError(f"{file}:{line}: the header names a column twice: {', '.join(header)}")
                    continue
                place = f"{file}:{line}"
                yield Row(
                    number,
                    place,
                    lambda h=header, c=cells, p=place: _csv_row(h, c, p),  # type: ignore[misc]
                )
                number += 1


def _csv_lines(file: Path, text: IO[str]) -> Iterator[str]:
    number = 0
    while line := text.readline(LARGEST_ROW + 1):
        number += 1
        if len(line) > LARGEST_ROW:
            # Where the row ends that this line is of, only all of the line could tell.
            raise DataError(f"{file}:{number}: longer than {LARGEST_ROW:,} characters; split the row or take it out")
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
    """Open a Parquet file from a stranger: what its footer says is checked before anything is made room for."""
    options = {
        # A footer of a few kilobytes can ask for gigabytes of strings and lists.
        "thrift_string_size_limit": _LARGEST_FOOTER,
        "thrift_container_size_limit": 100_000,
        # Columns are what they are stored as, whatever types of other programs the file names.
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
    except Exception as error:  # whatever the library raises for a file that it can make nothing of
        if isinstance(error, OSError) and error.errno is not None:
            raise StorageError(f"{file}: can't be read ({error.strerror})") from error
        raise DataError(f"{file}: not a readable Parquet file ({first_line(error)})") from error
    if problem is not None:
        raise DataError(f"{file}: damaged, {problem}")
    if len(set(names)) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise DataError(f"{file}: column {twice!r} is there twice; rename one of the two")
    return parquet


def _footer_alone(file: Path) -> bytes:
    """A Parquet file of the footer alone, and without the types that a writer in Arrow had: to read one that is not
    Arrow's own runs the code of whatever library has registered it. Texts are texts without it."""
    with file.open("rb") as stream:
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
    """Say what in a footer can't be true, or must not be read. Of columns nothing is asked: that of an encrypted one
    ends the process."""
    rows = 0
    for number in range(footer.num_row_groups):
        group = footer.row_group(number)
        rows += group.num_rows
        if group.total_byte_size > _LARGEST_GROUP:
            return f"row group {number} unpacks to more than {_LARGEST_GROUP:,} bytes; write smaller row groups"
    return None if rows == footer.num_rows else f"its footer counts {footer.num_rows:,} rows, its groups {rows:,}"


def _read_parquet(source: Source) -> Iterator[Row]:
    number = 0
    wanted = {source.columns.get(name, name) for name in PAIR_COLUMNS} | set(source.columns.values())
    needed = {source.columns.get(name, name) for name in ("chosen", "rejected")} | set(source.columns.values())
    for file in source.files:
        parquet = open_parquet(file)
        names = parquet.schema_arrow.names
        # With a needed column missing, read all: the pair's own message then names the columns that are there.
        columns = (
            [name for name in names if name in wanted] if needed <= set(names) and not source.all_columns else None
        )
        in_file = 0
        try:
            for batch in parquet.iter_batches(batch_size=256, columns=columns):
                for i in range(batch.num_rows):
                    place = f"{file} row {in_file}"
                    yield Row(number, place, lambda b=batch, i=i, p=place: _arrow_row(b, i, p))  # type: ignore[misc]
                    number += 1
                    in_file += 1
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DataError(f"{file}: damaged after row {in_file} ({first_line(error)})") from error
        if in_file != parquet.metadata.num_rows:
            raise DataError(f"{file}: damaged, holds {in_file:,} rows, not the {parquet.metadata.num_rows:,} it counts")


def _arrow_row(batch: pa.RecordBatch, i: int, place: str) -> Mapping[str, Any]:
    try:
        return {name: batch.column(c)[i].as_py() for c, name in enumerate(batch.schema.names)}
    except UnicodeDecodeError as error:
        raise BadRow("not_utf8", f"{place}: holds text that is not UTF-8 ({error.reason})") from error
    except (pa.ArrowException, ValueError, OverflowError, LookupError) as error:
        # A date that Python does not know, a time zone that nobody knows.
        raise BadRow("wrong_type", f"{place}: holds a value that can't be read ({first_line(error)})") from error


def load_saved(source: Source) -> Any:
    import datasets

    try:
        loaded = datasets.load_from_disk(source.path)
    except Exception as error:  # the library trusts what the folder's files say, and fails wherever they do not
        raise DataError(f"{source.path}: not a readable save_to_disk folder ({first_line(error)})") from error
    if isinstance(loaded, datasets.DatasetDict):
        if source.split not in loaded:
            raise ConfigError(f"data.split: {source.path} has no split {source.split!r}; it has {', '.join(loaded)}")
        loaded = loaded[source.split]
    return _without_media(loaded.with_format(None))


def _without_media(dataset: Any) -> Any:
    """Leave out columns of images and the like: a row of theirs is read from wherever on the disk or the net it says.

    Preferences are text; no pair has such a column.
    """
    media = [name for name, feature in (getattr(dataset, "features", None) or {}).items() if _holds_media(feature)]
    if not media:
        return dataset
    # A stream would open them on its way to leaving them out.
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
    yield from _map_style_rows(dataset, source, functools.partial(_checked_row, dataset, set()))


def _checked_row(dataset: Any, checked: set[int], number: int) -> Mapping[str, Any]:
    """Read a row of Arrow files, which are mapped as they are: a flipped bit in them would end the process."""
    table, some = dataset.data, number // _ROWS_CHECKED_AT_ONCE
    if some not in checked:
        table.slice(some * _ROWS_CHECKED_AT_ONCE, _ROWS_CHECKED_AT_ONCE).validate(full=True)
        checked.add(some)
    row: Mapping[str, Any] = dataset[number]
    return row


def _read_hub(source: Source) -> Iterator[Row]:
    import datasets

    try:
        loaded = datasets.load_dataset(
            source.path,
            source.name,
            split=source.split,
            revision=source.revision,
            streaming=source.streaming,
        )
    except ConnectionError as error:
        raise StorageError(
            f"data.path: {source.path!r} is no file here, and the hub can't be reached: {first_line(error)}"
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"data.path: {source.path!r} is neither a file here nor a dataset that the hub gives "
            f"(split {source.split}): {first_line(error)}"
        ) from error
    except datasets.exceptions.DatasetsError as error:
        raise DataError(f"data.path: {source.path!r}: the library can't read it: {first_line(error)}") from error
    loaded = _without_media(loaded)
    if not source.streaming:
        yield from _map_style_rows(loaded, source, loaded.__getitem__)
        return
    try:
        for number, values in enumerate(loaded):
            yield Row(number, f"{source.path} ({source.split}) row {number}", lambda v=values: v)  # type: ignore[misc]
    except OSError as error:
        raise StorageError(f"{source.path}: the stream broke off ({first_line(error)}); run again") from error


def _map_style_rows(dataset: Any, source: Source, read: Callable[[int], Mapping[str, Any]]) -> Iterator[Row]:
    for number in range(source.start, len(dataset)):
        place = f"{source.path} ({source.split}) row {number}"
        yield Row(number, place, functools.partial(_map_style_row, read, number, place))


def _map_style_row(read: Callable[[int], Mapping[str, Any]], number: int, place: str) -> Mapping[str, Any]:
    try:
        return read(number)
    except UnicodeDecodeError as error:
        raise BadRow("not_utf8", f"{place}: holds text that is not UTF-8 ({error.reason})") from error
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{place}: damaged ({first_line(error)})") from error
    except (ValueError, OverflowError, LookupError) as error:
        raise BadRow("wrong_type", f"{place}: holds a value that can't be read ({first_line(error)})") from error


READERS: Mapping[str, Callable[[Source], Iterator[Row]]] = {
    "jsonl": _read_jsonl,
    "csv": _read_csv,
    "parquet": _read_parquet,
    "disk": _read_disk,
    "hub": _read_hub,
}
