"""What people should know of a set of pairs before it costs them a GPU: changes, lengths, tokens, duplicates.

A survey takes pairs one at a time and adds up; surveys of parts of a set add up to that of the whole, so that loader
processes can each make their own. What it holds does not grow with the text: counts, a few examples, a count for each
length that occurs, and 16 bytes a pair by which duplicates and shared prompts are told.
"""

import itertools
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.data.pairs import Pair
from pipeline.data.tokens import TokenizedPair, renders_prompt_alike

__all__ = ["PERCENTILES", "REASONS", "Example", "Survey", "percentiles"]

PERCENTILES = (5, 25, 50, 75, 95, 99, 100)


REASONS = {
    "prompt_too_long": "prompt alone fills max_length, nothing is left to score",
    "truncated": "a completion is cut at max_length",
    "eos_cut": "the end token was there and is cut off",
    "no_eos": "a completion has no end token, so the policy does not learn to stop there",
    "doubled_eos": "two end tokens in a row",
    "no_bos": "the tokenizer has a beginning token, the pair has none",
    "several_bos": "more than one beginning token",
    "merged_at_the_prompt's_end": "tokens merge across the prompt's end, the completion starts a little earlier",
    "template_differs": "the chat template writes the prompt otherwise when the answer follows",
    "identical": "chosen and rejected are equal",
    "identical_after_truncation": "chosen and rejected are equal once they are cut",
}
"""What can be found in a pair, for people"""


_MOST_EXAMPLES = 3


_SHOWN = 60
"""Characters of an example's text"""


@dataclass(frozen=True)
class Example:
    """One pair that something was found in."""

    place: str
    row: int
    text: str


@dataclass
class Survey:
    """What was found in the pairs so far."""

    batch_pairs: int = 8
    """Pairs of the padded batches that packing is compared with"""
    found: Counter[str] = field(default_factory=Counter)
    """Kept pairs, by what was found in them: keys of `REASONS`"""
    examples: dict[str, list[Example]] = field(default_factory=dict)
    """A few of the first, by what was found or why the row was dropped"""
    lengths: dict[str, Counter[int]] = field(default_factory=dict)
    """How often each length in tokens occurs. Before truncation, in all pairs with tokens: prompt, chosen, rejected and
    total, prompt and longer completion; of kept pairs, as scored: pair, the prompt and both completions"""
    scored: Counter[str] = field(default_factory=Counter)
    """Tokens of kept pairs after truncation: prompt, chosen, rejected"""
    shared_tokens: int = 0
    """What stage one computes: each prompt of a unit once"""
    padded_tokens: int = 0
    """What batches of `batch_pairs` pairs compute, two padded rows for each, cut from the rows in their order"""
    highest_id: int = -1
    """Of all tokens of kept pairs"""
    keys: "array[int]" = field(default_factory=lambda: array("Q"))
    """Of each kept pair, the first 8 bytes of its key"""
    prompts: "array[int]" = field(default_factory=lambda: array("Q"))
    """Of each kept pair, 8 bytes that stand for its prompt"""
    _groups: dict[int, dict[int, int]] = field(default_factory=dict)
    """Of the open unit: by prompt, its tokens under 0 and those of each completion"""
    _batch: list[int] = field(default_factory=list)
    """Longest sequence of each pair of the open batch"""

    def keep(
        self, place: str, row: int, key: bytes, pair: Pair, whole: TokenizedPair, cut: TokenizedPair, tokenizer: Any
    ) -> None:
        """Take in a pair that is kept, `whole` before truncation and `cut` after it."""
        self._measure(whole)
        shown = _shown(pair)
        found = [remark for remark, holds in _remarks(pair, whole, cut, tokenizer) if holds]
        self.found.update(found)
        for remark in found:
            self._add_example(remark, Example(place, row, f"{_sizes(whole)}: {shown}"))
        sides = {"prompt": cut.prompt_ids, "chosen": cut.chosen_ids, "rejected": cut.rejected_ids}
        self.scored.update({name: len(ids) for name, ids in sides.items()})
        self._count("pair", sum(map(len, sides.values())))
        self.highest_id = max(self.highest_id, *(max(ids) for ids in sides.values()))
        prompt = _digest(cut.prompt_ids)
        self.keys.append(int.from_bytes(key[:8], "big"))
        self.prompts.append(prompt)
        group = self._groups.setdefault(prompt, {0: len(cut.prompt_ids)})
        for ids in (cut.chosen_ids, cut.rejected_ids):
            # The last token of a completion predicts nothing, and is not computed.
            group[_digest(ids)] = len(ids) - 1
        self._batch.append(len(cut.prompt_ids) + max(len(cut.chosen_ids), len(cut.rejected_ids)))
        if len(self._batch) == self.batch_pairs:
            self._close_batch()

    def drop(self, place: str, row: int, reason: str, pair: Pair, whole: TokenizedPair) -> None:
        """Take in a pair with tokens that is dropped all the same."""
        self._measure(whole)
        self._add_example(reason, Example(place, row, f"{_sizes(whole)}: {_shown(pair)}"))

    def refuse(self, place: str, row: int, reason: str, message: str) -> None:
        """Take in a row that can't be a pair. Its message begins with the place, which an example has apart."""
        self._add_example(reason, Example(place, row, message.removeprefix(f"{place}: ")))

    def close(self) -> None:
        """End a unit: prompts are shared within one alone."""
        self._close_batch()
        self.shared_tokens += sum(sum(group.values()) for group in self._groups.values())
        self._groups = {}

    def add(self, other: "Survey") -> None:
        """Add the survey of the rows that follow. Both must be closed."""
        self.found.update(other.found)
        self.scored.update(other.scored)
        for reason, examples in other.examples.items():
            for example in examples:
                self._add_example(reason, example)
        for name, counts in other.lengths.items():
            self.lengths.setdefault(name, Counter()).update(counts)
        self.shared_tokens += other.shared_tokens
        self.padded_tokens += other.padded_tokens
        self.highest_id = max(self.highest_id, other.highest_id)
        self.keys.extend(other.keys)
        self.prompts.extend(other.prompts)

    @property
    def duplicates(self) -> int:
        """Kept pairs that are equal to an earlier one."""
        return len(self.keys) - len(np.unique(_as_array(self.keys)))

    def prompt_groups(self) -> dict[str, int]:
        """Count the distinct prompts, those that several pairs have, and the pairs of the one that most have."""
        if not len(self.prompts):
            return {"distinct": 0, "shared": 0, "largest": 0}
        _, counts = np.unique(_as_array(self.prompts), return_counts=True)
        return {"distinct": len(counts), "shared": int((counts > 1).sum()), "largest": int(counts.max())}

    def missing_from(self, keys: Iterable[npt.NDArray[np.uint64]]) -> int:
        """Count the kept pairs whose key is in none of the arrays."""
        stored = list(keys)
        return int((~np.isin(_as_array(self.keys), np.concatenate(stored))).sum()) if stored else len(self.keys)

    def _measure(self, whole: TokenizedPair) -> None:
        prompt, chosen, rejected = len(whole.prompt_ids), len(whole.chosen_ids), len(whole.rejected_ids)
        self._count("prompt", prompt)
        self._count("chosen", chosen)
        self._count("rejected", rejected)
        self._count("total", prompt + max(chosen, rejected))

    def _count(self, name: str, length: int) -> None:
        self.lengths.setdefault(name, Counter())[length] += 1

    def _add_example(self, reason: str, example: Example) -> None:
        there = self.examples.setdefault(reason, [])
        if len(there) < _MOST_EXAMPLES:
            there.append(example)

    def _close_batch(self) -> None:
        if self._batch:
            self.padded_tokens += 2 * len(self._batch) * max(self._batch)
        self._batch = []


