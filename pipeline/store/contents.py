"""Read a store's columns, finished or not, and sum them up as JSON. Needs pyarrow, numpy and fastjsonschema only."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.base import statistics
from pipeline.base.errors import DataError, number_of
from pipeline.base.folders import Folder
from pipeline.data.intake import Ledger
from pipeline.models.precision import recorded_precision
from pipeline.scoring.agreement import NoiseFloor
from pipeline.store import ranking
from pipeline.store.format import pair_keys, schema
from pipeline.store.ranking import PairColumns
from pipeline.store.store import Store, load_store, read_checked_part

__all__ = [
    "Block",
    "Contents",
    "describe",
    "identity_facts",
    "length_block",
    "margin_note",
    "read_contents",
    "suspicious_blocks",
]

_COLUMNS = schema(token_logps=False).names
_EXAMPLES = 20
"""Examples of each kind of suspicious pairs"""
_READERS = 8
"""Parts read at once: computing digests releases the interpreter's lock, and a network has latency"""


@dataclass(frozen=True, kw_only=True)
class Contents:
    """Counts and columns of a store's parts; of an unfinished store, those that are there."""

    store: Store
    totals: Ledger
    noise: NoiseFloor
    bytes: int
    """Size of all parts"""
    pairs: PairColumns


def read_contents(folder: Folder) -> Contents:
    """Read a store's columns, but not its token logps, and check every part's digest.

    Raises:
        DataError: A file is damaged, or a value is impossible.
        IdentityError: A part is another run's.
        StorageError: A part can't be read.
    """
    store = load_store(folder)
    # The first error cancels the others.
    with ThreadPoolExecutor(_READERS) as readers:
        parts = list(readers.map(lambda unit: read_checked_part(store, unit, _COLUMNS), store.units))
    totals, noise = Ledger(), NoiseFloor()
    for part in parts:
        totals.add(part.ledger.as_dict())
        noise += part.noise
    pairs = _to_columns(folder, [part.table for part in parts])
    return Contents(store=store, totals=totals, noise=noise, bytes=sum(part.size for part in parts), pairs=pairs)


def _to_columns(folder: Folder, tables: Sequence[pa.Table]) -> PairColumns:
    # Not by empty_table and to_numpy: they import pandas, which takes longer than all the rest.
    together = pa.concat_tables([pa.Table.from_batches([], schema(token_logps=False)), *tables])

    def column(name: str, dtype: Any) -> npt.NDArray[Any]:
        values = together[name].cast(pa.from_numpy_dtype(dtype)).combine_chunks()
        return np.frombuffer(values.buffers()[1], dtype)[values.offset :][: len(values)]

    pairs = PairColumns(
        keys=pair_keys(together),
        rows=column("row", np.int64),
        parts=np.repeat(np.arange(len(tables)), [len(table) for table in tables]),
        prompt_tokens=column("prompt_tokens", np.int64),
        chosen_tokens=column("chosen_tokens", np.int64),
        rejected_tokens=column("rejected_tokens", np.int64),
        chosen_logps=column("ref_chosen_logps", np.float64),
        rejected_logps=column("ref_rejected_logps", np.float64),
    )
    fit = np.isfinite(pairs.chosen_logps) & np.isfinite(pairs.rejected_logps)
    fit &= (pairs.chosen_tokens > 0) & (pairs.rejected_tokens > 0)
    if not fit.all():
        raise DataError(
            f"{folder}: row {pairs.rows[~fit][0]} has no tokens, or a log-prob that is not finite. "
            f"refshard verify {folder} names all that is wrong"
        )
    return pairs


def describe(contents: Contents) -> dict[str, Any]:
    """Sum a store up for JSON: counts, lengths, the reference's margins, and suspicious pairs."""
    store, pairs = contents.store, contents.pairs
    first = ranking.first_of_each(pairs.keys)
    margins, per_token = ranking.margins(pairs), ranking.margins_per_token(pairs)
    difference = ranking.length_differences(pairs)
    return {
        "store": str(store.folder),
        "finished": store.unfinished is None,
        "fingerprint": store.manifest["fingerprint"],
        "identity": store.manifest["identity"],
        "declared": store.manifest["declared"],
        "totals": contents.totals.as_dict(),
        "noise": vars(contents.noise),
        "parts": len(store.units),
        "bytes": contents.bytes,
        "pairs": len(pairs),
        "duplicates": int((first != np.arange(len(pairs))).sum()),
        "tokens": {
            side: statistics.percentiles(tokens) | {"total": int(tokens.sum())}
            for side, tokens in (
                ("prompt", pairs.prompt_tokens),
                ("chosen", pairs.chosen_tokens),
                ("rejected", pairs.rejected_tokens),
            )
        },
        "reference_margin": {
            **_spread(margins),
            "share_chosen_preferred": statistics.share_positive(margins),
            "share_chosen_preferred_per_token": statistics.share_positive(per_token),
        },
        "reference_margin_per_token": _spread(per_token),
        "share_chosen_longer": statistics.share_positive(difference),
        "length_bias": {
            "correlation": statistics.correlation(margins, difference),
            "correlation_per_token": statistics.correlation(per_token, difference),
            "longer": ranking.longer_sides(pairs),
        },
        "suspicious": _suspicious(pairs, first, contents.noise),
    }


