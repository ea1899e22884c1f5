"""What `refshard inspect` says of a store, against the same figures computed from the pairs themselves."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.base.errors import ConfigError
from stages import inspect
from support import stores as made_store
from support.processes import ROOT
from support.runs import refshard, simple_rows
from support.stores import made_pairs, make_large_store, make_store


def test_counts_lengths_and_margins_are_those_of_the_rows(make_run: Callable[..., Path], tmp_path: Path) -> None:
    rows = [*simple_rows(20), *simple_rows(3), {"prompt": "A?", "chosen": " same.", "rejected": " same."}]
    # Scored in another unit than the pair that it is.
    swapped = simple_rows(6)[5]
    rows.append({**swapped, "chosen": swapped["rejected"], "rejected": swapped["chosen"]})
    config = make_run(rows=rows)
    refshard("precompute", "--config", config)
    (entry,) = json.loads(refshard("inspect", tmp_path / "shards", "--json").stdout)

    stored = pq.read_table(sorted((tmp_path / "shards" / "train").glob("part-*.parquet"))).to_pylist()
    assert entry["pairs"] == len(stored) == 25
    assert entry["duplicates"] == 3
    assert entry["totals"]["rows"] == 25
    assert entry["totals"]["noted"]["identical"] == 1
    margins = np.array([row["ref_chosen_logps"] - row["ref_rejected_logps"] for row in stored])
    assert entry["reference_margin"]["mean"] == pytest.approx(margins.mean(), abs=1e-4)
    share = ((margins > 0).sum() + 0.5 * (margins == 0).sum()) / 25
    assert entry["reference_margin"]["share_chosen_preferred"] == pytest.approx(share)
    means = [[np.mean(row[f"{side}_token_logps"]) for side in ("chosen", "rejected")] for row in stored]
    per_token = np.array([chosen - rejected for chosen, rejected in means])
    assert entry["reference_margin_per_token"]["p50"] == pytest.approx(np.median(per_token), abs=1e-5)
    longer = np.array([len(row["chosen_token_logps"]) - len(row["rejected_token_logps"]) for row in stored])
    assert entry["length_bias"]["correlation"] == pytest.approx(np.corrcoef(margins, longer)[0, 1], abs=1e-5)
    assert entry["length_bias"]["longer"]["rejected"]["pairs"] == (longer < 0).sum()
    assert entry["tokens"]["prompt"]["total"] == sum(row["prompt_tokens"] for row in stored)
    assert entry["tokens"]["chosen"]["p50"] == np.median([row["chosen_tokens"] for row in stored])

    suspicious = entry["suspicious"]
    assert suspicious["duplicates"]["examples"] == [{"row": i, "again_in_row": 20 + i} for i in range(3)]
    assert suspicious["same_on_both_sides"] == {"count": 1, "rows": [23]}
    assert [[pair["row"] for pair in both] for both in suspicious["likely_swapped"]["examples"]] == [[5, 24]]
    both = {i for i in range(25) if margins[i] < -1e-6 and per_token[i] < -1e-6}
    assert {pair["row"] for pair in suspicious["likely_mislabelled"]} == both
    text = refshard("inspect", tmp_path / "shards" / "train").stdout
    for part in (
        entry["fingerprint"],
        f"{tmp_path / 'pairs.jsonl'} (train)",
        "25 pairs kept",
        "3 are duplicates",
        "margin",
        "row 20 equals row 0, row 21 equals row 1, row 22 equals row 2",
        "The same completion on both sides, as scored (equal lengths and sums): 1; row 23",
        "Likely swapped: 1.",
        "refshard explain --config F --row ",
    ):
        assert part in text


def test_an_unfinished_store_is_shown_as_far_as_it_goes(make_run: Callable[..., Path], tmp_path: Path) -> None:
    config = make_run()
    refshard("precompute", "--config", config, "--worker", "0/2")
    done = refshard("inspect", tmp_path / "shards", "--html", tmp_path / "page.html", check=75)
    assert "unfinished, 2 parts so far" in done.stderr
    assert "16 rows, 16 pairs kept" in done.stdout
    assert "unfinished, 2 parts so far" in (tmp_path / "page.html").read_text(encoding="utf-8")
    (entry,) = json.loads(refshard("inspect", tmp_path / "shards", "--json", check=75).stdout)
    assert (entry["finished"], entry["pairs"], entry["parts"]) == (False, 16, 2)
    refshard("inspect", tmp_path / "nowhere", check=65)
    refshard("inspect", tmp_path, check=65)


def test_a_damaged_part_of_an_unfinished_store_is_named(tmp_path: Path) -> None:
    store = make_store(tmp_path / "train", [made_pairs(4), made_pairs(4, start=4, seed=1)], finish=False)
    part = store / "part-00001.parquet"
    content = bytearray(part.read_bytes())
    # In a page: without an index, nothing covers the copy of the schema in the footer, which no reader uses.
    content[100] ^= 0x40
    part.write_bytes(content)
    assert str(part) in refshard("inspect", store, check=65).stderr


def test_suspicious_pairs_are_shown_with_their_rows(tmp_path: Path) -> None:
    pairs = made_pairs(200)
    hard = np.full(5, -20.0, np.float32)
    pairs[17] = dataclasses.replace(pairs[17], chosen_token_logps=hard, rejected_token_logps=hard / 100)
    noise = np.float32(0.004)
    swapped = dataclasses.replace(
        pairs[150],
        prompt_tokens=pairs[40].prompt_tokens,
        chosen_token_logps=pairs[40].rejected_token_logps - noise,
        rejected_token_logps=pairs[40].chosen_token_logps + noise,
    )
    pairs[150] = swapped
    store = make_store(tmp_path / "held out", [pairs[:100], pairs[100:]], noise=0.01)
    text = refshard("inspect", store).stdout
    lines = [line.split() for line in text.splitlines()]
    worst = next(i for i, line in enumerate(lines) if line[:2] == ["row", "margin"]) + 1
    assert lines[worst][:3] == ["17", "-19.800", "-99.000"]
    assert lines[worst][4:] == ["5", "-100.000", "5", "-1.000"]
    assert "Likely swapped: 1. An earlier pair has the same three lengths, and the same sums within 0.01 nats" in text
    assert [line[0] for line in lines[-4:-2]] == ["40", "150"]
    assert "refshard explain --config F --set 'held out' --row N" in text
    # With a noise that is smaller the two are not the same.
    quieter = make_store(tmp_path / "quiet", [pairs[:100], pairs[100:]], noise=0.001)
    assert "Likely swapped" not in refshard("inspect", quieter).stdout


def test_bars_count_the_margins_in_plain_characters(tmp_path: Path) -> None:
    text = refshard("inspect", make_store(tmp_path / "train", [made_pairs(300)])).stdout
    assert "#" * 40 in text
    assert text.isascii()
    margins = np.array([p.chosen_token_logps.sum() - p.rejected_token_logps.sum() for p in made_pairs(300)])
    bins = re.findall(r"^ +(-?[\d,.]+) to +(-?[\d,.]+) +([\d,]+)  #+$", text, re.MULTILINE)
    assert len(bins) >= 8
    for low, high, count in bins:
        inside = (margins >= float(low.replace(",", ""))) & (margins < float(high.replace(",", "")))
        assert int(count) == inside.sum()


def test_the_text_needs_neither_torch_nor_plotly(tmp_path: Path) -> None:
    store = make_store(tmp_path / "train", [made_pairs(20)])
    (tmp_path / "blocked").mkdir()
    for name in ("torch", "transformers", "datasets", "plotly", "jinja2"):
        (tmp_path / "blocked" / f"{name}.py").write_text(f"raise ImportError('{name} is not installed')\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "blocked")}
    command = [sys.executable, "-m", "stages.cli", "inspect", str(store)]
    plain = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert plain.stderr == ""
    assert "20 pairs kept" in plain.stdout


def test_a_page_without_plotly_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(ConfigError, match=re.escape("pip install 'refshard[report]'")):
        inspect.run(str(tmp_path / "nowhere"), as_json=False, page=tmp_path / "page.html")


def test_the_page_has_the_pictures_in_itself_and_escapes_what_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(made_store.DECLARED, "dataset", "<script>alert(1)</script>")
    for name, seed in (("train", 0), ("test", 1)):
        make_store(tmp_path / "out" / name, [made_pairs(60, seed=seed), made_pairs(60, seed=seed + 7, start=60)])
    page = tmp_path / "new" / "page.html"
    done = refshard("inspect", tmp_path / "out", "--html", page, "--json")
    assert [entry["pairs"] for entry in json.loads(done.stdout)] == [120, 120]
    text = page.read_text(encoding="utf-8")
    assert "<script>alert(1)" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "default-src 'none'" in text
    assert not re.search(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=", text)
    figures = re.findall(r'<figure role="img" aria-label="([^"]+)"', text)
    # Two histograms of margins, lengths, margins by length, two lines over the parts: of either store.
    assert len(figures) == 12
    for title in ("train: Margins of the reference", "test: Parts", "test: Suspicious pairs"):
        assert f">{title}</h2>" in text
    worst = json.loads(done.stdout)[0]["suspicious"]["likely_mislabelled"][0]
    assert f'<td class="number">{worst["row"]}</td>' in text
    assert "--set test --row N" in text


@pytest.mark.nightly
def test_a_million_pairs_take_seconds(tmp_path: Path) -> None:
    """Measured on two cores of 2.5 GHz: see the time printed with -s."""
    store = make_large_store(tmp_path / "train", 1_000_000)
    start = time.monotonic()
    done = refshard("inspect", store, "--html", tmp_path / "page.html")
    seconds = time.monotonic() - start
    print(f"1,000,000 pairs, {sum(f.stat().st_size for f in store.iterdir()) / 2**20:,.0f} MiB: {seconds:.1f} s")
    assert "1,000,000 pairs kept" in done.stdout
    assert (tmp_path / "page.html").stat().st_size < 8 * 2**20
    assert seconds < 60
