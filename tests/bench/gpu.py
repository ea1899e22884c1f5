"""Benchmark refshard against TRL on a CUDA GPU, with an 8-billion-parameter Llama of random weights in bf16.

python tests/bench/gpu.py                   stage one, a LoRA step, a full step; three rounds
python tests/bench/gpu.py --full 1b         the full step on a smaller model, where 8b does not fit
python tests/bench/gpu.py --tiny            everything at toy size on the processor, to test this script
python tests/bench/gpu.py --json FILE       also keep the results, for page.py
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from report import describe, lines
from rounds import machine, merge, run_workload
from workloads import TOY_LENGTHS, TOY_SHAPE, UF, Bars, Shape, Workload

SHAPES = {
    "8b": Shape(128_256, 4096, 32, 14_336, 32, 8, tied=False),
    "3b": Shape(128_256, 3072, 28, 8_192, 24, 8),
    "1b": Shape(128_256, 2048, 16, 8_192, 32, 8),
}

STAGE_ONE = Bars(wall=2, share=0.55)
STAGE_TWO = Bars(wall=1.5)


def workloads(full: str) -> list[Workload]:
    """Stage one, a LoRA step and a full step; the last on a model of the size that is asked for."""
    both = ("trl", "trl-live")
    score = Workload(
        "gpu-score",
        1,
        SHAPES["8b"],
        UF,
        "bfloat16",
        256,
        0,
        STAGE_ONE,
        tokens_per_batch=32_768,
        peer_batch=8,
        device="cuda",
    )
    # The library's default for TRL, and what a model of this size needs in either.
    step = replace(score, stage=2, bars=STAGE_TWO, pairs=24, checkpointing=True, peers=both)
    return [
        score,
        replace(step, name="gpu-lora", lora=True),
        replace(step, name=f"gpu-full-{full}", shape=SHAPES[full]),
    ]


def toy_workloads() -> list[Workload]:
    return [
        replace(w, name=f"tiny-{w.name}", shape=TOY_SHAPE, lengths=TOY_LENGTHS, pairs=12, device="cpu")
        for w in workloads("8b")
    ]


def fitting(memory: int) -> str:
    """The largest model of which weights, gradients and a reference in bf16 leave a third of the memory free."""
    for name, shape in SHAPES.items():
        if 3 * 2 * shape.parameters < memory * 2 / 3:
            return name
    return "1b"


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmark refshard against TRL on a CUDA GPU.")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved pairs of runs (default 3)")
    parser.add_argument("--full", choices=list(SHAPES), help="model of the full step; the largest that fits")
    parser.add_argument("--peer-batch", type=int, help="pairs of a batch in TRL's precomputation")
    parser.add_argument("--json", type=Path, help="file to put the results into")
    parser.add_argument("--tiny", action="store_true", help="toy sizes on the processor")
    chosen = parser.parse_args()
    if not chosen.tiny and not torch.cuda.is_available():
        sys.exit("no CUDA GPU is visible; --tiny runs this script on the processor")
    here = machine()
    if not chosen.tiny:
        card = torch.cuda.get_device_properties(0)
        here |= {"gpu": card.name, "gpu_memory_gib": round(card.total_memory / 2**30)}
        full = chosen.full or fitting(card.total_memory)
    print(describe(here), flush=True)
    for workload in toy_workloads() if chosen.tiny else workloads(full):
        if chosen.peer_batch:
            workload = replace(workload, peer_batch=chosen.peer_batch)
        result = {**run_workload(workload, chosen.rounds, say=_say), "machine": here}
        print("\n".join(lines(result)), flush=True)
        if chosen.json:
            merge(chosen.json, [result])


def _say(text: Any) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
