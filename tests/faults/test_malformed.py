"""Some hundred ways in which input can be wrong: each is refused by place and reason, or read whole; none in silence.

Each case goes through the same functions as the commands do. What they let through as anything but a `RefshardError`
would be "this is a bug" to the user, so it fails the test; so does a case that takes long.
"""

import gzip
import json
import shutil
import time
import tracemalloc
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
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from pipeline.base.errors import RefshardError, one_line
from pipeline.base.folders import LocalFolder
from pipeline.config.reader import load_config
from pipeline.config.schema import DataConfig
from pipeline.data import readers
from pipeline.data.intake import KeptPair, Ledger, kept_pairs
from pipeline.data.rows import LARGEST_ROW
from pipeline.data.sources import count_rows, open_source, read_rows
from pipeline.models.files import load_tokenizer, policy_settings
from pipeline.models.identity import fingerprint_of, identity_of_run
from pipeline.models.loading import load_policy, load_reference
from pipeline.store.format import sealed
from pipeline.store.store import open_store, read_parts
from pipeline.store.verify import verify_store
from stages import inspect
from support.models import make_tokenizer
from support.runs import refshard, simple_rows, write_config, write_jsonl
from support.tally import tally

SECONDS = 5.0
"""Of the processor, most that a case may take; most take milliseconds."""

Content = bytes | Callable[[Path], Any]


@dataclass(frozen=True)
class Case:
    """One input: a file's bytes, or what makes it; and what it must end in."""

    content: Content
    file: str
    status: int
    """Exit status; 0: accepted"""
    message: str = ""
    """A part of the message; for a bad row, the reason under which it is counted"""
    kept: int = 2
    """Pairs that are kept of what is accepted, or beside the row that is skipped"""
    in_row: bool = False
    """One bad row among good ones: `on_bad_row: skip` goes on without it"""


TEMPLATE = (
    "{%- for m in messages -%}"
    "{%- if m['role'] not in ['system', 'user', 'assistant'] -%}{{ raise_exception('unknown role ' ~ m['role']) }}"
    "{%- endif -%}"
    "{%- if loop.index0 and m['role'] == messages[loop.index0 - 1]['role'] -%}"
    "{{ raise_exception('roles must alternate') }}{%- endif -%}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] + '' }}<|im_end|>{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant\n{%- endif -%}"
)
TOKENIZER = make_tokenizer(bos=True, template=TEMPLATE)

GOOD = {"prompt": "What?", "chosen": " Yes.", "rejected": " No."}
LINE = json.dumps(GOOD).encode() + b"\n"
USER, YES, NO = ({"role": role, "content": text} for role, text in (("user", "?"), ("assistant", "!"), ("user", ".")))
CHAT = {"prompt": [USER], "chosen": [YES], "rejected": [{**YES, "content": "no"}]}


def lines(*rows: Any) -> bytes:
    return b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows)


def around(row: Any) -> bytes:
    """The row between two good ones."""
    return lines(GOOD, row if not isinstance(row, bytes) else row + b"\n", GOOD)


def row_cases() -> Iterator[tuple[str, Any, str]]:
    """Name, one bad row, the reason under which it is counted."""
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
    yield "prompt of messages, text else", {**GOOD, "prompt": [USER]}, "wrong_type"
    for name, value in {"int": 1, "object": {"a": 1}, "no JSON": "{", "JSON, no list": "{}"}.items():
        yield f"tools are {name}", {**CHAT, "tools": value}, "wrong_type"
    for name, value in {"list": [1], "int": 1, "text": "a"}.items():
        yield f"template arguments are {name}", {**CHAT, "chat_template_kwargs": value}, "wrong_type"
    for name in ("chat_template", "tokenize", "truncation", "max_length", "return_tensors", "messages"):
        yield f"template argument {name}", {**CHAT, "chat_template_kwargs": {name: "x"}}, "wrong_type"
    yield "unknown role", {**CHAT, "chosen": [{**YES, "role": "robot"}]}, "template_error"
    yield "roles do not alternate", {**CHAT, "chosen": [NO]}, "template_error"
    for name, value in {"int": 1, "null": None, "list": ["a"], "object": {"a": "b"}}.items():
        yield f"content is {name}", {**CHAT, "rejected": [{**YES, "content": value}, NO, YES]}, "template_error"
    yield "half a pair in a role", {**CHAT, "chosen": [{**YES, "role": "\ud83d"}]}, "template_error"


