"""What is measured: model shapes, length distributions, pairs of token ids, the bars, and the useful work in each.

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
class Bars:
    """What the project wants to reach, as ratios to TRL; None where nothing was set."""

    wall: float | None = None
    cpu: float | None = None
    memory: float | None = None
    """TRL's extra memory over ours"""
    gap: float | None = None
    """Largest difference of a pair's summed log-probs (stage one), of the first step's loss (stage two)"""
    share: float | None = None
    """Useful operations over what the matrix rate allows"""


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
    bars: Bars
    batch: int = 4
    """Pairs of a step"""
    tokens_per_batch: int = 2048
    """Our stage one's budget, its default"""
    peer_batch: int = 8
    """Pairs of a batch in TRL's precomputation; of 4, 8 and 16 the fastest on a processor, with the least padding"""
    lora: bool = False
    checkpointing: bool = False
    device: str = "cpu"
    peers: tuple[str, ...] = ("trl",)
    """Sides to compare with: trl, and in stage two trl-live, with its reference in memory"""

    @property
    def steps(self) -> int:
        """Timed steps of stage two; one more comes before them, to warm up."""
        return self.pairs // self.batch - 1

    @property
    def is_autocast(self) -> bool:
        return self.stage == 2 and self.device == "cpu" and self.dtype != "float32"

    @property
    def weight_dtype(self) -> str:
        return "float32" if self.is_autocast else self.dtype


def to_json(workload: Workload) -> dict[str, Any]:
    return asdict(workload)


def from_json(data: dict[str, Any]) -> Workload:
    own = {"shape": Shape(**data["shape"]), "lengths": Lengths(**data["lengths"]), "bars": Bars(**data["bars"])}
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

_SUMS = 2e-3
_LOSS = 1e-4

WORKLOADS = [
    Workload("score-32k", 1, SMALL_32K, UF, "float32", 16, 8, Bars(wall=5, cpu=3.5, memory=8, gap=_SUMS, share=0.6)),
    Workload("score-32k-bf16", 1, SMALL_32K, UF, "bfloat16", 16, 8, Bars(wall=7, cpu=5)),
    Workload("score-128k", 1, SMALL_128K, UF, "float32", 8, 8, Bars(wall=6, cpu=4, memory=10, gap=_SUMS, share=0.6)),
    Workload("score-hh", 1, SMALL_32K, HH, "float32", 32, 16, Bars(wall=10, cpu=6, gap=_SUMS, share=0.6)),
    Workload("score-deep", 1, DEEP, UF, "float32", 16, 8, Bars(wall=3, cpu=2.5, gap=_SUMS, share=0.6)),
    Workload("train-32k", 2, SMALL_32K, UF, "float32", 12, 8, Bars(wall=3, cpu=3, memory=4, gap=_LOSS)),
    Workload("train-32k-bf16", 2, SMALL_32K, UF, "bfloat16", 12, 8, Bars(wall=5, cpu=5)),
    Workload("train-hh", 2, SMALL_32K, HH, "float32", 16, 12, Bars(wall=4, cpu=4, gap=_LOSS)),
]

TOY_SHAPE = Shape(vocabulary=512, hidden=32, layers=2, intermediate=64, heads=4, kv_heads=2)
TOY_LENGTHS = Lengths("short", prompt=12, prompt_sigma=0.5, completion=10, completion_sigma=0.5, max_length=64)
TOY = [
    Workload("toy-score", 1, TOY_SHAPE, TOY_LENGTHS, "float32", 12, 12, Bars(wall=1, gap=_SUMS)),
    Workload("toy-train", 2, TOY_SHAPE, TOY_LENGTHS, "float32", 12, 0, Bars(wall=1, gap=_LOSS)),
]
"""To test the benchmark itself"""


def count_curve(small: Workload) -> list[Workload]:
    """Stage one at growing numbers of pairs, on a smaller body, for the picture."""
    shape = replace(small.shape, hidden=256, layers=4, intermediate=704, heads=4, kv_heads=4)
    return [
        replace(small, name=f"pairs-{count}", shape=shape, pairs=count, cpu_pairs=count, bars=Bars())
        for count in (8, 16, 32)
    ]


def batch_curve(small: Workload) -> list[Workload]:
    """Stage one against every batch size that TRL may be given: the smaller it is, the less it pads."""
    return [replace(small, name=f"batch-{batch}", peer_batch=batch, bars=Bars()) for batch in (1, 4, 16)]


def share_curve(small: Workload) -> list[Workload]:
    """Stage one at equal length of prompt and completion together, with the prompt a growing share of it."""
    total, made = 512, []
    shape = replace(small.shape, hidden=256, layers=4, intermediate=704, heads=4, kv_heads=4)
    for percent in (10, 30, 50, 70, 90):
        prompt = total * percent // 100
        lengths = Lengths(f"prompt {percent}%", prompt, 0.0, total - prompt, 0.0)
        # The distributions' own cut at half of max_length must not touch the prompt.
        lengths = replace(lengths, max_length=2 * total)
        made.append(
            replace(small, name=f"share-{percent}", shape=shape, lengths=lengths, pairs=8, cpu_pairs=8, bars=Bars())
        )
    return made
