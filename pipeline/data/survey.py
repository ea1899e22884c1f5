"""Survey a set of pairs before it costs a GPU: lengths, tokens, duplicates, and what people should know of pairs.

Surveys of consecutive rows add up to the survey of them all, so each loader process can make its own. Memory does not
grow with the text: a survey holds counts, a few examples, and 16 bytes a pair to recognize duplicates by.
"""

import itertools
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.data.intake import KeptPair, Outcome
from pipeline.data.pairs import Pair
from pipeline.data.rows import Row
from pipeline.data.tokens import TokenizedPair, adds_bos, num_beginnings

__all__ = ["PERCENTILES", "REASONS", "Example", "Survey", "percentiles"]

PERCENTILES = (5, 25, 50, 75, 95, 99, 100)

REASONS = {
    "prompt_too_long": "the prompt alone fills max_length, so no token is left to score",
    "tie": "no answer is better than the others",
    "truncated": "a completion is cut at max_length",
    "eos_cut": "a completion is cut at max_length, and EOS with it",
    "no_eos": "a completion has no EOS, so the policy does not learn to stop there",
    "doubled_eos": "two EOS in a row",
    "no_bos": "the tokenizer begins a text with BOS, but the pair has none",
    "several_bos": "the pair begins with several BOS in a row",
    "merged_at_the_prompt's_end": "tokens merge across the prompt's end, so the completion starts a little earlier",
    "template_differs": "the chat template renders the prompt differently without the generation prompt",
    "identical": "chosen and rejected are equal",
    "identical_after_truncation": "chosen and rejected are equal after the cut",
    "weight_0": "training leaves the pair out, since its weight is 0",
}
"""Meaning of each remark, for people."""

_MOST_EXAMPLES = 3
_SHOWN = 60
"""Most characters of an example's text."""


@dataclass(frozen=True)
class Example:
    """One row that something was found in."""

    place: str
    row: int
    text: str


@dataclass
class Survey:
    """Counts of the rows so far."""

    batch_pairs: int = 8
    """Pairs per padded batch, to compare packing with."""
    found: Counter[str] = field(default_factory=Counter)
    """Kept pairs by remark (a key of `REASONS`)."""
    examples: dict[str, list[Example]] = field(default_factory=dict)
    """First few rows by remark or reason of a drop."""
    forms: Counter[str] = field(default_factory=Counter)
    """Pairs by form (a key of `FORMS`): how their rows were read."""
    lengths: defaultdict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    """Number of pairs by length in tokens: `prompt`, `chosen`, `rejected` and `total` (prompt and longer completion) of
    every tokenized pair before truncation, `pair` (prompt and both completions) of kept pairs as scored."""
    scored: Counter[str] = field(default_factory=Counter)
    """Tokens of kept pairs after truncation: prompt, chosen, rejected."""
    shared_tokens: int = 0
    """Tokens that stage one computes: each prompt of a unit once."""
    padded_tokens: int = 0
    """Tokens of padded batches of `batch_pairs` pairs, two rows a pair, in the order of the rows."""
    highest_id: int = -1
    """Highest token id of all kept pairs."""
    longest: int = -1
    """Number of tokens of the longest sequence of all kept pairs: prompt and one completion."""
    keys: "array[int]" = field(default_factory=lambda: array("Q"))
    """First 8 bytes of each kept pair's key."""
    prompts: "array[int]" = field(default_factory=lambda: array("Q"))
    """8-byte digest of each kept pair's prompt."""
    _groups: dict[int, dict[int, int]] = field(default_factory=dict)
    """Computed tokens of the open unit: by prompt, the prompt's own under 0 and those of each completion."""
    _batch: list[int] = field(default_factory=list)
    """Longest sequence of each pair of the open batch."""

    def take(self, outcome: Outcome, tokenizer: Any) -> None:
        """Add one row."""
        pair, whole = outcome.pair, outcome.whole
        if pair is None or whole is None:
            # The message begins with the place, which an example stores in a field of its own. A tie has no error.
            text = REASONS["tie"] if outcome.error is None else str(outcome.error)
            self._add_example(outcome.dropped, outcome.row, text.removeprefix(f"{outcome.row.place}: "))
            return
        self.forms[str(pair.form)] += 1
        prompt, chosen, rejected = len(whole.prompt_ids), len(whole.chosen_ids), len(whole.rejected_ids)
        total = prompt + max(chosen, rejected)
        for name, length in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected), ("total", total)):
            self.lengths[name][length] += 1
        text = f"{prompt} + {chosen} / {rejected} tokens: {_shown(pair)}"
        if outcome.kept is None:
            self._add_example(outcome.dropped, outcome.row, text)
            return
        found = _remarks(outcome, outcome.kept.pair, whole, tokenizer)
        self.found.update(found)
        for remark in found:
            shown = f"it begins {tokenizer.decode(whole.prompt_ids[:8])!r}" if remark.endswith("_bos") else text
            self._add_example(remark, outcome.row, shown)
        self._take_kept(outcome.kept)

    def close(self) -> None:
        """End a unit. Stage one shares a prompt's computation within a unit only."""
        self._close_batch()
        self.shared_tokens += sum(sum(group.values()) for group in self._groups.values())
        self._groups = {}

    def add(self, other: "Survey") -> None:
        """Add the survey of the rows that follow. Both must be closed."""
        self.found.update(other.found)
        self.forms.update(other.forms)
        self.scored.update(other.scored)
        for reason, examples in other.examples.items():
            there = self.examples.setdefault(reason, [])
            there += examples[: _MOST_EXAMPLES - len(there)]
        for name, counts in other.lengths.items():
            self.lengths[name].update(counts)
        self.shared_tokens += other.shared_tokens
        self.padded_tokens += other.padded_tokens
        self.highest_id = max(self.highest_id, other.highest_id)
        self.longest = max(self.longest, other.longest)
        self.keys.extend(other.keys)
        self.prompts.extend(other.prompts)

    @property
    def duplicates(self) -> int:
        """Number of kept pairs that equal an earlier one."""
        return len(self.keys) - len(np.unique(_as_array(self.keys)))

    def prompt_groups(self) -> dict[str, int]:
        """Count the distinct prompts, the prompts of several pairs, and the pairs of the most frequent prompt."""
        _, counts = np.unique(_as_array(self.prompts), return_counts=True)
        return {"distinct": len(counts), "shared": int((counts > 1).sum()), "largest": int(counts.max(initial=0))}

    def missing_from(self, keys: Iterable[npt.NDArray[np.uint64]]) -> int:
        """Count the kept pairs whose key is in none of the arrays."""
        stored = np.concatenate([np.empty(0, np.uint64), *keys])
        return int((~np.isin(_as_array(self.keys), stored)).sum())

    def _take_kept(self, kept: KeptPair) -> None:
        """Add the tokens of a kept pair as they are scored."""
        sides = {"prompt": kept.pair.prompt_ids, "chosen": kept.pair.chosen_ids, "rejected": kept.pair.rejected_ids}
        lengths = {name: len(ids) for name, ids in sides.items()}
        self.scored.update(lengths)
        self.lengths["pair"][sum(lengths.values())] += 1
        self.highest_id = max(self.highest_id, *map(max, sides.values()))
        prompt = _digest(kept.pair.prompt_ids)
        self.keys.append(int.from_bytes(kept.key[:8], "big"))
        self.prompts.append(prompt)
        group = self._groups.setdefault(prompt, {0: lengths["prompt"]})
        for name in ("chosen", "rejected"):
            # The last token of a completion predicts nothing, so it is not computed.
            group[_digest(sides[name])] = lengths[name] - 1
        self._batch.append(kept.longest)
        self.longest = max(self.longest, kept.longest)
        if len(self._batch) == self.batch_pairs:
            self._close_batch()

    def _add_example(self, reason: str | None, row: Row, text: str) -> None:
        there = self.examples.setdefault(str(reason), [])
        if len(there) < _MOST_EXAMPLES:
            there.append(Example(row.place, row.number, text))

    def _close_batch(self) -> None:
        self.padded_tokens += 2 * len(self._batch) * max(self._batch, default=0)
        self._batch = []


