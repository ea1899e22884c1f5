"""Tokenized pairs -> batches of tensors.

A *packed* batch is one row without padding, made of prompt groups: a prompt, then each of its distinct completions
without its last token, which predicts nothing.

    [ prompt A | completion 1 | completion 2 | prompt B | completion 1 | ... ]

Every completion continues the positions of its prompt, and sees only the prompt and itself (attention.py). So a
prompt is computed once, however many completions share it. A *padded* batch is one that any model can read: one row
a sequence, padded on the right, which does not change the real positions.

A *cached* batch is for models that go on from their own cache, as in generation: one row a prompt, padded on the left,
then one row a completion, padded on the right, which starts from its prompt's state. A prompt is computed once, too.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.utils.rnn import pad_sequence

from pipeline.data.tokens import TokenizedPair

__all__ = [
    "Batch",
    "Continuation",
    "Kernel",
    "Layout",
    "Reading",
    "cache_pairs",
    "make_batch",
    "pack_pairs",
    "pad_pairs",
    "plan_batches",
]

Reading = Literal["packed", "cached", "padded"]
"""How a model reads batches"""


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """How one layer attends, as its family asks transformers for it."""

    scaling: float | None = None
    """Factor of the scores; None is 1 / sqrt(head size)"""
    dropout: float = 0.0
    """Share of the attention weights that are dropped"""
    window: int | None = None
    """Number of tokens that a token sees, itself included; None for all before it"""
    softcap: float | None = None
    """Scores are softcap * tanh(scores / softcap), as in Gemma 2; None for plain scores"""


@dataclass(frozen=True)
class Layout:
    """Positions of the prompt groups in a packed row."""

    groups: tuple[tuple[int, tuple[int, ...]], ...]
    """Number of tokens of each group's prompt, and of each of its completions, in the row's order"""
    masks: dict[Any, Any] = field(default_factory=dict, compare=False)
    """Masks that attention makes once for all layers"""
    kernels: set[Kernel] | None = field(default=None, compare=False)
    """Collects the kernel of each layer, for the self-check; None collects nothing"""


class Continuation(NamedTuple):
    """Completions of similar lengths that start from the cached state of their prompts."""

    ids: torch.Tensor
    """Token ids without each completion's last, [rows, length] int64, padded on the right"""
    mask: torch.Tensor
    """1 on real tokens, [rows, length] int64"""
    prompts: torch.Tensor
    """Row of each completion's prompt, [rows] int64"""


@dataclass(frozen=True)
class Batch:
    """P pairs. Scored tokens are concatenated: the P chosen completions, then the P rejected ones."""

    input_ids: torch.Tensor
    """Token ids, [rows, length] int64; one row if packed, the prompts if cached"""
    logit_positions: torch.Tensor
    """Positions in the flattened `input_ids` whose logits predict the scored tokens, [M] int64; if cached, positions
    in the prompts' last tokens, then in the flattened continuations"""
    targets: torch.Tensor
    """Scored tokens, [M] int64"""
    expand_index: torch.Tensor | None
    """Index among the M of each token of the 2P completions, [N] int64; None if no completion occurs twice (N = M)"""
    lengths: torch.Tensor
    """Number of tokens of each completion, [2P] int64; their sum is N"""
    num_tokens: torch.Tensor
    """Number of tokens of each pair's two sequences, the prompt counted in each, [P] int64"""
    attention_mask: torch.Tensor | None = None
    """1 on real tokens, [rows, length] int64; None if packed"""
    position_ids: torch.Tensor | None = None
    """[1, length] int64; None if padded"""
    layout: Layout | None = None
    """Groups of the packed row; None if padded"""
    continuations: tuple[Continuation, ...] | None = None
    """Completions of a cached batch, the longer ones first; none if all have one token. None unless cached"""

    @property
    def num_pairs(self) -> int:
        return len(self.num_tokens)

    def to(self, device: torch.device) -> "Batch":
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Pin all tensors, for the data loader: copying to a GPU then overlaps with work."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        changed: dict[str, Any] = {n: change(v) if torch.is_tensor(v) else v for n, v in vars(self).items()}
        if self.continuations is not None:
            changed["continuations"] = tuple(Continuation(*map(change, part)) for part in self.continuations)
        return Batch(**changed)


def plan_batches(pairs: Sequence[TokenizedPair], tokens_per_batch: int, reading: Reading) -> list[list[int]]:
    """Cut pairs, given by index, into batches of at most `tokens_per_batch` tokens, padding included.

    The longest pairs come first: neighbours have similar lengths, and too little memory shows at once. Unless padded,
    pairs that share a prompt are neighbours. The plan depends only on the pairs and their order. A pair above the
    budget is a batch of its own.
    """
    lengths = [len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) for p in pairs]
    if reading == "packed":
        return _plan_packed(pairs, lengths, tokens_per_batch)
    if reading == "cached":
        return _plan_cached(pairs, tokens_per_batch)
    batches: list[list[int]] = []
    widest = 0
    for i in sorted(range(len(pairs)), key=lambda i: (-lengths[i], i)):
        if batches and 2 * widest * (len(batches[-1]) + 1) <= tokens_per_batch:
            batches[-1].append(i)
        else:
            batches.append([i])
            widest = lengths[i]
    return batches


