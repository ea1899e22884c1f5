"""Units of a store, scored as stage one scores them."""

from typing import Any

from pipeline.base.digests import WatchedFiles
from pipeline.base.signals import StopFlag
from pipeline.data.intake import KeptPair
from pipeline.scoring.packing import Reading
from pipeline.scoring.scorer import Scorer
from stages.precompute import worker


def score_unit(model: Any, pairs: list[KeptPair], budget: int, reading: Reading = "packed") -> tuple[list[Any], int]:
    """What stage one makes of a unit, and the budget that it ended with."""
    reference = object.__new__(worker.Reference)
    reference._config, reference._positions, reference._files = None, None, WatchedFiles([])
    reference._scorer = Scorer(model=model, reading=reading, pad_id=0, key="reference.model", tokens_per_batch=budget)
    counted: list[KeptPair] = []
    scored, _ = reference.score_unit(pairs, StopFlag(), counted.append)
    assert sorted(pair.row for pair in counted) == [pair.row for pair in pairs]
    return scored, reference._scorer.fit()