def percentiles(counts: Mapping[int, int]) -> dict[str, int]:
    """Return the exact percentiles of counted lengths, `p5` to `p100` (the largest); none of no lengths."""
    if not counts:
        return {}
    lengths = np.repeat(list(counts), list(counts.values()))
    found = np.percentile(lengths, PERCENTILES, method="inverted_cdf")
    return {f"p{percent}": int(length) for percent, length in zip(PERCENTILES, found, strict=True)}


def _remarks(outcome: Outcome, cut: TokenizedPair, whole: TokenizedPair, tokenizer: Any) -> list[str]:
    """Return the outcome's remarks and those that only a survey looks for."""
    eos = tokenizer.eos_token_id
    sides = [(whole.chosen_ids, cut.chosen_ids), (whole.rejected_ids, cut.rejected_ids)]
    begins = num_beginnings(whole, tokenizer)
    found = {
        **dict.fromkeys(outcome.remarks, True),
        "eos_cut": eos is not None and any(a.count(eos) > b.count(eos) for a, b in sides),
        "no_eos": eos is not None and any(eos not in a for a, _ in sides),
        "doubled_eos": eos is not None and any((eos, eos) in itertools.pairwise(a) for a, _ in sides),
        "no_bos": begins == 0 and adds_bos(tokenizer),
        "several_bos": begins > 1,
        "weight_0": outcome.kept is not None and outcome.kept.weight == 0,
    }
    if whole.merged and whole.template_differs:
        # The template is the cause, not the tokenizer.
        found |= {"merged_at_the_prompt's_end": False, "template_differs": True}
    return [remark for remark, holds in found.items() if holds]


def _digest(ids: list[int]) -> int:
    # Never 0, under which a group has its prompt.
    return int.from_bytes(blake2b(np.asarray(ids, "<i4").tobytes(), digest_size=8).digest(), "big") or 1


def _as_array(values: "array[int]") -> npt.NDArray[np.uint64]:
    return np.frombuffer(values, np.uint64) if len(values) else np.empty(0, np.uint64)


def _shown(pair: Pair) -> str:
    """Return the end of the prompt's text, where it meets the completions."""
    last = pair.prompt if isinstance(pair.prompt, str) else pair.prompt[-1].get("content")
    text = " ".join(last.split()) if isinstance(last, str) else ""
    return text if len(text) <= _SHOWN else f"... {text[-_SHOWN:]}"
