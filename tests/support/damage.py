"""One table of damaged and odd input, with the exit status and the words that each must end in.

Rows of datasets (JSON Lines, gzip, JSON arrays, CSV, Parquet, save_to_disk), settings, models, adapters and stores.
`faults/test_damage.py` gives each to the functions that the commands use, and one of each kind to the real command;
`faults/test_security.py` and the fuzzer (`support/fuzz.py`) take payloads and seeds from here.
"""

import gzip
import json
import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as pe
import torch
from safetensors.torch import load_file, save_file

from pipeline.data.rows import LARGEST_ROW
from pipeline.models.identity import fingerprint_of
from pipeline.store.format import sealed

Change = Callable[[Path], Any]
"""Makes a file, or changes a folder"""


@dataclass(frozen=True)
class Damage:
    """One input, and the exit status and the words that it must end in."""

    content: bytes | Change
    """Bytes of a file, a function that makes the file, or one that changes a folder"""
    file: str
    """Name of the file to make; empty if `content` changes a folder"""
    status: int | tuple[int, ...]
    """Exit status, 0 if accepted; several where it depends on a library's version"""
    names: str = ""
    """Part of the message; for a bad row, the reason under which it is counted"""
    kept: int = 2
    """Number of pairs that are kept of what is accepted, or beside the row that is skipped"""
    in_row: bool = False
    """One bad row among good ones, which `on_bad_row: skip` leaves out"""

    @property
    def statuses(self) -> tuple[int, ...]:
        return (self.status,) if isinstance(self.status, int) else self.status

    def make(self, folder: Path) -> Path:
        """Make the file in the folder, or change the folder; give the path that was made or changed."""
        path = folder / self.file
        if isinstance(self.content, bytes):
            path.write_bytes(self.content)
        else:
            self.content(path)
        return path


TEMPLATE = (
    "{%- for m in messages -%}"
    "{%- if m['role'] not in ['system', 'user', 'assistant'] -%}{{ raise_exception('unknown role ' ~ m['role']) }}"
    "{%- endif -%}"
    "{%- if loop.index0 and m['role'] == messages[loop.index0 - 1]['role'] -%}"
    "{{ raise_exception('roles must alternate') }}{%- endif -%}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] + '' }}<|im_end|>{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant\n{%- endif -%}"
)
GOOD = {"prompt": "What?", "chosen": " Yes.", "rejected": " No."}
LINE = json.dumps(GOOD).encode() + b"\n"
USER, YES, NO = ({"role": role, "content": text} for role, text in (("user", "?"), ("assistant", "!"), ("user", ".")))
CHAT = {"prompt": [USER], "chosen": [YES], "rejected": [{**YES, "content": "no"}]}


def lines(*rows: Any) -> bytes:
    return b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows)


def around(row: Any) -> bytes:
    """Put the row between two good ones."""
    return lines(GOOD, row if not isinstance(row, bytes) else row + b"\n", GOOD)


