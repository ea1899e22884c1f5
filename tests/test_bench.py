"""The benchmark's scripts run, agree with TRL, and print what they promise; at toy size, where no speed means much."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

BENCH = Path(__file__).parent / "bench"


def _run(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(BENCH / script), *arguments], capture_output=True, text=True, cwd=BENCH.parents[1]
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_processor_benchmark_prints_both_sides_and_makes_its_page(tmp_path: Path) -> None:
    results = tmp_path / "results"
    file = str(results / "cpu.json")
    said = _run("run.py", "--only", "toy-score", "--only", "toy-train", "--rounds", "1", "--json", file)
    for wanted in (r"ours +[\d.]+ .* pairs/s", r"trl +[\d.]+ .* pairs/s", r"trl +[\d.]+ .* s per step", r"torch \d"):
        assert re.search(wanted, said), said
    assert len(re.findall(r"wall clock: [\d.]+x \[[\d.]+\] \(bar 1: ", said)) == 2
    # Scoring is measured on one thread, too.
    assert len(re.findall(r"CPU time: [\d.]+x", said)) == 1
    # Of toy sizes, agreement alone can be held to a bar; each measurement prints it.
    assert len(re.findall(r"agreement: .* \(bar at most [\d.]+: met\)", said)) == 3

    _run("page.py", "--results", str(results), "--docs", str(tmp_path / "docs"))
    page = (tmp_path / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert "`python tests/bench/run.py --only toy-score`" in page
    assert "Not measured." in page
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", page):
        assert (tmp_path / "docs" / picture).read_text(encoding="utf-8").lstrip().startswith("<?xml")


def test_the_gpu_benchmark_runs_at_toy_size(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    said = _run("gpu.py", "--tiny", "--rounds", "1", "--json", str(file))
    assert len(re.findall(r"trl over ours, wall clock: [\d.]+x", said)) == 3
    assert len(re.findall(r"trl-live over ours, wall clock: [\d.]+x", said)) == 2
    assert "the reference has" in said
    gaps = [float(gap) for gap in re.findall(r"loss differs by ([\d.e+-]+)", said)]
    assert len(gaps) == 2
    # Autocast to bf16, over float32 sums.
    assert max(gaps) < 1e-2
    assert len(json.loads(file.read_text(encoding="utf-8"))["results"]) == 3
