"""Units of a store, scored as stage one scores them."""

from typing import Any

from pipeline.base.signals import StopFlag
from pipeline.data.intake import KeptPair
from stages import precompute


def score_unit(model: Any, pairs: list[KeptPair], budget: int, *, packed: bool) -> tuple[list[Any], int]:
    """What stage one makes of a unit, and the budget that it ended with."""
    reference = object.__new__(precompute._Reference)
    reference._model, reference._pad_id, reference._packed = model, 0, packed
    reference._tokens_per_batch = budget
    scored, _ = reference.score_unit(pairs, StopFlag(), lambda pair: None)
    return scored, reference._tokens_per_batch
