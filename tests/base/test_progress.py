"""The progress line: for a terminal, for a log, for a machine; rates and time left by hand."""

import io
import json
import logging
import os
import sys
import types
from typing import Any

import click
import pytest

from pipeline.base import progress as module
from pipeline.base.progress import JsonLines, Progress, emit, say, start_json, without_nan

GIB = 2**30


class Clock:
    """Stands for the time module: seconds pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return 1.7e9 + self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def work(clock: Clock, progress: Progress, pieces: int, *, seconds: float) -> None:
    for _ in range(pieces):
        clock.now += seconds
        progress.advance(8, tokens=800, memory=3 * GIB)


def test_a_log_gets_the_first_line_at_once_then_one_in_half_a_minute(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = Progress("train", 8000, "steps")
    work(clock, progress, 1, seconds=5)
    work(clock, progress, 50, seconds=2)
    err = capsys.readouterr().err
    assert "\r" not in err
    # At 5 s, and then the first after each half minute: 37, 69, 101.
    assert [line.split(" of ")[0] for line in err.splitlines()] == [f"train: {8 * n}" for n in (1, 17, 33, 49)]


def test_the_rate_leaves_out_the_first_piece_which_pays_for_the_start(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = Progress("train", 160, "pairs")
    work(clock, progress, 1, seconds=100)
    work(clock, progress, 9, seconds=4)
    last = capsys.readouterr().err.splitlines()[-1]
    # At 132 s: eight pieces of 8 pairs and 800 tokens in 32 s; 160 - 72 = 88 pairs left at 2 a second.
    assert last == "train: 72 of 160 pairs, 2.0 pairs/s, 200 tokens/s, 3.0 GiB, 00:44 left"


def test_what_an_earlier_start_did_counts_as_done_but_not_as_fast(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = Progress("train", 1000, "pairs", done=900)
    work(clock, progress, 1, seconds=4)
    # The first piece alone does not tell how long the others take.
    assert capsys.readouterr().err == "train: 908 of 1,000 pairs, 3.0 GiB\n"
    work(clock, progress, 8, seconds=4)
    assert capsys.readouterr().err == "train: 972 of 1,000 pairs, 2.0 pairs/s, 200 tokens/s, 3.0 GiB, 00:14 left\n"


def test_the_last_line_comes_once_and_none_where_nothing_was_done(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    Progress("test", 0, "pairs").close()
    Progress("test", 100, "pairs", done=100).close()
    assert capsys.readouterr().err == ""
    whole = Progress("test", 8, "pairs")
    work(clock, whole, 1, seconds=1)
    whole.close()
    assert len(capsys.readouterr().err.splitlines()) == 1
    two = Progress("test", 16, "pairs")
    work(clock, two, 2, seconds=1)
    two.close()
    assert [line.split(" of ")[0] for line in capsys.readouterr().err.splitlines()] == ["test: 8", "test: 16"]


def test_what_takes_longer_than_a_second_is_shown_as_seconds_and_loading_is_no_part_of_it(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = Progress("train", 32, "rows")
    progress.pulse("parity gate, 0 of 32 pairs")
    clock.now += 300
    progress.restart()
    assert progress.seconds == 0
    work(clock, progress, 4, seconds=20)
    progress.close()
    replies = Progress("generate", 16, "replies")
    work(clock, replies, 2, seconds=32)
    assert capsys.readouterr().err.splitlines() == [
        "train: 0 of 32 rows, parity gate, 0 of 32 pairs",
        "train: 8 of 32 rows, 3.0 GiB",
        "train: 24 of 32 rows, 2.5 s/row, 40 tokens/s, 3.0 GiB, 00:20 left",
        "train: 32 of 32 rows, 2.5 s/row, 40 tokens/s, 3.0 GiB",
        "generate: 8 of 16 replies, 3.0 GiB",
        "generate: 16 of 16 replies, 4.0 s/reply, 25 tokens/s, 3.0 GiB",
    ]


def test_loss_and_margin_stand_in_the_line_from_the_next_log_on(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = Progress("train", None, "steps")
    work(clock, progress, 1, seconds=1)
    progress.show({"loss": 0.51234567, "margin": 1.25})
    clock.now += 31
    progress.pulse("evaluating, batch 3 of 9")
    assert capsys.readouterr().err.splitlines()[-1] == (
        "train: 8 steps, 3.0 GiB, loss 0.5123, margin 1.25, evaluating, batch 3 of 9"
    )


def test_one_unit_is_written_in_the_singular(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("train", None, "rows")
    progress.advance(1, tokens=100, memory=3 * GIB)
    assert capsys.readouterr().err == "train: 1 row, 3.0 GiB\n"


def test_a_terminal_has_one_line_that_is_rewritten(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = Progress("train", 16, "steps")
    progress.show({"margin": 0.25})
    progress.advance(8, tokens=800, memory=GIB)
    say("step 8: held-out loss 0.6", err=True)
    progress.advance(8, tokens=800, memory=GIB)
    progress.close()
    said = terminal.getvalue()
    assert "\r" in said
    assert "16/16" in said
    assert "margin 0.25" in said
    assert "step 8: held-out loss 0.6\n" in said
    assert "of 16 steps" not in said


@pytest.mark.parametrize(
    ("rank", "loaded", "kind", "said"),
    [
        (None, False, Terminal, "Loading the libraries ...\n"),
        ("0", False, Terminal, "Loading the libraries ...\n"),
        ("1", False, Terminal, ""),
        (None, True, Terminal, ""),
        (None, False, io.StringIO, ""),
    ],
)
def test_a_terminal_is_told_once_that_the_libraries_load(
    monkeypatch: pytest.MonkeyPatch, rank: str | None, loaded: bool, kind: type[io.StringIO], said: str
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(sys, "modules", {"torch": None} if loaded else {})
    monkeypatch.setattr(sys, "stderr", out := kind())
    module.say_loading()
    assert out.getvalue() == said


def test_no_line_holds_what_a_terminal_obeys(capsys: pytest.CaptureFixture[str]) -> None:
    say("pairs\x1b[31m\x9b2J\u202egnp.jsonl:\n  two")
    say("warning: \x1b]0;title\x07", err=True)
    Progress("a\x1b[1m", None, "steps").pulse("\x07")
    shown = capsys.readouterr()
    assert shown.out == "pairs\\x1b[31m\\x9b2J\\u202egnp.jsonl:\n  two\n"
    assert shown.err.startswith("warning: \\x1b]0;title\\x07\n")
    assert not set("\x1b\x07") & set(shown.err)


def json_out(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What stdout gets from here on. (No fixture: pytest changes stdout between a test and its fixtures.)"""
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv(module.JSON_LOGS, "")
    start_json()
    return out


