"""Tokenized pairs -> batches of tensors.

A *packed* batch is one row without padding, made of prompt groups: a prompt, then each of its distinct completions
without its last token, which predicts nothing.

    [ prompt A | completion 1 | completion 2 | prompt B | completion 1 | ... ]

Every completion continues the positions of its prompt, and sees the prompt and itself alone (attention.py). So a
prompt is computed once, however many completions share it. A *padded* batch is what any model can read: a row for
each sequence, padded on the right, which leaves every real position as it is without padding.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipeline.data.tokens import TokenizedPair

__all__ = [
    "Batch",
    "Layout",
    "make_batch",
    "pack_pairs",
    "pad_pairs",
    "plan_batches",
]


@dataclass(frozen=True)
class Layout:
    """Where the prompt groups of a packed row stand."""

    groups: tuple[tuple[int, tuple[int, ...]], ...]
    """Of each group, in the row's order: tokens of its prompt, and of each completion as it stands in the row"""
    memo: dict[Any, Any] = field(default_factory=dict, compare=False)
    """What attention makes of the layout once and every layer uses again: masks"""


@dataclass(frozen=True)
class Batch:
    """P pairs. Scored tokens are strung together: the P chosen completions, then the P rejected ones."""

    input_ids: torch.Tensor
    """[rows, length] int64; one row where packed"""
    predictors: torch.Tensor
    """[M] int64, place in the flattened `input_ids` of the token that predicts each scored token"""
    targets: torch.Tensor
    """[M] int64, the scored tokens"""
    shared: torch.Tensor | None
    """[N] int64, which of the M each token of the 2P completions is; None where no completion occurs twice: N = M"""
    lengths: torch.Tensor
    """[2P] int64, tokens of each completion; their sum is N"""
    num_tokens: torch.Tensor
    """[P] int64, tokens of a pair's two sequences, the prompt in each"""
    attention_mask: torch.Tensor | None = None
    """[rows, length] int64, 1 on real tokens; of a padded batch alone"""
    position_ids: torch.Tensor | None = None
    """[1, length] int64; of a packed batch alone"""
    layout: Layout | None = None
    """Of a packed batch alone"""

    @property
    def num_pairs(self) -> int:
        return len(self.num_tokens)

    def to(self, device: torch.device) -> "Batch":
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for name, value in vars(self).items()
        }
        return Batch(**moved)

    def pin_memory(self) -> "Batch":
        """What the data loader calls, so that moving to a GPU overlaps with work."""
        pinned: dict[str, Any] = {
            name: value.pin_memory() if isinstance(value, torch.Tensor) else value for name, value in vars(self).items()
        }
        return Batch(**pinned)


def plan_batches(pairs: Sequence[TokenizedPair], tokens_per_batch: int, *, packed: bool) -> list[list[int]]:
    """Cut pairs, given by index, into batches of at most `tokens_per_batch` tokens, padding included.

    Longest first: neighbours have similar lengths, and the largest batch comes first, where too little memory shows
    at once. Packed, pairs that share a prompt stand together. The plan depends on the pairs and their order alone.
    A pair above the budget is a batch of its own.
    """
    lengths = [len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) for p in pairs]
    if packed:
        return _plan_packed(pairs, lengths, tokens_per_batch)
    batches: list[list[int]] = []
    widest = 0
    for i in sorted(range(len(pairs)), key=lambda i: (-lengths[i], i)):
        if batches and 2 * widest * (len(batches[-1]) + 1) <= tokens_per_batch:
            batches[-1].append(i)
        else:
            batches.append([i])
            widest = lengths[i]
    return batches


