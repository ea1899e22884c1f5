"""Write the file of reference log-probs that open-instruct keeps beside a tokenized dataset.

It is a torch file with `chosen_logps` and `rejected_logps`, [N] float32, by the rows' `index`, as `TensorCache` of its
`open_instruct/model_utils.py` writes. Rows are found by their token ids, so a score never goes to another pair.
"""

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.base.errors import ConfigError, DataError, number_of
from pipeline.base.progress import say
from pipeline.data.tokens import TokenizedPair, pair_key
from stages.export.scored import ScoredSet

__all__ = ["write"]

_COLUMNS = ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")
_NOT_SCORED = -100
"""Label of a token that is not trained on"""


def write(sets: Iterable[ScoredSet], tokenized: Path, file: Path, *, averages: bool) -> None:
    """Write the log-probs of every row of open-instruct's dataset, which `tokenized` names.

    Args:
        sets: Sets among which the rows are looked for.
        tokenized: Folder of the dataset, with token ids and labels.
        file: File to write.
        averages: Divide each sum by the completion's tokens, as open-instruct's `dpo_norm` does.

    Raises:
        ConfigError: The folder is not a tokenized dataset of preferences.
        DataError: A row is not a scored pair, token by token, or its `index` is not that of a row.
        OSError: The disk is full or failing.
    """
    import torch

    dataset = _open(tokenized)
    found: dict[bytes, tuple[float, float]] = {}
    for scored in sets:
        for row in scored:
            pair = row.kept.pair
            lengths = (len(pair.chosen_ids), len(pair.rejected_ids)) if averages else (1, 1)
            found[pair_key(pair)] = (row.chosen_logps / lengths[0], row.rejected_logps / lengths[1])
    logps = np.full((2, len(dataset)), np.nan, dtype=np.float32)
    missing: list[int] = []
    for position, row in enumerate(dataset):
        key = _key_of(row)
        if key not in found:
            missing.append(position)
            continue
        at = row.get("index", position)
        if not isinstance(at, int) or not 0 <= at < len(dataset) or np.isfinite(logps[0, at]):
            raise DataError(f"{tokenized}, row {position}: index must be a row's own number, got {at}")
        logps[:, at] = found[key]
    if missing:
        raise DataError(
            f"{tokenized}: {number_of(len(missing), 'row')} of {len(dataset):,} are not pairs of this run, token by "
            f"token (first: row {missing[0]}). Use open-instruct's chat template in policy.model, its max_seq_length "
            "as data.max_length, and the same data. If there are conversations of several turns, let it tokenize with "
            "preference_tulu_tokenize_and_truncate_v1_2, which scores the last turn alone"
        )
    content = io.BytesIO()
    torch.save({f"{side}_logps": torch.from_numpy(logps[i]) for i, side in enumerate(("chosen", "rejected"))}, content)
    # Not by torch, whose error for a full disk is no OSError.
    file.write_bytes(content.getbuffer())
    kind = "averages over tokens, for dpo_norm" if averages else "sums, for dpo and wpo"
    say(f"{number_of(len(dataset), 'row')} of {tokenized}: {kind}")


def _open(folder: Path) -> Any:
    import datasets

    try:
        dataset = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"--tokenized: must be a datasets folder, got {folder}") from error
    columns = getattr(dataset, "column_names", None)
    if not isinstance(columns, list) or set(_COLUMNS) - set(columns):
        raise ConfigError(f"--tokenized: must have the columns {', '.join(_COLUMNS)}, got {folder} without them")
    return dataset.select_columns([*_COLUMNS, *({"index"} & set(columns))]).with_format(None)


def _key_of(row: Mapping[str, Any]) -> bytes | None:
    """Give the key of a tokenized row; None if its scored tokens are not the ends of two sequences of one prompt."""
    halves = []
    for side in ("chosen", "rejected"):
        ids, labels = list(row[f"{side}_input_ids"]), list(row[f"{side}_labels"])
        start = next((i for i, label in enumerate(labels) if label != _NOT_SCORED), len(labels))
        if labels[start:] != ids[start:]:
            return None
        halves.append((ids[:start], ids[start:]))
    (prompt, chosen), (other, rejected) = halves
    if prompt != other:
        return None
    return pair_key(TokenizedPair(prompt_ids=prompt, chosen_ids=chosen, rejected_ids=rejected))
