"""Whole runs of refshard and TRL through their command lines take the same steps; at toy size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.forked_benchmark import BENCH, run_script
from support.runs import simple_rows, write_jsonl


@pytest.mark.nightly
def test_whole_runs_take_the_same_steps_and_are_put_on_the_page(model_folder: Path, tmp_path: Path) -> None:
    pairs = write_jsonl(tmp_path / "pairs.jsonl", simple_rows(12))
    file = tmp_path / "results" / "whole.json"
    command = [sys.executable, str(BENCH / "whole.py"), "--model", str(model_folder), "--data", str(pairs)]
    subprocess.run([*command, "--pairs", "8", "--rounds", "1", "--json", str(file)], check=True, capture_output=True)
    measured = json.loads(file.read_text(encoding="utf-8"))["measured"]
    ours = measured["ours"][0]
    assert len(ours["losses"]) == 2 and ours["losses"][0] != ours["losses"][1]
    assert 0 < ours["store"] < ours["wall"]
    for side in ("trl-completions", "trl"):
        assert measured[side][0]["losses"] == pytest.approx(ours["losses"], abs=1e-4)

    run_script("page.py", "--results", str(file.parent), "--docs", str(tmp_path / "docs"))
    page = (tmp_path / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert "the first 8 pairs of pairs.jsonl" in page and "| TRL, completion positions only | " in page