def jsonl_cases() -> Iterator[tuple[str, Case]]:
    for name, row, reason in row_cases():
        yield f"jsonl row: {name}", Case(around(row), "p.jsonl", 65, reason, in_row=True)
    # Without a mark, UTF-16 of ASCII is UTF-8 with NULs.
    for code in ("utf-16-le", "utf-16-be"):
        yield f"jsonl: {code}", Case(LINE.decode().encode(code) * 2, "p.jsonl", 65, "looks like UTF-16")
    yield "jsonl: empty", Case(b"", "p.jsonl", 65, "no rows")
    yield "jsonl: blank", Case(b"\n \n\t\r\n", "p.jsonl", 65, "no rows")
    yield "jsonl: mark alone", Case(b"\xef\xbb\xbf", "p.jsonl", 65, "no rows")
    yield "jsonl: zip", Case(_zip, "p.jsonl", 65, "p.jsonl:1")
    yield "jsonl: Parquet", Case(lambda file: pq.write_table(_table(), file), "p.jsonl", 65, "p.jsonl:1")
    yield "jsonl: a folder without files", Case(lambda file: file.mkdir(), "p.jsonl", 2, "no file of split")
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
        yield f"jsonl: {name}", Case(content, file, 0, kept=3 if "emoji" in name else 2)
    packed = gzip.compress(LINE * 400, mtime=0)
    for at in np.linspace(1, len(packed) - 1, 10).astype(int):
        yield f"gzip: cut at {at}", Case(packed[:at], "p.jsonl.gz", 65, "damaged gzip file")
    for at in (0, 1, 2, -1, -5, -8):
        yield f"gzip: flipped at {at}", Case(_flip(packed, at), "p.jsonl.gz", 65, "damaged gzip file")
    yield "gzip: none", Case(LINE, "p.jsonl.gz", 65, "damaged gzip file")
    yield "gzip: more behind", Case(packed + b"more", "p.jsonl.gz", 65, "damaged gzip file")
    yield "gzip: zip", Case(_zip, "p.jsonl.gz", 65, "damaged gzip file")
    yield "gzip: two streams", Case(gzip.compress(LINE) * 2, "p.jsonl.gz", 0)
    yield "gzip: empty", Case(gzip.compress(b""), "p.jsonl.gz", 65, "no rows")
    # 50 MB in 50 KB: its one line is never held whole.
    yield "gzip: one long line", Case(gzip.compress(b"a" * 50_000_000), "p.jsonl.gz", 65, "longer than")
    for name, content in {
        "cut": b"[" + LINE,
        "comma": b"[" + LINE + b",]",
        "two": b"[" + LINE + b"][]",
        "not UTF-8": b'[{"chosen": "\xff"}]',
        "deep": b"[" * 100_000,
        "key twice": b'[{"a": 1, "a": 2}]',
        "NUL": b"[\x00]",
    }.items():
        yield f"array: {name}", Case(content, "p.json", 65, "not usable as a JSON array")
    yield "array: empty", Case(b"[]", "p.json", 65, "no rows")
    for name, item in {"list": [], "text": "a", "number": 1, "null": None}.items():
        content = json.dumps([GOOD, item, GOOD]).encode()
        yield f"array: item is {name}", Case(content, "p.json", 65, "not_json", in_row=True)


