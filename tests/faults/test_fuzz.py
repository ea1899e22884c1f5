"""The readers of files under fuzzing, and the fuzzer itself: what it is for, it can do."""

import time
from pathlib import Path

import pytest

from pipeline.base.errors import DataError
from support.fuzz import Report, Target, fuzz, targets
from support.tally import tally


def planted(content: bytes) -> None:
    """A bug behind conditions of which each is met by chance, and all at once by hardly any."""
    if content[:1] != b"Q":
        return
    if content[1:2] != b"Z":
        return
    if content[2:3] == b"X":
        raise RuntimeError("planted")
    raise DataError("close")


PLANTED = Target(planted, seeds=[b"abc"], traced=(__file__,))


def test_a_bug_behind_conditions_is_found_by_the_lines_that_they_open() -> None:
    found = fuzz(PLANTED, seed=0, executions=100_000)
    assert [failure.partition(" (")[0] for failure in found.failures] == ["RuntimeError: planted"]
    assert next(iter(found.failures.values()))[:3] == b"QZX"
    # As many executions that keep nothing of what they reach find nothing.
    blind = fuzz(PLANTED, seed=0, executions=100_000, guided=False)
    assert blind.executions == found.executions
    assert blind.failures == {}
    assert blind.lines < found.lines


def test_slowness_is_a_failure_and_a_refusal_is_none() -> None:
    def slow(content: bytes) -> None:
        if content == b"slow":
            end = time.process_time() + 1.1
            while time.process_time() < end:
                pass
        raise DataError("refused")

    report = fuzz(Target(slow, seeds=[b"slow", b"fast"]), seed=0, executions=20)
    assert report.failures == {"takes longer than a second": b"slow"}


def check(name: str, folder: Path, **limits: float) -> Report:
    report = fuzz(targets(folder)[name], seed=0, **limits)  # type: ignore[arg-type]
    assert report.failures == {}
    return report


@pytest.mark.parametrize(
    ("name", "executions", "lines"),
    [("jsonl", 1000, 180), ("yaml", 250, 180), ("manifest", 1200, 40), ("index", 1500, 40)],
)
def test_no_changed_input_is_a_bug(tmp_path: Path, name: str, executions: int, lines: int) -> None:
    report = check(name, tmp_path, executions=executions)
    assert report.executions == executions
    assert report.lines > lines
    tally(f"fuzzing, guided by coverage: {name}", executions, outcome="refused in a line, or read")


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["jsonl", "yaml", "manifest", "index"])
def test_no_changed_input_is_a_bug_within_a_minute(tmp_path: Path, name: str) -> None:
    report = check(name, tmp_path, seconds=60)
    print(f"{name}: {report.summary()}")
    outcome = f"refused in a line, or read; {report.lines} lines and {len(report.pairs):,} pairs of lines reached"
    tally(f"fuzzing for a minute, guided by coverage: {name}", report.executions, outcome=outcome)