def _spread(values: npt.NDArray[np.float64]) -> dict[str, float | None]:
    return {**statistics.percentiles(values), "mean": float(values.mean()) if len(values) else None}


def _suspicious(pairs: PairColumns, first: npt.NDArray[np.int64], noise: NoiseFloor) -> dict[str, Any]:
    """Count each kind of suspicious pairs, and give examples by their rows."""
    repeats = np.flatnonzero(first != np.arange(len(pairs)))
    same = ranking.same_on_both_sides(pairs)
    swaps = ranking.likely_swapped(pairs, first, noise.mean)
    return {
        "likely_mislabelled": [_pair(pairs, i) for i in ranking.worst(pairs, _EXAMPLES)],
        "duplicates": {
            "count": len(repeats),
            "examples": [
                {"row": int(pairs.rows[first[i]]), "again_in_row": int(pairs.rows[i])} for i in repeats[:_EXAMPLES]
            ],
        },
        "same_on_both_sides": {"count": len(same), "rows": pairs.rows[same[:_EXAMPLES]].tolist()},
        "likely_swapped": {
            "count": len(swaps.indexes),
            "coincide_in_the_same_order": swaps.same_order,
            "tolerance_per_token": swaps.tolerance,
            "examples": [[_pair(pairs, i) for i in both] for both in swaps.indexes[:_EXAMPLES]],
        },
    }


def _pair(pairs: PairColumns, i: np.int64) -> dict[str, Any]:
    chosen, rejected = float(pairs.chosen_logps[i]), float(pairs.rejected_logps[i])
    chosen_tokens, rejected_tokens = int(pairs.chosen_tokens[i]), int(pairs.rejected_tokens[i])
    return {
        "row": int(pairs.rows[i]),
        "margin": chosen - rejected,
        "margin_per_token": chosen / chosen_tokens - rejected / rejected_tokens,
        "prompt_tokens": int(pairs.prompt_tokens[i]),
        "chosen_tokens": chosen_tokens,
        "rejected_tokens": rejected_tokens,
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }


def _described_reference(reference: Mapping[str, Any]) -> str:
    if "declared" in reference:
        return "declared by name, weights unknown"
    quantization = f", {reference['quantization']['bits']} bits" if reference.get("quantization") else ""
    return f"{recorded_precision(reference)}{quantization}, weights {reference['weights'][:12]}"


def identity_facts(entry: Mapping[str, Any]) -> dict[str, str]:
    """Give the lines of text on a store's reference, dataset, and size; `entry` is the result of `describe`."""
    identity, declared = entry["identity"], entry["declared"]
    totals = Ledger()
    totals.add(dict(entry["totals"]))
    reference, tokenization = identity["reference"], identity["tokenization"]
    stored = "stored" if tokenization["token_logps"] else "not stored"
    noise, measured = entry["noise"], "not measured"
    if noise["tokens"]:
        measured = f"{noise['mean']:.2g} nats per token, {noise['largest']:.2g} at most"
        measured += f" ({noise['tokens']:,} tokens scored twice)"
    found = {"reference": f"{declared.get('reference', 'unknown')} ({_described_reference(reference)})"}
    if declared.get("reference_adapter") and reference.get("adapter"):
        found["adapter"] = f"{declared['reference_adapter']} ({reference['adapter'][:12]})"
    found |= {
        "dataset": f"{declared.get('dataset', 'unknown')}",
        "fingerprint": entry["fingerprint"],
        **({"template date": tokenization["template_date"]} if "template_date" in tokenization else {}),
        "max_length": f"{tokenization['max_length']}, token logps {stored}",
        "noise floor": measured,
        "rows": totals.summary(),
        "pairs": f"{entry['pairs']:,} in {number_of(entry['parts'], 'part')}, {_size(entry['bytes'])}; "
        f"{entry['duplicates']:,} are duplicates of another",
    }
    return found