def said(out: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_with_json_every_line_is_an_object_with_its_kind(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = json_out(monkeypatch)
    click.echo("two\nlines")
    print("in", "pieces", end="")
    print("", flush=True)
    progress = Progress("train", 16, "steps")
    work(clock, progress, 2, seconds=4)
    say("a line beside")
    progress.close()
    lines = said(out)
    assert [line["kind"] for line in lines] == ["message"] * 3 + ["progress", "message", "progress"]
    assert [line["text"] for line in lines if line["kind"] == "message"] == [
        "two",
        "lines",
        "in pieces",
        "a line beside",
    ]
    assert all(line["time"] > 1.7e9 for line in lines)
    last = lines[-1]
    assert (last["stage"], last["unit"], last["done"], last["total"]) == ("train", "steps", 16, 16)
    assert (last["per_second"], last["tokens/s"], last["memory"], last["seconds_left"]) == (2, 200, 3 * GIB, 0)
    assert capsys.readouterr().err == ""


def test_what_is_not_finite_becomes_null_which_json_can_say(monkeypatch: pytest.MonkeyPatch) -> None:
    out = json_out(monkeypatch)
    emit("log", {"loss": float("nan"), "grad_norm": float("inf"), "step": 3})
    assert "NaN" not in out.getvalue()
    assert (said(out)[0] | {"time": 0}) == {"kind": "log", "time": 0, "loss": None, "grad_norm": None, "step": 3}
    assert without_nan({"a": 1, "b": "x", "c": -float("inf")}) == {"a": 1, "b": "x", "c": None}


def test_asking_for_json_twice_wraps_once_and_processes_inherit_it(monkeypatch: pytest.MonkeyPatch) -> None:
    out = json_out(monkeypatch)
    start_json()
    assert isinstance(sys.stdout, JsonLines)
    click.echo("once")
    assert [line["text"] for line in said(out)] == ["once"]
    assert os.environ[module.JSON_LOGS] == "1"


def test_records_go_nowhere_where_people_read(capsys: pytest.CaptureFixture[str]) -> None:
    emit("log", {"loss": 1.0})
    assert capsys.readouterr() == ("", "")


def test_the_level_of_our_logger_leaves_out_messages_and_progress_then_warnings(
    clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def shown(level: int) -> list[str]:
        monkeypatch.setattr(logging.getLogger("refshard"), "level", level)
        progress = Progress("train", 80, "steps")
        work(clock, progress, 1, seconds=1)
        progress.close()
        for text, err in (("a message", False), ("warning: by a stage", False), ("to stderr", True)):
            say(text, err=err)
        out, err_text = capsys.readouterr()
        return [*out.splitlines(), *(line.partition(":")[0] for line in err_text.splitlines())]

    assert shown(logging.NOTSET) == shown(logging.INFO) == ["a message", "warning: by a stage", "train", "to stderr"]
    assert shown(logging.WARNING) == ["warning: by a stage", "to stderr"]
    assert shown(logging.ERROR) == []


def test_a_notebook_has_a_line_that_is_rewritten(
    clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not module.is_notebook()
    shell = types.SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    work(clock, Progress("train", 80, "steps"), 2, seconds=1)
    assert "\rtrain:" in capsys.readouterr().err
    # IPython in a terminal, and a script that has imported it.
    for other in (types.SimpleNamespace(config={}), None):
        monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda other=other: other))
        assert not module.is_notebook()