def _sharing(pairs: Sequence[TokenizedPair]) -> list[list[int]]:
    """List the pairs of each prompt by index."""
    sharing: dict[tuple[int, ...], list[int]] = {}
    for i, pair in enumerate(pairs):
        sharing.setdefault(tuple(pair.prompt_ids), []).append(i)
    return list(sharing.values())


def _plan_packed(pairs: Sequence[TokenizedPair], lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    groups = sorted(_sharing(pairs), key=lambda group: (-max(lengths[i] for i in group), group[0]))
    batches: list[list[int]] = []
    used = tokens_per_batch
    for group in groups:
        # This prompt's completions in the open batch; None if the prompt is not in it.
        there: set[tuple[int, ...]] | None = None
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


def _plan_cached(pairs: Sequence[TokenizedPair], tokens_per_batch: int) -> list[list[int]]:
    """Batch prompts of similar lengths; of the completions, `cache_pairs` makes two blocks of similar lengths.

    A batch counts the tokens that the cache can hold: each row's prompt, and the batch's longest completion.
    """
    longest = [max(len(p.chosen_ids), len(p.rejected_ids)) for p in pairs]
    groups = sorted(
        _sharing(pairs),
        key=lambda group: (-len(pairs[group[0]].prompt_ids), -max(longest[i] for i in group), group[0]),
    )
    batches: list[list[int]] = []
    sizes: list[int] = []
    prompt = completion = 0
    for i in (i for group in groups for i in group):
        widest = max(completion, longest[i])
        size = 2 * (len(batches[-1]) + 1) * (prompt + widest) if batches else 0
        if not batches or size > tokens_per_batch:
            batches.append([])
            prompt, widest = len(pairs[i].prompt_ids), longest[i]
            sizes.append(0)
            size = 2 * (prompt + widest)
        batches[-1].append(i)
        completion, sizes[-1] = widest, size
    return [batches[i] for i in sorted(range(len(batches)), key=lambda i: (-sizes[i], i))]


def _in_row(completions: Iterable[tuple[int, ...]]) -> int:
    return sum(len(completion) - 1 for completion in completions)


def make_batch(pairs: Sequence[TokenizedPair], pad_id: int, reading: Reading) -> Batch:
    """Make the batch that a model of this reading takes."""
    if reading == "packed":
        return pack_pairs(pairs)
    return cache_pairs(pairs, pad_id) if reading == "cached" else pad_pairs(pairs, pad_id)


Groups = Mapping[tuple[int, ...], Mapping[tuple[int, ...], int]]
"""Each distinct prompt's distinct completions, and their numbers"""


def _distinct(pairs: Sequence[TokenizedPair]) -> tuple[Groups, list[int]]:
    """Group prompts and completions; give the completion's number of the P chosen, then of the P rejected ones."""
    groups: dict[tuple[int, ...], dict[tuple[int, ...], int]] = {}
    slots: list[int] = []
    count = 0
    for prompt, completion in _sequences(pairs):
        known = groups.setdefault(prompt, {})
        if completion not in known:
            known[completion] = count
            count += 1
        slots.append(known[completion])
    return groups, slots


def _expand_index(slots: Sequence[int], targets: Sequence[tuple[int, ...]]) -> torch.Tensor | None:
    """Index the tokens of the distinct completions for each completion; None if all are distinct."""
    if len(targets) == len(slots):
        return None
    starts = np.cumsum([0, *(len(target) for target in targets)])
    return torch.from_numpy(np.concatenate([np.arange(starts[slot], starts[slot + 1]) for slot in slots]))


def pack_pairs(pairs: Sequence[TokenizedPair]) -> Batch:
    """Pack the pairs into one row, which holds equal prompts and completions once."""
    groups, slots = _distinct(pairs)
    count = max(slots) + 1
    row: list[int] = []
    positions: list[npt.NDArray[np.int64]] = []
    logit_positions: list[npt.NDArray[np.int64]] = [np.empty(0, np.int64)] * count
    targets: list[tuple[int, ...]] = [()] * count
    layout = []
    for prompt, completions in groups.items():
        last = len(row) + len(prompt) - 1
        row.extend(prompt)
        positions.append(np.arange(len(prompt)))
        # The longest first, since attention computes the prompt together with it.
        ordered = sorted(completions, key=lambda completion: -len(completion))
        for completion in ordered:
            start = len(row)
            row.extend(completion[:-1])
            positions.append(np.arange(len(prompt), len(prompt) + len(completion) - 1))
            # The prompt's last token predicts the first of each completion.
            logit_positions[completions[completion]] = np.concatenate([[last], np.arange(start, len(row))])
            targets[completions[completion]] = completion
        layout.append((len(prompt), tuple(len(completion) - 1 for completion in ordered)))
    lengths, num_tokens = _counts(pairs)
    return Batch(
        input_ids=torch.tensor([row]),
        logit_positions=torch.from_numpy(np.concatenate(logit_positions)),
        targets=torch.tensor([id for target in targets for id in target]),
        expand_index=_expand_index(slots, targets),
        lengths=lengths,
        num_tokens=num_tokens,
        position_ids=torch.from_numpy(np.concatenate(positions))[None],
        layout=Layout(tuple(layout)),
    )


def cache_pairs(pairs: Sequence[TokenizedPair], pad_id: int) -> Batch:
    """Stack the distinct prompts, padded on the left, and their distinct completions in two blocks, on the right."""
    groups, slots = _distinct(pairs)
    prompts = [torch.tensor(prompt) for prompt in groups]
    # Row of the prompt, completion, and its number; the longest first.
    rows = sorted(
        ((r, *item) for r, completions in enumerate(groups.values()) for item in completions.items()),
        key=lambda row: -len(row[1]),
    )
    lengths = [len(completion) - 1 for _, completion, _ in rows]
    # Two blocks hold far less padding than one; a third saves little.
    cut = min(range(1, len(rows) + 1), key=lambda k: k * lengths[0] + sum(lengths[k : k + 1]) * (len(rows) - k))
    positions: list[torch.Tensor] = [torch.empty(0)] * len(rows)
    targets: list[tuple[int, ...]] = [()] * len(rows)
    continuations = []
    offset = len(prompts)
    for block in (rows[:cut], rows[cut:]):
        width = len(block[0][1]) - 1 if block else 0
        for i, (prompt, completion, number) in enumerate(block):
            start = offset + i * width
            # The prompt's last token predicts the first of each completion.
            positions[number] = torch.tensor([prompt, *range(start, start + len(completion) - 1)])
            targets[number] = completion
        if width:
            ids = [torch.tensor(completion[:-1], dtype=torch.int64) for _, completion, _ in block]
            mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
            stacked = pad_sequence(ids, batch_first=True, padding_value=pad_id)
            continuations.append(Continuation(stacked, mask, torch.tensor([prompt for prompt, _, _ in block])))
            offset += stacked.numel()
    lengths_of_pairs, num_tokens = _counts(pairs)
    return Batch(
        input_ids=pad_sequence(prompts, batch_first=True, padding_value=pad_id, padding_side="left"),
        logit_positions=torch.cat(positions),
        targets=torch.tensor([id for target in targets for id in target]),
        expand_index=_expand_index(slots, targets),
        lengths=lengths_of_pairs,
        num_tokens=num_tokens,
        attention_mask=pad_sequence([torch.ones_like(p) for p in prompts], batch_first=True, padding_side="left"),
        continuations=tuple(continuations),
    )


def pad_pairs(pairs: Sequence[TokenizedPair], pad_id: int) -> Batch:
    """Pad the pairs on the right: rows 0 to P-1 are the chosen sequences, P to 2P-1 the rejected ones."""
    rows = _sequences(pairs)
    ids = [torch.tensor([*prompt, *completion]) for prompt, completion in rows]
    input_ids = pad_sequence(ids, batch_first=True, padding_value=pad_id)
    first = [i * input_ids.shape[1] + len(prompt) - 1 for i, (prompt, _) in enumerate(rows)]
    lengths, num_tokens = _counts(pairs)
    return Batch(
        input_ids=input_ids,
        logit_positions=torch.cat([torch.arange(n) + start for n, start in zip(lengths.tolist(), first, strict=True)]),
        targets=torch.tensor([id for _, completion in rows for id in completion]),
        expand_index=None,
        lengths=lengths,
        num_tokens=num_tokens,
        attention_mask=pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
    )


def _sequences(pairs: Sequence[TokenizedPair]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Give prompt and completion of the P chosen, then of the P rejected sequences."""
    return [
        (tuple(p.prompt_ids), tuple(completion))
        for completions in ([p.chosen_ids for p in pairs], [p.rejected_ids for p in pairs])
        for p, completion in zip(pairs, completions, strict=True)
    ]


def _counts(pairs: Sequence[TokenizedPair]) -> tuple[torch.Tensor, torch.Tensor]:
    """Give `lengths` and `num_tokens` of a batch."""
    lengths = torch.tensor([*(len(p.chosen_ids) for p in pairs), *(len(p.rejected_ids) for p in pairs)])
    prompts = torch.tensor([len(p.prompt_ids) for p in pairs])
    return lengths, 2 * prompts + torch.add(*lengths.chunk(2))