def _plan_packed(pairs: Sequence[TokenizedPair], lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    sharing: dict[tuple[int, ...], list[int]] = {}
    for i, pair in enumerate(pairs):
        sharing.setdefault(tuple(pair.prompt_ids), []).append(i)
    groups = sorted(sharing.values(), key=lambda group: (-max(lengths[i] for i in group), group[0]))
    batches: list[list[int]] = []
    used = tokens_per_batch
    for group in groups:
        there: set[tuple[int, ...]] | None = None  # Completions of this prompt in the open batch; None: not even it.
        for i in group:
            completions = {tuple(pairs[i].chosen_ids), tuple(pairs[i].rejected_ids)}
            alone = len(pairs[i].prompt_ids) + _in_row(completions)
            more = alone if there is None else _in_row(completions - there)
            if not batches or used + more > tokens_per_batch:
                batches.append([])
                used, more, there = 0, alone, None
            batches[-1].append(i)
            used += more
            there = completions | (there or set())
    return batches


def _in_row(completions: Iterable[tuple[int, ...]]) -> int:
    return sum(len(completion) - 1 for completion in completions)


def make_batch(pairs: Sequence[TokenizedPair], pad_id: int, *, packed: bool) -> Batch:
    """Pack the pairs, if the model can read that; otherwise pad them."""
    return pack_pairs(pairs) if packed else pad_pairs(pairs, pad_id)


def pack_pairs(pairs: Sequence[TokenizedPair]) -> Batch:
    """Pack the pairs into one row; prompts and completions that are equal stand in it once."""
    groups: dict[tuple[int, ...], dict[tuple[int, ...], int]] = {}
    slots: list[int] = []  # Of the P chosen, then the P rejected completions: which distinct one it is.
    count = 0
    for prompt, completion in _sequences(pairs):
        known = groups.setdefault(prompt, {})
        if completion not in known:
            known[completion] = count
            count += 1
        slots.append(known[completion])
    row: list[int] = []
    positions: list[npt.NDArray[np.int64]] = []
    predictors: list[npt.NDArray[np.int64]] = [np.empty(0, np.int64)] * count
    targets: list[tuple[int, ...]] = [()] * count
    layout = []
    for prompt, completions in groups.items():
        last = len(row) + len(prompt) - 1
        row.extend(prompt)
        positions.append(np.arange(len(prompt)))
        # The longest first: attention computes the prompt along with it.
        ordered = sorted(completions, key=lambda completion: -len(completion))
        for completion in ordered:
            start = len(row)
            row.extend(completion[:-1])
            positions.append(np.arange(len(prompt), len(prompt) + len(completion) - 1))
            # The prompt's last token predicts the first of each completion.
            predictors[completions[completion]] = np.concatenate([[last], np.arange(start, len(row))])
            targets[completions[completion]] = completion
        layout.append((len(prompt), tuple(len(completion) - 1 for completion in ordered)))
    lengths, num_tokens = _counts(pairs)
    shared = None
    if count < len(slots):
        starts = np.cumsum([0, *(len(target) for target in targets)])
        shared = torch.from_numpy(np.concatenate([np.arange(starts[slot], starts[slot + 1]) for slot in slots]))
    return Batch(
        input_ids=torch.tensor([row]),
        predictors=torch.from_numpy(np.concatenate(predictors)),
        targets=torch.tensor([id for target in targets for id in target]),
        shared=shared,
        lengths=lengths,
        num_tokens=num_tokens,
        position_ids=torch.from_numpy(np.concatenate(positions))[None],
        layout=Layout(tuple(layout)),
    )


def pad_pairs(pairs: Sequence[TokenizedPair], pad_id: int) -> Batch:
    """Pad the pairs on the right: rows 0 to P-1 are the chosen sequences, P to 2P-1 the rejected ones."""
    rows = _sequences(pairs)
    length = max(len(prompt) + len(completion) for prompt, completion in rows)
    input_ids = torch.full((len(rows), length), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros((len(rows), length), dtype=torch.int64)
    predictors = []
    for i, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        input_ids[i, :end] = torch.tensor([*prompt, *completion])
        attention_mask[i, :end] = 1
        predictors.append(np.arange(len(prompt) - 1, end - 1) + i * length)
    lengths, num_tokens = _counts(pairs)
    return Batch(
        input_ids=input_ids,
        predictors=torch.from_numpy(np.concatenate(predictors)),
        targets=torch.tensor([id for _, completion in rows for id in completion]),
        shared=None,
        lengths=lengths,
        num_tokens=num_tokens,
        attention_mask=attention_mask,
    )


def _sequences(pairs: Sequence[TokenizedPair]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Prompt and completion of the P chosen, then the P rejected sequences."""
    return [
        (tuple(p.prompt_ids), tuple(completion))
        for completions in ([p.chosen_ids for p in pairs], [p.rejected_ids for p in pairs])
        for p, completion in zip(pairs, completions, strict=True)
    ]


def _counts(pairs: Sequence[TokenizedPair]) -> tuple[torch.Tensor, torch.Tensor]:
    """`lengths` and `num_tokens` of a batch."""
    lengths = torch.tensor([*(len(p.chosen_ids) for p in pairs), *(len(p.rejected_ids) for p in pairs)])
    prompts = torch.tensor([len(p.prompt_ids) for p in pairs])
    return lengths, 2 * prompts + torch.add(*lengths.chunk(2))
