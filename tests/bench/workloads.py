"""What is measured: model shapes, length distributions, pairs of token ids, and the useful work in each.

Nothing here imports torch: the driver reads it, and every measurement gets its workload as JSON.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import NormalDist
from typing import Any

PAD_ID = 0
SEED = 42


@dataclass(frozen=True)
class Shape:
    """A Llama with tied embeddings and as many key-value heads as heads, unless it says otherwise."""

    vocabulary: int
    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    tied: bool = True

    @property
    def body(self) -> int:
        """Parameters outside embedding and head, norms left out."""
        attention = 2 * self.hidden**2 + 2 * self.hidden**2 * self.kv_heads // self.heads
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def parameters(self) -> int:
        return self.body + self.vocabulary * self.hidden * (1 if self.tied else 2)

    def describe(self) -> str:
        return (
            f"Llama, {self.parameters / 1e6:,.0f}M parameters ({self.body / 1e6:,.0f}M in {self.layers} layers), "
            f"hidden {self.hidden}, intermediate {self.intermediate}, {self.heads} heads, {self.kv_heads} key-value "
            f"heads, vocabulary {self.vocabulary:,}, {'tied' if self.tied else 'untied'} embeddings, random weights"
        )


@dataclass(frozen=True)
class Lengths:
    """Log-normal lengths in tokens, prompt and completions drawn independently."""

    name: str
    prompt: float
    """Median"""
    prompt_sigma: float
    """Standard deviation of the logarithm"""
    completion: float
    completion_sigma: float
    max_length: int = 1024

    def describe(self) -> str:
        spread = f"{self.prompt_sigma:g} and {self.completion_sigma:g}"
        return (
            f"{self.name}: prompt median {self.prompt:g}, completion median {self.completion:g} tokens, log-normal "
            f"with sigma {spread}, at most {self.max_length} together"
        )


@dataclass(frozen=True)
class Workload:
    """One row of the results."""

    name: str
    stage: int
    shape: Shape
    lengths: Lengths
    dtype: str
    """float32 or bfloat16. Stage one has its weights in it. Stage two on a CPU keeps float32 weights and computes in
    it under autocast, the default of both trainers; on a GPU its weights are in it"""
    pairs: int
    """Scored in stage one; in stage two, of all steps together"""
    cpu_pairs: int
    """The same, in the measurement on one thread"""
    batch: int = 4
    """Pairs of a step"""
    tokens_per_batch: int = 2048
    """Our stage one's budget, its default"""
    peer_batch: int = 8
    """Pairs of a batch in TRL's precomputation; of 4, 8 and 16 the fastest on a processor, with the least padding"""
    lora: bool = False
    checkpointing: bool = False
    device: str = "cpu"
    peers: tuple[str, ...] = ("trl-completions", "trl")
    """Sides to compare with, the headline's first. trl-completions: as TRL runs on CUDA, its head on completion
    positions alone. trl: as it runs on this device. trl-live: in stage two, with its reference in memory"""

    @property
    def is_autocast(self) -> bool:
        return self.stage == 2 and self.device == "cpu" and self.dtype != "float32"

    @property
    def weight_dtype(self) -> str:
        return "float32" if self.is_autocast else self.dtype


def to_json(workload: Workload) -> dict[str, Any]:
    return asdict(workload)


def from_json(data: dict[str, Any]) -> Workload:
    own = {"shape": Shape(**data["shape"]), "lengths": Lengths(**data["lengths"])}
    return Workload(**{**data, **own, "peers": tuple(data["peers"])})


Ids = tuple[list[int], list[int], list[int]]
"""Prompt, chosen, rejected"""


