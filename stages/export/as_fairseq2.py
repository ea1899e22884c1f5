"""Write sets as the JSON Lines that fairseq2's DPO recipe reads when it has no reference model.

The names are those of its `recipes/lm/dpo/dataset.py`. fairseq2 tokenizes prompt and completion apart, or marks a
conversation's tokens by its chat template, and cuts nothing. A sum holds there only if it comes to the same tokens.
"""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.base.errors import DataError, number_of
from pipeline.base.progress import say
from pipeline.data.dates import asks_for_date
from pipeline.data.pairs import Pair
from stages.export.scored import ScoredRow, ScoredSet

__all__ = ["write"]


def write(sets: Mapping[str, ScoredSet], folder: Path) -> None:
    """Write `NAME/pairs.jsonl` for every set, without the pairs of which fairseq2 would score other tokens.

    Raises:
        DataError: A pair was not scored, or no pair of a set is left.
    """
    for name, scored in sets.items():
        left_out: Counter[str] = Counter()
        written = 0
        (folder / name).mkdir(parents=True)
        with (folder / name / "pairs.jsonl").open("w", encoding="utf-8") as file:
            for row in scored:
                reason = _reason_against(row, scored.tokenizer)
                if reason is not None:
                    left_out[reason] += 1
                    continue
                # A message may have keys that no template reads, like a time.
                file.write(json.dumps(_line(row), ensure_ascii=False, default=str) + "\n")
                written += 1
        reasons = "".join(f"; {count:,} left out: {reason}" for reason, count in left_out.items())
        if not written:
            raise DataError(f"{name}: no pair can be written for fairseq2{reasons or ': ' + scored.summary()}")
        say(f"{name}: {number_of(written, 'pair')}{reasons}; {scored.summary()}")


def _line(row: ScoredRow) -> dict[str, Any]:
    pair = row.outcome.pair
    assert pair is not None
    if isinstance(pair.prompt, str):
        content = {"src": pair.prompt, "tgt_chosen": pair.chosen, "tgt_rejected": pair.rejected}
    else:
        content = {"chat_chosen": [*pair.prompt, *pair.chosen], "chat_rejected": [*pair.prompt, *pair.rejected]}
    sums = {"reference_score_chosen": row.chosen_logps, "reference_score_rejected": row.rejected_logps}
    return {"id": row.outcome.row.number, **content, **sums}


def _reason_against(row: ScoredRow, tokenizer: Any) -> str | None:
    """Say why the pair's sums would not be fairseq2's; None if they would."""
    pair, whole = row.outcome.pair, row.outcome.whole
    assert pair is not None
    assert whole is not None
    if row.kept.truncated:
        return "data.max_length cuts them"
    if pair.tools or pair.chat_template_kwargs:
        return "fairseq2 has no tools and no chat_template_kwargs"
    if not isinstance(pair.prompt, str) and asks_for_date(tokenizer):
        return "the chat template writes the day's date"
    theirs = _text_tokens(pair, tokenizer) if isinstance(pair.prompt, str) else _chat_tokens(pair, tokenizer)
    ours = [(whole.prompt_ids, ids) for ids in (whole.chosen_ids, whole.rejected_ids)]
    return None if theirs == ours else "fairseq2 would score other tokens"


_Tokens = list[tuple[list[int], list[int]]]
"""Ids before the scored ones, and the scored ones, of the chosen and the rejected sequence"""


def _text_tokens(pair: Pair, tokenizer: Any) -> _Tokens:
    prompt = tokenizer(pair.prompt, verbose=False)["input_ids"]
    if prompt[-1:] == [tokenizer.eos_token_id]:
        prompt = prompt[:-1]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    completions = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (pair.chosen, pair.rejected)]
    return [(prompt, [*ids, *end]) for ids in completions]


def _chat_tokens(pair: Pair, tokenizer: Any) -> _Tokens:
    """Split the conversations where the template's marks of the assistant's tokens begin, which must reach the end.

    Give nothing if the library can't mark them: a template that scored this pair may fail with marks.
    """
    found: _Tokens = []
    for completion in (pair.chosen, pair.rejected):
        try:
            marked = tokenizer.apply_chat_template(
                [*pair.prompt, *completion], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
        except Exception:  # a template is a program and may raise anything
            return []
        ids, marks = marked["input_ids"], marked["assistant_masks"]
        start = marks.index(1) if 1 in marks else len(ids)
        found.append((ids[:start], ids[start:] if all(marks[start:]) else []))
    return found
