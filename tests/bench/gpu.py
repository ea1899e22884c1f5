"""Measure on one CUDA GPU what must be known of it, in order of value, and stop in time.

python tests/bench/gpu.py --minutes 6 --json FILE      FILE holds all that is finished, after every item
python tests/bench/gpu.py --minutes 6 --json FILE --tiny     the same code at toy size, on a processor

Each item is a process of its own, which gets up to half of the time that is left. TRL is measured beside refshard where
it can be imported. Stage two needs pyarrow, datasets and fastjsonschema; LoRA needs peft. A folder of packages that are
unpacked by `pip install --target` must be called site-packages: datasets hashes its inputs with dill, which looks for
that name. tests/bench/page.py puts FILE on docs/benchmarks.md if it is tests/bench/results/gpu.json.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rounds import ROOT, machine, measure
from workloads import GPU_LORA, GPU_SCORE, GPU_SHAPES, TINY_SHAPE, TOY_LENGTHS, Workload, full_step, to_json

ROWS = (8_192, 16_384, 65_536)
"""Tokens of a forward pass, beside the workload's own"""


@dataclass
class Findings:
    """All that was measured, in a file that is whole after every item."""

    file: Path
    machine: dict[str, Any]
    results: list[dict[str, Any]] = field(default_factory=list)
    """As those of the processor: a workload, and the measurements of each side"""
    lines: list[dict[str, Any]] = field(default_factory=list)
    """A question and what was found, as lines of text"""
    left_out: dict[str, str] = field(default_factory=dict)
    """Items without a result, and why"""

    def write(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        made = {"machine": self.machine, "results": self.results, "findings": self.lines, "left_out": self.left_out}
        self.file.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure refshard on one CUDA GPU, in order of value.")
    parser.add_argument("--minutes", type=float, default=6, help="stop after so many (default 6)")
    parser.add_argument("--json", type=Path, required=True, help="file for what was found")
    parser.add_argument("--tiny", action="store_true", help="toy size, on a processor")
    chosen = parser.parse_args()
    end = time.monotonic() + 60 * chosen.minutes
    findings = Findings(chosen.json, machine())
    if not chosen.tiny:
        findings.machine |= _gpu()
    for name, item in _items(chosen.tiny, findings):
        left = end - time.monotonic()
        started = time.monotonic()
        if left < 15:
            findings.left_out[name] = "no time was left"
        else:
            # One item that hangs must leave time for others.
            allowed = max(left / 2, min(left, 60))
            try:
                item(allowed)
            except subprocess.TimeoutExpired:
                findings.left_out[name] = f"not finished in {allowed:.0f} s"
            except RuntimeError as error:
                findings.left_out[name] = str(error)[-2000:]
        findings.write()
        said = findings.left_out.get(name, "done")
        print(f"{name}, {time.monotonic() - started:.0f} s: {said.splitlines()[-1]}", flush=True)
    for found in findings.lines:
        print(f"\n{found['question']}", *found["lines"], sep="\n")
    print(json.dumps({"left out": findings.left_out}, indent=1), flush=True)


def _gpu() -> dict[str, Any]:
    """Name card and driver without holding memory of the card in this process."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    first = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    name, memory, driver = (part.strip() for part in first.split(","))
    return {"gpu": name, "gpu_memory_gib": round(int(memory) / 1024), "driver": driver}


def _items(tiny: bool, findings: Findings) -> Iterator[tuple[str, Callable[[float], None]]]:
    """Yield each item's name, and what measures it within so many seconds; the most valuable first."""
    score, lora = (_tiny(w) if tiny else w for w in (GPU_SCORE, GPU_LORA))
    memory = findings.machine.get("gpu_memory_gib", 0) * 2**30
    # Weights, gradients and a reference in bf16 leave a third of the memory free.
    fitting = (size for size, shape in GPU_SHAPES.items() if 3 * 2 * shape.parameters < memory * 2 / 3)
    full = full_step(next(fitting, "1b"))
    full = _tiny(full) if tiny else full

    yield "compilations", lambda left: _ask(findings, "compilations", score, left)
    yield from _compared(score, findings)
    yield from _compared(lora, findings)
    yield "kernels of stage one", lambda left: _ask(findings, "kernels-score", score, left)
    yield "kernels of a step", lambda left: _ask(findings, "kernels-step", lora, left)
    yield from _compared(full, findings)
    for tokens in ROWS:
        row = replace(score, name=f"{score.name}-{tokens // 1024}k", tokens_per_batch=tokens, peers=())
        yield from _compared(row, findings)
    yield "head beside Liger's", lambda left: _ask(findings, "liger", score, left)


def _tiny(workload: Workload) -> Workload:
    small = replace(workload, name=f"tiny-{workload.name}", shape=TINY_SHAPE, lengths=TOY_LENGTHS, device="cpu")
    return replace(small, pairs=12, tokens_per_batch=512)


def _compared(workload: Workload, findings: Findings) -> Iterator[tuple[str, Callable[[float], None]]]:
    """Yield the sides of a workload, ours first; a side that is finished stands beside ours in the results."""
    result: dict[str, Any] = {"workload": to_json(replace(workload, peers=())), "machine": findings.machine}

    def take(side: str, left: float) -> None:
        if side != "ours" and find_spec("trl") is None:
            raise RuntimeError("TRL can't be imported here")
        measured = measure(workload, side, workload.pairs, _threads(), timeout=left)
        if side == "ours":
            result["measured"] = {"wall": {}}
            findings.results.append(result)
        elif "measured" not in result:
            raise RuntimeError("refshard's own side was not finished")
        else:
            result["workload"]["peers"].append(side)
        result["measured"]["wall"][side] = [measured]

    result["workload"]["peers"] = []
    for side in ("ours", *workload.peers):
        yield f"{workload.name}, {side}", lambda left, side=side: take(side, left)


def _threads() -> int:
    return len(os.sched_getaffinity(0))


def _ask(findings: Findings, question: str, workload: Workload, left: float) -> None:
    """Answer a question in a process of its own.

    Raises:
        RuntimeError: It failed; the message is the end of what it said.
    """
    command = [sys.executable, str(Path(__file__).with_name("gpu_questions.py")), question]
    done = subprocess.run(
        [*command, json.dumps(to_json(workload))],
        capture_output=True,
        text=True,
        check=False,
        timeout=left,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
        },
    )
    if done.returncode != 0:
        raise RuntimeError(done.stderr[-2000:])
    findings.lines.append(json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    main()
