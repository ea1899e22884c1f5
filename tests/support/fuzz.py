"""Fuzz the readers of files: change inputs at random, and change those further that reach new lines.

Whatever is raised but a `RefshardError` is a failure, and so is an input that takes longer than a second of the
processor. The report holds one input for each kind of failure, for `targets(folder)[name].run(content)`.
"""

import importlib
import json
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pipeline
from pipeline.base.errors import BadRow, RefshardError
from pipeline.base.folders import LocalFolder
from pipeline.config.data import DataConfig
from pipeline.config.reader import load_config
from pipeline.data.layouts import to_pair
from pipeline.data.sources import count_rows, open_source, read_rows
from pipeline.store.finishing import finish_store
from pipeline.store.store import create_store, open_store, read_parts
from pipeline.store.verify import verify_store
from support.damage import DATA, SETTINGS, WRONG_VALUES, Damage, signed

PACKAGE = Path(pipeline.__file__).parent

Pair = tuple[CodeType, int, int]
"""Code of a function, and two of its lines that ran in succession"""


@dataclass(frozen=True)
class Target:
    """A function to fuzz, and the inputs to begin with."""

    run: Callable[[bytes], object]
    seeds: Sequence[bytes]
    words: Sequence[bytes] = ()
    """Tokens of the format, to insert into inputs"""
    traced: Collection[str] = tuple(map(str, PACKAGE.rglob("*.py")))
    """Files whose lines count"""


@dataclass
class Report:
    """Outcome of a fuzzing."""

    executions: int = 0
    corpus: list[bytes] = field(default_factory=list)
    """Seeds, and inputs that reached a new pair of lines"""
    pairs: set[Pair] = field(default_factory=set)
    failures: dict[str, bytes] = field(default_factory=dict)
    """One input for each kind of failure: what was raised, and where"""

    @property
    def lines(self) -> int:
        return len({(code.co_filename, line) for code, *ends in self.pairs for line in ends if line})

    def summary(self) -> str:
        return (
            f"{self.executions:,} executions, {len(self.corpus):,} inputs kept, {self.lines:,} lines and "
            f"{len(self.pairs):,} pairs of lines reached, {len(self.failures):,} failures"
        )


class _TooSlow(BaseException):
    """Derives from BaseException, so that no handler of the fuzzed code catches it."""


_SECONDS = 1.0
_SECONDS_UNTIL_STOPPED = 60


def fuzz(
    target: Target, *, seed: int, seconds: float = float("inf"), executions: int = sys.maxsize, guided: bool = True
) -> Report:
    """Run a target on changed inputs until the time or the number of executions is used up.

    Args:
        target: What is run.
        seed: Of the changes.
        seconds: Of wall-clock time.
        executions: At most so many.
        guided: Keep inputs that reach a new pair of lines; otherwise only the seeds are changed.
    """
    chance, report = random.Random(seed), Report(corpus=list(target.seeds))
    end = time.monotonic() + seconds
    for content in target.seeds:
        _execute(target, content, report)
    while report.executions < executions and time.monotonic() < end:
        # What was reached last is likely to be close to more.
        near = report.corpus[-2:] if chance.randrange(2) else report.corpus
        content = _change(chance.choice(near), report.corpus, target.words, chance)
        if _execute(target, content, report) and guided:
            report.corpus.append(content)
    return report


def _execute(target: Target, content: bytes, report: Report) -> bool:
    """Run once and note a failure; give True if a new pair of lines was reached."""
    report.executions += 1
    start = time.process_time()
    before = signal.signal(signal.SIGALRM, _stop)
    signal.setitimer(signal.ITIMER_REAL, _SECONDS_UNTIL_STOPPED)
    failure = None
    try:
        found = _traced(target, content)
    except _TooSlow:
        found, failure = set(), "runs without an end"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    if isinstance(found, Exception):
        trace = found.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        place = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace is not None else ""
        found, failure = set(), f"{type(found).__name__}: {str(found)[:200]} ({place})"
    elif time.process_time() - start > _SECONDS:
        failure = failure or "takes longer than a second"
    if failure is not None:
        report.failures.setdefault(failure, content)
    new = found - report.pairs
    report.pairs |= new
    return bool(new)


