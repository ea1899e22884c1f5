"""Compare hybrids' gradients in stage two: through the prompts' cached state, and in padded batches.

    OMP_NUM_THREADS=1 python tests/bench/gradients.py [--pairs 8] [--rounds 3]

It prints the largest difference of a log-prob and of a gradient, relative to the largest gradient, and the processor
time of a forward and backward of each way. Models are small, with random weights, in float32.
"""

import argparse
import copy
import sys
import time
import types
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import torch  # noqa: E402
import transformers  # noqa: E402
from cached import SHAPE  # noqa: E402
from cached import build_model as build_qwen  # noqa: E402
from workloads import HH, PAD_ID, SEED, Workload, make_pairs  # noqa: E402

from pipeline.data.tokens import TokenizedPair  # noqa: E402
from pipeline.scoring import forward  # noqa: E402
from pipeline.scoring.forward import prepare, score  # noqa: E402
from pipeline.scoring.packing import Batch, cache_pairs, pad_pairs  # noqa: E402


def build_lfm2() -> Any:
    config = transformers.Lfm2Config(
        vocab_size=SHAPE.vocabulary,
        hidden_size=SHAPE.hidden,
        intermediate_size=SHAPE.intermediate,
        num_hidden_layers=SHAPE.layers,
        num_attention_heads=SHAPE.heads,
        num_key_value_heads=SHAPE.kv_heads,
        layer_types=["conv", "conv", "full_attention", "conv"] * 2,
        tie_word_embeddings=True,
        pad_token_id=PAD_ID,
    )
    transformers.set_seed(SEED)
    return transformers.Lfm2ForCausalLM(config)


def deepcopy(cache: Any) -> Any:
    """Copy a cache with its gradients: Python's own copy refuses tensors that have them."""
    tensors = [tensor for layer in cache.layers for tensor in tensors_in(vars(layer))]
    return copy.deepcopy(cache, {id(tensor): tensor.clone() for tensor in tensors})


def tensors_in(value: Any) -> list[torch.Tensor]:
    if torch.is_tensor(value):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for each in values for tensor in tensors_in(each)]


def gradients(model: Any, batch: Batch, rounds: int) -> tuple[torch.Tensor, dict[str, torch.Tensor], float]:
    """Give the log-probs, the gradients of a loss that weighs each token, and the least processor time."""
    seconds = []
    for _ in range(rounds):
        model.zero_grad()
        start = time.process_time()
        logps = score(model, batch).tokens.logps
        weights = torch.linspace(-1, 1, len(logps))
        (logps * weights).sum().backward()
        seconds.append(time.process_time() - start)
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return logps.detach(), found, min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    forward.copy = types.SimpleNamespace(deepcopy=deepcopy)  # type: ignore[assignment]
    workload = Workload("gradients", 2, SHAPE, HH, "float32", options.pairs, options.pairs)
    pairs = [
        TokenizedPair(prompt_ids=p, chosen_ids=c, rejected_ids=r) for p, c, r in make_pairs(workload, options.pairs)
    ]
    for name, build in (("Qwen3.5", build_qwen), ("LFM2", build_lfm2)):
        model = build().train().requires_grad_(True)
        prepare(model)
        logps, padded, slow = gradients(model, pad_pairs(pairs, PAD_ID), options.rounds)
        try:
            cached_logps, cached, fast = gradients(model, cache_pairs(pairs, PAD_ID), options.rounds)
        except RuntimeError as error:
            print(f"{name}: padded {slow:.2f} s; through the cache: {type(error).__name__}: {str(error)[:300]}")
            continue
        largest = max(float(g.abs().max()) for g in padded.values())
        apart = max(float((padded[n] - cached[n]).abs().max()) if n in cached else float("inf") for n in padded)
        print(
            f"{name}: log-probs {float((logps - cached_logps).abs().max()):.1e} apart, gradients {apart / largest:.1e} "
            f"of the largest; padded {slow:.2f} s, cached {fast:.2f} s, {slow / fast:.2f}x"
        )


if __name__ == "__main__":
    main()