def row_cases() -> Iterator[tuple[str, Any, str]]:
    """Yield a name, one bad row, and the reason under which it is counted."""
    for at in range(1, len(LINE) - 1, 5):
        yield f"cut at {at}", LINE[:at], "not_json"
    for name, row in {
        "word": b"nope",
        "python": b"{'prompt': 'a', 'chosen': 'b', 'rejected': 'c'}",
        "comma": LINE.strip()[:-1] + b",}",
        "comment": b'{"prompt": "a", /* no */ "chosen": "b", "rejected": "c"}',
        "two on a line": LINE.strip() * 2,
        "list": b'["a", "b"]',
        "text": b'"chosen"',
        "number": b"12",
        "null": b"null",
        "true": b"true",
        "NUL": b"\x00",
        "NUL in text": LINE.strip().replace(b"Yes", b"Y\x00es"),
        "control character in text": LINE.strip().replace(b"Yes", b"Y\x01es"),
        "escape that is none": LINE.strip().replace(b"Yes", b"\\x41"),
        "escape cut": LINE.strip().replace(b"Yes", b"\\u12"),
        "deep list": b"[" * 100_000,
        "deep object": b'{"a":' * 100_000,
        "deep and closed": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "huge number": b'{"id": ' + b"9" * 100_000 + b"}",
        "key twice": b'{"chosen": "a", "chosen": "b", "rejected": "c"}',
        "key twice, inside": b'{"chosen": [{"role": "user", "role": "user"}], "rejected": "c"}',
        "key twice among 200,000": b"{" + b",".join(b'"%d":0' % i for i in range(200_000)) + b',"0":0}',
        "surrogate mark cut": b'{"chosen": "\\ud83',
    }.items():
        yield name, row, "not_json"
    text = LINE.strip()
    for name, row in {
        "latin-1": text.replace(b"Yes", "J\u00e4".encode("latin-1")),
        "overlong": text.replace(b"Yes", b"\xc0\x80"),
        "surrogates as UTF-8": text.replace(b"Yes", b"\xed\xa0\x80"),
        "UTF-8 cut": text[:-1] + b"\xe2\x82",
        "0xff": b"\xff",
        "UTF-16": text.decode().encode("utf-16"),
        "UTF-32": text.decode().encode("utf-32"),
        "half a pair, high": text.replace(b"Yes", b"\\ud83d"),
        "half a pair, low": text.replace(b"Yes", b"\\udc00"),
        "half a pair in the prompt": text.replace(b"What", b"\\ud83d"),
        "half a pair in a message": json.dumps({**CHAT, "chosen": [{**YES, "content": "\ud83d"}]}).encode(),
    }.items():
        yield name, row, "not_utf8"
    yield "too long", json.dumps({**GOOD, "chosen": "a" * LARGEST_ROW}).encode(), "too_large"
    yield "too long, other column", json.dumps({**GOOD, "id": "a" * LARGEST_ROW}).encode(), "too_large"
    yield "too long, no JSON", b"a" * (3 * LARGEST_ROW), "too_large"
    yield "too long, blanks first", b" " * (LARGEST_ROW + 10) + text, "too_large"
    for column in ("chosen", "rejected"):
        yield f"no {column}", {k: v for k, v in GOOD.items() if k != column}, "missing_column"
        for empty in ("", " ", "\n\t", "\u00a0"):
            yield f"{column} is {empty!r}", {**GOOD, column: empty}, "empty_completion"
        yield f"{column} is no messages", {**GOOD, column: []}, "empty_completion"
        yield f"{column} is an empty message", {**CHAT, column: [{**YES, "content": ""}]}, "empty_completion"
    yield "no columns", {}, "missing_column"
    yield "other columns", {f"column {i}": i for i in range(10_000)}, "missing_column"
    yield "empty prompt of messages", {**CHAT, "prompt": []}, "empty_prompt"
    yield "nothing shared", {"chosen": "Yes.", "rejected": "No."}, "no_shared_prompt"
    yield "equal without a prompt", {"chosen": "Yes.", "rejected": "Yes."}, "no_shared_prompt"
    yield "no message shared", {"chosen": [YES], "rejected": [{**YES, "content": "no"}]}, "no_shared_prompt"
    values = {
        "null": None,
        "int": 1,
        "float": 1.5,
        "NaN": float("nan"),
        "bool": True,
        "words": ["a"],
        "object": {"a": 1},
    }
    values |= {
        "numbers": [1, 2],
        "lists": [["a"]],
        "a null in a list": [None],
        "messages without a role": [{"content": "a"}],
    }
    for column in ("prompt", "chosen", "rejected"):
        for name, value in values.items():
            if (column, name) != ("prompt", "null"):
                yield f"{column} is {name}", {**GOOD, column: value}, "wrong_type"
    yield "role is no text", {**CHAT, "chosen": [{**YES, "role": 5}]}, "wrong_type"
    yield "role is null", {**CHAT, "chosen": [{**YES, "role": None}]}, "wrong_type"
    yield "text and messages", {**CHAT, "chosen": "Yes."}, "wrong_type"
    yield from _rows_of_other_layouts()
    for name, value in {"int": 1, "object": {"a": 1}, "no JSON": "{", "JSON, no list": "{}"}.items():
        yield f"tools are {name}", {**CHAT, "tools": value}, "wrong_type"
    for name, value in {"list": [1], "int": 1, "text": "a"}.items():
        yield f"template arguments are {name}", {**CHAT, "chat_template_kwargs": value}, "wrong_type"
    for name in ("chat_template", "tokenize", "truncation", "max_length", "return_tensors", "messages"):
        yield f"template argument {name}", {**CHAT, "chat_template_kwargs": {name: "x"}}, "wrong_type"
    yield "unknown role", {**CHAT, "chosen": [{**YES, "role": "robot"}]}, "template_error"
    yield "roles do not alternate", {**CHAT, "chosen": [NO]}, "template_error"
    for name, value in {"int": 1, "null": None, "list": ["a"], "object": {"a": "b"}}.items():
        yield f"content is {name}", {**CHAT, "rejected": [{**YES, "content": value}, NO, YES]}, "not_text"
    yield "half a pair in a role", {**CHAT, "chosen": [{**YES, "role": "\ud83d"}]}, "not_utf8"


def _rows_of_other_layouts() -> Iterator[tuple[str, Any, str]]:
    """Yield bad rows in the layouts of other tools."""
    said = {"from": "human", "value": "?"}
    share = {"conversations": [said], "chosen": {"from": "gpt", "value": "!"}, "rejected": {"from": "gpt", "value": ""}}
    yield "ShareGPT: empty", share, "empty_completion"
    for name, turn in {"unknown": {"from": "x"}, "number": {"from": 5}, "call": {"from": "function_call"}}.items():
        yield f"ShareGPT: {name}", {**share, "conversations": [{**said, **turn}]}, "wrong_type"
    yield "ShareGPT: half a pair", {**share, "conversations": [{**said, "value": "\ud83d"}]}, "not_utf8"
    yield "ShareGPT: no text", {**share, "chosen": {"from": "gpt", "value": {"a": 1}}}, "not_text"
    open_ai = {"input": {"messages": [USER]}, "preferred_output": [YES], "non_preferred_output": [YES]}
    yield "OpenAI: no input", {**open_ai, "input": None}, "missing_column"
    yield "OpenAI: tools", {**open_ai, "input": {"messages": [USER], "tools": 5}}, "wrong_type"
    yield "Alpaca: history", {"instruction": "a", "chosen": "b", "rejected": "c", "history": [["a"]]}, "wrong_type"
    yield "Alpaca: input", {"instruction": "a", "chosen": "b", "rejected": "c", "input": 5}, "wrong_type"
    yield "ms-swift: no answer", {"messages": [USER], "rejected_response": "no"}, "wrong_type"
    two = [{"completion": "a", "rank": 0}, {"completion": "b", "rank": 1}]
    for name, items in {
        "a rank that is text": [two[0], {**two[1], "rank": "worst"}],
        "a rank that is NaN": [two[0], {**two[1], "rank": float("nan")}],
        "no rank": [two[0], {"completion": "b"}],
        "no text": [two[0], {"rank": 1}],
    }.items():
        yield f"ranked: {name}", {"context": "a", "completions": items}, "wrong_type"
    yield "ranked: one", {"context": "a", "completions": two[:1]}, "missing_column"
    for name, value in {"null": None, "bool": True, "NaN": float("nan"), "words": "first"}.items():
        row = {"context": "a", "response1": "b", "response2": "c", "overall_preference": value}
        yield f"compared by {name}", row, "missing_column"


