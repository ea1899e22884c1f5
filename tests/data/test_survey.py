"""What a survey finds in pairs, against pairs made to have it, brute force, and the batches that are really packed."""

import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.data import DataConfig
from pipeline.data.intake import KeptPair, Ledger, outcomes
from pipeline.data.rows import Row
from pipeline.data.survey import PERCENTILES, REASONS, Survey, percentiles
from pipeline.scoring.packing import pack_pairs, pad_pairs
from support.models import make_tokenizer
from support.runs import simple_rows

PLAIN = make_tokenizer()
WITH_BOS = make_tokenizer(bos=True)

_TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
_STEADY = _TURNS + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
# The prompt's last turn ends otherwise where the answer is to follow.
_UNSTEADY = _TURNS + "{% if add_generation_prompt %}<|im_start|>assistant\nthinking: {% endif %}"


def take(
    rows: list[dict[str, Any]], tokenizer: Any, unit: int = 1000, batch_pairs: int = 8, **data: Any
) -> tuple[Survey, Ledger, list[list[KeptPair]]]:
    """Survey rows as loaders do it, in units; also give the kept pairs of each unit."""
    whole, ledger, units = Survey(batch_pairs), Ledger(), []
    data_settings = DataConfig(**{"path": "x", "max_length": 64, "on_bad_row": "skip", **data})
    for start in range(0, len(rows), unit):
        part = Survey(batch_pairs)
        numbered = [Row(n, f"row {n}", lambda row=row: row) for n, row in enumerate(rows[start : start + unit], start)]
        found = list(outcomes(numbered, tokenizer, data_settings))
        for outcome in found:
            ledger.take(outcome)
            part.take(outcome, tokenizer)
        units.append([outcome.kept for outcome in found if outcome.kept is not None])
        part.close()
        # Between processes it travels so.
        whole.add(pickle.loads(pickle.dumps(part)))
    return whole, ledger, units


def chat(answer: str) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": "Two?"}],
        "chosen": [{"role": "assistant", "content": answer}],
        "rejected": [{"role": "assistant", "content": "No."}],
    }


GOOD = {"prompt": "Two?", "chosen": " Yes.", "rejected": " No."}
LONG = {"prompt": "Two?", "chosen": " Yes." * 40, "rejected": " No."}


def _chat_ml(before: str = "") -> Any:
    """Make a tokenizer whose BOS is the mark of a turn, as SmolLM2's is."""
    tokenizer = make_tokenizer(template=before + _STEADY)
    tokenizer.bos_token = "<|im_start|>"
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "row", "found"),
    [
        (WITH_BOS, GOOD, set()),
        (PLAIN, GOOD, set()),
        (WITH_BOS, LONG, {"truncated", "eos_cut"}),
        (WITH_BOS, {**GOOD, "chosen": " Yes." * 40, "rejected": " Yes." * 41},
         {"truncated", "eos_cut", "identical_after_truncation"}),
        (WITH_BOS, {**GOOD, "rejected": " Yes."}, {"identical"}),
        (WITH_BOS, {"prompt": "Two? ", "chosen": "I", "rejected": "A"}, {"merged_at_the_prompt's_end"}),
        (WITH_BOS, {**GOOD, "prompt": "One? <s> Two?"}, set()),
        (WITH_BOS, {**GOOD, "prompt": "<s><s>Two?"}, {"several_bos"}),
        (WITH_BOS, {**GOOD, "chosen": " Yes.</s></s>"}, {"doubled_eos"}),
        # A template that writes no beginning, and one that writes two: the tokenizer's own is not added.
        (make_tokenizer(bos=True, template=_STEADY), chat("Yes.</s>"), {"no_bos", "no_eos"}),
        (make_tokenizer(bos=True, template="<s><s>" + _STEADY), chat("Yes.</s>"), {"several_bos", "no_eos"}),
        (make_tokenizer(template=_STEADY), chat("Yes."), {"no_eos"}),
        # BOS opens every turn of a conversation, and stands before no text.
        (_chat_ml(), chat("Yes."), {"no_eos"}),
        (_chat_ml(), GOOD, set()),
        (_chat_ml("<|im_start|>"), chat("Yes."), {"several_bos", "no_eos"}),
        (make_tokenizer(template=_UNSTEADY + "</s>"), chat("Yes."), {"template_differs"}),
    ],
)  # fmt: skip
def test_what_a_pair_has_is_found_and_nothing_else(tokenizer: Any, row: dict[str, Any], found: set[str]) -> None:
    survey, ledger, _ = take([row, row], tokenizer)
    assert dict(survey.found) == dict.fromkeys(found, 2)
    assert found <= set(REASONS)
    assert {reason: [e.row for e in examples] for reason, examples in survey.examples.items()} == {
        reason: [0, 1] for reason in found
    }
    for remark in ("truncated", "identical", "identical_after_truncation"):
        assert survey.found[remark] == ledger.noted[remark]
    # The ledger does not tell the two apart.
    merged = "merged_at_the_prompt's_end"
    assert survey.found[merged] + survey.found["template_differs"] == ledger.noted[merged]


