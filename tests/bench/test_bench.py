"""The benchmark's scripts run, agree with TRL, and print what they promise; at toy size, where no speed means much."""

import json
import re
from pathlib import Path

import pytest

from support.forked_benchmark import BENCH, run_script

pytestmark = pytest.mark.nightly


def largest_gap(result: dict, mode: str, side: str = "trl") -> float:
    """The largest difference to TRL: of all sums in stage one, of the first step's loss in stage two."""
    ours, trl = (result["measured"][mode][side][0]["values"] for side in ("ours", side))
    count = len(ours) if result["workload"]["stage"] == 1 else 1
    return max(abs(a - b) for a, b in zip(ours[:count], trl[:count], strict=True))


def test_the_processor_benchmark_prints_both_sides_and_makes_its_page(tmp_path: Path) -> None:
    results = tmp_path / "results"
    file = results / "cpu.json"
    said = run_script("run.py", "--only", "toy-score,toy-train", "--rounds", "1", "--json", str(file))
    # Scoring and training on all threads, scoring on one thread, too.
    for wanted in (r"torch \d", r"\| pairs/s \|", r"\| s per step \|", r"\| `toy-score` \| 1 \| TRL \| [\d.]+ "):
        assert re.search(wanted, said), said
    for side in ("refshard", "TRL", "TRL, completion positions only"):
        assert len(re.findall(rf"\| {side} \| [\d.]+ ", said)) == 3, said
    # The headline is the ratio to the side that does on a processor what TRL does on a GPU.
    assert len(re.findall(r"\| TRL, completion positions only \| \*\*[\d.]+x\*\*, ", said)) == 2
    assert len(re.findall(r"\| TRL \| [\d.]+x, ", said)) == 2

    score, train = json.loads(file.read_text(encoding="utf-8"))["results"]
    for side in ("trl", "trl-completions"):
        assert max(largest_gap(score, "wall", side), largest_gap(score, "cpu", side)) < 1e-4
        assert largest_gap(train, "wall", side) < 1e-4

    run_script("page.py", "--results", str(results), "--docs", str(tmp_path / "docs"))
    page = (tmp_path / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert "`python tests/bench/run.py --only toy-score`" in page
    assert "Not measured." in page
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", page):
        assert (tmp_path / "docs" / picture).read_text(encoding="utf-8").lstrip().startswith("<?xml")


def test_the_gpu_benchmark_runs_at_toy_size_and_puts_what_it_found_on_the_page(tmp_path: Path) -> None:
    file = tmp_path / "results" / "gpu.json"
    run_script("gpu.py", "--tiny", "--minutes", "15", "--json", str(file))
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["left_out"] == {}
    peers = {result["workload"]["name"]: result["workload"]["peers"] for result in found["results"]}
    assert peers["tiny-gpu-score"] == ["trl"] and peers["tiny-gpu-lora"] == ["trl", "trl-live"]
    # Autocast to bf16, over float32 sums.
    assert all(largest_gap(r, "wall") < 1e-2 for r in found["results"] if r["workload"]["stage"] == 2)
    compiled, scoring, step, _ = found["findings"]
    assert compiled["lines"][0].startswith("2 after the self-check")
    assert len(scoring["lines"]) == len(step["lines"]) == 10

    run_script("page.py", "--results", str(file.parent), "--docs", str(tmp_path / "docs"))
    page = (tmp_path / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert scoring["lines"][0] in page and "| `tiny-gpu-lora` | TRL, live reference |" in page


def test_the_gpu_benchmark_stops_in_time_and_says_what_it_left_out(tmp_path: Path) -> None:
    run_script("gpu.py", "--tiny", "--minutes", "0", "--json", str(tmp_path / "gpu.json"))
    found = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert set(found["left_out"].values()) == {"no time was left"} and len(found["left_out"]) > 10


def test_only_the_main_process_needs_the_memory_of_a_policy_under_fsdp() -> None:
    said = run_script("one_copy.py", "--layers", "8")
    peaks = {name: [float(peak.replace(",", "")) for peak in re.findall(r"rank \d ([\d,]+) MiB", line)]
             for name, _, line in (line.partition(": ") for line in said.splitlines()) if " MiB" in line}  # fmt: skip
    whole = float(re.findall(r"^([\d,]+) MiB of weights", said, re.MULTILINE)[0])
    assert peaks["one copy is loaded"][1] < peaks["a copy in each process"][1] - 0.3 * whole
    assert said.endswith("the same policy\n")


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