def _size(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB" if count >= 2**20 else f"{count / 2**10:,.1f} KiB"


@dataclass(frozen=True)
class Block:
    """A paragraph for a terminal or a page, and the table under it, if any."""

    text: str
    header: Sequence[str] = ()
    rows: Sequence[Sequence[object]] = ()
    """Cells: numbers, and text"""


def margin_note(entry: Mapping[str, Any]) -> str:
    """Say how often the reference prefers the chosen completion, and define the margin."""
    margin = entry["reference_margin"]
    return (
        f"The reference itself prefers the chosen completion in {margin['share_chosen_preferred']:.1%} of the pairs, "
        f"per token in {margin['share_chosen_preferred_per_token']:.1%}. A margin is log p(chosen) minus "
        "log p(rejected) under the reference. A margin per token is the difference of the completions' mean token "
        "log-probs."
    )


def length_block(entry: Mapping[str, Any]) -> Block:
    """Show how far the lengths explain the reference's preferences."""
    text = (
        f"The chosen completion is longer in {entry['share_chosen_longer']:.1%} of the pairs. Longer completions "
        "have lower sums, so the reference seems to prefer short ones. The margin per token removes this effect."
    )
    bias = entry["length_bias"]
    if bias["correlation"] is not None and bias["correlation_per_token"] is not None:
        text += f" Correlation of the margin with the difference in length: {bias['correlation']:+z.2f} "
        text += f"({bias['correlation_per_token']:+z.2f} per token)."
    rows = []
    for longer, found in bias["longer"].items():
        shares = (found["share_chosen_preferred"], found["share_chosen_preferred_per_token"])
        rows.append([longer, found["pairs"], *("" if share is None else f"{share:.1%}" for share in shares)])
    return Block(text, ["longer completion", "pairs", "prefers chosen", "per token"], rows)


def suspicious_blocks(entry: Mapping[str, Any], most: int = _EXAMPLES) -> Iterator[Block]:
    """Yield each kind of suspicious pairs, with at most so many examples, and a command to look at one."""
    found = entry["suspicious"]
    if worst := found["likely_mislabelled"]:
        text = (
            "Likely mislabelled: the reference gives the rejected completion more probability, in sum and per token. "
            "The lowest margins per token come first. The reference itself may be wrong about these pairs."
        )
        yield _pairs_block(text, worst[:most])
    duplicates, same, swapped = found["duplicates"], found["same_on_both_sides"], found["likely_swapped"]
    if count := duplicates["count"]:
        listed = ", ".join(f"row {e['again_in_row']} equals row {e['row']}" for e in duplicates["examples"][:most])
        yield Block(f"Duplicates of an earlier pair (equal keys): {count:,}; {listed}{_more(count, most)}")
    if count := same["count"]:
        text = f"The same completion on both sides, as scored (equal lengths and sums): {count:,}; row "
        yield Block(text + ", ".join(map(str, same["rows"][:most])) + _more(count, most))
    if count := swapped["count"]:
        text = (
            f"Likely swapped: {count:,}. An earlier pair has the same three lengths, and the same sums within "
            f"{swapped['tolerance_per_token']:.1g} nats a token, with chosen and rejected exchanged."
        )
        if others := swapped["coincide_in_the_same_order"]:
            text += f" Without an exchange, {others:,} other pairs match, so about as many of these may be chance."
        yield _pairs_block(text, [pair for both in swapped["examples"][: most // 2] for pair in both])
    if worst or duplicates["count"] or same["count"] or swapped["count"]:
        # A store's folder is named after its set.
        name = str(entry["store"]).rstrip("/").rpartition("/")[2]
        option = "" if name in ("train", ".", "..") else f" --set {shlex.quote(name)}"
        command = f"refshard explain --config F{option} --row N"
        yield Block(f"Look at a pair before you drop it: {command}")


def _pairs_block(text: str, pairs: Sequence[Mapping[str, Any]]) -> Block:
    columns = {
        "margin per token": "margin_per_token",
        "margin": "margin",
        "prompt tokens": "prompt_tokens",
        "chosen tokens": "chosen_tokens",
        "chosen, nats": "ref_chosen_logps",
        "rejected tokens": "rejected_tokens",
        "rejected, nats": "ref_rejected_logps",
    }
    # A row's number stands as a user types it, without commas.
    return Block(text, ["row", *columns], [[str(p["row"]), *(p[key] for key in columns.values())] for p in pairs])


def _more(count: int, most: int) -> str:
    return f" and {count - most:,} more" if count > most else ""