def test_a_pair_of_weight_0_is_found() -> None:
    survey, _, _ = take([{**GOOD, "w": 0}, {**GOOD, "w": 0.5}], PLAIN, columns={"weight": "w"})
    assert dict(survey.found) == {"weight_0": 1}


def test_a_beginning_is_not_missed_where_ends_are_marked_by_the_same_token() -> None:
    tokenizer = make_tokenizer(bos=True)
    tokenizer.eos_token = "<s>"
    assert "several_bos" not in take([GOOD], tokenizer)[0].found
    survey, _, _ = take([{**GOOD, "prompt": "<s><s>Two?"}], tokenizer)
    assert survey.found["several_bos"] == 1
    assert survey.examples["several_bos"][0].text == "it begins '<s><s>Two?'"


def test_dropped_rows_have_examples_with_their_place_and_count_in_the_lengths_of_those_with_tokens() -> None:
    rows = [GOOD, {**GOOD, "prompt": "Two?" * 80}, {"prompt": "Two?", "chosen": None, "rejected": " No."}]
    survey, ledger, _ = take(rows, PLAIN)
    assert dict(ledger.dropped) == {"prompt_too_long": 1, "wrong_type": 1}
    assert [e.place for e in survey.examples["prompt_too_long"]] == ["row 1"]
    # The error's message has the place too.
    [refused] = survey.examples["wrong_type"]
    assert refused.place == "row 2" and refused.text.startswith("chosen must be text")
    assert sum(survey.lengths["prompt"].values()) == 2 and sum(survey.lengths["pair"].values()) == 1


@pytest.mark.parametrize("unit", [3, 7, 1000])
def test_computed_tokens_are_those_of_the_batches_and_duplicates_those_counted_by_hand(unit: int) -> None:
    simple = simple_rows(10)
    # The same prompt with other answers, the same pair again, one completion twice under its prompt.
    rows = [*simple, *[{**row, "chosen": " Perhaps."} for row in simple[:4]], *simple[:5], simple[0]]
    survey, _, units = take(rows, WITH_BOS, unit=unit, batch_pairs=2)
    pairs = [pair for some in units for pair in some]
    assert survey.shared_tokens == sum(pack_pairs([p.pair for p in some]).input_ids.numel() for some in units)
    assert survey.padded_tokens == sum(
        pad_pairs([p.pair for p in some[i : i + 2]], 0).input_ids.numel()
        for some in units
        for i in range(0, len(some), 2)
    )
    assert survey.scored["prompt"] == sum(len(p.pair.prompt_ids) for p in pairs)
    assert survey.scored["rejected"] == sum(len(p.pair.rejected_ids) for p in pairs)
    assert survey.duplicates == len(pairs) - len({p.key for p in pairs}) == 6
    assert survey.prompt_groups() == {"distinct": 10, "shared": 5, "largest": 4}
    assert survey.longest == max(
        len(p.pair.prompt_ids + max(p.pair.chosen_ids, p.pair.rejected_ids, key=len)) for p in pairs
    )
    assert survey.highest_id == max(max(p.pair.prompt_ids + p.pair.chosen_ids + p.pair.rejected_ids) for p in pairs)


def test_pairs_that_a_store_lacks_are_counted_by_key() -> None:
    survey, _, units = take(simple_rows(10), WITH_BOS)
    keys = np.array([int.from_bytes(pair.key[:8], "big") for pair in units[0]], np.uint64)
    assert survey.missing_from([keys[:4], keys[6:]]) == 2
    assert survey.missing_from([]) == 10 and survey.missing_from([keys[::-1]]) == 0


@settings(max_examples=30)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=200))
def test_percentiles_are_those_of_the_list(lengths: list[int]) -> None:
    counts = {length: lengths.count(length) for length in lengths}
    expected = np.percentile(lengths, PERCENTILES, method="inverted_cdf")
    assert list(percentiles(counts).values()) == expected.tolist()


def test_a_survey_holds_sixteen_bytes_a_pair_and_a_few_examples() -> None:
    few, many = (take([LONG] * count, WITH_BOS, unit=20)[0] for count in (20, 220))
    assert len(pickle.dumps(many)) - len(pickle.dumps(few)) < 16 * 200 + 200
    assert len(many.examples["truncated"]) == 3
