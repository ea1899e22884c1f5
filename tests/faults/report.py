"""Run every fault in its long version and write docs/reliability.md: what was tried, what came of it, how to repeat it.

python tests/faults/report.py                 runs it all, most of an hour on two cores
python tests/faults/report.py --only NAME     one file of tests again, like faults/test_kills; the rest as it was
python tests/faults/report.py --page          writes the page again from the results of the last run
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

from faults.mutate import take_away
from support.processes import ROOT
from support.tally import VARIABLE

RESULTS = Path(__file__).parent / "results.json"
PAGE = ROOT / "docs" / "reliability.md"

FILES = {
    "Killed": ("faults/test_kills", "faults/test_preemption", "faults/test_crashes"),
    "Disks, networks, workers": ("faults/test_store_faults", "faults/test_stage_one_faults", "scoring/test_memory"),
    "Ends": ("faults/test_ends", "training/test_finite", "training/test_hub", "stages/test_sweep"),
    "Checkpoints": ("run/test_checkpoints",),
    "Stale": (
        *("laws/test_stale", "faults/test_random_changes", "stages/test_canary", "training/test_joining"),
        *("training/test_joined_cache", "models/test_identity", "stages/test_import_export", "stages/test_generate"),
    ),
    "Outputs": ("run/test_outputs", "run/test_records", "base/test_digests"),
    "Schedulers": ("stages/test_submit_slurm", "stages/test_submit_kubernetes"),
    "Input": (
        *("faults/test_damage", "faults/test_fuzz", "faults/test_security"),
        *("data/test_tokens", "data/test_sources", "models/test_loading"),
    ),
}
"""Sections of the page, and the tests whose tallies are in them"""


def run_tests(names: Iterable[str]) -> list[dict[str, Any]]:
    """Run files of tests, long versions included; gives what each test tried."""
    files = [f"tests/{name}.py" for name in names]
    with tempfile.TemporaryDirectory() as folder:
        tally = Path(folder) / "tally.jsonl"
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-m", "", "--numprocesses", "2", "--dist", "loadscope", *files],
            cwd=ROOT,
            env={**os.environ, VARIABLE: str(tally)},
            check=True,
        )
        return add_up(tally.read_text(encoding="utf-8").splitlines())


def add_up(lines: Iterable[str]) -> list[dict[str, Any]]:
    """Lines of one fault and one test become one, numbers added."""
    entries: dict[tuple[str, str], dict[str, Any]] = {}
    for line in lines:
        entry = json.loads(line)
        known = entries.setdefault((entry["fault"], entry["test"]), {**entry, "tried": 0, "lost": 0, "wrong": 0})
        for number in ("tried", "lost", "wrong"):
            known[number] += entry[number]
        known["outcome"] = entry["outcome"]
    return sorted(entries.values(), key=lambda entry: (entry["test"], entry["fault"]))


def file_of(entry: dict[str, Any]) -> str:
    """The file of a tally's test, as `FILES` names it."""
    return str(entry["test"]).partition("::")[0].removeprefix("tests/").removesuffix(".py")


def page(results: dict[str, Any]) -> str:
    """The page, from the results of a run."""
    tallies, noticed = results["tallies"], results["mutations"]
    fuzzed = sum(entry["tried"] for entry in tallies if "test_fuzz" in entry["test"])
    total = {number: sum(entry[number] for entry in tallies) for number in ("tried", "lost", "wrong")}
    lines = [
        "# Reliability: injected faults",
        "",
        f"{total['tried'] - fuzzed:,} faults, injected for real, and {fuzzed:,} fuzzed inputs: rows lost "
        f"{total['lost']}, wrong values read {total['wrong']}. Every fault either gave a one-line error with its "
        "exit status, or had no effect. The same command then finished the run as if nothing had happened. Each test "
        "asserts its outcome; the tables list only tests that passed.",
        "",
        f"`python tests/faults/report.py` ran them and wrote this page ({results['machine']}). To run one line, "
        'use `pytest -m "" TEST`. `make test` runs shorter versions of the same tests.',
        "",
    ]
    for section, names in FILES.items():
        entries = [entry for entry in tallies if file_of(entry) in names]
        if not entries:
            continue
        lines += [
            f"## {section}",
            "",
            "| fault | tried | survived | rows lost | wrong values | outcome | test |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {entry['fault']} | {entry['tried']:,} | {entry['tried']:,} | {entry['lost']} | {entry['wrong']} "
            f"| {entry['outcome']} | `{entry['test']}` |"
            for entry in entries
        ]
        lines.append("")
    lines += [
        "## The tests themselves",
        "",
        "A test that can't fail proves nothing. `python tests/faults/mutate.py` removes each of these safeguards in a "
        f"copy of the sources, and runs the tests that should notice: {sum(noticed.values())} of {len(noticed)} do.",
        "",
        "| safeguard removed | noticed |",
        "|---|---|",
        *(f"| {name} | {'yes' if seen else '**no**'} |" for name, seen in noticed.items()),
        "",
        "## Not tried",
        "",
        "A real power cut (only simulated: every disk that one could leave), network file systems, S3 other than "
        "moto's server, a Kubernetes cluster, machines other than this one, GPUs.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Run every fault in its long version and write the page of results.")
    parser.add_argument("--page", action="store_true", help="write the page from the last run's results alone")
    parser.add_argument("--only", help="run one file of tests again, and put its results in the place of the old ones")
    parser.add_argument("--mutations", action="store_true", help="take the safeguards away again, and nothing else")
    chosen = parser.parse_args()
    if chosen.only:
        results = json.loads(RESULTS.read_text(encoding="utf-8"))
        others = [entry for entry in results["tallies"] if f"/{chosen.only}.py" not in entry["test"]]
        results["tallies"] = sorted([*others, *run_tests([chosen.only])], key=lambda entry: entry["test"])
        _keep(results)
    elif chosen.mutations:
        _keep({**json.loads(RESULTS.read_text(encoding="utf-8")), "mutations": take_away()})
    elif not chosen.page:
        tallies = run_tests(name for names in FILES.values() for name in names)
        versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "pyarrow", "s3fs", "moto"))
        machine = f"{os.cpu_count()} CPU cores, {platform.system()}, Python {platform.python_version()}, {versions}"
        results = {"machine": machine, "tallies": tallies, "mutations": {}}
        _keep(results)
        _keep({**results, "mutations": take_away()})
    PAGE.write_text(page(json.loads(RESULTS.read_text(encoding="utf-8"))), encoding="utf-8")


def _keep(results: dict[str, Any]) -> None:
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
