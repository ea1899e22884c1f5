"""Time hybrids in stage one: cached batches beside padded ones, process time of one thread.

    OMP_NUM_THREADS=1 python tests/bench/cached.py [--pairs 96] [--rounds 3]

The model is a small Qwen3.5 with random weights, three layers of linear attention to one of full attention.
"""

import argparse
import statistics
import time

import torch
import transformers
from workloads import HH, PAD_ID, SEED, UF, Shape, Workload, make_pairs

from pipeline.data.tokens import TokenizedPair
from pipeline.scoring.forward import prepare
from pipeline.scoring.packing import Reading
from pipeline.scoring.scorer import Scorer
from pipeline.scoring.selfcheck import check_scoring

SHAPE = Shape(vocabulary=32000, hidden=512, layers=8, intermediate=1408, heads=8, kv_heads=2)


def build_model() -> transformers.PreTrainedModel:
    config = transformers.Qwen3_5TextConfig(
        vocab_size=SHAPE.vocabulary,
        hidden_size=SHAPE.hidden,
        intermediate_size=SHAPE.intermediate,
        num_hidden_layers=SHAPE.layers,
        num_attention_heads=SHAPE.heads,
        num_key_value_heads=SHAPE.kv_heads,
        head_dim=64,
        linear_num_key_heads=4,
        linear_num_value_heads=8,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        tie_word_embeddings=True,
        pad_token_id=PAD_ID,
    )
    transformers.set_seed(SEED)
    return transformers.Qwen3_5ForCausalLM(config).eval().requires_grad_(False)


def seconds_of(model: transformers.PreTrainedModel, reading: Reading, pairs: list[TokenizedPair]) -> float:
    scorer = Scorer(model=model, reading=reading, pad_id=PAD_ID, key="model")
    start = time.process_time()
    for _ in scorer.logps(pairs):
        pass
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = build_model()
    prepare(model)
    assert check_scoring(model, "reference.model") == "cached"
    for lengths in (HH, UF):
        workload = Workload("cached", 1, SHAPE, lengths, "float32", options.pairs, options.pairs)
        pairs = [
            TokenizedPair(prompt_ids=p, chosen_ids=c, rejected_ids=r) for p, c, r in make_pairs(workload, options.pairs)
        ]
        readings: tuple[Reading, ...] = ("padded", "cached")
        rounds = [[seconds_of(model, reading, pairs) for reading in readings] for _ in range(options.rounds)]
        padded, cached = (statistics.median(side) for side in zip(*rounds, strict=True))
        print(f"{lengths.name}: padded {padded:.1f} s, cached {cached:.1f} s, {padded / cached:.2f} times as fast")


if __name__ == "__main__":
    main()