def jsonl_cases() -> Iterator[tuple[str, Damage]]:
    for name, row, reason in row_cases():
        yield f"jsonl row: {name}", Damage(around(row), "p.jsonl", 65, reason, in_row=True)
    # Without a mark, UTF-16 of ASCII is UTF-8 with NULs.
    for code in ("utf-16-le", "utf-16-be"):
        yield f"jsonl: {code}", Damage(LINE.decode().encode(code) * 2, "p.jsonl", 65, "looks like UTF-16")
    yield "jsonl: empty", Damage(b"", "p.jsonl", 65, "no rows")
    yield "jsonl: blank", Damage(b"\n \n\t\r\n", "p.jsonl", 65, "no rows")
    yield "jsonl: mark alone", Damage(b"\xef\xbb\xbf", "p.jsonl", 65, "no rows")
    yield "jsonl: zip", Damage(_zip, "p.jsonl", 65, "p.jsonl:1")
    yield "jsonl: Parquet", Damage(lambda file: pq.write_table(make_table(), file), "p.jsonl", 65, "p.jsonl:1")
    yield "jsonl: a folder without files", Damage(lambda file: file.mkdir(), "p.jsonl", 2, "no file of split")
    for name, content in {
        "mark": b"\xef\xbb\xbf" + LINE * 2,
        "CRLF": (LINE * 2).replace(b"\n", b"\r\n"),
        "blank lines": b"\n\n" + LINE + b"  \n" + LINE,
        "no last end": (LINE * 2)[:-1],
        "more columns": lines({**GOOD, "score": float("nan"), "low": float("-inf")}, {**GOOD, "x": [1]}),
        "escaped NUL": lines({**GOOD, "chosen": " \x00Yes"}, GOOD),
        "array": b" [" + LINE + b"," + LINE + b"]\n",
        "identical": lines({**GOOD, "rejected": " Yes."}, GOOD),
        "longest row": lines({**GOOD, "id": "a" * (LARGEST_ROW - 100)}, GOOD),
        "emoji of two halves": around(GOOD).replace(b"Yes", b"\\ud83d\\ude00")[: 2 * len(LINE) + 200],
    }.items():
        file = "p.json" if name == "array" else "p.jsonl"
        yield f"jsonl: {name}", Damage(content, file, 0, kept=3 if "emoji" in name else 2)
    packed = gzip.compress(LINE * 400, mtime=0)
    for at in np.linspace(1, len(packed) - 1, 10).astype(int):
        yield f"gzip: cut at {at}", Damage(packed[:at], "p.jsonl.gz", 65, "damaged gzip file")
    for at in (0, 1, 2, -1, -5, -8):
        yield f"gzip: flipped at {at}", Damage(_flip(packed, at), "p.jsonl.gz", 65, "damaged gzip file")
    yield "gzip: none", Damage(LINE, "p.jsonl.gz", 65, "damaged gzip file")
    yield "gzip: more behind", Damage(packed + b"more", "p.jsonl.gz", 65, "damaged gzip file")
    yield "gzip: zip", Damage(_zip, "p.jsonl.gz", 65, "damaged gzip file")
    yield "gzip: two streams", Damage(gzip.compress(LINE) * 2, "p.jsonl.gz", 0)
    yield "gzip: empty", Damage(gzip.compress(b""), "p.jsonl.gz", 65, "no rows")
    # 50 MB in 50 KB: its one line is never held whole.
    yield "gzip: one long line", Damage(gzip.compress(b"a" * 50_000_000), "p.jsonl.gz", 65, "longer than")
    for name, content in {
        "cut": b"[" + LINE,
        "comma": b"[" + LINE + b",]",
        "two": b"[" + LINE + b"][]",
        "not UTF-8": b'[{"chosen": "\xff"}]',
        "deep": b"[" * 100_000,
        "key twice": b'[{"a": 1, "a": 2}]',
        "NUL": b"[\x00]",
    }.items():
        yield f"array: {name}", Damage(content, "p.json", 65, "not usable as a JSON array")
    yield "array: empty", Damage(b"[]", "p.json", 65, "no rows")
    for name, item in {"list": [], "text": "a", "number": 1, "null": None}.items():
        content = json.dumps([GOOD, item, GOOD]).encode()
        yield f"array: item is {name}", Damage(content, "p.json", 65, "not_json", in_row=True)