def _stop(number: int, frame: object) -> None:
    raise _TooSlow


def _traced(target: Target, content: bytes) -> set[Pair] | Exception:
    """Give the pairs of lines that a run reaches, or the exception that it must not raise."""
    found: set[Pair] = set()
    last: dict[FrameType, int] = {}
    files = frozenset(target.traced)

    def trace_line(frame: FrameType, event: str, argument: object) -> Any:
        if event == "line":
            found.add((frame.f_code, last.get(frame, 0), frame.f_lineno))
            last[frame] = frame.f_lineno
        elif event == "return":
            last.pop(frame, None)
        return trace_line

    def trace_call(frame: FrameType, event: str, argument: object) -> Any:
        return trace_line if frame.f_code.co_filename in files else None

    before = sys.gettrace()
    sys.settrace(trace_call)
    try:
        target.run(content)
    except RefshardError:
        pass
    except Exception as error:
        return error
    finally:
        sys.settrace(before)
    return found


# Changes

_BYTES = (b"\x00", b"\xff", b"\n", b" ", b"0", b"-1", b"1e999", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"9" * 5000)


def _change(content: bytes, corpus: Sequence[bytes], words: Sequence[bytes], chance: random.Random) -> bytes:
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        content = _change_once(content, corpus, words, chance)
    return content[:100_000]


def _change_once(content: bytes, corpus: Sequence[bytes], words: Sequence[bytes], chance: random.Random) -> bytes:
    at, a, b = chance.randrange(len(content) + 1), *sorted(chance.randrange(len(content) + 1) for _ in range(2))
    match chance.choice(("byte", "byte", "bit", "cut", "repeat", "insert", "insert", "splice", "value", "value")):
        case "byte":
            return content[:at] + bytes([chance.randrange(256)]) + content[at + 1 :]
        case "bit":
            changed = bytes([byte ^ 1 << chance.randrange(8) for byte in content[at : at + 1]])
            return content[:at] + changed + content[at + 1 :]
        case "cut":
            return content[:a] + content[b:]
        case "repeat":
            return content[:b] + content[a:b] * chance.choice((1, 1, 2, 50)) + content[b:]
        case "splice":
            other = chance.choice(corpus)
            return content[:at] + other[chance.randrange(len(other) + 1) :]
        case "value" if (changed := _with_another_value(content, chance)) is not None:
            return changed
    return content[:at] + chance.choice((*_BYTES, *words)) + content[at:]


def _with_another_value(content: bytes, chance: random.Random) -> bytes | None:
    """Replace or delete one value of a JSON document, or of one of its lines; None if that is not JSON."""
    lines = content.split(b"\n") if content.count(b"\n}") == 0 else [content]
    at = chance.randrange(len(lines))
    try:
        tree = json.loads(lines[at])
    except (ValueError, RecursionError):
        return None
    places = list(_places(tree))
    if not places:
        return json.dumps(chance.choice(WRONG_VALUES)).encode()
    parent, key = chance.choice(places)
    if chance.randrange(4):
        parent[key] = chance.choice(WRONG_VALUES)
    else:
        del parent[key]
    lines[at] = json.dumps(tree).encode()
    return b"\n".join(lines)


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield tree, key
        yield from _places(tree[key])


# Targets


