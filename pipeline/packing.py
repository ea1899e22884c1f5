"""Tokenized pairs -> batches of tensors under a token budget.

A batch holds the chosen sequences of its pairs, then their rejected ones, padded on the right: right padding
leaves every real position, and so every log-prob, as it is without padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pipeline.tokens import TokenizedPair

__all__ = ["Batch", "make_batch", "plan_batches"]


@dataclass(frozen=True)
class Batch:
    """P pairs as 2P rows: rows 0 to P-1 are the chosen sequences, P to 2P-1 the rejected ones."""

    input_ids: torch.Tensor
    """[2P, length] int64"""
    attention_mask: torch.Tensor
    """[2P, length] int64, 1 on real tokens"""
    completion_mask: torch.Tensor
    """[2P, length] bool, True on tokens that belong to a completion"""

    @property
    def num_pairs(self) -> int:
        return self.input_ids.shape[0] // 2

    def to(self, device: torch.device) -> "Batch":
        return Batch(
            *(t.to(device, non_blocking=True) for t in (self.input_ids, self.attention_mask, self.completion_mask))
        )


def plan_batches(pairs: Sequence[TokenizedPair], tokens_per_batch: int) -> list[list[int]]:
    """Group pairs, by index, so that a batch has at most `tokens_per_batch` tokens with its padding.

    Longest first, so that neighbours have similar lengths and the largest batch comes first, where too little
    memory shows at once. The plan depends on the pairs' lengths and order alone. A pair above the budget is a
    batch of its own.
    """
    lengths = [len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) for p in pairs]
    order = sorted(range(len(pairs)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    widest = 0
    for i in order:
        if batches and 2 * widest * (len(batches[-1]) + 1) <= tokens_per_batch:
            batches[-1].append(i)
        else:
            batches.append([i])
            widest = lengths[i]
    return batches


def make_batch(pairs: Sequence[TokenizedPair], pad_id: int) -> Batch:
    """Pad the pairs on the right to one batch, in the order given."""
    rows = [(p.prompt_ids, p.chosen_ids) for p in pairs] + [(p.prompt_ids, p.rejected_ids) for p in pairs]
    length = max(len(prompt) + len(completion) for prompt, completion in rows)
    input_ids = torch.full((len(rows), length), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros((len(rows), length), dtype=torch.int64)
    completion_mask = torch.zeros((len(rows), length), dtype=torch.bool)
    for i, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        input_ids[i, :end] = torch.tensor([*prompt, *completion], dtype=torch.int64)
        attention_mask[i, :end] = 1
        completion_mask[i, len(prompt) : end] = True
    return Batch(input_ids, attention_mask, completion_mask)
