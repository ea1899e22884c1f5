"""Benchmark refshard against TRL on this machine's processor.

python tests/bench/run.py                       all workloads, three rounds
python tests/bench/run.py --only score-32k      one of them; may be given again
python tests/bench/run.py --list                their names
python tests/bench/run.py --json FILE           also keep the results, for page.py
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from report import describe, lines
from rounds import machine, merge, run_workload
from workloads import TOY, WORKLOADS, batch_curve, count_curve, share_curve

CURVES = {
    "curve-pairs": count_curve(WORKLOADS[0]),
    "curve-share": share_curve(WORKLOADS[0]),
    "curve-batch": batch_curve(WORKLOADS[0]),
}


def main() -> None:
    known = {workload.name: [workload] for workload in WORKLOADS}
    known |= CURVES
    parser = argparse.ArgumentParser(description="Benchmark refshard against TRL on this machine's processor.")
    parser.add_argument("--only", action="append", choices=[*known, *(w.name for w in TOY)], help="a workload's name")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved pairs of runs (default 3)")
    parser.add_argument("--pairs", type=int, help="pairs of a measurement, in place of the workload's own")
    parser.add_argument("--peer-batch", type=int, help="pairs of a batch in TRL's precomputation")
    parser.add_argument("--json", type=Path, help="file to put the results into, beside those of other workloads")
    parser.add_argument("--list", action="store_true", help="name the workloads and stop")
    chosen = parser.parse_args()
    if chosen.list:
        print(*known, sep="\n")
        return
    known |= {workload.name: [workload] for workload in TOY}
    print(describe(machine()), flush=True)
    for name in chosen.only or [name for name in known if not name.startswith("toy-")]:
        for workload in known[name]:
            if chosen.pairs:
                workload = replace(workload, pairs=chosen.pairs, cpu_pairs=chosen.pairs)
            if chosen.peer_batch:
                workload = replace(workload, peer_batch=chosen.peer_batch)
            # A curve has many points, of which each is the median's neighbour: fewer rounds, and wall clock alone.
            rounds = 1 if name in CURVES else chosen.rounds
            if name in CURVES:
                workload = replace(workload, cpu_pairs=0)
            result = run_workload(workload, rounds, say=_say)
            print("\n".join(lines(result)), flush=True)
            if chosen.json:
                # At once: a run that is stopped keeps what it has.
                merge(chosen.json, [result])


def _say(text: Any) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
