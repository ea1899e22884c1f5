"""Collate joined rows to a batch: packed or padded token ids, and the reference log-probs of its pairs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from pipeline.data.tokens import TokenizedPair, truncate
from pipeline.scoring.packing import Batch, make_batch
from pipeline.store.reference_table import TokenLogps

__all__ = ["Collator", "JoinedBatch"]


@dataclass(frozen=True, kw_only=True)
class JoinedBatch:
    """A micro-batch of P pairs with N completion tokens.

    It moves itself between devices. If its fields were entries of the batch, transformers would round them to the
    policy's dtype under DeepSpeed, reference logps included.
    """

    batch: Batch
    ids: torch.Tensor
    """Row in the source, the pair's key as two integers, and the number of its training set, [P, 4] int64"""
    ref_chosen_logps: torch.Tensor
    """Reference logps of the chosen completions, [P] float32, nats"""
    ref_rejected_logps: torch.Tensor
    """Reference logps of the rejected completions, [P] float32, nats"""
    truncated: torch.Tensor
    """True for a pair with a truncated completion, [P] bool"""
    ref_token_logps: torch.Tensor | None
    """Reference token logps in the scorer's order, [N] float32, nats; None where sums alone are stored"""
    weights: torch.Tensor | None = None
    """How often each pair counts, [P] float32; None if the data does not say it"""
    margins: torch.Tensor | None = None
    """Margin of each pair, [P] float32; None if the data does not say it"""

    def to(self, device: torch.device) -> "JoinedBatch":
        return self._each(lambda part: part.to(device, non_blocking=True) if torch.is_tensor(part) else part.to(device))

    def pin_memory(self) -> "JoinedBatch":
        """Called by the data loader, so that moving to a GPU overlaps with work."""
        return self._each(lambda part: part.pin_memory())

    def _each(self, change: Callable[[Any], Any]) -> "JoinedBatch":
        changed: dict[str, Any] = {n: None if part is None else change(part) for n, part in vars(self).items()}
        return JoinedBatch(**changed)


@dataclass(frozen=True)
class Collator:
    """Collates rows of the joined set to one micro-batch. Not a closure: loader processes may have to unpickle it."""

    pad_id: int
    max_length: int | None
    """The `data.max_length` that the pairs were joined with"""
    token_logps: TokenLogps | None = None
    """File that the rows' `token_start` counts in; without it, `ref_token_logps` is None"""
    packed: bool = field(kw_only=True)
    """Pack the pairs into one row, which the model must be able to read; otherwise pad them"""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        pairs = []
        for row in rows:
            whole = TokenizedPair(
                prompt_ids=row["prompt_ids"], chosen_ids=row["chosen_ids"], rejected_ids=row["rejected_ids"]
            )
            pair = truncate(whole, self.max_length)
            assert pair is not None, f"row {row['row']} should have been dropped: its prompt fills max_length"
            pairs.append(pair)
        joined = JoinedBatch(
            batch=make_batch(pairs, self.pad_id, "packed" if self.packed else "padded"),
            ids=torch.tensor(
                [[row["row"], *np.frombuffer(row["pair_key"], "<i8").tolist(), row.get("set", 0)] for row in rows]
            ),
            ref_chosen_logps=torch.tensor([row["ref_chosen_logps"] for row in rows], dtype=torch.float32),
            ref_rejected_logps=torch.tensor([row["ref_rejected_logps"] for row in rows], dtype=torch.float32),
            truncated=torch.tensor([row["truncated"] for row in rows]),
            ref_token_logps=self._ref_token_logps(rows, pairs),
            weights=_numbers(rows, "weight"),
            margins=_numbers(rows, "margin"),
        )
        # The libraries take the number of pairs from the first entry.
        return {"rows": torch.tensor([row["row"] for row in rows]), "joined": joined}

    def _ref_token_logps(
        self, rows: Sequence[Mapping[str, Any]], pairs: Sequence[TokenizedPair]
    ) -> torch.Tensor | None:
        """Read the reference's token logps, all chosen completions and then all rejected ones: [N] float32."""
        if self.token_logps is None or "token_start" not in rows[0]:
            return None
        sides: tuple[list[Any], list[Any]] = ([], [])
        for row, pair in zip(rows, pairs, strict=True):
            chosen, both = len(pair.chosen_ids), len(pair.chosen_ids) + len(pair.rejected_ids)
            # An unscored pair has none. The loader may fetch it ahead; the loss refuses it.
            unscored = row["token_start"] < 0
            values = np.full(both, np.nan, np.float32) if unscored else self.token_logps.read(row["token_start"], both)
            sides[0].append(values[:chosen])
            sides[1].append(values[chosen:])
        return torch.from_numpy(np.concatenate([*sides[0], *sides[1]]))


def _numbers(rows: Sequence[Mapping[str, Any]], name: str) -> torch.Tensor | None:
    """Give a number of each row, [P] float32; None if the rows have no such column."""
    return torch.tensor([row[name] for row in rows], dtype=torch.float32) if name in rows[0] else None
