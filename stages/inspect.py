"""What is in a store: who the reference is, counts, lengths, how the reference itself ranks the pairs.

Needs pyarrow and numpy only, so it answers on any machine, at once.
"""

import json
from collections.abc import Mapping
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from pipeline.errors import UnfinishedError, printable
from pipeline.intake import Ledger
from pipeline.shards import Store, find_stores, open_store, read_parts

__all__ = ["describe_store", "run"]

_COLUMNS = (
    "pair_key",
    "prompt_tokens",
    "chosen_tokens",
    "rejected_tokens",
    "ref_chosen_logps",
    "ref_rejected_logps",
)
_PERCENTILES = (5, 25, 50, 75, 95)


def run(where: str, *, as_json: bool) -> None:
    """Print what one store holds, or each store of an output folder."""
    unfinished: list[str] = []
    described = []
    for folder in find_stores(where):
        try:
            described.append(describe_store(open_store(folder)))
        except UnfinishedError as error:
            unfinished.append(str(error))
    if as_json:
        click.echo(json.dumps(described, indent=1))
    else:
        click.echo("\n\n".join(_as_text(entry) for entry in described))
    if unfinished:
        raise UnfinishedError("; ".join(unfinished))


def describe_store(store: Store) -> dict[str, Any]:
    """Read a store's columns (not its token logps) and sum them up. Every part's digest is checked on the way."""
    parts = list(read_parts(store, _COLUMNS))
    columns = {name: np.concatenate([part[name].to_numpy() for part in parts]) for name in _COLUMNS[1:]}
    keys = {key for part in parts for key in part["pair_key"].to_pylist()}
    pairs = len(columns["prompt_tokens"])
    margins = columns["ref_chosen_logps"].astype(np.float64) - columns["ref_rejected_logps"].astype(np.float64)
    per_token = {
        side: columns[f"ref_{side}_logps"].astype(np.float64) / columns[f"{side}_tokens"]
        for side in ("chosen", "rejected")
    }
    return {
        "store": str(store.folder),
        "fingerprint": store.fingerprint,
        "identity": store.manifest["identity"],
        "declared": store.manifest["declared"],
        "totals": store.index["totals"],
        "noise": store.index["noise"],
        "parts": len(store.parts),
        "bytes": sum(int(part["bytes"]) for part in store.parts),
        "pairs": pairs,
        "duplicates": pairs - len(keys),
        "tokens": {
            side: _percentiles(columns[f"{side}_tokens"]) | {"total": int(columns[f"{side}_tokens"].sum())}
            for side in ("prompt", "chosen", "rejected")
        },
        "reference_margin": {
            **_percentiles(margins),
            "mean": float(margins.mean()) if pairs else None,
            "share_chosen_preferred": _share_positive(margins),
            "share_chosen_preferred_per_token": _share_positive(per_token["chosen"] - per_token["rejected"]),
        },
        "share_chosen_longer": _share_positive(columns["chosen_tokens"].astype(np.int64) - columns["rejected_tokens"]),
    }


def _percentiles(values: npt.NDArray[Any]) -> dict[str, float]:
    if len(values) == 0:
        return {}
    return {f"p{p}": float(v) for p, v in zip(_PERCENTILES, np.percentile(values, _PERCENTILES), strict=True)}


def _share_positive(values: npt.NDArray[Any]) -> float | None:
    """Share above 0; a tie counts one half."""
    return float((values > 0).mean() + 0.5 * (values == 0).mean()) if len(values) else None


def _described_reference(reference: Mapping[str, Any]) -> str:
    if "declared" in reference:
        return "declared by name, weights unknown"
    quantization = f", {reference['quantization']['bits']} bits" if reference.get("quantization") else ""
    return f"{reference['dtype']}{quantization}, weights {reference['weights'][:12]}"


def _described_noise(noise: Mapping[str, Any]) -> str:
    if not noise["tokens"]:
        return "not measured"
    return f"{noise['mean']:.2g} nats a token, {noise['largest']:.2g} at most ({noise['tokens']:,} tokens scored twice)"


def _as_text(entry: Mapping[str, Any]) -> str:
    identity, declared = entry["identity"], entry["declared"]
    totals = Ledger()
    totals.add(dict(entry["totals"]))
    reference, tokenization = identity["reference"], identity["tokenization"]
    stored = "stored" if tokenization["token_logps"] else "not stored"
    lines = [
        entry["store"],
        f"  reference     {declared.get('reference', 'unknown')} ({_described_reference(reference)})",
    ]
    if declared.get("reference_adapter") and reference.get("adapter"):
        lines.append(f"  adapter       {declared['reference_adapter']} ({reference['adapter'][:12]})")
    lines += [
        f"  dataset       {declared.get('dataset', 'unknown')}",
        f"  fingerprint   {entry['fingerprint']}",
        f"  max_length    {tokenization['max_length']}, token logps {stored}",
        f"  noise floor   {_described_noise(entry['noise'])}",
        f"  rows          {totals.summary()}",
        f"  pairs         {entry['pairs']:,} in {entry['parts']} parts, {entry['bytes'] / 2**20:,.1f} MiB; "
        f"{entry['duplicates']:,} are duplicates of another",
    ]
    if entry["pairs"]:
        margin = entry["reference_margin"]
        header = "".join(f"{f'{p}%':>10}" for p in _PERCENTILES)
        lines += ["", f"  {'':22}{header}"]
        for name, values in (*entry["tokens"].items(), ("margin, nats", margin)):
            label = name if name.startswith("margin") else f"{name} tokens"
            lines.append(f"  {label:22}" + "".join(f"{values[f'p{p}']:>10,.1f}" for p in _PERCENTILES))
        lines += [
            "",
            f"  The reference itself prefers the chosen completion in {margin['share_chosen_preferred']:.1%} of the "
            f"pairs ({margin['share_chosen_preferred_per_token']:.1%} per token); the chosen one is longer in "
            f"{entry['share_chosen_longer']:.1%}.",
            "  margin = log p(chosen) - log p(rejected) under the reference.",
        ]
    return "\n".join(map(printable, lines))