def csv_cases() -> Iterator[tuple[str, Case]]:
    head, row = b"prompt,chosen,rejected\n", b"What?, Yes., No.\n"
    for name, bad, reason in (
        ("too few cells", b"a,b\n", "not_csv"),
        ("too many cells", b"a,b,c,d\n", "not_csv"),
        ("not UTF-8", b"a,\xff,b\n", "not_utf8"),
        ("latin-1", b"a,J\xe4,b\n", "not_utf8"),
        ("empty chosen", b"a,,b\n", "empty_completion"),
        ("blank rejected", b"a,b, \n", "empty_completion"),
    ):
        yield f"csv row: {name}", Case(head + row + bad + row, "p.csv", 65, reason, in_row=True)
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
        yield f"csv: {name}", Case(content, "p.csv", 65, message)
    packed = gzip.compress((head + row * 500), mtime=0)
    for at in (5, 15, len(packed) // 2, len(packed) - 4):
        yield f"csv gzip: cut at {at}", Case(packed[:at], "p.csv.gz", 65, "damaged gzip file")
    yield "csv: quoted lines", Case(head + b'"a\nb"," c\r\nd"," e"\n' + row, "p.csv", 0)


def _table(rows: int = 2, **columns: Any) -> pa.Table:
    return pa.table({**{name: [value] * rows for name, value in GOOD.items()}, **columns})


def _parquet(**columns: Any) -> Callable[[Path], None]:
    return lambda file: pq.write_table(_table(**columns), file)


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


def parquet_cases() -> Iterator[tuple[str, Case]]:
    for name, column in WRONG_COLUMNS.items():
        yield f"parquet: chosen is {name}", Case(_parquet(chosen=column), "p.parquet", 65, "wrong_type")
    for name, column in TEXT_COLUMNS.items():
        yield f"parquet: chosen is {name}", Case(_parquet(chosen=column), "p.parquet", 0)
    bad = pa.array([b" a", b"\xff"]).view(pa.string())
    yield "parquet: not UTF-8", Case(_parquet(chosen=bad), "p.parquet", 65, "not_utf8")
    one_null = pa.array([" a", None])
    yield "parquet: one null", Case(_parquet(chosen=one_null), "p.parquet", 65, "wrong_type")
    messages = [[{**USER, "extra": None}], [{**USER, "extra": "x"}]]
    chat = {"prompt": messages, "chosen": [[YES]] * 2, "rejected": [[{**YES, "content": "no"}]] * 2}
    yield "parquet: messages", Case(_parquet(**chat), "p.parquet", 0)
    yield (
        "parquet: date that is none",
        Case(_parquet(chosen=pa.array([2**62, 2**62]).cast(pa.timestamp("us"))), "p.parquet", 65, "wrong_type"),
    )
    yield (
        "parquet: time zone that is none",
        Case(_parquet(chosen=pa.array([1, 2]).cast(pa.timestamp("us", "Mars/Base"))), "p.parquet", 65, "wrong_type"),
    )
    large = pa.array(["a" * (LARGEST_ROW + 1), " b"])
    yield "parquet: large row", Case(_parquet(chosen=large), "p.parquet", 65, "too_large")
    yield "parquet: no rows", Case(lambda file: pq.write_table(_table(0), file), "p.parquet", 65, "no rows")
    yield "parquet: no columns", Case(lambda file: pq.write_table(pa.table({}), file), "p.parquet", 65, "no rows")
    yield (
        "parquet: no rejected",
        Case(lambda file: pq.write_table(_table().drop_columns("rejected"), file), "p.parquet", 65, "missing_column"),
    )
    yield (
        "parquet: column twice",
        Case(
            lambda file: pq.write_table(pa.table([["a"]] * 3, names=["chosen", "chosen", "rejected"]), file),
            "p.parquet",
            65,
            "'chosen' is there twice",
        ),
    )
    yield "parquet: groups without rows", Case(_groups_without_rows, "p.parquet", 0)
    yield "parquet: encrypted columns", Case(lambda file: _encrypt(file, True), "p.parquet", 65, "p.parquet")
    yield "parquet: encrypted", Case(lambda file: _encrypt(file, False), "p.parquet", 65, "p.parquet")
    yield "parquet: empty", Case(b"", "p.parquet", 65, "not a readable Parquet file")
    yield "parquet: magic alone", Case(b"PAR1PAR1", "p.parquet", 65, "not a readable Parquet file")
    yield "parquet: footer of 2 GB", Case(b"PAR1" + b"\xff\xff\xff\x7fPAR1", "p.parquet", 65, "not a readable")
    yield "parquet: JSON Lines", Case(LINE, "p.parquet", 65, "not a readable Parquet file")
    whole = _bytes_of(_table(200))
    for at in np.linspace(4, len(whole) - 1, 12).astype(int):
        yield f"parquet: cut at {at}", Case(whole[:at], "p.parquet", 65, "not a readable Parquet file")


def disk_cases() -> Iterator[tuple[str, Case]]:
    for file in ("state.json", "dataset_info.json"):
        for name, content in {
            "empty": b"",
            "cut": b"{",
            "list": b"[]",
            "null": b"null",
            "deep": b"[" * 100_000,
        }.items():
            make = _saved(lambda folder, f=file, c=content: (folder / f).write_bytes(c))
            yield f"disk: {file} is {name}", Case(make, "saved", 65, "not a readable save_to_disk folder")
    for name, feature in {
        "unknown": {"_type": "Nope"},
        "no type": 5,
        "a list of two": [{"_type": "Value"}, 1],
        "of no dtype": {"_type": "Value", "dtype": "nope"},
        "with code": {"_type": "Value", "dtype": "__import__('os').system('false')"},
    }.items():
        make = _saved(lambda folder, f=feature: _change_info(folder, f))
        yield f"disk: a feature is {name}", Case(make, "saved", 65, "not a readable save_to_disk folder")
    for name, change in {
        "cut": lambda file: file.write_bytes(file.read_bytes()[:200]),
        "gone": lambda file: file.unlink(),
        "empty": lambda file: file.write_bytes(b""),
        "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    }.items():
        make = _saved(lambda folder, c=change: c(next(folder.glob("*.arrow"))))
        yield f"disk: its table is {name}", Case(make, "saved", 65, "not a readable save_to_disk folder")
    yield (
        "disk: text that is not UTF-8",
        Case(_saved(lambda f: _patch_table(f, b"Yes", b"\xff\xff\xff")), "saved", 65, "saved"),
    )
    wild = np.array([0, 5, 10], np.int32).tobytes()
    yield (
        "disk: offsets out of bounds",
        Case(
            _saved(lambda f: _patch_table(f, wild, np.array([0, 5, 2**30], np.int32).tobytes())), "saved", 65, "damaged"
        ),
    )
    yield "disk: whole", Case(_saved(lambda folder: None), "saved", 0)
    yield "disk: of images", Case(_save_images, "saved", 65, "missing_column")


def _saved(change: Callable[[Path], Any]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        datasets.Dataset.from_list([GOOD, GOOD]).save_to_disk(str(folder))
        change(folder)

    return make


def _change_info(folder: Path, feature: Any) -> None:
    info = json.loads((folder / "dataset_info.json").read_text())
    info["features"]["chosen"] = feature
    (folder / "dataset_info.json").write_text(json.dumps(info))


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
    table = _table(1)
    with pq.ParquetWriter(file, table.schema) as writer:
        for part in (table, table.slice(0, 0), table, table.slice(0, 0)):
            writer.write_table(part)


class _Keys(pe.KmsClient):
    """Keeps no key secret: they are only to be missing when the file is read."""

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
    with pq.ParquetWriter(file, _table().schema, encryption_properties=keys) as writer:
        writer.write_table(_table())


def _bytes_of(table: pa.Table, **options: Any) -> bytes:
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


def yaml_cases() -> Iterator[tuple[str, Case]]:
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
        yield f"yaml: {name}", Case(SMALLEST + more, "run.yaml", 2)
    for text in (b"2024-13-45", b"0x_", b"0b_", b"9" * 5000, b"1:2:3", b"'{'", b"'" + b"[" * 1000 + b"'"):
        # Of a type that nothing declares, and like a date or a number: taken as the word that it is.
        content = SMALLEST + b"train: {output_dir: a, lr_scheduler_kwargs: {x: " + text + b"}}\n"
        yield f"yaml: a word like {text[:12]!r}", Case(content, "run.yaml", 0)
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
        yield f"yaml: {name}", Case(content, "run.yaml", 2)


CASES: dict[str, Case] = {
    name: case for cases in (jsonl_cases, csv_cases, parquet_cases, disk_cases, yaml_cases) for name, case in cases()
}
DATA = {name: case for name, case in CASES.items() if not name.startswith("yaml")}
YAML = {name: case for name, case in CASES.items() if name.startswith("yaml")}


def test_the_table_is_large_and_each_case_its_own() -> None:
    assert len(CASES) >= 200
    assert len({(case.file, case.content) for case in CASES.values()}) == len(CASES)


def make(case: Case, folder: Path) -> Path:
    file = folder / case.file
    if isinstance(case.content, bytes):
        file.write_bytes(case.content)
    else:
        case.content(file)
    return file


def take(file: Path, on_bad_row: str) -> tuple[list[KeptPair], Ledger]:
    data = DataConfig(path=str(file), on_bad_row=on_bad_row)  # type: ignore[arg-type]
    source, ledger = open_source(data), Ledger()
    count_rows(source)
    return list(kept_pairs(read_rows(source), TOKENIZER, data, ledger)), ledger


def refused(file: Path, on_bad_row: str = "stop") -> RefshardError:
    with pytest.raises(RefshardError) as caught:
        take(file, on_bad_row)
    message = one_line(str(caught.value))
    assert file.name in message
    assert len(message) < 3000
    return caught.value


@pytest.mark.parametrize("case", DATA.values(), ids=DATA)
def test_data_is_read_whole_or_refused_by_place_and_reason(case: Case, tmp_path: Path) -> None:
    file, start = make(case, tmp_path), time.process_time()
    if case.status == 0:
        kept, ledger = take(file, "stop")
        assert len(kept) == ledger.rows == ledger.kept == case.kept
    else:
        error = refused(file)
        assert error.exit_status == case.status
        reason = getattr(error, "reason", None)
        assert case.message in (str(error), reason) or case.message in str(error)
        if reason is not None:
            assert "data.on_bad_row: skip" in str(error)
    if case.in_row:
        kept, ledger = take(file, "skip")
        assert len(kept) == case.kept
        assert ledger.dropped == {case.message: 1}
        assert ledger.rows == 3
        assert [entry["row"] for entry in ledger.skipped] == [1]
    assert time.process_time() - start < SECONDS
    tally("malformed or odd data", 1, outcome="refused by file, line and reason, or read whole")


def read_settings(file: Path) -> None:
    config = load_config(file)
    open_source(config.data)
    _ = config.train.options


@pytest.mark.parametrize("case", YAML.values(), ids=YAML)
def test_settings_are_refused_by_file_or_key(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.jsonl").write_bytes(LINE)
    (tmp_path / "good.yaml").write_bytes(SMALLEST + b"train: {output_dir: o}\n")
    read_settings(tmp_path / "good.yaml")
    file, start = make(case, tmp_path), time.process_time()
    if case.status == 0:
        read_settings(file)
        return
    with pytest.raises(RefshardError) as caught:
        read_settings(file)
    assert caught.value.exit_status == 2
    assert "secret" not in str(caught.value)
    assert time.process_time() - start < SECONDS
    tally("malformed settings", 1, outcome="refused by file or key")


def test_a_long_line_is_never_held_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "LARGEST_ROW", 2**16)
    (tmp_path / "p.jsonl").write_bytes(LINE + b"a" * 2**24 + b"\n" + LINE)
    rows = read_rows(open_source(DataConfig(path=str(tmp_path / "p.jsonl"))))
    tracemalloc.start()
    assert sum(1 for _ in rows) == 3
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_a_text_stored_once_for_many_rows_stays_one_in_memory(tmp_path: Path) -> None:
    # 256 rows of a batch, unpacked, would be 256 MB.
    text = pa.DictionaryArray.from_arrays(np.zeros(256, np.int32), [" " + "a" * 1_000_000])
    pq.write_table(_table(256, chosen=text), tmp_path / "p.parquet")
    assert (tmp_path / "p.parquet").stat().st_size < 100_000
    before = pa.total_allocated_bytes()
    rows = list(read_rows(open_source(DataConfig(path=str(tmp_path / "p.parquet")))))
    assert len(rows) == 256
    assert pa.total_allocated_bytes() - before < 20_000_000
    assert len(rows[-1].load()["chosen"]) == 1_000_001


def test_flipped_bits_in_parquet_are_never_a_bug_nor_a_lost_row(tmp_path: Path) -> None:
    rows = [{**GOOD, "chosen": f" Yes {i}."} for i in range(300)]
    whole = _bytes_of(pa.Table.from_pylist(rows), row_group_size=100, write_page_checksum=True)
    random, refusals = np.random.default_rng(0), 0
    for _ in range(150):
        changed = bytearray(whole)
        changed[random.integers(len(whole))] ^= 1 << random.integers(8)
        (tmp_path / "p.parquet").write_bytes(changed)
        try:
            kept, _ = take(tmp_path / "p.parquet", "stop")
        except RefshardError as error:
            assert error.exit_status == 65
            refusals += 1
            continue
        assert len(kept) == 300
    assert refusals > 50


def test_a_footer_that_can_not_be_true_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(_table(100), tmp_path / "p.parquet", row_group_size=50)
    monkeypatch.setattr(readers, "_LARGEST_GROUP", 10)
    assert "unpacks to more than 10 bytes" in str(refused(tmp_path / "p.parquet"))


def test_a_disk_that_fails_under_parquet_is_no_damaged_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(_table(), tmp_path / "p.parquet")

    def refuse(self: Path, *_: Any) -> Any:
        raise OSError(5, "Input/output error", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    error = refused(tmp_path / "p.parquet")
    assert error.exit_status == 74
    assert "Input/output error" in str(error)


def test_an_array_that_is_too_large_is_refused_before_it_is_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "_LARGEST_ARRAY", 2**20)
    (tmp_path / "p.json.gz").write_bytes(gzip.compress(b"[" + b" " * 2**24))
    tracemalloc.start()
    assert "a JSON array above" in str(refused(tmp_path / "p.json.gz"))
    assert tracemalloc.get_traced_memory()[1] < 2**23
    tracemalloc.stop()


SAMPLE = [
    "jsonl row: too long",
    "csv: open quote",
    "parquet: encrypted",
    "disk: offsets out of bounds",
    "gzip: cut at 1",
    "yaml: many laughs",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
def test_the_command_says_it_in_one_line(tmp_path: Path, model_folder: Path, name: str) -> None:
    case = CASES[name]
    file = make(case, tmp_path)
    if not name.startswith("yaml"):
        model, output = {"model": str(model_folder)}, {"output": str(tmp_path / "shards")}
        config = write_config(tmp_path / "run.yaml", data={"path": str(file)}, policy=model, precompute=output)
    else:
        config = file
    result = refshard("precompute", "--config", config, check=case.status)
    complaints = [line for line in result.stderr.splitlines() if line.startswith("refshard: ")]
    assert len(complaints) == 1
    assert str(file) in complaints[0]
    assert "Traceback" not in result.stderr
    assert "this is a bug" not in result.stderr


# Models


def change_json(file: str, change: Callable[[Any], Any]) -> Callable[[Path], Any]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        change(content)
        (folder / file).write_text(json.dumps(content))

    return damage


CONFIG: dict[str, Any] = {
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
DAMAGED_MODELS: dict[str, Callable[[Path], Any]] = {
    **{
        f"{key} is {value!r}": change_json("config.json", lambda c, k=key, v=value: c.update({k: v}))
        for key, values in CONFIG.items()
        for value in values
    },
    **{
        f"{file} is {content[:9]!r}": lambda f, file=file, content=content: (f / file).write_bytes(content)
        for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
        for content in (b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b"\xff" * 8 + b"{}", b"\0" * 8)
    },
    "no tokenizer": lambda f: (f / "tokenizer.json").unlink(),
    "no config": lambda f: (f / "config.json").unlink(),
    "no weights": lambda f: (f / "model.safetensors").unlink(),
    "an index of nothing": lambda f: (f / "model.safetensors.index.json").write_text("{}"),
    "an index that is damaged": lambda f: (f / "model.safetensors.index.json").write_text("{"),
    "a weight less": lambda f: _change_weights(f, lambda w: w.pop("model.norm.weight")),
    "a weight of another shape": lambda f: _change_weights(f, lambda w: w.update({"model.norm.weight": torch.ones(3)})),
    "a header of 2 GB": lambda f: (f / "model.safetensors").write_bytes((2**31).to_bytes(8, "little") + b"{}"),
}


def _change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("damage", DAMAGED_MODELS.values(), ids=DAMAGED_MODELS)
def test_a_damaged_model_is_refused_by_its_key_or_loads(
    model_folder: Path, tmp_path: Path, damage: Callable[[Path], Any]
) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "model")
    damage(folder)
    config = load_config(
        write_config(
            tmp_path / "run.yaml",
            data={"path": "x"},
            policy={"model": str(folder)},
            precompute={"output": "y"},
        )
    )
    try:
        identity_of_run(config, load_tokenizer(config))
        policy_settings(config)
        load_reference(config, torch.device("cpu"))
        load_policy(config)
    except RefshardError as error:
        assert error.exit_status in (2, 65, 74)
        assert str(folder) in str(error)
    tally("a damaged model or adapter", 1, outcome="refused by its setting, or loaded")


DAMAGED_ADAPTERS: dict[str, Callable[[Path], Any]] = {
    **{
        f"{key} is {value!r}": change_json("adapter_config.json", lambda c, k=key, v=value: c.update({k: v}))
        for key, value in (("peft_type", "NOPE"), ("r", 0), ("r", "x"), ("target_modules", 5), ("task_type", "NOPE"))
    },
    **{
        f"{file} is {content[:9]!r}": lambda f, file=file, content=content: (f / file).write_bytes(content)
        for file in ("adapter_config.json", "adapter_model.safetensors")
        for content in (b"", b"{", b"[]", b"{}", b"\xff\xfe", b"[" * 100_000)
    },
    "no target": change_json("adapter_config.json", lambda c: c.update(target_modules=["nope"])),
    "another rank": change_json("adapter_config.json", lambda c: c.update(r=5)),
}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    base = LlamaForCausalLM.from_pretrained(model_folder)
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("damage", DAMAGED_ADAPTERS.values(), ids=DAMAGED_ADAPTERS)
def test_a_damaged_adapter_is_refused_by_its_folder(
    model_folder: Path, adapter: Path, tmp_path: Path, damage: Callable[[Path], Any]
) -> None:
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    damage(folder)
    policy = {"model": str(model_folder), "adapter": str(folder)}
    config = load_config(
        write_config(tmp_path / "run.yaml", data={"path": "x"}, policy=policy, precompute={"output": "y"})
    )
    with pytest.raises(RefshardError) as caught:
        identity_of_run(config, load_tokenizer(config))
        load_reference(config, torch.device("cpu"))
        load_policy(config)
    assert caught.value.exit_status in (2, 65)
    assert str(folder) in str(caught.value)


# Stores


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """A finished store of three parts."""
    folder = tmp_path_factory.mktemp("scored")
    data = write_jsonl(folder / "pairs.jsonl", simple_rows(24))
    config = write_config(
        folder / "run.yaml",
        data={"path": str(data), "max_length": 128},
        policy={"model": str(model_folder)},
        precompute={"output": str(folder / "shards"), "rows_per_shard": 8, "tokens_per_batch": 512},
    )
    refshard("precompute", "--config", config)
    return folder / "shards" / "train"


def read_store(folder: Path) -> list[Any]:
    return [part.to_pylist() for part in read_parts(open_store(folder))]


def swap(folder: Path) -> None:
    first, second = folder / "part-00000.parquet", folder / "part-00001.parquet"
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)


def rename_part(name: str) -> Callable[[Path], Any]:
    return change_json("index.json", lambda index: index["parts"][1].update(file=name))


PART = "part-00001.parquet"
STORES: dict[str, Callable[[Path], Any]] = {
    "parts swapped": swap,
    "part gone": lambda f: (f / PART).unlink(),
    "part empty": lambda f: (f / PART).write_bytes(b""),
    "part a folder": lambda f: ((f / PART).unlink(), (f / PART).mkdir()),
    "part of zeros": lambda f: (f / PART).write_bytes(bytes((f / PART).stat().st_size)),
    "part longer": lambda f: (f / PART).write_bytes((f / PART).read_bytes() + b"\0"),
    "part twice": lambda f: shutil.copy(f / "part-00000.parquet", f / PART),
    "index gone": lambda f: (f / "index.json").unlink(),
    "manifest gone": lambda f: (f / "manifest.json").unlink(),
    "all gone": shutil.rmtree,
    "a part less in the index": change_json("index.json", lambda index: index["parts"].pop()),
    "a part twice in the index": change_json("index.json", lambda index: index["parts"].append(index["parts"][0])),
    "parts in another order": change_json("index.json", lambda index: index["parts"].reverse()),
    "schema of tomorrow": change_json("manifest.json", lambda manifest: manifest.update(schema_version=99)),
    "another format": change_json("manifest.json", lambda manifest: manifest.update(format="other")),
    "another max_length": change_json("manifest.json", lambda m: m["identity"]["tokenization"].update(max_length=7)),
    **{
        f"part named {name!r}": rename_part(name)
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
        )
    },
    **{
        f"{file} is {content[:9]!r}": lambda f, file=file, content=content: (f / file).write_bytes(content)
        for file in ("manifest.json", "index.json")
        for content in (b"", b"{", b"[]", b"{}", b"null", b"\xff\xfe", b"[" * 100_000, b'{"a": 1e999}', b"\0" * 9)
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", STORES.values(), ids=STORES)
def test_a_damaged_store_is_refused_by_name(scored: Path, tmp_path: Path, damage: Callable[[Path], Any]) -> None:
    folder = shutil.copytree(scored, tmp_path / "train")
    damage(folder)
    with pytest.raises(RefshardError) as caught:
        read_store(folder)
    assert caught.value.exit_status in (65, 74, 75, 78)
    assert str(folder) in str(caught.value)
    tally("a store damaged in one of many ways", 1, outcome="refused by name")


WRONG_VALUES = (None, -1, 0, 10**30, 1.5, float("nan"), True, "", "x", [], {}, [[]], {"x": 1})


def json_paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, item in items:
        yield from json_paths(item, (*path, key))


def signed(tree: Any) -> bytes:
    """What a stranger would write who knows the format: with a digest and a fingerprint that are right."""
    if isinstance(tree, dict):
        tree.pop("sha256", None)
        if "identity" in tree:
            tree["fingerprint"] = fingerprint_of(tree["identity"])
        return sealed(tree)
    return json.dumps(tree).encode()


@pytest.mark.slow
@pytest.mark.parametrize("write", [lambda tree: json.dumps(tree).encode(), signed], ids=["edited", "signed"])
@pytest.mark.parametrize("file", ["manifest.json", "index.json"])
def test_any_wrong_value_in_a_store_s_json_is_refused_or_changes_no_row(
    scored: Path, tmp_path: Path, file: str, write: Callable[[Any], bytes]
) -> None:
    folder = shutil.copytree(scored, tmp_path / "train")
    expected, content = read_store(folder), (folder / file).read_text()
    tried = refusals = 0
    for path in json_paths(json.loads(content)):
        for value in (*WRONG_VALUES, ...):
            tree = parent = json.loads(content)
            for key in path[:-1]:
                parent = parent[key]
            if value is ...:
                del parent[path[-1]]
            else:
                parent[path[-1]] = value
            (folder / file).write_bytes(write(tree))
            tried += 1
            try:
                found = read_store(folder)
                assert verify_store(LocalFolder(folder)).parts
                inspect.run(str(folder), as_json=False)
            except RefshardError as error:
                assert error.exit_status in (65, 74, 75, 78)
                refusals += 1
                continue
            assert found == expected, (path, value)
    assert tried > 100
    assert refusals > tried // 3
    tally(f"a wrong value in {file}", tried, outcome="refused, or not a row changed")


@pytest.mark.slow
def test_flipped_bits_in_a_part_are_all_found(scored: Path, tmp_path: Path) -> None:
    folder, random = shutil.copytree(scored, tmp_path / "train"), np.random.default_rng(0)
    whole = (folder / PART).read_bytes()
    for _ in range(200):
        changed = bytearray(whole)
        changed[random.integers(len(whole))] ^= 1 << random.integers(8)
        (folder / PART).write_bytes(changed)
        with pytest.raises(RefshardError, match=PART):
            read_store(folder)
