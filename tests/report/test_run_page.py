"""The page of runs: what its charts and tables hold, against the library's own log, the shards, and sums by hand."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.base.statistics import histogram
from pipeline.report.charts import histogram_chart, running_mean, thin
from pipeline.report.comparison import differing_settings, show_runs
from pipeline.report.run_page import report_page
from pipeline.run.reading import read_run
from pipeline.run.records import write_margins
from stages.sweep import command
from support.browser import CHROMIUM, Browser
from support.runs import refshard, simple_rows, write_config, write_jsonl, write_log, write_settings

REPLY = {"text": "a reply", "num_tokens": 3, "ref_logps": -9.0, "policy_logps": -8.0, "reward": None}


def figures(page: str) -> dict[str, tuple[list[dict[str, Any]], dict[str, Any]]]:
    """The charts of a page, by title: traces and layout, as the page hands them to Plotly."""
    decoder = json.JSONDecoder()
    found = {}
    for part in page.split('<figure role="img"')[1:]:
        title = re.search(r"<figcaption>(.*?)</figcaption>", part)
        start = re.search(r'Plotly\.newPlot\(\s*"[^"]+",\s*', part)
        assert title and start
        data, end = decoder.raw_decode(part, start.end())
        layout, _ = decoder.raw_decode(part, part.index("{", end))
        assert title[1] not in found
        found[title[1]] = data, layout
    return found


def rows_of(page: str, section: str) -> list[list[str]]:
    """The rows of all tables in a section, header included, as text."""
    body = page[page.index(f"<h2>{section}</h2>") :].split("</section>")[0]
    return [
        [re.sub("<[^>]+>", "", cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)]
        for row in re.findall(r"<tr>(.*?)</tr>", body)
    ]


def write_generations(folder: Path, pairs: list[tuple[dict[str, Any], dict[str, Any]]], **changes: Any) -> None:
    base = {"set": "test", "step": 4, "temperature": 1.0, "max_tokens": 64, "reward_by": "a judge", **changes}
    lines = [
        {"row": i, "prompt": f"prompt {i}", **base, "reference": {**REPLY, **before}, "policy": {**REPLY, **after}}
        for i, (before, after) in enumerate(pairs)
    ]
    write_jsonl(folder / "generations.jsonl", lines)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """A run, through the real commands."""
    folder = tmp_path_factory.mktemp("trained")
    data = write_jsonl(folder / "pairs.jsonl", simple_rows(24))
    held_out = write_jsonl(folder / "test.jsonl", simple_rows(9, start=100))
    config = write_config(
        folder / "run.yaml",
        data={"path": str(data), "max_length": 128, "eval": {"test": {"path": str(held_out)}}},
        policy={"model": str(model_folder)},
        loss={"beta": 0.5},
        precompute={"output": str(folder / "shards"), "rows_per_shard": 8, "tokens_per_batch": 512},
        train={
            "per_device_train_batch_size": 4,
            "max_steps": 4,
            "learning_rate": "1e-3",
            "logging_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "save_strategy": "no",
            "use_cpu": True,
        },
    )
    output = f"train.output_dir={folder / 'run'}"
    refshard("precompute", "--config", config, "-o", output)
    refshard("train", "--config", config, "-o", output)
    return folder


def test_curves_and_margins_of_a_run_are_those_of_its_training(trained: Path) -> None:
    run = trained / "run"
    told = refshard("report", run)
    assert str(run / "report.html") in told.stdout
    page = (run / "report.html").read_text()
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    charts = figures(page)
    metrics = {
        "Loss": {"training": "loss", "test": "eval_loss"},
        "Reward margin": {"training": "rewards/margins", "test": "eval_rewards/margins"},
        "Rewards: beta times the log-prob shift": {
            "chosen": "rewards/chosen",
            "rejected, test": "eval_rewards/rejected",
        },
        "Entropy of the policy": {"training": "entropy"},
        "Gradient norm": {"training": "grad_norm"},
        "Learning rate": {"training": "learning_rate"},
    }
    for title, named in metrics.items():
        traces = {trace["name"]: trace for trace in charts[title][0]}
        for name, metric in named.items():
            logged = {entry["step"]: entry[metric] for entry in history if metric in entry}
            assert len(logged) == (2 if "test" in name else 4)
            assert traces[name]["x"] == list(logged)
            assert traces[name]["y"] == pytest.approx(list(logged.values()), rel=1e-5)
    # The loss is a sigmoid's: rewards are beta times the shifts, on both sides.
    shifts, rewards = (
        charts[t][0] for t in ("Log-prob shift: policy minus reference", "Rewards: beta times the log-prob shift")
    )
    for shift, reward in zip(shifts, rewards, strict=True):
        assert reward["name"] == shift["name"]
        assert reward["y"] == pytest.approx([0.5 * y for y in shift["y"]], rel=1e-4, abs=1e-5)

    stored = pq.read_table(sorted((trained / "shards" / "test").glob("part-*.parquet"))).to_pylist()
    margins = np.array([row["ref_chosen_logps"] - row["ref_rejected_logps"] for row in stored])
    header, train, held_out = rows_of(page, "Margins before and after")
    told_of = dict(zip(header, held_out, strict=True))
    last = {key: value for entry in history if "eval_loss" in entry for key, value in entry.items()}
    assert (told_of["pairs of"], told_of["after step"], told_of["pairs"]) == ("test", "4", "9")
    assert float(told_of["mean margin before, nats"]) == pytest.approx(margins.mean(), rel=1e-3)
    assert told_of["reference prefers chosen"] == f"{(margins > 0).mean():.1%}"
    assert float(told_of["mean reward margin"]) == pytest.approx(last["eval_rewards/margins"], rel=1e-3)
    assert float(told_of["after, nats"]) == pytest.approx(
        last["eval_logps/chosen"] - last["eval_logps/rejected"], rel=1e-3
    )
    assert train[:3] == ["train", "4", "16"]
    for trace in charts["Margins of held-out pairs: test"][0]:
        assert 7 / 9 - 1e-5 <= sum(trace["y"][:-1]) <= 1 + 1e-5

    data = {row[0]: dict(zip(rows[0], row, strict=True)) for rows in [rows_of(page, "Data")] for row in rows}
    assert [data["train"][key] for key in ("rows", "kept", "dropped", "joined", "missing")] == [
        "24",
        "24",
        "none",
        "24",
        "0",
    ]
    assert data["test"]["chosen tokens"] == str(sum(row["chosen_tokens"] for row in stored))
    manifest = json.loads((trained / "shards" / "test" / "manifest.json").read_text())
    for text in (manifest["fingerprint"], manifest["identity"]["reference"]["weights"], "finished, 4 steps"):
        assert text in page
    assert f"refshard generate {run}" in page


@pytest.fixture
def sweep(trained: Path, tmp_path: Path) -> list[Path]:
    """The run twice, with two betas in its settings, and replies that are made up."""
    runs = []
    for beta, shift, rewards in ((0.1, 2.0, (1.0, 3.0)), (0.5, 4.0, (5.0, 5.0))):
        run = tmp_path / "sweep" / f"beta-{beta}"
        shutil.copytree(trained / "run", run)
        settings = (run / "refshard.yaml").read_text()
        (run / "refshard.yaml").write_text(settings.replace("  beta: 0.5\n", f"  beta: {beta}\n"))
        write_generations(run, [({"reward": r - 2}, {"policy_logps": -9.0 + shift, "reward": r}) for r in rewards])
        runs.append(run)
    return runs


def test_runs_of_a_sweep_are_named_by_the_settings_that_differ(sweep: list[Path]) -> None:
    refshard("report", *sweep, sweep[0])
    page = (sweep[0].parent / "report.html").read_text()
    summary = [dict(zip(rows[0], row, strict=True)) for rows in [rows_of(page, "Summary")] for row in rows[1:]]
    assert [row["run"] for row in summary] == ["beta=0.1", "beta=0.5"]
    assert [row["loss.beta"] for row in summary] == ["0.1", "0.5"]
    assert [row["reward of replies"] for row in summary] == ["2.0 ± 1.0", "5 ± 0"]
    for run, row in zip(sweep, summary, strict=True):
        metrics = json.loads((run / "run.json").read_text())["metrics"]
        assert float(row["test: accuracy"]) == pytest.approx(metrics["eval_rewards/accuracies"], rel=1e-3)
    charts = figures(page)
    traces, layout = charts["Mean reward of replies (a judge) against KL"]
    assert [(t["name"], t["x"], t["y"]) for t in traces] == [
        ("reference", [0], [0]),
        ("beta=0.1", [2], [2]),
        ("beta=0.5", [4], [5]),
    ]
    assert [t["error_y"].get("value") for t in traces] == [1, 1, 0]
    assert layout["xaxis"]["title"]["text"] == "KL(policy ‖ reference), nats per reply"
    before = [trace for trace in charts["Margins of held-out pairs: test"][0] if "reference" in trace["name"]]
    assert len(before) == 1
    assert "loss.beta, which differs" in page
    for title in ("Loss", "Loss (test)"):
        assert [trace["name"] for trace in charts[title][0]] == ["beta=0.1", "beta=0.5"]


def test_a_resumed_run_that_still_trains_is_reported(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_settings(run, loss={"type": ["sigmoid"], "beta": 0.3}, reference={"sync": {"steps": 2}})
    lines: list[dict[str, Any] | str] = [
        {"kind": "start", "step": 0, "max_steps": 9, "device": "cpu"},
        *({"step": s, "loss": 0.7 - s / 100, "seconds": 10.0 * s, "memory_bytes": s * 2**30} for s in (1, 2, 3, 4)),
        {"kind": "start", "attempt": 2, "step": 2, "max_steps": 9, "device": "cuda"},
        {"attempt": 2, "step": 3, "loss": None, "num_tokens": 300.0, "seconds": 4.0},
        {"attempt": 2, "step": 5, "loss": 0.5, "num_tokens": 1500.0, "seconds": 25.5, "memory_bytes": 2**30},
        '{"kind": "log", "attempt": 2, "step": 6, "lo',
    ]
    write_log(run, lines)
    refshard("report", run, "--output", tmp_path / "pages" / "run.html")
    page = (tmp_path / "pages" / "run.html").read_text()
    (trace,), layout = figures(page)["Loss"]
    assert (trace["x"], trace["y"]) == ([1, 2, 3, 5], [0.69, 0.68, None, 0.5])
    # The reference moves after steps 2 and 4; the level is ln 2.
    assert [shape["x0"] for shape in layout["shapes"] if shape["xref"] == "x"] == [2, 4]
    assert [shape["y0"] for shape in layout["shapes"] if shape["xref"] == "paper"] == [
        pytest.approx(0.693147, abs=1e-6)
    ]
    assert "not finished, at step 5 of 9" in page
    assert "log.jsonl: 1 of 9 lines" in page
    assert "1 values are not finite" in page
    header, costs = rows_of(page, "Cost")
    told = dict(zip(header, costs, strict=True))
    assert (told["stage two"], told["steps"], told["steps repeated"]) == ("2 attempts", "5", "2")
    assert (told["tokens"], told["time"], told["peak memory"]) == ("1,500", "0:01:06", "4.00 GiB")
    assert told["device"] == "cpu, cuda"


def test_the_cost_of_stage_one_is_the_sum_over_its_workers(tmp_path: Path) -> None:
    costs = [
        {"set": "train", "worker": "0/2", "seconds": 50.0, "pairs": 700, "tokens": 7000, "memory_bytes": 3 * 2**30},
        {"set": "train", "worker": "1/2", "seconds": 40.0, "pairs": 300, "tokens": 2900, "memory_bytes": 2**30},
        {"set": "train", "worker": "1/2", "seconds": 10.0, "pairs": 100, "tokens": 100, "memory_bytes": None},
        {"set": "test", "worker": "0/2", "seconds": 20.0, "pairs": 10, "tokens": 1000, "memory_bytes": 2**30},
    ]
    sets = {"train": {"ledger": {"rows": 9, "kept": 6, "dropped": {"prompt_too_long": 2, "x": 1}}, "matched": 6}}
    for name in ("a", "b"):
        write_log(tmp_path / name, [{"step": 1, "loss": 1.0}])
        inputs = {"stage_one": costs, "sets": sets, "reference": {"fingerprint": f"of {name}"}}
        (tmp_path / name / "inputs.json").write_text(json.dumps(inputs))
    page = report_page([read_run(tmp_path / "a"), read_run(tmp_path / "b")])
    # Once for both: they are on the same shards.
    found = [row for row in rows_of(page, "Cost") if row[0] in ("train", "test", "all")]
    assert [row[:7] for row in found] == [
        ["train", "2", "1,100", "10,000", "0:01:40", "100", "3.00 GiB"],
        ["test", "1", "10", "1,000", "0:00:20", "50", "1.00 GiB"],
        ["all", "2", "1,110", "11,000", "0:02:00", "91", "3.00 GiB"],
    ]
    assert "2 prompt too long, 1 x" in rows_of(page, "Data")[1]
    assert "the runs have different references" in page
    assert "<h2>Reward against KL</h2>" in page


def test_kl_and_rewards_are_means_over_replies_and_nothing_in_a_reply_is_obeyed(tmp_path: Path) -> None:
    evil = "</pre><script>alert(1)</script>\n<img src=http://x.example/y>\u202e\x1b[31m"
    write_log(tmp_path / "run", [{"step": 4, "loss": 0.5, "rewards/accuracies": 0.75}])
    ratios, rewards = (1.0, 2.0, 6.0), (0.0, 1.0, 5.0)
    replies = [
        ({"text": evil, "reward": -1.0}, {"text": evil, "policy_logps": -9.0 + ratio, "reward": reward})
        for ratio, reward in zip(ratios, rewards, strict=True)
    ]
    write_generations(tmp_path / "run", replies, temperature=0.7, reward_by="</script><script>alert(2)</script>")
    page = report_page([read_run(tmp_path / "run")])
    assert "alert(1)" in page
    assert "<script>alert" not in page
    assert "<img" not in page[page.index("<main>") :]
    assert "\u202e" not in page and "\x1b" not in page
    # By hand: means 3 and 2, variances (n - 1) 7 and 7, over 3.
    error = (7 / 3) ** 0.5
    (reference, policy), _ = figures(page)[
        "Mean reward of replies (&lt;/script&gt;&lt;script&gt;alert(2)&lt;/script&gt;) against KL"
    ]
    assert (reference["x"], reference["y"]) == ([0], [-1])
    assert (policy["x"], policy["y"]) == ([3], [2])
    assert policy["error_x"]["value"] == policy["error_y"]["value"] == pytest.approx(error, rel=1e-5)
    assert "<dt>KL, nats per reply</dt><dd>3.0 ± 1.5</dd>" in page
    assert "Replies of run were drawn at temperature 0.7" in page
    assert rows_of(page, "Replies before and after")[2][-1] == "2.0 ± 1.5"


def test_without_rewards_accuracy_stands_against_kl(tmp_path: Path) -> None:
    runs = []
    for name, accuracy, temperature in (("a", 0.64, 1.0), ("b", 0.8, 1.0)):
        settings = {"data": {"path": "p", "eval": {"test": {}}}, "loss": {"type": "ipo" if name == "a" else "hinge"}}
        write_settings(tmp_path / name, **settings)
        record = {"eval_loss": 1.0, "eval_rewards/accuracies": accuracy}
        write_log(
            tmp_path / name, [{"step": 3, "eval_loss": 9.0, "eval_rewards/accuracies": 0.1}, {"step": 4, **record}]
        )
        (tmp_path / name / "inputs.json").write_text(json.dumps({"sets": {"test": {"matched": 100}}}))
        write_generations(tmp_path / name, [({}, {}), ({}, {})], reward_by=None, temperature=temperature)
        runs.append(read_run(tmp_path / name))
    page = report_page(runs)
    traces, layout = figures(page)["Accuracy on held-out pairs (test) against KL"]
    assert [(t["name"], t["x"], t["y"], t["error_y"]["value"]) for t in traces] == [
        ("type=ipo", [1], [0.64], 0.048),
        ("type=hinge", [1], [0.8], 0.04),
    ]
    assert layout["yaxis"]["title"]["text"] == "accuracy on held-out pairs (test)"
    assert "Not all runs have rewards" in page
    assert "<h2>Accuracy against KL</h2>" in page
    assert rows_of(page, "Replies before and after")[0][-1] == "KL, nats per reply"


def test_a_long_curve_is_thinned_and_keeps_its_extremes() -> None:
    rng = np.random.default_rng(0)
    steps = list(range(100_000))
    values: list[float | None] = rng.normal(size=len(steps)).tolist()
    values[31_415], values[27_182], values[50_000] = 99.0, -99.0, None
    x, y = thin(steps, values)
    assert len(x) <= 2000 and x == sorted(set(x))
    assert (x[0], x[-1]) == (0, 99_999)
    assert all(values[int(step)] == value for step, value in zip(x, y, strict=True))
    assert {99.0, -99.0, None} <= set(y)
    assert thin(steps[:2000], values[:2000]) == (steps[:2000], values[:2000])


def test_the_smoothed_curve_is_the_mean_of_neighbours_on_both_sides() -> None:
    values: list[float | None] = [float(i * i % 17) for i in range(200)]
    values[50] = None
    means, width = running_mean(values)
    assert width == 11
    for i in range(200):
        reach = min(i, 199 - i, 5)
        near = [value for value in values[i - reach : i + reach + 1] if value is not None]
        assert means[i] == (None if i == 50 else pytest.approx(sum(near) / len(near)))


def test_a_histogram_has_round_bins_and_counts_the_values_outside() -> None:
    spread = np.concatenate([np.linspace(0, 1, 9_998), [1e9, np.nan]])
    columns = [("r", spread, "#4269d0", "solid"), ("s", np.full(10, 0.5), "#d97706", "solid")]
    drawn = str(histogram_chart("t", columns, x_title="x", of="pairs"))
    ((first, second), _) = figures(drawn)["t"]
    finite = spread[:-1]
    expected = histogram(np.concatenate([finite, np.full(10, 0.5)]), 50)
    assert first["x"] == second["x"] == pytest.approx(expected.edges.tolist())
    assert first["y"][:-1] == pytest.approx((np.histogram(finite, expected.edges)[0] / len(finite)).tolist(), abs=1e-6)
    assert sum(second["y"][:-1]) == 1
    assert "Outside the chart: 1 of 10,009 values. Not finite: 1 of 10,010 values" in drawn


def test_margins_that_are_not_finite_are_left_out_and_counted(tmp_path: Path) -> None:
    write_log(tmp_path / "run", [{"step": 3, "loss": 1.0}])
    rows = np.array([[1, 2, 3, 0, 0], [-1, 4, 5, 0, 0], [np.nan, np.inf, 1, 0, 0]], dtype=np.float32)
    ids = np.array([[row, 0, 0] for row in range(3)])
    write_margins(tmp_path / "run", "test", 3, ids, rows)
    write_margins(tmp_path / "run", "none", 3, ids[:2], np.full((2, 5), np.nan, dtype=np.float32))
    page = report_page([read_run(tmp_path / "run")])
    _, none, test = rows_of(page, "Margins before and after")
    assert test[2:] == ["3", "50.0%", "100.0%", "0", "3", "3"]
    assert none[2:] == ["2", "", "", "", "", ""]
    assert "none: 2 of 2" in page and "test: 1 of 3" in page


def test_what_was_measured_once_is_a_table_and_no_level_is_written_over_a_curve(tmp_path: Path) -> None:
    runs = []
    for name, loss in (("a", 0.5), ("b", 0.25)):
        write_settings(tmp_path / name, loss={"type": "sigmoid"}, train={"learning_rate": loss})
        training = [{"step": 1, "loss": 0.7}, {"step": 2, "loss": 0.6}]
        write_log(tmp_path / name, [*training, {"step": 2, "eval_loss": loss, "eval_rewards/margins": 19.5}])
        runs.append(read_run(tmp_path / name))
    page = report_page(runs)
    assert rows_of(page, "Held-out pairs: held-out")[1:3] == [
        ["Loss (held-out)", "learning_rate=0.5", "2", "0.5"],
        ["Loss (held-out)", "learning_rate=0.25", "2", "0.25"],
    ]
    charts = figures(page)
    assert list(charts) == ["Loss"]
    assert "annotations" not in charts["Loss"][1]
    assert "ln 2: policy = reference." in page


def test_a_reference_that_moved_is_named_by_its_step_and_pairs_of_no_window_are_not_counted(tmp_path: Path) -> None:
    write_settings(tmp_path / "run", reference={"sync": {"steps": 2}})
    write_log(tmp_path / "run", [{"step": 1, "loss": 1.0}])
    held_out = {"matched": 10, "missing": 0, "store": "policy/references/step-00000004/shards/test"}
    sets = {"test": held_out, "train": {"matched": 0, "missing": 40}}
    reference = {"name": "model", "fingerprint": "f" * 8, "identity": {"weights": "w" * 8}}

    def page_of(sets: dict[str, Any]) -> str:
        inputs = {"reference": reference, "sets": sets}
        (tmp_path / "run" / "inputs.json").write_text(json.dumps(inputs))
        return report_page([read_run(tmp_path / "run")])

    page = page_of(sets)
    joined = {row[0]: row[6:8] for row in rows_of(page, "Data")}
    assert (joined["test"], joined["train"]) == (["10", ""], ["", ""])
    assert "<dt>fingerprint as moved after step 4</dt>" in page
    assert "<dt>reference as moved after step 4, weights</dt>" in page
    first = page_of({"train": {"matched": 4, "store": "shards/train"}})
    assert "<dt>fingerprint</dt>" in first


def test_a_folder_that_is_not_a_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "log.jsonl" in refshard("report", tmp_path / "empty", check=2).stderr
    refshard("report", check=2)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_real_browser_draws_the_page_wide_and_narrow_light_and_dark(sweep: list[Path], tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    text = report_page([read_run(sweep[0])])
    charts = figures(text)
    file.write_text(text)
    with Browser() as browser:
        browser.show(file, width=1250, dark=False)
        drawn = browser.run("document.querySelectorAll('svg.main-svg .scatterlayer .trace').length")
        assert drawn == sum(len(traces) for traces, _ in charts.values())
        # Nothing but the page itself was asked for, and nothing went wrong.
        assert (browser.said, browser.requests) == ([], [file.as_uri()])
        looks = {}
        for width, dark in ((1250, False), (390, True)):
            browser.look(width=width, dark=dark)
            looks[dark] = browser.run(
                "[document.body, document.querySelector('.js-plotly-plot .xtick text')].flatMap((e) =>"
                " [getComputedStyle(e).color, getComputedStyle(e).fill, getComputedStyle(e).backgroundColor])"
            )
            assert browser.run("document.documentElement.scrollWidth") == browser.run("innerWidth") == width
            # Every chart has the width of its place.
            assert browser.run(
                "[...document.querySelectorAll('figure')].every((f) => Math.abs(f.clientWidth -"
                " f.querySelector('svg.main-svg').getBoundingClientRect().width) < 2)"
            )
        assert looks[False][0] != looks[True][0] and looks[False][2] != looks[True][2]
        assert looks[False][4] != looks[True][4]
        browser.run("fetch('http://127.0.0.1:9/').catch(() => 0)")
        assert any("Content Security Policy" in text for text in browser.said)


def test_runs_with_equal_settings_are_named_by_their_folders(tmp_path: Path) -> None:
    betas = {"a": 0.1, "b": 0.1, "c": 0.5}
    for (name, beta), rate in zip(betas.items(), ("3e-4", 0.0003, 3e-4), strict=True):
        write_settings(tmp_path / name, loss={"beta": beta}, train={"learning_rate": rate, "output_dir": name})
    runs = [read_run(tmp_path / name) for name in betas]
    assert differing_settings(runs) == {"loss.beta": ["0.1", "0.1", "0.5"]}
    assert [one.name for one in show_runs(runs)] == ["beta=0.1 (a)", "beta=0.1 (b)", "beta=0.5"]
    assert [one.name for one in show_runs(runs[:2])] == ["a", "b"]
    assert [one.name for one in show_runs(runs[:1])] == ["a"]


def test_rows_of_a_sweep_have_one_header_and_its_page_is_not_that_of_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_log(tmp_path / "a", [{"step": 1, "loss": 0.5}, {"step": 1, "eval_test_loss": 0.25}])
    write_log(tmp_path / "b", [{"step": 1, "loss": 0.75}])
    runs = [read_run(tmp_path / name) for name in ("a", "b")]
    command._compare(runs, tmp_path, drawn=True)
    table = [line.split() for line in capsys.readouterr().out.splitlines()[1:4]]
    assert table == [["run", "steps", "pairs", "of", "loss"], ["a", "1", "test", "0.25"], ["b", "1", "train", "0.75"]]
    assert [file.name for file in tmp_path.glob("*.html")] == ["sweep.html"]


ASKED: dict[str, Any] = {"set": "test", "prompts": 8, "seed": 0, "reward_by": None}


@pytest.mark.parametrize(
    ("changes", "taken"),
    [
        ({}, True),
        ({"temperature": 0.5}, False),
        ({"seed": 1}, False),
        ({"set": "train"}, False),
        ({"prompts": 2}, False),
        ({"prompts": None}, False),
        ({"step": 3}, False),
        ({"max_tokens": 9}, False),
        ({"reward_by": "a judge"}, False),
    ],
)
def test_a_sweep_takes_the_replies_that_it_asks_for_and_no_others(
    tmp_path: Path, changes: dict[str, Any], taken: bool
) -> None:
    """Of a set of two prompts, so that fewer are there than are asked for."""
    write_log(tmp_path, [{"step": 4, "loss": 1.0}])
    write_generations(tmp_path, [({}, {}), ({}, {})], **{**ASKED, **changes})
    (tmp_path / "run.json").write_text('{"step": 4}')
    data = SimpleNamespace(eval={"test": None}, training=("train",))
    one: Any = SimpleNamespace(config=SimpleNamespace(data=data), folder=tmp_path)
    sweep: Any = SimpleNamespace(num_prompts=8, max_tokens=64, reward_model=None)
    commands: Any = SimpleNamespace(run=lambda *words: 7)
    assert command._generate(one, sweep, commands) == (0 if taken else 7)