def targets(folder: Path) -> dict[str, Target]:
    """Give the readers of JSON Lines, of settings, and of a store's two JSON files; they work in `folder`."""
    store = _make_store(folder / "store")
    # What is imported when it is first needed takes seconds.
    importlib.import_module("transformers.training_args")
    return {
        "jsonl": Target(
            lambda content: _read_pairs(folder / "pairs.jsonl", content),
            seeds=[
                *_seeds(DATA, "p.jsonl"),
                b'{"prompt": "a", "chosen": " b", "rejected": " c"}\n{"chosen": "a b", "rejected": "a c", "id": 5}\n',
                b'{"chosen": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "a"}], "rejected": '
                b'[{"role": "user", "content": "?"}, {"role": "assistant", "content": "b"}], "tools": "[]"}\n',
                b'{"prompt": "a", "chosen": [{"role": "assistant", "content": "b"}], "rejected": [{"role": "assistant",'
                b' "content": "c"}], "tools": [{"name": "f"}], "chat_template_kwargs": {"x": null, "y": 1}}',
            ],
            words=[b'"chosen"', b'"role"', b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\ud83d", b"\\n\\nAssistant:"],
        ),
        "yaml": Target(
            lambda content: _read_settings(folder / "run.yaml", content),
            seeds=[
                *_seeds(SETTINGS, "run.yaml"),
                b"data: {path: p.jsonl, max_length: 5, columns: {prompt: q}, eval: {a: {split: 'test[:5]'}}}\n"
                b"policy: {model: m, lora: {r: 2, target_modules: [a]}}\nprecompute: {output: out, reuse: [a, b]}\n"
                b"loss: {type: [sigmoid, sft], weights: [1, 0.5], ld_alpha: 0.5}\nreference: {sync: {steps: 2}}\n"
                b"train: {output_dir: o, learning_rate: 5e-7, bf16: off, lr_scheduler_kwargs: {a: 1}}\n",
                b"data:\n  path: &x p.jsonl\npolicy:\n  model: *x\n  quantization: {bits: 4}\n  ia3:\n"
                b"precompute: {output: out}\ntrain: {output_dir: o, save_strategy: no, on_missing: drop, fsdp: true}\n",
            ],
            words=b": |&a |*a |- |!!str |!x |? |null|nan|~|2024-13-45|{|}|[|]|train:|loss:|<<: |0x_|://a:b@".split(
                b"|"
            ),
        ),
        **{
            name: Target(
                lambda content, file=store / f"{name}.json": _read_store(file, content),  # type: ignore[misc]
                seeds=[(store / f"{name}.json").read_bytes(), *_more_seeds(name, store)],
                words=[b'"parts"', b'"file"', b'"part-00000.parquet"', b"{", b"}", b"[", b"]", b'"', b",", b":"],
            )
            for name in ("manifest", "index")
        },
    }


def _seeds(cases: dict[str, Damage], file: str) -> list[bytes]:
    """Give the short inputs of which a part is accepted; one that is refused at once reaches no further line."""
    found = [case.content for case in cases.values() if case.file == file and (case.status == 0 or case.in_row)]
    return [content for content in found if isinstance(content, bytes) and len(content) < 500]


def _read_pairs(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    source = open_source(DataConfig(path=str(file)))
    count_rows(source)
    for row in read_rows(source):
        try:
            to_pair(row.load(), {}, row.place)
        except BadRow:
            continue


def _read_settings(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    _ = load_config(file).train.options


def _make_store(folder: Path) -> Path:
    tokenization = {"version": 1, "tokenizer": "a", "chat_template": None, "max_length": 5, "token_logps": True}
    identity = {"schema": 1, "reference": {"declared": "a"}, "tokenization": tokenization}
    create_store(folder, identity, {"rows_per_shard": 8}, {"reference": "a", "dataset": "b"})
    finish_store(folder, 0)
    return folder


def _more_seeds(name: str, store: Path) -> list[bytes]:
    """Add an index with a part that does not exist: its entry is checked before the part is read."""
    if name == "manifest":
        return []
    index = json.loads((store / "index.json").read_text())
    index["parts"] = [{"file": "part-00000.parquet", "rows": 1, "bytes": 5, "sha256": "a"}]
    index["totals"] = {**index["totals"], "rows": 1, "kept": 1}
    return [json.dumps(index, indent=1).encode()]


def _read_store(file: Path, content: bytes) -> None:
    whole = file.with_suffix(".whole")
    if not whole.exists():
        shutil.copy(file, whole)
    try:
        file.write_bytes(signed(content))
        list(read_parts(open_store(file.parent)))
        verify_store(LocalFolder(file.parent))
    finally:
        shutil.copy(whole, file)
