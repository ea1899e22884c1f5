"""The benchmark's scripts run, agree with TRL, and print what they promise; at toy size, where no speed means much."""

import json
import re
from pathlib import Path

import pytest

from support.forked_benchmark import BENCH, run_script

pytestmark = pytest.mark.slow


def test_the_processor_benchmark_prints_both_sides_and_makes_its_page(tmp_path: Path) -> None:
    results = tmp_path / "results"
    file = str(results / "cpu.json")
    said = run_script("run.py", "--only", "toy-score", "--only", "toy-train", "--rounds", "1", "--json", file)
    for wanted in (r"ours +[\d.]+ .* pairs/s", r"trl +[\d.]+ .* pairs/s", r"trl +[\d.]+ .* s per step", r"torch \d"):
        assert re.search(wanted, said), said
    assert len(re.findall(r"wall clock: [\d.]+x \[[\d.]+\] \(bar 1: ", said)) == 2
    # Scoring is measured on one thread, too.
    assert len(re.findall(r"CPU time: [\d.]+x", said)) == 1
    # Of toy sizes, agreement alone can be held to a bar; each measurement prints it.
    assert len(re.findall(r"agreement: .* \(bar at most [\d.]+: met\)", said)) == 3

    run_script("page.py", "--results", str(results), "--docs", str(tmp_path / "docs"))
    page = (tmp_path / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert "`python tests/bench/run.py --only toy-score`" in page
    assert "Not measured." in page
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", page):
        assert (tmp_path / "docs" / picture).read_text(encoding="utf-8").lstrip().startswith("<?xml")


def test_the_gpu_benchmark_runs_at_toy_size(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    said = run_script("gpu.py", "--tiny", "--rounds", "1", "--json", str(file))
    assert len(re.findall(r"trl over ours, wall clock: [\d.]+x", said)) == 3
    assert len(re.findall(r"trl-live over ours, wall clock: [\d.]+x", said)) == 2
    assert "the reference has" in said
    gaps = [float(gap) for gap in re.findall(r"loss differs by ([\d.e+-]+)", said)]
    assert len(gaps) == 2
    # Autocast to bf16, over float32 sums.
    assert max(gaps) < 1e-2
    assert len(json.loads(file.read_text(encoding="utf-8"))["results"]) == 3


def test_a_measurement_starts_on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As at real size, where nothing is shared with the driver: the other tests here fork instead."""
    monkeypatch.syspath_prepend(str(BENCH))
    import rounds
    import workloads

    toy = workloads.TOY[0]
    result = rounds.measure(toy, "ours", 2, 1)
    assert len(result["values"]) == 4 and all(value < -1 for value in result["values"])
    assert min(result[key] for key in ("wall", "cpu", "matrix_rate")) > 0
    with pytest.raises(RuntimeError, match=r"(?s)toy-score, ours: the measurement failed.*invalid literal for int"):
        rounds.measure(toy, "ours", "two", 1)
