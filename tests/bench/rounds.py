"""Interleaved rounds of measurements, each in a process of its own, and what machine they ran on."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from workloads import Workload, to_json

ROOT = Path(__file__).parents[2]

VERSIONS = ("torch", "transformers", "trl", "peft")

Measured = dict[str, Any]
"""What one measurement printed"""


def threads() -> int:
    """At most two, as the page has it; on a machine with one core there is one."""
    return min(2, len(os.sched_getaffinity(0)))


def run_workload(workload: Workload, rounds: int, *, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure ours and its peers in turn, first with the clock on all threads, then with processor time on one.

    Returns:
        The workload, and for each mode the measurements of each side, round by round; a GPU has one mode.
    """
    modes = {"wall": (workload.pairs, threads())}
    if workload.device == "cpu" and workload.cpu_pairs:
        modes["cpu"] = (workload.cpu_pairs, 1)
    measured: dict[str, dict[str, list[Measured]]] = {}
    for mode, (count, cores) in modes.items():
        sides: dict[str, list[Measured]] = {side: [] for side in ("ours", *workload.peers)}
        for i in range(rounds):
            for side, done in sides.items():
                done.append(measure(workload, side, count, cores))
                say(f"{workload.name}, {mode}, round {i + 1}, {side}: {done[-1]['wall']:.2f} s")
        measured[mode] = sides
        if workload.dtype == "float32":
            _require_agreement(workload, sides)
    return {"workload": to_json(workload), "measured": measured}


AGREEMENT = 1e-4
"""Largest relative difference of a value in float32: a sum of log-probs, a loss, a gradient norm"""


def _require_agreement(workload: Workload, sides: dict[str, list[Measured]]) -> None:
    """Require the values of all sides to be equal; a live reference gives other losses, and is left out.

    Raises:
        RuntimeError: A side computes something else, so its time says nothing.
    """
    for side in sides.keys() - {"ours", "trl-live"}:
        for ours, theirs in zip(sides["ours"], sides[side], strict=True):
            for a, b in zip(ours["values"], theirs["values"], strict=True):
                if not abs(a - b) <= AGREEMENT * max(1.0, abs(a)):
                    raise RuntimeError(f"{workload.name}: refshard computed {a}, {side} {b}")


def measure(workload: Workload, side: str, count: int, cores: int, *, timeout: float | None = None) -> Measured:
    """Start one measurement and wait for it.

    Raises:
        RuntimeError: It failed; the message is what it said.
        subprocess.TimeoutExpired: It took longer than `timeout` seconds, and was ended.
    """
    script = str(Path(__file__).with_name("measure.py"))
    done = subprocess.run(
        [sys.executable, script, side, str(count), str(cores), json.dumps(to_json(workload))],
        capture_output=True,
        text=True,
        check=False,
        # Memory is measured as a user's process takes it: no setting of the allocator on either side.
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        timeout=timeout,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{workload.name}, {side}: the measurement failed\n{done.stderr[-3000:]}")
    result: Measured = json.loads(done.stdout.splitlines()[-1])
    return result


def machine() -> dict[str, Any]:
    """Name hardware and versions."""
    installed = {package.name for package in importlib.metadata.distributions()}
    versions = {name: importlib.metadata.version(name) for name in VERSIONS if name in installed}
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "threads": threads(),
        "python": platform.python_version(),
        **versions,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines: Sequence[str] = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def merge(file: Path, result: dict[str, Any]) -> None:
    """Put a result into a file, in place of the one of the same name; others stay."""
    known: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["results"] if file.exists() else []
    by_name = {one["workload"]["name"]: one for one in [*known, result]}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"results": list(by_name.values())}, indent=1) + "\n", encoding="utf-8")
