"""Benchmark refshard against TRL.

python tests/bench/run.py                       all workloads of this machine's processor, three rounds
python tests/bench/run.py --only score-hh,train-hh --rounds 2      some of them
python tests/bench/run.py --list                their names
python tests/bench/run.py --json FILE           also put the results into a file, for page.py; others in it stay
"""

import argparse
import sys
from collections.abc import Callable, Container
from dataclasses import replace
from pathlib import Path
from typing import Any

from report import describe, shape_table, tables
from rounds import machine, merge, run_workload
from workloads import CURVES, TOY, WORKLOADS


def main() -> None:
    known = {workload.name: [workload] for workload in (*WORKLOADS, *TOY)} | CURVES
    parser = argparse.ArgumentParser(description="Benchmark refshard against TRL.")
    parser.add_argument(
        "--only", action="extend", type=_names(known), metavar="NAMES", help="workloads, comma-separated"
    )
    parser.add_argument("--rounds", type=int, default=3, help="interleaved runs of every side (default 3)")
    parser.add_argument("--pairs", type=int, help="pairs of a measurement, in place of the workload's own")
    parser.add_argument("--peer-batch", type=int, help="pairs of a batch in TRL's precomputation")
    parser.add_argument("--json", type=Path, help="file to put the results into, beside those of other workloads")
    parser.add_argument("--list", action="store_true", help="name the workloads and stop")
    chosen = parser.parse_args()
    if chosen.list:
        print(*known, sep="\n")
        return
    here, names = machine(), [*(workload.name for workload in WORKLOADS), *CURVES]
    print(describe(here), flush=True)
    for name in chosen.only or names:
        for workload in known[name]:
            if chosen.pairs:
                workload = replace(workload, pairs=chosen.pairs, cpu_pairs=min(workload.cpu_pairs, 1) * chosen.pairs)
            if chosen.peer_batch:
                workload = replace(workload, peer_batch=chosen.peer_batch)
            # A curve has many points, of which each is the median's neighbour: one round.
            result = run_workload(workload, 1 if name in CURVES else chosen.rounds, say=_say) | {"machine": here}
            print("\n".join([*tables([result]), *shape_table([result])]), flush=True)
            if chosen.json:
                # At once: a run that is stopped keeps what it has.
                merge(chosen.json, result)


def _names(known: Container[str]) -> Callable[[str], list[str]]:
    def read(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",")]
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"no workload is called {', '.join(unknown)}; --list names them")
        return names

    return read


def _say(text: Any) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