def percentiles(counts: Mapping[int, int]) -> dict[str, int]:
    """Give the lengths that so many percent of all reach at most, exactly: `p5` to `p100`, the largest."""
    if not counts:
        return {}
    lengths = np.array(sorted(counts))
    reached = np.cumsum([counts[length] for length in lengths.tolist()])
    ranks = [max(1, -(-reached[-1] * percent // 100)) for percent in PERCENTILES]
    return {
        f"p{percent}": int(lengths[np.searchsorted(reached, rank)])
        for percent, rank in zip(PERCENTILES, ranks, strict=True)
    }


def _remarks(pair: Pair, whole: TokenizedPair, cut: TokenizedPair, tokenizer: Any) -> list[tuple[str, bool]]:
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    sides = [(whole.chosen_ids, cut.chosen_ids), (whole.rejected_ids, cut.rejected_ids)]
    beginnings = [_beginnings(whole.prompt_ids, side, bos, eos) for side, _ in sides]
    in_template = whole.merged and not isinstance(pair.prompt, str) and not renders_prompt_alike(pair, tokenizer)
    identical = whole.chosen_ids == whole.rejected_ids
    return [
        ("truncated", cut is not whole),
        ("eos_cut", eos is not None and any(a.count(eos) > b.count(eos) for a, b in sides)),
        ("no_eos", eos is not None and any(eos not in a for a, _ in sides)),
        ("doubled_eos", eos is not None and any(_follows_itself(a, eos) for a, _ in sides)),
        ("no_bos", bos is not None and 0 in beginnings),
        ("several_bos", bos is not None and max(beginnings) > 1),
        ("merged_at_the_prompt's_end", whole.merged and not in_template),
        ("template_differs", in_template),
        ("identical", identical),
        ("identical_after_truncation", not identical and cut.chosen_ids == cut.rejected_ids),
    ]


def _beginnings(prompt: list[int], completion: list[int], bos: int | None, eos: int | None) -> int:
    """How many beginning tokens a sequence has; where ends are marked by the same token, those it begins with."""
    if bos != eos:
        return prompt.count(bos) + completion.count(bos)  # type: ignore[arg-type]
    return next((i for i, token in enumerate(prompt) if token != bos), len(prompt))


def _follows_itself(ids: list[int], token: int) -> bool:
    return any(a == b == token for a, b in itertools.pairwise(ids))


def _digest(ids: list[int]) -> int:
    # Never 0, under which a group has its prompt.
    return int.from_bytes(blake2b(np.asarray(ids, "<i4").tobytes(), digest_size=8).digest(), "big") or 1


def _as_array(values: "array[int]") -> npt.NDArray[np.uint64]:
    return np.frombuffer(values, np.uint64) if len(values) else np.empty(0, np.uint64)


def _sizes(pair: TokenizedPair) -> str:
    return f"{len(pair.prompt_ids)} + {len(pair.chosen_ids)} / {len(pair.rejected_ids)} tokens"


def _shown(pair: Pair) -> str:
    """The end of the prompt's text, where it meets the completions."""
    last = pair.prompt if isinstance(pair.prompt, str) else pair.prompt[-1].get("content")
    text = " ".join(last.split()) if isinstance(last, str) else ""
    return text if len(text) <= _SHOWN else f"... {text[-_SHOWN:]}"