def csv_cases() -> Iterator[tuple[str, Damage]]:
    head, row = b"prompt,chosen,rejected\n", b"What?, Yes., No.\n"
    for name, bad, reason in (
        ("too few cells", b"a,b\n", "not_csv"),
        ("too many cells", b"a,b,c,d\n", "not_csv"),
        ("not UTF-8", b"a,\xff,b\n", "not_utf8"),
        ("latin-1", b"a,J\xe4,b\n", "not_utf8"),
        ("empty chosen", b"a,,b\n", "empty_completion"),
        ("blank rejected", b"a,b, \n", "empty_completion"),
    ):
        yield f"csv row: {name}", Damage(head + row + bad + row, "p.csv", 65, reason, in_row=True)
    for name, content, message in (
        ("empty", b"", "no rows"),
        ("header alone", head, "no rows"),
        ("no header", row * 3, "missing_column"),
        ("column twice", b"chosen,chosen,rejected\n" + row, "names a column twice"),
        ("open quote", head + row + b'a,"b,c\n' + row, "p.csv:3"),
        ("quote inside", head + b'"a"b,c,d\n', "p.csv:2"),
        ("UTF-16", (head + row).decode().encode("utf-16"), "not UTF-8"),
        ("UTF-16 without a mark", (head + row).decode().encode("utf-16-le"), "not UTF-8"),
        ("semicolons", (head + row).replace(b",", b";"), "missing_column"),
        ("long line", head + b"a" * (LARGEST_ROW + 1) + b",b,c\n", "longer than"),
        ("long cell", head + b'"' + (b"a" * 99 + b"\n") * (LARGEST_ROW // 90) + b'",b,c\n', "field larger than"),
        ("NUL in header", b"prompt\x00,chosen,rejected\n" + row, "not UTF-8"),
    ):
        yield f"csv: {name}", Damage(content, "p.csv", 65, message)
    packed = gzip.compress((head + row * 500), mtime=0)
    for at in (5, 15, len(packed) // 2, len(packed) - 4):
        yield f"csv gzip: cut at {at}", Damage(packed[:at], "p.csv.gz", 65, "damaged gzip file")
    yield "csv: quoted lines", Damage(head + b'"a\nb"," c\r\nd"," e"\n' + row, "p.csv", 0)


def change_json(file: str, change: Callable[[Any], Any]) -> Change:
    def damage(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        change(content)
        (folder / file).write_text(json.dumps(content))

    return damage


def set_json(file: str, **values: Any) -> Change:
    return change_json(file, lambda content: content.update(values))


def put(file: str, content: bytes) -> Change:
    return lambda folder: (folder / file).write_bytes(content)


def make_table(rows: int = 2, **columns: Any) -> pa.Table:
    return pa.table({**{name: [value] * rows for name, value in GOOD.items()}, **columns})


def _parquet(**columns: Any) -> Callable[[Path], None]:
    return lambda file: pq.write_table(make_table(**columns), file)


WRONG_COLUMNS: dict[str, pa.Array] = {
    **{str(t): pa.array([1, 2], t) for t in (pa.int8(), pa.int64(), pa.uint32(), pa.float32(), pa.float64())},
    **{str(t): pa.array([1, 2], pa.int64()).cast(t) for t in (pa.timestamp("us"), pa.duration("ms"), pa.time64("us"))},
    "float16": pa.array(np.array([1, 2], np.float16)),
    "bool": pa.array([True, False]),
    "date32": pa.array([1, 2], pa.date32()),
    "decimal": pa.array([1, 2], pa.decimal128(5, 2)),
    "binary": pa.array([b"a", b"b"]),
    "fixed binary": pa.array([b"ab", b"cd"], pa.binary(2)),
    "null": pa.array([None, None], pa.null()),
    "null text": pa.array([None, None], pa.string()),
    "list of text": pa.array([["a"], ["b"]]),
    "list of nulls": pa.array([[None], [None]], pa.list_(pa.string())),
    "null lists": pa.array([None, None], pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
    "struct": pa.array([{"role": "user"}] * 2),
    "map": pa.array([[("role", "user")]] * 2, pa.map_(pa.string(), pa.string())),
    "messages with null roles": pa.array([[{"role": None, "content": "a"}]] * 2, pa.list_(
        pa.struct([("role", pa.string()), ("content", pa.string())]))),
    "null messages": pa.array([[None]] * 2, pa.list_(pa.struct([("role", pa.string())]))),
}  # fmt: skip
TEXT_COLUMNS: dict[str, pa.Array] = {
    "large string": pa.array([" a", " b"], pa.large_string()),
    "dictionary": pa.array([" a", " a"]).dictionary_encode(),
    "large dictionary": pa.array([" a", " a"], pa.large_string()).dictionary_encode(),
    "string view": pa.array([" a", " b"], pa.string_view()),
}


def parquet_cases() -> Iterator[tuple[str, Damage]]:
    messages = [[{**USER, "extra": None}], [{**USER, "extra": "x"}]]
    chat = {"prompt": messages, "chosen": [[YES]] * 2, "rejected": [[{**YES, "content": "no"}]] * 2}
    for name, make in {
        **{f"chosen is {name}": _parquet(chosen=column) for name, column in TEXT_COLUMNS.items()},
        "messages": _parquet(**chat),
        "groups without rows": _groups_without_rows,
    }.items():
        yield f"parquet: {name}", Damage(make, "p.parquet", 0)
    twice = pa.table([["a"]] * 3, names=["chosen", "chosen", "rejected"])
    whole, unreadable = bytes_of(make_table(200)), "not a readable Parquet file"
    refused: dict[str, tuple[bytes | Change, str]] = {
        **{f"chosen is {name}": (_parquet(chosen=column), "wrong_type") for name, column in WRONG_COLUMNS.items()},
        "not UTF-8": (_parquet(chosen=pa.array([b" a", b"\xff"]).view(pa.string())), "not_utf8"),
        "one null": (_parquet(chosen=pa.array([" a", None])), "wrong_type"),
        "date that is none": (_parquet(chosen=pa.array([2**62, 2**62]).cast(pa.timestamp("us"))), "wrong_type"),
        "time zone that is none": (
            _parquet(chosen=pa.array([1, 2]).cast(pa.timestamp("us", "Mars/Base"))),
            "wrong_type",
        ),
        "large row": (_parquet(chosen=pa.array(["a" * (LARGEST_ROW + 1), " b"])), "too_large"),
        "no rows": (lambda file: pq.write_table(make_table(0), file), "no rows"),
        "no columns": (lambda file: pq.write_table(pa.table({}), file), "no rows"),
        "no rejected": (lambda file: pq.write_table(make_table().drop_columns("rejected"), file), "missing_column"),
        "column twice": (lambda file: pq.write_table(twice, file), "'chosen' is repeated"),
        "encrypted columns": (lambda file: _encrypt(file, True), "p.parquet"),
        "encrypted": (lambda file: _encrypt(file, False), "p.parquet"),
        "empty": (b"", unreadable),
        "magic alone": (b"PAR1PAR1", unreadable),
        "footer of 2 GB": (b"PAR1" + b"\xff\xff\xff\x7fPAR1", "not a readable"),
        "JSON Lines": (LINE, unreadable),
        **{f"cut at {at}": (whole[:at], unreadable) for at in np.linspace(4, len(whole) - 1, 12).astype(int)},
    }
    for name, (content, message) in refused.items():
        yield f"parquet: {name}", Damage(content, "p.parquet", 65, message)


def disk_cases() -> Iterator[tuple[str, Damage]]:
    changes: dict[str, Change] = {}
    for file in ("state.json", "dataset_info.json"):
        contents = {"empty": b"", "cut": b"{", "list": b"[]", "null": b"null", "deep": b"[" * 100_000}
        changes |= {f"{file} is {name}": put(file, content) for name, content in contents.items()}
    for name, feature in {
        "unknown": {"_type": "Nope"},
        "no type": 5,
        "a list of two": [{"_type": "Value"}, 1],
        "of no dtype": {"_type": "Value", "dtype": "nope"},
        "with code": {"_type": "Value", "dtype": "__import__('os').system('false')"},
    }.items():
        changes[f"a feature is {name}"] = change_json(
            "dataset_info.json", lambda info, feature=feature: info["features"].update(chosen=feature)
        )
    for name, change in {
        "cut": lambda file: file.write_bytes(file.read_bytes()[:200]),
        "gone": lambda file: file.unlink(),
        "empty": lambda file: file.write_bytes(b""),
        "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    }.items():
        changes[f"its table is {name}"] = lambda folder, change=change: change(next(folder.glob("*.arrow")))
    for name, change in changes.items():
        yield f"disk: {name}", Damage(_saved(change), "saved", 65, "not a readable save_to_disk folder")
    no_text, (offsets, wild) = b"\xff\xff\xff", (np.array([0, 5, end], np.int32).tobytes() for end in (10, 2**30))
    for name, old, new, message in (
        ("text that is not UTF-8", b"Yes", no_text, "saved"),
        ("offsets out of bounds", offsets, wild, "damaged"),
    ):
        make = _saved(lambda folder, old=old, new=new: _patch_table(folder, old, new))
        yield f"disk: {name}", Damage(make, "saved", 65, message)
    yield "disk: whole", Damage(_saved(lambda folder: None), "saved", 0)
    yield "disk: of images", Damage(_save_images, "saved", 65, "missing_column")


def _saved(change: Callable[[Path], Any]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        datasets.Dataset.from_list([GOOD, GOOD]).save_to_disk(str(folder))
        change(folder)

    return make


def _patch_table(folder: Path, old: bytes, new: bytes) -> None:
    file = next(folder.glob("*.arrow"))
    assert old in file.read_bytes()
    file.write_bytes(file.read_bytes().replace(old, new))


def _save_images(folder: Path) -> None:
    features = datasets.Features(
        {"chosen": datasets.List(datasets.Image()), "rejected": datasets.Value("string"), "prompt": datasets.Image()}
    )
    rows = {"chosen": [[{"path": "/etc/hostname", "bytes": None}]], "rejected": ["a"], "prompt": [None]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(folder))


def _groups_without_rows(file: Path) -> None:
    table = make_table(1)
    with pq.ParquetWriter(file, table.schema) as writer:
        for part in (table, table.slice(0, 0), table, table.slice(0, 0)):
            writer.write_table(part)


class _Keys(pe.KmsClient):
    """A key service without secrets; the reader of the file is not given its keys."""

    def __init__(self, config: Any) -> None:
        super().__init__()

    def wrap_key(self, key: bytes, master: str) -> bytes:
        return key.hex().encode()

    def unwrap_key(self, wrapped: bytes, master: str) -> bytes:
        return bytes.fromhex(wrapped.decode())


def _encrypt(file: Path, plain_footer: bool) -> None:
    settings = pe.EncryptionConfiguration(
        footer_key="footer", column_keys={"column": ["chosen"]}, plaintext_footer=plain_footer
    )
    keys = pe.CryptoFactory(_Keys).file_encryption_properties(pe.KmsConnectionConfig(), settings)
    with pq.ParquetWriter(file, make_table().schema, encryption_properties=keys) as writer:
        writer.write_table(make_table())


def bytes_of(table: pa.Table, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **options)
    return bytes(sink.getvalue())


def _flip(content: bytes, at: int) -> bytes:
    changed = bytearray(content)
    changed[at] ^= 0xFF
    return bytes(changed)


def _zip(file: Path) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("p.jsonl", LINE)


SMALLEST = b"data: {path: p.jsonl}\npolicy: {model: m}\nprecompute: {output: out}\n"
LAUGHS = b"a: &a [x, x, x, x, x, x, x, x, x]\n" + b"".join(
    b"%c: &%c [%s]\n" % (c, c, b", ".join([b"*%c" % (c - 1)] * 9)) for c in range(ord("b"), ord("l"))
)


def yaml_cases() -> Iterator[tuple[str, Damage]]:
    for name, more in {
        "tab": b"\tloss: {}\n",
        "open list": b"loss: [1\n",
        "open text": b'loss: "a\n',
        "not UTF-8": b"# \xff\n",
        "control character": b"# \x01\n",
        "escape that is no character": b'loss: "\\Uffffffff"\n',
        "alias of nothing": b"loss: *a\n",
        "alias of itself": b"train: &a {x: *a}\n",
        "list of itself": b"train: &a [*a]\n",
        "many laughs": LAUGHS + b"train: {x: *k}\n",
        "deep": b"train: " + b"[" * 1_000 + b"\n",
        "deep and closed": b"train: " + b"[" * 1_000 + b"]" * 1_000 + b"\n",
        "key twice": b"loss: {beta: 1, beta: 2}\n",
        "section twice": b"data: {path: q}\n",
        "key twice under a tag": b"loss: !!map {beta: 1, beta: 2}\n",
        "a list for a key": b"? [a]\n: b\n",
        "a mapping for a key": b"? {a: b}\n: b\n",
        "two documents": b"---\nloss: {}\n",
        "tag of Python": b"loss: !!python/object/apply:os.system ['false']\n",
        "tag of Python's name": b"loss: !!python/name:os.system x\n",
        "own tag": b"loss: !thing {beta: 1}\n",
        "own tag of text": b"loss: {beta: !thing 1}\n",
        "binary": b"loss: {beta: !!binary aGk=}\n",
        "set": b"loss: !!set {beta}\n",
        "unknown section": b"losss: {}\n",
        "unknown key": b"loss: {bta: 1}\n",
        "section is a list": b"loss: [1]\n",
        "section is text": b"loss: sigmoid\n",
        "list for text": b"reference: {model: [a]}\n",
        "mapping for text": b"reference: {model: {a: b}}\n",
        "text for a number": b"loss: {beta: lots}\n",
        "NaN": b"loss: {beta: .nan}\n",
        "NaN, Python's": b"loss: {beta: nan}\n",
        "infinite": b"loss: {beta: inf}\n",
        "huge whole number": b"reference: {sync: {steps: " + b"9" * 5000 + b"}}\n",
        "half": b"reference: {sync: {steps: 1.5}}\n",
        "NUL in text": b'reference: {model: "a\\0b"}\n',
        "text for yes or no": b"reference: {disable_adapters: maybe}\n",
        "word that is no choice": b"reference: {dtype: float7}\n",
        "password": b'reference: {model: "https://me:secret@hub.example/m"}\n',
        "password in train": b'train: {output_dir: "s3://key:secret@bucket/x"}\n',
        "training field unknown": b"train: {output_dir: a, learning_rat: 1}\n",
        "training field of a wrong type": b"train: {output_dir: a, learning_rate: [1]}\n",
        "no output": b"train: {seed: 1}\n",
        "many keys": b"train:\n" + b"".join(b" k%d: 1\n" % i for i in range(10_000)),
        "too large": b"#" * 2**20 + b"\n",
    }.items():
        yield f"yaml: {name}", Damage(SMALLEST + more, "run.yaml", 2)
    for text in (b"2024-13-45", b"0x_", b"0b_", b"9" * 5000, b"1:2:3", b"'{'", b"'" + b"[" * 1000 + b"'"):
        # Of a type that nothing declares, and like a date or a number: taken as the word that it is.
        content = SMALLEST + b"train: {output_dir: a, lr_scheduler_kwargs: {x: " + text + b"}}\n"
        yield f"yaml: a word like {text[:12]!r}", Damage(content, "run.yaml", 0)
    for name, content in {
        "empty": b"",
        "another YAML": b"%YAML 9.9\n---\n" + SMALLEST,
        "null for text": SMALLEST.replace(b"p.jsonl", b"~"),
        "word": b"word",
        "list": b"- a\n",
        "null": b"null\n",
        "UTF-16": SMALLEST.decode().encode("utf-16"),
        "JSON Lines": LINE * 2,
        "Parquet": b"PAR1\x00\x00",
        "home of nobody": SMALLEST.replace(b"p.jsonl", b"~nobody-here/p.jsonl"),
        "output in a home of nobody": SMALLEST.replace(b"out", b"~nobody-here/out"),
        "column unknown": SMALLEST.replace(b"path: p.jsonl", b"path: p.jsonl, columns: {prompty: a}"),
        "columns are a list": SMALLEST.replace(b"path: p.jsonl", b"path: p.jsonl, columns: [a]"),
        "length of 1": SMALLEST.replace(b"path: p.jsonl", b"path: p.jsonl, max_length: 1"),
        "held-out set in another folder": SMALLEST.replace(b"path: p.jsonl", b"path: p.jsonl, eval: {../x: {}}"),
        "split of no rows": SMALLEST.replace(b"path: p.jsonl", b"path: p.jsonl, split: 'train[5:5]'"),
        "split of a huge number": SMALLEST.replace(b"path: p", b"split: 'train[%s:]', path: p" % (b"9" * 5000)),
        "path of no file": SMALLEST.replace(b"p.jsonl", b"./gone.jsonl"),
        "path that is too long": SMALLEST.replace(b"p.jsonl", b"p" * 5000 + b".jsonl"),
    }.items():
        yield f"yaml: {name}", Damage(content, "run.yaml", 2)


DATA: dict[str, Damage] = {
    name: case for cases in (jsonl_cases, csv_cases, parquet_cases, disk_cases) for name, case in cases()
}
SETTINGS: dict[str, Damage] = dict(yaml_cases())


def changed(change: Change, status: int | tuple[int, ...], names: str = "") -> Damage:
    """Damage to a whole folder."""
    return Damage(change, "", status, names)


# Code that a model, an adapter or a dataset might bring: each leaves a file beside the folder if it is run.

MARK = "it-ran"
EVIL = "from pathlib import Path\nPath({mark!r}).touch()\nclass Evil: pass\n"


class Payload:
    """Leaves a file where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = str(mark)

    def __reduce__(self) -> Any:
        return Path.touch, (Path(self._mark),)


def put_pickle(name: str, **options: Any) -> Change:
    return lambda folder: torch.save(Payload(folder.parent / MARK), folder / name, **options)


def put_code(name: str) -> Change:
    return lambda folder: (folder / name).write_text(EVIL.format(mark=str(folder.parent / MARK)))


def remove(file: str) -> Change:
    return lambda folder: (folder / file).unlink()


def both(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


WEIGHTS = "model.safetensors"
BAD_BYTES = (b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000)
"""Contents that are not JSON, or not an object"""


def _change_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    def damage(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        change(weights)
        save_file(weights, folder / WEIGHTS, {"format": "pt"})

    return damage


def _index(name: Any) -> Change:
    """Write an index that says that another file holds all weights."""

    def damage(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).rename(folder / "model-00001-of-00001.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(weights, name)}
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))

    return damage


def _cut(file: str, length: int) -> Change:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:length])


MODEL_CONFIG: dict[str, list[Any]] = {
    "hidden_size": ["x", -1, 0, None, [], 10**30],
    "num_attention_heads": [0, -4, 7, "four"],
    "num_hidden_layers": [3, -1, None],
    "vocab_size": [5, 0, "many"],
    "model_type": ["nope", 5, None, "bert"],
    "dtype": ["float7", 5, ["x"], "int8"],
    "rope_parameters": [5, "x", {"rope_type": "nope"}],
    "hidden_act": ["nope", 5],
    "quantization_config": [{"quant_method": "nope"}, 5],
    "architectures": [["Nope"], 5],
}
LIBRARYS = (0, 2, 65, 74)
"""Statuses of values that some versions of a library accept and others refuse"""


def model_cases() -> Iterator[tuple[str, Damage]]:
    for key, values in MODEL_CONFIG.items():
        for value in values:
            yield f"{key} is {value!r}", changed(set_json("config.json", **{key: value}), LIBRARYS)
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json", WEIGHTS):
        for content in (*BAD_BYTES, b"\xff" * 8 + b"{}", b"\0" * 8):
            yield f"{file} is {content[:9]!r}", changed(put(file, content), LIBRARYS)
    yield "no tokenizer", changed(remove("tokenizer.json"), 2)
    yield "no config", changed(remove("config.json"), 2)
    yield "no weights", changed(remove(WEIGHTS), 2, "no *.safetensors in it; other weight formats can run code")
    yield "an index of nothing", changed(put(f"{WEIGHTS}.index.json", b"{}"), 65, "policy.model")
    yield "an index that is damaged", changed(put(f"{WEIGHTS}.index.json", b"{"), 65)
    yield "a weight less", changed(_change_weights(lambda w: w.pop("model.norm.weight")), 2, "model.norm.weight")
    other = _change_weights(lambda w: w.update({"model.norm.weight": torch.ones(3)}))
    yield "a weight of another shape", changed(other, 2)
    yield "a header of 2 GB", changed(put(WEIGHTS, (2**31).to_bytes(8, "little") + b"{}"), 65)
    for length in (4, 100_000):
        yield f"weights cut at {length}", changed(_cut(WEIGHTS, length), 65, "policy.model")
    yield "gone", changed(shutil.rmtree, 2, "no such model folder")
    # Pickles
    for name in ("pytorch_model.bin", "model.pt", "model.ckpt", "training_args.bin", "flax_model.msgpack"):
        yield f"{name} beside safetensors", changed(put_pickle(name), 0)
        alone = both(put_pickle(name), remove(WEIGHTS))
        yield f"{name} alone", changed(alone, 2, "no *.safetensors in it; other weight formats can run code")
    for kind in (True, False):
        pickled = put_pickle(WEIGHTS, _use_new_zipfile_serialization=kind)
        yield f"a pickle called safetensors, zip: {kind}", changed(pickled, 65, "damaged weight file")
    # Weights named elsewhere would also escape the digest of the reference.
    for named in ("pytorch_model.bin", "../evil/model.safetensors", "sub/x.safetensors", "/x.safetensors", 5):
        index = both(put_pickle("pytorch_model.bin"), _index(named))
        yield f"an index of {named!r}", changed(index, 2, "weights must be safetensors files beside it")
    # Code
    names = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoModel"), "modeling_evil.Evil")
    for kind, status in (("llama", 0), ("evil", 2)):
        code = both(put_code("modeling_evil.py"), set_json("config.json", auto_map=names, model_type=kind))
        yield f"code for a model of type {kind}", changed(code, status)
    evil = {"AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"]}
    for kind in ("PreTrainedTokenizerFast", "EvilTokenizer"):
        values = {"auto_map": evil, "tokenizer_class": kind}
        code = both(put_code("tokenization_evil.py"), set_json("tokenizer_config.json", **values))
        yield f"code for a tokenizer {kind}", changed(code, (0, 2))
    attention = set_json("config.json", attn_implementation="somebody/attention")
    yield "attention of the hub", changed(attention, 2, "asks for attention from the hub, 'somebody/attention'")


ADAPTER_WEIGHTS = "adapter_model.safetensors"


def adapter_cases() -> Iterator[tuple[str, Damage]]:
    file = "adapter_config.json"
    for key, value in (("peft_type", "NOPE"), ("r", 0), ("r", "x"), ("target_modules", 5), ("task_type", "NOPE")):
        yield f"{key} is {value!r}", changed(set_json(file, **{key: value}), (2, 65))
    for content in (b"", b"{", b"[]", b"{}", b"\xff\xfe", b"[" * 100_000):
        yield f"{file} is {content[:9]!r}", changed(put(file, content), 2 if content == b"{}" else 65)
        yield f"{ADAPTER_WEIGHTS} is {content[:9]!r}", changed(put(ADAPTER_WEIGHTS, content), 65, "damaged weight file")
    yield "no target", changed(set_json(file, target_modules=["nope"]), 2)
    yield "another rank", changed(set_json(file, r=5), 2)
    yield "a pickle beside it", changed(put_pickle("adapter_model.bin"), 0)
    yield "a pickle called safetensors", changed(put_pickle(ADAPTER_WEIGHTS), 65, "damaged weight file")
    alone = both(put_pickle("adapter_model.bin"), remove(ADAPTER_WEIGHTS))
    yield "a pickle alone", changed(alone, 2, f"no {ADAPTER_WEIGHTS} in it")
    # Refused before the library sees it, some versions of which would import the module.
    megatron = set_json(file, megatron_config={"a": 1}, megatron_core="evil_module")
    yield "Megatron's", changed(megatron, 2, "an adapter of Megatron's layers, which can't be loaded here")
    mapping = set_json(file, auto_mapping={"base_model_class": "Evil", "parent_library": "evil_module"})
    yield "a class of another module", changed(mapping, 0)


MODELS: dict[str, Damage] = dict(model_cases())
ADAPTERS: dict[str, Damage] = dict(adapter_cases())


# Stores of three parts

PART = "part-00001.parquet"


def _swap(folder: Path) -> None:
    first, second = folder / "part-00000.parquet", folder / PART
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)


def flip(file: Path, where: float) -> None:
    """Flip a bit at a share of the file's length."""
    content = bytearray(file.read_bytes())
    content[int(len(content) * where)] ^= 0x40
    file.write_bytes(content)


def store_cases() -> Iterator[tuple[str, Damage]]:
    for name, change in {
        "swapped": _swap,
        "gone": remove(PART),
        "empty": put(PART, b""),
        "a folder": lambda f: ((f / PART).unlink(), (f / PART).mkdir()),
        "of zeros": lambda f: (f / PART).write_bytes(bytes((f / PART).stat().st_size)),
        "longer": lambda f: (f / PART).write_bytes((f / PART).read_bytes() + b"\0"),
        "twice": lambda f: shutil.copy(f / "part-00000.parquet", f / PART),
        **{f"flipped at {where}": lambda f, where=where: flip(f / PART, where) for where in (0.02, 0.5, 0.98)},
    }.items():
        yield f"part {name}", changed(change, 65, "part-0000")
    yield "index gone", changed(remove("index.json"), 75, "refshard precompute")
    yield "manifest gone", changed(remove("manifest.json"), 65, "refshard precompute")
    yield "all gone", changed(shutil.rmtree, 65, "refshard precompute")
    for name, edit in {
        "a part less": lambda index: index["parts"].pop(),
        "a part twice": lambda index: index["parts"].append(index["parts"][0]),
        "parts in another order": lambda index: index["parts"].reverse(),
    }.items():
        yield f"{name} in the index", changed(change_json("index.json", edit), 65, "index.json")
    yield "schema of tomorrow", changed(set_json("manifest.json", schema_version=99), 78)
    yield "another format", changed(set_json("manifest.json", format="other"), 65, "manifest.json")
    other = change_json("manifest.json", lambda m: m["identity"]["tokenization"].update(max_length=7))
    yield "another max_length", changed(other, 65, "manifest.json")
    for name in (
        "../train/part-00001.parquet",
        "./part-00001.parquet",
        "/etc/passwd",
        "part-00001.parquet\0",
        "part-00001.parquet/",
        "part-1.parquet",
        "PART-00001.PARQUET",
        "part-00001.parquet ",
        "",
        "..",
    ):
        rename = change_json("index.json", lambda index, name=name: index["parts"][1].update(file=name))
        yield f"part named {name!r}", changed(rename, 65, "index.json")
    for file in ("manifest.json", "index.json"):
        for content in (*BAD_BYTES, b"{}", b'{"a": 1e999}', b"\0" * 9):
            yield f"{file} is {content[:9]!r}", changed(put(file, content), 65, file)


STORES: dict[str, Damage] = dict(store_cases())


# Wrong values in JSON

WRONG_VALUES: tuple[Any, ...] = (
    *(None, -1, 0, 2**63, 10**30, 1.5, 1e308, float("nan"), True),
    *("", "x", "..", "\ud83d", [], {}, [[]], {"": 0}),
)


def json_paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the paths of all values in a tree; of a list, those of its first item."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, item in items:
        yield from json_paths(item, (*path, key))


def signed(content: bytes) -> bytes:
    """Correct the digest and the fingerprint, as an attacker would; content that is not JSON stays as it is.

    Otherwise the digest alone would refuse everything, and no check behind it would be tried.
    """
    try:
        tree = json.loads(content)
        if not isinstance(tree, dict):
            return content
        tree.pop("sha256", None)
        if "identity" in tree:
            tree["fingerprint"] = fingerprint_of(tree["identity"])
        return sealed(tree)
    except (ValueError, RecursionError):
        return content