def make_pairs(workload: Workload, count: int) -> list[Ids]:
    """Draw pairs of random ids: the same for the same workload and count, on any machine."""
    pick = random.Random(SEED)
    lengths = workload.lengths
    prompts = _quantiles(pick, count, lengths.prompt, lengths.prompt_sigma)
    sides = [_quantiles(pick, count, lengths.completion, lengths.completion_sigma) for _ in range(2)]

    def ids(length: int) -> list[int]:
        # From 3: the first few are the tokenizer's special tokens, padding among them.
        return [pick.randrange(3, workload.shape.vocabulary) for _ in range(length)]

    made = []
    for prompt, chosen, rejected in zip(prompts, *sides, strict=True):
        # Nothing is left for TRL or us to truncate, so both see all of the same ids.
        prompt = min(prompt, lengths.max_length // 2)
        room = lengths.max_length - prompt
        made.append((ids(prompt), ids(min(chosen, room)), ids(min(rejected, room))))
    return made


def padded_tokens(workload: Workload, count: int) -> float:
    """Tokens a pair that TRL's model reads in its padded batches of `count` pairs: both sequences, as wide as the
    batch's longest."""
    size = workload.peer_batch if workload.stage == 1 else workload.batch
    lengths = [
        len(prompt) + max(len(chosen), len(rejected)) for prompt, chosen, rejected in make_pairs(workload, count)
    ]
    batches = [lengths[start : start + size] for start in range(0, count, size)]
    return sum(2 * len(batch) * max(batch) for batch in batches) / count


def _quantiles(pick: random.Random, count: int, median: float, sigma: float) -> list[int]:
    """Lengths in the middle of `count` equally likely parts, in any order: a few pairs have the distribution's mean."""
    normal = NormalDist()
    scores = [normal.inv_cdf((i + 0.5) / count) for i in range(count)]
    lengths = [max(2, round(median * math.exp(sigma * score))) for score in scores]
    pick.shuffle(lengths)
    return lengths


def reference_logps(workload: Workload, pairs: Sequence[Ids]) -> list[tuple[float, float]]:
    """Make up the reference's sums for stage two: near the policy's own, yet not the same.

    A policy equal to its reference has a loss of log 2 whatever either side computes, and would prove nothing.
    """
    per_token = -math.log(workload.shape.vocabulary) - 0.5
    return [(per_token * len(chosen), per_token * len(rejected)) for _, chosen, rejected in pairs]


def useful_operations(workload: Workload, pairs: Sequence[Ids]) -> float:
    """Floating-point operations that the numbers need: each prompt once, the head on completion positions alone.

    2 N (P + C + R) + 2 V H (C + R) + 4 layers * width * visible positions; three times that for a training step.
    """
    shape = workload.shape
    total = 0.0
    for prompt_ids, chosen_ids, rejected_ids in pairs:
        prompt, chosen, rejected = len(prompt_ids), len(chosen_ids), len(rejected_ids)
        visible = _triangle(prompt) + sum(length * prompt + _triangle(length) for length in (chosen, rejected))
        total += 2 * shape.body * (prompt + chosen + rejected)
        total += 2 * shape.vocabulary * shape.hidden * (chosen + rejected)
        total += 4 * shape.layers * shape.hidden * visible
    return total * (3 if workload.stage == 2 else 1)


def _triangle(length: int) -> float:
    return length * (length + 1) / 2


SMALL_32K = Shape(vocabulary=32_000, hidden=512, layers=8, intermediate=1408, heads=8, kv_heads=8)
SMALL_128K = replace(SMALL_32K, vocabulary=128_000)
DEEP = Shape(vocabulary=8_192, hidden=768, layers=9, intermediate=2048, heads=12, kv_heads=12)

UF = Lengths("UltraFeedback-like", prompt=110, prompt_sigma=0.8, completion=215, completion_sigma=0.7)
# The spread is that of 1,496 pairs of HH-RLHF's harmless-base.
HH = Lengths("HH-like", prompt=120, prompt_sigma=1.07, completion=60, completion_sigma=0.94)

WORKLOADS = [
    Workload("score-32k", 1, SMALL_32K, UF, "float32", 16, 8),
    Workload("score-32k-bf16", 1, SMALL_32K, UF, "bfloat16", 16, 8),
    Workload("score-128k", 1, SMALL_128K, UF, "float32", 8, 8),
    Workload("score-hh", 1, SMALL_32K, HH, "float32", 32, 16),
    Workload("score-deep", 1, DEEP, UF, "float32", 16, 8),
    Workload("train-32k", 2, SMALL_32K, UF, "float32", 12, 8),
    Workload("train-32k-bf16", 2, SMALL_32K, UF, "bfloat16", 12, 8),
    Workload("train-hh", 2, SMALL_32K, HH, "float32", 16, 12),
]

GPU_SHAPES = {
    "8b": Shape(128_256, 4096, 32, 14_336, 32, 8, tied=False),
    "3b": Shape(128_256, 3072, 28, 8_192, 24, 8),
    "1b": Shape(128_256, 2048, 16, 8_192, 32, 8),
}
GPU_SCORE = Workload(
    "gpu-score",
    1,
    GPU_SHAPES["8b"],
    UF,
    "bfloat16",
    128,
    0,
    tokens_per_batch=32_768,
    peer_batch=8,
    device="cuda",
    peers=("trl",),
)
# Checkpointing: the library's default for TRL, and what a model of this size needs in either.
_STEP = replace(GPU_SCORE, stage=2, pairs=24, checkpointing=True, peers=("trl", "trl-live"))
GPU_LORA = replace(_STEP, name="gpu-lora", lora=True)


def full_step(size: str) -> Workload:
    """Make the full step of a model of GPU_SHAPES."""
    return replace(_STEP, name=f"gpu-full-{size}", shape=GPU_SHAPES[size])


TINY_SHAPE = Shape(vocabulary=512, hidden=32, layers=2, intermediate=64, heads=4, kv_heads=2)
TOY_LENGTHS = Lengths("short", prompt=12, prompt_sigma=0.5, completion=10, completion_sigma=0.5, max_length=64)
TOY = [
    Workload("toy-score", 1, TINY_SHAPE, TOY_LENGTHS, "float32", 12, 12),
    Workload("toy-train", 2, TINY_SHAPE, TOY_LENGTHS, "float32", 12, 0),
]
"""To test the benchmark itself, on a processor"""


def _curves() -> dict[str, list[Workload]]:
    """Stage one at growing numbers of pairs, at growing shares of the prompt in one length, at TRL's batch sizes."""
    first = replace(WORKLOADS[0], cpu_pairs=0, peers=WORKLOADS[0].peers[:1])
    small = replace(first, shape=replace(first.shape, hidden=256, layers=4, intermediate=704, heads=4, kv_heads=4))
    total, shares = 512, []
    for percent in (10, 30, 50, 70, 90):
        prompt = total * percent // 100
        # The distributions' own cut at half of max_length must not touch the prompt.
        lengths = Lengths(f"prompt {percent}%", prompt, 0.0, total - prompt, 0.0, max_length=2 * total)
        shares.append(replace(small, name=f"share-{percent}", lengths=lengths, pairs=8))
    return {
        "curve-pairs": [replace(small, name=f"pairs-{count}", pairs=count) for count in (8, 16, 32)],
        "curve-share": shares,
        "curve-batch": [replace(first, name=f"batch-{batch}", peer_batch=batch) for batch in (1, 4, 16)],
    }


CURVES = _curves()
