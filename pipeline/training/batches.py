"""Collate joined rows to a batch: packed or padded token ids, and the reference log-probs of its pairs."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from pipeline.data.tokens import TokenizedPair, truncate
from pipeline.scoring.packing import make_batch
from pipeline.store.reference_table import TokenLogps

__all__ = [
    "make_collator",
]


def make_collator(pad_id: int, max_length: int | None, token_logps: TokenLogps | None = None, *, packed: bool) -> Any:
    """Make the function that turns rows of the joined set into one micro-batch.

    Args:
        pad_id: What padding is filled with, where there is any.
        max_length: As the pairs were joined.
        token_logps: The file that the rows' `token_start` counts in; without it there are no `ref_token_logps`.
        packed: Pack the pairs into one row, if the model can read that; otherwise pad them.
    """

    # Not a function in a function: loader processes that are not forks get it as a pickle.
    return functools.partial(_collate, pad_id=pad_id, max_length=max_length, token_logps=token_logps, packed=packed)


def _collate(
    rows: Sequence[Mapping[str, Any]],
    *,
    pad_id: int,
    max_length: int | None,
    token_logps: TokenLogps | None,
    packed: bool,
) -> dict[str, Any]:
    pairs = []
    for row in rows:
        whole = TokenizedPair(
            prompt_ids=row["prompt_ids"], chosen_ids=row["chosen_ids"], rejected_ids=row["rejected_ids"]
        )
        pair = truncate(whole, max_length)
        if pair is None:
            raise AssertionError(f"row {row['row']} should have been dropped: its prompt fills max_length")
        pairs.append(pair)
    # The first entry tells the library how many pairs there are.
    columns: dict[str, Any] = {
        "ref_chosen_logps": torch.tensor([row["ref_chosen_logps"] for row in rows], dtype=torch.float32),
        "ref_rejected_logps": torch.tensor([row["ref_rejected_logps"] for row in rows], dtype=torch.float32),
        "truncated": torch.tensor([row["truncated"] for row in rows], dtype=torch.float32),
        "batch": make_batch(pairs, pad_id, packed=packed),
    }
    if token_logps is not None and "token_start" in rows[0]:
        # [N], in the order in which the scorer gives the policy's
        columns["ref_token_logps"] = _ref_token_logps(rows, pairs, token_logps)
    return columns


def _ref_token_logps(
    rows: Sequence[Mapping[str, Any]], pairs: Sequence[TokenizedPair], token_logps: TokenLogps
) -> torch.Tensor:
    """Read the reference's token logps: all chosen completions', then all rejected ones', [N] float32."""
    sides: tuple[list[Any], list[Any]] = ([], [])
    for row, pair in zip(rows, pairs, strict=True):
        chosen, both = len(pair.chosen_ids), len(pair.chosen_ids) + len(pair.rejected_ids)
        # A pair that was not scored has none; the loader may fetch it ahead, but the loss refuses it.
        unscored = row["token_start"] < 0
        values = np.full(both, np.nan, np.float32) if unscored else token_logps.read(row["token_start"], both)
        sides[0].append(values[:chosen])
        sides[1].append(values[chosen:])
    return torch.from_numpy(np.concatenate([*sides[0], *sides[1]]))
