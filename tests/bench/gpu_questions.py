"""Questions about one device that are no comparison: compilations, kernels, heads; gpu.py starts each.

python tests/bench/gpu_questions.py QUESTION WORKLOAD     with WORKLOAD as JSON; the last line is the answer as JSON
"""

import contextlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from model import DTYPES, build_model
from workloads import PAD_ID, Ids, Workload, from_json, make_pairs

from pipeline.data.tokens import TokenizedPair
from pipeline.scoring.forward import score
from pipeline.scoring.head import Head, token_logps
from pipeline.scoring.packing import pack_pairs
from pipeline.scoring.scorer import Scorer
from support.flex_attention import compilations, flex_on_any_device, forget_compilations

BATCHES = 200
TOP = 10


def main() -> None:
    question, workload = sys.argv[1], from_json(json.loads(sys.argv[2]))
    asked: dict[str, Callable[[Workload], dict[str, Any]]] = {
        "compilations": count_compilations,
        "kernels-score": kernels_of_scoring,
        "kernels-step": kernels_of_a_step,
        "liger": compare_heads,
    }
    print(json.dumps(asked[question](workload)))


def count_compilations(workload: Workload) -> dict[str, Any]:
    """Score batches of different lengths with a model of two layers; its heads are those of the workload."""
    # The number of layers and the vocabulary change no kernel of attention.
    shape = replace(workload.shape, layers=2, vocabulary=min(workload.shape.vocabulary, 4096))
    small = replace(workload, shape=shape)
    on_cpu = workload.device == "cpu"
    with flex_on_any_device() if on_cpu else contextlib.nullcontext():
        # Without its self-check, which a processor's attention passes and whose short rows compile, too.
        scorer = _scorer(small)
        pairs = _pairs(make_pairs(small, 12 if on_cpu else 8 * BATCHES))
        forget_compilations()
        size, started, seen = 3 if on_cpu else 8, time.perf_counter(), []
        for start in range(0, len(pairs), size):
            # Another number of pairs each time, so that rows of many lengths come up.
            some = pairs[start : start + 1 + (start // size) % size]
            scorer.tokens_per_batch = 1 << 20
            for _ in scorer.logps(some):
                pass
            seen.append(compilations())
    last = max(i for i, count in enumerate(seen) if count == seen[-1] and (i == 0 or seen[i - 1] < count))
    return {
        "question": f"How many compilations do {len(seen)} batches of different lengths make?",
        "lines": [
            f"{seen[-1]} after the self-check, the last in batch {last + 1}; "
            f"{time.perf_counter() - started:.1f} s for all batches"
        ],
    }


def kernels_of_scoring(workload: Workload) -> dict[str, Any]:
    scorer = _scorer(workload)
    pairs = _pairs(make_pairs(workload, workload.pairs))
    scorer.tokens_per_batch = workload.tokens_per_batch
    batch = pairs[: max(1, workload.tokens_per_batch // (len(pairs[0].prompt_ids) + 500))]
    return _kernels("stage one", workload, lambda: list(scorer.logps(batch)))


def kernels_of_a_step(workload: Workload) -> dict[str, Any]:
    """Profile forward and backward of one micro-batch, with an adapter if the workload has one."""
    scorer = _scorer(workload)
    model = scorer.model
    if workload.lora:
        from outcome import add_adapter

        model = add_adapter(model)
    if workload.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    batch = pack_pairs(_pairs(make_pairs(workload, workload.batch))).to(torch.device(workload.device))

    def step() -> None:
        chosen, rejected = score(model, batch).sums()
        torch.nn.functional.softplus(0.1 * (rejected - chosen)).mean().backward()

    return _kernels("a step of stage two, without its optimizer", workload, step)


def _kernels(what: str, workload: Workload, work: Callable[[], Any]) -> dict[str, Any]:
    """List the kernels that take most of the time, with their shares."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = workload.device == "cuda"
    work()
    if on_gpu:
        torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
        work()
        if on_gpu:
            torch.cuda.synchronize()

    def own(event: Any) -> float:
        return float(event.self_device_time_total if on_gpu else event.self_cpu_time_total)

    events = sorted(profiler.key_averages(), key=own, reverse=True)
    total = sum(own(event) for event in events) or 1.0
    lines = [f"{own(e) / total:5.1%}  {own(e) / 1e3:9.2f} ms  {e.count:6d}x  {e.key[:110]}" for e in events[:TOP]]
    return {"question": f"Where does the time of {what} go ({workload.name})?", "lines": lines}


def compare_heads(workload: Workload) -> dict[str, Any]:
    """Time the forward pass of our head and of Liger's over one row's completion positions."""
    shape, device = workload.shape, workload.device
    dtype = DTYPES[workload.dtype]
    rows = workload.tokens_per_batch * 3 // 4
    hidden = torch.randn(rows, shape.hidden, device=device, dtype=dtype)
    weight = torch.randn(shape.vocabulary, shape.hidden, device=device, dtype=dtype) * shape.hidden**-0.5
    targets = torch.randint(0, shape.vocabulary, (rows,), device=device)
    sides: dict[str, Callable[[], Any]] = {"refshard": lambda: token_logps(hidden, targets, Head(weight, None))}
    lines = []
    if device == "cuda":
        try:
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

            loss = LigerFusedLinearCrossEntropyLoss(reduction="none")
            sides["Liger"] = lambda: loss(weight, hidden, targets)
        except ImportError as error:
            lines.append(f"Liger: {error}")
    else:
        lines.append("Liger: its kernels need a GPU")
    for name, work in sides.items():
        with torch.no_grad():
            work()
            _wait(device)
            started = time.perf_counter()
            for _ in range(3):
                work()
            _wait(device)
        lines.insert(0, f"{name}: {(time.perf_counter() - started) / 3 * 1e3:.1f} ms for {rows:,} positions")
    return {"question": "Does Liger's head pay (forward)?", "lines": lines}


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _scorer(workload: Workload) -> Scorer:
    model = build_model(workload).eval()
    tokenizer: Any = SimpleNamespace(pad_token_id=PAD_ID, eos_token_id=2)
    return Scorer.check(model, tokenizer, "reference.model", workload.lengths.max_length)


def _pairs(drawn: list[Ids]) -> list[TokenizedPair]:
    return [TokenizedPair(prompt_ids=p, chosen_ids=c, rejected_ids=r) for p, c, r in drawn]


if __name__ == "__main__":
    main()
