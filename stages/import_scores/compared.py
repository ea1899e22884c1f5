"""Score some of the imported pairs here with the reference, and report how far the imported scores are from these."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.base.errors import number_of
from pipeline.base.progress import say
from pipeline.config.schema import Config
from pipeline.data.intake import KeptPair
from pipeline.models.files import in_one_process, reference_sources
from pipeline.models.precision import recorded_precision
from pipeline.store.format import ScoredPair, SummedPair

__all__ = ["report_differences"]


def report_differences(
    config: Config,
    tokenizer: Any,
    reference: Mapping[str, Any],
    imported: Sequence[tuple[KeptPair, ScoredPair | SummedPair]],
    count: int,
) -> None:
    """Say how far the scores of up to `count` pairs, evenly spread, are from the reference's.

    Engines differ by their kernels, dtypes and caches. Nothing is refused: the parity gate of stage two is the judge.

    Args:
        config: The run's settings.
        tokenizer: The policy's tokenizer.
        reference: The reference, as the store's identity has it.
        imported: Pairs and their imported scores.
        count: Number of pairs to score.

    Raises:
        ConfigError: The reference can't be loaded or scored.
        DataError: A weight file is damaged.
    """
    if config.reference.declared is not None:
        say(f"Not compared: the reference is known by name alone (reference.declared: {config.reference.declared})")
        return
    from pipeline.scoring.agreement import NoiseFloor, allowed_gap, compare, completion_gap, distance_from_start
    from pipeline.scoring.scorer import load_scorer

    at = np.unique(np.linspace(0, len(imported) - 1, min(count, len(imported))).round().astype(int))
    sample = [imported[i] for i in at]
    name, pairs = reference_sources(config)[0].name, number_of(len(sample), "pair")
    say(f"Loading the reference {name}, to score {pairs} (--sample 0 leaves this out) ...")
    gaps, sums = [], np.zeros((len(sample), 2))
    with load_scorer(in_one_process(config), tokenizer, tokens_per_batch=2048) as scorer:
        for i, *logps in scorer.logps([kept.pair for kept, _ in sample]):
            theirs = sample[i][1]
            for side, (which, found) in enumerate(zip(("chosen", "rejected"), logps, strict=True)):
                tokens = getattr(theirs, f"{which}_token_logps", None)
                total = float(tokens.sum(dtype=np.float64) if tokens is not None else getattr(theirs, f"{which}_logps"))
                gaps.append(completion_gap(found, tokens, total))
                sums[i, side] = found.sum(dtype=np.float64) - total
    in_8_bits = (reference.get("quantization") or {}).get("bits") == 8
    allowed = allowed_gap(NoiseFloor(), recorded_precision(reference).products, in_8_bits=in_8_bits)
    found_gap = compare(gaps, allowed)
    say(f"Compared with {pairs} scored here: {found_gap}")
    say(
        f"  sums of completions differ by {np.abs(sums).mean():.2g} nats on average; the reference's minus the "
        f"imported ones are {sums.mean():+.2g}"
    )
    margins = (sums[:, 0] - sums[:, 1]).tolist()
    say(f"  a policy equal to the reference: {distance_from_start(margins, config.loss.beta)}")
    if not found_gap.agrees:
        say(
            "  this is more than rounding, and the parity gate stops a policy that begins as this reference. If the "
            "engine computes otherwise on purpose, set reference.declared to a name and import again with --overwrite"
        )
